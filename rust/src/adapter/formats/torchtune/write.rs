//! An adapter written as torchtune's: its names of modules, its order of rows, one rank and one scale
//! in all.

use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Value, json};

use super::{A, B, Heads, MAGNITUDE, MODEL_CONFIG, hugging_face_path, is_rotated};
use crate::adapter::computed;
use crate::adapter::deltas::RowOrder;
use crate::adapter::factors::{times, values};
use crate::adapter::format::WriteOptions;
use crate::adapter::formats::peft::{WEIGHTS, config};
use crate::adapter::{Adapter, Grammar, Initialization, LayerKind};
use crate::error::{Error, Result};
use crate::storage::local;
use crate::tensor::safetensors::{Tensor, write};

/// The modules outside of blocks, by Hugging Face's name and its own.
const OUTSIDE: [(&str, &str); 2] =
    [("model.embed_tokens", "tok_embeddings"), ("lm_head", "output")];
/// Those of a block.
const INSIDE: [(&str, &str); 7] = [
    ("self_attn.q_proj", "attn.q_proj"),
    ("self_attn.k_proj", "attn.k_proj"),
    ("self_attn.v_proj", "attn.v_proj"),
    ("self_attn.o_proj", "attn.output_proj"),
    ("mlp.gate_proj", "mlp.w1"),
    ("mlp.down_proj", "mlp.w2"),
    ("mlp.up_proj", "mlp.w3"),
];

pub(super) fn write_adapter(
    adapter: &Adapter,
    directory: &Path,
    options: &WriteOptions<'_>,
) -> Result<()> {
    check(adapter)?;
    let modules = || adapter.modules().values();
    let config = options.base.and_then(|base| base.config());
    let heads = match config {
        Some(config) => Heads::of(config).map_err(|problem| {
            let base = options.base.map_or(Path::new(""), |base| base.path());
            refused(adapter, &format!("and the config of {} {problem}", base.display()))
        })?,
        None => Heads::Unknown,
    };
    let rank = modules().map(|module| module.rank).max().unwrap_or(1);
    let scale = usual(modules().map(|module| module.scaling));
    let mut tensors = Vec::new();
    for module in modules() {
        let name = own_path(&module.path).ok_or_else(|| {
            refused(
                adapter,
                &format!("changes {}, a module that torchtune has no name for", module.path),
            )
        })?;
        if heads == Heads::Unknown && is_rotated(&module.path) {
            return Err(Error::unsupported(
                adapter.path(),
                format!(
                    "changes {}, whose rows torchtune has in an order that the model's config tells; \
                     give the base (base=, --base)",
                    module.path
                ),
            ));
        }
        let order = heads.order(&module.path, module.outputs());
        let order = order.map_err(|problem| Error::unsupported(adapter.path(), problem))?;
        let Some((a, b)) = module.delta.plain() else {
            let what = format!("adds to {} what is no product of two matrices", module.path);
            return Err(refused(adapter, &what));
        };
        let b = times(b, module.scaling / scale)?;
        tensors.push((format!("{name}{A}"), padded(a, [rank, a.shape[1]])?));
        tensors.push((format!("{name}{B}"), in_order(&padded(&b, [b.shape[0], rank])?, order)?));
        if let Some(magnitude) = &module.magnitude {
            let mut info = magnitude.info().clone();
            info.shape = vec![magnitude.elements()];
            let vector = Tensor::new(magnitude.file().clone(), info);
            tensors.push((format!("{name}{MAGNITUDE}"), in_order(&vector, order)?));
        }
    }
    for (_, tensor) in &mut tensors {
        *tensor = options.cast(tensor)?;
    }
    let mut targets = Vec::<&str>::new();
    for module in modules() {
        let last = module.path.rsplit('.').next().unwrap_or(&module.path);
        if !targets.contains(&last) {
            targets.push(last);
        }
    }
    let settings = json!({
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.semantics().base,
        "r": rank,
        "lora_alpha": scale * rank as f64,
        "target_modules": targets,
        "use_dora": modules().any(|module| module.magnitude.is_some()),
    });
    local::create_directories(directory)?;
    let metadata = IndexMap::from([("format".to_owned(), "pt".to_owned())]);
    write::write(&directory.join(WEIGHTS), metadata, tensors)?;
    let written = |name: &str, value: &Value| {
        let text = serde_json::to_vec_pretty(value).expect("plain data");
        local::write_small(&directory.join(name), &text)
    };
    written(config::FILE_NAME, &settings)?;
    // As torchtune copies it: without it nothing but the base tells the order of the rows.
    match config.filter(|_| modules().any(|module| is_rotated(&module.path))) {
        Some(config) => written(MODEL_CONFIG, &Value::Object(config.clone())),
        None => Ok(()),
    }
}

fn refused(adapter: &Adapter, what: &str) -> Error {
    Error::unsupported(adapter.path(), format!("cannot be written in torchtune's names: it {what}"))
}

/// # Errors
/// What the format cannot say.
fn check(adapter: &Adapter) -> Result<()> {
    if adapter.grammar() != Grammar::Dotted {
        return Err(Error::unsupported(
            adapter.path(),
            "has flattened names, of which only the base tells where the dots were; give the base",
        ));
    }
    let semantics = adapter.semantics();
    if let Some(order) = &semantics.unknown_order {
        return Err(Error::unsupported(
            adapter.path(),
            format!("has rows in {order}; give the base (base=, --base)"),
        ));
    }
    if semantics.initialization != Initialization::Plain || semantics.layer_replication.is_some() {
        return Err(refused(adapter, "changed the base before it was trained"));
    }
    if let Some(saved) = adapter.saved().first() {
        return Err(refused(adapter, &format!("brings {} whole", saved.path)));
    }
    if let Some(rows) = adapter.trained_rows().first() {
        return Err(refused(adapter, &format!("brings rows of {} whole", rows.path)));
    }
    for module in adapter.modules().values() {
        let path = &module.path;
        let what = match module.kind {
            _ if module.delta.holds_experts() => {
                format!("holds the factors of several experts for {path}")
            }
            _ if module.bias.is_some() => format!("has a bias on the second factor of {path}"),
            _ if !module.scaling.is_finite() => {
                return Err(Error::adapter(
                    adapter.path(),
                    format!("tells no scale for {path}; give its config"),
                ));
            }
            LayerKind::Linear | LayerKind::Embedding => continue,
            kind => format!("changes the {} {path}", kind.name()),
        };
        return Err(refused(adapter, &what));
    }
    Ok(())
}

/// What torchtune calls a module; none for what it does not have.
fn own_path(path: &str) -> Option<String> {
    let found = OUTSIDE.iter().find(|(other, _)| *other == path);
    let own = match found {
        Some((_, own)) => (*own).to_owned(),
        None => {
            let (number, module) = path.strip_prefix("model.layers.")?.split_once('.')?;
            let (_, own) = INSIDE.iter().find(|(other, _)| *other == module)?;
            format!("layers.{number}.{own}")
        }
    };
    // What is written is what is read.
    (hugging_face_path(&own).as_deref() == Some(path)).then_some(own)
}

/// The value that most have, the first of those.
fn usual(values: impl Iterator<Item = f64>) -> f64 {
    let mut counts = IndexMap::<u64, usize>::new();
    for value in values.filter(|value| *value != 0.0) {
        *counts.entry(value.to_bits()).or_default() += 1;
    }
    let most = counts.values().max();
    let found = counts.iter().find(|(_, count)| Some(*count) == most);
    found.map_or(1.0, |(bits, _)| f64::from_bits(*bits))
}

/// A matrix with zeros below or beside it.
fn padded(matrix: &Tensor, [rows, columns]: [u64; 2]) -> Result<Tensor> {
    if matrix.shape[..] == [rows, columns] {
        return Ok(matrix.clone());
    }
    let width = matrix.shape[1] as usize;
    let mut all = vec![0.0; (rows * columns) as usize];
    let stored = values(matrix)?;
    for (from, to) in stored.chunks_exact(width.max(1)).zip(all.chunks_exact_mut(columns as usize))
    {
        to[..width].copy_from_slice(from);
    }
    computed::in_memory(matrix, &matrix.dtype, vec![rows, columns], &all)
}

/// A tensor with its rows as torchtune stores them.
fn in_order(tensor: &Tensor, order: RowOrder) -> Result<Tensor> {
    if order == RowOrder::Straight {
        return Ok(tensor.clone());
    }
    let rows = tensor.shape[0];
    let stored = tensor.read()?;
    let size = stored.len() / rows.max(1) as usize;
    let mut bytes = vec![0; stored.len()];
    for (row, from) in stored.chunks_exact(size).enumerate() {
        let to = order.stored_row(row as u64, rows) as usize * size;
        bytes[to..to + size].copy_from_slice(from);
    }
    let (name, dtype) = (tensor.name.clone(), tensor.dtype.clone());
    Tensor::in_memory(tensor.file().path(), name, dtype, tensor.shape.clone(), bytes)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_name_that_is_written_is_read() {
        for (path, own) in [
            ("model.layers.3.self_attn.o_proj", Some("layers.3.attn.output_proj")),
            ("model.layers.3.mlp.up_proj", Some("layers.3.mlp.w3")),
            ("lm_head", Some("output")),
            ("model.embed_tokens", Some("tok_embeddings")),
            ("layers.3.mlp.up_proj", None),
            ("model.layers.x.mlp.up_proj", None),
            ("model.layers.3.self_attn.qkv_proj", None),
        ] {
            assert_eq!(own_path(path).as_deref(), own, "{path}");
        }
    }
}
