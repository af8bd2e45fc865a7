//! The parameters of two checkpoints, brought together, and what an adapter can say of each.

use std::collections::BTreeSet;

use indexmap::IndexMap;

use super::difference::{Stored, Weight};
use crate::adapter::LayerKind;
use crate::checkpoint::Checkpoint;
use crate::checkpoint::heads;
use crate::checkpoint::names::orientation;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::{Error, Result};

/// A parameter of both.
#[derive(Debug)]
pub(super) struct Pair<'a> {
    pub name: String,
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
        self.name.rsplit_once('.').map_or("", |(module, _)| module)
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
        found.insert(name.clone(), Weight { checkpoint, name, shape, stored });
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
) -> Result<Vec<Pair<'a>>> {
    let own = weights(tuned, tuned_quantized)?;
    let mut others = weights(base, base_quantized)?;
    let mut problems = Vec::new();
    let mut pairs = Vec::with_capacity(own.len());
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
        let part = part_of(base, &weight, &name, tables);
        let is_table = is_table(&name);
        let same_width = weight.shape.len() == 2
            && weight.shape[1..] == *other.shape.get(1..).unwrap_or_default();
        if weight.shape != other.shape && !(is_table && same_width) {
            problems
                .push(format!("{name} is {:?} and in the base {:?}", weight.shape, other.shape));
            continue;
        }
        pairs.push(Pair { name, tuned: weight, base: other, part });
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

/// Settles what can be said of each parameter: a layer that is updated is not saved, nor is a module that
/// holds such layers.
pub(super) fn settle(pairs: &mut [Pair<'_>]) {
    let updated: BTreeSet<String> = (pairs.iter())
        .filter(|pair| matches!(pair.part, Part::Factors { .. }) && !pair.has_grown())
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
