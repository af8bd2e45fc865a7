//! Views of merges that write nothing: tensors of the output, whole or in parts, as bytes.

use std::ffi::{c_int, c_void};
use std::ptr::{null_mut, slice_from_raw_parts_mut};
use std::sync::{Arc, PoisonError, RwLock};
use std::time::Duration;

use pyo3::exceptions::PyValueError;
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict};

use lorafast::execute::view::{self, Difference, Item, Next, Part, Selection};
use lorafast::parallel::task::Task;

use crate::errors::to_python;
use crate::job;
use crate::plan::Plan;

/// How long a stream waits before it looks for signals.
const STEP: Duration = Duration::from_millis(50);

/// A view until it is closed.
type Open = Arc<RwLock<Option<Arc<view::View>>>>;

fn view_in(open: &Open) -> PyResult<Arc<view::View>> {
    let view = open.read().unwrap_or_else(PoisonError::into_inner);
    view.clone().ok_or_else(|| {
        PyValueError::new_err(
            "the view is closed; open the merge again, and use it inside of `with`",
        )
    })
}

/// What a plan would write, of which nothing is there until it is asked for.
#[pyfunction]
#[pyo3(signature = (plan, *, threads=None))]
pub fn open_view(py: Python<'_>, plan: &Plan, threads: Option<usize>) -> PyResult<View> {
    let (inputs, plan) = (plan.inputs.clone(), plan.plan.clone());
    let view = py.detach(|| view::View::new(inputs, plan, threads));
    let view = view.map_err(|error| to_python(py, error))?;
    Ok(View { open: Arc::new(RwLock::new(Some(Arc::new(view)))) })
}

/// The output of a merge that writes nothing.
#[pyclass(frozen, module = "lorafast._core")]
pub struct View {
    open: Open,
}

/// A tensor's type (a safetensors name), its shape and its bytes.
type Value = (String, Vec<u64>, TensorBytes);

#[pymethods]
impl View {
    /// The names of all tensors, by the shards' names and their places in these.
    fn names(&self) -> PyResult<Vec<String>> {
        Ok(view_in(&self.open)?.names().map(str::to_owned).collect())
    }

    /// The metadata of the headers.
    fn metadata<'py>(&self, py: Python<'py>) -> PyResult<Option<Bound<'py, PyDict>>> {
        let view = view_in(&self.open)?;
        let Some(metadata) = py.detach(|| view.metadata()) else { return Ok(None) };
        let object = PyDict::new(py);
        for (name, text) in metadata {
            object.set_item(name, text)?;
        }
        Ok(Some(object))
    }

    /// The configs of the output by their names in it.
    fn configs<'py>(&self, py: Python<'py>) -> PyResult<Bound<'py, PyDict>> {
        let view = view_in(&self.open)?;
        let object = PyDict::new(py);
        for (name, content) in py.detach(|| view.configs()) {
            object.set_item(name, PyBytes::new(py, &content))?;
        }
        Ok(object)
    }

    /// A whole tensor; `None` where there is none of that name.
    fn read(&self, py: Python<'_>, name: &str) -> PyResult<Option<Value>> {
        let view = view_in(&self.open)?;
        let Some(id) = view.find(name) else { return Ok(None) };
        let bytes = job::run(py, None, |task| view.read_whole(id, task))?;
        let written = view.tensor(id).written();
        Ok(Some((written.dtype.name().to_owned(), written.shape, bytes.into())))
    }

    /// A tensor of which parts are asked for; `None` where there is none of that name.
    fn part(&self, name: &str) -> PyResult<Option<ViewPart>> {
        let view = view_in(&self.open)?;
        let Some(id) = view.find(name) else { return Ok(None) };
        let written = view.tensor(id).written();
        Ok(Some(ViewPart { open: self.open.clone(), part: view.part(id), written }))
    }

    /// All tensors in the order of `names`.
    fn stream(&self, py: Python<'_>) -> PyResult<ViewStream> {
        let view = view_in(&self.open)?;
        let wanted = view
            .tensors()
            .iter()
            .map(|id| Difference { name: view.tensor(*id).name.clone(), id: *id });
        let wanted = wanted.collect();
        ViewStream::of(py, self.open.clone(), &view, wanted)
    }

    /// The tensors that are made in another way than in another view.
    fn changed_from(&self, py: Python<'_>, other: &Self) -> PyResult<ViewStream> {
        let (view, other) = (view_in(&self.open)?, view_in(&other.open)?);
        let wanted = job::run(py, None, |_| view.differences(&other))?;
        ViewStream::of(py, self.open.clone(), &view, wanted)
    }

    /// The SHA-256 of every shard that a merge would write, by its name.
    #[pyo3(signature = (*, progress))]
    fn shard_digests<'py>(
        &self,
        py: Python<'py>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Bound<'py, PyDict>> {
        let view = view_in(&self.open)?;
        let object = PyDict::new(py);
        for (name, digest) in job::run(py, progress, |task| view.shard_digests(task))? {
            object.set_item(name, digest)?;
        }
        Ok(object)
    }

    /// Lets nothing be asked for any more, and closes the files when the last read is done.
    fn close(&self, py: Python<'_>) {
        let view = self.open.write().unwrap_or_else(PoisonError::into_inner).take();
        py.detach(|| drop(view));
    }
}

/// A tensor of a view, of which parts are asked for.
#[pyclass(frozen, module = "lorafast._core")]
pub struct ViewPart {
    open: Open,
    part: Part,
    written: lorafast::tensor::safetensors::TensorInfo,
}

#[pymethods]
impl ViewPart {
    /// Its type, by the name that it has in a safetensors header.
    #[getter]
    fn dtype(&self) -> &str {
        self.written.dtype.name()
    }

    #[getter]
    fn shape(&self) -> Vec<u64> {
        self.written.shape.clone()
    }

    /// A range of every dimension, as first positions and ends.
    fn read(&self, py: Python<'_>, ranges: Vec<(u64, u64)>) -> PyResult<TensorBytes> {
        // Closed means closed, also for what was taken out of it before.
        let view = view_in(&self.open)?;
        let ranges: Vec<_> = ranges.into_iter().map(|(start, end)| start..end).collect();
        let selection = Selection::new(&self.written, &ranges);
        let selection = selection.map_err(|error| to_python(py, error))?;
        let bytes = job::run(py, None, |task: &Task| view.read(&self.part, &selection, task))?;
        Ok(bytes.into())
    }
}

/// Tensors that are computed ahead of who takes them.
#[pyclass(frozen, module = "lorafast._core")]
pub struct ViewStream {
    open: Open,
    stream: view::Stream,
    tensors: Vec<(String, String, Vec<u64>)>,
}

impl ViewStream {
    fn of(
        py: Python<'_>,
        open: Open,
        view: &Arc<view::View>,
        wanted: Vec<Difference>,
    ) -> PyResult<Self> {
        let ids = wanted.iter().map(|wanted| wanted.id).collect();
        let tensors = (wanted.into_iter())
            .map(|Difference { name, id }| {
                let written = view.tensor(id).written();
                (name, written.dtype.name().to_owned(), written.shape)
            })
            .collect();
        let stream = view.stream(ids).map_err(|error| to_python(py, error))?;
        Ok(Self { open, stream, tensors })
    }
}

#[pymethods]
impl ViewStream {
    fn __len__(&self) -> usize {
        self.tensors.len()
    }

    fn __iter__(slf: PyRef<'_, Self>) -> PyRef<'_, Self> {
        slf
    }

    /// A name, and the tensor's type, shape and bytes.
    fn __next__(&self, py: Python<'_>) -> PyResult<Option<(String, Value)>> {
        loop {
            if let Err(closed) = view_in(&self.open) {
                py.detach(|| self.stream.stop());
                return Err(closed);
            }
            let next = py.detach(|| self.stream.next(STEP));
            match next.map_err(|error| to_python(py, error))? {
                Next::Item(Item { position, bytes }) => {
                    let (name, dtype, shape) = self.tensors[position].clone();
                    return Ok(Some((name, (dtype, shape, bytes.into()))));
                }
                Next::Later => py.check_signals()?,
                Next::End => return Ok(None),
            }
        }
    }

    /// Lets nothing more be computed.
    fn close(&self, py: Python<'_>) {
        py.detach(|| self.stream.stop());
    }
}

/// The bytes of a tensor. They belong to whoever holds this, and may be written to.
#[pyclass(frozen, module = "lorafast._core")]
pub struct TensorBytes {
    start: *mut u8,
    length: usize,
    count: ffi::Py_ssize_t,
}

// SAFETY: the core's side never looks at the memory again; who may when read and write it is settled
// among those who hold views of it, as with a bytearray.
unsafe impl Send for TensorBytes {}
// SAFETY: as above.
unsafe impl Sync for TensorBytes {}

impl From<Vec<u8>> for TensorBytes {
    fn from(bytes: Vec<u8>) -> Self {
        let length = bytes.len();
        let start = Box::into_raw(bytes.into_boxed_slice()).cast::<u8>();
        Self { start, length, count: length as ffi::Py_ssize_t }
    }
}

impl Drop for TensorBytes {
    fn drop(&mut self) {
        // SAFETY: this is what `from` took apart, and views of it keep the object alive.
        drop(unsafe { Box::from_raw(slice_from_raw_parts_mut(self.start, self.length)) });
    }
}

/// Bytes of an element.
static SIZE: ffi::Py_ssize_t = 1;

#[pymethods]
impl TensorBytes {
    fn __len__(&self) -> usize {
        self.length
    }

    /// Fills a view of the memory.
    ///
    /// # Safety
    /// Called by the interpreter alone, with a view that may be written.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() {
            return Err(PyValueError::new_err("there is no view to fill"));
        }
        let own = slf.get();
        let wants = |flag: c_int| flags & flag == flag;
        let made = ffi::Py_buffer {
            buf: own.start.cast::<c_void>(),
            obj: null_mut(),
            len: own.count,
            itemsize: SIZE,
            readonly: 0,
            ndim: 1,
            format: if wants(ffi::PyBUF_FORMAT) { c"B".as_ptr().cast_mut() } else { null_mut() },
            shape: if wants(ffi::PyBUF_ND) {
                (&raw const own.count).cast_mut()
            } else {
                null_mut()
            },
            strides: if wants(ffi::PyBUF_STRIDES) {
                (&raw const SIZE).cast_mut()
            } else {
                null_mut()
            },
            suboffsets: null_mut(),
            internal: null_mut(),
        };
        // SAFETY: the interpreter gives a view to be written. What it points to is of this object,
        // which the view keeps alive and in place, or never changes.
        unsafe {
            *view = made;
            (*view).obj = slf.into_ptr();
        }
        Ok(())
    }
}
