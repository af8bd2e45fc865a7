//! The match of a merged checkpoint's tensors with the plan's, whoever named and sharded it.

use std::collections::HashSet;

use crate::checkpoint::names::prefix::{self, PrefixChange};
use crate::checkpoint::names::renames::NameIndex;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::checkpoint::{Checkpoint, Location};
use crate::error::Result;
use crate::parallel::task::Task;
use crate::plan::{Action, Plan, PlannedTensor};
use crate::tensor::safetensors::TensorInfo;

use super::Verification;
use super::consistency::{embedding, is_head};
use super::quantized;

/// One tensor: what it should be, and what is stored where.
pub(super) struct Job {
    pub planned: PlannedTensor,
    pub location: Location,
    pub stored: TensorInfo,
}

/// Finds every planned tensor in the merged checkpoint; what is not there is a problem. Returns the
/// names there that belong to the plan, too.
///
/// # Errors
/// [`crate::Error::Cancelled`].
pub(super) fn match_up(
    plan: &Plan,
    quantized: &QuantizedWeights,
    merged: &Checkpoint,
    outcome: &mut Verification,
    task: &Task,
) -> Result<(Vec<Job>, HashSet<String>)> {
    let prefix_change = prefix_change(plan, merged, task)?;
    if let Some(description) = prefix_change.describe() {
        outcome.warnings.push(format!(
            "the tensors' names are not the base's: {}",
            description.replace("its names", "the base's").replace(
                "which the base's do not have",
                "which those of the merged checkpoint do not have"
            )
        ));
    }
    let mut jobs = Vec::new();
    let mut known = HashSet::new();
    for (_, planned) in plan.tensors() {
        let name = prefix_change.apply(&planned.name).unwrap_or_else(|| planned.name.clone());
        let Some(planned) = quantized::as_written(planned, &name, quantized, merged) else {
            continue;
        };
        // A weight that is written out has its own name, not that of its codes.
        let name = match &planned.quantized {
            Some(meant) if !planned.requantized => {
                let own = &meant.logical.name;
                prefix_change.apply(own).unwrap_or_else(|| own.clone())
            }
            _ => name,
        };
        let found = merged.tensors().get(&name).copied();
        // A head that shares the embeddings' tensor need not be stored.
        let tied = || (is_head(&name) && merged.ties_embeddings()).then(|| embedding(merged));
        let Some(location) = found.or_else(|| tied().flatten().map(|(_, location)| location))
        else {
            outcome.problems.push(format!("tensor {} is missing", planned.name));
            continue;
        };
        known.insert(name);
        match with_dtype_of(&planned, merged.at(location)) {
            Ok(planned) => {
                jobs.push(Job { planned, location, stored: merged.at(location).clone() });
            }
            Err(problem) => outcome.problems.push(problem),
        }
    }
    Ok((jobs, known))
}

/// The change of names between the base and the merged checkpoint: none, as long as most are the
/// same, so that a missing tensor is not taken for a renamed one.
fn prefix_change(plan: &Plan, merged: &Checkpoint, task: &Task) -> Result<PrefixChange> {
    let names: Vec<_> = plan.tensors().map(|(_, tensor)| tensor.name.clone()).collect();
    let found = names.iter().filter(|name| merged.tensor(name).is_some()).count();
    if 2 * found >= names.len() {
        return Ok(PrefixChange::Same);
    }
    Ok(prefix::find_prefix_change(&names, &[], &NameIndex::plain(merged), task)?.change)
}

/// Gives the plan of one tensor the type in which it is stored.
fn with_dtype_of(planned: &PlannedTensor, stored: &TensorInfo) -> Result<PlannedTensor, String> {
    let name = &planned.name;
    let shape = planned.written().shape;
    if stored.shape != shape {
        return Err(format!("tensor {name} has shape {:?} instead of {shape:?}", stored.shape));
    }
    let mut planned = planned.clone();
    if stored.dtype != planned.output_dtype {
        let converts = stored.dtype.is_mergeable() && planned.output_dtype.is_mergeable();
        if planned.requantized || matches!(planned.action, Action::Rescale) || !converts {
            return Err(format!(
                "tensor {name} is stored as {} instead of {}",
                stored.dtype, planned.output_dtype
            ));
        }
        planned.output_dtype = stored.dtype.clone();
        planned.action = match planned.action {
            action @ (Action::Merge(_) | Action::MergeEntries(_)) => action,
            _ if planned.output_dtype == planned.source.dtype => Action::Copy,
            _ => Action::Cast,
        };
    }
    Ok(planned)
}
