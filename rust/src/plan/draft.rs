//! The draft of a plan: what the passes have decided so far, in parts of their own types.

use indexmap::IndexMap;

use super::update::Update;
use super::value::{ConfigChanges, Origin, SideFiles};
use crate::error::{Error, Result};
use crate::limits;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;

/// All that is decided so far. The default is a plan in which nothing happens to any tensor.
#[derive(Default)]
pub(super) struct PlanDraft {
    /// What happens to the base's tensors, and to a tied head that it does not hold.
    pub changes: TensorChanges,
    /// What adapters bring that the base does not have.
    pub brought: BroughtTensors,
    /// The number of tokens, where an adapter changes it.
    pub vocabulary: Vocabulary,
    /// Whether an adapter gave the head or the embeddings, which are tied, a tensor of its own.
    pub is_untied: bool,
    /// The updates of single experts.
    pub experts: ExpertUpdates,
    /// What the passes have to say.
    pub messages: Messages,
    /// The adapters' tensors that turned out not to be needed.
    pub ignored: IgnoredTensors,
    /// The tensors of the output that the base does not have.
    pub new_tensors: Vec<NewTensor>,
    /// What has to change in the config.
    pub config_changes: ConfigChanges,
    /// What lies beside the weights.
    pub side_files: SideFiles,
}

/// A tensor of an adapter, by the adapter's position.
#[derive(Debug, Clone)]
pub(super) struct AdapterTensor {
    pub adapter: usize,
    pub info: TensorInfo,
}

/// What happens to one tensor of the base.
#[derive(Debug, Clone, Default)]
pub(super) struct TensorChange {
    /// What stands in for W₀, where an adapter replaces it outright.
    pub origin: Option<AdapterTensor>,
    pub updates: Vec<Update>,
}

impl TensorChange {
    /// Whether nothing happens to it.
    pub fn is_empty(&self) -> bool {
        self.origin.is_none() && self.updates.is_empty()
    }
}

/// The changes of tensors by their names, in the order in which they were first touched.
#[derive(Debug, Default)]
pub(super) struct TensorChanges {
    by_name: IndexMap<String, TensorChange>,
}

impl TensorChanges {
    /// The change of one tensor, where there is one.
    pub fn get(&self, name: &str) -> Option<&TensorChange> {
        self.by_name.get(name)
    }

    /// What stands in for a tensor's W₀, where an adapter replaces it outright.
    pub fn origin(&self, name: &str) -> Option<&AdapterTensor> {
        self.get(name).and_then(|change| change.origin.as_ref())
    }

    /// The change of one tensor, to be added to.
    pub fn entry(&mut self, name: &str) -> &mut TensorChange {
        self.by_name.entry(name.to_owned()).or_default()
    }

    /// Replaces whatever was decided for a tensor.
    pub fn set(&mut self, name: String, change: TensorChange) {
        self.by_name.insert(name, change);
    }

    /// Takes the change of one tensor out.
    pub fn take(&mut self, name: &str) -> Option<TensorChange> {
        self.by_name.swap_remove(name)
    }

    /// All of them.
    pub fn iter(&self) -> impl Iterator<Item = (&String, &TensorChange)> {
        self.by_name.iter()
    }

    /// All of them, to be changed.
    pub fn iter_mut(&mut self) -> impl Iterator<Item = (&String, &mut TensorChange)> {
        self.by_name.iter_mut()
    }
}

/// Tensors that the base does not have, by name: those that adapters bring, in the adapters' order.
#[derive(Debug, Default)]
pub(super) struct BroughtTensors {
    by_name: IndexMap<String, Vec<AdapterTensor>>,
}

impl BroughtTensors {
    pub fn add(&mut self, name: String, tensor: AdapterTensor) {
        self.by_name.entry(name).or_default().push(tensor);
    }

    /// Takes all of them out.
    pub fn take(&mut self) -> impl Iterator<Item = (String, Vec<AdapterTensor>)> + use<> {
        std::mem::take(&mut self.by_name).into_iter()
    }
}

/// A tensor of the output that the base does not have.
#[derive(Debug, Clone)]
pub(super) struct NewTensor {
    pub name: String,
    pub origin: Origin,
    /// The shard that it belongs into; the last one, if none is named.
    pub home: Option<usize>,
    pub source: TensorInfo,
    pub output_dtype: Dtype,
    pub updates: Vec<Update>,
}

/// The number of tokens before and after a merge.
#[derive(Debug, Clone, Copy)]
pub(super) struct VocabularySize {
    pub old: u64,
    pub new: u64,
}

/// The vocabulary's change, if an adapter's embeddings make one.
#[derive(Debug, Default)]
pub(super) struct Vocabulary {
    size: Option<VocabularySize>,
}

impl Vocabulary {
    /// The sizes, where they differ.
    pub fn size(&self) -> Option<VocabularySize> {
        self.size
    }

    /// Sets the number of tokens.
    ///
    /// # Errors
    /// The number that was set before, if it was another one.
    pub fn resize(&mut self, size: VocabularySize) -> Result<(), u64> {
        match self.size.replace(size) {
            Some(before) if before.new != size.new => Err(before.new),
            _ => Ok(()),
        }
    }
}

/// How many updates of single experts there are.
#[derive(Debug, Default)]
pub(super) struct ExpertUpdates {
    count: u64,
}

impl ExpertUpdates {
    /// Counts some more; whether a model can have that many.
    pub fn add(&mut self, count: usize) -> bool {
        self.count += count as u64;
        self.count <= limits::UPDATES_OF_EXPERTS
    }
}

/// What there is to say of a plan, each list in the order in which it was found.
#[derive(Debug, Default)]
pub(super) struct Messages {
    problems: Vec<String>,
    notes: Vec<String>,
    warnings: Vec<String>,
}

impl Messages {
    /// Says why the plan does not work.
    pub fn problem(&mut self, text: String) {
        self.problems.push(text);
    }

    pub fn problems(&self) -> &[String] {
        &self.problems
    }

    /// Says how the adapters were made to fit.
    pub fn note(&mut self, text: String) {
        self.notes.push(text);
    }

    /// The same once, of what several tensors say one after the other.
    pub fn note_once(&mut self, text: String) {
        self.notes.push(text);
        self.notes.dedup();
    }

    /// Says what a careful person would want to know.
    pub fn warn(&mut self, text: String) {
        self.warnings.push(text);
    }

    /// What a step found, or its problem among the others, with the adapter's name before it.
    ///
    /// # Errors
    /// Why a file could not be read, which is no problem of the plan's but its end.
    pub fn keep<T>(
        &mut self,
        label: &str,
        result: Result<T, impl Into<Obstacle>>,
    ) -> Result<Option<T>> {
        match result.map_err(Into::into) {
            Ok(found) => Ok(Some(found)),
            Err(Obstacle::Problem(problem)) => {
                self.problem(format!("{label}: {problem}"));
                Ok(None)
            }
            Err(Obstacle::Failure(failure)) => Err(failure),
        }
    }

    /// The notes and the warnings of a plan that works.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem.
    pub fn finish(self) -> Result<(Vec<String>, Vec<String>)> {
        if !self.problems.is_empty() {
            return Err(Error::Plan(self.problems));
        }
        Ok((self.notes, self.warnings))
    }
}

/// Why something of an adapter cannot be planned.
pub(super) enum Obstacle {
    /// It does not fit, in words.
    Problem(String),
    /// A file could not be read.
    Failure(Error),
}

impl From<String> for Obstacle {
    fn from(problem: String) -> Self {
        Self::Problem(problem)
    }
}

impl From<Error> for Obstacle {
    fn from(failure: Error) -> Self {
        Self::Failure(failure)
    }
}

/// A tensor of an adapter that turned out not to be needed, and why.
#[derive(Debug, Clone)]
pub(super) struct IgnoredTensor {
    pub adapter: usize,
    pub tensor: String,
    pub reason: String,
}

/// The tensors of adapters that are not needed, in the order in which that was found.
#[derive(Debug, Default)]
pub(super) struct IgnoredTensors {
    tensors: Vec<IgnoredTensor>,
}

impl IgnoredTensors {
    pub fn add(&mut self, adapter: usize, tensor: &str, reason: impl Into<String>) {
        let (tensor, reason) = (tensor.to_owned(), reason.into());
        self.tensors.push(IgnoredTensor { adapter, tensor, reason });
    }

    pub fn iter(&self) -> impl Iterator<Item = &IgnoredTensor> {
        self.tensors.iter()
    }
}
