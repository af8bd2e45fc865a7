//! Scanning many adapters: results are handed over while the scan goes on.

use std::time::Duration;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use lorafast::measure::fleet::{Kind, Level, Scanned, columns, scan};
use lorafast::parallel::bounded::Waiting;
use lorafast::parallel::task::{Task, build_pool};

use crate::errors::to_python;
use crate::sources::{Source, to_core};
use crate::{job, to_object};

/// Bytes of results that wait for Python.
const ROOM: usize = 8 << 20;
/// Results that are Python's objects at one time, which are larger than what they say.
const PORTION: usize = 32;
/// What a result holds beside its modules, its config above all; about, and rather too much.
const OWN: usize = 4 << 10;
/// What a module holds beside its row: its path.
const OF_MODULE: usize = 128;
/// How often results are handed over. What is finished after the last time is all that is left for
/// one thread to do when the others have nothing more.
const STEP: Duration = Duration::from_millis(5);

type Delivery = (usize, lorafast::Result<Scanned>);

/// Looks at adapters. `receive` is called on the calling thread with a list of (position, what was found or
/// the exception that tells why not) of those that were finished since, and with the bytes done
/// and to do.
#[pyfunction]
#[pyo3(signature = (sources, *, metrics, threads, receive))]
pub fn scan_adapters(
    py: Python<'_>,
    sources: Vec<Source>,
    metrics: &str,
    threads: Option<usize>,
    receive: Py<PyAny>,
) -> PyResult<()> {
    let level = Level::from_name(metrics).map_err(|error| to_python(py, error))?;
    let sources = to_core(sources);
    let waiting = Waiting::<Delivery>::new(ROOM);
    let report = |py: Python<'_>, task: &Task| -> PyResult<()> {
        loop {
            let batch = waiting.take(PORTION);
            let is_whole = batch.len() == PORTION;
            let (done, total) = task.progress();
            let batch: Vec<_> = batch
                .into_iter()
                .map(|(position, result)| Ok((position, to_result(py, result)?)))
                .collect::<PyResult<_>>()?;
            receive.call1(py, (batch, done.min(total), total))?;
            // Where there are more they are not left to wait for the next report.
            if !is_whole {
                return Ok(());
            }
            py.check_signals()?;
        }
    };
    job::run_reporting(py, STEP, &report, |task| {
        let pool = build_pool(threads)?;
        scan(&sources, level, &pool, task, &|position, result| {
            waiting.push(task, size_of(&result), (position, result));
        })
    })
}

fn size_of(result: &lorafast::Result<Scanned>) -> usize {
    result.as_ref().map_or(OWN, |scanned| {
        let modules = &scanned.modules;
        let values = modules.rows.len() + 8 * modules.singular_values.len();
        OWN + values + OF_MODULE * modules.paths.len()
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
