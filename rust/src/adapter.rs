//! An adapter on disk, read into one in-memory form: a config, and for each module the pair of
//! factors with its scale. Everything else in the file is listed with the part it plays, so that
//! whoever uses the adapter can account for every tensor.

pub mod config;
pub mod coverage;
pub mod factors;
mod tensors;

use std::collections::VecDeque;
use std::io::{self, Read};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError};

use indexmap::IndexMap;
use sha2::{Digest, Sha256};

pub use config::PeftConfig;
pub use config::features::{Initialization, Version};
pub use coverage::{Account, Accounts, Verdict};

use crate::error::{Error, Owner, Result};
use crate::parallel::task::Task;
use crate::storage::local::{self, Stamp};
use crate::tensor::safetensors::{SafetensorsFile, TensorInfo, check_path};

pub(crate) const WEIGHTS: &str = "adapter_model.safetensors";
pub(crate) const PICKLED_WEIGHTS: &str = "adapter_model.bin";

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

/// How the two tensors in the file make the product B·A.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Form {
    /// They are A and B.
    Plain,
    /// They hold those of all experts of one parameter (`target_parameters`): A (E·r, in) one
    /// expert after the other, B (out, r·E) with the expert as the fastest index of the columns.
    Experts,
    /// A is block-diagonal; its blocks lie below one another (r, in/n).
    BlocksOfA(u64),
    /// B is block-diagonal; its blocks lie below one another (out, r/n).
    BlocksOfB(u64),
    /// The outputs are equal parts, of which these have factors (PEFT's first MergedLinear): a
    /// convolution in groups, A (n·r, in) and B (outputs of the n parts, r, 1).
    Parts(Vec<bool>),
}

/// One module's low-rank update ΔW = scaling · B · A.
#[derive(Debug, Clone)]
pub struct Module {
    /// The module's name in the file, PEFT's wrappers included: what tells it from all others.
    pub key: String,
    /// The module's path in the model that was trained.
    pub path: String,
    /// The parameters of the module that the factors may belong to, where they belong to a
    /// parameter (`target_parameters`); else it is `weight`.
    pub parameters: Vec<String>,
    /// What layer it is.
    pub kind: LayerKind,
    /// How the factors are stored.
    pub form: Form,
    /// The first factor, (r, in).
    pub a: TensorInfo,
    /// The second factor, (out, r).
    pub b: TensorInfo,
    /// DoRA's magnitude, (out), also as (1, out, 1…) for convolutions.
    pub magnitude: Option<TensorInfo>,
    /// The bias of the second factor, (out), which adds to the layer's own.
    pub bias: Option<TensorInfo>,
    /// KaSA's diagonal between the factors, (r).
    pub diagonal: Option<TensorInfo>,
    /// The rank r of one product: the factors' common extent where they are stored plainly.
    pub rank: u64,
    /// The alpha that the config gives this module.
    pub alpha: f64,
    /// α/r, or α/√r for rsLoRA.
    pub scaling: f64,
}

impl Module {
    /// The number of outputs of the product.
    pub fn outputs(&self) -> u64 {
        let stored = self.b.shape[0];
        match &self.form {
            Form::Parts(parts) => {
                let enabled = parts.iter().filter(|enabled| **enabled).count() as u64;
                stored / enabled * parts.len() as u64
            }
            _ => stored,
        }
    }

    /// The number of inputs, a convolution's kernel included.
    pub fn inputs(&self) -> u64 {
        let stored = self.a.shape[1..].iter().product();
        match self.form {
            Form::BlocksOfA(blocks) => stored * blocks,
            _ => stored,
        }
    }

    /// The common extent of the two factors of one product, of which the file leaves nothing out.
    pub fn product_rank(&self, rank: u64) -> u64 {
        match self.form {
            Form::Parts(_) => self.a.shape[0],
            _ => rank,
        }
    }

    /// Whether the two tensors are B and A as they stand, and their product is all there is.
    pub fn is_plain(&self) -> bool {
        self.form == Form::Plain && self.diagonal.is_none()
    }
}

/// Rows of an embedding that were trained, the others being as in the base.
#[derive(Debug, Clone)]
pub struct TrainedRows {
    /// The module's path in the model that was trained.
    pub path: String,
    /// Which rows of its weight, in the order of the tensor's own.
    pub rows: Vec<u64>,
    /// Their new values, (rows, width).
    pub tensor: TensorInfo,
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
    /// Left over from training; PEFT's merge ignores it as well.
    TrainingOnly,
    /// A parameter that the file holds under another name as well.
    Repeated,
}

impl Role {
    /// What it is, in words for a message.
    pub fn describe(self) -> &'static str {
        match self {
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
    /// Where the config lies, and what it was when it was read.
    config_file: (PathBuf, Stamp),
    file: SafetensorsFile,
    modules: IndexMap<String, Module>,
    saved: Vec<Saved>,
    rows: Vec<TrainedRows>,
    others: Vec<(String, Role)>,
    /// Whole tensors of which each of many products takes a part, the last ones that were asked for.
    shared: Mutex<VecDeque<(String, Arc<Vec<u8>>)>>,
}

/// How many of those are kept: the B of each of an expert's matrices, and one of the next layer's.
const SHARED: usize = 4;

impl Adapter {
    /// Opens PEFT's directory (or a weights file in it). `weights` replaces the directory's own
    /// weights file, for adapters that had to be converted from a pickle first.
    ///
    /// # Errors
    /// [`Error::Io`] if something is not there, [`Error::Adapter`] if it is not sound,
    /// [`Error::Unsupported`] if it is no LoRA.
    pub fn open(path: &Path, weights: Option<&Path>) -> Result<Self> {
        Self::open_with(path, weights, &Task::new())
    }

    /// The same, as a part of a task that can be cancelled.
    ///
    /// # Errors
    /// Those of [`Adapter::open`], and [`Error::Cancelled`].
    pub fn open_with(path: &Path, weights: Option<&Path>, task: &Task) -> Result<Self> {
        task.check()?;
        let failed = |error: Error| error.of(Owner::Adapter);
        let is_directory = match local::find(path).map_err(failed)? {
            Some(metadata) => metadata.is_dir(),
            None => return Err(Error::io(path, absence_of(path))),
        };
        let directory = match path.parent() {
            _ if is_directory => path,
            Some(parent) if !parent.as_os_str().is_empty() => parent,
            _ => Path::new("."),
        };
        let config_path = directory.join(config::FILE_NAME);
        if local::find(&config_path).map_err(failed)?.is_none() {
            return Err(Error::adapter(path, no_config(directory)));
        }
        let (config, stamp) = read_config(&config_path)?;
        let weights = match weights {
            Some(weights) => weights.to_path_buf(),
            None if is_directory => directory.join(WEIGHTS),
            None => path.to_path_buf(),
        };
        if local::find(&weights).map_err(failed)?.is_none() {
            let message =
                if local::find(&directory.join(PICKLED_WEIGHTS)).map_err(failed)?.is_some() {
                    format!("holds its weights as {PICKLED_WEIGHTS}, which needs torch to be read")
                } else {
                    format!("holds a config but no {WEIGHTS}; fetch the adapter again")
                };
            return Err(Error::adapter(path, message));
        }
        let file = SafetensorsFile::open_adapter(&weights)?;
        let sorted = tensors::sort(&file, &config, task).map_err(|error| {
            // Factors that do not pair up are no damage where the config says why.
            match config.obstacles(&[]).as_slice() {
                [] => error,
                _ if matches!(error, Error::Cancelled) => error,
                obstacles => Error::unsupported(path, obstacles.join("; ")),
            }
        })?;
        let tensors::Sorted { modules, saved, rows, others } = sorted;
        let (path, config_file) = (path.to_path_buf(), (config_path, stamp));
        let shared = Mutex::default();
        Ok(Self { path, config, config_file, file, modules, saved, rows, others, shared })
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

    /// The low-rank updates by the name of their module in the file, in the file's order.
    pub fn modules(&self) -> &IndexMap<String, Module> {
        &self.modules
    }

    /// The parameters that were trained whole.
    pub fn saved(&self) -> &[Saved] {
        &self.saved
    }

    /// The embeddings of which some rows were trained.
    pub fn trained_rows(&self) -> &[TrainedRows] {
        &self.rows
    }

    /// The tensors that belong to no module and no parameter, with the part each plays.
    pub fn others(&self) -> &[(String, Role)] {
        &self.others
    }

    /// Everything in the adapter that cannot be merged, in words that name the feature. Config
    /// fields named in `allow` are let pass.
    pub fn obstacles(&self, allow: &[String]) -> Vec<String> {
        self.config.obstacles(allow)
    }

    /// What becomes of every config field and every tensor. Config fields named in `allow` are let
    /// pass.
    pub fn account(&self, allow: &[String]) -> Accounts {
        let mut known = IndexMap::<&str, (Verdict, String)>::new();
        for module in self.modules.values() {
            let path = &module.path;
            let mut used = |tensor: &TensorInfo, what: &str| {
                let name = self.file.tensor(&tensor.name).map_or("", |tensor| &tensor.name);
                known.insert(name, (Verdict::Used, format!("{what} of {path}")));
            };
            used(&module.a, "the first factor");
            used(&module.b, "the second factor");
            let others = [
                (&module.magnitude, "DoRA's magnitude"),
                (&module.bias, "the bias of the second factor"),
                (&module.diagonal, "KaSA's diagonal"),
            ];
            for (tensor, what) in others {
                tensor.iter().for_each(|tensor| used(tensor, what));
            }
        }
        for saved in &self.saved {
            known.insert(&saved.tensor.name, (Verdict::Used, format!("replaces {}", saved.path)));
        }
        for rows in &self.rows {
            let reason = format!("replaces {} rows of {}", rows.rows.len(), rows.path);
            known.insert(&rows.tensor.name, (Verdict::Used, reason));
        }
        for (name, role) in &self.others {
            known.insert(name, (Verdict::NotNeeded, role.describe().to_owned()));
        }
        let tensors = self.file.header().tensors.iter().map(|tensor| {
            let account = known.swap_remove(tensor.name.as_str());
            let unknown = || (Verdict::Refused, "has no known part".to_owned());
            Account::new(tensor.name.as_str(), account.unwrap_or_else(unknown))
        });
        Accounts { tensors: tensors.collect(), fields: self.config.account(allow) }
    }

    /// A factor widened to f32, row-major.
    ///
    /// # Errors
    /// [`Error::Adapter`] if the file changed meanwhile, [`Error::Io`].
    ///
    /// # Panics
    /// If `tensor` is not of a floating-point type, which opening has ruled out for factors.
    pub fn read_f32(&self, tensor: &TensorInfo) -> Result<Vec<f32>> {
        let bytes = self.file.read(tensor)?;
        let mut values = vec![0.0; tensor.elements() as usize];
        crate::kernel::convert::widen(&tensor.dtype, &bytes, &mut values);
        Ok(values)
    }

    /// A factor widened to f64, row-major. The same panic applies.
    ///
    /// # Errors
    /// As [`Adapter::read_f32`].
    pub fn read_f64(&self, tensor: &TensorInfo) -> Result<Vec<f64>> {
        Ok(crate::kernel::convert::widen_f64(&tensor.dtype, &self.file.read(tensor)?))
    }

    /// All bytes of a tensor of which others will ask for as well. Whoever does meanwhile waits.
    ///
    /// # Errors
    /// As [`Adapter::read_f32`].
    pub(crate) fn read_shared(&self, tensor: &TensorInfo) -> Result<Arc<Vec<u8>>> {
        let mut shared = self.shared.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((_, bytes)) = shared.iter().find(|(name, _)| *name == tensor.name) {
            return Ok(bytes.clone());
        }
        let bytes = Arc::new(self.file.read(tensor)?);
        if shared.len() == SHARED {
            shared.pop_front();
        }
        shared.push_back((tensor.name.clone(), bytes.clone()));
        Ok(bytes)
    }

    /// The SHA-256 of the weights file that was opened, in hexadecimal.
    ///
    /// # Errors
    /// [`Error::Adapter`] if it changed meanwhile, [`Error::Io`].
    pub fn sha256(&self) -> Result<String> {
        self.file.sha256()
    }

    /// Looks again at config and weights: an error if either is not what was opened.
    ///
    /// # Errors
    /// [`Error::Adapter`] if one changed, [`Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        let (path, stamp) = &self.config_file;
        check_path(Owner::Adapter, path, *stamp)?;
        self.file.check_unchanged()
    }
}

/// What the system says of a path that is not there.
fn absence_of(path: &Path) -> io::Error {
    std::fs::metadata(path).err().unwrap_or_else(|| io::ErrorKind::NotFound.into())
}

fn read_config(path: &Path) -> Result<(PeftConfig, Stamp)> {
    let (mut file, metadata) = local::open(path).map_err(|error| error.of(Owner::Adapter))?;
    let mut text = Vec::new();
    file.read_to_end(&mut text).map_err(|error| Error::io(path, error))?;
    Ok((PeftConfig::parse(path, &text)?, Stamp::of(&metadata)))
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

/// Bytes in hexadecimal.
pub(crate) fn hexadecimal(bytes: &[u8]) -> String {
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
