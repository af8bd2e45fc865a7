//! What an executor on another device needs of the core: the updates' factors, rows in and out, and
//! everything that it leaves to the CPU.

use std::collections::HashSet;
use std::path::Path;
use std::sync::{Arc, RwLock};

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::{PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use lorafast::execute::Options;
use lorafast::execute::operands::{self, Operands};
use lorafast::execute::session::{Session, TensorId, WorkFilter};
use lorafast::measure::analysis::stored;
use lorafast::parallel::task::Task;
use lorafast::plan::{self, Inputs, PlannedTensor};
use lorafast::tensor::dtype::Dtype;

use crate::errors::to_python;
use crate::sources::Source;
use crate::{job, to_object};

/// The factors of every module of an adapter that has a spectrum, in order: (m, n, r), the scale,
/// and type and bytes of B and of A.
#[pyfunction]
#[pyo3(signature = (adapter))]
pub fn stored_factors<'py>(py: Python<'py>, adapter: Source) -> PyResult<Vec<StoredFactors<'py>>> {
    let found = job::run(py, None, |task| stored::stored_factors(&adapter.0.open(task)?))?;
    let bytes =
        |(dtype, bytes): &(Dtype, Vec<u8>)| (dtype.name().to_owned(), PyBytes::new(py, bytes));
    let entries =
        found.iter().map(|each| (each.extents, each.scaling, bytes(&each.b), bytes(&each.a)));
    Ok(entries.collect())
}

type StoredFactors<'py> =
    ((usize, usize, usize), f64, (String, Bound<'py, PyBytes>), (String, Bound<'py, PyBytes>));

/// The memory of a writable or readable buffer of single bytes in one piece.
struct Memory {
    /// Keeps the memory where it is.
    _buffer: PyBuffer<u8>,
    address: *mut u8,
    length: usize,
}

// SAFETY: the address is that of memory which its exporter keeps in place for as long as the buffer
// is held, whatever thread looks at it; the buffer itself is released where it was made.
unsafe impl Sync for Memory {}

impl Memory {
    fn of(object: &Bound<'_, PyAny>, writable: bool) -> PyResult<Self> {
        let buffer = PyBuffer::<u8>::get(object)?;
        if !buffer.is_c_contiguous() || writable && buffer.readonly() {
            return Err(PyValueError::new_err(
                "the buffer must be contiguous, and writable to read",
            ));
        }
        let (address, length) = (buffer.buf_ptr().cast(), buffer.len_bytes());
        Ok(Self { _buffer: buffer, address, length })
    }

    /// # Safety
    /// Nobody may change the memory while the slice lives.
    unsafe fn bytes(&self) -> &[u8] {
        if self.length == 0 {
            return &[];
        }
        // SAFETY: the exporter vouches for `length` bytes from `address` on, and the caller for the
        // rest.
        unsafe { std::slice::from_raw_parts(self.address, self.length) }
    }

    /// # Safety
    /// Nobody else may look at the memory while the slice lives.
    #[allow(clippy::mut_from_ref, reason = "the memory belongs to the exporter")]
    unsafe fn bytes_mut(&self) -> &mut [u8] {
        if self.length == 0 {
            return &mut [];
        }
        // SAFETY: the exporter vouches for `length` writable bytes from `address` on, and the
        // caller for the rest.
        unsafe { std::slice::from_raw_parts_mut(self.address, self.length) }
    }
}

/// A planned tensor by its place.
pub fn tensor_at(plan: &plan::Plan, (shard, tensor): TensorId) -> PyResult<&PlannedTensor> {
    let found = plan.shards.get(shard).and_then(|shard| shard.tensors.get(tensor));
    found.ok_or_else(|| PyValueError::new_err(format!("no tensor {tensor} of shard {shard}")))
}

/// The updates of a merged tensor as dictionaries, the factors as bytes.
pub fn updates(
    py: Python<'_>,
    inputs: &Inputs,
    plan: &plan::Plan,
    place: TensorId,
    weight: Option<&Bound<'_, PyAny>>,
) -> PyResult<Py<PyList>> {
    let tensor = tensor_at(plan, place)?;
    let memory = weight.map(|weight| Memory::of(weight, false)).transpose()?;
    let found = job::run(py, None, |_| {
        // SAFETY: the caller, who waits for this call, keeps the weight as it is meanwhile.
        let weight = memory.as_ref().map(|memory| unsafe { memory.bytes() });
        let weight = weight.map(|bytes| operands::widen(&Dtype::F64, bytes));
        operands::operands(inputs, tensor, weight)
    })?;
    let entries = found.iter().map(|update| update_entry(py, update));
    Ok(PyList::new(py, entries.collect::<PyResult<Vec<_>>>()?)?.unbind())
}

fn update_entry<'py>(py: Python<'py>, update: &Operands) -> PyResult<Bound<'py, PyDict>> {
    let entry = PyDict::new(py);
    entry.set_item("kind", to_object(py, &update.kind)?)?;
    entry.set_item("weight", update.weight)?;
    entry.set_item("stage", update.stage)?;
    entry.set_item("rows", (update.rows.start, update.rows.end))?;
    entry.set_item("transposed", update.transposed)?;
    let products = PyList::empty(py);
    for product in &update.products {
        let pair = &product.pair;
        let fields = PyDict::new(py);
        fields.set_item("a", PyBytes::new(py, &pair.a))?;
        fields.set_item("a_dtype", pair.a_dtype.name())?;
        fields.set_item("b", PyBytes::new(py, &pair.b))?;
        fields.set_item("b_dtype", pair.b_dtype.name())?;
        fields.set_item("rank", pair.rank)?;
        fields.set_item("outputs", pair.outputs)?;
        fields.set_item("inputs", pair.inputs)?;
        fields.set_item("coefficient", product.coefficient)?;
        products.append(fields)?;
    }
    entry.set_item("products", products)?;
    let magnitude = update.magnitude.as_ref().map(|values| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        PyBytes::new(py, &bytes)
    });
    entry.set_item("magnitude", magnitude)?;
    let own = update.own.as_ref().map(|(dtype, bytes)| (dtype.name(), PyBytes::new(py, bytes)));
    entry.set_item("own", own)?;
    Ok(entry)
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
        output: &Path,
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
        let filter = if only { WorkFilter::Only(places) } else { WorkFilter::Without(places) };
        let session = self.session.try_read();
        let session = session.ok();
        let Some(session) = session.as_ref().and_then(|session| session.as_ref()) else {
            return Err(Failure::Over.raise(py));
        };
        job::run(py, progress, |task| {
            task.expect(session.total());
            session.run(&self.inputs, &self.plan, &filter, task)
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

    /// Raises the error for an element that was finite and is no more, by its index in the tensor.
    fn raise_overflow(&self, py: Python<'_>, place: TensorId, index: usize) -> PyResult<()> {
        let tensor = tensor_at(&self.plan, place)?;
        let error = self.with(|session| Ok(session.overflow(&self.inputs, tensor, index)));
        Err(error.map_or_else(|failure| failure.raise(py), |error| to_python(py, error)))
    }

    /// Writes what is left and makes the output a model; returns the summary as plain objects.
    fn finish(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let session = self.session.write().ok().and_then(|mut session| session.take());
        let session = session.ok_or_else(|| Failure::Over.raise(py))?;
        let summary = job::run(py, None, |task| session.finish(&self.inputs, &self.plan, task))?;
        to_object(py, &summary)
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
