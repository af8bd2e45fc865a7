//! Executions in steps, of which another device does a part: rows in and out, and everything that it
//! leaves to the CPU; and what a cut-off one has left.

use std::collections::HashSet;
use std::path::PathBuf;
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;

use lorafast::execute::session::{RoundingSample, Session, TensorId, WorkFilter};
use lorafast::execute::{Options, Summary};
use lorafast::parallel::task::Task;
use lorafast::plan::{self, Inputs};
use lorafast::storage::{sink, staging};
use lorafast::verify;

use crate::buffer::Memory;
use crate::convert::to_object;
use crate::errors::to_python;
use crate::job;
use crate::operands::tensor_at;

/// Finishes or takes back what a merge that was cut off left in an output; says which.
#[pyfunction]
pub fn recover_output(py: Python<'_>, output: PathBuf) -> PyResult<Py<PyAny>> {
    let recovery = job::run(py, None, |_| staging::recover(&output))?;
    to_object(py, &recovery)
}

/// What keeps other merges out of an output whose model is in place, until it is released or
/// dropped.
#[pyclass(frozen, module = "lorafast._core")]
pub struct OutputLock(Mutex<Option<sink::OutputLock>>);

#[pymethods]
impl OutputLock {
    /// Lets other merges in. Returns what went wrong, in words.
    fn release(&self, py: Python<'_>) -> Option<String> {
        let lock = self.0.lock().unwrap_or_else(PoisonError::into_inner).take();
        lock.and_then(|lock| py.detach(|| lock.release()))
    }
}

/// A summary as plain objects, and the lock on the output.
pub type Executed = (Py<PyAny>, OutputLock);

pub fn executed(
    py: Python<'_>,
    (summary, lock): (Summary, sink::OutputLock),
) -> PyResult<Executed> {
    Ok((to_object(py, &summary)?, OutputLock(Mutex::new(Some(lock)))))
}

/// A begun execution; dropped before `finish`, it leaves the output as it was found.
#[pyclass(frozen, module = "lorafast._core")]
pub struct Execution {
    inputs: Inputs,
    plan: Arc<plan::Plan>,
    session: RwLock<Option<Session>>,
}

impl Execution {
    pub fn begin(
        inputs: &Inputs,
        plan: &Arc<plan::Plan>,
        output: &dyn sink::Destination,
        options: &Options,
        task: &Task,
    ) -> lorafast::Result<Self> {
        let session = Session::begin(inputs, plan, output, options, task)?;
        Ok(Self { inputs: inputs.clone(), plan: plan.clone(), session: RwLock::new(Some(session)) })
    }

    fn with<T>(&self, work: impl FnOnce(&Session) -> lorafast::Result<T>) -> Failed<T> {
        let session = self.session.read().map_err(|_| over())?;
        let session = session.as_ref().ok_or_else(over)?;
        work(session).map_err(Failure::Core)
    }
}

/// Why a step failed: the core's error, or a step after the end.
enum Failure {
    Core(lorafast::Error),
    Over,
}

type Failed<T> = Result<T, Failure>;

fn over() -> Failure {
    Failure::Over
}

impl Failure {
    fn raise(self, py: Python<'_>) -> PyErr {
        match self {
            Self::Core(error) => to_python(py, error),
            Self::Over => PyRuntimeError::new_err("the execution is over"),
        }
    }
}

#[pymethods]
impl Execution {
    /// Bytes of the whole output.
    #[getter]
    fn total(&self, py: Python<'_>) -> PyResult<u64> {
        self.with(|session| Ok(session.total())).map_err(|failure| failure.raise(py))
    }

    /// Carries out on the CPU everything but the merges of `places`, or with `only` those alone.
    #[pyo3(signature = (places, *, only=false, progress=None))]
    fn run(
        &self,
        py: Python<'_>,
        places: HashSet<TensorId>,
        only: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<()> {
        let part = if only { WorkFilter::Only(places) } else { WorkFilter::Without(places) };
        let session = self.session.try_read();
        let session = session.ok();
        let Some(session) = session.as_ref().and_then(|session| session.as_ref()) else {
            return Err(Failure::Over.raise(py));
        };
        job::run(py, progress, |task| {
            task.expect(session.total());
            session.run(&self.inputs, &self.plan, &part, task)
        })
    }

    /// Reads the rows that fill `buffer`, from `first_row` of a merged tensor on.
    fn read_rows(
        &self,
        py: Python<'_>,
        place: TensorId,
        first_row: usize,
        buffer: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let tensor = tensor_at(&self.plan, place)?;
        let memory = Memory::of(buffer, true)?;
        let row = tensor.matrix().1 * tensor.source.dtype.size();
        let count = whole_rows(memory.length, row)?;
        py.detach(|| {
            // SAFETY: the caller gives the buffer to nobody else until this call is over.
            let bytes = unsafe { memory.bytes_mut() };
            let rows = first_row..first_row + count;
            self.with(|session| session.read_rows(&self.inputs, tensor, &rows, bytes))
        })
        .map_err(|failure| failure.raise(py))
    }

    /// Writes the rows in `buffer`, from `first_row` of a merged tensor on.
    fn write_rows(
        &self,
        py: Python<'_>,
        place: TensorId,
        first_row: usize,
        buffer: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let tensor = tensor_at(&self.plan, place)?;
        let memory = Memory::of(buffer, false)?;
        let row = tensor.matrix().1 * tensor.output_dtype.size();
        if first_row + whole_rows(memory.length, row)? > tensor.matrix().0 {
            return Err(PyValueError::new_err("rows beyond the tensor's end"));
        }
        py.detach(|| {
            // SAFETY: the caller leaves the buffer as it is until this call is over.
            let bytes = unsafe { memory.bytes() };
            self.with(|session| session.write_rows(&self.plan, place, first_row, bytes))
        })
        .map_err(|failure| failure.raise(py))
    }

    /// Measures what rounding took of some values of a merged tensor: `before` as `read_rows` has them,
    /// `exact` in float32 (what is to be added to them with `is_change`), `written` as they are written.
    #[pyo3(signature = (place, before, exact, written, *, is_change))]
    fn measure_rounding(
        &self,
        py: Python<'_>,
        place: TensorId,
        before: &Bound<'_, PyAny>,
        exact: &Bound<'_, PyAny>,
        written: &Bound<'_, PyAny>,
        is_change: bool,
    ) -> PyResult<()> {
        let tensor = tensor_at(&self.plan, place)?;
        let before = Memory::of(before, false)?;
        let exact = Memory::of(exact, false)?;
        let written = Memory::of(written, false)?;
        let count = whole_rows(exact.length, size_of::<f32>())?;
        if before.length != count * tensor.source.dtype.size()
            || written.length != count * tensor.rounded_dtype().size()
        {
            return Err(PyValueError::new_err("not as many values of each"));
        }
        py.detach(|| {
            // SAFETY: the caller leaves the buffers as they are until this call is over.
            let (before, exact, written) =
                unsafe { (before.bytes(), exact.bytes(), written.bytes()) };
            let sample = RoundingSample { before, exact, is_change, written };
            self.with(|session| {
                session.measure_rounding(tensor, &sample);
                Ok(())
            })
        })
        .map_err(|failure| failure.raise(py))
    }

    /// Computes the elements of rows of an exact sum again that are not finite in `target`, which holds what
    /// somebody else made of the rows in `source`, from `first_row` on.
    fn decide(
        &self,
        py: Python<'_>,
        place: TensorId,
        first_row: usize,
        source: &Bound<'_, PyAny>,
        target: &Bound<'_, PyAny>,
    ) -> PyResult<()> {
        let tensor = tensor_at(&self.plan, place)?;
        let (source, target) = (Memory::of(source, false)?, Memory::of(target, true)?);
        let (rows, columns) = tensor.matrix();
        let count = whole_rows(source.length, columns * tensor.source.dtype.size())?;
        let written = whole_rows(target.length, columns * tensor.output_dtype.size())?;
        if written != count || first_row + count > rows {
            return Err(PyValueError::new_err("not as many rows of each within the tensor"));
        }
        py.detach(|| {
            // SAFETY: the caller leaves the buffers to this call until it is over.
            let (source, target) = unsafe { (source.bytes(), target.bytes_mut()) };
            let rows = (source, target);
            self.with(|session| session.decide(&self.inputs, &self.plan, place, first_row, rows))
        })
        .map_err(|failure| failure.raise(py))
    }

    /// Raises the error for an element that was finite and is no more, by its index in the tensor.
    fn raise_overflow(&self, py: Python<'_>, place: TensorId, index: usize) -> PyResult<()> {
        let tensor = tensor_at(&self.plan, place)?;
        let error = self.with(|session| Ok(session.overflow(&self.inputs, tensor, index)));
        Err(error.map_or_else(|failure| failure.raise(py), |error| to_python(py, error)))
    }

    /// Writes what is left and makes the output a model; returns the summary as plain objects, and the
    /// lock that keeps other merges out still.
    fn finish(&self, py: Python<'_>) -> PyResult<Executed> {
        let session = self.session.write().ok().and_then(|mut session| session.take());
        let session = session.ok_or_else(|| Failure::Over.raise(py))?;
        let done = job::run(py, None, |task| session.finish(&self.inputs, &self.plan, task))?;
        executed(py, done)
    }

    /// Holds what was written against the plan before it is a model; returns the outcome as plain objects.
    #[pyo3(signature = (*, threads=None, split=false, progress=None))]
    fn verify(
        &self,
        py: Python<'_>,
        threads: Option<usize>,
        split: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let arithmetic = match split {
            true => verify::Arithmetic::SplitFactors,
            false => verify::Arithmetic::Plain,
        };
        let options = verify::Options { threads, full: false, arithmetic };
        let mut session = self.session.write().unwrap_or_else(PoisonError::into_inner);
        let session = session.as_mut().ok_or_else(|| Failure::Over.raise(py))?;
        let outcome = job::run(py, progress, |task| {
            verify::verify_staged(session, &self.inputs, &self.plan, &options, task)
        })?;
        to_object(py, &outcome)
    }

    /// Takes back what was written, so that no later merge goes on from it.
    fn discard(&self, py: Python<'_>) {
        let session = self.session.write().ok().and_then(|mut session| session.take());
        py.detach(|| session.map(Session::discard));
    }

    /// Leaves the output as it was found.
    fn abort(&self, py: Python<'_>) {
        py.detach(|| self.session.write().map(|mut session| session.take()).ok());
    }
}

fn whole_rows(bytes: usize, row: usize) -> PyResult<usize> {
    if bytes == 0 || !bytes.is_multiple_of(row) {
        return Err(PyValueError::new_err(format!("{bytes} bytes are no whole rows of {row}")));
    }
    Ok(bytes / row)
}
