//! Tensors that an entry-wise strategy merges: what may be among their updates.

use indexmap::IndexMap;

use super::options::Options;
use super::update::{Update, UpdateKind};
use super::value::{Action, EntryMerge, Inputs, Origin, PlannedShard, PlannedTensor};
use crate::error::{Error, Result};

/// Makes of sums of updates what the strategy of the options makes of them, if it is an entry-wise one.
///
/// # Errors
/// [`Error::Unsupported`] with everything that is no product, adapter by adapter.
pub(super) fn merge_by_entries(
    inputs: &Inputs,
    options: &Options,
    shards: &mut [PlannedShard],
) -> Result<()> {
    let Some(method) = options.entry_method()? else { return Ok(()) };
    let mut refused = NoProducts::default();
    for tensor in shards.iter_mut().flat_map(|shard| &mut shard.tensors) {
        if let Action::Merge(updates) = &mut tensor.action
            && updates.iter().all(|update| update.kind == UpdateKind::Vector)
        {
            // The biases of second factors are no matrices: they are summed, as in a combination.
            updates.iter_mut().for_each(|update| update.weight *= options.lambda());
            continue;
        }
        // What was taken out of the base is a product, too.
        let is_of_start =
            |update: &Update| update.kind == UpdateKind::LowRank && update.residual.is_some();
        refused.look(tensor, &|update| match update.kind {
            // What an update makes of W₀ less W₀ is as good as a product, of the whole tensor.
            UpdateKind::Dora | UpdateKind::Transform => None,
            UpdateKind::Replace if update.slice.rows.is_none() => None,
            UpdateKind::Replace => Some("trained rows"),
            _ => what_is_no_product(tensor, update).filter(|_| !is_of_start(update)),
        });
        if let Action::Merge(updates) = &mut tensor.action {
            tensor.action = Action::MergeEntries(EntryMerge {
                updates: std::mem::take(updates),
                method,
                seed: options.seed,
                adapters: inputs.adapters.len(),
            });
        }
    }
    refused.finish(inputs, &options.named(), "merges products of two factors element by element")
}

/// What is refused because it is no product: the tensors, by the adapter and the kind.
#[derive(Debug, Default)]
pub(super) struct NoProducts(IndexMap<(usize, &'static str), Vec<String>>);

impl NoProducts {
    /// Looks at all that makes a tensor.
    pub fn look(&mut self, tensor: &PlannedTensor, what: &dyn Fn(&Update) -> Option<&'static str>) {
        if let Origin::Adapter(adapter) = tensor.origin {
            let names = self.0.entry((adapter, "parameters that were trained whole"));
            names.or_default().push(tensor.name.clone());
        }
        self.look_at_updates(tensor, what);
    }

    /// Looks at what is done to a tensor, whatever it begins as.
    pub fn look_at_updates(
        &mut self,
        tensor: &PlannedTensor,
        what: &dyn Fn(&Update) -> Option<&'static str>,
    ) {
        let mut refuse = |adapter: usize, what: &'static str| {
            self.0.entry((adapter, what)).or_default().push(tensor.name.clone());
        };
        for update in tensor.updates() {
            if let Some(what) = what(update) {
                refuse(update.adapter, what);
            }
        }
    }

    /// Says that what is asked for does something else.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if anything was refused.
    pub fn finish(self, inputs: &Inputs, asked: &str, does: &str) -> Result<()> {
        let mut messages = IndexMap::<usize, Vec<String>>::new();
        for ((adapter, what), names) in &self.0 {
            let more = match names.len() {
                1 => String::new(),
                count => format!(" and {} more", count - 1),
            };
            messages.entry(*adapter).or_default().push(format!("{what} ({}{more})", names[0]));
        }
        let Some((first, _)) = messages.first() else { return Ok(()) };
        let first = *first;
        let lines = messages.iter().map(|(adapter, found)| {
            let line = format!("{asked} {does}, and it has {}", found.join("; "));
            match *adapter == first {
                true => line,
                false => format!("{}: {line}", inputs.adapters[*adapter].path().display()),
            }
        });
        let message = lines.collect::<Vec<_>>().join("\n");
        Err(Error::unsupported(inputs.adapters[first].path(), message))
    }
}

/// What an update is, if it is no product that stands by itself.
pub(super) fn what_is_no_product(tensor: &PlannedTensor, update: &Update) -> Option<&'static str> {
    match update.kind {
        UpdateKind::Dora => Some("DoRA's magnitudes, with which the update is no sum"),
        UpdateKind::Replace => Some("parameters that were trained whole"),
        UpdateKind::Transform => Some("updates that only the base's weight makes"),
        UpdateKind::Vector => Some("updates of norms and biases"),
        UpdateKind::LowRank if tensor.source.shape.len() < 2 => Some("updates of norms and biases"),
        UpdateKind::LowRank if update.residual.is_some() => Some(
            "factors that began with a part of the base's weight (PiSSA, OLoRA or the like); make them \
             plain first, with lorafast.bake(…, plain=True, base=…),",
        ),
        UpdateKind::LowRank => None,
    }
}
