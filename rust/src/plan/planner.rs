//! Finds for every part of every adapter the tensor that it changes, and what stands in the way.

use indexmap::IndexMap;

use super::accounts::Waived;
use super::naming::{Named, Naming};
use super::replication;
use super::restoring::GIVE_THE_BASE;
use super::targets::{self, ExpertLayout, Target};
use super::ties::Tie;
use super::{Compat, ConfigChanges, Inputs, Options, Origin, Part, Residual, Update, UpdateKind};
use crate::adapter::{Adapter, Initialization, LayerKind, Module};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::orientation;
use crate::checkpoint::quantized::Catalog;
use crate::error::{Error, Result};
use crate::limits;
use crate::parallel::task::Task;
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;
use crate::tensor::safetensors::TensorInfo;

/// What happens to one tensor of the base.
#[derive(Debug, Clone, Default)]
pub(super) struct TensorChange {
    /// An adapter's tensor that stands in for W₀, where one replaces it outright.
    pub origin: Option<(usize, TensorInfo)>,
    pub updates: Vec<Update>,
}

impl TensorChange {
    /// Whether nothing happens to it.
    pub fn is_empty(&self) -> bool {
        self.origin.is_none() && self.updates.is_empty()
    }
}

/// A tensor that the base does not have.
#[derive(Clone)]
pub(super) struct Addition {
    pub name: String,
    pub origin: Origin,
    /// The shard that it belongs into; the last one, if none is named.
    pub home: Option<usize>,
    pub source: TensorInfo,
    pub output_dtype: Dtype,
    pub updates: Vec<Update>,
}

/// The whole decision.
pub(super) struct Decided {
    pub tensors: IndexMap<String, TensorChange>,
    pub additions: Vec<Addition>,
    pub config_changes: ConfigChanges,
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
    pub waived: Vec<Waived>,
    pub quantized: Catalog,
}

impl Decided {
    /// Nothing happens to any tensor.
    pub fn of_base_alone(base: &Checkpoint) -> Self {
        Self {
            tensors: IndexMap::new(),
            additions: Vec::new(),
            config_changes: ConfigChanges::default(),
            notes: Vec::new(),
            warnings: Vec::new(),
            waived: Vec::new(),
            quantized: Catalog::of(base),
        }
    }
}

/// Collects the changes of every tensor, and the problems.
pub(super) struct Planner<'a> {
    pub(super) inputs: &'a Inputs,
    pub(super) base: &'a Checkpoint,
    pub(super) options: &'a Options,
    pub(super) task: &'a Task,
    pub(super) tensors: IndexMap<String, TensorChange>,
    /// By the tensor's name: the adapters that bring it, in order.
    pub(super) additions: IndexMap<String, Vec<(usize, TensorInfo)>>,
    /// Its size before and after, where an adapter's embeddings change it.
    pub(super) vocabulary: Option<(u64, u64)>,
    /// The head that shares the input embeddings, where an adapter changes either.
    pub(super) tie: Option<Tie>,
    /// The base's quantised weights.
    pub(super) quantized: Catalog,
    /// How many updates of single experts there are.
    updates_of_experts: u64,
    pub(super) problems: Vec<String>,
    /// Why a file could not be read, which is no problem of the plan's but its end.
    pub(super) failure: Option<Error>,
    pub(super) notes: Vec<String>,
    pub(super) warnings: Vec<String>,
    pub(super) waived: Vec<Waived>,
}

impl<'a> Planner<'a> {
    /// # Errors
    /// That a file changed meanwhile, or [`Error::Io`].
    pub fn new(inputs: &'a Inputs, options: &'a Options, task: &'a Task) -> Result<Self> {
        Ok(Self {
            inputs,
            base: &inputs.base,
            options,
            task,
            tensors: IndexMap::new(),
            additions: IndexMap::new(),
            vocabulary: None,
            tie: Tie::of(&inputs.base, inputs)?,
            quantized: Catalog::of(&inputs.base),
            updates_of_experts: 0,
            problems: Vec::new(),
            failure: None,
            notes: Vec::new(),
            warnings: Vec::new(),
            waived: Vec::new(),
        })
    }

    /// Adds everything that one adapter does.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`], and [`crate::Error::Adapter`] for patterns of the config that
    /// take too many steps. What does not fit is among the problems.
    pub fn add(&mut self, position: usize, weight: f64) -> Result<()> {
        let inputs = self.inputs;
        let adapter = &inputs.adapters[position];
        let label = adapter.path().display().to_string();
        let Named { naming, targets, problems, .. } = self.name(adapter)?;
        if let Some(problem) = self.refuse_foreign(targets.values()) {
            self.problems.push(format!("{label}: {problem}"));
            return Ok(());
        }
        self.problems.extend(problems.iter().map(|problem| format!("{label}: {problem}")));
        let complained = !problems.is_empty();
        let notes = naming.describe();
        self.notes.extend(notes.iter().map(|note| format!("{label}: {note}")));
        // Replacements first: what the adapter adds, it adds to its own tensors. Of those, first the
        // modules that were trained apart from what they shared.
        for trained_apart in [true, false] {
            for saved in adapter.saved() {
                self.task.check()?;
                if saved.trained_apart == trained_apart
                    && let Err(problem) = self.replace(position, saved, &naming, weight)
                {
                    self.problems.push(format!("{label}: {problem}"));
                }
            }
        }
        for rows in adapter.trained_rows() {
            self.task.check()?;
            if let Err(problem) = self.replace_rows(position, rows, &naming, weight) {
                self.problems.push(format!("{label}: {problem}"));
            }
        }
        let flag = adapter.semantics().stored_transposed;
        let mut turned_against_flag = 0;
        for (key, target) in &targets {
            self.task.check()?;
            let module = &adapter.modules()[key];
            let found = match self.update_in_pieces(position, (module, target), &naming, weight) {
                Ok(true) => continue,
                Ok(false) => naming.apply(&target.parameter),
                Err(problem) => Err(problem),
            };
            let name = match found {
                // A head that the backbone does not have keeps the name that the whole model gives it.
                Ok(name) => {
                    let name = name.unwrap_or_else(|| target.parameter.clone());
                    self.name_in_tie(&name).unwrap_or(name)
                }
                Err(problem) => {
                    self.problems.push(format!("{label}: {problem}"));
                    continue;
                }
            };
            if self.source(&name).is_none() {
                if !complained {
                    let path = &module.path;
                    self.problems
                        .push(format!("{label}: its module {path} fits no tensor of the base"));
                }
                continue;
            }
            match self.update(position, (module, target), &name, &naming, weight) {
                Ok(transposed) => {
                    let counts = module.kind == LayerKind::Linear
                        && module.parameters.is_empty()
                        && transposed != flag;
                    turned_against_flag += usize::from(counts);
                }
                Err(problem) => self.problems.push(format!("{label}: {problem}")),
            }
        }
        if adapter.semantics().initialization == (Initialization::Largest { randomized: true }) {
            self.warnings.push(format!(
                "{label}: began with singular components that a randomised method came near to \
                 (init_lora_weights), which nobody can repeat; the exact ones are taken out of the \
                 base, and the result differs from what was trained by as much"
            ));
        }
        if turned_against_flag > 0 {
            self.notes.push(format!(
                "{label}: fan_in_fan_out in its config does not fit {turned_against_flag} of the \
                 base's weights; their shapes and architecture decided"
            ));
        }
        Ok(())
    }

    /// The updates of one module; whether its weight is stored turned.
    fn update(
        &mut self,
        position: usize,
        (module, target): (&Module, &Target),
        name: &str,
        naming: &Naming<'_>,
        weight: f64,
    ) -> Result<bool, String> {
        let adapter = &self.inputs.adapters[position];
        let path = &module.path;
        let tensor = self.source(name).expect("the caller found it");
        self.refuse_unreadable(path, name)?;
        refuse_quantized(path, tensor)?;
        // An adapter's own tensor in the base's place may have another shape.
        let replaced = self.tensors.get(name).and_then(|change| change.origin.as_ref());
        let shape = match replaced {
            Some((owner, source)) if *owner == position => source.shape.clone(),
            Some((_, source)) if source.shape != tensor.shape => {
                return Err(format!(
                    "its module {path} updates {name}, of which an earlier adapter changed the \
                     number of tokens; merge the one, and this one into what comes of it"
                ));
            }
            _ => tensor.shape.clone(),
        };
        let (orientation, parts) = match target.layout {
            Some(ExpertLayout::Straight) => (Orientation::OutIn, targets::parts(module, &shape)),
            Some(ExpertLayout::Transposed) => (Orientation::InOut, targets::parts(module, &shape)),
            None => (self.orientation(adapter, module, &shape)?, vec![Part::default()]),
        };
        let transposed = orientation == Orientation::InOut;
        let residual = self.residual(adapter, (module, target), Some(&shape))?;
        let kind = if module.magnitude.is_some() { UpdateKind::Dora } else { UpdateKind::LowRank };
        let update = |kind, rank, transposed, part| Update {
            adapter: position,
            module: module.key.clone(),
            kind,
            rank,
            scale: target.scale * targets::repeats(module),
            weight,
            transposed,
            part,
            on: None,
            residual,
            stage: 0,
        };
        self.refuse_subtracting(path, kind)?;
        if module.bias.is_some() {
            let bias = format!("{path}.bias");
            let name = naming.apply(&bias)?.unwrap_or(bias);
            let bias = self.base.tensor(&name).ok_or_else(|| {
                format!("its module {path} has a bias on lora_B, but the base has no {name}")
            })?;
            refuse_quantized(path, bias)?;
            if bias.shape != [module.outputs()] {
                let outputs = module.outputs();
                return Err(format!(
                    "its module {path} adds {outputs} values to {name}, which has shape {:?}",
                    bias.shape
                ));
            }
            let mut update = update(UpdateKind::Vector, 1, false, Part::default());
            update.residual = None;
            let names = match self.options.compat {
                // PEFT's repeated layers share their biases as well.
                Some(Compat::Peft) => replication::sharing(self.base, &name),
                None => [name].into(),
            };
            for name in names {
                self.tensors.entry(name).or_default().updates.push(update.clone());
            }
        }
        let rank = module.product_rank(target.rank);
        let mut names = self.updated_by(path, name)?;
        if self.options.compat == Some(Compat::Peft) {
            // PEFT's repeated layers share their weights.
            let shared = replication::sharing(self.base, name);
            if shared.len() > 1 && kind == UpdateKind::Dora {
                return Err(format!(
                    "its module {path} is rescaled by DoRA in a layer that PEFT repeats, and what \
                     PEFT makes of that depends on the order of its modules; leave compat out"
                ));
            }
            names.extend(shared.into_iter().filter(|other| other != name));
        }
        if parts.len() > 1 {
            self.updates_of_experts += (parts.len() * names.len()) as u64;
            if self.updates_of_experts > limits::UPDATES_OF_EXPERTS {
                return Err(format!(
                    "its module {path} changes {} experts, and with those before it more than {} \
                     are changed, which is more than a model has",
                    parts.len(),
                    limits::UPDATES_OF_EXPERTS
                ));
            }
        }
        for name in names {
            let parts = parts.iter().cloned();
            let updates = parts.map(|part| update(kind, rank, transposed, part));
            self.tensors.entry(name).or_default().updates.extend(updates);
        }
        Ok(transposed)
    }

    /// What the adapter's initialisation took out of a module's weight, of that shape where it is
    /// one tensor.
    pub(super) fn residual(
        &self,
        adapter: &Adapter,
        (module, target): (&Module, &Target),
        shape: Option<&[u64]>,
    ) -> Result<Option<Residual>, String> {
        let path = &module.path;
        let residual = match adapter.semantics().initialization {
            Initialization::Smallest => Residual::Smallest,
            Initialization::Largest { .. } => Residual::Largest,
            Initialization::Leading => Residual::Leading,
            Initialization::Plain | Initialization::Unknown => return Ok(None),
        };
        let is_linear = module.kind == LayerKind::Linear;
        let is_layer =
            is_linear && target.layout.is_none() && target.parameter.ends_with(".weight");
        if !is_layer || !module.delta.is_low_rank() || targets::repeats(module) != 1.0 {
            return Err(format!(
                "its module {path} is no plain linear layer, and how its initialisation changed \
                 the base is not known (init_lora_weights, kasa_config); convert it in training"
            ));
        }
        if let (Residual::Smallest, Some(shape)) = (residual, shape)
            && shape.iter().any(|extent| target.rank >= *extent)
        {
            return Err(format!(
                "its module {path} of rank {} leaves nothing of a weight of shape {shape:?}, whose \
                 smallest singular components KaSA takes out (kasa_config)",
                target.rank
            ));
        }
        Ok(Some(residual))
    }

    /// What cannot be taken out of a merged model again.
    pub(super) fn refuse_subtracting(&self, path: &str, kind: UpdateKind) -> Result<(), String> {
        if self.options.subtract && kind == UpdateKind::Dora {
            return Err(format!(
                "its module {path} is rescaled by DoRA, and the norms by which its rows were divided \
                 are in neither the merged model nor the adapter; {GIVE_THE_BASE}"
            ));
        }
        Ok(())
    }

    /// Which way a module's product lies on a weight of that shape.
    fn orientation(
        &self,
        adapter: &Adapter,
        module: &Module,
        shape: &[u64],
    ) -> Result<Orientation, String> {
        let path = &module.path;
        let extents @ (outputs, inputs) = (module.outputs(), module.inputs());
        let kernel = module.delta.input_shape();
        match module.kind {
            LayerKind::Linear => {
                let flag = adapter.semantics().stored_transposed;
                orientation::decide(self.base, path, shape, extents, flag)
            }
            // Stored (tokens, width): the product's transpose.
            LayerKind::Embedding if shape == [inputs, outputs] => Ok(Orientation::InOut),
            LayerKind::Embedding => Err(format!(
                "its module {path} updates an embedding of shape [{inputs}, {outputs}], \
                 but the base's is {shape:?}"
            )),
            LayerKind::Convolution
                if shape.first() == Some(&outputs) && shape[1..] == kernel[..] =>
            {
                Ok(Orientation::OutIn)
            }
            LayerKind::Convolution => Err(format!(
                "its module {path} updates a convolution of shape [{outputs}, {}], but the base's is \
                 {shape:?} (a convolution in groups has no LoRA that can be merged)",
                kernel.iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
            )),
        }
    }

    /// What was read, or nothing where it could not be, which ends the plan.
    pub(super) fn read<T>(&mut self, result: Result<T>) -> Option<T> {
        result.map_err(|error| self.failure.get_or_insert(error)).ok()
    }

    /// The decision.
    ///
    /// # Errors
    /// [`Error::Plan`] with every problem, or why a file could not be read.
    pub fn finish(mut self) -> Result<Decided> {
        let mut config_changes = ConfigChanges {
            dtype: self.options.dtype.as_ref().and_then(Dtype::torch_name).map(str::to_owned),
            vocabulary: self.vocabulary.map(|(_, new)| new),
            ..ConfigChanges::default()
        };
        let head = self.resolve_tie(&mut config_changes);
        self.check_vocabulary();
        let mut additions = self.decide_additions();
        additions.extend(head);
        self.settle_rescaling(&mut additions);
        if self.options.subtract {
            self.check_subtraction();
        }
        self.settle_quantized(&mut config_changes);
        if let Some(failure) = self.failure {
            return Err(failure);
        }
        if !self.problems.is_empty() {
            return Err(Error::Plan(self.problems));
        }
        Ok(Decided {
            tensors: self.tensors,
            additions,
            config_changes,
            notes: self.notes,
            warnings: self.warnings,
            waived: self.waived,
            quantized: self.quantized,
        })
    }

    /// The floating-point type that most of the base's bytes have.
    pub(super) fn usual_dtype(&self) -> Dtype {
        let mut bytes = IndexMap::<&Dtype, u64>::new();
        for shard in self.base.shards() {
            for tensor in &shard.file.header().tensors {
                if tensor.dtype.is_mergeable() {
                    *bytes.entry(&tensor.dtype).or_default() += tensor.bytes();
                }
            }
        }
        bytes
            .into_iter()
            .max_by_key(|(_, bytes)| *bytes)
            .map_or(Dtype::F32, |(dtype, _)| dtype.clone())
    }
}

pub(super) fn refuse_quantized(path: &str, tensor: &TensorInfo) -> Result<(), String> {
    if tensor.dtype.is_mergeable() {
        return Ok(());
    }
    Err(format!(
        "its module {path} updates {}, which the base stores as {}: \
         merge into the unquantised base instead",
        tensor.name, tensor.dtype
    ))
}
