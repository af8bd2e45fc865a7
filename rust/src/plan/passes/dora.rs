//! The pass over updates that do more than add: what they are made from, where something else
//! changes the same tensor.

use crate::plan::context::Context;
use crate::plan::draft::{AdapterTensor, Messages, NewTensor, TensorChange, TensorChanges};
use crate::plan::options::Strategy;
use crate::plan::update::{Update, UpdateKind};
use crate::plan::value::Origin;
use crate::tensor::safetensors::TensorInfo;

/// Says of every tensor what each of its updates is made from.
pub(in crate::plan) fn resolve(
    context: &Context<'_>,
    changes: &mut TensorChanges,
    new_tensors: &mut [NewTensor],
    messages: &mut Messages,
) {
    let sequential = context.options.strategy == Strategy::Sequential;
    let staged = context.is_for_peft() && sequential;
    let mut resolve = |name: &str, change: &mut TensorChange, base: Option<&TensorInfo>| {
        if let Err(problem) = check_transforms(change) {
            messages.problem(format!("{name} {problem}"));
            return;
        }
        if !change.updates.iter().any(|update| update.kind == UpdateKind::Dora) {
            if sequential && change.updates.iter().any(|update| update.kind.is_override()) {
                one_after_another(&mut change.updates);
            }
            return;
        }
        let in_rows = |update: &Update| update.slice.rows.is_some();
        let over_rows = |update: &Update| update.kind == UpdateKind::Dora && update.transposed;
        if change.updates.iter().any(over_rows) && change.updates.iter().any(in_rows) {
            messages.problem(format!(
                "{name} is rescaled by DoRA, whose norms run over all of its rows, while some \
                 of them are changed on their own; merge them one after the other"
            ));
        } else if staged {
            in_stages(&mut change.updates);
        } else if sequential {
            one_after_another(&mut change.updates);
        } else if let Err(problem) = from_their_own(change, base) {
            messages.problem(format!("{name} {problem}"));
        }
    };
    for (name, change) in changes.iter_mut() {
        resolve(name, change, context.base.tensor(name));
    }
    for new in new_tensors {
        let origin = match new.origin {
            Origin::Base(_) => None,
            Origin::Adapter(adapter) => Some(AdapterTensor { adapter, info: new.source.clone() }),
        };
        let mut change = TensorChange { origin, updates: std::mem::take(&mut new.updates) };
        resolve(&new.name, &mut change, None);
        new.updates = change.updates;
    }
}

/// # Errors
/// In words, where an update is made of a whole weight of which other updates change or replace a part.
fn check_transforms(change: &TensorChange) -> Result<(), String> {
    let transforms = || change.updates.iter().filter(|update| update.kind == UpdateKind::Transform);
    if transforms().next().is_none() {
        return Ok(());
    }
    let replaces = |update: &Update| update.kind == UpdateKind::Replace;
    if change.origin.is_some() || change.updates.iter().any(replaces) {
        return Err(
            "is replaced by an adapter, and another update is made of the whole of the base's own; \
             merge them one after the other"
                .into(),
        );
    }
    // Pieces that have nothing in common are no matter to each other.
    let meets_in_part = |one: &Update, other: &Update| match (&one.slice.rows, &other.slice.rows) {
        (Some(one), Some(other)) => one != other && one.start < other.end && other.start < one.end,
        (one, other) => one != other,
    };
    if transforms().any(|own| change.updates.iter().any(|other| meets_in_part(own, other))) {
        return Err(
            "is changed by an update that is made of the whole weight, while some of its rows are \
             changed on their own; merge them one after the other"
                .into(),
        );
    }
    Ok(())
}

/// One after another, as PEFT merges: each from what those before it left.
fn in_stages(updates: &mut [Update]) {
    let mut stage = 0;
    for position in 1..updates.len() {
        let both_add = [&updates[position - 1], &updates[position]]
            .iter()
            .all(|update| !update.kind.is_override());
        stage += usize::from(!both_add);
        updates[position].stage = stage;
    }
}

/// Each adapter into what those before it left, and in itself as if it were alone. Neighbors that
/// only add are one stage: their order makes no difference, and the rounding is one.
fn one_after_another(updates: &mut Vec<Update>) {
    updates.sort_by_key(|update| update.adapter);
    let mut all = Vec::with_capacity(updates.len());
    let (mut stage, mut added) = (0, true);
    for own in updates.chunk_by(|left, right| left.adapter == right.adapter) {
        let mut own = own.to_vec();
        on_their_own(&mut own);
        let adds = own.iter().all(|update| !update.kind.is_override());
        let is_new = !(adds && added);
        stage += usize::from(is_new && !all.is_empty());
        added = adds;
        own.iter_mut().for_each(|update| update.stage = stage);
        all.append(&mut own);
    }
    *updates = all;
}

/// Each from W₀, or from the tensor that its own adapter puts in W₀'s place.
fn from_their_own(change: &mut TensorChange, base: Option<&TensorInfo>) -> Result<(), String> {
    let rescaling = |update: &Update| update.kind == UpdateKind::Dora;
    if let Some(origin) = &change.origin {
        let owner = origin.adapter;
        if change.updates.iter().filter(|update| rescaling(update)).all(|u| u.adapter == owner) {
            return Ok(());
        }
        // Another adapter's norms are those of the base's own tensor.
        if base.is_none_or(|base| base.shape != origin.info.shape) {
            return Err(
                "is replaced by one adapter and rescaled by another's DoRA, which was trained on \
                 the base's own; merge them one after the other"
                    .into(),
            );
        }
        let replacement = Update::new(owner, &origin.info.name, UpdateKind::Replace, 1.0);
        change.origin = None;
        change.updates.insert(0, replacement);
    }
    on_their_own(&mut change.updates);
    Ok(())
}

/// What is rescaled beside its adapter's own tensor for the same rows is made from that, and takes
/// W₀'s place in its stead.
fn on_their_own(updates: &mut Vec<Update>) {
    let rescaling = |update: &Update| update.kind == UpdateKind::Dora;
    let replaced: Vec<_> =
        updates.iter().filter(|update| update.kind == UpdateKind::Replace).cloned().collect();
    for replacement in replaced {
        let beside = |update: &Update| {
            update.adapter == replacement.adapter && update.slice.rows == replacement.slice.rows
        };
        let mut found = false;
        for update in updates.iter_mut() {
            if beside(update) && rescaling(update) {
                update.base_override = Some(replacement.module.clone());
                found = true;
            }
        }
        // The rescaled sum takes W₀'s place, not the replacement beside it.
        updates.retain(|update| !found || !beside(update) || update.kind != UpdateKind::Replace);
    }
}
