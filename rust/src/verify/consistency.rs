//! Consistency of what a merged checkpoint says of itself: its index, its config, and weights that are tied.

use std::collections::HashSet;

use serde_json::{Map, Value};

use super::Verification;
use crate::checkpoint::heads::{self, BACKBONE, BACKBONE_OF_ANSWERS, Task};
use crate::checkpoint::pipeline::MODEL_INDEX;
use crate::checkpoint::{Checkpoint, Location};
use crate::error::Result;
use crate::execute::rewrite;
use crate::plan::{Inputs, Plan};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::same_bytes;

/// Whether a tensor is an output head by its usual names.
pub(super) fn is_head(name: &str) -> bool {
    ["lm_head.weight", "embed_out.weight"].iter().any(|ending| ends_in(name, ending))
}

fn ends_in(name: &str, ending: &str) -> bool {
    name.strip_suffix(ending).is_some_and(|rest| rest.is_empty() || rest.ends_with('.'))
}

/// The input embeddings.
pub(super) fn embedding(checkpoint: &Checkpoint) -> Option<(&String, Location)> {
    let find = |ending| checkpoint.tensors().iter().find(|(name, _)| ends_in(name, ending));
    let names = ["shared.weight", "embed_tokens.weight", "wte.weight", "embed_in.weight"];
    names.into_iter().find_map(find).map(|(name, location)| (name, *location))
}

/// Everything of the kind.
pub(super) fn check(
    inputs: &Inputs,
    plan: &Plan,
    merged: &Checkpoint,
    known: &HashSet<String>,
    outcome: &mut Verification,
) -> Result<()> {
    check_extra(merged, known, outcome)?;
    check_tie(inputs, plan, merged, outcome)?;
    check_index(merged, outcome);
    check_config(inputs, plan, merged, outcome);
    check_pipeline(inputs, merged, outcome);
    Ok(())
}

/// Whether two tensors hold the same bytes.
fn are_twins(checkpoint: &Checkpoint, left: Location, right: Location) -> Result<bool> {
    let of = |at: Location| (&checkpoint.shards()[at.shard].file, checkpoint.at(at));
    same_bytes(of(left), of(right))
}

/// Tensors that the merge does not make: a head written out beside the embeddings that it is tied
/// to is only odd, if it equals them; anything else is wrong.
fn check_extra(
    merged: &Checkpoint,
    known: &HashSet<String>,
    outcome: &mut Verification,
) -> Result<()> {
    for (name, location) in merged.tensors().iter().filter(|(name, _)| !known.contains(*name)) {
        match embedding(merged).filter(|_| is_head(name)) {
            Some((other, at)) if are_twins(merged, at, *location)? => {
                outcome
                    .warnings
                    .push(format!("tensor {name} is written out beside its twin {other}"));
            }
            // Told apart below.
            Some(_) if merged.ties_embeddings() => {}
            _ => {
                let problem = format!("tensor {name} is in neither the base nor the adapters");
                outcome.problems.push(problem);
            }
        }
    }
    Ok(())
}

/// The head and the embeddings, as the config ties them.
fn check_tie(
    inputs: &Inputs,
    plan: &Plan,
    merged: &Checkpoint,
    outcome: &mut Verification,
) -> Result<()> {
    let head = merged.tensors().iter().find(|(name, _)| is_head(name));
    if !merged.ties_embeddings() {
        if head.is_none() && inputs.base.ties_embeddings() && merged.is_language_model() {
            outcome.problems.push(
                "config.json: does not tie the output head to the embeddings any more, but there \
                 is no head"
                    .into(),
            );
        }
        return Ok(());
    }
    if let (Some((head, at_head)), Some((embedding, at_embedding))) = (head, embedding(merged))
        && !are_twins(merged, *at_head, at_embedding)?
    {
        outcome.problems.push(format!(
            "tensor {head} differs from {embedding}, to which config.json ties it; \
             one of the two is stale"
        ));
    }
    if plan.config_changes.tied == Some(false) {
        outcome.problems.push(
            "config.json: ties the output head to the embeddings, but the adapter made them differ"
                .into(),
        );
    }
    Ok(())
}

/// The index's own arithmetic; opening has held its names against the shards.
fn check_index(merged: &Checkpoint, outcome: &mut Verification) {
    for index in merged.indexes() {
        let own = merged.tensors().iter().filter(|(name, _)| name.starts_with(&index.prefix));
        let size: u64 = own.map(|(_, location)| merged.at(*location).bytes()).sum();
        let claimed = index.content.get("metadata").and_then(|metadata| metadata.get("total_size"));
        match claimed.and_then(Value::as_f64) {
            Some(claimed) if claimed == size as f64 => {}
            Some(claimed) => outcome.problems.push(format!(
                "{}: total_size is {claimed}, but the tensors have {size} bytes",
                index.file_name
            )),
            None => outcome.warnings.push(format!("{}: has no total_size", index.file_name)),
        }
    }
}

/// The description of a pipeline, and its components' configs, which a pipeline does not load without.
fn check_pipeline(inputs: &Inputs, merged: &Checkpoint, outcome: &mut Verification) {
    if inputs.base.pipeline().is_none() || !merged.is_directory() {
        return;
    }
    let Some(found) = merged.pipeline() else {
        outcome.problems.push(format!("{MODEL_INDEX} is missing"));
        return;
    };
    let names = |checkpoint: &Checkpoint| -> Vec<String> {
        checkpoint.configs().into_iter().map(|(name, ..)| name).collect()
    };
    let present = names(merged);
    let missing = names(&inputs.base).into_iter().filter(|name| !present.contains(name));
    outcome.problems.extend(missing.map(|name| format!("{name} is missing")));
    let listed = inputs.base.pipeline().map(|pipeline| &pipeline.content);
    if listed.is_some_and(|listed| *listed != found.content) {
        outcome.warnings.push(format!("{MODEL_INDEX}: is not the base's"));
    }
}

/// The config's entries that depend on the merge.
fn check_config(inputs: &Inputs, plan: &Plan, merged: &Checkpoint, outcome: &mut Verification) {
    let Some(config) = merged.config() else {
        // A single file has nothing beside it that belongs to it.
        if inputs.base.config().is_some() && merged.is_directory() {
            outcome.problems.push("config.json is missing".into());
        }
        return;
    };
    let embedded =
        embedding(merged).and_then(|(_, location)| merged.at(location).shape.first().copied());
    if let (Some(tokens), Some(vocabulary)) =
        (entry(config, &["vocab_size"]).and_then(Value::as_u64), plan.config_changes.vocabulary)
        && (tokens != vocabulary || embedded.is_some_and(|embedded| embedded != tokens))
    {
        outcome.problems.push(format!(
            "config.json: vocab_size is {tokens}, but the embeddings have {vocabulary} tokens"
        ));
    }
    let layers = entry(config, &rewrite::LAYER_COUNTS).and_then(Value::as_u64);
    if let (Some(count), Some(replication)) = (layers, &plan.config_changes.layers)
        && count != replication.order.len() as u64
    {
        outcome.problems.push(format!(
            "config.json: counts {count} layers, but the adapter makes them {}",
            replication.order.len()
        ));
    }
    check_head(config, plan, merged, outcome);
    check_backbone(config, plan, merged, outcome);
    let named = entry(config, &["dtype", "torch_dtype"]).and_then(Value::as_str);
    if let (Some(named), Some(dtype)) = (named, usual_dtype(merged))
        && dtype.torch_name() != Some(named)
        && usual_dtype(&inputs.base).as_ref() != Some(&dtype)
    {
        outcome.warnings.push(format!(
            "config.json: says {named}, but most weights are {dtype}; loaders may convert them"
        ));
    }
}

/// The class that the config names, and its labels, against the head.
fn check_head(
    config: &Map<String, Value>,
    plan: &Plan,
    merged: &Checkpoint,
    outcome: &mut Verification,
) {
    let class = heads::class_of(config);
    let planned = plan.config_changes.head.as_ref();
    if let (Some(class), Some(meant)) = (class, planned.and_then(|head| head.class.as_deref()))
        && Task::of_class(class) != Task::of_class(meant)
    {
        outcome.problems.push(format!(
            "config.json: names the class {class}, but the adapter's head makes it a {meant}"
        ));
        return;
    }
    let is_labelled = class.and_then(Task::of_class).is_some() || planned.is_some();
    if let Some((name, labels)) = heads::head_of(merged).filter(|_| is_labelled)
        && heads::labels_of(config) != labels
    {
        outcome.problems.push(format!(
            "config.json: has {} labels, but {name} has {labels} rows",
            heads::labels_of(config)
        ));
    }
}

/// The names of the backbone against those that the output's class gives it.
fn check_backbone(
    config: &Map<String, Value>,
    plan: &Plan,
    merged: &Checkpoint,
    outcome: &mut Verification,
) {
    if !heads::renames_backbone(config) {
        return;
    }
    let planned: HashSet<&str> = plan.tensors().map(|(_, tensor)| tensor.name.as_str()).collect();
    let is_odd = |name: &&String| {
        let meant = heads::name_for_answers(name);
        meant.is_some_and(|meant| planned.contains(meant.as_str()))
            && !planned.contains(name.as_str())
    };
    if let Some(name) = merged.tensors().keys().find(is_odd) {
        outcome.problems.push(format!(
            "tensor {name}: {} calls the backbone {BACKBONE_OF_ANSWERS:?}, and does not load what \
             begins with {BACKBONE:?}",
            heads::class_of(config).unwrap_or("the class for question answering")
        ));
    }
}

/// The first of several entries, of the config or of its text model's.
fn entry<'a>(config: &'a Map<String, Value>, names: &[&str]) -> Option<&'a Value> {
    let inner = config.get("text_config").and_then(Value::as_object);
    let places = std::iter::once(config).chain(inner);
    places.flat_map(|place| names.iter().filter_map(|name| place.get(*name))).next()
}

/// The floating-point type of most bytes.
fn usual_dtype(checkpoint: &Checkpoint) -> Option<Dtype> {
    let mut counts: Vec<(Dtype, u64)> = Vec::new();
    for location in checkpoint.tensors().values() {
        let tensor = checkpoint.at(*location);
        if !tensor.dtype.is_mergeable() {
            continue;
        }
        match counts.iter_mut().find(|(dtype, _)| *dtype == tensor.dtype) {
            Some((_, bytes)) => *bytes += tensor.bytes(),
            None => counts.push((tensor.dtype.clone(), tensor.bytes())),
        }
    }
    counts.into_iter().max_by_key(|(_, bytes)| *bytes).map(|(dtype, _)| dtype)
}
