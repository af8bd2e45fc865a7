//! `lorafast._core`: the Python face of the core. Each function converts its arguments, detaches
//! from the interpreter, calls the core, and wraps the result. No logic lives here.

use pyo3::prelude::*;

#[pymodule]
mod _core {
    use super::*;

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }
}
