//! An output head that shares the input embeddings' tensor.
//!
//! A tied pair is one tensor on disk and two modules in memory, which an adapter can change each on
//! its own: LoRA and `modules_to_save` leave the other module as it was. So the pair is planned as
//! two tensors that begin alike, the head's standing in for one that the base may not hold. If both
//! end alike, they stay tied and the head is not written; if not, it is written out.
//!
//! PEFT's own merge adds every update to the one shared tensor, also where the model that was
//! trained did not (`compat = "peft"`).

use super::planner::{Addition, Planner, TensorChange};
use super::{Compat, ConfigChanges, Inputs, Origin, Update, UpdateKind};
use crate::adapter::factors::Pair;
use crate::adapter::{Adapter, LayerKind};
use crate::checkpoint::Checkpoint;
use crate::error::Result;
use crate::kernel::convert::widen_f64;
use crate::tensor::safetensors::{TensorInfo, same_bytes};

/// The usual name of the output head.
const HEAD: &str = "lm_head.weight";
/// The names of modules that are output heads with a row for each token.
const HEADS: [&str; 2] = ["lm_head", "embed_out"];
/// The names of input embeddings.
const EMBEDDINGS: [&str; 5] = ["embed_tokens", "wte", "word_embeddings", "embed_in", "shared"];

/// The last part of a weight's module.
fn leaf(parameter: &str) -> Option<&str> {
    parameter.strip_suffix(".weight")?.rsplit('.').next()
}

fn is_input_embedding(parameter: &str) -> bool {
    leaf(parameter).is_some_and(|leaf| EMBEDDINGS.contains(&leaf))
}

fn is_head(parameter: &str) -> bool {
    leaf(parameter).is_some_and(|leaf| HEADS.contains(&leaf))
}

/// Whether a parameter has a row for each token.
pub(super) fn is_of_vocabulary(parameter: &str) -> bool {
    is_head(parameter) || is_input_embedding(parameter)
}

/// The tied pair of a base.
#[derive(Debug, Clone)]
pub(super) struct Tie {
    embedding: String,
    head: String,
    /// The embeddings' shard and tensor, which are the head's as well.
    shard: usize,
    tensor: TensorInfo,
    /// Whether the base holds the head's copy too.
    stored: bool,
    /// Whether the model has a head at all, whatever the config says of tying it.
    has_head: bool,
    /// Whether more than two modules share the tensor.
    shared_widely: bool,
    /// Whether an adapter before gave one of the two a tensor of its own.
    parted: bool,
}

impl Tie {
    /// The pair, where an adapter changes either of the two.
    ///
    /// # Errors
    /// That the base changed meanwhile, or [`crate::Error::Io`].
    pub fn of(base: &Checkpoint, inputs: &Inputs) -> Result<Option<Self>> {
        let touches = |adapter: &Adapter| {
            let weights =
                adapter.modules().values().map(|module| format!("{}.weight", module.path));
            let saved = adapter.saved().iter().map(|saved| saved.path.clone());
            let rows = adapter.trained_rows().iter().map(|rows| format!("{}.weight", rows.path));
            weights.chain(saved).chain(rows).any(|parameter| is_of_vocabulary(&parameter))
        };
        if !base.ties_embeddings() || !inputs.adapters.iter().any(|adapter| touches(adapter)) {
            return Ok(None);
        }
        let Some(embedding) = find_embedding(base) else { return Ok(None) };
        let location = base.tensors()[&embedding];
        let tensor = base.at(location).clone();
        let stored = base.tensors().keys().find(|name| is_head(name)).cloned();
        let of = |name: &str| {
            let location = base.tensors()[name];
            (&base.shards()[location.shard].file, base.at(location))
        };
        // What the config ties but the files do not is not tied when it is loaded either.
        if let Some(head) = &stored
            && !same_bytes(of(head), of(&embedding))?
        {
            return Ok(None);
        }
        let flag = |name: &str| base.config().and_then(|config| config.get(name)?.as_bool());
        Ok(Some(Self {
            head: stored.clone().unwrap_or_else(|| match leaf(&embedding) {
                Some("embed_in") => "embed_out.weight".to_owned(),
                _ => match embedding.strip_prefix("language_model.") {
                    Some(_) => format!("language_model.{HEAD}"),
                    None => HEAD.to_owned(),
                },
            }),
            shared_widely: flag("is_encoder_decoder") == Some(true)
                || leaf(&embedding) == Some("shared"),
            embedding,
            shard: location.shard,
            tensor,
            has_head: base.is_language_model() || stored.is_some(),
            stored: stored.is_some(),
            parted: false,
        }))
    }

    fn other(&self, name: &str) -> Option<&str> {
        match name {
            _ if name == self.embedding => Some(&self.head),
            _ if name == self.head => Some(&self.embedding),
            _ => None,
        }
    }
}

/// The input embeddings: of several, the ones that all others share, or those with as many rows as
/// the config has tokens.
fn find_embedding(base: &Checkpoint) -> Option<String> {
    let names = || base.tensors().keys().filter(|name| is_input_embedding(name));
    let tokens = base.config().and_then(|config| {
        let inner = config.get("text_config").and_then(|inner| inner.get("vocab_size"));
        config.get("vocab_size").or(inner)?.as_u64()
    });
    let fits = |name: &&String| {
        tokens.is_some()
            && base.tensor(name).and_then(|tensor| tensor.shape.first()) == tokens.as_ref()
    };
    let shared = names().find(|name| leaf(name) == Some("shared"));
    shared.or_else(|| names().find(fits)).or_else(|| names().next()).cloned()
}

impl Planner<'_> {
    /// The name under which the pair is planned, of a head that the base does not hold.
    pub(super) fn name_in_tie(&self, name: &str) -> Option<String> {
        let tie = self.tie.as_ref()?;
        let is_missing = is_head(name) && self.base.tensor(name).is_none();
        is_missing.then(|| tie.head.clone())
    }

    /// The tensor of that name that the base holds, or the one that stands in for the tied head.
    pub(super) fn source(&self, name: &str) -> Option<&TensorInfo> {
        let tied = || self.tie.as_ref().filter(|tie| name == tie.head).map(|tie| &tie.tensor);
        let meant = self.quantized.get(name).map(|quantized| &quantized.logical);
        meant.or_else(|| self.base.tensor(name)).or_else(tied)
    }

    /// The tensors that a saved parameter stands in for. `modules_to_save` trains a copy of a
    /// module; any other saved parameter is the one that the pair shares.
    pub(super) fn replaced_by(&mut self, position: usize, name: &str, apart: bool) -> Vec<String> {
        let mut names = vec![name.to_owned()];
        let Some(tie) = &mut self.tie else { return names };
        let Some(other) = tie.other(name) else { return names };
        if !apart && !tie.parted {
            names.push(other.to_owned());
        } else if !self.inputs.adapters[position].semantics().ties_weights {
            tie.parted = true;
        }
        names
    }

    /// The tensors that an update of one weight changes.
    ///
    /// # Errors
    /// In words, where the modules that share it cannot be told apart on disk.
    pub(super) fn updated_by(&self, module: &str, name: &str) -> Result<Vec<String>, String> {
        let mut names = vec![name.to_owned()];
        let Some(tie) = &self.tie else { return Ok(names) };
        let Some(other) = tie.other(name) else { return Ok(names) };
        if self.options.compat == Some(Compat::Peft) {
            if !tie.parted {
                names.push(other.to_owned());
            }
        } else if tie.shared_widely {
            return Err(format!(
                "its module {module} shares {} with more than one other module, and only it was \
                 trained; no checkpoint of this architecture can hold that. PEFT's merge changes \
                 all of them: compat=\"peft\" (--compat peft) does the same",
                tie.embedding
            ));
        }
        Ok(names)
    }

    /// The tensors of which trained rows replace those. A head follows the embeddings that it is
    /// tied to, unless it has trained rows of its own.
    pub(super) fn rows_replaced_by(&self, position: usize, name: &str) -> Vec<String> {
        let mut names = vec![name.to_owned()];
        let Some(tie) = self.tie.as_ref().filter(|tie| !tie.parted) else { return names };
        let rows = self.inputs.adapters[position].trained_rows();
        let head_has_own = rows.iter().any(|rows| is_head(&format!("{}.weight", rows.path)));
        let follows = name == tie.embedding && !head_has_own;
        if follows || self.options.compat == Some(Compat::Peft) {
            names.extend(tie.other(name).map(str::to_owned));
        }
        names
    }

    /// Decides whether the pair stays tied; the head, where it has to be written out.
    pub(super) fn resolve_tie(&mut self, changes: &mut ConfigChanges) -> Option<Addition> {
        let tie = self.tie.take()?;
        let of = |name: &String| {
            let mut change = self.tensors.get(name).cloned().unwrap_or_default();
            // PEFT goes through the model's modules in order, and the embeddings stand first.
            let of_head = |update: &Update| is_head(&format!("{}.weight", update.module));
            change.updates.sort_by_key(|update| (update.adapter, of_head(update)));
            change
        };
        let (embedding, head) = (of(&tie.embedding), of(&tie.head));
        if !tie.stored {
            self.tensors.swap_remove(&tie.head);
        }
        if embedding.is_empty() && head.is_empty() {
            return None;
        }
        let same = is_same(self.inputs, &embedding, &head);
        if self.read(same)? {
            self.notes.push(format!(
                "{} and the head that is tied to it change alike and stay tied",
                tie.embedding
            ));
            if tie.stored {
                self.tensors.insert(tie.head, embedding.clone());
            }
            self.tensors.insert(tie.embedding, embedding);
            return None;
        }
        // The model that was trained may have had another head.
        if !tie.has_head && head.is_empty() {
            return None;
        }
        if tie.shared_widely {
            self.problems.push(format!(
                "{} and the head that is tied to it would no longer be one tensor, which this \
                 architecture cannot do without computing something else",
                tie.embedding
            ));
            return None;
        }
        if !tie.stored && self.quantized.get(&tie.embedding).is_some() {
            self.problems.push(format!(
                "{} is quantised, and the head that is tied to it would have to be written beside \
                 it; merge into the unquantised base instead",
                tie.embedding
            ));
            return None;
        }
        if let (Some((old, new)), None) = (self.vocabulary, &head.origin) {
            self.problems.push(format!(
                "the vocabulary changes from {old} to {new} tokens, but no adapter brings the head \
                 that {} is no longer tied to",
                tie.embedding
            ));
        }
        changes.tied = Some(false);
        self.notes.push(format!(
            "{} differs from {}, to which it was tied; both are written out, and \
             tie_word_embeddings becomes false",
            tie.head, tie.embedding
        ));
        if tie.stored {
            return None;
        }
        let output_dtype = self.options.dtype.clone().unwrap_or_else(|| tie.tensor.dtype.clone());
        let (origin, source) = match head.origin {
            Some((adapter, source)) => (Origin::Adapter(adapter), source),
            None => (Origin::Base(tie.shard), tie.tensor),
        };
        Some(Addition {
            name: tie.head,
            origin,
            home: Some(tie.shard),
            source,
            output_dtype,
            updates: head.updates,
        })
    }
}

/// Whether two changes make the same of the same tensor. Products that are zero count for nothing.
fn is_same(inputs: &Inputs, left: &TensorChange, right: &TensorChange) -> Result<bool> {
    let same_origin = match (&left.origin, &right.origin) {
        (None, None) => true,
        (Some(left), Some(right)) => {
            let ((left, own), (right, other)) = (left, right);
            let file = |adapter: &usize| inputs.adapters[*adapter].file().as_ref();
            same_bytes((file(left), own), (file(right), other))?
        }
        _ => false,
    };
    if !same_origin {
        return Ok(false);
    }
    let (left, right) = (effective(inputs, left)?, effective(inputs, right)?);
    if left.len() != right.len() {
        return Ok(false);
    }
    for (left, right) in left.iter().zip(right) {
        if !is_same_update(inputs, left, right)? {
            return Ok(false);
        }
    }
    Ok(true)
}

/// The updates that change something.
fn effective<'c>(inputs: &Inputs, change: &'c TensorChange) -> Result<Vec<&'c Update>> {
    let mut effective = Vec::new();
    for update in &change.updates {
        let adapter = &inputs.adapters[update.adapter];
        if update.kind != UpdateKind::LowRank || !adapter.modules()[&update.module].is_zero()? {
            effective.push(update);
        }
    }
    Ok(effective)
}

fn is_same_update(inputs: &Inputs, left: &Update, right: &Update) -> Result<bool> {
    let adapter = &inputs.adapters[left.adapter];
    if (left.adapter, left.kind) != (right.adapter, right.kind)
        || left.scale != right.scale
        || left.weight != right.weight
        || left.part != right.part
    {
        return Ok(false);
    }
    if left.module == right.module {
        return Ok(true);
    }
    match left.kind {
        UpdateKind::Replace => {
            match (adapter.tensor(&left.module), adapter.tensor(&right.module)) {
                (Some(left), Some(right)) => left.has_same_bytes(&right),
                (left, right) => Ok(left.is_none() && right.is_none()),
            }
        }
        UpdateKind::LowRank => {
            let (left, right) =
                (&adapter.modules()[&left.module], &adapter.modules()[&right.module]);
            // An embedding's factors are the transposes of a linear layer's.
            let turned =
                (left.kind == LayerKind::Embedding) != (right.kind == LayerKind::Embedding);
            Ok(turned
                && is_transpose(&left.pair(None, None, None)?, &right.pair(None, None, None)?))
        }
        UpdateKind::Dora | UpdateKind::Vector => Ok(false),
    }
}

/// Whether one product is the transpose of another, factor by factor.
fn is_transpose(left: &Pair, right: &Pair) -> bool {
    if (left.rank, left.outputs, left.inputs) != (right.rank, right.inputs, right.outputs) {
        return false;
    }
    let values =
        |pair: &Pair| (widen_f64(&pair.a_dtype, &pair.a), widen_f64(&pair.b_dtype, &pair.b));
    let ((a, b), (other_a, other_b)) = (values(left), values(right));
    let is_turned = |values: &[f64], turned: &[f64], rows: usize, columns: usize| {
        (0..rows).all(|row| {
            (0..columns).all(|column| values[row * columns + column] == turned[column * rows + row])
        })
    };
    is_turned(&a, &other_b, left.rank, left.inputs)
        && is_turned(&b, &other_a, left.outputs, left.rank)
}
