//! Converting an adapter from one format into another.

use std::path::PathBuf;

use pyo3::prelude::*;

use lorafast::Error;
use lorafast::checkpoint::Checkpoint;
use lorafast::convert;

use crate::convert::to_object;
use crate::job;
use crate::sources::Source;

/// Converts an adapter; the options are JSON. Returns the report as plain objects.
#[pyfunction]
#[pyo3(signature = (adapter, output, *, base, options))]
pub fn convert_adapter(
    py: Python<'_>,
    adapter: Source,
    output: PathBuf,
    base: Option<PathBuf>,
    options: String,
) -> PyResult<Py<PyAny>> {
    let report = job::run(py, None, |task| {
        let options: convert::Options = serde_json::from_str(&options)
            .map_err(|error| Error::Argument(format!("the options are not sound: {error}")))?;
        let open = |base| Checkpoint::open_with(base, task);
        let base = base.as_deref().map(open).transpose()?;
        convert::convert(&adapter.0, base.as_ref(), &output, &options, task)
    })?;
    to_object(py, &report)
}
