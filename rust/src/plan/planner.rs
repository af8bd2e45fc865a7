//! Finds for every part of every adapter the tensor that it changes, and what stands in the way.

use indexmap::IndexMap;

use super::{ConfigChanges, Inputs, Options, Origin, Strategy, Update, UpdateKind};
use crate::adapter::{Adapter, LayerKind, Module, Saved};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::kernel::Orientation;
use crate::names::{self, Mapping};
use crate::orientation;
use crate::safetensors::TensorInfo;

/// What happens to one tensor of the base.
#[derive(Default)]
pub(super) struct TensorChange {
    /// An adapter's tensor that stands in for W₀, where one replaces it outright.
    pub origin: Option<(usize, TensorInfo)>,
    pub updates: Vec<Update>,
}

/// A tensor that the base does not have.
#[derive(Clone)]
pub(super) struct Addition {
    pub name: String,
    pub origin: Origin,
    pub source: TensorInfo,
    pub output_dtype: Dtype,
}

/// The whole decision.
pub(super) struct Decided {
    pub tensors: IndexMap<String, TensorChange>,
    pub additions: Vec<Addition>,
    pub config_changes: ConfigChanges,
    pub notes: Vec<String>,
    pub warnings: Vec<String>,
}

/// Collects the changes of every tensor, and the problems.
pub(super) struct Planner<'a> {
    inputs: &'a Inputs,
    base: &'a Checkpoint,
    options: &'a Options,
    tensors: IndexMap<String, TensorChange>,
    /// By the tensor's name: the adapters that bring it, in order.
    additions: IndexMap<String, Vec<(usize, TensorInfo)>>,
    /// Its size before and after, where an adapter's embeddings change it.
    vocabulary: Option<(u64, u64)>,
    /// The input embedding that an adapter trained apart from the head it was tied to.
    untied_head: Option<String>,
    problems: Vec<String>,
    notes: Vec<String>,
    warnings: Vec<String>,
}

impl<'a> Planner<'a> {
    pub fn new(inputs: &'a Inputs, options: &'a Options) -> Self {
        Self {
            inputs,
            base: &inputs.base,
            options,
            tensors: IndexMap::new(),
            additions: IndexMap::new(),
            vocabulary: None,
            untied_head: None,
            problems: Vec::new(),
            notes: Vec::new(),
            warnings: Vec::new(),
        }
    }

    /// Adds everything that one adapter does.
    pub fn add(&mut self, position: usize, weight: f64) {
        let inputs = self.inputs;
        let adapter = &inputs.adapters[position];
        let label = adapter.path().display().to_string();
        let mapping = if adapter.modules().is_empty() {
            // Saved parameters need not be in the base; each is asked for below.
            let saved: Vec<_> = adapter.saved().iter().map(|saved| saved.path.clone()).collect();
            names::find_mapping(&saved, self.base).mapping
        } else {
            let weights: Vec<_> =
                adapter.modules().keys().map(|path| format!("{path}.weight")).collect();
            let fit = names::find_mapping(&weights, self.base);
            self.problems.extend(fit.problems.iter().map(|problem| format!("{label}: {problem}")));
            fit.mapping
        };
        if let Some(description) = mapping.describe() {
            self.notes.push(format!("{label}: {description}"));
        }
        // Replacements first: what the adapter adds, it adds to its own tensors.
        for saved in adapter.saved() {
            if let Err(problem) = self.replace(position, saved, &mapping, weight) {
                self.problems.push(format!("{label}: {problem}"));
            }
        }
        let flag = adapter.config().fan_in_fan_out();
        let mut turned_against_flag = 0;
        let fits = |module: &&Module| {
            let name = mapping.apply(&format!("{}.weight", module.path));
            name.is_some_and(|name| inputs.base.tensor(&name).is_some())
        };
        for module in adapter.modules().values().filter(fits) {
            match self.update(position, adapter, module, &mapping, weight) {
                Ok(transposed) => {
                    let counts = module.kind == LayerKind::Linear && transposed != flag;
                    turned_against_flag += usize::from(counts);
                }
                Err(problem) => self.problems.push(format!("{label}: {problem}")),
            }
        }
        if turned_against_flag > 0 {
            self.notes.push(format!(
                "{label}: fan_in_fan_out in its config does not fit {turned_against_flag} of the \
                 base's weights; their shapes and architecture decided"
            ));
        }
    }

    /// The updates of one module; whether its weight is stored turned.
    fn update(
        &mut self,
        position: usize,
        adapter: &Adapter,
        module: &Module,
        mapping: &Mapping,
        weight: f64,
    ) -> Result<bool, String> {
        let path = &module.path;
        let name = mapping.apply(&format!("{path}.weight")).expect("the mapping fits");
        let tensor = self.base.tensor(&name).expect("the mapping fits");
        refuse_quantised(path, tensor)?;
        // An adapter's own tensor in the base's place may have another shape.
        let replaced = self.tensors.get(&name).and_then(|change| change.origin.as_ref());
        let shape = match replaced {
            Some((owner, source)) if *owner == position => source.shape.clone(),
            _ => tensor.shape.clone(),
        };
        let orientation = self.orientation(adapter, module, &shape)?;
        let transposed = orientation == Orientation::InOut;
        let kind = if module.magnitude.is_some() { UpdateKind::Dora } else { UpdateKind::LowRank };
        let update = |kind, rank, transposed| Update {
            adapter: position,
            module: path.clone(),
            kind,
            rank,
            scale: module.scaling,
            weight,
            transposed,
        };
        if module.bias.is_some() {
            let name = mapping.apply(&format!("{path}.bias")).expect("as for the weight");
            let bias = self.base.tensor(&name).ok_or_else(|| {
                format!("its module {path} has a bias on lora_B, but the base has no {name}")
            })?;
            refuse_quantised(path, bias)?;
            if bias.shape != [module.b.shape[0]] {
                let outputs = module.b.shape[0];
                return Err(format!(
                    "its module {path} adds {outputs} values to {name}, which has shape {:?}",
                    bias.shape
                ));
            }
            let update = update(UpdateKind::Vector, 1, false);
            self.tensors.entry(name).or_default().updates.push(update);
        }
        let update = update(kind, module.rank, transposed);
        self.tensors.entry(name).or_default().updates.push(update);
        Ok(transposed)
    }

    /// Which way a module's product lies on a weight of that shape.
    fn orientation(
        &self,
        adapter: &Adapter,
        module: &Module,
        shape: &[u64],
    ) -> Result<Orientation, String> {
        let (a, b, path) = (&module.a.shape, &module.b.shape, &module.path);
        match module.kind {
            LayerKind::Linear => {
                let flag = adapter.config().fan_in_fan_out();
                orientation::decide(self.base, path, shape, (b[0], a[1]), flag)
            }
            // Stored (tokens, width): the product's transpose.
            LayerKind::Embedding if shape == [a[1], b[0]] => Ok(Orientation::InOut),
            LayerKind::Embedding => Err(format!(
                "its module {path} updates an embedding of shape [{}, {}], \
                 but the base's is {shape:?}",
                a[1], b[0]
            )),
            LayerKind::Convolution if shape.first() == b.first() && shape[1..] == a[1..] => {
                Ok(Orientation::OutIn)
            }
            LayerKind::Convolution => Err(format!(
                "its module {path} updates a convolution of shape [{}, {}], but the base's is \
                 {shape:?} (a convolution in groups has no LoRA that can be merged)",
                b[0],
                a[1..].iter().map(u64::to_string).collect::<Vec<_>>().join(", ")
            )),
        }
    }

    /// Puts a saved parameter in the place of the base's, or beside it.
    fn replace(
        &mut self,
        position: usize,
        saved: &Saved,
        mapping: &Mapping,
        weight: f64,
    ) -> Result<(), String> {
        // A head that the backbone does not have keeps the name that the whole model gives it.
        let name = mapping.apply(&saved.path).unwrap_or_else(|| saved.path.clone());
        let Some(tensor) = self.base.tensor(&name) else {
            let adapter = &self.inputs.adapters[position];
            let is_head = name.ends_with(HEAD) && self.base.ties_embeddings();
            if !is_head && !adapter.config().saves_module_of(&saved.path) {
                return Err(format!(
                    "its tensor {} fits nothing in the base and belongs to no module that its \
                     config saves (modules_to_save)",
                    saved.tensor.name
                ));
            }
            self.additions.entry(name).or_default().push((position, saved.tensor.clone()));
            return Ok(());
        };
        if !tensor.dtype.is_mergeable() && tensor.dtype != saved.tensor.dtype {
            return Err(format!(
                "its tensor {} of type {} replaces {name}, which the base stores as {}: \
                 merge into the unquantised base instead",
                saved.tensor.name, saved.tensor.dtype, tensor.dtype
            ));
        }
        let grows = is_of_vocabulary(&name)
            && tensor.shape.len() == saved.tensor.shape.len()
            && tensor.shape[1..] == saved.tensor.shape[1..];
        let same = tensor.shape == saved.tensor.shape;
        let alone =
            self.inputs.adapters.len() == 1 || self.options.strategy == Strategy::Sequential;
        let may_resize = grows && alone;
        if !same && !may_resize {
            return Err(format!(
                "its tensor {} of shape {:?} replaces {name} of shape {:?}",
                saved.tensor.name, saved.tensor.shape, tensor.shape
            ));
        }
        if !same {
            self.resize_vocabulary(tensor.shape[0], saved.tensor.shape[0])?;
        }
        self.untie(position, saved, &name)?;
        let change = self.tensors.entry(name.clone()).or_default();
        if weight == 1.0 && self.options.strategy == Strategy::Sequential {
            // Whatever earlier adapters did to it is gone, as when one is merged after the other.
            if !change.updates.is_empty() || change.origin.is_some() {
                self.warnings.push(format!(
                    "{}: replaces {name}, which an earlier adapter changed; that change is lost",
                    self.inputs.adapters[position].path().display()
                ));
            }
            *change = TensorChange {
                origin: Some((position, saved.tensor.clone())),
                updates: Vec::new(),
            };
        } else {
            change.updates.push(Update {
                adapter: position,
                module: saved.tensor.name.clone(),
                kind: UpdateKind::Replace,
                rank: 0,
                scale: 1.0,
                weight,
                transposed: false,
            });
        }
        Ok(())
    }

    fn resize_vocabulary(&mut self, old: u64, new: u64) -> Result<(), String> {
        match self.vocabulary.replace((old, new)) {
            Some((_, other)) if other != new => {
                Err(format!("its saved tensors have {new} tokens, but others have {other}"))
            }
            _ => {
                self.notes.push(format!("the vocabulary changes from {old} to {new} tokens"));
                self.notes.dedup();
                Ok(())
            }
        }
    }

    /// `modules_to_save` trains a copy of the embeddings and leaves the head that they were tied to
    /// as it was: the head needs a tensor of its own.
    fn untie(&mut self, position: usize, saved: &Saved, name: &str) -> Result<(), String> {
        let adapter = &self.inputs.adapters[position];
        let saves_head = || adapter.saved().iter().any(|saved| saved.path.ends_with(HEAD));
        if !is_input_embedding(name)
            || !adapter.config().saves_module_of(&saved.path)
            || !self.base.is_language_model()
            || !self.base.ties_embeddings()
            || saves_head()
        {
            return Ok(());
        }
        if self.tensors.contains_key(name) {
            return Err(format!(
                "its tensor {} replaces {name} alone, after another adapter changed it together \
                 with the head that it is tied to; merge them one after the other",
                saved.tensor.name
            ));
        }
        self.untied_head = Some(name.to_owned());
        Ok(())
    }

    /// What has to have another number of tokens once the vocabulary has, and was not replaced.
    fn check_vocabulary(&mut self) {
        let Some((old, new)) = self.vocabulary else { return };
        for shard in self.base.shards() {
            for tensor in &shard.file.header().tensors {
                let replaced =
                    || self.tensors.get(&tensor.name).is_some_and(|change| change.origin.is_some());
                if is_of_vocabulary(&tensor.name)
                    && tensor.shape.first() == Some(&old)
                    && !replaced()
                {
                    self.problems.push(format!(
                        "the vocabulary changes from {old} to {new} tokens, but no adapter brings \
                         {} of the new size; its module has to be among modules_to_save in training",
                        tensor.name
                    ));
                }
            }
        }
        if let Some(name) = &self.untied_head {
            self.problems.push(format!(
                "the vocabulary changes from {old} to {new} tokens, but no adapter brings the head \
                 that {name} is no longer tied to"
            ));
        }
    }

    /// The decision, or every problem.
    pub fn finish(mut self) -> Result<Decided, Vec<String>> {
        let mut config_changes = ConfigChanges {
            dtype: self.options.dtype.as_ref().and_then(Dtype::torch_name).map(str::to_owned),
            vocabulary: self.vocabulary.map(|(_, new)| new),
            tied: None,
        };
        self.check_vocabulary();
        let mut additions = self.decide_additions(&mut config_changes);
        if !additions.iter().any(|addition| addition.name.ends_with(HEAD)) {
            additions.extend(self.add_untied_head(&mut config_changes));
        }
        for (name, change) in &self.tensors {
            let replacing = change.updates.iter().any(|update| update.kind == UpdateKind::Replace);
            let rescaling = change.updates.iter().any(|update| update.kind == UpdateKind::Dora);
            if rescaling && (replacing || change.origin.is_some()) {
                self.problems.push(format!(
                    "{name} is replaced and rescaled by DoRA at once, which cannot be merged yet"
                ));
            }
        }
        if !self.problems.is_empty() {
            return Err(self.problems);
        }
        Ok(Decided {
            tensors: self.tensors,
            additions,
            config_changes,
            notes: self.notes,
            warnings: self.warnings,
        })
    }

    fn decide_additions(&mut self, config_changes: &mut ConfigChanges) -> Vec<Addition> {
        let mut additions = Vec::new();
        for (name, mut sources) in std::mem::take(&mut self.additions) {
            if sources.len() > 1 && self.options.strategy != Strategy::Sequential {
                self.problems.push(format!(
                    "{} adapters bring {name}, which the base does not have, so that they cannot \
                     be weighted against it; merge one of them, or use the strategy sequential",
                    sources.len()
                ));
                continue;
            }
            if sources.len() > 1 {
                self.warnings.push(format!(
                    "{} adapters bring {name}, which the base does not have; the last one's is used",
                    sources.len()
                ));
            }
            let Some((adapter, source)) = sources.pop() else { continue };
            if name.ends_with(HEAD) && self.base.ties_embeddings() {
                if self.is_the_embedding(adapter, &source) {
                    self.notes.push(format!(
                        "{name} is the input embedding that it is tied to; it is not written twice"
                    ));
                    continue;
                }
                config_changes.tied = Some(false);
                self.notes.push(format!(
                    "{name} differs from the input embeddings that it was tied to; it is written \
                     out, and tie_word_embeddings becomes false"
                ));
            }
            let path = self.inputs.adapters[adapter].path().display().to_string();
            self.notes.push(format!("{path}: brings {name}, which the base does not have"));
            let output_dtype = if source.dtype.is_mergeable() {
                self.options.dtype.clone().unwrap_or_else(|| self.usual_dtype())
            } else {
                source.dtype.clone()
            };
            additions.push(Addition {
                name,
                origin: Origin::Adapter(adapter),
                source,
                output_dtype,
            });
        }
        additions
    }

    /// The head that stays as the base's embeddings were.
    fn add_untied_head(&mut self, config_changes: &mut ConfigChanges) -> Option<Addition> {
        let embedding = self.untied_head.as_ref()?;
        let (shard, source) =
            self.base.shards().iter().enumerate().find_map(|(position, shard)| {
                Some((position, shard.file.tensor(embedding)?.clone()))
            })?;
        config_changes.tied = Some(false);
        self.notes.push(format!(
            "{embedding} was trained apart from the head that it was tied to; the head is written \
             out as {HEAD}, and tie_word_embeddings becomes false"
        ));
        let output_dtype = self.options.dtype.clone().unwrap_or_else(|| source.dtype.clone());
        Some(Addition { name: HEAD.into(), origin: Origin::Base(shard), source, output_dtype })
    }

    /// Whether an adapter's tensor is byte for byte the embedding that the same adapter saved.
    fn is_the_embedding(&self, adapter: usize, tensor: &TensorInfo) -> bool {
        let adapter = &self.inputs.adapters[adapter];
        let bytes = adapter.file().tensor_bytes(tensor);
        adapter.saved().iter().any(|saved| {
            is_input_embedding(&saved.path) && adapter.file().tensor_bytes(&saved.tensor) == bytes
        })
    }

    /// The floating-point type that most of the base's bytes have.
    fn usual_dtype(&self) -> Dtype {
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

/// The output head of language models that tie it to their embeddings.
const HEAD: &str = "lm_head.weight";
/// The names of input embeddings.
const EMBEDDINGS: [&str; 5] = ["embed_tokens", "wte", "word_embeddings", "embed_in", "shared"];

fn is_input_embedding(parameter: &str) -> bool {
    let mut parts = parameter.rsplit('.');
    parts.next() == Some("weight") && parts.next().is_some_and(|leaf| EMBEDDINGS.contains(&leaf))
}

/// Whether a parameter has a row for each token.
fn is_of_vocabulary(parameter: &str) -> bool {
    let mut parts = parameter.rsplit('.').skip(1);
    let is_head = parts.next().is_some_and(|leaf| ["lm_head", "embed_out"].contains(&leaf));
    is_head || is_input_embedding(parameter)
}

fn refuse_quantised(path: &str, tensor: &TensorInfo) -> Result<(), String> {
    if tensor.dtype.is_mergeable() {
        return Ok(());
    }
    Err(format!(
        "its module {path} updates {}, which the base stores as {}: \
         merge into the unquantised base instead",
        tensor.name, tensor.dtype
    ))
}
