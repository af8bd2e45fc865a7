//! The planner: calls the passes over a draft, in the order that the result depends on.

use super::context::{AdapterContext, Context};
use super::draft::PlanDraft;
use super::passes::names::MappedTargets;
use super::passes::side_files::Rows;
use super::passes::{
    dora, heads, modules, names, quantized, saved, side_files, ties, tokens, undo,
};
use super::tie;
use super::value::ConfigChanges;
use super::weights::ModuleWeights;
use crate::adapter::Initialization;
use crate::error::Result;
use crate::tensor::dtype::Dtype;

/// Drafts the merge of all adapters, each with its weight. Problems are among the messages.
///
/// # Errors
/// [`crate::Error::Cancelled`], [`crate::Error::Adapter`] for patterns of the config that take too
/// many steps, and that a file changed meanwhile or cannot be read.
pub(super) fn draft(context: &Context<'_>, weights: &ModuleWeights) -> Result<PlanDraft> {
    let mut draft = PlanDraft::default();
    for position in 0..context.inputs.adapters.len() {
        add_adapter(context, position, weights, &mut draft)?;
    }
    complete(context, &mut draft)?;
    Ok(draft)
}

/// Adds everything that one adapter does.
fn add_adapter(
    context: &Context<'_>,
    position: usize,
    weights: &ModuleWeights,
    draft: &mut PlanDraft,
) -> Result<()> {
    let adapter = context.inputs.adapters[position].as_ref();
    let MappedTargets { names, targets, problems, .. } = names::map(context, adapter)?;
    let adapter = AdapterContext { plan: context, position, adapter, names: &names, weights };
    let label = adapter.label();
    let fitting = problems.is_empty().then_some(&targets);
    let refused = quantized::refuse_unsupported(context, adapter.adapter, &names, fitting)?;
    if let Some(problem) = refused {
        draft.messages.problem(format!("{label}: {problem}"));
        return Ok(());
    }
    let is_mapped = problems.is_empty();
    problems.iter().for_each(|problem| draft.messages.problem(format!("{label}: {problem}")));
    let notes = adapter.adapter.notes().iter().cloned().chain(names.describe());
    notes.for_each(|note| draft.messages.note(format!("{label}: {note}")));
    // Replacements first: what the adapter adds, it adds to its own tensors. Of those, first the
    // modules that were trained apart from what they shared.
    for trained_apart in [true, false] {
        for saved in adapter.adapter.saved() {
            context.task.check()?;
            if saved.trained_apart == trained_apart {
                let replaced = saved::replace(&adapter, saved, draft);
                draft.messages.keep(&label, replaced)?;
            }
        }
    }
    for rows in adapter.adapter.trained_rows() {
        context.task.check()?;
        let replaced = tokens::replace(&adapter, rows, draft);
        draft.messages.keep(&label, replaced)?;
    }
    let against_flag = modules::add(&adapter, &targets, is_mapped, draft)?;
    let semantics = adapter.adapter.semantics();
    if semantics.initialization == (Initialization::Largest { randomized: true }) {
        draft.messages.warn(format!(
            "{label}: began with singular components that a randomised method came near to \
             (init_lora_weights), which nobody can repeat; the exact ones are taken out of the \
             base, and the result differs from what was trained by as much"
        ));
    }
    if against_flag > 0 {
        draft.messages.note(format!(
            "{label}: fan_in_fan_out in its config does not fit {against_flag} of the \
             base's weights; their shapes and architecture decided"
        ));
    }
    Ok(())
}

/// Decides what depends on all adapters.
fn complete(context: &Context<'_>, draft: &mut PlanDraft) -> Result<()> {
    let PlanDraft { changes, vocabulary, messages, .. } = draft;
    draft.config_changes = ConfigChanges {
        dtype: context.options.dtype.as_ref().and_then(Dtype::torch_name).map(str::to_owned),
        vocabulary: vocabulary.size().map(|size| size.new),
        ..ConfigChanges::default()
    };
    // A tied head that is written out is a tensor like any other to the passes after.
    let tie = ties::resolve(context, changes, vocabulary, messages)?;
    draft.config_changes.tied = tie.is_untied.then_some(false);
    saved::check_vocabulary(context, changes, vocabulary, messages);
    let mut new_tensors =
        saved::new_tensors(context, draft.brought.take(), messages, &mut draft.ignored);
    new_tensors.extend(tie.head);
    dora::resolve(context, changes, &mut new_tensors, messages);
    draft.config_changes.head = heads::resolve(context, &new_tensors, messages)?;
    draft.new_tensors = new_tensors;
    if context.options.subtract {
        undo::check(context, changes, messages);
    }
    draft.config_changes.unquantized = quantized::check(context, changes, messages);
    let before = tie::find_embedding(context.base)
        .and_then(|name| context.source(&name)?.shape.first().copied());
    let rows = Rows { before, after: vocabulary.size().map(|size| size.new).or(before) };
    draft.side_files =
        side_files::resolve(context, changes, rows, &draft.config_changes, messages)?;
    Ok(())
}
