//! The factors that have a spectrum, read for whoever decomposes them elsewhere.

use crate::adapter::Adapter;
use crate::error::Result;
use crate::measure::statistics::ElementType;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// The factors of one module, as they are stored.
#[derive(Debug, Clone)]
pub struct StoredFactors {
    /// m, n and r.
    pub extents: (usize, usize, usize),
    /// s of s·B·A.
    pub scaling: f64,
    /// The element type of B and its bytes, (m, r) row-major.
    pub b: (Dtype, Vec<u8>),
    /// The element type of A and its bytes, (r, n) row-major.
    pub a: (Dtype, Vec<u8>),
}

/// The factors of every module that has a spectrum, in the adapter's order.
///
/// # Errors
/// [`Error::Adapter`](crate::Error::Adapter) if the file changed meanwhile,
/// [`Error::Io`](crate::Error::Io).
pub fn stored_factors(adapter: &Adapter) -> Result<Vec<StoredFactors>> {
    let read = |tensor: &Tensor| -> Result<(Dtype, Vec<u8>)> {
        Ok((tensor.dtype.clone(), tensor.read()?))
    };
    let mut found = Vec::new();
    for module in adapter.modules().values() {
        let Some((a, b)) = module.delta.plain() else { continue };
        let measurable =
            [a, b].iter().all(|tensor| ElementType::from_dtype(&tensor.dtype).is_some());
        if let Some(extents) = super::extents(module).filter(|_| measurable) {
            let (a, b) = (read(a)?, read(b)?);
            found.push(StoredFactors { extents, scaling: module.scaling, b, a });
        }
    }
    adapter.check_unchanged()?;
    Ok(found)
}
