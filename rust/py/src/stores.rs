//! Places in object stores as Python names them: a URL, options, and perhaps what gives credentials.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, SystemTime};

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use lorafast::adapter::format::AdapterSource;
use lorafast::checkpoint::Checkpoint;
use lorafast::parallel::task::Task;
use lorafast::storage::file_names;
use lorafast::storage::store::Store;
use lorafast_store::{
    Budget, Connection, Credentials, ObjectDestination, ObjectStoreFiles, Provider, Use,
};

use crate::convert::to_object;
use crate::job;

/// The memory of reads ahead and uploads, shared by all places of one merge.
#[pyclass(frozen, module = "lorafast._core")]
pub struct IoMemory(Arc<Budget>);

#[pymethods]
impl IoMemory {
    #[new]
    #[pyo3(signature = (bytes=lorafast_store::DEFAULT_BYTES))]
    fn new(bytes: u64) -> Self {
        Self(Arc::new(Budget::new(bytes)))
    }
}

/// A place in a store. Its text has neither user nor password, and it cannot be pickled.
#[pyclass(frozen, module = "lorafast._core")]
pub struct StoreLocation {
    connection: Arc<Connection>,
}

/// What Python's own function gives, as the store's crate takes it.
fn provider_of(function: Py<PyAny>) -> Provider {
    let ask = move |py: Python<'_>| -> PyResult<Credentials> {
        let given = function.bind(py).call0()?;
        let (keys, expiry): (BTreeMap<String, String>, Option<f64>) = given.extract()?;
        let expiry = expiry.and_then(|seconds| Duration::try_from_secs_f64(seconds).ok());
        Ok((keys, expiry.map(|since| SystemTime::UNIX_EPOCH + since)))
    };
    Arc::new(move || {
        Python::attach(|py| {
            // The message of a stranger's exception may hold what it was given.
            ask(py).map_err(|error| format!("it raised {}", error.get_type(py)))
        })
    })
}

#[pymethods]
impl StoreLocation {
    #[new]
    #[pyo3(signature = (url, options, *, provider=None, memory=None))]
    fn new(
        py: Python<'_>,
        url: &str,
        options: BTreeMap<String, String>,
        provider: Option<Py<PyAny>>,
        memory: Option<PyRef<'_, IoMemory>>,
    ) -> PyResult<Self> {
        let budget = memory.map_or_else(Arc::default, |memory| memory.0.clone());
        let connection = job::run(py, None, |_| {
            Connection::new(url, &options, provider.map(provider_of), budget)
        })?;
        Ok(Self { connection })
    }

    /// The URL without user and password.
    #[getter]
    fn url(&self) -> String {
        self.connection.address().name().display().to_string()
    }

    fn __str__(&self) -> String {
        self.url()
    }

    fn __repr__(&self) -> String {
        format!("StoreLocation({:?})", self.url())
    }

    /// The names of files and folders there.
    fn names(&self, py: Python<'_>) -> PyResult<Vec<String>> {
        let files = ObjectStoreFiles::new(self.connection.clone(), Use::Adapter);
        job::run(py, None, |task| {
            files.follow(task.cancel_flag());
            files.list()
        })
    }

    /// The whole content of a file there; of what lies there itself, without a name.
    #[pyo3(signature = (name=None))]
    fn read<'py>(&self, py: Python<'py>, name: Option<String>) -> PyResult<Bound<'py, PyBytes>> {
        let (files, name) = match name {
            Some(name) => (ObjectStoreFiles::new(self.connection.clone(), Use::Adapter), name),
            None => ObjectStoreFiles::of_file(self.connection.clone(), Use::Adapter),
        };
        let content = job::run(py, None, |task| {
            files.follow(task.cancel_flag());
            files.read_whole(&name)
        })?;
        Ok(PyBytes::new(py, &content))
    }

    /// Writes a small file there.
    fn write(&self, py: Python<'_>, name: &str, content: Vec<u8>) -> PyResult<()> {
        job::run(py, None, |task| {
            self.connection.follow(task.cancel_flag());
            lorafast_store::put(&self.connection, name, &content)
        })
    }

    /// Removes what unfinished merges left there; returns plain objects.
    fn clean(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        let cleaned = job::run(py, None, |task| {
            self.connection.follow(task.cancel_flag());
            lorafast_store::clean(&self.connection)
        })?;
        to_object(py, &cleaned)
    }
}

impl StoreLocation {
    fn is_file(&self) -> bool {
        let path: &str = self.connection.address().path.as_ref();
        file_names::holds_weights(path)
    }

    pub fn adapter(&self) -> AdapterSource {
        if self.is_file() {
            let (files, name) = ObjectStoreFiles::of_file(self.connection.clone(), Use::Adapter);
            return AdapterSource::file_in_store(Arc::new(files), &name);
        }
        AdapterSource::in_store(Arc::new(ObjectStoreFiles::new(
            self.connection.clone(),
            Use::Adapter,
        )))
    }

    pub fn checkpoint(&self, task: &Task) -> lorafast::Result<Checkpoint> {
        if self.is_file() {
            let (files, name) = ObjectStoreFiles::of_file(self.connection.clone(), Use::Checkpoint);
            return Checkpoint::open_file_in(Arc::new(files), &name, task);
        }
        let files = ObjectStoreFiles::new(self.connection.clone(), Use::Checkpoint);
        Checkpoint::open_in(Arc::new(files), task)
    }

    pub fn destination(&self) -> ObjectDestination {
        ObjectDestination::new(self.connection.clone())
    }
}
