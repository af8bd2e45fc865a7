//! GGUF adapters: LoRA as llama.cpp reads it (`convert_lora_to_gguf.py`, `src/llama-adapter.cpp`).
//!
//! Tensors are called after the base's in llama.cpp (`blk.0.attn_q.weight.lora_a`), one alpha is
//! everybody's, and rows of attention are in the order of llama.cpp's converter, which only the
//! base's numbers of heads tell how to undo. What needs no such order is measured without a base.

mod architectures;
mod names;
mod rows;
mod write;

use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use crate::adapter::coverage::{PartUse, Usage};
use crate::adapter::deltas::{LowRank, Reordered};
use crate::adapter::format::{Format, Place, WriteOptions};
use crate::adapter::{
    Adapter, Contents, Delta, Directory, Grammar, LayerKind, Module, Role, Semantics,
};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Owner, Result};
use crate::limits;
use crate::parallel::task::Task;
use crate::storage::source::Source;
use crate::storage::{file_names, identify};
use crate::tensor::gguf::{self, GENERAL_TYPE};
use crate::tensor::safetensors::{Tensor, TensorFile, TensorInfo};
use architectures::{Architecture, EXPERT, Target};
use rows::{Heads, Orders, Unordered};

const ENDING: &str = ".gguf";
const ARCHITECTURE: &str = "general.architecture";
const ADAPTER: &str = "adapter";
const ADAPTER_TYPE: &str = "adapter.type";
const LORA: &str = "lora";
const ALPHA: &str = "adapter.lora.alpha";
const INVOCATION: &str = "adapter.alora.invocation_tokens";
const BASE_NAME: &str = "general.base_model.0.name";
const BASE_URL: &str = "general.base_model.0.repo_url";
/// What stands before an id in the addresses of the hub.
const HUB: &str = "https://huggingface.co/";
/// What stands before the keys of the base's heads an architecture's name.
const HEADS: &str = ".attention.head_count";
const KEY_HEADS: &str = ".attention.head_count_kv";
const FIRST: &str = ".lora_a";
const SECOND: &str = ".lora_b";
const WEIGHT: &str = ".weight";
/// The tensor whose first factor is stored transposed.
const EMBEDDINGS: &str = "token_embd";
/// The parts of a config that describe a language model within another model.
const TEXT_CONFIGS: [&str; 4] = ["text_config", "llm_config", "language_config", "thinker_config"];

/// GGUF's format.
#[derive(Debug)]
pub struct Gguf;

impl Format for Gguf {
    fn name(&self) -> &'static str {
        "gguf"
    }

    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        let weights = self.weights(place);
        if weights.is_empty() || place.source.pickle.is_some() || !place.store.is_file(&weights) {
            return Ok(false);
        }
        // What cannot be read is no file of this format; whoever reads it says what it is.
        let Ok(source) = place.store.open(&weights) else { return Ok(false) };
        Ok(is_adapter(&*source))
    }

    /// The file that was asked for, or the only weights that the directory has.
    fn weights(&self, place: &Place<'_>) -> String {
        if let Some(file) = &place.file {
            return file.clone();
        }
        let mut names = place.store.list().unwrap_or_default();
        let [config, ..] = file_names::OF_A_MODEL;
        let is_of_a_model = names.iter().any(|name| name == config);
        names.retain(|name| file_names::holds_weights(name));
        match names.as_slice() {
            [only] if only.to_lowercase().ends_with(ENDING) && !is_of_a_model => only.clone(),
            _ => String::new(),
        }
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        read(place, self.weights(place), task)
    }

    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()> {
        write::write_adapter(adapter, target, options)
    }
}

/// Whether a file is a GGUF adapter's, damaged or not.
fn is_adapter(source: &dyn Source) -> bool {
    let mut magic = [0; 4];
    if source.read_at(&mut magic, 0).is_err() || magic != *gguf::MAGIC {
        return false;
    }
    match gguf::general_type(source) {
        Some(kind) => kind == ADAPTER,
        None => identify::of_source(source).is_some_and(|found| found.is_gguf_adapter()),
    }
}

/// What a base's config says: of the language model, where it is one of several.
fn config_of(base: &Checkpoint) -> Option<&Map<String, Value>> {
    let config = base.config()?;
    let inner = TEXT_CONFIGS.iter().find_map(|name| config.get(*name)?.as_object());
    Some(inner.unwrap_or(config))
}

/// The `model_type`s of a base, that of its language model first.
fn model_types(base: &Checkpoint) -> Vec<&str> {
    let configs = [config_of(base), base.config()];
    configs.into_iter().flatten().filter_map(|config| config.get("model_type")?.as_str()).collect()
}

/// What all tensors of a file share.
struct Shared<'a> {
    path: &'a Path,
    file: &'a Arc<TensorFile>,
    architecture: &'static Architecture,
    heads: Heads,
    alpha: f64,
}

fn read(place: &Place<'_>, name: String, task: &Task) -> Result<Adapter> {
    let path = place.store.path(&name);
    let gguf::Gguf { metadata, file } = gguf::Gguf::open_in(&*place.store, &name, Owner::Adapter)?;
    let file = Arc::new(file);
    let text = |key: &str| metadata.get(key).and_then(Value::as_str);
    let unsupported = |message: String| Error::unsupported(&path, message);
    if text(GENERAL_TYPE) != Some(ADAPTER) {
        let kind = text(GENERAL_TYPE).unwrap_or("a model");
        return Err(Error::adapter(
            &path,
            format!("is a GGUF file of another kind than an adapter ({GENERAL_TYPE}: {kind})"),
        ));
    }
    let kind = text(ADAPTER_TYPE).unwrap_or("none");
    if kind != LORA {
        return Err(unsupported(format!(
            "is a GGUF adapter of the kind {kind} ({ADAPTER_TYPE}); a LoRA can be read"
        )));
    }
    let Some(named) = text(ARCHITECTURE) else {
        return Err(Error::adapter(
            &path,
            format!("does not say which architecture it is for ({ARCHITECTURE})"),
        ));
    };
    let architecture = architectures::named(named).ok_or_else(|| {
        unsupported(format!(
            "is for llama.cpp's architecture {named}, whose names are not known; give the adapter \
             that it was made from"
        ))
    })?;
    if let Some(base) = place.base {
        check_base(&path, architecture, base)?;
    }
    let mut notes = Vec::new();
    let alpha = alpha_of(&path, metadata.get(ALPHA), &mut notes)?;
    let heads = place.base.and_then(config_of).map(Heads::of_config).unwrap_or_default();
    let heads = heads.or(heads_of(&metadata, architecture));
    let shared = Shared { path: &path, file: &file, architecture, heads, alpha };
    let (pairs, others) = shared.pairs(task)?;
    let mut modules = IndexMap::with_capacity(pairs.len());
    let mut unordered = None;
    for (name, pair) in pairs {
        task.check()?;
        let (found, is_ordered) = shared.modules(name, pair)?;
        if !is_ordered {
            unordered.get_or_insert_with(|| name.to_owned());
        }
        modules.extend(found.into_iter().map(|module| (module.key.clone(), module)));
        if modules.len() as u64 > limits::UPDATES_OF_EXPERTS {
            return Err(Error::adapter(
                &path,
                format!("holds more than {} experts' factors", limits::UPDATES_OF_EXPERTS),
            ));
        }
    }
    if let (Some(name), Some(base)) = (&unordered, place.base) {
        return Err(unsupported(format!(
            "has {name} in llama.cpp's order of rows, and {} does not say how many heads the model has \
             (num_attention_heads, num_key_value_heads in its config.json); give a base with its config",
            base.path().display()
        )));
    }
    if !others.is_empty() {
        notes.push(format!(
            "{} of norms ({} and the like) were left out, as llama.cpp ignores them",
            crate::error::counted(others.len(), "tensor"),
            others[0].0
        ));
    }
    // The name is one for people, without what tells bases apart.
    let base = text(BASE_URL).and_then(|url| url.strip_prefix(HUB)).or(text(BASE_NAME));
    let base = base.map(str::to_owned);
    let unknown_order = unordered.map(|_| format!("llama.cpp's order for {}", architecture.name));
    let fields = metadata.keys().map(|key| use_of(key, architecture)).collect();
    Ok(Adapter::new(Contents {
        path: place.path().to_path_buf(),
        format: Gguf.name(),
        summary: summary(&modules, alpha, base.as_deref()),
        semantics: Semantics { base, unknown_order, ..Semantics::default() },
        settings: metadata.into_iter().collect(),
        modules,
        saved: Vec::new(),
        rows: Vec::new(),
        others,
        notes,
        grammar: Grammar::Dotted,
        fields,
        read_from: Vec::new(),
        // A file that was asked for may lie among others.
        directory: match place.file {
            None => Some(Directory::new(place.store.clone(), None, name)),
            Some(_) => None,
        },
        file,
    }))
}

/// Refuses a base that is of another architecture.
fn check_base(path: &Path, architecture: &Architecture, base: &Checkpoint) -> Result<()> {
    let found: Vec<_> = model_types(base)
        .into_iter()
        .filter_map(|model_type| Some((model_type, architectures::of_model_type(model_type)?.name)))
        .collect();
    match found.as_slice() {
        [(model_type, other), ..] if found.iter().all(|(_, name)| *name != architecture.name) => {
            Err(Error::adapter(
                path,
                format!(
                    "is for llama.cpp's architecture {}, and the base {} is of {other} (model_type \
                     {model_type})",
                    architecture.name,
                    base.path().display()
                ),
            ))
        }
        _ => Ok(()),
    }
}

/// The alpha of all tensors; 0 where each scale is 1.
fn alpha_of(path: &Path, stored: Option<&Value>, notes: &mut Vec<String>) -> Result<f64> {
    let alpha = match stored {
        None => 0.0,
        Some(value) => value.as_f64().ok_or_else(|| {
            Error::adapter(path, format!("has the {ALPHA} {value}; it is a finite number"))
        })?,
    };
    if alpha == 0.0 {
        let what = stored.map_or("there is none", |_| "it is 0");
        notes.push(format!("{ALPHA}: {what}, and so each scale is 1, as llama.cpp takes it"));
    }
    Ok(alpha)
}

/// The heads that the file itself tells.
fn heads_of(metadata: &IndexMap<String, Value>, architecture: &Architecture) -> Heads {
    let number =
        |key: &str| metadata.get(&format!("{}{key}", architecture.name)).and_then(Value::as_u64);
    let queries = number(HEADS);
    Heads { queries, keys: number(KEY_HEADS).or(queries), linear: None }
}

/// What becomes of a metadata entry.
fn use_of(key: &str, architecture: &Architecture) -> PartUse {
    let heads = [HEADS, KEY_HEADS].map(|ending| format!("{}{ending}", architecture.name));
    let found = match key {
        GENERAL_TYPE | ADAPTER_TYPE => (Usage::Used, "says what the file is"),
        ARCHITECTURE => (Usage::Used, "tells the names and the order of rows"),
        ALPHA => (Usage::Used, "gives the scale"),
        BASE_NAME | BASE_URL => (Usage::NotNeeded, "names the base"),
        INVOCATION => (
            Usage::Refused,
            "is an activated LoRA (adapter.alora.invocation_tokens), which acts only after its \
             invocation and so cannot be merged; serve it beside its base",
        ),
        _ if heads.iter().any(|own| own == key) => (Usage::Used, "tells the order of rows"),
        _ if key.starts_with("adapter.") => (Usage::NotNeeded, "says how it is asked"),
        _ => (Usage::NotNeeded, "describes the file"),
    };
    PartUse::new(key, found)
}

#[derive(Default)]
struct Parts<'a> {
    a: Option<&'a TensorInfo>,
    b: Option<&'a TensorInfo>,
}

type Others = Vec<(String, Role)>;

impl<'a> Shared<'a> {
    fn broken(&self, message: String) -> Error {
        Error::adapter(self.path, message)
    }

    /// The factors by the tensor that they belong to, and what is left out.
    fn pairs(&self, task: &Task) -> Result<(IndexMap<&'a str, Parts<'a>>, Others)> {
        let mut pairs = IndexMap::<&str, Parts<'_>>::new();
        let mut others = Vec::new();
        for tensor in &self.file.header().tensors {
            task.check()?;
            let name = tensor.name.as_str();
            if let Some(owner) = name.strip_suffix(FIRST) {
                pairs.entry(owner).or_default().a = Some(tensor);
            } else if let Some(owner) = name.strip_suffix(SECOND) {
                pairs.entry(owner).or_default().b = Some(tensor);
            } else if name.ends_with("_norm.weight") {
                others.push((name.to_owned(), Role::Ignored));
                continue;
            } else {
                return Err(Error::unsupported(
                    self.path,
                    format!("holds {name}, which is no factor of a LoRA ({FIRST}, {SECOND})"),
                ));
            }
            if !tensor.dtype.is_mergeable() {
                return Err(Error::unsupported(
                    self.path,
                    format!(
                        "holds {name} of the type {}, which is quantized; make the file again with \
                         factors in f32, f16 or bf16",
                        tensor.dtype
                    ),
                ));
            }
        }
        Ok((pairs, others))
    }

    /// The modules of one tensor's factors, and whether their rows are in the weights' order.
    fn modules(&self, name: &str, pair: Parts<'_>) -> Result<(Vec<Module>, bool)> {
        let (a, b) = match (pair.a, pair.b) {
            (Some(a), Some(b)) => (a, b),
            (Some(_), None) => {
                return Err(self.broken(format!("has {name}{FIRST} but not its {SECOND}")));
            }
            _ => return Err(self.broken(format!("has {name}{SECOND} but not its {FIRST}"))),
        };
        let target = name.strip_suffix(WEIGHT).and_then(|bare| self.architecture.module_of(bare));
        let Some(target) = target else {
            return Err(Error::unsupported(
                self.path,
                format!(
                    "changes {name}, which is the weight of no module that is known of {}; give the \
                     adapter that it was made from",
                    self.architecture.name
                ),
            ));
        };
        let value = |info: &TensorInfo, shape: &[u64]| {
            Tensor::new(self.file.clone(), TensorInfo { shape: shape.to_vec(), ..info.clone() })
        };
        let unfit = || {
            self.broken(format!(
                "{} of shape {:?} and {} of shape {:?} are no pair of factors of {}",
                a.name, a.shape, b.name, b.shape, target.module
            ))
        };
        if a.shape.contains(&0) || b.shape.contains(&0) {
            return Err(unfit());
        }
        match (a.shape.as_slice(), b.shape.as_slice()) {
            // ggml drops extents of 1 at the end.
            ([inputs], [_, 1]) if !target.is_of_experts() && target.tensor != EMBEDDINGS => {
                self.matrix(name, &target, value(a, &[1, *inputs]), value(b, &b.shape))
            }
            ([_, rank], [_, other]) if target.tensor == EMBEDDINGS && rank == other => {
                self.matrix(name, &target, value(a, &a.shape), value(b, &b.shape))
            }
            ([rank, _], [_, other])
                if !target.is_of_experts() && target.tensor != EMBEDDINGS && rank == other =>
            {
                self.matrix(name, &target, value(a, &a.shape), value(b, &b.shape))
            }
            ([count, rank, inputs], [others, outputs, other])
                if target.is_of_experts() && rank == other && count == others =>
            {
                if *count > limits::EXPERTS {
                    return Err(self.broken(format!(
                        "{} holds {count} experts; {} are the most",
                        a.name,
                        limits::EXPERTS
                    )));
                }
                let mut modules = Vec::with_capacity(*count as usize);
                for expert in 0..*count {
                    let a = slice(self.file, a, expert, &[*rank, *inputs]);
                    let b = slice(self.file, b, expert, &[*outputs, *rank]);
                    modules.push(self.module(
                        format!("{name}[{expert}]"),
                        target.module.replace(EXPERT, &expert.to_string()),
                        LayerKind::Linear,
                        *rank,
                        Arc::new(LowRank { a, b, diagonal: None }),
                    )?);
                }
                Ok((modules, true))
            }
            _ => Err(unfit()),
        }
    }

    fn matrix(
        &self,
        name: &str,
        target: &Target,
        a: Tensor,
        b: Tensor,
    ) -> Result<(Vec<Module>, bool)> {
        let a_is_transposed = target.tensor == EMBEDDINGS;
        let (outputs, rank) = (b.shape[0], b.shape[1]);
        let inputs = a.shape[usize::from(!a_is_transposed)];
        let orders = self.architecture.rows.orders(target.tensor, self.heads, outputs, inputs);
        let (Orders { outputs, inputs }, is_ordered) = match orders {
            Ok(orders) => (orders, true),
            Err(Unordered::Unknown) => (Orders::default(), false),
            Err(Unordered::Unfit(why)) => {
                return Err(self.broken(format!("{}: {why}", b.name)));
            }
        };
        let delta: Arc<dyn Delta> = if a_is_transposed || outputs.is_some() || inputs.is_some() {
            Arc::new(Reordered { a, b, a_is_transposed, outputs, inputs })
        } else {
            Arc::new(LowRank { a, b, diagonal: None })
        };
        let kind = if a_is_transposed { LayerKind::Embedding } else { LayerKind::Linear };
        let module = self.module(name.to_owned(), target.module.clone(), kind, rank, delta)?;
        Ok((vec![module], is_ordered))
    }

    fn module(
        &self,
        key: String,
        path: String,
        kind: LayerKind,
        rank: u64,
        delta: Arc<dyn Delta>,
    ) -> Result<Module> {
        if rank == 0 || rank > limits::RANK {
            return Err(self.broken(format!(
                "{key}{FIRST} has rank {rank}; a rank is from 1 to {}",
                limits::RANK
            )));
        }
        let alpha = if self.alpha == 0.0 { rank as f64 } else { self.alpha };
        let scaling = alpha / rank as f64;
        Ok(Module {
            key,
            path,
            parameters: Vec::new(),
            kind,
            delta,
            scale: None,
            magnitude: None,
            bias: None,
            rank,
            alpha,
            scaling,
        })
    }
}

/// The matrix of one expert, of those that a tensor holds one after the other.
fn slice(file: &Arc<TensorFile>, info: &TensorInfo, expert: u64, shape: &[u64; 2]) -> Tensor {
    let bytes = shape[0] * shape[1] * info.dtype.size() as u64;
    let start = info.range.start + expert * bytes;
    let (name, dtype) = (info.name.clone(), info.dtype.clone());
    let range = start..start + bytes;
    Tensor::new(file.clone(), TensorInfo { name, dtype, shape: shape.to_vec(), range })
}

/// What describes the adapter to a person.
fn summary(
    modules: &IndexMap<String, Module>,
    alpha: f64,
    base: Option<&str>,
) -> IndexMap<&'static str, Value> {
    let first = modules.values().next().map(|module| module.rank);
    let rank = first.filter(|rank| modules.values().all(|module| module.rank == *rank));
    let alpha = if alpha == 0.0 { rank.map(|rank| rank as f64) } else { Some(alpha) };
    IndexMap::from([
        ("type", Value::from("LORA")),
        ("base", base.into()),
        ("r", rank.into()),
        ("alpha", alpha.into()),
        ("rslora", Value::Bool(false)),
        ("peft_version", Value::Null),
    ])
}
