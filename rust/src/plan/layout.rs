//! The layout of the output's tensors: the base's shards, byte for byte the same layout where nothing
//! changes its size, and a new one where something does.

use super::draft::{NewTensor, PlanDraft, TensorChange};
use super::options::Options;
use super::passes::quantized;
use super::update::Update;
use super::value::{Action, Inputs, Origin, PlannedShard, PlannedTensor};
use crate::checkpoint::quantized::QuantizedWeights;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Header, TensorInfo};

/// Lays out every shard. Tensors that the base does not have go into its last one, or into that of
/// the tensor they begin as a copy of.
pub(super) fn plan_shards(
    inputs: &Inputs,
    options: &Options,
    draft: PlanDraft,
    weights: &QuantizedWeights,
) -> Vec<PlannedShard> {
    let PlanDraft { mut changes, new_tensors, .. } = draft;
    let quantized = quantized::outcome(weights, &changes, options);
    let last = inputs.base.shards().len().saturating_sub(1);
    let home = |new: &NewTensor| new.home.unwrap_or(last);
    (inputs.base.shards().iter().enumerate())
        .map(|(position, shard)| {
            let header = shard.file.header();
            let own =
                inputs.base.tensors().iter().filter(|(_, location)| location.shard == position);
            let mut tensors: Vec<_> = own
                .filter(|(name, _)| !quantized.is_left_out(name))
                .map(|(name, location)| {
                    let tensor = inputs.base.at(*location);
                    let change = changes.take(name).unwrap_or_default();
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
                let header = shard.file.header_bytes().to_vec();
                return PlannedShard { name, source, header, tensors };
            }
            let header = lay_out(&mut tensors, header);
            PlannedShard { name, source, header, tensors }
        })
        .collect()
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
fn lay_out(tensors: &mut [PlannedTensor], old: &Header) -> Vec<u8> {
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
    let entries = tensors
        .iter()
        .map(|tensor| TensorInfo {
            name: tensor.name.clone(),
            range: tensor.target.clone(),
            ..tensor.written()
        })
        .collect();
    Header { metadata: old.metadata.clone(), tensors: entries }.encode()
}
