//! MLX's adapters: a directory with `adapters.safetensors` (before, `adapters.npz`) and the settings of
//! the training as `adapter_config.json`. Factors are stored transposed, experts' one after the other.

mod config;
mod write;

use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use config::{MlxConfig, Trained};

use super::peft;
use super::recognize;
use crate::adapter::deltas::{Arranged, Factor, SharedReads};
use crate::adapter::expert_factors::{self, Stack};
use crate::adapter::format::{Format, GivenScale, Place, WriteOptions};
use crate::adapter::{
    Adapter, Contents, Delta, Directory, Grammar, LayerKind, Module, Saved, Semantics,
    TransposedExperts,
};
use crate::error::{Error, Owner, Result};
use crate::limits;
use crate::parallel::task::Task;
use crate::tensor::safetensors::{Tensor, TensorFile};

/// The file of the weights.
const WEIGHTS: &str = "adapters.safetensors";
/// The same of the first releases.
const ARCHIVED_WEIGHTS: &str = "adapters.npz";
/// How the states are called that are saved beside it in training, behind a number.
const NUMBERED: &str = "_adapters.safetensors";
/// The container of the experts in mlx-lm's models, whose place is that of other programs' experts.
const CONTAINERS: [&str; 2] = ["switch_mlp", "switch_glu"];
const EXPERTS: &str = "experts";
/// The names of models' input embeddings, whose factors do not tell them from a layer's.
const EMBEDDINGS: [&str; 8] = [
    "embed_tokens",
    "wte",
    "word_embeddings",
    "tok_embeddings",
    "embed_in",
    "embeddings",
    "embedding",
    "embed",
];

/// MLX's format.
#[derive(Debug)]
pub struct Mlx;

impl Format for Mlx {
    fn name(&self) -> &'static str {
        "mlx"
    }

    /// By the config, or by the names of the factors.
    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        if let Some(pickle) = &place.source.pickle {
            return Ok(pickle.path.extension().is_some_and(|ending| ending == "npz"));
        }
        match &place.file {
            Some(file) if file == peft::WEIGHTS => Ok(false),
            Some(file) if file.ends_with(".safetensors") => {
                Ok(names_factors(place, file) || is_weights(file) && has_config(place))
            }
            Some(_) => Ok(false),
            None if place.has(peft::WEIGHTS)? => Ok(false),
            None => {
                let has_weights = place.has(WEIGHTS)?;
                Ok(has_weights && names_factors(place, WEIGHTS) || has_config(place))
            }
        }
    }

    fn weights(&self, place: &Place<'_>) -> String {
        place.file.clone().unwrap_or_else(|| WEIGHTS.to_owned())
    }

    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()> {
        write::write_adapter(adapter, target, options)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let file = self.open(place)?;
        recognize::check_gathered(&file)?;
        let mut read_from = Vec::new();
        let config = if place.has(peft::config::FILE_NAME)? {
            let path = place.store.path(peft::config::FILE_NAME);
            let read = place.store.read_small(peft::config::FILE_NAME);
            let (text, stamp) = read.map_err(|error| error.of(Owner::Adapter))?;
            if place.source.store.is_none() {
                read_from.push((path.clone(), stamp));
            }
            MlxConfig::parse(&path, &text)?
        } else if place.source.scale == GivenScale::Refused {
            return Err(Error::adapter(
                place.path(),
                format!(
                    "holds no {}, which alone tells the scale of an adapter of MLX's \
                     (lora_parameters.scale): put the one that was saved with it beside the weights",
                    peft::config::FILE_NAME
                ),
            ));
        } else {
            MlxConfig::missing(place.source.scale)
        };
        let (mut modules, saved) = sort(&file, &config, task)?;
        let is_of_gpt_oss = || config.base().is_some_and(|base| is_of_gpt_oss(&base));
        if expert_factors::has_rows_in_turn(place.base).unwrap_or_else(is_of_gpt_oss) {
            modules = expert_factors::interleave(modules).map_err(|problem| {
                Error::adapter(place.path(), format!("is of gpt-oss: {problem}"))
            })?;
        }
        let summary = summary(&config, &modules);
        let semantics = Semantics {
            scale_is_given: config.given.is_some(),
            names_scale: true,
            // A head that shares the embeddings is trained with them.
            ties_weights: true,
            transposed_experts: Some(TransposedExperts::IfStoredTransposed),
            base: config.base(),
            ..Semantics::default()
        };
        let weights = match &place.source.pickle {
            Some(pickle) => pickle.path.file_name().map(|name| name.to_string_lossy().into_owned()),
            None => Some(self.weights(place)),
        };
        // A state of the training lies beside the adapter that it became.
        let is_whole = |name: &str| [WEIGHTS, ARCHIVED_WEIGHTS].contains(&name);
        let is_own = place.file.is_none() || weights.as_deref().is_some_and(is_whole);
        Ok(Adapter::new(Contents {
            path: place.path().to_path_buf(),
            format: self.name(),
            file,
            modules,
            saved,
            rows: Vec::new(),
            others: Vec::new(),
            notes: config.note.clone().into_iter().collect(),
            semantics,
            grammar: Grammar::Dotted,
            fields: config.fields(),
            settings: config.raw,
            summary,
            read_from,
            directory: weights.filter(|_| is_own).map(|weights| {
                Directory::new(place.store.clone(), Some(peft::config::FILE_NAME), weights)
            }),
        }))
    }
}

impl Mlx {
    fn open(&self, place: &Place<'_>) -> Result<Arc<TensorFile>> {
        if place.source.pickle.is_some() {
            return place.pickled();
        }
        let weights = self.weights(place);
        if !place.has(&weights)? {
            let message = match place.has(ARCHIVED_WEIGHTS)? {
                true => format!("holds its weights as {ARCHIVED_WEIGHTS}, which NumPy reads"),
                false => format!(
                    "holds a config of MLX's but no {WEIGHTS}; fetch the adapter again, or give the \
                     file of its weights"
                ),
            };
            return Err(Error::adapter(place.path(), message));
        }
        place.open(&weights)
    }
}

/// Whether a name is one that MLX gives the weights of an adapter.
fn is_weights(name: &str) -> bool {
    let number = name.strip_suffix(NUMBERED);
    [WEIGHTS, ARCHIVED_WEIGHTS].contains(&name)
        || number.is_some_and(|number| number.bytes().all(|digit| digit.is_ascii_digit()))
}

/// Whether a safetensors file has factors under MLX's names.
fn names_factors(place: &Place<'_>, name: &str) -> bool {
    // What cannot be read is no file of this format; whoever reads it says what it is.
    place.open(name).is_ok_and(|file| {
        let mut names = file.header().tensors.iter().map(|tensor| tensor.name.as_str());
        names.any(|name| name.ends_with(".lora_a") && !name.ends_with(".weight.lora_a"))
    })
}

fn has_config(place: &Place<'_>) -> bool {
    if !place.store.is_file(peft::config::FILE_NAME) {
        return false;
    }
    let text = place.store.read_small(peft::config::FILE_NAME);
    let fields = text.ok().and_then(|(text, _)| serde_json::from_slice(&text).ok());
    fields.is_some_and(|fields: Map<String, Value>| config::is_of_mlx(&fields))
}

/// Whether a base is a gpt-oss by its name, which has the rows of gates and of upward matrices in turn in
/// one weight where MLX has them apart.
fn is_of_gpt_oss(base: &str) -> bool {
    let name = base.to_lowercase();
    name.contains("gpt-oss") || name.contains("gpt_oss")
}

/// The tensors of one module, as they are found.
#[derive(Default)]
struct Parts {
    a: Option<Tensor>,
    b: Option<Tensor>,
    magnitude: Option<Tensor>,
}

/// A key's module, and which part of it: A, B or the magnitude. mlx-vlm calls the factors by one letter.
fn split(key: &str) -> Option<(&str, usize)> {
    let endings = [".lora_a", ".lora_b", ".m", ".A", ".B"];
    let mut endings = endings.iter().enumerate();
    endings.find_map(|(part, end)| Some((key.strip_suffix(end)?, part % 3)))
}

/// Every tensor in its place.
fn sort(
    file: &Arc<TensorFile>,
    config: &MlxConfig,
    task: &Task,
) -> Result<(IndexMap<String, Module>, Vec<Saved>)> {
    let broken = |message: String| Error::adapter(file.path(), message);
    let mut all = IndexMap::<&str, Parts>::new();
    let mut saved = Vec::new();
    if file.header().tensors.is_empty() {
        return Err(broken("holds no tensors".into()));
    }
    for info in &file.header().tensors {
        task.check()?;
        let tensor = Tensor::new(file.clone(), info.clone());
        if config.trained == Some(Trained::Full) {
            let path = hugging_face_path(&info.name);
            saved.push(Saved { path, tensor, trained_apart: false });
            continue;
        }
        let Some((module, part)) = split(&info.name) else {
            return Err(broken(format!(
                "holds {}, which is no part of a LoRA of MLX's (lora_a, lora_b, m){}",
                info.name,
                match config.trained {
                    Some(_) => ", and its config does not set fine_tune_type to full",
                    None => "",
                }
            )));
        };
        if !info.dtype.is_mergeable() {
            return Err(broken(format!(
                "tensor {} has the type {}; a factor is of a floating-point type",
                info.name, info.dtype
            )));
        }
        let parts = all.entry(module).or_default();
        let slot = [&mut parts.a, &mut parts.b, &mut parts.magnitude];
        if let Some(other) = slot.into_iter().nth(part).expect("one of three").replace(tensor) {
            return Err(broken(format!(
                "tensors {} and {} are the same part of one module; keep the one that was meant",
                other.name, info.name
            )));
        }
    }
    let shared = Arc::new(SharedReads::default());
    let mut modules = IndexMap::with_capacity(all.len());
    let mut names = IndexMap::new();
    for (key, parts) in all {
        task.check()?;
        let module = parts.module(key, config, &shared).map_err(broken)?;
        let own = module.only_parameter().map(|parameter| parameter.name.clone());
        if let Some(other) = names.insert((module.path.clone(), own), key) {
            return Err(broken(format!(
                "has both {other} and {key}, which are one module; keep the one that was meant"
            )));
        }
        modules.insert(key.to_owned(), module);
    }
    Ok((modules, saved))
}

/// The path that other programs give a module or a parameter of mlx-lm's.
fn hugging_face_path(path: &str) -> String {
    let mut parts: Vec<&str> = Vec::new();
    for part in path.split('.') {
        match (CONTAINERS.contains(&part), parts.last()) {
            (true, Some(&EXPERTS)) => {}
            (true, _) => parts.push(EXPERTS),
            (false, _) => parts.push(part),
        }
    }
    parts.join(".")
}

impl Parts {
    /// The module that they make, or in words why they make none.
    fn module(
        self,
        key: &str,
        config: &MlxConfig,
        shared: &Arc<SharedReads>,
    ) -> Result<Module, String> {
        let magnitude = self.magnitude;
        let (a, b) = match (self.a, self.b) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => return Err(format!("has {} but not its lora_b", a.name)),
            (None, Some(b)) => return Err(format!("has {} but not its lora_a", b.name)),
            (None, None) => {
                return Err(format!("has the magnitude of {key} (m) but not its factors"));
            }
        };
        let is_dora = config.trained == Some(Trained::Dora);
        let path = hugging_face_path(key);
        if b.shape.len() == 3 {
            let found = Stack::of(&a.shape, &b.shape, Some(b.shape[2]));
            let stack = found.ok_or_else(|| no_pair(&a, &b))?;
            if let Some(magnitude) = magnitude {
                return Err(format!(
                    "has {} beside the factors of {} experts, to which no magnitude belongs",
                    magnitude.name, stack.count
                ));
            }
            check_rank(&a, stack.rank, config)?;
            let delta = stack.delta(a, b, shared)?;
            let scaling = config.scaling(stack.rank);
            return Ok(expert_factors::module(key.to_owned(), &path, delta, stack.rank, scaling));
        }
        let ([inputs, rank], [other, outputs]) = (a.shape.as_slice(), b.shape.as_slice()) else {
            return Err(no_pair(&a, &b));
        };
        let (inputs, rank, outputs) = (*inputs, *rank, *outputs);
        if rank != *other {
            return Err(no_pair(&a, &b));
        }
        check_rank(&a, rank, config)?;
        match (&magnitude, is_dora) {
            (Some(magnitude), false) if config.trained.is_some() => {
                return Err(format!(
                    "has the magnitude {} but its config does not set fine_tune_type to dora",
                    magnitude.name
                ));
            }
            (None, true) => {
                return Err(format!(
                    "sets fine_tune_type to dora in its config but has no magnitude for {key} (m)"
                ));
            }
            _ => {}
        }
        let is_named = path.rsplit('.').next().is_some_and(|last| EMBEDDINGS.contains(&last));
        let length = magnitude.as_ref().map(|magnitude| magnitude.elements());
        let is_embedding = match length {
            // A magnitude for each token, or for each output.
            Some(length) if length == inputs && inputs != outputs => true,
            Some(length) if length == outputs && inputs != outputs => false,
            _ => is_named,
        };
        if let Some(magnitude) = &magnitude
            && length != Some(if is_embedding { inputs } else { outputs })
        {
            return Err(format!(
                "{} has shape {:?}, but its module has {outputs} outputs and {inputs} inputs",
                magnitude.name, magnitude.shape
            ));
        }
        let delta: Arc<dyn Delta> = if is_embedding && magnitude.is_some() {
            // Its magnitudes are those of the tokens, whose rows are the outputs then.
            let factor = |tensor: Tensor| Factor {
                extents: (tensor.shape[0], tensor.shape[1]),
                tensor,
                is_transposed: false,
                is_shared: false,
            };
            Arc::new(Arranged { is_by_tokens: true, ..Arranged::pair_of(factor(b), factor(a)) })
        } else {
            Arc::new(Arranged::transposed(a, b))
        };
        let scaling = config.scaling(rank);
        Ok(Module {
            key: key.to_owned(),
            path,
            parameters: Vec::new(),
            kind: if is_embedding { LayerKind::Embedding } else { LayerKind::Linear },
            delta,
            scale: None,
            magnitude,
            bias: None,
            rank,
            alpha: scaling * rank as f64,
            scaling,
        })
    }
}

fn no_pair(a: &Tensor, b: &Tensor) -> String {
    format!(
        "{} of shape {:?} and {} of shape {:?} are no pair of factors as MLX stores them ([in, rank] \
         and [rank, out]; of experts [experts, rank, in] and [experts, out, rank])",
        a.name, a.shape, b.name, b.shape
    )
}

fn check_rank(a: &Tensor, rank: u64, config: &MlxConfig) -> Result<(), String> {
    match config.rank {
        Some(expected) if rank != expected => Err(format!(
            "{} has rank {rank} but its config gives every module rank {expected} \
             (lora_parameters.rank); the weights and the config do not belong together",
            a.name
        )),
        None if rank == 0 || rank > limits::RANK => {
            Err(format!("{} has rank {rank}; a rank is from 1 to {}", a.name, limits::RANK))
        }
        _ => Ok(()),
    }
}

/// What describes the adapter to a person.
fn summary(
    config: &MlxConfig,
    modules: &IndexMap<String, Module>,
) -> IndexMap<&'static str, Value> {
    let kind = match config.trained {
        Some(Trained::Dora) => "DORA",
        Some(Trained::Full) => "FULL",
        _ if modules.values().any(|module| module.magnitude.is_some()) => "DORA",
        _ => "LORA",
    };
    let first = modules.values().next().map(|module| module.rank);
    let rank = first.filter(|rank| modules.values().all(|module| module.rank == *rank));
    let alpha = rank.map(|rank| config.scaling(rank) * rank as f64);
    IndexMap::from([
        ("type", Value::from(kind)),
        ("base", config.base().map_or(Value::Null, Value::from)),
        ("r", rank.map_or(Value::Null, Value::from)),
        ("alpha", alpha.filter(|alpha| alpha.is_finite()).map_or(Value::Null, Value::from)),
        ("rslora", Value::Bool(false)),
        ("peft_version", Value::Null),
    ])
}

#[cfg(test)]
mod tests;
