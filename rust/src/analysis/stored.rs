//! The factors that have a spectrum, read for whoever decomposes them elsewhere.

use crate::adapter::Adapter;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::file::read_at;
use crate::safetensors::TensorInfo;
use crate::statistics::ElementType;

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
/// [`Error::Io`] if they cannot be read.
pub fn stored_factors(adapter: &Adapter) -> Result<Vec<StoredFactors>> {
    let read = |tensor: &TensorInfo| -> Result<(Dtype, Vec<u8>)> {
        let file = adapter.file();
        let mut bytes = vec![0; tensor.bytes() as usize];
        let offset = file.data_start() + tensor.range.start;
        read_at(file.file(), &mut bytes, offset).map_err(|error| Error::io(file.path(), error))?;
        Ok((tensor.dtype.clone(), bytes))
    };
    let mut found = Vec::new();
    for module in adapter.modules().values() {
        let pair = [&module.a, &module.b];
        let measurable = pair.iter().all(|tensor| ElementType::from_dtype(&tensor.dtype).is_some());
        if let Some(extents) = super::extents(module).filter(|_| measurable) {
            let (a, b) = (read(&module.a)?, read(&module.b)?);
            found.push(StoredFactors { extents, scaling: module.scaling, b, a });
        }
    }
    Ok(found)
}
