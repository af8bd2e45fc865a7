//! Adapters made from adapters.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use serde::de::DeserializeOwned;

use lorafast::algebra;
use lorafast::checkpoint::Checkpoint;
use lorafast::parallel::task::Task;
use lorafast::{Error, Result};

use crate::convert::to_object;
use crate::job;
use crate::sources::Source;

/// Combines adapters; the options are JSON. Returns the report as plain objects.
#[pyfunction]
#[pyo3(signature = (adapters, output, *, base, options, progress))]
pub fn combine_adapters(
    py: Python<'_>,
    adapters: Vec<Source>,
    output: PathBuf,
    base: Option<PathBuf>,
    options: String,
    progress: Option<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    let sources: Vec<_> = adapters.into_iter().map(|adapter| adapter.0).collect();
    let report = job::run(py, progress, |task| {
        let options = parsed(&options)?;
        let base = opened(base.as_deref(), task)?;
        algebra::combine(&sources, base.as_ref(), &output, &options, task)
    })?;
    to_object(py, &report)
}

/// Cuts or pads an adapter's ranks; the options are JSON. Returns the report as plain objects.
#[pyfunction]
#[pyo3(signature = (adapter, output, *, base, options, progress))]
pub fn resize_adapter(
    py: Python<'_>,
    adapter: Source,
    output: PathBuf,
    base: Option<PathBuf>,
    options: String,
    progress: Option<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    let report = job::run(py, progress, |task| {
        let options = parsed(&options)?;
        let base = opened(base.as_deref(), task)?;
        algebra::resize(&adapter.0, base.as_ref(), &output, &options, task)
    })?;
    to_object(py, &report)
}

/// Writes an adapter's updates in other factors; the options are JSON. Returns the report as plain objects.
#[pyfunction]
#[pyo3(signature = (adapter, output, *, base, options, progress))]
pub fn bake_adapter(
    py: Python<'_>,
    adapter: Source,
    output: PathBuf,
    base: Option<PathBuf>,
    options: String,
    progress: Option<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    let report = job::run(py, progress, |task| {
        let options = parsed(&options)?;
        let base = opened(base.as_deref(), task)?.map(Arc::new);
        algebra::bake(&adapter.0, base, &output, &options, task)
    })?;
    to_object(py, &report)
}

/// Extracts an adapter from two checkpoints; the options are JSON. Returns the report as plain objects.
#[pyfunction]
#[pyo3(signature = (tuned, base, output, *, options, parts, progress))]
pub fn extract_adapter(
    py: Python<'_>,
    tuned: PathBuf,
    base: PathBuf,
    output: PathBuf,
    options: String,
    parts: Vec<PathBuf>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    let report = job::run(py, progress, |task| {
        let options = parsed(&options)?;
        let tuned = Checkpoint::open_with(&tuned, task)?;
        let base = Checkpoint::open_with(&base, task)?;
        algebra::extract(&tuned, &base, &output, &options, &parts, task)
    })?;
    to_object(py, &report)
}

/// What of that is left to look at, as plain objects.
#[pyfunction]
#[pyo3(signature = (tuned, base, output, *, options, parts))]
pub fn plan_extraction(
    py: Python<'_>,
    tuned: PathBuf,
    base: PathBuf,
    output: PathBuf,
    options: String,
    parts: Vec<PathBuf>,
) -> PyResult<Py<PyAny>> {
    let plan = job::run(py, None, |task| {
        let options = parsed(&options)?;
        let tuned = Checkpoint::open_with(&tuned, task)?;
        let base = Checkpoint::open_with(&base, task)?;
        algebra::plan_extraction(&tuned, &base, &output, &options, &parts)
    })?;
    to_object(py, &plan)
}

/// Looks at some of it, and leaves what is found in a directory.
#[pyfunction]
#[pyo3(signature = (tuned, base, directory, digest, names, *, options))]
pub fn extract_part(
    py: Python<'_>,
    tuned: PathBuf,
    base: PathBuf,
    directory: PathBuf,
    digest: String,
    names: Vec<String>,
    options: String,
) -> PyResult<()> {
    job::run(py, None, |task| {
        let options = parsed(&options)?;
        let tuned = Checkpoint::open_with(&tuned, task)?;
        let base = Checkpoint::open_with(&base, task)?;
        algebra::extract_part(&tuned, &base, (&digest, &names), &directory, &options, task)
    })
}

fn parsed<T: DeserializeOwned>(options: &str) -> Result<T> {
    serde_json::from_str(options)
        .map_err(|error| Error::Argument(format!("the options are not sound: {error}")))
}

fn opened(base: Option<&std::path::Path>, task: &Task) -> Result<Option<Checkpoint>> {
    base.map(|base| Checkpoint::open_with(base, task)).transpose()
}
