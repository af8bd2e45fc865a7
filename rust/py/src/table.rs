//! Tables: Arrow record batches, handed to Arrow's libraries as they lie and to NumPy as buffers.

use std::collections::HashMap;
use std::ffi::{CStr, c_int, c_void};
use std::ptr::null_mut;
use std::sync::Arc;

use arrow_array::cast::AsArray;
use arrow_array::ffi_stream::FFI_ArrowArrayStream;
use arrow_array::types::{ArrowPrimitiveType, Float64Type, Int32Type, Int64Type};
use arrow_array::{Array, ArrayRef, RecordBatch, RecordBatchIterator, StringArray, make_array};
use arrow_buffer::{BooleanBuffer, NullBuffer, ScalarBuffer};
use arrow_data::ArrayData;
use arrow_schema::{ArrowError, DataType, Field, Schema};
use pyo3::exceptions::{PyBufferError, PyIndexError, PyKeyError, PyValueError};
use pyo3::ffi;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyCapsule, PyDict, PyList, PyString, PyTuple, PyType};

/// An error of Arrow's as Python's.
pub fn to_value_error(error: ArrowError) -> PyErr {
    PyValueError::new_err(error.to_string())
}

/// Numbers in memory that does not change, as Python's buffer protocol has them.
#[pyclass(frozen, module = "lorafast._core")]
pub struct ColumnBuffer {
    data: arrow_buffer::Buffer,
    format: &'static CStr,
    size: ffi::Py_ssize_t,
    count: ffi::Py_ssize_t,
}

impl ColumnBuffer {
    fn of<T: ArrowPrimitiveType>(values: &ScalarBuffer<T::Native>, format: &'static CStr) -> Self {
        let size = size_of::<T::Native>() as ffi::Py_ssize_t;
        let count = values.len() as ffi::Py_ssize_t;
        Self { data: values.inner().clone(), format, size, count }
    }
}

#[pymethods]
impl ColumnBuffer {
    /// Fills a view of the memory, which belongs to this object.
    ///
    /// # Safety
    /// Called by the interpreter alone, with a view that may be written.
    unsafe fn __getbuffer__(
        slf: Bound<'_, Self>,
        view: *mut ffi::Py_buffer,
        flags: c_int,
    ) -> PyResult<()> {
        if view.is_null() || flags & ffi::PyBUF_WRITABLE == ffi::PyBUF_WRITABLE {
            return Err(PyBufferError::new_err("the columns of a table cannot be written"));
        }
        let own = slf.get();
        let wants = |flag: c_int| flags & flag == flag;
        let made = ffi::Py_buffer {
            buf: own.data.as_ptr().cast_mut().cast::<c_void>(),
            obj: null_mut(),
            len: own.data.len() as ffi::Py_ssize_t,
            itemsize: own.size,
            readonly: 1,
            ndim: 1,
            format: if wants(ffi::PyBUF_FORMAT) {
                own.format.as_ptr().cast_mut()
            } else {
                null_mut()
            },
            shape: if wants(ffi::PyBUF_ND) {
                (&raw const own.count).cast_mut()
            } else {
                null_mut()
            },
            strides: if wants(ffi::PyBUF_STRIDES) {
                (&raw const own.size).cast_mut()
            } else {
                null_mut()
            },
            suboffsets: null_mut(),
            internal: null_mut(),
        };
        // SAFETY: the interpreter gives a view to be written. What it points to is of this object,
        // which the view keeps alive and in place: it is frozen, and no reader may write to it.
        unsafe {
            *view = made;
            (*view).obj = slf.into_ptr();
        }
        Ok(())
    }
}

/// Columns of one length. Numbers are int64 or float64, texts are plain or coded, lists are of
/// float64 or of texts.
#[pyclass(frozen, module = "lorafast._core")]
pub struct Table {
    batch: RecordBatch,
}

impl From<RecordBatch> for Table {
    fn from(batch: RecordBatch) -> Self {
        Self { batch }
    }
}

impl Table {
    /// A column.
    pub fn array(&self, name: &str) -> PyResult<&ArrayRef> {
        self.batch.column_by_name(name).ok_or_else(|| PyKeyError::new_err(name.to_owned()))
    }
}

#[pymethods]
impl Table {
    /// The number of rows.
    #[getter]
    fn rows(&self) -> usize {
        self.batch.num_rows()
    }

    /// The names of the columns.
    #[getter]
    fn names(&self) -> Vec<String> {
        self.batch.schema().fields().iter().map(|field| field.name().clone()).collect()
    }

    /// Bytes that the columns take.
    #[getter]
    fn nbytes(&self) -> PyResult<usize> {
        let size = |array: &ArrayRef| array.to_data().get_slice_memory_size();
        self.batch.columns().iter().map(size).sum::<Result<_, _>>().map_err(to_value_error)
    }

    /// A column's parts: ("numbers", buffer), ("texts", list), ("codes", buffer of int32 with −1 for
    /// no text, list of the texts), or ("lists", buffer of int64 offsets, parts of all values).
    fn column<'py>(&self, py: Python<'py>, name: &str) -> PyResult<Bound<'py, PyTuple>> {
        parts(py, self.array(name)?)
    }

    /// The values of a row by column; lists are left out.
    fn row<'py>(&self, py: Python<'py>, row: usize) -> PyResult<Bound<'py, PyDict>> {
        if row >= self.batch.num_rows() {
            return Err(PyIndexError::new_err(row));
        }
        let found = PyDict::new(py);
        for (field, array) in self.batch.schema().fields().iter().zip(self.batch.columns()) {
            match array.data_type() {
                DataType::Int64 => {
                    found.set_item(field.name(), array.as_primitive::<Int64Type>().value(row))?;
                }
                DataType::Float64 => {
                    found.set_item(field.name(), array.as_primitive::<Float64Type>().value(row))?;
                }
                DataType::Utf8 => {
                    let texts = array.as_string::<i32>();
                    let text = texts.is_valid(row).then(|| texts.value(row));
                    found.set_item(field.name(), text)?;
                }
                DataType::Dictionary(..) => {
                    let coded = array.as_dictionary::<Int32Type>();
                    let text =
                        coded.key(row).map(|key| coded.values().as_string::<i32>().value(key));
                    found.set_item(field.name(), text)?;
                }
                _ => {}
            }
        }
        Ok(found)
    }

    /// The table as a stream of Arrow's C interface, without a copy.
    #[pyo3(signature = (requested_schema=None))]
    fn __arrow_c_stream__<'py>(
        &self,
        py: Python<'py>,
        requested_schema: Option<Bound<'py, PyAny>>,
    ) -> PyResult<Bound<'py, PyCapsule>> {
        // To give other types than those asked for is allowed; the taker casts.
        drop(requested_schema);
        let batches = RecordBatchIterator::new([Ok(self.batch.clone())], self.batch.schema());
        let stream = FFI_ArrowArrayStream::new(Box::new(batches));
        PyCapsule::new_with_value(py, stream, c"arrow_array_stream")
    }

    /// What a pickle holds: the schema's metadata, and the columns' names and buffers.
    fn __reduce__<'py>(slf: &Bound<'py, Self>) -> PyResult<Bound<'py, PyTuple>> {
        let py = slf.py();
        let batch = &slf.get().batch;
        let schema = batch.schema();
        let columns = schema.fields().iter().zip(batch.columns()).map(|(field, array)| {
            (field.name().clone(), buffers(py, &array.to_data())?).into_pyobject(py)
        });
        let columns = PyList::new(py, columns.collect::<PyResult<Vec<_>>>()?)?;
        let restore = slf.get_type().getattr("_restore")?;
        let metadata: HashMap<_, _> = schema.metadata().iter().collect();
        let given = (metadata, columns).into_pyobject(py)?;
        (restore, given).into_pyobject(py)
    }

    /// The table that a pickle holds.
    #[classmethod]
    fn _restore(
        _class: &Bound<'_, PyType>,
        metadata: HashMap<String, String>,
        columns: Vec<(String, Bound<'_, PyTuple>)>,
    ) -> PyResult<Self> {
        let mut fields = Vec::new();
        let mut arrays = Vec::new();
        for (name, parts) in columns {
            let array = make_array(restored(&parts)?);
            fields.push(Field::new(name, array.data_type().clone(), true));
            arrays.push(array);
        }
        let schema = Arc::new(Schema::new_with_metadata(fields, metadata));
        Ok(RecordBatch::try_new(schema, arrays).map_err(to_value_error)?.into())
    }
}

fn parts<'py>(py: Python<'py>, array: &ArrayRef) -> PyResult<Bound<'py, PyTuple>> {
    match array.data_type() {
        DataType::Int64 => {
            let values = array.as_primitive::<Int64Type>().values();
            ("numbers", ColumnBuffer::of::<Int64Type>(values, c"q")).into_pyobject(py)
        }
        DataType::Float64 => {
            let values = array.as_primitive::<Float64Type>().values();
            ("numbers", ColumnBuffer::of::<Float64Type>(values, c"d")).into_pyobject(py)
        }
        DataType::Utf8 => ("texts", texts(py, array.as_string())?).into_pyobject(py),
        DataType::Dictionary(..) => {
            let coded = array.as_dictionary::<Int32Type>();
            let codes = if coded.null_count() == 0 {
                coded.keys().values().clone()
            } else {
                coded.keys().iter().map(|key| key.unwrap_or(-1)).collect()
            };
            let codes = ColumnBuffer::of::<Int32Type>(&codes, c"i");
            ("codes", codes, texts(py, coded.values().as_string())?).into_pyobject(py)
        }
        DataType::LargeList(_) => {
            let lists = array.as_list::<i64>();
            let offsets = ColumnBuffer::of::<Int64Type>(lists.offsets().inner(), c"q");
            ("lists", offsets, parts(py, lists.values())?).into_pyobject(py)
        }
        other => Err(PyValueError::new_err(format!("a table has no columns of {other}"))),
    }
}

fn texts<'py>(py: Python<'py>, array: &StringArray) -> PyResult<Bound<'py, PyList>> {
    PyList::new(py, array.iter().map(|text| text.map(|text| PyString::new(py, text))))
}

/// What an array is made of: its kind, its length, which values are there, its buffers, and its
/// children.
fn buffers<'py>(py: Python<'py>, data: &ArrayData) -> PyResult<Bound<'py, PyTuple>> {
    let kind = match data.data_type() {
        DataType::Int64 => "int64",
        DataType::Int32 => "int32",
        DataType::Float64 => "float64",
        DataType::Utf8 => "utf8",
        DataType::Dictionary(..) => "dictionary",
        _ => "list",
    };
    let nulls = data.nulls().map(|nulls| PyBytes::new(py, &nulls.inner().sliced()));
    let own = PyList::new(py, data.buffers().iter().map(|buffer| PyBytes::new(py, buffer)))?;
    let children = data.child_data().iter().map(|child| buffers(py, child));
    let children = PyList::new(py, children.collect::<PyResult<Vec<_>>>()?)?;
    (kind, data.len(), nulls, own, children).into_pyobject(py)
}

/// The array that is made of these parts, every value of which is checked.
fn restored(parts: &Bound<'_, PyTuple>) -> PyResult<ArrayData> {
    type Parts<'py> = (
        String,
        usize,
        Option<Bound<'py, PyBytes>>,
        Vec<Bound<'py, PyBytes>>,
        Vec<Bound<'py, PyTuple>>,
    );
    let (kind, length, nulls, own, children): Parts<'_> = parts.extract()?;
    let children = children.iter().map(restored).collect::<PyResult<Vec<_>>>()?;
    let kind = match (kind.as_str(), &children[..]) {
        ("int64", []) => DataType::Int64,
        ("float64", []) => DataType::Float64,
        ("utf8", []) => DataType::Utf8,
        ("dictionary", [_]) => {
            DataType::Dictionary(Box::new(DataType::Int32), Box::new(DataType::Utf8))
        }
        ("list", [values]) => {
            let field = Field::new("item", values.data_type().clone(), true);
            DataType::LargeList(Arc::new(field))
        }
        _ => return Err(PyValueError::new_err(format!("a table has no columns of {kind}"))),
    };
    let copied = |bytes: &Bound<'_, PyBytes>| arrow_buffer::Buffer::from(bytes.as_bytes());
    let nulls = match nulls {
        Some(bits) if bits.as_bytes().len() * 8 < length => {
            return Err(PyValueError::new_err("a column is shorter than its table"));
        }
        Some(bits) => Some(NullBuffer::new(BooleanBuffer::new(copied(&bits), 0, length))),
        None => None,
    };
    let builder = ArrayData::builder(kind).len(length).nulls(nulls).child_data(children);
    builder.buffers(own.iter().map(copied).collect()).build().map_err(to_value_error)
}
