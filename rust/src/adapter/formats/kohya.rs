//! kohya's format: one safetensors file whose keys name flattened modules
//! (`lora_unet_down_blocks_0_….lora_down.weight`), with each module's alpha beside its factors. What
//! LyCORIS writes under such names is of every algorithm that it has.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::image::layout;
use super::parts::{self, ModuleParts, Part, ScaleRule, Spelling};
use super::{recognize, write_parts};
use crate::adapter::format::{Format, Place, WriteOptions};
use crate::adapter::{
    Adapter, Contents, Directory, Grammar, Initialization, LayerKind, Module, PartUse, Role,
    Semantics, Usage,
};
use crate::checkpoint::names::wrappers;
use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::tensor::safetensors::{Tensor, TensorFile};

/// What stands before the names of modules that this writes.
const PREFIX: &str = "lora_unet_";
/// What the names of packed embeddings begin with.
const EMBEDDINGS: &str = "bundle_emb.";

/// kohya's format.
#[derive(Debug)]
pub struct Kohya;

impl Format for Kohya {
    fn name(&self) -> &'static str {
        "kohya"
    }

    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        if place.source.pickle.is_some() {
            return Ok(false);
        }
        let weights = self.weights(place);
        if !weights.ends_with(".safetensors") || !place.store.is_file(&weights) {
            return Ok(false);
        }
        // What cannot be read is no file of this format; whoever reads it says what it is.
        let Ok(file) = TensorFile::open_in(&*place.store, &weights, Owner::Adapter) else {
            return Ok(false);
        };
        Ok(file.header().tensors.iter().any(|tensor| is_own(&tensor.name)))
    }

    /// The file that was asked for, or the one that the directory has.
    fn weights(&self, place: &Place<'_>) -> String {
        if let Some(file) = &place.file {
            return file.clone();
        }
        let found = place.store.list().unwrap_or_default();
        let mut weights = found.into_iter().filter(|name| name.ends_with(".safetensors"));
        match (weights.next(), weights.next()) {
            (Some(only), None) => only,
            _ => String::new(),
        }
    }

    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()> {
        let refused = |what: String| {
            Error::unsupported(
                adapter.path(),
                format!("{what}, which kohya's plain LoRA cannot say of it"),
            )
        };
        let semantics = adapter.semantics();
        if semantics.initialization != Initialization::Plain
            || semantics.layer_replication.is_some()
        {
            return Err(refused("changed the base before it was trained".into()));
        }
        if let Some(order) = &semantics.unknown_order {
            return Err(Error::Argument(format!(
                "{}: has rows in {order}; open it with its base",
                adapter.path().display()
            )));
        }
        if !adapter.saved().is_empty() || !adapter.trained_rows().is_empty() {
            return Err(refused("brings parameters whole".into()));
        }
        let mut modules = IndexMap::with_capacity(adapter.modules().len());
        for module in adapter.modules().values() {
            if module.kind == LayerKind::Embedding {
                return Err(refused(format!("changes the embedding {}", module.path)));
            }
            let key = match adapter.grammar() {
                Grammar::Flattened => module.key.clone(),
                Grammar::Dotted => {
                    let own = if module.kind == LayerKind::Bias { ".bias" } else { "" };
                    format!("{PREFIX}{}{own}", module.path.replace('.', "_"))
                }
            };
            modules.insert(key.clone(), Module { key, ..module.clone() });
        }
        let named = adapter.renamed(modules, Vec::new(), Vec::new(), Grammar::Flattened);
        write_parts::write_parts(&named, target, &write_parts::KOHYA, options)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let name = self.weights(place);
        let weights = place.store.path(&name);
        let file = Arc::new(TensorFile::open_in(&*place.store, &name, Owner::Adapter)?);
        recognize::check_gathered(&file)?;
        let broken = |message: String| Error::adapter(&weights, message);
        let mut others = Vec::new();
        let mut parts = IndexMap::<&str, ModuleParts>::new();
        for tensor in &file.header().tensors {
            task.check()?;
            if tensor.name.starts_with(EMBEDDINGS) {
                others.push((tensor.name.clone(), Role::Embedding));
                continue;
            }
            let Some((module, part, _)) = parts::split(&tensor.name) else {
                let problem =
                    format!("holds {}, which is no part of an update that is known", tensor.name);
                return Err(Error::unsupported(&weights, problem));
            };
            parts
                .entry(module)
                .or_default()
                .add(part, Tensor::new(file.clone(), tensor.clone()))?;
        }
        let mut modules = IndexMap::with_capacity(parts.len());
        let mut paths = HashMap::new();
        let mut is_wrapped = false;
        for (key, parts) in parts {
            task.check()?;
            let path = wrappers::strip_flattened(key);
            is_wrapped |= path != key;
            if let Some(other) = paths.insert(path.clone(), key) {
                return Err(broken(format!(
                    "has both {other} and {key}, which are one module without what training tools \
                     put into its name; keep the one that was meant"
                )));
            }
            others.extend(parts.unused().map(|one| (one.name.clone(), Role::Unused)));
            for module in parts.module(key, &path, &ScaleRule::default())? {
                modules.insert(module.key.clone(), module);
            }
        }
        let notes = is_wrapped.then(|| {
            "its names have what training tools put around a model's modules (_orig_mod and the \
             like); it was left out"
                .to_owned()
        });
        // Vectors of a textual inversion, which no tensor of a model takes.
        let has_embeddings = others.iter().any(|(_, role)| *role == Role::Embedding);
        let fields = has_embeddings.then(|| {
            let reason = "holds embeddings of a textual inversion, which a merge leaves out";
            PartUse::new(EMBEDDINGS.trim_end_matches('.'), (Usage::Refused, reason))
        });
        let fields = fields.into_iter().collect();
        let metadata = &file.header().metadata;
        let settings: Map<String, Value> =
            metadata.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
        let named = |key: &str| metadata.get(key).filter(|value| *value != "None").cloned();
        let base = named("ss_sd_model_name").or_else(|| named("ss_base_model_version"));
        let summary = summary(&modules, base.as_deref());
        let semantics = Semantics { base, ..Semantics::default() };
        Ok(Adapter::new(Contents {
            path: place.path().to_path_buf(),
            format: self.name(),
            file,
            modules,
            saved: Vec::new(),
            rows: Vec::new(),
            others,
            notes: notes.into_iter().collect(),
            semantics,
            grammar: Grammar::Flattened,
            fields,
            settings,
            summary,
            read_from: Vec::new(),
            // A file that was asked for may lie among others.
            directory: match place.file {
                None => Some(Directory::new(place.store.clone(), None, name)),
                Some(_) => None,
            },
        }))
    }
}

/// Whether a key is one of this format's, whatever the algorithm: in what is no plain LoRA, a name
/// without dots.
fn is_own(key: &str) -> bool {
    parts::split(key).is_some_and(|(module, part, spelling)| match (part, spelling) {
        (Part::Down, Spelling::Kohya) => true,
        // kohya's names with PEFT's endings.
        (Part::Down, Spelling::Peft | Spelling::PeftDefault | Spelling::PeftBare) => {
            layout::is_flattened(module)
        }
        (Part::Difference | Part::BiasDifference, _) | (_, Spelling::Lycoris) => {
            !module.contains('.')
        }
        _ => false,
    })
}

/// What describes the adapter to a person: the rank and the alpha where all modules have the same.
fn summary(
    modules: &IndexMap<String, Module>,
    base: Option<&str>,
) -> IndexMap<&'static str, Value> {
    // The rank of a norm or a bias says nothing.
    let is_matrix = |module: &&Module| !matches!(module.kind, LayerKind::Norm | LayerKind::Bias);
    let measured = || modules.values().filter(is_matrix);
    let common = |of: fn(&Module) -> Value| {
        let value = measured().next().map_or(Value::Null, of);
        if measured().all(|module| of(module) == value) { value } else { Value::Null }
    };
    let mut algorithms: Vec<_> = modules.values().map(|module| module.delta.algorithm()).collect();
    algorithms.sort_unstable();
    algorithms.dedup();
    // Full differences of norms and biases beside another algorithm are no other one.
    if measured().all(|module| module.delta.algorithm() != "FULL") && algorithms.len() > 1 {
        algorithms.retain(|name| *name != "FULL");
    }
    IndexMap::from([
        ("type", Value::from(algorithms.join(", "))),
        ("base", base.map_or(Value::Null, Value::from)),
        ("r", common(|module| module.rank.into())),
        ("alpha", common(|module| module.alpha.into())),
        ("rslora", Value::Bool(false)),
        ("peft_version", Value::Null),
    ])
}
