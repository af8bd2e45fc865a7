//! Tensors that an entry-wise strategy merges: what may be among their updates.

use indexmap::IndexMap;

use super::options::Options;
use super::update::{Update, UpdateKind};
use super::value::{Action, EntryMerge, Inputs, Origin, PlannedShard, PlannedTensor};
use crate::error::{Error, Result};

/// Makes of sums of updates what the strategy of the options makes of them, if it is an entry-wise one.
///
/// # Errors
/// [`Error::Unsupported`] with everything that is no product, adapter by adapter.
pub(super) fn merge_by_entries(
    inputs: &Inputs,
    options: &Options,
    shards: &mut [PlannedShard],
) -> Result<()> {
    let Some(method) = options.entry_method()? else { return Ok(()) };
    let mut refused = IndexMap::<(usize, &'static str), Vec<String>>::new();
    for tensor in shards.iter_mut().flat_map(|shard| &mut shard.tensors) {
        if let Origin::Adapter(adapter) = tensor.origin {
            let what = "parameters that were trained whole";
            refused.entry((adapter, what)).or_default().push(tensor.name.clone());
        }
        for update in tensor.updates() {
            let ranks_turned = method.looks_at_rows() && update.transposed;
            if let Some(what) = what_is_no_product(tensor, update) {
                refused.entry((update.adapter, what)).or_default().push(tensor.name.clone());
            } else if ranks_turned {
                let what = "updates of weights that are stored transposed, whose rows (in which elements \
                            are ranked) lie across all of the tensor";
                refused.entry((update.adapter, what)).or_default().push(tensor.name.clone());
            }
        }
        if let Action::Merge(updates) = &mut tensor.action {
            tensor.action = Action::MergeEntries(EntryMerge {
                updates: std::mem::take(updates),
                method,
                seed: options.seed,
                adapters: inputs.adapters.len(),
            });
        }
    }
    let mut messages = IndexMap::<usize, Vec<String>>::new();
    for ((adapter, what), names) in &refused {
        let more = match names.len() {
            1 => String::new(),
            count => format!(" and {} more", count - 1),
        };
        messages.entry(*adapter).or_default().push(format!("{what} ({}{more})", names[0]));
    }
    let Some((first, _)) = messages.first() else { return Ok(()) };
    let first = inputs.adapters[*first].path();
    let lines: Vec<String> = messages
        .iter()
        .map(|(adapter, found)| {
            let line = format!(
                "the strategy {} merges products of two factors element by element, and it has {}",
                options.strategy.name(),
                found.join("; ")
            );
            match inputs.adapters[*adapter].path() {
                path if path == first => line,
                path => format!("{}: {line}", path.display()),
            }
        })
        .collect();
    Err(Error::unsupported(first, lines.join("\n")))
}

/// What an update is, if it is no product that stands by itself.
fn what_is_no_product(tensor: &PlannedTensor, update: &Update) -> Option<&'static str> {
    match update.kind {
        UpdateKind::Dora => Some("DoRA's magnitudes, with which the update is no sum"),
        UpdateKind::Replace => Some("parameters that were trained whole"),
        UpdateKind::Transform => Some("updates that only the base's weight makes"),
        UpdateKind::Vector => Some("updates of norms and biases"),
        UpdateKind::LowRank if tensor.source.shape.len() < 2 => Some("updates of norms and biases"),
        UpdateKind::LowRank if update.residual.is_some() => {
            Some("factors that began with a part of the base's weight (PiSSA, OLoRA or the like)")
        }
        UpdateKind::LowRank => None,
    }
}
