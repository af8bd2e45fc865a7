//! Adapters and bases as Python names them: paths, or tensors that Python holds.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::buffer::PyBuffer;
use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use serde_json::{Map, Value};

use lorafast::Error;
use lorafast::adapter::format::{AdapterSource, Pickle};
use lorafast::checkpoint::Checkpoint;
use lorafast::parallel::task::Task;
use lorafast::storage::directory::LocalDirectory;
use lorafast::storage::memory::Bytes;
use lorafast::storage::sink::Destination;
use lorafast::tensor::dtype::Dtype;
use lorafast::tensor::safetensors::NamedTensor;

#[cfg(feature = "stores")]
use crate::stores::StoreLocation;

/// A path, or a place in an object store; or one of these, the file that holds the weights, and a function without arguments that
/// returns them as a list of (name, dtype, shape, bytes). It is called from any thread, as often as
/// the adapter is opened. Or one of these and the name of its format.
pub struct Source(pub AdapterSource);

impl<'py> FromPyObject<'_, 'py> for Source {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(path) = object.extract::<PathBuf>() {
            return Ok(Self(AdapterSource::at(path)));
        }
        #[cfg(feature = "stores")]
        if let Ok(location) = object.extract::<PyRef<'_, StoreLocation>>() {
            return Ok(Self(location.adapter()));
        }
        if let Ok((source, format)) = object.extract::<(Bound<'py, PyAny>, String)>() {
            let Self(source) = source.extract()?;
            return Ok(Self(source.in_format(Some(format))));
        }
        let (source, file, load): (Bound<'py, PyAny>, PathBuf, Py<PyAny>) = object.extract()?;
        let Self(source) = source.extract()?;
        let load = Arc::new(move || Python::attach(|py| unpickled(load.bind(py))).map_err(foreign));
        Ok(Self(AdapterSource { pickle: Some(Pickle { path: file, load }), ..source }))
    }
}

/// A path; or the name, the config (JSON) and the tensors of a model in memory, those as a list of
/// (name, dtype, shape, bytes or what returns them or None).
pub enum Base {
    /// A checkpoint's.
    Path(PathBuf),
    /// A checkpoint's in an object store.
    #[cfg(feature = "stores")]
    Store(Py<StoreLocation>),
    /// A loaded module's.
    Memory { name: String, config: Map<String, Value>, tensors: Vec<NamedTensor> },
}

impl<'py> FromPyObject<'_, 'py> for Base {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        if let Ok(path) = object.extract::<PathBuf>() {
            return Ok(Self::Path(path));
        }
        #[cfg(feature = "stores")]
        if let Ok(location) = object.extract::<Py<StoreLocation>>() {
            return Ok(Self::Store(location));
        }
        let (name, config, tensors): (String, String, Bound<'py, PyAny>) = object.extract()?;
        let config = serde_json::from_str(&config).map_err(|error| {
            PyValueError::new_err(format!("the config is no JSON object: {error}"))
        })?;
        Ok(Self::Memory { name, config, tensors: named_tensors(&tensors)? })
    }
}

/// Where a model is made: a directory's path, or a place in an object store.
pub struct Output(pub Box<dyn Destination + Send + Sync>);

impl<'py> FromPyObject<'_, 'py> for Output {
    type Error = PyErr;

    fn extract(object: Borrowed<'_, 'py, PyAny>) -> PyResult<Self> {
        #[cfg(feature = "stores")]
        if let Ok(location) = object.extract::<PyRef<'_, StoreLocation>>() {
            return Ok(Self(Box::new(location.destination())));
        }
        Ok(Self(Box::new(LocalDirectory(object.extract()?))))
    }
}

impl Base {
    /// The checkpoint, opened.
    pub fn open(&self, task: &Task) -> lorafast::Result<Checkpoint> {
        match self {
            Self::Path(path) => Checkpoint::open_with(path, task),
            #[cfg(feature = "stores")]
            Self::Store(location) => location.get().checkpoint(task),
            Self::Memory { name, config, tensors } => {
                Checkpoint::in_memory(name, config.clone(), tensors.clone())
            }
        }
    }
}

/// An exception on its way through the core.
fn foreign(error: PyErr) -> Error {
    Error::Foreign(Box::new(error))
}

fn unpickled(load: &Bound<'_, PyAny>) -> PyResult<Vec<NamedTensor>> {
    named_tensors(&load.call0()?)
}

/// Tensors as a list of (name, dtype, shape, bytes or what returns them or None).
fn named_tensors(list: &Bound<'_, PyAny>) -> PyResult<Vec<NamedTensor>> {
    let tensor = |item: PyResult<Bound<'_, PyAny>>| {
        let (name, dtype, shape, data): (String, String, Vec<u64>, Option<Bound<'_, PyAny>>) =
            item?.extract()?;
        let mut tensor = NamedTensor { name, dtype: Dtype::from_name(&dtype), shape, bytes: None };
        tensor.bytes = match data {
            Some(data) if data.is_callable() => tensor.expected_bytes().map(|length| {
                let load = data.unbind();
                let load = move || Python::attach(|py| loaded(load.bind(py))).map_err(foreign);
                Bytes::deferred(length, Arc::new(load))
            }),
            Some(data) => Some(Bytes::Loaded(data.extract::<PyBuffer<u8>>()?.to_vec(list.py())?)),
            None => None,
        };
        Ok(tensor)
    };
    list.try_iter()?.map(tensor).collect()
}

fn loaded(load: &Bound<'_, PyAny>) -> PyResult<Vec<u8>> {
    load.call0()?.extract::<PyBuffer<u8>>()?.to_vec(load.py())
}

/// The sources in the core's own type.
pub fn to_core(sources: Vec<Source>) -> Vec<AdapterSource> {
    sources.into_iter().map(|source| source.0).collect()
}
