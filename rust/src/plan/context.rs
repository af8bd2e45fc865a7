//! The inputs of the planner's passes, which none of them changes.

use super::name_map::NameMap;
use super::options::{Compat, Options, Strategy};
use super::tie::Tie;
use super::update::{Update, UpdateKind};
use super::value::Inputs;
use super::weights::{ModuleWeights, module_of};
use crate::adapter::{Adapter, Module};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::Result;
use crate::parallel::task::Task;
use crate::tensor::safetensors::TensorInfo;

/// What every pass may look at.
pub(super) struct Context<'a> {
    pub inputs: &'a Inputs,
    /// The base, its quantised weights under the names that the model gives them.
    pub base: &'a Checkpoint,
    pub options: &'a Options,
    pub task: &'a Task,
    /// The base's quantised weights.
    pub quantized: &'a QuantizedWeights,
    /// The head that shares the input embeddings, where an adapter changes either.
    pub tie: Option<Tie>,
}

impl<'a> Context<'a> {
    /// # Errors
    /// That a file changed meanwhile, or [`crate::Error::Io`].
    pub fn new(
        inputs: &'a Inputs,
        base: &'a Checkpoint,
        quantized: &'a QuantizedWeights,
        options: &'a Options,
        task: &'a Task,
    ) -> Result<Self> {
        Ok(Self { inputs, base, options, task, quantized, tie: Tie::of(inputs, base)? })
    }

    /// The tensor of that name that the base holds, or the one that stands in for the tied head.
    pub fn source(&self, name: &str) -> Option<&TensorInfo> {
        let tied = || self.tie.as_ref().filter(|tie| name == tie.head).map(|tie| &tie.tensor);
        let meant = self.quantized.get(name).map(|quantized| &quantized.logical);
        meant.or_else(|| self.base.tensor(name)).or_else(tied)
    }

    /// The name under which the tied pair is planned, of a head that the base does not hold.
    pub fn name_in_tie(&self, name: &str) -> Option<String> {
        self.tie.as_ref()?.name_of_missing_head(self.base, name)
    }

    /// Whether PEFT's result is wanted where it is not what was trained.
    pub fn is_for_peft(&self) -> bool {
        self.options.compat == Some(Compat::Peft)
    }

    /// Whether an adapter's parameter of that weight replaces the base's, rather than being weighed
    /// with those of others.
    pub fn replaces_outright(&self, weight: f64) -> bool {
        let is_alone = self.inputs.adapters.len() == 1
            && !matches!(self.options.strategy, Strategy::Entries(_));
        let stands_alone = is_alone || self.options.strategy == Strategy::Sequential;
        weight == 1.0 && stands_alone
    }
}

/// One adapter on its way into the draft.
pub(super) struct AdapterContext<'a> {
    pub plan: &'a Context<'a>,
    /// Its position among the inputs.
    pub position: usize,
    pub adapter: &'a Adapter,
    pub names: &'a NameMap<'a>,
    /// The weights of all adapters under the strategy.
    pub weights: &'a ModuleWeights,
}

impl AdapterContext<'_> {
    /// An update of a whole tensor from one of its modules.
    pub fn update(&self, module: &Module, kind: UpdateKind) -> Update {
        let weight = self.weights.factor(self.position, &module.title());
        Update::new(self.position, &module.key, kind, weight)
    }

    /// A replacement of a whole tensor by one of its own, of a parameter of that path.
    pub fn replacement(&self, tensor: &str, path: &str) -> Update {
        Update::new(self.position, tensor, UpdateKind::Replace, self.weight_of(path))
    }

    /// The weight of a parameter that was trained whole.
    pub fn weight_of(&self, path: &str) -> f64 {
        self.weights.factor(self.position, module_of(path))
    }

    /// What every message on it begins with.
    pub fn label(&self) -> String {
        self.adapter.path().display().to_string()
    }

    /// The base's name for a parameter, of a head that the base does not hold the name in the tied
    /// pair; without one, the name that the whole model gives it.
    ///
    /// # Errors
    /// In words, where the base stores the parameter in slices or as a part of another.
    pub fn tensor_name(&self, parameter: &str) -> Result<String, String> {
        let name = self.names.apply(parameter)?.unwrap_or_else(|| parameter.to_owned());
        Ok(self.plan.name_in_tie(&name).unwrap_or(name))
    }
}
