//! Scanning many adapters: what is found is handed over while the scan goes on, and put in tables.

use std::sync::Arc;
use std::time::Duration;

use arrow_array::{ArrayRef, StringArray};
use crossbeam_channel::{SendTimeoutError, Sender, bounded};
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::PyBytes;

use lorafast::measure::fleet::record::Record;
use lorafast::measure::fleet::tables::{Finding, Tables};
use lorafast::measure::fleet::{Level, Scanned, scan};
use lorafast::measure::metrics::{self, Number};
use lorafast::measure::spectrum::Spectrum;
use lorafast::parallel::task::{Task, build_pool};

use crate::convert::to_object;
use crate::errors::to_python;
use crate::job;
use crate::sources::{Source, to_core};
use crate::table::{Table, to_value_error};

/// Results that wait for Python, which may be slower at a thousand small ones than the threads that
/// find them.
const WAITING: usize = 64;
/// Results that are handed over at a time.
const PORTION: usize = 32;
/// How often a thread that waits for room looks whether the scan was cancelled.
const PATIENCE: Duration = Duration::from_millis(50);
/// How often results are handed over. What is finished after the last time is all that is left for
/// one thread to do when the others have nothing more.
const STEP: Duration = Duration::from_millis(5);

/// A finding: severity, kind, module, figure, reason, and of how many modules it is.
type Told = (String, String, Option<String>, Option<f64>, String, i64);

fn level_of(py: Python<'_>, metrics: &str) -> PyResult<Level> {
    Level::from_name(metrics).map_err(|error| to_python(py, error))
}

/// Puts a result behind the others, as soon as there is room for it; where the job was cancelled
/// nobody makes room any more.
fn send<T>(sender: &Sender<T>, task: &Task, mut result: T) {
    while let Err(SendTimeoutError::Timeout(back)) = sender.send_timeout(result, PATIENCE) {
        if task.check().is_err() {
            return;
        }
        result = back;
    }
}

/// Looks at adapters. `receive` is called on the calling thread with a list of (position, what was
/// found or the exception that tells why not) of those that were finished since, and with the bytes
/// done and to do.
#[pyfunction]
#[pyo3(signature = (sources, *, metrics, threads, receive))]
pub fn scan_adapters(
    py: Python<'_>,
    sources: Vec<Source>,
    metrics: &str,
    threads: Option<usize>,
    receive: Py<PyAny>,
) -> PyResult<()> {
    let level = level_of(py, metrics)?;
    let sources = to_core(sources);
    let (sender, receiver) = bounded::<(usize, lorafast::Result<Scanned>)>(WAITING);
    let report = |py: Python<'_>, task: &Task| -> PyResult<()> {
        loop {
            let batch: Vec<_> = receiver.try_iter().take(PORTION).collect();
            let is_whole = batch.len() == PORTION;
            let (done, total) = task.progress();
            let batch: Vec<(usize, Py<PyAny>)> = batch
                .into_iter()
                .map(|(position, result)| Ok((position, found(py, level, result)?)))
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
            send(&sender, task, (position, result));
        })
    })
}

fn found(py: Python<'_>, level: Level, result: lorafast::Result<Scanned>) -> PyResult<Py<PyAny>> {
    match result {
        Ok(scanned) => Ok(Py::new(py, ScannedAdapter { level, scanned })?.into_any()),
        Err(error) => Ok(to_python(py, error).into_value(py).into_any()),
    }
}

/// What was found in one adapter.
#[pyclass(frozen, module = "lorafast._core")]
pub struct ScannedAdapter {
    level: Level,
    scanned: Scanned,
}

#[pymethods]
impl ScannedAdapter {
    /// The modules' paths.
    #[getter]
    fn modules(&self) -> &[String] {
        &self.scanned.record.modules.paths
    }

    /// What there is beside plain low-rank products, in words.
    #[getter]
    fn features(&self) -> &[String] {
        &self.scanned.features
    }

    /// What could not be measured, and why.
    #[getter]
    fn notes(&self) -> &[String] {
        &self.scanned.notes
    }

    /// The tensors with NaN or infinities: their names, all of their values, and those.
    #[getter]
    fn non_finite(&self) -> Vec<(&str, u64, u64)> {
        let tensors = self.scanned.non_finite.iter();
        tensors.map(|tensor| (tensor.name.as_str(), tensor.count, tensor.non_finite)).collect()
    }

    /// The modules of which a merge changes nothing, each with why, in words.
    #[getter]
    fn zero_causes(&self) -> Vec<(&str, &str)> {
        let paths = &self.scanned.record.modules.paths;
        let causes = self.scanned.zero_causes.iter();
        causes.map(|(position, cause)| (paths[*position].as_str(), cause.as_str())).collect()
    }

    /// The modules that DoRA's magnitudes rescale.
    #[getter]
    fn rescaled(&self) -> Vec<&str> {
        let paths = &self.scanned.record.modules.paths;
        self.scanned.rescaled.iter().map(|position| paths[*position].as_str()).collect()
    }

    /// A metric of every module, or how many singular values each has; `None` where this level of
    /// metrics has it not.
    fn column(&self, py: Python<'_>, name: &str) -> PyResult<Option<Vec<Py<PyAny>>>> {
        let value = |number: Number| -> PyResult<Py<PyAny>> {
            Ok(match number {
                Number::Integer(value) => value.into_pyobject(py)?.into_any().unbind(),
                Number::Real(value) => value.into_pyobject(py)?.into_any().unbind(),
            })
        };
        let column = self.scanned.record.column(self.level, name);
        column.map(|numbers| numbers.map(value).collect()).transpose()
    }

    /// This adapter at another level of metrics, with spectra that were found elsewhere: of each
    /// module its singular values, descending, the mean of its entries, and why a merge of it changes
    /// nothing, if so.
    fn with_spectra(
        &self,
        py: Python<'_>,
        metrics: &str,
        spectra: Vec<(Vec<f64>, f64, Option<String>)>,
    ) -> PyResult<Self> {
        let level = level_of(py, metrics)?;
        let record = &self.scanned.record;
        let extents = |name| -> Vec<usize> {
            let column = record.column(self.level, name).into_iter().flatten();
            column
                .filter_map(|number| match number {
                    Number::Integer(value) => usize::try_from(value).ok(),
                    Number::Real(_) => None,
                })
                .collect()
        };
        let shapes = extents("out_features").into_iter().zip(extents("in_features"));
        let mut zero_causes = Vec::new();
        let spectra: Vec<_> = shapes
            .zip(spectra)
            .enumerate()
            .map(|(position, ((rows, columns), (values, mean, zero_cause)))| {
                zero_causes.extend(zero_cause.map(|cause| (position, cause)));
                Spectrum::from_values(rows, columns, values, mean)
            })
            .collect();
        let record =
            record.with_spectra(self.level, level, &spectra).map_err(PyValueError::new_err)?;
        let mut scanned = Scanned { record, zero_causes, ..self.scanned.clone() };
        if !level.moments {
            scanned.non_finite.clear();
        }
        Ok(Self { level, scanned })
    }

    /// What the tables take of it, for a cache: a line of JSON, and numbers.
    fn encode<'py>(&self, py: Python<'py>) -> (String, Bound<'py, PyBytes>) {
        let (details, numbers) = self.scanned.record.encode();
        (details, PyBytes::new(py, &numbers))
    }

    /// What was encoded, without what findings are made of. Raises ValueError for what is none.
    #[staticmethod]
    fn decode(py: Python<'_>, metrics: &str, details: &str, numbers: &[u8]) -> PyResult<Self> {
        let level = level_of(py, metrics)?;
        let record = Record::decode(level, details, numbers).map_err(PyValueError::new_err)?;
        let (non_finite, zero_causes, rescaled, features, notes) = Default::default();
        let scanned = Scanned { record, non_finite, zero_causes, rescaled, features, notes };
        Ok(Self { level, scanned })
    }
}

/// The tables of a fleet under way.
#[pyclass(module = "lorafast._core")]
pub struct FleetTables {
    tables: Tables,
    names: ArrayRef,
}

#[pymethods]
impl FleetTables {
    #[new]
    fn new(py: Python<'_>, metrics: &str, schema_version: u32) -> PyResult<Self> {
        let tables = Tables::new(level_of(py, metrics)?, schema_version);
        Ok(Self { tables, names: Arc::new(StringArray::new_null(0)) })
    }

    /// The positions of the adapters that are there, ascending.
    fn positions(&self) -> Vec<usize> {
        self.tables.positions()
    }

    /// Adds an adapter and its findings, in any order of the positions.
    fn add(
        &mut self,
        position: usize,
        adapter: &ScannedAdapter,
        findings: Vec<Told>,
    ) -> PyResult<()> {
        if adapter.level != self.tables.level() {
            return Err(PyValueError::new_err("an adapter of another level of metrics"));
        }
        let findings = findings.into_iter().map(finding).collect();
        self.tables.add(position, &adapter.scanned.record, findings).map_err(to_value_error)
    }

    /// Adds what could not be read; the position is `None` of what is no adapter.
    fn add_error(&mut self, position: Option<usize>, path: String, reason: String) {
        self.tables.add_error(position, path, reason);
    }

    /// The tables of adapters and of modules, of which no more can be added.
    fn finish(
        &mut self,
        py: Python<'_>,
        paths: Vec<String>,
        names: Vec<String>,
    ) -> PyResult<(Table, Table)> {
        let (adapters, modules) =
            py.detach(|| self.tables.finish(&paths, &names)).map_err(to_value_error)?;
        let adapters = Table::from(adapters);
        self.names = Arc::clone(adapters.array("name")?);
        Ok((adapters, modules.into()))
    }

    /// The table of findings, with those that only the whole fleet shows: each with the row of its
    /// adapter, or `None`.
    fn findings(&mut self, of_fleet: Vec<(Option<usize>, Told)>) -> PyResult<Table> {
        let of_fleet = of_fleet.into_iter().map(|(row, told)| (row, finding(told))).collect();
        let names = Arc::clone(&self.names);
        Ok(self.tables.findings(of_fleet, names).map_err(to_value_error)?.into())
    }

    /// The table of errors: what is no adapter first, then by position.
    fn errors(&mut self) -> PyResult<Table> {
        Ok(self.tables.errors().map_err(to_value_error)?.into())
    }
}

fn finding((severity, kind, module, figure, reason, count): Told) -> Finding {
    Finding { severity, kind, module, figure: figure.unwrap_or(f64::NAN), count, reason }
}

/// The metrics of a module's update: name, unit, what it is, and whether it is an integer.
#[pyfunction]
pub fn module_metrics(py: Python<'_>) -> PyResult<Py<PyAny>> {
    to_object(py, &metrics::of_updates())
}
