//! Plans of merges, and what is done with one: carried out, verified, measured.

use std::path::PathBuf;
use std::sync::Arc;

use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyList};

use lorafast::adapter::format::AdapterSource;
use lorafast::parallel::task::Task;
use lorafast::plan::{self, Inputs};
use lorafast::tensor::dtype::Dtype;
use lorafast::verify::subtraction;
use lorafast::{describe, execute, verify};

use crate::convert::{to_object, to_options};
use crate::execution::{Executed, Execution, executed};
use crate::sources::{Base, Output, Source, to_core};
use crate::{job, operands};

fn open_inputs(base: &Base, adapters: &[AdapterSource], task: &Task) -> lorafast::Result<Inputs> {
    let base = Arc::new(base.open(task)?);
    let adapters = adapters.iter().map(|adapter| adapter.open_for(Some(&base), task).map(Arc::new));
    let adapters = adapters.collect::<lorafast::Result<_>>()?;
    Ok(Inputs { base, adapters })
}

/// Opens base and adapters and plans their merge. `options` are [`plan::Options`] as plain objects.
#[pyfunction]
#[pyo3(signature = (base, adapters, options=None))]
pub fn plan_merge(
    py: Python<'_>,
    base: Base,
    adapters: Vec<Source>,
    options: Option<&Bound<'_, PyAny>>,
) -> PyResult<Plan> {
    let options: plan::Options = to_options(options)?;
    let adapters = to_core(adapters);
    job::run(py, None, |task| {
        let inputs = open_inputs(&base, &adapters, task)?;
        let plan = plan::Plan::new_with(&inputs, options, task)?;
        Ok(Plan { inputs, plan: Arc::new(plan) })
    })
}

/// Opens a base and plans to write it as it is, in the dtype that the options have or its own.
#[pyfunction]
#[pyo3(signature = (base, options=None))]
pub fn plan_base(py: Python<'_>, base: Base, options: Option<&Bound<'_, PyAny>>) -> PyResult<Plan> {
    let options: plan::Options = to_options(options)?;
    job::run(py, None, |task| {
        let inputs = open_inputs(&base, &[], task)?;
        let plan = plan::Plan::of_base(&inputs, options)?;
        Ok(Plan { inputs, plan: Arc::new(plan) })
    })
}

/// Whether every parameter of the adapters has its tensor in the base, by the names as they
/// stand or the built-in rules for renamed ones.
#[pyfunction]
pub fn names_fit(py: Python<'_>, base: Base, adapters: Vec<Source>) -> PyResult<bool> {
    let adapters = to_core(adapters);
    job::run(py, None, |task| plan::names_fit(&open_inputs(&base, &adapters, task)?, task))
}

/// A decided merge together with its opened inputs.
#[pyclass(frozen, module = "lorafast._core")]
pub struct Plan {
    pub(crate) inputs: Inputs,
    pub(crate) plan: Arc<plan::Plan>,
}

#[pymethods]
impl Plan {
    /// The plan in full, as plain objects.
    fn describe(&self, py: Python<'_>) -> PyResult<Py<PyAny>> {
        to_object(py, &describe::plan(&self.inputs, &self.plan))
    }

    /// Carries the plan out on the CPU; returns the summary as plain objects, and the lock that keeps
    /// other merges out still. `options` are [`execute::Options`] as plain objects, but for the
    /// models that must not be written over.
    #[pyo3(signature = (output, options=None, *, protected=Vec::new(), progress=None))]
    fn execute(
        &self,
        py: Python<'_>,
        output: Output,
        options: Option<&Bound<'_, PyAny>>,
        protected: Vec<PathBuf>,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Executed> {
        let options = execute::Options { protected, ..to_options(options)? };
        let Output(output) = output;
        let done = job::run(py, progress, |task| {
            execute::execute_into(&self.inputs, &self.plan, &*output, &options, task)
        })?;
        executed(py, done)
    }

    /// Begins an execution in steps: checks and locks the output, and writes the headers. `options`
    /// are [`execute::Options`] as plain objects.
    #[pyo3(signature = (output, options=None, *, protected=Vec::new()))]
    fn begin(
        &self,
        py: Python<'_>,
        output: Output,
        options: Option<&Bound<'_, PyAny>>,
        protected: Vec<PathBuf>,
    ) -> PyResult<Execution> {
        let options = execute::Options { protected, ..to_options(options)? };
        job::run(py, None, |task| {
            Execution::begin(&self.inputs, &self.plan, &*output.0, &options, task)
        })
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
        let tensor = operands::tensor_at(&self.plan, place)?;
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
        operands::updates(py, &self.inputs, &self.plan, place, weight)
    }

    /// Holds a merged checkpoint against the plan; returns the outcome as plain objects.
    #[pyo3(signature = (merged, *, threads=None, full=false, split=false, progress=None))]
    fn verify(
        &self,
        py: Python<'_>,
        merged: Base,
        threads: Option<usize>,
        full: bool,
        split: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let options = verify::Options { threads, full, arithmetic: arithmetic(split) };
        let outcome = job::run(py, progress, |task| {
            verify::verify_opened(&self.inputs, &self.plan, merged.open(task), &options, task)
        })?;
        to_object(py, &outcome)
    }

    /// One of so many parts of that, which any process can look at; returns plain objects for
    /// `verify_found`.
    #[pyo3(signature = (merged, part, *, threads=None, full=false, split=false, progress=None))]
    #[allow(clippy::too_many_arguments, reason = "the arguments of the Python function")]
    fn verify_part(
        &self,
        py: Python<'_>,
        merged: PathBuf,
        part: (usize, usize),
        threads: Option<usize>,
        full: bool,
        split: bool,
        progress: Option<Py<PyAny>>,
    ) -> PyResult<Py<PyAny>> {
        let options = verify::Options { threads, full, arithmetic: arithmetic(split) };
        let found = job::run(py, progress, |task| {
            verify::verify_part(&self.inputs, &self.plan, &merged, part, &options, task)
        })?;
        to_object(py, &found)
    }

    /// The outcome of what all parts found, in their order.
    fn verify_found(
        &self,
        py: Python<'_>,
        merged: PathBuf,
        found: &Bound<'_, PyAny>,
    ) -> PyResult<Py<PyAny>> {
        let found: Vec<verify::Finding> = to_options(Some(found))?;
        let outcome = job::run(py, None, |task| {
            verify::verify_found(&self.inputs, &self.plan, &merged, found, task)
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

fn arithmetic(split: bool) -> verify::Arithmetic {
    match split {
        true => verify::Arithmetic::SplitFactors,
        false => verify::Arithmetic::Plain,
    }
}
