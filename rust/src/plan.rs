//! The plan of a merge, made before anything is written: for each tensor of the output exactly one
//! action. A plan is a value: it refers to its inputs by position and name, and any executor
//! can carry it out.

mod context;
mod draft;
mod entries;
mod exact;
mod layout;
mod name_map;
mod options;
mod passes;
mod planner;
mod products;
mod split;
mod tie;
mod update;
mod value;
mod weights;

use std::sync::Arc;

use crate::adapter::formats::recognize;
use crate::adapter::{Adapter, about, grammar, zero};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::{Error, Result, shorten_all};
pub use crate::methods::MethodOptions;
use crate::parallel::task::Task;
pub use crate::weights::Weight;

use context::Context;
pub use options::{Compat, Options, Precision, Strategy, TokenizerChoice};
pub(crate) use passes::quantized::{dequantized_plan, updates_in_model};
use passes::replication::ReplicatedInputs;
pub use passes::side_files::{CARD, CARD_OF_BASE};
pub(crate) use passes::targets::takes_experts_transposed;
use passes::{backbone, coverage, names, replication, undo};
pub use update::{ExpertLayout, Residual, Slice, Update, UpdateKind};
pub use value::{
    Action, ConfigChanges, EntryMerge, FileOrigin, Inputs, Origin, Plan, PlannedChange,
    PlannedShard, PlannedTensor, Replication, SideFile, SideFiles, TaskHead,
};
use weights::ModuleWeights;

/// Whether every parameter of the adapters has its tensor in the base, by the names as they stand
/// or the built-in rules for renamed ones.
///
/// # Errors
/// [`Error::Cancelled`], [`Error::Adapter`] for patterns of a config that take too many steps, that
/// a file changed meanwhile, or [`Error::Io`].
pub fn names_fit(inputs: &Inputs, task: &Task) -> Result<bool> {
    let options = Options::default();
    let named = named_like_the_base(inputs)?;
    let inputs = named.as_ref().unwrap_or(inputs);
    let quantized = QuantizedWeights::of(&inputs.base);
    let base = quantized.named(&inputs.base);
    let context = Context::new(inputs, &base, &quantized, &options, task)?;
    for adapter in &inputs.adapters {
        if !names::map(&context, adapter)?.fits() {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Plan {
    /// Plans a merge.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights that do not fit the strategy, [`Error::Unsupported`] for
    /// what cannot be merged, [`Error::Plan`] with everything that does not fit together,
    /// [`Error::Checkpoint`] or [`Error::Adapter`] if a file changed meanwhile, [`Error::Io`].
    pub fn new(inputs: &Inputs, options: Options) -> Result<Self> {
        Self::new_with(inputs, options, &Task::new())
    }

    /// The same, as a part of a task that can be cancelled.
    ///
    /// # Errors
    /// Those of [`Plan::new`], and [`Error::Cancelled`].
    pub fn new_with(inputs: &Inputs, options: Options, task: &Task) -> Result<Self> {
        let weights = ModuleWeights::of(&options, inputs.adapters.len())?;
        options.check_strategy()?;
        options.check_precision(inputs.adapters.len())?;
        let named = named_like_the_base(inputs)?;
        let inputs = named.as_ref().unwrap_or(inputs);
        refuse_obstacles(inputs, &options.allow)?;
        let repeats = |adapter: &Arc<Adapter>| adapter.semantics().layer_replication.is_some();
        if options.subtract
            && options.compat == Some(Compat::Peft)
            && inputs.adapters.iter().any(repeats)
        {
            return Err(Error::Plan(vec![format!(
                "PEFT adds the updates of repeated layers (layer_replication) to all of them, and \
                 the merged checkpoint does not tell which those were; {}",
                undo::GIVE_THE_BASE
            )]));
        }
        // A merged checkpoint has the repeated layers written out.
        let replicated = match options.subtract {
            true => None,
            false => replication::apply(inputs).map_err(|problem| Error::Plan(vec![problem]))?,
        };
        let inputs = replicated.as_ref().map_or(inputs, |replicated| &replicated.inputs);
        let renamed = if options.subtract { None } else { backbone::apply(inputs) };
        let inputs = renamed.as_ref().map_or(inputs, |(inputs, _)| inputs);
        task.check()?;
        weights.check(&options, inputs.adapters.iter().map(|adapter| &**adapter))?;
        let quantized = QuantizedWeights::of(&inputs.base);
        let base = quantized.named(&inputs.base);
        let context = Context::new(inputs, &base, &quantized, &options, task)?;
        let mut draft = planner::draft(&context, &weights)?;
        let (mut notes, of_adapters) = std::mem::take(&mut draft.messages)
            .finish()
            .map_err(|error| explained_by_the_base(inputs, error))?;
        notes.splice(0..0, inputs.base.notes().iter().cloned());
        notes.extend(renamed.as_ref().map(|(_, note)| note.clone()));
        let mut config_changes = draft.config_changes.clone();
        if let Some(ReplicatedInputs { replication, .. }) = &replicated {
            notes.push(format!(
                "the base's {} layers become {}, each written out with its own updates",
                replication.layers,
                replication.order.len()
            ));
            config_changes.layers = Some(replication.clone());
        }
        let mut warnings = inputs.base.warnings().to_vec();
        let mut zero_updates = Vec::new();
        for (position, adapter) in inputs.adapters.iter().enumerate() {
            if weights.is_zero(position, adapter) {
                let path = adapter.path().display();
                zero_updates.push(format!("{path}: its weight is 0, so that it changes nothing"));
            }
            zero_updates.extend(zero::warnings(adapter)?);
        }
        let split = |adapter: &Arc<Adapter>| {
            let words = about::split_scales(adapter)?;
            Some(format!("{}: {words}", adapter.path().display()))
        };
        warnings.extend(inputs.adapters.iter().filter_map(split));
        shorten_all(zero_updates.iter_mut());
        warnings.extend(zero_updates.iter().cloned());
        warnings.extend(of_adapters);
        shorten_all(warnings.iter_mut().chain(&mut notes));
        let ignored = std::mem::take(&mut draft.ignored);
        let side_files = std::mem::take(&mut draft.side_files);
        task.check()?;
        let mut shards = layout::plan_shards(inputs, &options, draft, &quantized);
        entries::merge_by_entries(inputs, &options, &mut shards)?;
        products::weigh_by_products(inputs, &options, &weights, &mut shards, task)?;
        exact::mark(inputs, &options, &mut shards)?;
        task.check()?;
        if options.dtype.is_some() {
            let kept = layout::kept_components(inputs, &shards);
            if !kept.is_empty() {
                notes.push(format!(
                    "no adapter changes {} of the pipeline, which keep their dtypes",
                    kept.join(", ")
                ));
            }
        }
        for (file, digests) in layout::outdated_digests(inputs, &shards) {
            notes.push(format!(
                "{file}: the base's metadata hold {} of its tensors, which would be wrong now; left \
                 out",
                digests.join(" and ")
            ));
        }
        let coverage = coverage::resolve(inputs, &options.allow, &shards, &ignored)?;
        Ok(Self {
            options,
            weights: weights.told(),
            shards,
            config_changes,
            warnings,
            side_files,
            zero_updates,
            notes,
            coverage,
        })
    }
}

/// The base under the names that it has in the output of a plan.
pub(crate) fn base_as_named(inputs: &Inputs, plan: &Plan) -> Arc<Checkpoint> {
    let renamed = if plan.options.subtract { None } else { backbone::apply(inputs) };
    renamed.map_or_else(|| inputs.base.clone(), |(renamed, _)| renamed.base)
}

/// The inputs with adapters whose names are flattened under the base's names; `None` where all are
/// dotted.
fn named_like_the_base(inputs: &Inputs) -> Result<Option<Inputs>> {
    let mut changed = false;
    let mut adapters = Vec::with_capacity(inputs.adapters.len());
    let quantized = QuantizedWeights::of(&inputs.base);
    let base = quantized.named(&inputs.base);
    for adapter in &inputs.adapters {
        adapters.push(match grammar::resolve(adapter, &base)? {
            Some(named) => {
                changed = true;
                Arc::new(named)
            }
            None => adapter.clone(),
        });
    }
    Ok(changed.then(|| Inputs { base: inputs.base.clone(), adapters }))
}

/// Why nothing fits, where the base is no model or was saved without its values.
fn explained_by_the_base(inputs: &Inputs, error: Error) -> Error {
    if !matches!(error, Error::Plan(_)) {
        return error;
    }
    let base = &inputs.base;
    if let Some(message) = base.shards().iter().find_map(|shard| shard.file.header().left_empty()) {
        return Error::checkpoint(base.path(), message);
    }
    let kind = match base.shards() {
        [only] => recognize::kind_of(&only.file),
        _ => None,
    };
    match kind {
        Some(kind) => Error::checkpoint(
            base.path(),
            format!("is {}, not a base model; give it as an adapter", kind.what()),
        ),
        None => error,
    }
}

/// Refuses, adapter by adapter, whatever cannot be merged.
fn refuse_obstacles(inputs: &Inputs, allow: &[String]) -> Result<()> {
    let mut refused = Vec::new();
    for adapter in &inputs.adapters {
        let mut obstacles = adapter.obstacles(allow);
        obstacles.extend(adapter.files_left_out(allow)?);
        if !obstacles.is_empty() {
            refused.push((adapter.path(), obstacles));
        }
    }
    let [(path, obstacles), rest @ ..] = refused.as_slice() else {
        return Ok(());
    };
    let mut message = obstacles.join("; ");
    for (path, obstacles) in rest {
        message.push_str(&format!("\n{}: {}", path.display(), obstacles.join("; ")));
    }
    Err(Error::unsupported(path, message))
}

#[cfg(test)]
mod tests;
