//! The one mapping from the core's errors to Python's exceptions.

use pyo3::exceptions::{PyKeyboardInterrupt, PyOSError, PyRuntimeError, PyValueError};
use pyo3::prelude::*;
use pyo3::types::PyString;

use lorafast::Error;
use lorafast::error::{Owner, shortened};

/// The exception for an error of the core. The classes live in Python, so that they can be
/// pickled, documented and subclassed there.
pub fn to_python(py: Python<'_>, error: Error) -> PyErr {
    let message = error.to_string();
    match error {
        Error::Io { path, source } => match source.raw_os_error() {
            // OSError chooses FileNotFoundError and the like by the number.
            Some(number) => {
                let text = std::io::Error::from_raw_os_error(number).to_string();
                let text = text.split(" (os error").next().unwrap_or(&text).to_owned();
                PyOSError::new_err((number, text, path.display().to_string()))
            }
            None if source.kind() == std::io::ErrorKind::UnexpectedEof => {
                raise(py, "CheckpointError", Owner::Checkpoint.changed(path).to_string())
            }
            None => PyOSError::new_err(message),
        },
        Error::Checkpoint { .. } => raise(py, "CheckpointError", message),
        Error::Adapter { .. } => raise(py, "AdapterError", message),
        Error::Unsupported { .. } => raise(py, "UnsupportedAdapterError", message),
        Error::Plan(problems) => {
            let short = |problem: &String| shortened(problem).into_owned();
            raise(py, "PlanError", (message, problems.iter().map(short).collect::<Vec<_>>()))
        }
        Error::Output { .. } => raise(py, "OutputError", message),
        Error::Store { .. } => raise(py, "StoreError", message),
        Error::Numeric { .. } => raise(py, "NumericError", message),
        Error::Argument(_) => PyValueError::new_err(message),
        Error::Foreign(source) => match source.downcast::<PyErr>() {
            Ok(raised) => *raised,
            Err(other) => PyRuntimeError::new_err(other.to_string()),
        },
        Error::Cancelled => PyKeyboardInterrupt::new_err(()),
    }
}

/// An exception of `lorafast._errors` with these arguments.
fn raise<'py>(py: Python<'py>, class: &str, arguments: impl IntoArguments<'py>) -> PyErr {
    let make = || {
        let module = py.import("lorafast._errors")?;
        module.getattr(PyString::new(py, class))?.call1(arguments.into_arguments(py)?)
    };
    match make() {
        Ok(exception) => PyErr::from_value(exception),
        Err(error) => error,
    }
}

/// A message alone, or a message with more.
trait IntoArguments<'py> {
    fn into_arguments(self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>>;
}

impl<'py> IntoArguments<'py> for String {
    fn into_arguments(self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        (self,).into_pyobject(py)
    }
}

impl<'py> IntoArguments<'py> for (String, Vec<String>) {
    fn into_arguments(self, py: Python<'py>) -> PyResult<Bound<'py, pyo3::types::PyTuple>> {
        self.into_pyobject(py)
    }
}
