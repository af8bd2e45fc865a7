//! The layout of the output's tensors: the base's shards, byte for byte the same layout where nothing
//! changes its size, and a new one where something does.

use std::collections::BTreeSet;

use indexmap::IndexMap;

use super::draft::{NewTensor, PlanDraft, TensorChange, TensorChanges};
use super::options::{Options, Precision};
use super::passes::quantized;
use super::update::Update;
use super::value::{Action, Inputs, Origin, PlannedShard, PlannedTensor};
use crate::checkpoint::quantized::QuantizedWeights;
use crate::checkpoint::{Checkpoint, Shard};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Header, TensorInfo};

/// What headers' metadata hold that depends on the file's tensors: digests of them.
const DIGESTS: [&str; 3] = ["modelspec.hash_sha256", "sshs_model_hash", "sshs_legacy_hash"];

/// Lays out every shard. Tensors that the base does not have go into its last one (in a pipeline the
/// last one of their component), or into that of the tensor they begin as a copy of. Components of
/// a pipeline that nothing changes stay as they are.
pub(super) fn plan_shards(
    inputs: &Inputs,
    options: &Options,
    draft: PlanDraft,
    weights: &QuantizedWeights,
) -> Vec<PlannedShard> {
    let PlanDraft { mut changes, new_tensors, .. } = draft;
    let quantized = quantized::outcome(weights, &changes, options);
    let shards = inputs.base.shards();
    let last = |name: &str| {
        let own = shards.iter().rposition(|shard| name.starts_with(&shard.prefix));
        own.unwrap_or(shards.len().saturating_sub(1))
    };
    let home = |new: &NewTensor| new.home.unwrap_or_else(|| last(&new.name));
    let touched = touched_components(&inputs.base, &changes, &new_tensors);
    (shards.iter().enumerate())
        .map(|(position, shard)| {
            if !touched.contains(shard.prefix.as_str()) {
                return carried_over(inputs, position, shard);
            }
            let header = shard.file.header();
            let own =
                inputs.base.tensors().iter().filter(|(_, location)| location.shard == position);
            let mut tensors: Vec<_> = own
                .filter(|(name, _)| !quantized.is_left_out(name))
                .map(|(name, location)| {
                    let tensor = inputs.base.at(*location);
                    let change = changes.take(weights.weight_of(name)).unwrap_or_default();
                    let planned = plan_tensor(position, name, tensor, change.clone(), options);
                    quantized.resolve(planned, change.updates, options)
                })
                .collect();
            tensors.extend(
                new_tensors.iter().filter(|new| home(new) == position).map(plan_new_tensor),
            );
            let source = position;
            let name = shard.name.clone();
            let keeps_layout = |tensor: &PlannedTensor| {
                tensor.origin == Origin::Base(position)
                    && tensor.keeps_its_size()
                    && tensor.name == tensor.source.name
            };
            if tensors.len() == header.tensors.len() && tensors.iter().all(keeps_layout) {
                let is_copied = |tensor: &PlannedTensor| matches!(tensor.action, Action::Copy);
                let has_digest = DIGESTS.iter().any(|name| header.metadata.contains_key(*name));
                let header = if !has_digest || tensors.iter().all(is_copied) {
                    shard.file.header_bytes().to_vec()
                } else {
                    encode(&tensors, header, &shard.prefix)
                };
                return PlannedShard { name, source, header, tensors };
            }
            let header = lay_out(&mut tensors, header, &shard.prefix);
            PlannedShard { name, source, header, tensors }
        })
        .collect()
}

/// What the names begin with of the components of a pipeline in which something changes; of a base that
/// is no pipeline, and where nothing changes at all, of every tensor.
pub(super) fn touched_components<'a>(
    base: &'a Checkpoint,
    changes: &TensorChanges,
    new_tensors: &[NewTensor],
) -> BTreeSet<&'a str> {
    let prefixes: BTreeSet<&str> =
        base.shards().iter().map(|shard| shard.prefix.as_str()).collect();
    let changed = changes.iter().filter(|(_, change)| !change.is_empty()).map(|(name, _)| name);
    let changed: Vec<&String> = changed.chain(new_tensors.iter().map(|new| &new.name)).collect();
    let is_touched = |prefix: &&&str| {
        changed.is_empty() || changed.iter().any(|name| name.starts_with(**prefix))
    };
    prefixes.iter().filter(is_touched).copied().collect()
}

/// A shard of a component in which nothing changes.
fn carried_over(inputs: &Inputs, position: usize, shard: &Shard) -> PlannedShard {
    let own = inputs.base.tensors().iter().filter(|(_, location)| location.shard == position);
    let tensors = own
        .map(|(name, location)| {
            let source = inputs.base.at(*location).clone();
            PlannedTensor {
                name: name.clone(),
                origin: Origin::Base(position),
                output_dtype: source.dtype.clone(),
                target: source.range.clone(),
                source,
                action: Action::Copy,
                quantized: None,
                requantized: false,
                precision: Precision::Default,
            }
        })
        .collect();
    let header = shard.file.header_bytes().to_vec();
    PlannedShard { name: shard.name.clone(), source: position, header, tensors }
}

/// The components of a pipeline in which every tensor is copied.
pub(super) fn kept_components<'a>(inputs: &'a Inputs, planned: &[PlannedShard]) -> Vec<&'a str> {
    let is_kept = |prefix: &str| {
        let own = planned.iter().flat_map(|shard| &shard.tensors);
        let mut own = own.filter(|tensor| tensor.name.starts_with(prefix));
        own.all(|tensor| matches!(tensor.action, Action::Copy))
    };
    let parts = inputs.base.pipeline().into_iter().flat_map(|pipeline| &pipeline.parts);
    parts
        .filter(|part| part.has_tensors && is_kept(&part.prefix()))
        .map(|part| part.folder.as_str())
        .collect()
}

/// What digests the metadata of the base's files hold that no longer hold in the output, by the files'
/// names.
pub(super) fn outdated_digests<'a>(
    inputs: &'a Inputs,
    planned: &[PlannedShard],
) -> IndexMap<&'a str, Vec<&'static str>> {
    let changed = inputs
        .base
        .shards()
        .iter()
        .zip(planned)
        .filter(|(shard, planned)| planned.header != shard.file.header_bytes());
    let digests = changed.map(|(shard, _)| {
        let metadata = &shard.file.header().metadata;
        let found = DIGESTS.into_iter().filter(|name| metadata.contains_key(*name));
        (shard.name.as_str(), found.collect::<Vec<_>>())
    });
    digests.filter(|(_, found)| !found.is_empty()).collect()
}

fn plan_tensor(
    shard: usize,
    name: &str,
    tensor: &TensorInfo,
    change: TensorChange,
    options: &Options,
) -> PlannedTensor {
    let output_dtype = match &options.dtype {
        Some(dtype) if tensor.dtype.is_mergeable() => dtype.clone(),
        _ => tensor.dtype.clone(),
    };
    let (origin, source) = match change.origin {
        Some(tensor) => (Origin::Adapter(tensor.adapter), tensor.info),
        None => (Origin::Base(shard), tensor.clone()),
    };
    let action = action(&source, &output_dtype, change.updates);
    let target = tensor.range.clone();
    PlannedTensor {
        name: name.to_owned(),
        origin,
        source,
        output_dtype,
        target,
        action,
        quantized: None,
        requantized: false,
        precision: Precision::Default,
    }
}

fn plan_new_tensor(new: &NewTensor) -> PlannedTensor {
    let NewTensor { name, origin, home: _, source, output_dtype, updates } = new.clone();
    let action = action(&source, &output_dtype, updates);
    PlannedTensor {
        name,
        origin,
        source,
        output_dtype,
        target: 0..0,
        action,
        quantized: None,
        requantized: false,
        precision: Precision::Default,
    }
}

fn action(source: &TensorInfo, output_dtype: &Dtype, updates: Vec<Update>) -> Action {
    if !updates.is_empty() && source.elements() > 0 {
        Action::Merge(updates)
    } else if *output_dtype != source.dtype {
        Action::Cast
    } else {
        Action::Copy
    }
}

/// Gives every tensor its range in a new file and returns that file's header. The widest elements
/// come first, so that each tensor begins at a multiple of its element's size, which loaders rely
/// on.
fn lay_out(tensors: &mut [PlannedTensor], old: &Header, prefix: &str) -> Vec<u8> {
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.output_dtype.bits().unwrap_or(64)));
    let mut position = 0;
    for tensor in tensors.iter_mut() {
        let bytes = if tensor.keeps_its_size() {
            tensor.stored().bytes()
        } else {
            tensor.source.elements() * tensor.output_dtype.size() as u64
        };
        tensor.target = position..position + bytes;
        position += bytes;
    }
    encode(tensors, old, prefix)
}

/// The header of tensors that have their ranges, under the names that the file gives them.
fn encode(tensors: &[PlannedTensor], old: &Header, prefix: &str) -> Vec<u8> {
    let stored = |name: &str| name.strip_prefix(prefix).unwrap_or(name).to_owned();
    let entries = tensors
        .iter()
        .map(|tensor| TensorInfo {
            name: stored(&tensor.name),
            range: tensor.target.clone(),
            ..tensor.written()
        })
        .collect();
    let mut metadata = old.metadata.clone();
    metadata.retain(|name, _| !DIGESTS.contains(&name.as_str()));
    Header { metadata, tensors: entries }.encode()
}
