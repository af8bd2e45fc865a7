//! Plain Python objects out of values of the core, and options of the core out of them.

use pyo3::exceptions::{PyException, PyValueError};
use pyo3::prelude::*;
use serde::Serialize;
use serde::de::DeserializeOwned;

/// A serialisable value as plain Python objects.
pub fn to_object(py: Python<'_>, value: &impl Serialize) -> PyResult<Py<PyAny>> {
    Ok(pythonize::pythonize(py, value)?.unbind())
}

/// The options that a dictionary holds; the defaults without one. A value outside its domain is a
/// `ValueError` in the core's words, one of another type than its option's a `TypeError`.
pub fn to_options<T: Default + DeserializeOwned>(object: Option<&Bound<'_, PyAny>>) -> PyResult<T> {
    let Some(object) = object else {
        return Ok(T::default());
    };
    pythonize::depythonize(object).map_err(|error| {
        let error = PyErr::from(error);
        // What is told in words alone has no class of its own.
        let is_plain = error.get_type(object.py()).is(object.py().get_type::<PyException>());
        if is_plain { PyValueError::new_err(error.value(object.py()).to_string()) } else { error }
    })
}
