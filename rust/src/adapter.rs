//! An adapter as a value: modules with what each adds, parameters that were trained whole, rows of
//! embeddings, and what all of them mean. It knows no format and no path of a file: tensors read
//! themselves, wherever their bytes are.

pub mod about;
pub mod alignment;
pub mod computed;
pub mod coverage;
pub mod delta;
pub mod deltas;
pub mod directory;
pub mod expert_factors;
pub mod factors;
pub mod foreign;
pub mod format;
pub mod formats;
pub mod grammar;
pub mod matrix;
pub mod semantics;
pub mod zero;

use std::borrow::Cow;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::{Map, Value};

pub use coverage::{Coverage, PartUse, Usage};
pub use delta::{Delta, Expert, Formula, Transform};
pub use directory::Directory;
pub use semantics::{Initialization, Semantics, TransposedExperts};

use crate::error::{Owner, Result};
use crate::storage::digest::sha256_of_bytes;
use crate::storage::local::Stamp;
use crate::tensor::safetensors::{Tensor, TensorFile, check_path};
use factors::Pair;

/// What kind of layer a module is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum LayerKind {
    /// A linear layer, GPT-2's Conv1D included.
    Linear,
    /// An embedding: the product is the transpose of its weight.
    Embedding,
    /// A convolution: the inputs of the product are those of its kernel.
    Convolution,
    /// A norm, or another layer whose weight is a vector: a product with one column.
    Norm,
    /// The bias of a layer, a vector as well.
    Bias,
}

impl LayerKind {
    /// The word for it in messages and listings.
    pub fn name(self) -> &'static str {
        match self {
            Self::Linear => "linear",
            Self::Embedding => "embedding",
            Self::Convolution => "convolution",
            Self::Norm => "norm",
            Self::Bias => "bias",
        }
    }
}

/// A parameter that a module's factors may belong to, with the rank and the scale that they have
/// then.
#[derive(Debug, Clone)]
pub struct Parameter {
    /// Its name in its module.
    pub name: String,
    /// The rank r of one product.
    pub rank: u64,
    /// The factor s of s·B·A.
    pub scaling: f64,
}

/// One module's update ΔW = scaling · B · A.
#[derive(Debug, Clone)]
pub struct Module {
    /// The module's name in the adapter, wrappers included: what tells it from all others.
    pub key: String,
    /// The module's path in the model that was trained.
    pub path: String,
    /// The parameters of the module that the factors may belong to, where they belong to a
    /// parameter (`target_parameters`); else it is `weight`.
    pub parameters: Vec<Parameter>,
    /// What layer it is.
    pub kind: LayerKind,
    /// What it adds.
    pub delta: Arc<dyn Delta>,
    /// The tensor that tells the scale, where one does.
    pub scale: Option<Tensor>,
    /// DoRA's magnitude, (out), also as (1, out, 1…) for convolutions.
    pub magnitude: Option<Tensor>,
    /// The bias of the second factor, (out), which adds to the layer's own.
    pub bias: Option<Tensor>,
    /// The rank r of one product.
    pub rank: u64,
    /// The alpha that belongs to the scale.
    pub alpha: f64,
    /// The factor s of s·B·A.
    pub scaling: f64,
}

impl Module {
    /// The name of its parameter in the layer, where it has no other.
    pub fn leaf(&self) -> &'static str {
        if self.kind == LayerKind::Bias { "bias" } else { "weight" }
    }

    /// What it is called beside others: its path, and of a bias that it is one.
    pub fn title(&self) -> Cow<'_, str> {
        match self.kind {
            LayerKind::Bias => Cow::Owned(format!("{}.bias", self.path)),
            _ => Cow::Borrowed(&self.path),
        }
    }

    /// DoRA's magnitudes, of the outputs or of the inputs.
    pub fn magnitudes(&self) -> Option<&Tensor> {
        self.magnitude.as_ref().or_else(|| self.delta.magnitude())
    }

    /// The number of outputs of the product.
    pub fn outputs(&self) -> u64 {
        self.delta.outputs()
    }

    /// The number of inputs, a convolution's kernel included.
    pub fn inputs(&self) -> u64 {
        self.delta.input_shape().iter().product()
    }

    /// The common extent of the two factors of one product, where that has this rank by what the
    /// adapter says: blocks of several products count together.
    pub fn product_rank(&self, rank: u64) -> u64 {
        if self.delta.holds_experts() { rank } else { self.delta.rank() }
    }

    /// The parameter that its factors belong to, where they can belong to one alone.
    pub fn only_parameter(&self) -> Option<&Parameter> {
        match self.parameters.as_slice() {
            [only] => Some(only),
            _ => None,
        }
    }

    /// How often its product is added. PEFT adds that of the output projection of a
    /// MultiheadAttention twice, in training as in merging.
    pub fn repeats(&self) -> f64 {
        if self.key.ends_with(".base_layer.out_proj") { 2.0 } else { 1.0 }
    }

    /// The products that it holds: one, or one for each expert; none where only the base makes one.
    pub fn products(&self) -> impl Iterator<Item = Option<Expert>> {
        let experts = self.delta.holds_experts();
        let count = match (experts, self.delta.has_product()) {
            (true, _) => self.delta.rank() / self.rank,
            (false, has_product) => u64::from(has_product),
        };
        (0..count).map(move |index| experts.then_some(Expert { index, count }))
    }

    /// The two factors of one of its products, or of a part of it: some outputs, some inputs. They
    /// do not hold the scale.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
    pub fn pair(
        &self,
        expert: Option<Expert>,
        outputs: Option<&Range<u64>>,
        inputs: Option<&Range<u64>>,
    ) -> Result<Pair> {
        let pair = self.delta.pair(expert, outputs)?;
        Ok(match inputs {
            Some(inputs) => pair.inputs(inputs.start as usize..inputs.end as usize),
            None => pair,
        })
    }

    /// The tensors that its product is made from, with the part that each plays, in words.
    pub fn product_tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = self.delta.tensors();
        tensors.extend(self.scale.iter().map(|tensor| ("the scale", tensor)));
        tensors
    }

    /// Every tensor that it is made from, with the part that each plays, in words.
    pub fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        let mut tensors = self.product_tensors();
        let magnitude = self.magnitude.iter().map(|tensor| ("DoRA's magnitude", tensor));
        let bias = self.bias.iter().map(|tensor| ("the bias of the second factor", tensor));
        tensors.extend(magnitude.chain(bias));
        tensors
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
    pub tensor: Tensor,
}

/// A parameter that was trained whole: one of a module in `modules_to_save`, a bias, or an
/// embedding that was saved beside its update.
#[derive(Debug, Clone)]
pub struct Saved {
    /// The parameter's path in the model that was trained.
    pub path: String,
    /// Its new value.
    pub tensor: Tensor,
    /// Whether its module was trained as a copy of its own (`modules_to_save`).
    pub trained_apart: bool,
}

/// The part that a tensor plays that is neither a module's nor a saved parameter.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Role {
    /// Left over from training; PEFT's merge ignores it as well.
    TrainingOnly,
    /// A parameter that the file holds under another name as well.
    Repeated,
    /// An alpha that counts for nothing.
    Unused,
    /// A vector of a textual inversion.
    Embedding,
    /// What the program that the file was made for leaves out as well.
    Ignored,
    /// A matrix that the model does not have, of no elements.
    Empty,
}

impl Role {
    /// What it is, in words for a message.
    pub fn describe(self) -> &'static str {
        match self {
            Self::TrainingOnly => "used in training only",
            Self::Repeated => "a parameter that the file holds twice",
            Self::Unused => "an alpha that counts for nothing in its module",
            Self::Embedding => "an embedding of a textual inversion, which no model's tensor takes",
            Self::Ignored => "ignored by the program that the file was made for",
            Self::Empty => "of no elements, for a matrix that the model does not have",
        }
    }
}

/// How an adapter's modules are named.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Grammar {
    /// As parameters are, with dots.
    #[default]
    Dotted,
    /// With underscores in the place of the dots, so that the base has to tell where they were.
    Flattened,
}

/// What an adapter holds, as a format reads it.
#[derive(Debug, Clone)]
pub struct Contents {
    /// What messages call it: the path that was opened.
    pub path: PathBuf,
    /// The name of the format.
    pub format: &'static str,
    /// Every tensor, also those that play no part.
    pub file: Arc<TensorFile>,
    /// The updates by their keys.
    pub modules: IndexMap<String, Module>,
    /// The parameters that were trained whole.
    pub saved: Vec<Saved>,
    /// The embeddings of which some rows were trained.
    pub rows: Vec<TrainedRows>,
    /// The tensors that belong to no module and no parameter, with the part each plays.
    pub others: Vec<(String, Role)>,
    /// What was made of its names that a user would want to know.
    pub notes: Vec<String>,
    /// What the factors mean.
    pub semantics: Semantics,
    /// How modules are named.
    pub grammar: Grammar,
    /// What becomes of each field of its settings.
    pub fields: Vec<PartUse>,
    /// The settings as they stand in the adapter's own files.
    pub settings: Map<String, Value>,
    /// What describes it to a person, for listings.
    pub summary: IndexMap<&'static str, Value>,
    /// The files that it was read from beside the tensors', and what each was then.
    pub read_from: Vec<(PathBuf, Stamp)>,
    /// The directory that is the adapter's, where it is more than one file.
    pub directory: Option<Directory>,
}

/// A read adapter.
#[derive(Debug, Clone)]
pub struct Adapter {
    contents: Contents,
}

impl Adapter {
    /// The adapter that holds this.
    pub fn new(contents: Contents) -> Self {
        Self { contents }
    }

    /// The path that was opened: what messages call it.
    pub fn path(&self) -> &Path {
        &self.contents.path
    }

    /// The name of the format that it was read from.
    pub fn format(&self) -> &'static str {
        self.contents.format
    }

    /// What holds its tensors: a file, or memory.
    pub fn file(&self) -> &Arc<TensorFile> {
        &self.contents.file
    }

    /// The tensor of that name.
    pub fn tensor(&self, name: &str) -> Option<Tensor> {
        self.contents.file.value(name)
    }

    /// The updates by the name of their module, in the order of the tensors.
    pub fn modules(&self) -> &IndexMap<String, Module> {
        &self.contents.modules
    }

    /// The parameters that were trained whole.
    pub fn saved(&self) -> &[Saved] {
        &self.contents.saved
    }

    /// The embeddings of which some rows were trained.
    pub fn trained_rows(&self) -> &[TrainedRows] {
        &self.contents.rows
    }

    /// The tensors that belong to no module and no parameter, with the part each plays.
    pub fn others(&self) -> &[(String, Role)] {
        &self.contents.others
    }

    /// What was made of its names that a user would want to know.
    pub fn notes(&self) -> &[String] {
        &self.contents.notes
    }

    /// What its factors mean.
    pub fn semantics(&self) -> &Semantics {
        &self.contents.semantics
    }

    /// The directory that is the adapter's, where it is more than one file.
    pub fn directory(&self) -> Option<&Directory> {
        self.contents.directory.as_ref()
    }

    /// How its modules are named.
    pub fn grammar(&self) -> Grammar {
        self.contents.grammar
    }

    /// Its settings as they stand in its own files.
    pub fn settings(&self) -> &Map<String, Value> {
        &self.contents.settings
    }

    /// What describes it to a person, for listings.
    pub fn summary(&self) -> &IndexMap<&'static str, Value> {
        &self.contents.summary
    }

    /// The same adapter as a value of its own, which is no longer what its file and its settings hold.
    #[must_use]
    pub fn rewritten(mut self) -> Self {
        self.contents.format = "";
        self
    }

    /// The same adapter with its modules and parameters under other names.
    pub fn renamed(
        &self,
        modules: IndexMap<String, Module>,
        saved: Vec<Saved>,
        rows: Vec<TrainedRows>,
        grammar: Grammar,
    ) -> Self {
        let renamed = self.read_as(self.format(), modules, grammar, self.semantics().clone());
        Self::new(Contents { saved, rows, ..renamed.contents })
    }

    /// An adapter that was computed from this one, with these modules: its settings, and what was said of
    /// its own tensors, are not the other's.
    pub fn made_into(&self, modules: IndexMap<String, Module>, semantics: Semantics) -> Self {
        let made = self.read_as(self.format(), modules, self.grammar(), semantics);
        Self::new(Contents {
            others: Vec::new(),
            notes: Vec::new(),
            fields: Vec::new(),
            settings: Map::new(),
            summary: IndexMap::new(),
            directory: None,
            ..made.contents
        })
    }

    /// The same adapter as one of another format, with its modules as that has them.
    pub fn read_as(
        &self,
        format: &'static str,
        modules: IndexMap<String, Module>,
        grammar: Grammar,
        semantics: Semantics,
    ) -> Self {
        let contents = &self.contents;
        Self::new(Contents {
            path: contents.path.clone(),
            format,
            file: contents.file.clone(),
            modules,
            saved: contents.saved.clone(),
            rows: contents.rows.clone(),
            others: contents.others.clone(),
            notes: contents.notes.clone(),
            semantics,
            grammar,
            fields: contents.fields.clone(),
            settings: contents.settings.clone(),
            summary: contents.summary.clone(),
            read_from: contents.read_from.clone(),
            directory: contents.directory.clone(),
        })
    }

    /// What becomes of every settings field, every tensor, and every file of weights in its directory.
    /// Fields and files named in `allow` are let pass.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if the directory cannot be listed.
    pub fn coverage(&self, allow: &[String]) -> Result<Coverage> {
        let mut known = IndexMap::<&str, (Usage, String)>::new();
        for module in self.modules().values() {
            for (what, tensor) in module.tensors() {
                known.insert(&tensor.name, (Usage::Used, format!("{what} of {}", module.title())));
            }
        }
        for saved in self.saved() {
            known.insert(&saved.tensor.name, (Usage::Used, format!("replaces {}", saved.path)));
        }
        for rows in self.trained_rows() {
            let reason = format!("replaces {} rows of {}", rows.rows.len(), rows.path);
            known.insert(&rows.tensor.name, (Usage::Used, reason));
        }
        for (name, role) in self.others() {
            known.insert(name, (Usage::NotNeeded, role.describe().to_owned()));
        }
        let tensors = self.file().header().tensors.iter().map(|tensor| {
            let usage = known.swap_remove(tensor.name.as_str());
            let unknown = || (Usage::Refused, "has no known part".to_owned());
            PartUse::new(tensor.name.as_str(), usage.unwrap_or_else(unknown))
        });
        let (tensors, fields) = (tensors.collect(), self.fields(allow));
        Ok(Coverage { fields, tensors, files: self.files(allow)? })
    }

    /// What becomes of every file of weights in its directory. Those named in `allow` are let pass.
    fn files(&self, allow: &[String]) -> Result<Vec<PartUse>> {
        let files = self.directory().map_or(Ok(Vec::new()), Directory::weights);
        Ok(coverage::allowed(&files.map_err(directory::of_adapter)?, allow))
    }

    /// What becomes of every settings field. Fields named in `allow` are let pass.
    fn fields(&self, allow: &[String]) -> Vec<PartUse> {
        coverage::allowed(&self.contents.fields, allow)
    }

    /// Everything in the adapter's settings that cannot be merged, in words that name the feature.
    /// Fields named in `allow` are let pass.
    pub fn obstacles(&self, allow: &[String]) -> Vec<String> {
        coverage::refused(&self.fields(allow))
    }

    /// The files of weights in its directory that a merge would leave out, each in words that say so.
    /// Those named in `allow` are let pass.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if the directory cannot be listed.
    pub fn files_left_out(&self, allow: &[String]) -> Result<Vec<String>> {
        Ok(coverage::refused(&self.files(allow)?))
    }

    /// The SHA-256 of what its tensors were read from, in hexadecimal.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if it changed meanwhile, [`crate::Error::Io`].
    pub fn sha256(&self) -> Result<String> {
        self.file().sha256()
    }

    /// A digest of all that its updates are made from: its tensors' content and its settings.
    ///
    /// # Errors
    /// As [`Adapter::sha256`].
    pub fn identity(&self) -> Result<String> {
        let settings = serde_json::to_string(self.settings()).expect("plain data");
        Ok(sha256_of_bytes(format!("{} {settings}", self.sha256()?).as_bytes()))
    }

    /// Whether it lies in the file system of this machine, or in memory.
    pub fn is_local(&self) -> bool {
        self.file().source().is_local()
    }

    /// The paths that it was read from.
    pub fn paths(&self) -> impl Iterator<Item = &Path> {
        let others = self.contents.read_from.iter().map(|(path, _)| path.as_path());
        others.chain([self.file().path()])
    }

    /// Looks again at all that it was read from: an error if any is not what was opened.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if one changed, [`crate::Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        if self.is_local() {
            for (path, stamp) in &self.contents.read_from {
                check_path(Owner::Adapter, path, *stamp)?;
            }
        }
        self.file().check_unchanged()
    }
}

#[cfg(test)]
mod tests;
