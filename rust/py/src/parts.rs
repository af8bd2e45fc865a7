//! Parts of a plan: its digest, its groups of shards, and the model that is assembled from them.

use std::path::PathBuf;

use pyo3::prelude::*;

use lorafast::execute;
use lorafast::execute::parts::{self, WrittenShard};

use crate::convert::{to_object, to_options};
use crate::execution::{Executed, executed};
use crate::job;
use crate::plan::Plan;

/// The digest of all that decides the output's weights.
#[pyfunction]
pub fn plan_digest(py: Python<'_>, plan: &Plan) -> PyResult<String> {
    job::run(py, None, |_| plan.plan.digest(&plan.inputs))
}

/// The positions of the shards in groups that can be written apart.
#[pyfunction]
pub fn plan_groups(plan: &Plan) -> Vec<Vec<usize>> {
    plan.plan.groups()
}

/// The name and the bytes of each shard.
#[pyfunction]
pub fn plan_shards(plan: &Plan) -> Vec<(String, u64)> {
    plan.plan.shards.iter().map(|shard| (shard.name.clone(), shard.bytes())).collect()
}

/// Writes some groups of shards into a directory; returns each shard's name, bytes and digest as
/// plain objects.
#[pyfunction]
#[pyo3(signature = (plan, shards, directory, *, threads, sync, progress))]
pub fn write_shards(
    py: Python<'_>,
    plan: &Plan,
    shards: Vec<usize>,
    directory: PathBuf,
    threads: Option<usize>,
    sync: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    let options = execute::Options { threads, sync, ..Default::default() };
    let written = job::run(py, progress, |task| {
        parts::write_shards(&plan.inputs, &plan.plan, &shards, &directory, &options, task)
    })?;
    to_object(py, &written)
}

/// Makes a model of shards that were written apart, as `write_shards` tells of them; returns the summary
/// as plain objects, and the lock that keeps other merges out still.
#[pyfunction]
#[pyo3(signature = (plan, directory, written, output, *, overwrite, sync, card, adopt, progress))]
#[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn assemble_shards(
    py: Python<'_>,
    plan: &Plan,
    directory: PathBuf,
    written: &Bound<'_, PyAny>,
    output: PathBuf,
    overwrite: bool,
    sync: bool,
    card: Option<String>,
    adopt: bool,
    progress: Option<Py<PyAny>>,
) -> PyResult<Executed> {
    let options = execute::Options { overwrite, sync, card, adopts: adopt, ..Default::default() };
    let written: Vec<WrittenShard> = to_options(Some(written))?;
    let done = job::run(py, progress, |task| {
        let written = (directory.as_path(), written.as_slice());
        parts::assemble(&plan.inputs, &plan.plan, written, &output, &options, task)
    })?;
    executed(py, done)
}
