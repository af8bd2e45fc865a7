//! The pass over trained rows of embeddings (`trainable_token_indices`): runs of rows that are
//! replaced.

use super::checks::refuse_integers;
use super::quantized;
use super::ties;
use super::undo::GIVE_THE_BASE;
use crate::adapter::TrainedRows;
use crate::plan::context::AdapterContext;
use crate::plan::draft::{PlanDraft, TensorChanges};
use crate::plan::update::{Slice, Update};

/// Replaces rows of the base by an adapter's.
///
/// # Errors
/// In words, what does not fit.
pub(in crate::plan) fn replace(
    adapter: &AdapterContext<'_>,
    rows: &TrainedRows,
    draft: &mut PlanDraft,
) -> Result<(), String> {
    let context = adapter.plan;
    let path = &rows.path;
    if context.options.subtract {
        return Err(format!(
            "its tensor {} stands in the place of rows of the base's {path}, which are in \
             neither the merged model nor the adapter; {GIVE_THE_BASE}",
            rows.tensor.name
        ));
    }
    let name = adapter.tensor_name(&format!("{path}.weight"))?;
    let Some(tensor) = context.source(&name) else {
        return Err(format!("its module {path} fits no tensor of the {}", context.base.noun()));
    };
    quantized::refuse_unreadable(context, path, &name)?;
    refuse_integers(path, tensor)?;
    // An adapter's own tensor in the base's place may have another number of rows.
    let shape = match draft.changes.origin(&name) {
        Some(origin) if origin.adapter == adapter.position => &origin.info.shape,
        Some(origin) if origin.info.shape != tensor.shape => {
            return Err(format!(
                "its tensor {} replaces rows of {name}, of which an earlier adapter changed the \
                 number of tokens; merge the one, and this one into what comes of it",
                rows.tensor.name
            ));
        }
        _ => &tensor.shape,
    };
    let width = rows.tensor.shape[1];
    if shape.len() != 2 || shape[1] != width {
        return Err(format!(
            "its tensor {} of shape {:?} replaces rows of {name}, which has shape {shape:?}",
            rows.tensor.name, rows.tensor.shape
        ));
    }
    if let Some(row) = rows.rows.iter().find(|row| **row >= shape[0]) {
        return Err(format!(
            "its config trains the token {row} (trainable_token_indices), but {name} has \
             {} rows",
            shape[0]
        ));
    }
    for name in ties::rows_replaced_by(adapter, &name, draft.is_untied) {
        put(adapter, rows, &name, &mut draft.changes);
    }
    Ok(())
}

fn put(adapter: &AdapterContext<'_>, rows: &TrainedRows, name: &str, changes: &mut TensorChanges) {
    let change = changes.entry(name);
    change.updates.extend(runs(&rows.rows).into_iter().map(|run| Update {
        slice: Slice {
            outputs: Some(run.position..run.position + run.count),
            rows: Some(run.first..run.first + run.count),
            ..Slice::default()
        },
        ..adapter.replacement(&rows.tensor.name, &rows.path)
    }));
}

/// Rows that follow one another.
struct Run {
    /// Their position in the adapter's tensor.
    position: u64,
    /// The first of them.
    first: u64,
    count: u64,
}

fn runs(rows: &[u64]) -> Vec<Run> {
    let mut runs: Vec<Run> = Vec::new();
    for (position, row) in rows.iter().enumerate() {
        match runs.last_mut() {
            Some(run) if run.first + run.count == *row => run.count += 1,
            _ => runs.push(Run { position: position as u64, first: *row, count: 1 }),
        }
    }
    runs
}
