//! The pass over parameters that an adapter brings whole: they replace the base's, or stand beside
//! them, perhaps with another number of tokens.

use std::ops::ControlFlow;

use indexmap::IndexMap;

use super::quantized;
use super::slices;
use super::ties;
use super::undo;
use crate::adapter::Saved;
use crate::error::Result;
use crate::kernel::{self, InstructionSet};
use crate::plan::context::{AdapterContext, Context};
use crate::plan::draft::{
    AdapterTensor, IgnoredTensors, Messages, NewTensor, Obstacle, PlanDraft, TensorChange,
    TensorChanges, Vocabulary, VocabularySize,
};
use crate::plan::options::Strategy;
use crate::plan::passes::coverage;
use crate::plan::tie;
use crate::plan::update::{Update, UpdateKind};
use crate::plan::value::Origin;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{TensorFile, TensorInfo, same_bytes};

/// Replaces the base's parameter by a saved one, or adds that beside it.
///
/// # Errors
/// What does not fit, or why a file could not be read.
pub(in crate::plan) fn replace(
    adapter: &AdapterContext<'_>,
    saved: &Saved,
    draft: &mut PlanDraft,
) -> Result<(), Obstacle> {
    let context = adapter.plan;
    if context.options.subtract {
        return Ok(undo::leave(adapter, saved, &mut draft.messages, &mut draft.ignored)?);
    }
    if slices::replace(adapter, saved, &mut draft.changes)? {
        return Ok(());
    }
    // A head that the backbone does not have keeps the name that the whole model gives it.
    let name = adapter.tensor_name(&saved.path)?;
    let trained_apart = saved.trained_apart;
    let Some(tensor) = context.source(&name) else {
        if !trained_apart {
            return Err(Obstacle::Problem(format!(
                "its tensor {} fits nothing in the base and belongs to no module that its \
                 config saves (modules_to_save)",
                saved.tensor.name
            )));
        }
        draft.brought.add(name, own(adapter, saved));
        return Ok(());
    };
    quantized::refuse_replacing(context, saved, &name)?;
    let both_float = tensor.dtype.is_mergeable() && saved.tensor.dtype.is_mergeable();
    if tensor.dtype != saved.tensor.dtype && !both_float {
        return Err(Obstacle::Problem(format!(
            "its tensor {} of type {} replaces {name}, which the base stores as {}: \
             merge into the unquantised base instead",
            saved.tensor.name, saved.tensor.dtype, tensor.dtype
        )));
    }
    // Counters and masks: nothing that a weight could be put on.
    if !both_float && is_unchanged(context, saved, &name)? {
        let reason = format!("is the base's own {name} again");
        draft.ignored.add(adapter.position, &saved.tensor.name, reason);
        return Ok(());
    }
    let outright = context.replaces_outright(adapter.weight_of(&saved.path));
    if !(both_float || outright) {
        return Err(Obstacle::Problem(format!(
            "its tensor {} of type {} replaces {name} and cannot be weighted against it; use \
             the strategy sequential",
            saved.tensor.name, saved.tensor.dtype
        )));
    }
    let (old, new) = (&tensor.shape, &saved.tensor.shape);
    let grows = tie::is_of_vocabulary(&name) && old.len() == new.len() && old[1..] == new[1..];
    let same = old == new;
    if !(same || grows && outright) {
        return Err(Obstacle::Problem(format!(
            "its tensor {} of shape {new:?} replaces {name} of shape {old:?}",
            saved.tensor.name
        )));
    }
    if !same {
        let size = VocabularySize { old: old[0], new: new[0] };
        resize_vocabulary(size, &mut draft.vocabulary, &mut draft.messages)?;
    } else if !trained_apart && is_unchanged(context, saved, &name)? {
        let reason = format!("is the base's own {name} again");
        draft.ignored.add(adapter.position, &saved.tensor.name, reason);
        return Ok(());
    }
    for name in ties::replaced_by(adapter, &name, trained_apart, &mut draft.is_untied) {
        let PlanDraft { changes, messages, ignored, .. } = &mut *draft;
        put(adapter, saved, &name, changes, messages, ignored)?;
    }
    Ok(())
}

/// The tensor of a saved parameter.
fn own(adapter: &AdapterContext<'_>, saved: &Saved) -> AdapterTensor {
    AdapterTensor { adapter: adapter.position, info: saved.tensor.info().clone() }
}

/// Whether a parameter that was saved beside an update is only the base's own again. Then it
/// replaces nothing, least of all what an earlier adapter added; in PEFT's merge it does.
fn is_unchanged(context: &Context<'_>, saved: &Saved, name: &str) -> Result<bool> {
    let Some(location) = context.base.tensors().get(name) else { return Ok(false) };
    let base = context.base.at(*location);
    let (from, to) = (&base.dtype, &saved.tensor.dtype);
    let mergeable = from.is_mergeable() && to.is_mergeable();
    if context.is_for_peft() && mergeable {
        return Ok(false);
    }
    let base = (&context.base.shards()[location.shard].file, base);
    let own = (saved.tensor.file().as_ref(), saved.tensor.info());
    if from == to {
        same_bytes(base, own)
    } else if mergeable && from.size() < to.size() {
        same_widened(base, own)
    } else {
        Ok(false)
    }
}

/// Replaces one tensor by a saved parameter.
fn put(
    adapter: &AdapterContext<'_>,
    saved: &Saved,
    name: &str,
    changes: &mut TensorChanges,
    messages: &mut Messages,
    ignored: &mut IgnoredTensors,
) -> Result<(), Obstacle> {
    let inputs = adapter.plan.inputs;
    let change = changes.entry(name);
    // A parameter that two modules share can be in the file under either name, and under both.
    let by_name = |update: &Update| {
        let own = update.adapter == adapter.position && update.kind == UpdateKind::Replace;
        own.then(|| adapter.adapter.tensor(&update.module)).flatten()
    };
    let already = match &change.origin {
        Some(origin) if origin.adapter == adapter.position => {
            adapter.adapter.tensor(&origin.info.name)
        }
        _ => change.updates.iter().find_map(by_name),
    };
    if let Some(other) = already {
        if !other.has_same_bytes(&saved.tensor)? {
            return Err(Obstacle::Problem(format!(
                "its tensors {} and {} differ, but both are {name}, which the base ties",
                other.name, saved.tensor.name
            )));
        }
        let reason = format!("is {} again, both being {name}, which the base ties", other.name);
        ignored.add(adapter.position, &saved.tensor.name, reason);
        return Ok(());
    }
    if adapter.plan.replaces_outright(adapter.weight_of(&saved.path)) {
        // Whatever earlier adapters did to it is gone, as when one is merged after the other.
        let replacement = TensorChange { origin: Some(own(adapter, saved)), updates: Vec::new() };
        let lost = std::mem::replace(change, replacement);
        if !lost.is_empty() {
            messages.warn(format!(
                "{}: replaces {name}, which an earlier adapter changed; that change is lost",
                adapter.label()
            ));
        }
        let reason = format!("what it makes of {name} is replaced by a later adapter");
        if let Some(origin) = lost.origin {
            ignored.add(origin.adapter, &origin.info.name, reason.as_str());
        }
        for update in &lost.updates {
            for tensor in coverage::tensors_of(&inputs.adapters[update.adapter], update) {
                ignored.add(update.adapter, tensor, reason.as_str());
            }
        }
    } else {
        change.updates.push(adapter.replacement(&saved.tensor.name, &saved.path));
    }
    Ok(())
}

fn resize_vocabulary(
    size: VocabularySize,
    vocabulary: &mut Vocabulary,
    messages: &mut Messages,
) -> Result<(), String> {
    let VocabularySize { old, new } = size;
    vocabulary
        .resize(size)
        .map_err(|other| format!("its saved tensors have {new} tokens, but others have {other}"))?;
    messages.note_once(format!("the vocabulary changes from {old} to {new} tokens"));
    Ok(())
}

/// Looks for what has to have another number of tokens once the vocabulary has, and was not
/// replaced.
pub(in crate::plan) fn check_vocabulary(
    context: &Context<'_>,
    changes: &TensorChanges,
    vocabulary: &Vocabulary,
    messages: &mut Messages,
) {
    let Some(VocabularySize { old, new }) = vocabulary.size() else { return };
    for name in context.base.tensors().keys() {
        let tensor = context.base.tensor(name).expect("one of the base's");
        let is_old = tie::is_of_vocabulary(name) && tensor.shape.first() == Some(&old);
        if is_old && changes.origin(name).is_none() {
            messages.problem(format!(
                "the vocabulary changes from {old} to {new} tokens, but no adapter brings \
                 {name} of the new size; its module has to be among modules_to_save in training"
            ));
        }
    }
}

/// Decides which adapter's tensors are used of those that the base does not have.
pub(in crate::plan) fn new_tensors(
    context: &Context<'_>,
    brought: impl Iterator<Item = (String, Vec<AdapterTensor>)>,
    messages: &mut Messages,
    ignored: &mut IgnoredTensors,
) -> Vec<NewTensor> {
    let mut new_tensors = Vec::new();
    for (name, mut sources) in brought {
        if sources.len() > 1 && context.options.strategy != Strategy::Sequential {
            messages.problem(format!(
                "{} adapters bring {name}, which the base does not have, so that they cannot \
                 be weighted against it; merge one of them, or use the strategy sequential",
                sources.len()
            ));
            continue;
        }
        if sources.len() > 1 {
            messages.warn(format!(
                "{} adapters bring {name}, which the base does not have; the last one's is used",
                sources.len()
            ));
        }
        let Some(AdapterTensor { adapter, info: source }) = sources.pop() else { continue };
        for earlier in sources {
            let reason = format!("a later adapter brings {name} as well");
            ignored.add(earlier.adapter, &earlier.info.name, reason);
        }
        let path = context.inputs.adapters[adapter].path().display();
        if context.base.shards().iter().all(|shard| !name.starts_with(&shard.prefix)) {
            messages.problem(format!(
                "{path}: brings {name}, which belongs to no component of the pipeline; rename it to \
                 begin with the component's folder, or leave it out of the adapter"
            ));
            continue;
        }
        messages.note(format!("{path}: brings {name}, which the base does not have"));
        let output_dtype = if source.dtype.is_mergeable() {
            context.options.dtype.clone().unwrap_or_else(|| usual_dtype(context, &name))
        } else {
            source.dtype.clone()
        };
        new_tensors.push(NewTensor {
            name,
            origin: Origin::Adapter(adapter),
            home: None,
            source,
            output_dtype,
            updates: Vec::new(),
        });
    }
    new_tensors
}

/// The floating-point type that most of the base's bytes have, in a pipeline those of the component
/// that a tensor of that name belongs to.
fn usual_dtype(context: &Context<'_>, name: &str) -> Dtype {
    let mut bytes = IndexMap::<&Dtype, u64>::new();
    for shard in context.base.shards().iter().filter(|shard| name.starts_with(&shard.prefix)) {
        for tensor in &shard.file.header().tensors {
            if tensor.dtype.is_mergeable() {
                *bytes.entry(&tensor.dtype).or_default() += tensor.bytes();
            }
        }
    }
    bytes.into_iter().max_by_key(|(_, bytes)| *bytes).map_or(Dtype::F32, |(dtype, _)| dtype.clone())
}

/// Whether a tensor holds the values of another of a narrower type with as many elements.
fn same_widened(
    (narrow_file, narrow): (&TensorFile, &TensorInfo),
    (wide_file, wide): (&TensorFile, &TensorInfo),
) -> Result<bool> {
    if narrow.elements() != wide.elements() {
        return Ok(false);
    }
    let (from, to) = (&narrow.dtype, &wide.dtype);
    let (mut stored, mut widened) = (Vec::new(), Vec::new());
    let (mut same, mut failure) = (true, None);
    wide_file.for_each_chunk(wide, &mut |start, bytes| {
        stored.resize(bytes.len() / to.size() * from.size(), 0);
        widened.resize(bytes.len(), 0);
        let first = start / to.size() as u64 * from.size() as u64;
        match narrow_file.read_into(narrow, first, &mut stored) {
            Ok(()) => {
                kernel::convert(InstructionSet::detect(), from, &stored, to, &mut widened);
                same = widened == bytes;
            }
            Err(error) => failure = Some(error),
        }
        if same && failure.is_none() { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
    })?;
    failure.map_or(Ok(same), Err)
}
