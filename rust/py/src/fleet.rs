//! Scanning many adapters: results are handed over while the scan goes on.

use std::path::PathBuf;
use std::sync::{Mutex, PoisonError};

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use lorafast::fleet::{Kind, Level, Scanned, Source, columns, scan};
use lorafast::task::{Task, build_pool};

use crate::errors::to_python;
use crate::{job, to_object};

type Delivery = (usize, lorafast::Result<Scanned>);

/// Looks at adapters, each (path, weights to read in place of its own, file to digest in its
/// place). `receive` is called on the calling thread with a list of (position, what was found or
/// the exception that tells why not) of those that were finished since, and with the bytes done
/// and to do.
#[pyfunction]
#[pyo3(signature = (sources, *, metrics, threads, receive))]
pub fn scan_adapters(
    py: Python<'_>,
    sources: Vec<(PathBuf, Option<PathBuf>, Option<PathBuf>)>,
    metrics: &str,
    threads: Option<usize>,
    receive: Py<PyAny>,
) -> PyResult<()> {
    let level = Level::from_name(metrics).map_err(|error| to_python(py, error))?;
    let sources: Vec<_> = sources
        .into_iter()
        .map(|(path, weights, content)| Source { path, weights, content })
        .collect();
    let finished = Mutex::new(Vec::<Delivery>::new());
    let lock = || finished.lock().unwrap_or_else(PoisonError::into_inner);
    let report = |py: Python<'_>, task: &Task| -> PyResult<()> {
        let batch = std::mem::take(&mut *lock());
        let (done, total) = task.progress();
        let batch: Vec<_> = batch
            .into_iter()
            .map(|(position, result)| Ok((position, to_result(py, result)?)))
            .collect::<PyResult<_>>()?;
        receive.call1(py, (batch, done.min(total), total)).map(|_| ())
    };
    job::run_reporting(py, &report, |task| {
        let pool = build_pool(threads)?;
        scan(&sources, level, &pool, task, &|position, result| lock().push((position, result)))
    })
}

fn to_result(py: Python<'_>, result: lorafast::Result<Scanned>) -> PyResult<Py<PyAny>> {
    let scanned = match result {
        Ok(scanned) => scanned,
        Err(error) => return Ok(to_python(py, error).into_value(py).into_any()),
    };
    let object = to_object(py, &scanned)?;
    let fields = object.bind(py).cast::<PyDict>()?;
    let modules = scanned.modules;
    fields.set_item("module_paths", modules.paths)?;
    fields.set_item("module_kinds", modules.kinds)?;
    fields.set_item("rows", PyBytes::new(py, &modules.rows))?;
    let values: Vec<u8> = modules.singular_values.iter().flat_map(|v| v.to_le_bytes()).collect();
    fields.set_item("singular_values", PyBytes::new(py, &values))?;
    Ok(object)
}

/// The numbers of a module's row: (name, whether it is an i64 and not an f64).
#[pyfunction]
pub fn scan_columns(py: Python<'_>, metrics: &str) -> PyResult<Vec<(&'static str, bool)>> {
    let level = Level::from_name(metrics).map_err(|error| to_python(py, error))?;
    Ok(columns(level).iter().map(|column| (column.name, column.kind == Kind::Integer)).collect())
}
