//! From the keys of an adapter's file to the parts that its tensors play.

use indexmap::IndexMap;

use super::{LayerKind, Module, PeftConfig, Role, Saved};
use crate::error::{Error, Result};
use crate::safetensors::{SafetensorsFile, TensorInfo};

/// PEFT's wrapper around the user's model; not part of any module's name.
const PREFIX: &str = "base_model.model.";

/// Every tensor of a file in its place.
pub(super) struct Sorted {
    pub modules: IndexMap<String, Module>,
    pub saved: Vec<Saved>,
    pub others: Vec<(String, Role)>,
}

/// A module's part in a key.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Part {
    A,
    B,
    EmbeddingA,
    EmbeddingB,
    Magnitude,
    Bias,
}

/// The endings of keys that belong to a module. Saved files leave the adapter's name out; files
/// made by hand sometimes keep it.
const ENDINGS: [(&str, Part); 13] = [
    (".lora_A.weight", Part::A),
    (".lora_A.default.weight", Part::A),
    (".lora_B.weight", Part::B),
    (".lora_B.default.weight", Part::B),
    (".lora_embedding_A", Part::EmbeddingA),
    (".lora_embedding_A.default", Part::EmbeddingA),
    (".lora_embedding_B", Part::EmbeddingB),
    (".lora_embedding_B.default", Part::EmbeddingB),
    (".lora_magnitude_vector", Part::Magnitude),
    (".lora_magnitude_vector.weight", Part::Magnitude),
    (".lora_magnitude_vector.default.weight", Part::Magnitude),
    (".lora_B.bias", Part::Bias),
    (".lora_B.default.bias", Part::Bias),
];

/// What a key of the file names.
enum Key {
    Module(String, Part),
    Saved(String),
    Other(Role),
}

fn classify(name: &str) -> Key {
    let path = name.strip_prefix(PREFIX).unwrap_or(name);
    for (ending, part) in ENDINGS {
        if let Some(module) = path.strip_suffix(ending).filter(|module| !module.is_empty()) {
            return Key::Module(module.to_owned(), part);
        }
    }
    if path.contains("trainable_tokens_delta") {
        Key::Other(Role::TokenDelta)
    } else if path.contains(".lora_diag") {
        Key::Other(Role::Diagonal)
    } else if ["lora_velora_embed", "lora_monteclora_sampler", ".original_module."]
        .iter()
        .any(|leftover| path.contains(leftover))
    {
        Key::Other(Role::TrainingOnly)
    } else {
        // PEFT's wrappers within a path; not part of the model's own names.
        let wrappers = ["base_layer", "modules_to_save", "modules_to_save.default"];
        let plain = wrappers
            .iter()
            .fold(path.to_owned(), |path, wrapper| path.replace(&format!(".{wrapper}."), "."));
        Key::Saved(plain)
    }
}

/// The tensors of one module, as they are found.
#[derive(Default)]
struct Parts {
    embedding: bool,
    a: Option<TensorInfo>,
    b: Option<TensorInfo>,
    magnitude: Option<TensorInfo>,
    bias: Option<TensorInfo>,
}

/// Puts every tensor in its place, pairs the factors up and checks each pair against the config.
pub(super) fn sort(file: &SafetensorsFile, config: &PeftConfig) -> Result<Sorted> {
    let mut all = IndexMap::<String, Parts>::new();
    let mut saved = Vec::new();
    let mut others = Vec::new();
    let broken = |message: String| Error::adapter(file.path(), message);
    for tensor in &file.header().tensors {
        let (module, part) = match classify(&tensor.name) {
            Key::Module(module, part) => (module, part),
            Key::Saved(path) => {
                match saved.iter().find(|other: &&Saved| other.path == path) {
                    None => saved.push(Saved { path, tensor: tensor.clone() }),
                    // PEFT writes the biases of saved modules twice under bias = "all".
                    Some(other) if is_repeated(file, &other.tensor, tensor) => {
                        others.push((tensor.name.clone(), Role::Repeated));
                    }
                    Some(other) => {
                        return Err(broken(format!(
                            "tensors {} and {} differ, but both are the parameter {path}",
                            other.tensor.name, tensor.name
                        )));
                    }
                }
                continue;
            }
            Key::Other(role) => {
                others.push((tensor.name.clone(), role));
                continue;
            }
        };
        if !tensor.dtype.is_mergeable() {
            return Err(broken(format!(
                "tensor {} has the type {}; a factor is of a floating-point type",
                tensor.name, tensor.dtype
            )));
        }
        let parts = all.entry(module).or_default();
        parts.embedding |= matches!(part, Part::EmbeddingA | Part::EmbeddingB);
        let slot = match part {
            Part::A | Part::EmbeddingA => &mut parts.a,
            Part::B | Part::EmbeddingB => &mut parts.b,
            Part::Magnitude => &mut parts.magnitude,
            Part::Bias => &mut parts.bias,
        };
        if let Some(other) = slot.replace(tensor.clone()) {
            return Err(broken(format!(
                "tensors {} and {} are the same part of one module",
                other.name, tensor.name
            )));
        }
    }
    let mut modules = IndexMap::with_capacity(all.len());
    for (path, parts) in all {
        let module = assemble(path, parts, config).map_err(broken)?;
        modules.insert(module.path.clone(), module);
    }
    if modules.is_empty() && saved.is_empty() && others.is_empty() {
        return Err(broken("holds no tensors".into()));
    }
    Ok(Sorted { modules, saved, others })
}

fn is_repeated(file: &SafetensorsFile, first: &TensorInfo, second: &TensorInfo) -> bool {
    let alike = first.dtype == second.dtype && first.shape == second.shape;
    alike && file.tensor_bytes(first) == file.tensor_bytes(second)
}

fn assemble(path: String, parts: Parts, config: &PeftConfig) -> Result<Module, String> {
    let Parts { embedding, a, b, magnitude, bias } = parts;
    let (a, b) = match (a, b) {
        (Some(a), Some(b)) => (a, b),
        (Some(a), None) => return Err(format!("has {} but not its lora_B", a.name)),
        (None, Some(b)) => return Err(format!("has {} but not its lora_A", b.name)),
        (None, None) => return Err(format!("has parts of the module {path} but not its factors")),
    };
    if a.shape.len() < 2 || b.shape.len() != a.shape.len() {
        return Err(format!(
            "{} of shape {:?} and {} of shape {:?} are no pair of factors",
            a.name, a.shape, b.name, b.shape
        ));
    }
    let rank = a.shape[0];
    if rank == 0 {
        return Err(format!("{} has rank 0", a.name));
    }
    if b.shape[1] != rank {
        return Err(format!("{} has rank {rank} but {} has rank {}", a.name, b.name, b.shape[1]));
    }
    if b.shape[2..].iter().any(|extent| *extent != 1) {
        return Err(format!("{} has shape {:?}; its kernel must be 1", b.name, b.shape));
    }
    let expected = config.rank_of(&path);
    if expected != rank {
        return Err(format!(
            "{} has rank {rank} but the config gives this module rank {expected} \
             (r or rank_pattern); the weights and the config do not belong together",
            a.name
        ));
    }
    if config.uses_dora() != magnitude.is_some() {
        return Err(match magnitude {
            Some(magnitude) => {
                format!("has the magnitude {} but its config does not set use_dora", magnitude.name)
            }
            None => format!("sets use_dora in its config but has no magnitude for {path}"),
        });
    }
    // Embeddings have no biases, whatever the config says.
    if !embedding && config.has_lora_bias() != bias.is_some() {
        return Err(match bias {
            Some(bias) => format!("has {} but its config does not set lora_bias", bias.name),
            None => format!("sets lora_bias in its config but has no bias of lora_B for {path}"),
        });
    }
    for vector in [&magnitude, &bias].into_iter().flatten() {
        if vector.elements() != b.shape[0] {
            return Err(format!(
                "{} has shape {:?} but its module has {} outputs",
                vector.name, vector.shape, b.shape[0]
            ));
        }
    }
    let kind = match (embedding, a.shape.len()) {
        (true, _) => LayerKind::Embedding,
        (false, 2) => LayerKind::Linear,
        (false, _) => LayerKind::Convolution,
    };
    let alpha = config.alpha_of(&path);
    let scaling = config.scaling(alpha, rank);
    Ok(Module { path, kind, a, b, magnitude, bias, rank, alpha, scaling })
}
