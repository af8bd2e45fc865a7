//! An adapter on disk, read into one in-memory form: a config, and for each module the pair of
//! factors with its scale. Everything else in the file is listed with the part it plays, so that
//! whoever uses the adapter can account for every tensor.

pub mod config;
mod tensors;

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
    /// DoRA's magnitude, (out), also as (1, out, 1…) for convolutions.
    pub magnitude: Option<TensorInfo>,
    /// The bias of the second factor, (out), which adds to the layer's own.
    pub bias: Option<TensorInfo>,
    /// The rank r, the factors' common extent.
    pub rank: u64,
    /// The alpha that the config gives this module.
    pub alpha: f64,
    /// α/r, or α/√r for rsLoRA.
    pub scaling: f64,
}

/// A parameter that was trained whole: one of a module in `modules_to_save`, a bias, or an
/// embedding that was saved beside its update.
#[derive(Debug, Clone)]
pub struct Saved {
    /// The parameter's path in the model that was trained.
    pub path: String,
    /// Its new value.
    pub tensor: TensorInfo,
}

/// The part that a tensor plays that is neither a module's nor a saved parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Trained token embeddings.
    TokenDelta,
    /// KaSA's diagonal.
    Diagonal,
    /// Left over from training; PEFT's merge ignores it as well.
    TrainingOnly,
    /// A parameter that the file holds under another name as well.
    Repeated,
}

impl Role {
    /// What it is, in words for a message.
    pub fn describe(self) -> &'static str {
        match self {
            Self::TokenDelta => "trained token embeddings",
            Self::Diagonal => "a KaSA diagonal",
            Self::TrainingOnly => "used in training only",
            Self::Repeated => "a parameter that the file holds twice",
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
    saved: Vec<Saved>,
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
        let sorted = tensors::sort(&file, &config).map_err(|error| {
            // Factors that do not pair up are no damage where the config says why.
            match config.obstacles(&[]).as_slice() {
                [] => error,
                obstacles => Error::unsupported(path, obstacles.join("; ")),
            }
        })?;
        let tensors::Sorted { modules, saved, others } = sorted;
        Ok(Self { path: path.to_path_buf(), config, file, modules, saved, others })
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

    /// The parameters that were trained whole.
    pub fn saved(&self) -> &[Saved] {
        &self.saved
    }

    /// The tensors that belong to no module and no parameter, with the part each plays.
    pub fn others(&self) -> &[(String, Role)] {
        &self.others
    }

    /// Everything in the adapter that cannot be merged, in words that name the feature. Config fields named in `allow` are let pass.
    pub fn obstacles(&self, allow: &[String]) -> Vec<String> {
        let mut obstacles = self.config.obstacles(allow);
        let mut roles = IndexMap::<&str, (usize, &str)>::new();
        for (name, role) in &self.others {
            if !matches!(role, Role::TrainingOnly | Role::Repeated) {
                roles.entry(role.describe()).or_insert((0, name)).0 += 1;
            }
        }
        obstacles.extend(roles.iter().map(|(role, (count, first))| match count {
            1 => format!("the tensor {first} is {role}, which cannot be merged yet"),
            _ => format!(
                "{count} tensors (the first: {first}) are each {role}, which cannot be merged yet"
            ),
        }));
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

#[cfg(test)]
mod tests;
