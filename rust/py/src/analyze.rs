//! Measuring an adapter, and comparing several.

use std::path::PathBuf;

use pyo3::prelude::*;
use pyo3::types::PyBytes;

use lorafast::Error;
use lorafast::adapter::Adapter;
use lorafast::adapter::format::GivenScale;
use lorafast::checkpoint::Checkpoint;
use lorafast::measure::analysis::{self, stored};
use lorafast::parallel::task::build_pool;
use lorafast::tensor::dtype::Dtype;

use crate::convert::to_object;
use crate::job;
use crate::sources::Source;

/// Measures an adapter; a base gives the norms of the weights that it changes, and an alpha or a scale
/// what its config would tell, where that is not there. Returns plain objects.
#[pyfunction]
#[pyo3(signature = (adapter, *, base, percentiles, bins, entries, threads, progress, alpha=None, scale=None))]
#[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
pub fn analyze_adapter(
    py: Python<'_>,
    adapter: Source,
    base: Option<PathBuf>,
    percentiles: Vec<f64>,
    bins: usize,
    entries: bool,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
    alpha: Option<f64>,
    scale: Option<f64>,
) -> PyResult<Py<PyAny>> {
    let given = match (alpha, scale) {
        (Some(alpha), _) => GivenScale::Alpha(alpha),
        (None, Some(scale)) => GivenScale::Factor(scale),
        (None, None) => GivenScale::Unknown,
    };
    let options = analysis::Options { percentiles, bins, entries };
    let analysis = job::run(py, progress, |task| {
        let pool = build_pool(threads)?;
        let open = |base| Checkpoint::open_with(base, task);
        let base = base.as_deref().map(open).transpose()?;
        let adapter = adapter.0.with_scale(given).open_for(base.as_ref(), task)?;
        if given != GivenScale::Unknown && !adapter.semantics().scale_is_given {
            return Err(Error::Argument(format!(
                "{}: tells its scale itself; alpha and scale are for an adapter whose config is not \
                 there",
                adapter.path().display()
            )));
        }
        analysis::analyze(&adapter, base.as_ref(), &options, &pool, task)
    })?;
    to_object(py, &analysis)
}

/// Compares any number of adapters. Returns plain objects.
#[pyfunction]
#[pyo3(signature = (adapters, *, modules, threads, progress))]
pub fn compare_adapters(
    py: Python<'_>,
    adapters: Vec<Source>,
    modules: bool,
    threads: Option<usize>,
    progress: Option<Py<PyAny>>,
) -> PyResult<Py<PyAny>> {
    let comparison = job::run(py, progress, |task| {
        let pool = build_pool(threads)?;
        let adapters = adapters
            .iter()
            .map(|adapter| adapter.0.open(task))
            .collect::<lorafast::Result<Vec<_>>>()?;
        let adapters: Vec<&Adapter> = adapters.iter().collect();
        analysis::compare(&adapters, modules, &pool, task)
    })?;
    to_object(py, &comparison)
}

type StoredFactors<'py> = (
    (usize, usize, usize),
    f64,
    (String, Bound<'py, PyBytes>),
    (String, Bound<'py, PyBytes>),
    Option<String>,
);

/// The factors of every module of an adapter that has a spectrum, in order: (m, n, r), the scale,
/// type and bytes of B and of A, and why a merge of it changes nothing, if so.
#[pyfunction]
#[pyo3(signature = (adapter))]
pub fn stored_factors<'py>(py: Python<'py>, adapter: Source) -> PyResult<Vec<StoredFactors<'py>>> {
    let found = job::run(py, None, |task| stored::stored_factors(&adapter.0.open(task)?))?;
    let bytes =
        |(dtype, bytes): &(Dtype, Vec<u8>)| (dtype.name().to_owned(), PyBytes::new(py, bytes));
    let entries = found.iter().map(|each| {
        let factors = (bytes(&each.b), bytes(&each.a));
        (each.extents, each.scaling, factors.0, factors.1, each.zero_cause.clone())
    });
    Ok(entries.collect())
}
