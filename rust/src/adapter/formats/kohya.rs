//! kohya's plain LoRA: one safetensors file whose keys name flattened modules
//! (`lora_unet_down_blocks_0_….lora_down.weight`), with each module's alpha beside its factors.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::recognize;
use crate::adapter::deltas::LowRank;
use crate::adapter::format::{Format, Place, WriteOptions};
use crate::adapter::{
    Adapter, Contents, Directory, Grammar, Initialization, LayerKind, Module, Semantics, foreign,
};
use crate::checkpoint::names::wrappers;
use crate::error::{Error, Owner, Result};
use crate::limits;
use crate::parallel::task::Task;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Tensor, TensorFile, write};

/// What stands before the names of modules that this writes.
const PREFIX: &str = "lora_unet_";
const DOWN: &str = ".lora_down.weight";
const UP: &str = ".lora_up.weight";
const ALPHA: &str = ".alpha";

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
        Ok(file.header().tensors.iter().any(|tensor| tensor.name.ends_with(DOWN)))
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
        if !adapter.saved().is_empty() || !adapter.trained_rows().is_empty() {
            return Err(refused("brings parameters whole".into()));
        }
        let mut tensors = Vec::new();
        for module in adapter.modules().values() {
            let plain = module.delta.plain().filter(|_| {
                module.kind != LayerKind::Embedding
                    && module.magnitude.is_none()
                    && module.bias.is_none()
            });
            let Some((down, up)) = plain else {
                return Err(refused(format!("does more to {} than add a product", module.path)));
            };
            let key = match adapter.grammar() {
                Grammar::Flattened => module.key.clone(),
                Grammar::Dotted => format!("{PREFIX}{}", module.path.replace('.', "_")),
            };
            tensors.push((format!("{key}{DOWN}"), options.cast(down)?));
            tensors.push((format!("{key}{UP}"), options.cast(up)?));
            tensors.push((format!("{key}{ALPHA}"), alpha_of(module)?));
        }
        write::write(target, IndexMap::new(), tensors)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let name = self.weights(place);
        let weights = place.store.path(&name);
        let file = Arc::new(TensorFile::open_in(&*place.store, &name, Owner::Adapter)?);
        recognize::check_gathered(&file)?;
        let broken = |message: String| Error::adapter(&weights, message);
        let mut parts = IndexMap::<&str, Parts>::new();
        for tensor in &file.header().tensors {
            task.check()?;
            let Some((module, part)) = split(&tensor.name) else {
                return Err(Error::unsupported(
                    &weights,
                    match foreign::part_by_key(&tensor.name) {
                        Some(what) => {
                            format!(
                                "holds {}, {what}; it is no part of a plain LoRA of kohya's, and \
                                 not read yet",
                                tensor.name
                            )
                        }
                        None => format!(
                            "holds {}, which is no part of a plain LoRA of kohya's (lora_down, \
                             lora_up, alpha)",
                            tensor.name
                        ),
                    },
                ));
            };
            let tensor = Tensor::new(file.clone(), tensor.clone());
            let parts = parts.entry(module).or_default();
            match part {
                DOWN => parts.down = Some(tensor),
                UP => parts.up = Some(tensor),
                _ => parts.alpha = Some(tensor),
            }
        }
        let mut modules = IndexMap::with_capacity(parts.len());
        let mut paths = HashMap::new();
        let mut is_wrapped = false;
        for (key, parts) in parts {
            task.check()?;
            if let (Some(down), Some(up)) = (&parts.down, &parts.up)
                && let Some(found) = foreign::experts(down, up, None)
            {
                return Err(Error::unsupported(&weights, found));
            }
            let module = parts.module(key).map_err(broken)??;
            is_wrapped |= module.path != key;
            if let Some(other) = paths.insert(module.path.clone(), key) {
                return Err(broken(format!(
                    "has both {other} and {key}, which are one module without what training tools \
                     put into its name; keep the one that was meant"
                )));
            }
            modules.insert(key.to_owned(), module);
        }
        let notes = is_wrapped.then(|| {
            "its names have what training tools put around a model's modules (_orig_mod and the \
             like); it was left out"
                .to_owned()
        });
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
            others: Vec::new(),
            notes: notes.into_iter().collect(),
            semantics,
            grammar: Grammar::Flattened,
            fields: Vec::new(),
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

/// The alpha that gives a module's scale, α/r, in the narrowest type that holds it.
fn alpha_of(module: &Module) -> Result<Tensor> {
    let alpha = module.scaling * module.rank as f64;
    let narrow = alpha as f32;
    let (dtype, bytes) = if f64::from(narrow) == alpha {
        (Dtype::F32, narrow.to_le_bytes().to_vec())
    } else {
        (Dtype::F64, alpha.to_le_bytes().to_vec())
    };
    Tensor::in_memory(Path::new("alpha"), "alpha", dtype, Vec::new(), bytes)
}

/// A key's module, and the ending that tells the part.
fn split(key: &str) -> Option<(&str, &'static str)> {
    let endings = [DOWN, UP, ALPHA];
    let found = endings.into_iter().find_map(|end| Some((key.strip_suffix(end)?, end)));
    found.filter(|(module, _)| !module.is_empty())
}

/// The tensors of one module, as they are found.
#[derive(Default)]
struct Parts {
    down: Option<Tensor>,
    up: Option<Tensor>,
    alpha: Option<Tensor>,
}

impl Parts {
    /// The module that they make, or in words why they make none.
    fn module(self, key: &str) -> Result<Result<Module>, String> {
        let (a, b) = match (self.down, self.up) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => return Err(format!("has {} but not its lora_up", a.name)),
            (None, Some(b)) => return Err(format!("has {} but not its lora_down", b.name)),
            (None, None) => return Err(format!("has {key}{ALPHA} but not its factors")),
        };
        for tensor in [&a, &b].into_iter().chain(&self.alpha) {
            if !tensor.dtype.is_mergeable() {
                return Err(format!(
                    "tensor {} has the type {}; a factor is of a floating-point type",
                    tensor.name, tensor.dtype
                ));
            }
        }
        let is_pair = a.shape.len() >= 2
            && a.shape.len() == b.shape.len()
            && a.shape[0] == b.shape[1]
            && b.shape[2..].iter().all(|extent| *extent == 1);
        if !is_pair {
            return Err(format!(
                "{} of shape {:?} and {} of shape {:?} are no pair of factors",
                a.name, a.shape, b.name, b.shape
            ));
        }
        let rank = a.shape[0];
        if rank == 0 || rank > limits::RANK {
            return Err(format!(
                "{} has rank {rank}; a rank is from 1 to {}",
                a.name,
                limits::RANK
            ));
        }
        // Without an alpha the scale is 1.
        let alpha = match &self.alpha {
            None => rank as f64,
            Some(alpha) if alpha.elements() != 1 => {
                return Err(format!(
                    "{} has shape {:?}; it is one number",
                    alpha.name, alpha.shape
                ));
            }
            Some(alpha) => match alpha.read_f64() {
                Ok(values) if values[0] == 0.0 => {
                    return Err(format!(
                        "{} is 0, which some programs read as the rank and others as no update; \
                         write the alpha that was meant",
                        alpha.name
                    ));
                }
                Ok(values) if values[0].is_finite() => values[0],
                Ok(values) => {
                    return Err(format!("{} is {}; it is a finite number", alpha.name, values[0]));
                }
                Err(error) => return Ok(Err(error)),
            },
        };
        let kind = if a.shape.len() == 2 { LayerKind::Linear } else { LayerKind::Convolution };
        Ok(Ok(Module {
            key: key.to_owned(),
            path: wrappers::strip_flattened(key).into_owned(),
            parameters: Vec::new(),
            kind,
            delta: Arc::new(LowRank { a, b, diagonal: None }),
            scale: self.alpha,
            magnitude: None,
            bias: None,
            rank,
            alpha,
            scaling: alpha / rank as f64,
        }))
    }
}

/// What describes the adapter to a person: the rank and the alpha where all modules have the same.
fn summary(
    modules: &IndexMap<String, Module>,
    base: Option<&str>,
) -> IndexMap<&'static str, Value> {
    let first = modules.values().next();
    let common = |of: fn(&Module) -> Value| {
        let value = first.map_or(Value::Null, of);
        if modules.values().all(|module| of(module) == value) { value } else { Value::Null }
    };
    IndexMap::from([
        ("type", Value::from("LORA")),
        ("base", base.map_or(Value::Null, Value::from)),
        ("r", common(|module| module.rank.into())),
        ("alpha", common(|module| module.alpha.into())),
        ("rslora", Value::Bool(false)),
        ("peft_version", Value::Null),
    ])
}
