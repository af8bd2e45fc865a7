//! The pass that tells of each config field and each tensor of the adapters whether it is used.

use std::collections::{HashMap, HashSet};

use crate::adapter::{Adapter, Coverage, Usage};
use crate::error::Result;
use crate::plan::draft::IgnoredTensors;
use crate::plan::update::{Update, UpdateKind};
use crate::plan::value::{Inputs, Origin, PlannedShard};

/// The names of an adapter's tensors that an update is made from.
pub(in crate::plan) fn tensors_of<'a>(adapter: &'a Adapter, update: &'a Update) -> Vec<&'a str> {
    if update.kind == UpdateKind::Replace {
        return vec![&update.module];
    }
    let Some(module) = adapter.modules().get(&update.module) else { return Vec::new() };
    if update.kind == UpdateKind::Vector {
        return module.bias.iter().map(|tensor| tensor.name.as_str()).collect();
    }
    let factors = module.product_tensors().into_iter().map(|(_, tensor)| tensor);
    let tensors = factors.chain(&module.magnitude);
    tensors.map(|tensor| tensor.name.as_str()).chain(update.base_override.as_deref()).collect()
}

/// What becomes of the fields, tensors and files of every adapter. A tensor counts as used where some
/// tensor of the output is made from it, and not otherwise.
///
/// # Errors
/// [`crate::Error::Io`] if an adapter's directory cannot be listed.
pub(in crate::plan) fn resolve(
    inputs: &Inputs,
    allow: &[String],
    shards: &[PlannedShard],
    ignored: &IgnoredTensors,
) -> Result<Vec<Coverage>> {
    let mut used = HashSet::<(usize, &str)>::new();
    for tensor in shards.iter().flat_map(|shard| &shard.tensors) {
        if let Origin::Adapter(adapter) = tensor.origin {
            used.insert((adapter, &tensor.source.name));
        }
        for update in tensor.updates() {
            let names = tensors_of(&inputs.adapters[update.adapter], update);
            used.extend(names.into_iter().map(|name| (update.adapter, name)));
        }
    }
    let mut reasons = HashMap::<(usize, &str), &str>::new();
    for ignored in ignored.iter() {
        reasons.entry((ignored.adapter, &ignored.tensor)).or_insert(&ignored.reason);
    }
    let of_adapter = |(position, adapter): (usize, &std::sync::Arc<Adapter>)| {
        let mut coverage = adapter.coverage(allow)?;
        for tensor in &mut coverage.tensors {
            if tensor.usage != Usage::Used || used.contains(&(position, &tensor.name)) {
                continue;
            }
            let known = reasons.get(&(position, tensor.name.as_str())).copied();
            tensor.usage = Usage::NotNeeded;
            tensor.reason = known.unwrap_or("the result is the same without it").to_owned();
        }
        Ok(coverage)
    };
    inputs.adapters.iter().enumerate().map(of_adapter).collect()
}
