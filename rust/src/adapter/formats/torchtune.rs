//! torchtune's adapters in its own names of modules (`layers.0.attn.q_proj.lora_a.weight`), before they
//! are brought to Hugging Face's: one file, with PEFT's config beside it.

mod write;

use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::peft::config::{self, PeftConfig};
use super::peft::{PICKLED_WEIGHTS, WEIGHTS};
use super::recognize;
use crate::adapter::deltas::{Arranged, Factor, LowRank, RowOrder};
use crate::adapter::format::{Format, GivenScale, Place, WriteOptions};
use crate::adapter::{Adapter, Contents, Delta, Directory, Grammar, LayerKind, Module};
use crate::error::{Error, Owner, Result};
use crate::limits;
use crate::parallel::task::Task;
use crate::storage::memory::Bytes;
use crate::tensor::safetensors::{NamedTensor, Tensor, TensorFile};

/// The file of the weights as torchtune saves it.
const PICKLE: &str = "adapter_model.pt";
/// The base's config, which torchtune copies beside what it trained.
const MODEL_CONFIG: &str = "config.json";
const A: &str = ".lora_a.weight";
const B: &str = ".lora_b.weight";
const MAGNITUDE: &str = ".magnitude";
/// The model types whose attention torchtune computes in Meta's order of the rotary embedding, and those
/// whose attention it computes in Hugging Face's.
const INTERLEAVED: [&str; 5] = ["llama", "mistral", "gemma", "gemma2", "mllama_text_model"];
const STRAIGHT: [&str; 4] = ["qwen2", "qwen3", "phi3", "phi4"];

/// torchtune's format.
#[derive(Debug)]
pub struct Torchtune;

impl Format for Torchtune {
    fn name(&self) -> &'static str {
        "torchtune"
    }

    /// By the names of the factors.
    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        let file = match &place.source.pickle {
            Some(pickle) if pickle.path.extension().is_some_and(|ending| ending == "npz") => {
                return Ok(false);
            }
            Some(_) => place.pickled()?,
            None => {
                let weights = self.weights(place);
                if !weights.ends_with(".safetensors") || !place.store.is_file(&weights) {
                    return Ok(false);
                }
                // What cannot be read is no file of this format; whoever reads it says what it is.
                let Ok(file) = place.open(&weights) else { return Ok(false) };
                file
            }
        };
        Ok(file.header().tensors.iter().any(|tensor| tensor.name.ends_with(A)))
    }

    fn weights(&self, place: &Place<'_>) -> String {
        place.file.clone().unwrap_or_else(|| WEIGHTS.to_owned())
    }

    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()> {
        write::write_adapter(adapter, target, options)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let file = match &place.source.pickle {
            Some(_) => place.pickled()?,
            None => place.open(&self.weights(place))?,
        };
        recognize::check_gathered(&file)?;
        let mut read_from = Vec::new();
        let config = if place.has(config::FILE_NAME)? {
            let path = place.store.path(config::FILE_NAME);
            let read = place.store.read_small(config::FILE_NAME);
            let (text, stamp) = read.map_err(|error| error.of(Owner::Adapter))?;
            if place.source.store.is_none() {
                read_from.push((path.clone(), stamp));
            }
            PeftConfig::parse(&path, &text)?
        } else if place.source.scale == GivenScale::Refused {
            return Err(Error::adapter(
                place.path(),
                format!(
                    "holds no {}, which alone tells the scale of an adapter of torchtune's \
                     (lora_alpha and r): put the one that was saved with it beside the weights",
                    config::FILE_NAME
                ),
            ));
        } else {
            PeftConfig::missing(file.path(), place.source.scale)
        };
        let heads = Heads::find(place)?;
        let modules = modules(&file, &config, &heads, place, task)?;
        let is_open = heads == Heads::Unknown && modules.values().any(|one| is_rotated(&one.path));
        let notes = is_open.then(|| {
            "nothing tells how many heads its model has, so that the rows of q_proj and k_proj are in \
             torchtune's order; what depends on their order needs the base"
                .to_owned()
        });
        let weights = match &place.source.pickle {
            Some(pickle) => pickle.path.file_name().map(|name| name.to_string_lossy().into_owned()),
            None => Some(self.weights(place)),
        };
        let own = |name: &String| [WEIGHTS, PICKLED_WEIGHTS, PICKLE].contains(&name.as_str());
        let summary = config::summary(&config, &modules);
        Ok(Adapter::new(Contents {
            path: place.path().to_path_buf(),
            format: self.name(),
            file,
            modules,
            saved: Vec::new(),
            rows: Vec::new(),
            others: Vec::new(),
            notes: notes.into_iter().collect(),
            semantics: config.semantics(),
            grammar: Grammar::Dotted,
            fields: config.uses(),
            summary,
            settings: config.into_raw(),
            read_from,
            directory: weights.filter(|name| place.file.is_none() || own(name)).map(|weights| {
                Directory::new(place.store.clone(), Some(config::FILE_NAME), weights)
            }),
        }))
    }
}

/// The numbers of heads, by which the rows of q_proj and k_proj are put in order.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Heads {
    /// The rows lie as other programs have them.
    Straight,
    /// Of q_proj and of k_proj.
    Interleaved { queries: u64, keys: u64 },
    /// Nothing tells.
    Unknown,
}

impl Heads {
    /// By the config of the base, or the one that torchtune copied beside the weights.
    fn find(place: &Place<'_>) -> Result<Self> {
        if let Some(config) = place.base.and_then(|base| base.config()) {
            let base = place.base.map_or(Path::new(""), |base| base.path());
            return Self::of(config).map_err(|problem| {
                Error::unsupported(
                    place.path(),
                    format!(
                        "is in torchtune's names, and the config of {} {problem}",
                        base.display()
                    ),
                )
            });
        }
        let copied =
            place.store.is_file(MODEL_CONFIG).then(|| place.store.read_small(MODEL_CONFIG));
        let fields = copied
            .and_then(Result::ok)
            .and_then(|(text, _)| serde_json::from_slice::<Map<String, Value>>(&text).ok());
        if let Some(fields) = fields {
            return Self::of(&fields).map_err(|problem| {
                Error::unsupported(
                    place.path(),
                    format!("is in torchtune's names, and the {MODEL_CONFIG} beside it {problem}"),
                )
            });
        }
        Ok(Self::Unknown)
    }

    fn of(config: &Map<String, Value>) -> Result<Self, String> {
        let text = config.get("text_config").and_then(Value::as_object).unwrap_or(config);
        let own = text.get("model_type").or_else(|| config.get("model_type"));
        let kind = own.and_then(Value::as_str).unwrap_or_default();
        if STRAIGHT.contains(&kind) {
            return Ok(Self::Straight);
        }
        if !INTERLEAVED.contains(&kind) {
            return Err(format!(
                "has the model_type {kind:?}, of which it is not known in which order torchtune has \
                 the rows of q_proj and k_proj; save the adapter from torchtune under PEFT's names"
            ));
        }
        let number = |field: &str| text.get(field).and_then(Value::as_u64).filter(|one| *one > 0);
        let queries = number("num_attention_heads").ok_or(
            "does not tell the number of heads (num_attention_heads), by which the rows of q_proj \
             and k_proj are put in order",
        )?;
        Ok(Self::Interleaved { queries, keys: number("num_key_value_heads").unwrap_or(queries) })
    }

    /// The order of the rows of a module.
    ///
    /// # Errors
    /// In words, if its outputs are no heads.
    fn order(self, path: &str, outputs: u64) -> Result<RowOrder, String> {
        let heads = match (self, path.rsplit('.').next()) {
            (Self::Interleaved { queries, .. }, Some("q_proj")) => queries,
            (Self::Interleaved { keys, .. }, Some("k_proj")) => keys,
            _ => return Ok(RowOrder::Straight),
        };
        match outputs.is_multiple_of(heads) && (outputs / heads).is_multiple_of(2) {
            true => Ok(RowOrder::InterleavedHalves { heads }),
            false => Err(format!(
                "has {outputs} outputs in {path}, which are no {heads} heads of two halves each, as \
                 the model's config has them"
            )),
        }
    }
}

fn is_rotated(path: &str) -> bool {
    path.ends_with(".q_proj") || path.ends_with(".k_proj")
}

/// The path of a module in Hugging Face's models; none for what they do not have.
fn hugging_face_path(path: &str) -> Option<String> {
    match path {
        "tok_embeddings" => return Some("model.embed_tokens".to_owned()),
        "output" => return Some("lm_head".to_owned()),
        _ => {}
    }
    let (number, module) = path.strip_prefix("layers.")?.split_once('.')?;
    number.parse::<u64>().ok()?;
    let module = match module {
        "attn.q_proj" => "self_attn.q_proj",
        "attn.k_proj" => "self_attn.k_proj",
        "attn.v_proj" => "self_attn.v_proj",
        "attn.output_proj" => "self_attn.o_proj",
        "mlp.w1" => "mlp.gate_proj",
        "mlp.w2" => "mlp.down_proj",
        "mlp.w3" => "mlp.up_proj",
        _ => return None,
    };
    Some(format!("model.layers.{number}.{module}"))
}

/// The tensors of one module, as they are found.
#[derive(Default)]
struct Parts {
    a: Option<Tensor>,
    b: Option<Tensor>,
    magnitude: Option<Tensor>,
}

fn modules(
    file: &Arc<TensorFile>,
    config: &PeftConfig,
    heads: &Heads,
    place: &Place<'_>,
    task: &Task,
) -> Result<IndexMap<String, Module>> {
    let broken = |message: String| Error::adapter(file.path(), message);
    let mut all = IndexMap::<&str, Parts>::new();
    for info in &file.header().tensors {
        task.check()?;
        let name = info.name.as_str();
        let mut endings = [A, B, MAGNITUDE].into_iter().enumerate();
        let found = endings.find_map(|(part, end)| Some((name.strip_suffix(end)?, part)));
        let Some((module, part)) = found else {
            return Err(broken(format!(
                "holds {name}, which is no part of a LoRA of torchtune's (lora_a, lora_b, magnitude)"
            )));
        };
        if !info.dtype.is_mergeable() {
            return Err(broken(format!(
                "tensor {name} has the type {}; a factor is of a floating-point type",
                info.dtype
            )));
        }
        let parts = all.entry(module).or_default();
        let slots = [&mut parts.a, &mut parts.b, &mut parts.magnitude];
        *slots.into_iter().nth(part).expect("one of three") =
            Some(Tensor::new(file.clone(), info.clone()));
    }
    let mut modules = IndexMap::with_capacity(all.len());
    for (key, Parts { a, b, magnitude }) in all {
        task.check()?;
        let (a, b) = match (a, b) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => return Err(broken(format!("has {} but not its lora_b", a.name))),
            (None, Some(b)) => return Err(broken(format!("has {} but not its lora_a", b.name))),
            (None, None) => {
                return Err(broken(format!("has {key}{MAGNITUDE} but not its factors")));
            }
        };
        let Some(path) = hugging_face_path(key) else {
            return Err(Error::unsupported(
                file.path(),
                format!(
                    "holds factors of {key}, a module of torchtune's whose name in other programs is \
                     not known; save the adapter from torchtune under PEFT's names"
                ),
            ));
        };
        let ([rank, _], [outputs, other]) = (a.shape.as_slice(), b.shape.as_slice()) else {
            return Err(broken(no_pair(&a, &b)));
        };
        let (rank, outputs) = (*rank, *outputs);
        if rank != *other || rank == 0 || rank > limits::RANK {
            return Err(broken(no_pair(&a, &b)));
        }
        if !config.is_missing() {
            let expected = config.rank_of(&path, key)?;
            if rank != expected {
                return Err(broken(format!(
                    "{} has rank {rank} but the config gives this module rank {expected} (r or \
                     rank_pattern); the weights and the config do not belong together",
                    a.name
                )));
            }
        }
        let unknown = heads == &Heads::Unknown && place.source.scale == GivenScale::Refused;
        if unknown && is_rotated(&path) {
            return Err(Error::unsupported(
                place.path(),
                format!(
                    "has the rows of {key} in torchtune's order, which the number of heads tells, and \
                     no config of its model is at hand: give the base, or put the base's \
                     {MODEL_CONFIG} beside the weights"
                ),
            ));
        }
        let order = heads.order(&path, outputs).map_err(broken)?;
        let magnitude = magnitude.map(|magnitude| in_order(magnitude, order)).transpose()?;
        if let Some(magnitude) = magnitude.as_ref().filter(|one| one.elements() != outputs) {
            return Err(broken(format!(
                "{} has shape {:?} but its module has {outputs} outputs",
                magnitude.name, magnitude.shape
            )));
        }
        let kind = if key == "tok_embeddings" { LayerKind::Embedding } else { LayerKind::Linear };
        let alpha = config.alpha_of(&path, key)?;
        let scaling = config.scaling(alpha, rank);
        let delta: Arc<dyn Delta> = match order {
            RowOrder::Straight => Arc::new(LowRank { a, b, diagonal: None }),
            RowOrder::InterleavedHalves { .. } => {
                let factor = |tensor: Tensor| Factor {
                    extents: (tensor.shape[0], tensor.shape[1]),
                    tensor,
                    is_transposed: false,
                    is_shared: false,
                };
                Arc::new(Arranged { order, ..Arranged::pair_of(factor(a), factor(b)) })
            }
        };
        let module = Module {
            key: key.to_owned(),
            path,
            parameters: Vec::new(),
            kind,
            delta,
            scale: None,
            magnitude,
            bias: None,
            rank,
            alpha: scaling * rank as f64,
            scaling,
        };
        modules.insert(key.to_owned(), module);
    }
    Ok(modules)
}

fn no_pair(a: &Tensor, b: &Tensor) -> String {
    format!(
        "{} of shape {:?} and {} of shape {:?} are no pair of factors",
        a.name, a.shape, b.name, b.shape
    )
}

/// A vector with its elements in the order of the outputs.
fn in_order(vector: Tensor, order: RowOrder) -> Result<Tensor> {
    let count = vector.elements();
    if order == RowOrder::Straight || count == 0 {
        return Ok(vector);
    }
    let RowOrder::InterleavedHalves { heads } = order else { return Ok(vector) };
    if !count.is_multiple_of(heads * 2) {
        return Ok(vector);
    }
    let (size, stored) = (vector.dtype.size(), vector.read()?);
    let element = |output: u64| {
        let start = order.stored_row(output, count) as usize * size;
        stored[start..start + size].to_vec()
    };
    let bytes = Some(Bytes::Loaded((0..count).flat_map(element).collect()));
    let info = vector.info();
    let (name, dtype, shape) = (info.name.clone(), info.dtype.clone(), info.shape.clone());
    let tensor = NamedTensor { name: name.clone(), dtype, shape, bytes };
    let file = TensorFile::in_memory(vector.file().path(), Owner::Adapter, vec![tensor], None)?;
    Ok(Arc::new(file).value(&name).expect("the one that it holds"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn modules_have_other_names_elsewhere() {
        for (own, other) in [
            ("layers.3.attn.q_proj", Some("model.layers.3.self_attn.q_proj")),
            ("layers.3.attn.output_proj", Some("model.layers.3.self_attn.o_proj")),
            ("layers.3.mlp.w2", Some("model.layers.3.mlp.down_proj")),
            ("tok_embeddings", Some("model.embed_tokens")),
            ("output", Some("lm_head")),
            ("decoder.layers.3.attn.q_proj", None),
            ("layers.3.attn.qkv", None),
            ("layers.x.attn.q_proj", None),
        ] {
            assert_eq!(hugging_face_path(own).as_deref(), other);
        }
    }

    #[test]
    fn a_config_tells_the_order_of_rows() {
        let of = |text: &str| Heads::of(&serde_json::from_str(text).expect("sound"));
        let llama =
            r#"{"model_type": "llama", "num_attention_heads": 8, "num_key_value_heads": 2}"#;
        assert_eq!(of(llama), Ok(Heads::Interleaved { queries: 8, keys: 2 }));
        let old = r#"{"model_type": "llama", "num_attention_heads": 8}"#;
        assert_eq!(of(old), Ok(Heads::Interleaved { queries: 8, keys: 8 }));
        assert_eq!(of(r#"{"model_type": "qwen2"}"#), Ok(Heads::Straight));
        assert!(of(r#"{"model_type": "bert"}"#).expect_err("unknown").contains("bert"));
        assert!(of(r#"{"model_type": "llama"}"#).expect_err("no heads").contains("num_attention"));
        let heads = Heads::Interleaved { queries: 8, keys: 2 };
        assert!(heads.order("a.q_proj", 20).expect_err("no heads").contains("8 heads"));
        assert_eq!(heads.order("a.v_proj", 20), Ok(RowOrder::Straight));
    }
}
