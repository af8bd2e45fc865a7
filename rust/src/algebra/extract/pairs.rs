//! The parameters of two checkpoints, brought together, and what an adapter can say of each.

use std::borrow::Cow;
use std::collections::{BTreeSet, HashMap};

use indexmap::IndexMap;

use super::difference::{Stored, Weight};
use crate::adapter::{Expert, LayerKind, expert_factors};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::heads;
use crate::checkpoint::names::canonical::Lie;
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::checkpoint::names::orientation;
use crate::checkpoint::names::renames::Renames;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::{Error, Result};
use crate::plan::takes_experts_transposed;

/// A parameter of both.
#[derive(Debug)]
pub(super) struct Pair<'a> {
    /// Its name in the checkpoints, with the number of an expert whose matrix lies in a stack.
    pub name: String,
    /// Its name in the model in memory.
    pub named: String,
    /// Which of the experts it is whose matrices are one parameter in memory.
    pub expert: Option<Expert>,
    pub tuned: Weight<'a>,
    pub base: Weight<'a>,
    pub part: Part,
}

/// What an adapter says of a parameter that differs.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Part {
    /// The weight of a layer, as a product of factors.
    Factors { kind: LayerKind, is_transposed: bool },
    /// A parameter of a module that is saved whole.
    Whole,
    /// The bias of a layer of which the weight is updated.
    Bias,
    /// Nothing.
    Other,
}

impl Pair<'_> {
    /// The module that it is a parameter of.
    pub fn module(&self) -> &str {
        self.named.rsplit_once('.').map_or("", |(module, _)| module)
    }

    /// What random numbers know it by.
    pub fn key(&self) -> Cow<'_, str> {
        match self.expert {
            Some(expert) => Cow::Owned(format!("{}[{}]", self.named, expert.index)),
            None => Cow::Borrowed(self.module()),
        }
    }

    /// What records know it by.
    pub fn title(&self) -> &str {
        if self.expert.is_some() { &self.named } else { self.module() }
    }

    /// (outputs, inputs) of its update.
    pub fn extents(&self) -> [usize; 2] {
        let columns = self.tuned.shape[1..].iter().product::<u64>() as usize;
        let mut extents = [self.tuned.shape[0] as usize, columns];
        if let Part::Factors { is_transposed: true, .. } = self.part {
            extents.reverse();
        }
        extents
    }

    /// Of both.
    pub fn bytes(&self) -> u64 {
        self.tuned.bytes() + self.base.bytes()
    }

    /// Whether the two have different numbers of rows.
    pub fn has_grown(&self) -> bool {
        self.tuned.shape != self.base.shape
    }
}

/// How embeddings and language heads are written.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Tables {
    Whole,
    Factors,
    Skipped,
}

/// What embeddings are called.
const EMBEDDINGS: [&str; 17] = [
    "embed_tokens",
    "wte",
    "wpe",
    "word_embeddings",
    "tok_embeddings",
    "position_embeddings",
    "token_type_embeddings",
    "embed_positions",
    "shared",
    "embeddings",
    "embedding",
    "embed_in",
    "token_embedding",
    "position_embedding",
    "token_embd",
    "embed_tokens_per_layer",
    "relative_attention_bias",
];
/// What the layer before the logits is called.
const HEADS: [&str; 3] = ["lm_head", "embed_out", "output"];
/// The ends of tensors that are computed and no parameters.
const COMPUTED: [&str; 4] =
    ["rotary_emb.inv_freq", "position_ids", "attn.masked_bias", "num_batches_tracked"];

fn weights<'a>(
    checkpoint: &'a Checkpoint,
    quantized: &QuantizedWeights,
) -> Result<IndexMap<String, Weight<'a>>> {
    if let Some(format) = quantized.unsupported() {
        let first = checkpoint.tensors().keys().find(|name| format.holds_tensor(name));
        if let Some(name) = first {
            return Err(Error::checkpoint(
                checkpoint.path(),
                format!("{name} is stored in a quantized format that is not read"),
            ));
        }
    }
    if let Some((name, problem)) = quantized.problems().first() {
        return Err(Error::checkpoint(checkpoint.path(), format!("{name} {problem}")));
    }
    let mut found = IndexMap::new();
    for (tensor, location) in checkpoint.tensors() {
        if quantized.owner(tensor).is_some() || COMPUTED.iter().any(|end| tensor.ends_with(end)) {
            continue;
        }
        let name = quantized.weight_of(tensor).to_owned();
        let (shape, stored) = match quantized.of_codes(tensor) {
            Some(found) => (found.logical.shape.clone(), Stored::Quantized(found.clone())),
            None => (checkpoint.at(*location).shape.clone(), Stored::Plain(*location)),
        };
        found.insert(name.clone(), Weight { checkpoint, name, shape, stored, first: 0 });
    }
    Ok(found)
}

/// What is common to both, in the order of the tuned model's tensors.
///
/// # Errors
/// [`Error::Plan`] with the names and shapes that do not fit; [`Error::Checkpoint`] for what cannot be
/// read.
pub(super) fn pairs<'a>(
    (tuned, tuned_quantized): (&'a Checkpoint, &QuantizedWeights),
    (base, base_quantized): (&'a Checkpoint, &QuantizedWeights),
    tables: Tables,
    holds_experts: bool,
) -> Result<Vec<Pair<'a>>> {
    let own = weights(tuned, tuned_quantized)?;
    let mut others = weights(base, base_quantized)?;
    let mut problems = Vec::new();
    let mut pairs = Vec::with_capacity(own.len());
    let names = MemoryNames::of(base, own.keys(), holds_experts);
    for (name, weight) in own {
        let Some(other) = others.shift_remove(&name) else {
            // A tied head that only one of the two stores is the embeddings once more.
            if !is_head(&name) || !base.ties_embeddings() {
                problems.push(format!("{name} is in the tuned model only"));
            }
            continue;
        };
        if is_head(&name) && tuned.ties_embeddings() && base.ties_embeddings() {
            continue;
        }
        let (named, expert) = names.of_parameter(&name);
        let part = part_of(base, &weight, &named, tables);
        let is_table = is_table(&name);
        let same_width = weight.shape.len() == 2
            && weight.shape[1..] == *other.shape.get(1..).unwrap_or_default();
        if weight.shape != other.shape && !(is_table && same_width) {
            problems
                .push(format!("{name} is {:?} and in the base {:?}", weight.shape, other.shape));
            continue;
        }
        if expert.is_none()
            && let Some(is_transposed) = names.stack(&named, &weight.shape)
        {
            let part = Part::Factors { kind: LayerKind::Linear, is_transposed };
            let count = weight.shape[0];
            pairs.extend((0..count).map(|index| Pair {
                name: format!("{name}[{index}]"),
                named: named.clone(),
                expert: Some(Expert { index, count }),
                tuned: weight.matrix(index),
                base: other.matrix(index),
                part,
            }));
            continue;
        }
        let part = match expert {
            Some(_) => Part::Factors { kind: LayerKind::Linear, is_transposed: false },
            None => part,
        };
        pairs.push(Pair { name, named, expert, tuned: weight, base: other, part });
    }
    for name in others.keys() {
        if !is_head(name) || !tuned.ties_embeddings() {
            problems.push(format!("{name} is in the base only"));
        }
    }
    if !problems.is_empty() {
        let count = problems.len();
        const LISTED: usize = 20;
        problems.truncate(LISTED);
        if count > LISTED {
            problems.push(format!("and {} more", count - LISTED));
        }
        problems.insert(
            0,
            format!(
                "{} and {} are not two states of one model:",
                tuned.path().display(),
                base.path().display()
            ),
        );
        return Err(Error::Plan(problems));
    }
    Ok(pairs)
}

/// The names of parameters in the model in memory, as far as rules of its model type tell them.
struct MemoryNames {
    renames: Option<Renames>,
    /// How many matrices there are of each parameter of experts that is stored one by one.
    counts: HashMap<String, u64>,
    holds_experts: bool,
    takes_transposed: bool,
}

impl MemoryNames {
    fn of<'a>(
        base: &Checkpoint,
        names: impl Iterator<Item = &'a String>,
        holds_experts: bool,
    ) -> Self {
        // Image models go by several namings, between which conversions choose; formats that know no experts
        // are read by the names in the checkpoint.
        let keeps = !holds_experts || DiffusionNames::of(base).is_some();
        let renames = if keeps { None } else { Renames::built_in(base) };
        let takes_transposed = base.config().is_some_and(takes_experts_transposed);
        let counts = HashMap::new();
        let mut found = Self { renames, counts, holds_experts, takes_transposed };
        let mut counts = HashMap::<String, u64>::new();
        for name in names {
            if let Some((parameter, index)) = found.expert(name) {
                let count = counts.entry(parameter).or_default();
                *count = (*count).max(index + 1);
            }
        }
        found.counts = counts;
        found
    }

    /// The parameter of all experts that one of them is stored under a name of its own of, and which expert
    /// that is. Gate and upward matrix, which are one in memory, are two: what writes them joins them.
    fn expert(&self, name: &str) -> Option<(String, u64)> {
        let found = self.renames.as_ref()?.canonical(name);
        let slice = found.slice.filter(|_| found.obstacle.is_none() && self.holds_experts)?;
        let expert = slice.expert?;
        let parameter = match (slice.slots, found.name.strip_suffix("gate_up_proj")) {
            (1, _) if expert_factors::is_matrix(last_part(&found.name)) => found.name.clone(),
            (2, Some(before)) => {
                format!("{before}{}", ["gate_proj", "up_proj"][slice.slot.min(1)])
            }
            _ => return None,
        };
        Some((parameter, expert))
    }

    /// The name in memory of a stored parameter, and of which expert it is.
    fn of_parameter(&self, name: &str) -> (String, Option<Expert>) {
        if let Some((parameter, index)) = self.expert(name) {
            let count = self.counts.get(&parameter).copied().unwrap_or(index + 1);
            return (parameter, Some(Expert { index, count }));
        }
        let canonical = self.renames.as_ref().map(|renames| renames.canonical(name));
        let renamed = canonical.filter(|found| {
            found.slice.is_none() && found.obstacle.is_none() && found.lie == Lie::Same
        });
        (renamed.map_or_else(|| name.to_owned(), |found| found.name), None)
    }

    /// Whether a parameter is a stack of the matrices of experts for which factors can be written, and if
    /// so, whether they lie transposed.
    fn stack(&self, named: &str, shape: &[u64]) -> Option<bool> {
        let is_known = expert_factors::is_matrix(last_part(named)) && named.contains(".experts.");
        (shape.len() == 3 && is_known && self.holds_experts).then_some(self.takes_transposed)
    }
}

fn last_part(name: &str) -> &str {
    name.rsplit('.').next().unwrap_or(name)
}

/// Settles what can be said of each parameter: a layer that is updated is not saved, nor is a module that
/// holds such layers.
pub(super) fn settle(pairs: &mut [Pair<'_>]) {
    let updated: BTreeSet<String> = (pairs.iter())
        .filter(|pair| matches!(pair.part, Part::Factors { .. }) && !pair.has_grown())
        .filter(|pair| pair.expert.is_none())
        .map(|pair| pair.module().to_owned())
        .collect();
    for pair in pairs.iter_mut() {
        let module = pair.module().to_owned();
        let is_updated = updated.contains(&module);
        let below = format!("{module}.");
        let has_layers =
            || updated.range(below.clone()..).next().is_some_and(|next| next.starts_with(&below));
        pair.part = match pair.part {
            Part::Factors { .. } if pair.has_grown() => Part::Whole,
            Part::Factors { .. } => continue,
            Part::Other => Part::Other,
            _ if is_updated && pair.name.ends_with(".bias") => Part::Bias,
            _ if is_updated || module.is_empty() || has_layers() => Part::Other,
            _ => Part::Whole,
        };
    }
}

/// Whether a parameter is one of a table of tokens.
fn table(name: &str) -> Option<LayerKind> {
    let module = name.strip_suffix(".weight")?;
    let layer = module.rsplit('.').next().unwrap_or(module);
    match layer {
        _ if EMBEDDINGS.contains(&layer) => Some(LayerKind::Embedding),
        _ if is_head(name) => Some(LayerKind::Linear),
        _ => None,
    }
}

/// Whether it is the weight of an embedding or of a language head.
pub(super) fn is_table(name: &str) -> bool {
    table(name).is_some()
}

/// Whether it is the weight of an embedding.
pub(super) fn is_embedding(name: &str) -> bool {
    table(name) == Some(LayerKind::Embedding)
}

fn is_head(name: &str) -> bool {
    let module = name.strip_suffix(".weight").unwrap_or_default();
    let layer = module.rsplit('.').next().unwrap_or(module);
    // `attention.output` has layers below it; a head called so stands alone.
    HEADS.contains(&layer) && (layer != "output" || !module.contains('.'))
}

fn part_of(base: &Checkpoint, weight: &Weight<'_>, name: &str, tables: Tables) -> Part {
    let Some(module) = name.strip_suffix(".weight") else { return Part::Whole };
    if let Some(kind) = table(name) {
        return match tables {
            Tables::Whole => Part::Whole,
            Tables::Factors => Part::Factors { kind, is_transposed: kind == LayerKind::Embedding },
            Tables::Skipped => Part::Other,
        };
    }
    if heads::output_layer(name, &weight.shape).is_some() {
        return Part::Whole;
    }
    match weight.shape.as_slice() {
        [_, _] => Part::Factors {
            kind: LayerKind::Linear,
            is_transposed: orientation::is_conv1d(base, module),
        },
        // Each channel by itself: a product of factors would mix them.
        [_, 1, ..] => Part::Whole,
        [_, _, _] | [_, _, _, _] | [_, _, _, _, _] => {
            Part::Factors { kind: LayerKind::Convolution, is_transposed: false }
        }
        _ => Part::Whole,
    }
}
