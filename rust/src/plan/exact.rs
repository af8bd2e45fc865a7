//! Merges of real numbers that are rounded once: what is such a sum, and what is not.

use super::entries::NoProducts;
use super::options::{Options, Precision, Strategy};
use super::update::{Update, UpdateKind};
use super::value::{Action, Inputs, PlannedShard};
use crate::coefficients::Gram;
use crate::error::{Error, Result};

impl Options {
    /// Checks that what is asked for is a sum of real numbers, where it is to be rounded once.
    ///
    /// # Errors
    /// [`Error::Argument`].
    pub(super) fn check_precision(&self, adapters: usize) -> Result<()> {
        if self.precision == Precision::Default {
            return Ok(());
        }
        if self.compat.is_some() {
            return Err(Error::Argument(
                "compat asks for the roundings of PEFT, and precision=\"exact\" for a single one; give one \
                 of both"
                    .into(),
            ));
        }
        let why = match self.strategy {
            Strategy::Sequential | Strategy::Weighted | Strategy::Average => return Ok(()),
            Strategy::Entries(_) => "decides by values that it has computed",
            Strategy::Gram(_) => match self.gram(adapters)? {
                Some(Gram::Linear | Gram::Normalized | Gram::Centroid) | None => return Ok(()),
                Some(_) => "finds its coefficients by values that it has computed",
            },
        };
        Err(Error::Argument(format!(
            "the strategy {} {why}, so that its result is no definition; precision=\"exact\" goes with \
             sequential, weighted, average, linear, normalized and centroid",
            self.strategy.name()
        )))
    }
}

/// Marks all merged tensors as sums that are rounded once, where that is asked for.
///
/// # Errors
/// [`Error::Unsupported`] with everything that is no sum of products of stored numbers.
pub(super) fn mark(inputs: &Inputs, options: &Options, shards: &mut [PlannedShard]) -> Result<()> {
    if options.precision == Precision::Default {
        return Ok(());
    }
    let mut refused = NoProducts::default();
    let mut quantized = Vec::new();
    for tensor in shards.iter_mut().flat_map(|shard| &mut shard.tensors) {
        if !matches!(tensor.action, Action::Merge(_)) {
            continue;
        }
        tensor.precision = Precision::Exact;
        if tensor.requantized {
            quantized.push(tensor.name.as_str());
        }
        refused.look_at_updates(tensor, &|update| what_is_no_sum(inputs, update));
    }
    refused.finish(
        inputs,
        "precision=\"exact\"",
        "rounds sums of products of stored numbers once",
    )?;
    let more = match quantized.as_slice() {
        [] => return Ok(()),
        [only] => (*only).to_owned(),
        [first, rest @ ..] => format!("{first} and {} more", rest.len()),
    };
    Err(Error::unsupported(
        inputs.base.path(),
        format!(
            "precision=\"exact\" does not say how weights are quantised again ({more}); write the model in \
             another dtype (dtype=\"bfloat16\", --dtype bfloat16)"
        ),
    ))
}

fn what_is_no_sum(inputs: &Inputs, update: &Update) -> Option<&'static str> {
    match update.kind {
        UpdateKind::Dora => Some("DoRA's norms, which are square roots"),
        UpdateKind::Transform => Some("updates that are more than a sum with the base's weight"),
        UpdateKind::Replace if update.stage > 0 && update.weight != 1.0 => Some(
            "parameters that were trained whole, of which a share replaces what was added before",
        ),
        UpdateKind::Replace | UpdateKind::Vector => None,
        UpdateKind::LowRank if update.residual.is_some() => Some(
            "factors that began with a part of the base's weight (PiSSA, OLoRA or the like), which has \
             to be decomposed",
        ),
        UpdateKind::LowRank => {
            let module = &inputs.adapters[update.adapter].modules()[&update.module];
            (!module.delta.is_exact())
                .then_some("factors that are sums of products of others, and rounded")
        }
    }
}
