//! `lorafast._core`: the Python face of the core. Each function converts its arguments, detaches
//! from the interpreter, calls the core, and wraps the result. No logic lives here.

mod alike;
mod device;
mod errors;
mod fleet;
mod job;
mod parts;
mod sources;
mod table;

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use lorafast::adapter::Adapter;
use lorafast::adapter::format::AdapterSource;
use lorafast::checkpoint::Checkpoint;
use lorafast::checkpoint::names::renames::Renames;
use lorafast::kernel::InstructionSet;
use lorafast::measure::analysis;
use lorafast::parallel::task::{Task, build_pool};
use lorafast::plan::{self, Compat, ExpertLayout, Inputs, Strategy};
use lorafast::storage::staging;
use lorafast::tensor::dtype::Dtype;
use lorafast::verify::subtraction;
use lorafast::{describe, execute, verify};

use errors::to_python;
use sources::{Base, Source, to_core};

/// A serialisable value as plain Python objects.
fn to_object(py: Python<'_>, value: &impl serde::Serialize) -> PyResult<Py<PyAny>> {
    Ok(pythonize::pythonize(py, value)?.unbind())
}

fn open_inputs(base: &Base, adapters: &[AdapterSource], task: &Task) -> lorafast::Result<Inputs> {
    let base = Arc::new(base.open(task)?);
    let adapters = adapters.iter().map(|adapter| adapter.open(task).map(Arc::new));
    Ok(Inputs { base, adapters: adapters.collect::<lorafast::Result<_>>()? })
}

/// A decided merge together with its opened inputs.
#[pyclass(frozen, module = "lorafast._core")]
struct Plan {
    inputs: Inputs,
    plan: Arc<plan::Plan>,
}

#[pymethods]
impl Plan {
    /// The plan in full, as plain objects.
    fn describe(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        to_object(py, &job::run(py, None, |_| describe::plan(&self.inputs, &self.plan))?)
    }

    /// Carries the plan out on the CPU; returns the summary as plain objects. Models among
    /// `protected` are not written over.
    #[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
    #[pyo3(signature = (output, *, threads=None, overwrite=false, sync=true, instruction_set=None, protected=Vec::new(), progress=None))]
    fn execute(
        &self,
        py: Python<'_>,
        output: PathBuf,
        threads: Option<usize>,
        overwrite: bool,
        sync: bool,
        instruction_set: Option<&str>,
        protected: Vec<PathBuf>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let instruction_set = instruction_set
            .map(InstructionSet::from_name)
            .transpose()
            .map_err(|error| to_python(py, error))?;
        let options = execute::Options { threads, overwrite, sync, instruction_set, protected };
        let summary = job::run(py, progress, |task| {
            execute::execute(&self.inputs, &self.plan, &output, &options, task)
        })?;
        to_object(py, &summary)
    }

    /// Every tensor that adapters change, for an executor with arithmetic of its own, as plain
    /// objects.
    fn changed_tensors(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        to_object(py, &execute::operands::changed_tensors(&self.plan))
    }

    /// What an adapter puts in a tensor's place: its type and its bytes.
    fn replacement<'py>(
        &self,
        py: Python<'py>,
        place: (usize, usize),
    ) -> PyResult<Option<(String, Bound<'py, PyBytes>)>> {
        let tensor = device::tensor_at(&self.plan, place)?;
        let found = job::run(py, None, |_| execute::operands::replacement(&self.inputs, tensor))?;
        Ok(found.map(|(dtype, bytes)| (dtype.name().to_owned(), PyBytes::new(py, &bytes))))
    }

    /// The updates of a merged tensor as dictionaries, the factors as bytes. `weight` is all of it
    /// in f64, where it lies elsewhere than in the base's files.
    #[pyo3(signature = (place, *, weight=None))]
    fn operands(
        &self,
        py: Python<'_>,
        place: (usize, usize),
        weight: Option<&Bound<'_, PyAny>>,
    ) -> PyResult<Py<PyList>> {
        device::updates(py, &self.inputs, &self.plan, place, weight)
    }

    /// Begins an execution in steps: checks and locks the output, and writes the headers.
    #[pyo3(signature = (output, *, threads=None, overwrite=false, sync=true))]
    fn begin(
        &self,
        py: Python<'_>,
        output: PathBuf,
        threads: Option<usize>,
        overwrite: bool,
        sync: bool,
    ) -> PyResult<device::Execution> {
        let options = execute::Options { threads, overwrite, sync, ..Default::default() };
        job::run(py, None, |task| {
            device::Execution::begin(&self.inputs, &self.plan, &output, &options, task)
        })
    }

    /// Holds a merged checkpoint against the plan; returns the outcome as plain objects.
    #[pyo3(signature = (merged, *, threads=None, full=false, split=false, progress=None))]
    fn verify(
        &self,
        py: Python<'_>,
        merged: PathBuf,
        threads: Option<usize>,
        full: bool,
        split: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let arithmetic = match split {
            true => verify::Arithmetic::SplitFactors,
            false => verify::Arithmetic::Plain,
        };
        let options = verify::Options { threads, full, arithmetic };
        let outcome = job::run(py, progress, |task| {
            verify::verify(&self.inputs, &self.plan, &merged, &options, task)
        })?;
        to_object(py, &outcome)
    }

    /// The plan that writes the base alone, in that type (a safetensors name) or its own.
    #[pyo3(signature = (*, dtype=None))]
    fn of_base_alone(&self, py: Python<'_>, dtype: Option<&str>) -> PyResult<Self> {
        let dtype = dtype.map(Dtype::from_name);
        let plan = job::run(py, None, |_| self.plan.of_base_alone(&self.inputs, dtype))?;
        Ok(Self { inputs: self.inputs.clone(), plan: Arc::new(plan) })
    }

    /// How far what came back can lie from the base, of a plan that subtracts and was carried out
    /// into `output`; returns plain objects.
    #[pyo3(signature = (output, *, threads=None, progress=None))]
    fn distance(
        &self,
        py: Python<'_>,
        output: PathBuf,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let distance = job::run(py, progress, |task| {
            subtraction::distance(&self.inputs, &self.plan, &output, threads, task)
        })?;
        to_object(py, &distance)
    }
}

#[pymodule]
mod _core {
    use super::*;

    #[pymodule_export]
    use super::Plan;
    #[pymodule_export]
    use super::device::{Execution, stored_factors};
    #[pymodule_export]
    use super::fleet::{FleetTables, ScannedAdapter, module_metrics, scan_adapters};
    #[pymodule_export]
    use super::parts::{assemble_shards, plan_digest, plan_groups, write_shards};
    #[pymodule_export]
    use super::table::{ColumnBuffer, Table};

    #[pymodule_export]
    use super::alike::{Collection, open_collection};

    #[pymodule_init]
    fn init(module: &Bound<'_, PyModule>) -> PyResult<()> {
        module.add("__version__", env!("CARGO_PKG_VERSION"))
    }

    /// Opens base and adapters and plans their merge. `dtype` is a safetensors name.
    #[pyfunction]
    #[pyo3(signature = (base, adapters, *, strategy, weights, dtype, allow, compat, subtract, expert_layout=None, renames=None))]
    #[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
    fn plan_merge(
        py: Python<'_>,
        base: Base,
        adapters: Vec<Source>,
        strategy: &str,
        weights: Option<Vec<f64>>,
        dtype: Option<&str>,
        allow: Vec<String>,
        compat: Option<&str>,
        subtract: bool,
        expert_layout: Option<&str>,
        renames: Option<&str>,
    ) -> PyResult<Plan> {
        let adapters = to_core(adapters);
        job::run(py, None, |task| {
            let options = plan::Options {
                strategy: Strategy::from_name(strategy)?,
                weights,
                dtype: dtype.map(Dtype::from_name),
                allow,
                compat: compat.map(Compat::from_name).transpose()?,
                subtract,
                expert_layout: expert_layout.map(ExpertLayout::from_name).transpose()?,
                renames: renames.map(Renames::from_json).transpose()?,
            };
            let inputs = open_inputs(&base, &adapters, task)?;
            let plan = plan::Plan::new_with(&inputs, options, task)?;
            Ok(Plan { inputs, plan: Arc::new(plan) })
        })
    }

    /// Whether every parameter of the adapters has its tensor in the base, by the names as they
    /// stand or the built-in rules for renamed ones.
    #[pyfunction]
    fn names_fit(py: Python<'_>, base: Base, adapters: Vec<Source>) -> PyResult<bool> {
        let adapters = to_core(adapters);
        job::run(py, None, |task| plan::names_fit(&open_inputs(&base, &adapters, task)?, task))
    }

    /// Lists a checkpoint from its headers, as plain objects.
    #[pyfunction]
    fn list_checkpoint(py: Python<'_>, path: PathBuf) -> PyResult<Py<PyAny>> {
        let list = |task: &Task| {
            let base = Checkpoint::open_with(&path, task)?;
            let listing = describe::checkpoint(&base);
            base.check_unchanged().map(|()| listing)
        };
        to_object(py, &job::run(py, None, list)?)
    }

    /// Lists an adapter from its header and config, as plain objects.
    #[pyfunction]
    fn list_adapter(py: Python<'_>, adapter: Source) -> PyResult<Py<PyAny>> {
        let list = |task: &Task| {
            let adapter = adapter.0.open(task)?;
            let listing = describe::adapter(&adapter);
            adapter.check_unchanged().map(|()| listing)
        };
        to_object(py, &job::run(py, None, list)?)
    }

    /// The name of the format of what lies at a path, if it is an adapter's.
    #[pyfunction]
    fn adapter_format(py: Python<'_>, path: PathBuf) -> PyResult<Option<&'static str>> {
        job::run(py, None, |_| AdapterSource::at(&path).format())
    }

    /// Measures an adapter; a base gives the norms of the weights that it changes. Returns plain
    /// objects.
    #[pyfunction]
    #[pyo3(signature = (adapter, *, base, percentiles, bins, entries, threads, progress))]
    #[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
    fn analyze_adapter(
        py: Python<'_>,
        adapter: Source,
        base: Option<PathBuf>,
        percentiles: Vec<f64>,
        bins: usize,
        entries: bool,
        threads: Option<usize>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let options = analysis::Options { percentiles, bins, entries };
        let analysis = job::run(py, progress, |task| {
            let pool = build_pool(threads)?;
            let adapter = adapter.0.open(task)?;
            let open = |base| Checkpoint::open_with(base, task);
            let base = base.as_deref().map(open).transpose()?;
            analysis::analyze(&adapter, base.as_ref(), &options, &pool, task)
        })?;
        to_object(py, &analysis)
    }

    /// Compares any number of adapters. Returns plain objects.
    #[pyfunction]
    #[pyo3(signature = (adapters, *, threads, progress))]
    fn compare_adapters(
        py: Python<'_>,
        adapters: Vec<Source>,
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
            analysis::compare(&adapters, &pool, task)
        })?;
        to_object(py, &comparison)
    }

    /// Finishes or takes back what a merge that was cut off left in an output; says which.
    #[pyfunction]
    fn recover_output(py: Python<'_>, output: PathBuf) -> PyResult<Py<PyAny>> {
        let recovery = job::run(py, None, |_| staging::recover(&output))?;
        to_object(py, &recovery)
    }

    /// How this binary was built and what it uses of this processor.
    #[pyfunction]
    fn build_info(py: Python<'_>) -> PyResult<Py<PyDict>> {
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
}
