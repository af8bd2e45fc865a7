//! What an executor on another device needs to make a tensor: its updates and their factors.

use pyo3::exceptions::PyValueError;
use pyo3::prelude::*;
use pyo3::types::{PyBytes, PyDict, PyList};

use lorafast::execute::operands::{self, Operands};
use lorafast::execute::session::TensorId;
use lorafast::plan::{self, Inputs, PlannedTensor};
use lorafast::tensor::dtype::Dtype;

use crate::buffer::Memory;
use crate::convert::to_object;
use crate::job;

/// A planned tensor by its place.
pub fn tensor_at(plan: &plan::Plan, (shard, tensor): TensorId) -> PyResult<&PlannedTensor> {
    let found = plan.shards.get(shard).and_then(|shard| shard.tensors.get(tensor));
    found.ok_or_else(|| PyValueError::new_err(format!("no tensor {tensor} of shard {shard}")))
}

/// The updates of a merged tensor as dictionaries, the factors as bytes.
pub fn updates(
    py: Python<'_>,
    inputs: &Inputs,
    plan: &plan::Plan,
    place: TensorId,
    weight: Option<&Bound<'_, PyAny>>,
) -> PyResult<Py<PyList>> {
    let tensor = tensor_at(plan, place)?;
    let memory = weight.map(|weight| Memory::of(weight, false)).transpose()?;
    let found = job::run(py, None, |_| {
        // SAFETY: the caller, who waits for this call, keeps the weight as it is meanwhile.
        let weight = memory.as_ref().map(|memory| unsafe { memory.bytes() });
        let weight = weight.map(|bytes| operands::widen(&Dtype::F64, bytes));
        operands::operands(inputs, tensor, weight)
    })?;
    let entries = found.iter().map(|update| update_entry(py, update));
    Ok(PyList::new(py, entries.collect::<PyResult<Vec<_>>>()?)?.unbind())
}

fn update_entry<'py>(py: Python<'py>, update: &Operands) -> PyResult<Bound<'py, PyDict>> {
    let entry = PyDict::new(py);
    entry.set_item("kind", to_object(py, &update.kind)?)?;
    entry.set_item("weight", update.weight)?;
    entry.set_item("stage", update.stage)?;
    entry.set_item("rows", (update.rows.start, update.rows.end))?;
    entry.set_item("transposed", update.transposed)?;
    let products = PyList::empty(py);
    for product in &update.products {
        let pair = &product.pair;
        let fields = PyDict::new(py);
        fields.set_item("a", PyBytes::new(py, &pair.a))?;
        fields.set_item("a_dtype", pair.a_dtype.name())?;
        fields.set_item("b", PyBytes::new(py, &pair.b))?;
        fields.set_item("b_dtype", pair.b_dtype.name())?;
        fields.set_item("rank", pair.rank)?;
        fields.set_item("outputs", pair.outputs)?;
        fields.set_item("inputs", pair.inputs)?;
        fields.set_item("coefficient", product.coefficient)?;
        products.append(fields)?;
    }
    entry.set_item("products", products)?;
    let magnitude = update.magnitude.as_ref().map(|values| {
        let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
        PyBytes::new(py, &bytes)
    });
    entry.set_item("magnitude", magnitude)?;
    let base_override = update.base_override.as_ref();
    let base_override = base_override.map(|(dtype, bytes)| (dtype.name(), PyBytes::new(py, bytes)));
    entry.set_item("base_override", base_override)?;
    Ok(entry)
}
