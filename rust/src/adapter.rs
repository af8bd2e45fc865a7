//! An adapter on disk, read into one in-memory form: a config, and for each module the pair of
//! factors with its scale. Everything else in the file is listed with the part it plays, so that
//! whoever uses the adapter can account for every tensor.

pub mod config;

use std::io::Read;
use std::path::{Path, PathBuf};

use indexmap::IndexMap;
use sha2::{Digest, Sha256};

pub use config::PeftConfig;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::safetensors::{SafetensorsFile, TensorInfo};

const WEIGHTS: &str = "adapter_model.safetensors";
const PICKLED_WEIGHTS: &str = "adapter_model.bin";
/// PEFT's wrapper around the user's model; not part of any module's name.
const PREFIX: &str = "base_model.model.";

/// What kind of layer a pair of factors belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// `lora_A` (r, in), `lora_B` (out, r): a linear layer, GPT-2's Conv1D included.
    Linear,
    /// `lora_embedding_A` (r, n), `lora_embedding_B` (d, r).
    Embedding,
    /// `lora_A` (r, in, k…), `lora_B` (out, r, 1…).
    Convolution,
}

impl LayerKind {
    /// The word for it in messages and listings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Embedding => "embedding",
            Self::Convolution => "convolution",
        }
    }
}

/// One module's low-rank update ΔW = scaling · B · A.
#[derive(Debug, Clone)]
pub struct Module {
    /// The module's path in the model that was trained.
    pub path: String,
    /// What layer it is.
    pub kind: LayerKind,
    /// The first factor, (r, in).
    pub a: TensorInfo,
    /// The second factor, (out, r).
    pub b: TensorInfo,
    /// The rank r, the factors' common extent.
    pub rank: u64,
    /// The alpha that the config gives this module.
    pub alpha: f64,
    /// α/r, or α/√r for rsLoRA.
    pub scaling: f64,
}

/// The part that a tensor beside the factors plays.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// DoRA's magnitude.
    Magnitude,
    /// The bias of `lora_B`.
    LoraBias,
    /// Trained token embeddings.
    TokenDelta,
    /// KaSA's diagonal.
    Diagonal,
    /// A trained bias, or a whole saved parameter (`modules_to_save`, resized embeddings).
    Saved,
    /// Left over from training; PEFT's merge ignores it as well.
    TrainingOnly,
}

impl Role {
    /// What it is, in words for a message.
    pub fn describe(self) -> &'static str {
        match self {
            Self::Magnitude => "a DoRA magnitude",
            Self::LoraBias => "a bias of lora_B",
            Self::TokenDelta => "trained token embeddings",
            Self::Diagonal => "a KaSA diagonal",
            Self::Saved => "a saved parameter (modules_to_save, bias, or embeddings)",
            Self::TrainingOnly => "used in training only",
        }
    }
}

/// An opened adapter.
#[derive(Debug)]
pub struct Adapter {
    path: PathBuf,
    config: PeftConfig,
    file: SafetensorsFile,
    modules: IndexMap<String, Module>,
    others: Vec<(String, Role)>,
}

impl Adapter {
    /// Opens PEFT's directory (or a weights file in it). `weights` replaces the directory's own
    /// weights file, for adapters that had to be converted from a pickle first.
    ///
    /// # Errors
    /// [`Error::Io`] if something is not there, [`Error::Adapter`] if it is not sound,
    /// [`Error::Unsupported`] if it is no LoRA.
    pub fn open(path: &Path, weights: Option<&Path>) -> Result<Self> {
        let metadata = std::fs::metadata(path).map_err(|error| Error::io(path, error))?;
        let directory = match path.parent() {
            _ if metadata.is_dir() => path,
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let config_path = directory.join(config::FILE_NAME);
        if !config_path.is_file() {
            return Err(Error::adapter(path, no_config(directory)));
        }
        let config = PeftConfig::read(&config_path)?;
        let weights = match weights {
            Some(weights) => weights.to_path_buf(),
            None if metadata.is_dir() => directory.join(WEIGHTS),
            None => path.to_path_buf(),
        };
        if !weights.is_file() {
            let message = if directory.join(PICKLED_WEIGHTS).is_file() {
                format!("holds its weights as {PICKLED_WEIGHTS}, which needs torch to be read")
            } else {
                format!("holds a config but no {WEIGHTS}; fetch the adapter again")
            };
            return Err(Error::adapter(path, message));
        }
        let file = SafetensorsFile::open(&weights).map_err(|error| match error {
            Error::Checkpoint { path, message } => Error::Adapter { path, message },
            other => other,
        })?;
        let (modules, others) = sort_tensors(&file, &config).map_err(|error| {
            // Factors that do not pair up are no damage where the config says why.
            match config.obstacles(&[]).as_slice() {
                [] => error,
                obstacles => Error::unsupported(path, obstacles.join("; ")),
            }
        })?;
        Ok(Self { path: path.to_path_buf(), config, file, modules, others })
    }

    /// The path that was opened.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// The config.
    pub fn config(&self) -> &PeftConfig {
        &self.config
    }

    /// The weights file.
    pub fn file(&self) -> &SafetensorsFile {
        &self.file
    }

    /// The low-rank updates by the path of their module, in the order of the file.
    pub fn modules(&self) -> &IndexMap<String, Module> {
        &self.modules
    }

    /// The tensors that are no factors, with the part each plays.
    pub fn others(&self) -> &[(String, Role)] {
        &self.others
    }

    /// Everything in the adapter that a merge of plain products on linear layers would get wrong,
    /// in words that name the feature. Config fields named in `allow` are let pass.
    pub fn obstacles(&self, allow: &[String]) -> Vec<String> {
        let mut obstacles = self.config.obstacles(allow);
        let mut roles = IndexMap::<&str, (usize, &str)>::new();
        for (name, role) in &self.others {
            if *role != Role::TrainingOnly {
                roles.entry(role.describe()).or_insert((0, name)).0 += 1;
            }
        }
        obstacles.extend(roles.iter().map(|(role, (count, first))| match count {
            1 => format!("the tensor {first} is {role}, which cannot be merged yet"),
            _ => format!(
                "{count} tensors (the first: {first}) are each {role}, which cannot be merged yet"
            ),
        }));
        for kind in [LayerKind::Embedding, LayerKind::Convolution] {
            let mut modules = self.modules.values().filter(|module| module.kind == kind);
            if let Some(first) = modules.next() {
                obstacles.push(format!(
                    "{} modules (the first: {}) are a LoRA on an {} layer, \
                     which cannot be merged yet",
                    modules.count() + 1,
                    first.path,
                    kind.name()
                ));
            }
        }
        obstacles
    }

    /// A factor widened to f32, row-major.
    ///
    /// # Panics
    /// If `tensor` is not of a floating-point type, which opening has ruled out for factors.
    pub fn read_f32(&self, tensor: &TensorInfo) -> Vec<f32> {
        let bytes = self.file.tensor_bytes(tensor);
        let mut values = vec![0.0; tensor.elements() as usize];
        crate::kernel::convert::widen(&tensor.dtype, bytes, &mut values);
        values
    }

    /// A factor widened to f64, row-major. The same panic applies.
    pub fn read_f64(&self, tensor: &TensorInfo) -> Vec<f64> {
        match tensor.dtype {
            Dtype::F64 => self
                .file
                .tensor_bytes(tensor)
                .chunks_exact(8)
                .map(|chunk| f64::from_le_bytes(chunk.try_into().expect("eight bytes")))
                .collect(),
            _ => self.read_f32(tensor).into_iter().map(f64::from).collect(),
        }
    }

    /// The SHA-256 of the weights file, in hexadecimal.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be read.
    pub fn sha256(&self) -> Result<String> {
        sha256_of(self.file.path())
    }
}

/// The SHA-256 of a file, in hexadecimal.
///
/// # Errors
/// [`Error::Io`] if it cannot be read.
pub fn sha256_of(path: &Path) -> Result<String> {
    let failed = |error| Error::io(path, error);
    let mut file = std::fs::File::open(path).map_err(failed)?;
    let mut hasher = Sha256::new();
    let mut buffer = vec![0; 1 << 18];
    loop {
        match file.read(&mut buffer).map_err(failed)? {
            0 => break,
            length => hasher.update(&buffer[..length]),
        }
    }
    Ok(hasher.finalize().iter().map(|byte| format!("{byte:02x}")).collect())
}

/// The SHA-256 of some bytes, in hexadecimal.
pub fn sha256_of_bytes(bytes: &[u8]) -> String {
    hexadecimal(&Sha256::digest(bytes))
}

fn hexadecimal(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

fn no_config(directory: &Path) -> String {
    let nested = std::fs::read_dir(directory).ok().and_then(|entries| {
        entries
            .flatten()
            .map(|entry| entry.path())
            .find(|path| path.join(config::FILE_NAME).is_file())
    });
    let file = config::FILE_NAME;
    match nested {
        Some(path) => format!(
            "holds no {file}, but its folder {} does; give that folder",
            path.file_name().unwrap_or_default().display()
        ),
        None if directory.join("config.json").is_file() => {
            format!("holds no {file}; it looks like a whole model, not an adapter")
        }
        None => format!("holds no {file}; it is no PEFT adapter"),
    }
}

/// What a key of the adapter's file names.
enum Key<'a> {
    Factor { module: &'a str, first: bool, embedding: bool },
    Other(Role),
}

fn classify(name: &str) -> Key<'_> {
    let path = name.strip_prefix(PREFIX).unwrap_or(name);
    // Saved files leave the adapter's name out; files made by hand sometimes keep it.
    let factor = |marker: &str, tails: &[&str]| {
        let (module, tail) = path.rsplit_once(marker)?;
        (tails.contains(&tail) && !module.is_empty()).then_some(module)
    };
    let weight: &[&str] = &[".weight", ".default.weight"];
    let parameter: &[&str] = &["", ".default"];
    if let Some(module) = factor(".lora_A", weight) {
        return Key::Factor { module, first: true, embedding: false };
    }
    if let Some(module) = factor(".lora_B", weight) {
        return Key::Factor { module, first: false, embedding: false };
    }
    if let Some(module) = factor(".lora_embedding_A", parameter) {
        return Key::Factor { module, first: true, embedding: true };
    }
    if let Some(module) = factor(".lora_embedding_B", parameter) {
        return Key::Factor { module, first: false, embedding: true };
    }
    Key::Other(if path.contains(".lora_magnitude_vector") {
        Role::Magnitude
    } else if path.contains(".lora_B.") && path.ends_with(".bias") || path.ends_with(".lora_B.bias")
    {
        Role::LoraBias
    } else if path.contains("trainable_tokens_delta") {
        Role::TokenDelta
    } else if path.contains(".lora_diag") {
        Role::Diagonal
    } else if path.contains("lora_velora_embed") || path.contains("lora_monteclora_sampler") {
        Role::TrainingOnly
    } else {
        Role::Saved
    })
}

type Sorted = (IndexMap<String, Module>, Vec<(String, Role)>);

/// Pairs the factors up and checks each pair against the config.
fn sort_tensors(file: &SafetensorsFile, config: &PeftConfig) -> Result<Sorted> {
    #[derive(Default)]
    struct Pair {
        embedding: bool,
        a: Option<TensorInfo>,
        b: Option<TensorInfo>,
    }
    let mut pairs = IndexMap::<String, Pair>::new();
    let mut others = Vec::new();
    let broken = |message: String| Error::adapter(file.path(), message);
    for tensor in &file.header().tensors {
        match classify(&tensor.name) {
            Key::Other(role) => others.push((tensor.name.clone(), role)),
            Key::Factor { module, first, embedding } => {
                if !tensor.dtype.is_mergeable() {
                    return Err(broken(format!(
                        "tensor {} has the type {}; a factor is of a floating-point type",
                        tensor.name, tensor.dtype
                    )));
                }
                let pair = pairs.entry(module.to_owned()).or_default();
                pair.embedding = embedding;
                let slot = if first { &mut pair.a } else { &mut pair.b };
                if let Some(other) = slot.replace(tensor.clone()) {
                    return Err(broken(format!(
                        "tensors {} and {} are the same factor of one module",
                        other.name, tensor.name
                    )));
                }
            }
        }
    }
    let mut modules = IndexMap::with_capacity(pairs.len());
    for (path, pair) in pairs {
        let (a, b) = match (pair.a, pair.b) {
            (Some(a), Some(b)) => (a, b),
            (Some(a), None) => return Err(broken(format!("has {} but not its lora_B", a.name))),
            (None, Some(b)) => return Err(broken(format!("has {} but not its lora_A", b.name))),
            (None, None) => continue,
        };
        let module = pair_up(path, pair.embedding, a, b, config).map_err(broken)?;
        modules.insert(module.path.clone(), module);
    }
    if modules.is_empty() && others.is_empty() {
        return Err(broken("holds no tensors".into()));
    }
    Ok((modules, others))
}

fn pair_up(
    path: String,
    embedding: bool,
    a: TensorInfo,
    b: TensorInfo,
    config: &PeftConfig,
) -> Result<Module, String> {
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
    let expected = config.rank_of(&path);
    if expected != rank {
        return Err(format!(
            "{} has rank {rank} but the config gives this module rank {expected} \
             (r or rank_pattern); the weights and the config do not belong together",
            a.name
        ));
    }
    let kind = match (embedding, a.shape.len()) {
        (true, _) => LayerKind::Embedding,
        (false, 2) => LayerKind::Linear,
        (false, _) => LayerKind::Convolution,
    };
    let alpha = config.alpha_of(&path);
    let scaling = config.scaling(alpha, rank);
    Ok(Module { path, kind, a, b, rank, alpha, scaling })
}
