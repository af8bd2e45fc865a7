//! The factors that have a spectrum, read for whoever decomposes them elsewhere.

use crate::adapter::Adapter;
use crate::adapter::factors::Pair;
use crate::adapter::zero;
use crate::error::Result;
use crate::kernel::convert::widen_f64;
use crate::measure::products::products_of;
use crate::tensor::dtype::Dtype;

/// The factors of one product, as they are stored or as what is stored makes them.
#[derive(Debug, Clone)]
pub struct StoredFactors {
    /// m, n and r.
    pub extents: (usize, usize, usize),
    /// s of s·B·A.
    pub scaling: f64,
    /// Why a merge of it changes nothing, in words; `None` where it changes something.
    pub zero_cause: Option<String>,
    /// The element type of B and its bytes, (m, r) row-major.
    pub b: (Dtype, Vec<u8>),
    /// The element type of A and its bytes, (r, n) row-major.
    pub a: (Dtype, Vec<u8>),
}

/// The factors of every product, in the adapter's order.
///
/// # Errors
/// [`Error::Adapter`](crate::Error::Adapter) if the file changed meanwhile,
/// [`Error::Io`](crate::Error::Io).
pub fn stored_factors(adapter: &Adapter) -> Result<Vec<StoredFactors>> {
    let mut found = Vec::new();
    for product in products_of(adapter) {
        let Pair { a, a_dtype, b, b_dtype, .. } =
            product.module.pair(product.expert, None, None)?;
        let (extents, mut scaling) = (product.extents(), product.scaling());
        let (left, right) = (widen_f64(&b_dtype, &b), widen_f64(&a_dtype, &a));
        let shape = [extents.0, extents.1, extents.2];
        // What rounding would leave of a product that is zero is none of its spectrum.
        if zero::vanishes(shape, &|index| left[index], &|index| right[index]) {
            scaling = 0.0;
        }
        let zero_cause = product.zero_cause(adapter, scaling)?;
        found.push(StoredFactors {
            extents,
            scaling,
            zero_cause,
            b: (b_dtype, b),
            a: (a_dtype, a),
        });
    }
    adapter.check_unchanged()?;
    Ok(found)
}
