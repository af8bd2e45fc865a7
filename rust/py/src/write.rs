//! Adapters written in a format.

use std::path::PathBuf;

use pyo3::prelude::*;

use lorafast::Error;
use lorafast::adapter::format::{self, WriteOptions};
use lorafast::checkpoint::Checkpoint;
use lorafast::tensor::dtype::Dtype;

use crate::job;
use crate::sources::Source;

/// Writes an adapter in the format of that name, to a directory or a file as the format has it.
#[pyfunction]
#[pyo3(signature = (adapter, target, *, format, base=None, dtype=None))]
pub fn write_adapter(
    py: Python<'_>,
    adapter: Source,
    target: PathBuf,
    format: String,
    base: Option<PathBuf>,
    dtype: Option<String>,
) -> PyResult<()> {
    job::run(py, None, |task| {
        let known = format::named(&format)
            .ok_or_else(|| Error::Argument(format!("no format is called {format:?}")))?;
        let open = |base| Checkpoint::open_with(base, task);
        let base = base.as_deref().map(open).transpose()?;
        let adapter = adapter.0.open_for(base.as_ref(), task)?;
        let dtype = dtype.as_deref().map(Dtype::from_name);
        known.write(&adapter, &target, &WriteOptions { base: base.as_ref(), dtype })?;
        adapter.check_unchanged()
    })
}
