//! What checkpoints and adapters hold by their headers, and how this binary was built.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyDict;

use lorafast::adapter::format::{Found, GivenScale};
use lorafast::describe;
use lorafast::error::Owner;
use lorafast::kernel::InstructionSet;
use lorafast::parallel::task::Task;
use lorafast::storage::directory::{self, LocalDirectory};
use lorafast::storage::{identify, local};

use crate::convert::to_object;
use crate::job;
use crate::sources::{Base, Source};

/// Lists a checkpoint from its headers, as plain objects.
#[pyfunction]
pub fn list_checkpoint(py: Python<'_>, path: Base) -> PyResult<Py<PyAny>> {
    let list = |task: &Task| {
        let base = path.open(task)?;
        let listing = describe::checkpoint(&base);
        base.check_unchanged().map(|()| listing)
    };
    to_object(py, &job::run(py, None, list)?)
}

/// Lists an adapter from its header and config, as plain objects; of one that cannot be read, or lacks its
/// config, what its header says.
#[pyfunction]
pub fn list_adapter(py: Python<'_>, adapter: Source) -> PyResult<Py<PyAny>> {
    let list = |task: &Task| match adapter.0.clone().with_scale(GivenScale::Unknown).look(task)? {
        Found::Adapter(adapter) => {
            let listing = describe::adapter(&adapter)?;
            adapter.check_unchanged().map(|()| listing)
        }
        Found::Unread(unread) => {
            let listing = describe::unread_adapter(&unread);
            unread.file.check_unchanged().map(|()| listing)
        }
    };
    to_object(py, &job::run(py, None, list)?)
}

/// The name of the format of what lies at a path, if it is an adapter's that can be read.
#[pyfunction]
pub fn adapter_format(py: Python<'_>, path: Source) -> PyResult<Option<&'static str>> {
    job::run(py, None, |_| path.0.format())
}

/// Whether an adapter lies at a path, of whatever format.
#[pyfunction]
pub fn holds_adapter(py: Python<'_>, path: Source) -> PyResult<bool> {
    job::run(py, None, |_| path.0.is_adapter())
}

/// What a file is by its first bytes, as a sentence without a subject; of a directory, by the names in
/// it where an adapter was looked for. `None` where neither tells.
#[pyfunction]
pub fn identify_path(py: Python<'_>, path: PathBuf) -> PyResult<Option<String>> {
    let identify = |_: &Task| {
        let found = match local::is_directory(&path) {
            true => identify::of_folder(&LocalDirectory(path.clone()), Owner::Adapter),
            false => {
                let (store, name) = directory::of_file(&path);
                identify::of_file(&store, &name)
            }
        };
        Ok(found.map(|found| found.sentence()))
    };
    job::run(py, None, identify)
}

/// How this binary was built and what it uses of this processor.
#[pyfunction]
pub fn build_info(py: Python<'_>) -> PyResult<Py<PyDict>> {
    let info = PyDict::new(py);
    info.set_item("version", env!("CARGO_PKG_VERSION"))?;
    info.set_item("profile", if cfg!(debug_assertions) { "debug" } else { "release" })?;
    info.set_item("target", format!("{}-{}", std::env::consts::ARCH, std::env::consts::OS))?;
    info.set_item("instruction_set", InstructionSet::detect().name())?;
    let available: Vec<_> =
        InstructionSet::available().into_iter().map(InstructionSet::name).collect();
    info.set_item("instruction_sets", available)?;
    info.set_item("amx", InstructionSet::amx().is_some())?;
    Ok(info.unbind())
}
