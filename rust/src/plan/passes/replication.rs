//! The pass over layers that an adapter repeats (`layer_replication`): the base as the adapter saw
//! it, in which a tensor can stand under the names of several layers.
//!
//! PEFT builds such a model over shared weights, and its merge adds every layer's update to the one
//! tensor that they share. What was trained is a model whose layers differ, so each of them is
//! written out with its own updates; `compat = "peft"` gives the other.

use std::collections::HashMap;
use std::sync::Arc;

use indexmap::{IndexMap, IndexSet};

use crate::checkpoint::quantized::QuantizedWeights;
use crate::checkpoint::{Checkpoint, Location};
use crate::limits;
use crate::plan::value::{Inputs, Replication};

/// The names under which a model keeps the list of its layers, in PEFT's order of looking.
const LISTS: [&str; 3] = ["layers", "encoder.layer", "h"];
/// The parts of a model's names that may stand before the list.
const WRAPPERS: [&str; 3] = ["model", "bert", "transformer"];

/// The inputs with the base as the adapters saw it, and what was repeated.
pub(in crate::plan) struct ReplicatedInputs {
    pub inputs: Inputs,
    pub replication: Replication,
}

/// The inputs with the base as the adapters saw it, where they repeat its layers.
///
/// # Errors
/// In words, if the adapters do not agree on the layers, or the base does not have them.
pub(in crate::plan) fn apply(inputs: &Inputs) -> Result<Option<ReplicatedInputs>, String> {
    let ranges = |adapter: usize| &inputs.adapters[adapter].semantics().layer_replication;
    let first = ranges(0);
    if let Some(other) = (1..inputs.adapters.len()).find(|adapter| ranges(*adapter) != first) {
        return Err(format!(
            "{} and {} do not repeat the same layers (layer_replication), so that they are not of \
             one model; merge them one after the other, each into its own base",
            inputs.adapters[0].path().display(),
            inputs.adapters[other].path().display()
        ));
    }
    let Some(ranges) = first else { return Ok(None) };
    if !QuantizedWeights::of(&inputs.base).entries().is_empty() {
        return Err(format!(
            "{}: repeats layers (layer_replication), and the base is quantised; write the base out \
             unquantised first, and merge into that",
            inputs.adapters[0].path().display()
        ));
    }
    let (prefix, layers) = find_layers(&inputs.base)?;
    // Before they are written out: a range can be of any length.
    if let Some((_, end)) = ranges.iter().find(|(_, end)| *end > layers) {
        return Err(format!(
            "{}: repeats layers up to {} (layer_replication), but the base has {layers} layers \
             ({prefix}0 and so on)",
            inputs.adapters[0].path().display(),
            end - 1
        ));
    }
    let order: Vec<u64> = ranges.iter().flat_map(|(start, end)| *start..*end).collect();
    let repeated = repeat(&inputs.base, &prefix, &order).ok_or_else(|| {
        format!(
            "{}: makes more than {} tensors by layer_replication, which is more than a checkpoint \
             can have",
            inputs.adapters[0].path().display(),
            limits::REPEATED_TENSORS
        )
    })?;
    let base = Arc::new(repeated);
    let inputs = Inputs { base, adapters: inputs.adapters.clone() };
    Ok(Some(ReplicatedInputs { inputs, replication: Replication { layers, order } }))
}

/// What stands before a layer's number in a tensor's name, the number, and what stands after it.
fn layer_of(name: &str) -> Option<(&str, u64, &str)> {
    let mut start = 0;
    for part in name.split('.') {
        if let Ok(number) = part.parse() {
            return Some((&name[..start], number, &name[start + part.len()..]));
        }
        start += part.len() + 1;
    }
    None
}

fn find_layers(base: &Checkpoint) -> Result<(String, u64), String> {
    let mut lists = IndexMap::<&str, u64>::new();
    for (prefix, number, _) in base.tensors().keys().filter_map(|name| layer_of(name)) {
        let list = prefix.trim_end_matches('.');
        let is_list = |known: &str| {
            list.strip_suffix(known).is_some_and(|wrappers| {
                let mut parts = wrappers.split('.').filter(|part| !part.is_empty());
                (wrappers.is_empty() || wrappers.ends_with('.'))
                    && parts.all(|part| WRAPPERS.contains(&part))
            })
        };
        if LISTS.iter().any(|known| is_list(known)) {
            let count = lists.entry(prefix).or_default();
            *count = (*count).max(number.saturating_add(1));
        }
    }
    match lists.as_slice() {
        lists if lists.len() == 1 => {
            let (prefix, count) = lists.get_index(0).expect("there is one");
            Ok(((*prefix).to_owned(), *count))
        }
        lists => Err(format!(
            "the adapter repeats layers (layer_replication), but the base has {} lists of layers \
             under the names that PEFT looks for ({})",
            lists.len(),
            LISTS.join(", ")
        )),
    }
}

/// The same shards under the names of the repeated layers; `None` for too many of them.
fn repeat(base: &Checkpoint, prefix: &str, order: &[u64]) -> Option<Checkpoint> {
    let mut repeats = HashMap::<u64, Vec<usize>>::new();
    for (new, old) in order.iter().enumerate() {
        repeats.entry(*old).or_default().push(new);
    }
    let mut tensors = IndexMap::<String, Location>::new();
    for (name, location) in base.tensors() {
        match layer_of(name).filter(|(found, ..)| *found == prefix) {
            Some((_, layer, rest)) => {
                for new in repeats.get(&layer).into_iter().flatten() {
                    tensors.insert(format!("{prefix}{new}{rest}"), *location);
                }
            }
            None => {
                tensors.insert(name.clone(), *location);
            }
        }
        if tensors.len() as u64 > limits::REPEATED_TENSORS {
            return None;
        }
    }
    Some(base.with_tensors(tensors))
}

/// All names of the base under which the tensor of one of them stands.
pub(in crate::plan) fn sharing(base: &Checkpoint, name: &str) -> IndexSet<String> {
    let mut names = IndexSet::from([name.to_owned()]);
    if let Some(location) = base.tensors().get(name) {
        let others = base.tensors().iter().filter(|(_, other)| *other == location);
        names.extend(others.map(|(name, _)| name.clone()));
    }
    names
}
