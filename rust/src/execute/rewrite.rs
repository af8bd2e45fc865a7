//! The base's index and config as the output has them: what a merge changes in them, and nothing
//! else.

use std::collections::HashSet;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use crate::checkpoint::{Checkpoint, Index, Object, heads};
use crate::plan::{ConfigChanges, Inputs, Plan, PlannedTensor, TaskHead};

/// The output's indexes: the base's, each with every tensor that its shards hold and their size in
/// bytes; its very bytes, where that changes nothing.
pub fn index_contents(base: &Checkpoint, plan: &Plan) -> Vec<(String, Vec<u8>)> {
    base.indexes().iter().map(|index| (index.file_name.clone(), content_of(index, plan))).collect()
}

fn content_of(index: &Index, plan: &Plan) -> Vec<u8> {
    let own = || {
        plan.tensors().filter_map(|(shard, tensor)| {
            let file = shard.name.strip_prefix(&index.folder)?;
            let name = tensor.name.strip_prefix(&index.prefix)?;
            Some((file, name, tensor))
        })
    };
    let mut content = index.content.clone();
    let mut map = match content.get("weight_map") {
        Some(Value::Object(map)) => map.clone(),
        _ => Map::new(),
    };
    // What stands in no shard any more.
    let planned: HashSet<_> = own().map(|(_, name, _)| name).collect();
    map.retain(|name, _| planned.contains(name.as_str()));
    for (file, name, _) in own() {
        map.insert(name.to_owned(), Value::from(file));
    }
    let mut metadata = match content.get("metadata") {
        Some(Value::Object(metadata)) => metadata.clone(),
        _ => Map::new(),
    };
    let size: u64 = own().map(|(.., tensor)| tensor.target.end - tensor.target.start).sum();
    metadata.insert("total_size".into(), Value::from(size));
    // The metadata stands first, as libraries write it.
    content.remove("weight_map");
    content.insert("metadata".into(), Value::Object(metadata));
    content.insert("weight_map".into(), Value::Object(map));
    let is_same = content == index.content;
    if is_same { index.bytes.clone() } else { pretty(&Value::Object(content)) }
}

/// The configs of the base under their names, as the output has them.
pub fn config_contents(inputs: &Inputs, plan: &Plan) -> IndexMap<String, Vec<u8>> {
    let is_pipeline = inputs.base.pipeline().is_some();
    let content = |(name, (config, bytes), prefix): (String, &Object, String)| {
        let changes = match is_pipeline {
            true => changes_of_component(inputs, plan, config, &prefix),
            false => plan.config_changes.clone(),
        };
        let content = match changes.is_empty() {
            true => bytes.clone(),
            false => changed_config(config, &changes),
        };
        (name, content)
    };
    inputs.base.configs().into_iter().map(content).collect()
}

/// What a merge changes in the config of one component of a pipeline, by what it changes in the
/// component. Of heads and ties no component's config tells, and a type is named where it was.
fn changes_of_component(
    inputs: &Inputs,
    plan: &Plan,
    config: &Map<String, Value>,
    prefix: &str,
) -> ConfigChanges {
    let all = &plan.config_changes;
    let own = || {
        let all = plan.tensors().map(|(_, tensor)| tensor);
        all.filter(|tensor| tensor.name.starts_with(prefix))
    };
    let is_cast = |tensor: &PlannedTensor| tensor.output_dtype != tensor.stored().dtype;
    let names_dtype = ["torch_dtype", "dtype"].iter().any(|name| config.contains_key(*name));
    let is_resized = |tensor: &PlannedTensor| {
        let before = inputs.base.tensor(&tensor.name).and_then(|before| before.shape.first());
        let after = tensor.source.shape.first();
        before.is_some() && before != after && after == all.vocabulary.as_ref()
    };
    let is_dequantized = |tensor: &PlannedTensor| {
        tensor.quantized.is_some() && !tensor.requantized && is_cast(tensor)
    };
    ConfigChanges {
        dtype: all.dtype.clone().filter(|_| names_dtype && own().any(is_cast)),
        vocabulary: all.vocabulary.filter(|_| own().any(is_resized)),
        unquantized: all.unquantized && own().any(is_dequantized),
        ..ConfigChanges::default()
    }
}

/// The names under which configs count layers.
pub const LAYER_COUNTS: [&str; 4] = ["num_hidden_layers", "n_layer", "num_layers", "n_layers"];

/// The base's config with what the merge changes in it, in every place that names it.
pub fn changed_config(config: &Map<String, Value>, changes: &ConfigChanges) -> Vec<u8> {
    fn change(fields: &mut Map<String, Value>, changes: &ConfigChanges) -> (bool, bool) {
        let (mut has_dtype, mut has_tie) = (false, false);
        for (name, value) in fields.iter_mut() {
            match (name.as_str(), &mut *value) {
                ("torch_dtype" | "dtype", Value::String(old)) => {
                    has_dtype = true;
                    if let Some(dtype) = &changes.dtype {
                        old.clone_from(dtype);
                    }
                }
                ("vocab_size", Value::Number(_)) => {
                    if let Some(vocabulary) = changes.vocabulary {
                        *value = Value::from(vocabulary);
                    }
                }
                (name, Value::Number(number)) if LAYER_COUNTS.contains(&name) => {
                    if let Some(layers) = &changes.layers
                        && number.as_u64() == Some(layers.layers)
                    {
                        *value = Value::from(layers.order.len());
                    }
                }
                // One entry for each layer: layer_types, no_rope_layers and their like.
                (name, Value::Array(entries)) if name.contains("layer") => {
                    if let Some(layers) = &changes.layers
                        && entries.len() as u64 == layers.layers
                    {
                        let old = |layer: &u64| entries[*layer as usize].clone();
                        *value = layers.order.iter().map(old).collect();
                    }
                }
                ("tie_word_embeddings", Value::Bool(tied)) => {
                    has_tie = true;
                    *tied = changes.tied.unwrap_or(*tied);
                }
                ("quantization_config", _) => {}
                (name, Value::Object(inner)) if name.ends_with("_config") => {
                    change(inner, changes);
                }
                _ => {}
            }
        }
        (has_dtype, has_tie)
    }
    let mut config = config.clone();
    if changes.unquantized {
        remove_quantization(&mut config);
    }
    let (has_dtype, has_tie) = change(&mut config, changes);
    if let Some(dtype) = changes.dtype.as_ref().filter(|_| !has_dtype) {
        config.insert("torch_dtype".into(), Value::from(dtype.as_str()));
    }
    if let Some(tied) = changes.tied.filter(|_| !has_tie) {
        config.insert("tie_word_embeddings".into(), Value::from(tied));
    }
    if let Some(head) = &changes.head {
        name_head(&mut config, head);
    }
    pretty(&Value::Object(config))
}

/// Makes a config that of a model with a head of labels.
fn name_head(config: &mut Map<String, Value>, head: &TaskHead) {
    if let Some(class) = &head.class {
        config.insert("architectures".into(), Value::from(vec![class.as_str()]));
    }
    let is_named = config.contains_key("id2label") && heads::labels_of(config) == head.labels;
    let usual = || (0..head.labels).map(|id| (id.to_string(), Value::from(format!("LABEL_{id}"))));
    let names: Map<String, Value> = match (&head.names, is_named) {
        (Some(names), _) => names.clone().into_iter().collect(),
        (None, true) => return,
        (None, false) => usual().collect(),
    };
    let number = |id: &String| id.parse::<u64>().map_or(Value::Null, Value::from);
    let by_name = names.iter().filter_map(|(id, name)| Some((name.as_str()?.into(), number(id))));
    config.insert("label2id".into(), Value::Object(by_name.collect()));
    config.insert("id2label".into(), Value::Object(names));
    // Older configs count them apart.
    if let Some(count) = config.get_mut("num_labels") {
        *count = Value::from(head.labels);
    }
}

/// Takes the entries on quantisation out, wherever they stand.
fn remove_quantization(fields: &mut Map<String, Value>) {
    fields.retain(|name, _| name != "quantization_config" && name != "compression_config");
    for (_, value) in fields.iter_mut().filter(|(name, _)| name.ends_with("_config")) {
        if let Value::Object(inner) = value {
            remove_quantization(inner);
        }
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_string_pretty(value).expect("a JSON value serialises");
    text.push('\n');
    text.into_bytes()
}
