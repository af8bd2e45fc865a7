//! What updates that do more than add are made from, where something else changes the same tensor.

use super::planner::{Addition, Planner, TensorChange};
use super::{Compat, Origin, Part, Strategy, Update, UpdateKind};
use crate::tensor::safetensors::TensorInfo;

impl Planner<'_> {
    /// Says of every tensor what each of its updates is made from.
    pub(super) fn settle_rescaling(&mut self, additions: &mut [Addition]) {
        let sequential = self.options.strategy == Strategy::Sequential;
        let staged = self.options.compat == Some(Compat::Peft) && sequential;
        let mut problems = Vec::new();
        let mut settle = |name: &str, change: &mut TensorChange, base: Option<&TensorInfo>| {
            if !change.updates.iter().any(|update| update.kind == UpdateKind::Dora) {
                if sequential && change.updates.iter().any(|update| update.kind.takes_the_place()) {
                    one_after_another(&mut change.updates);
                }
                return;
            }
            let in_part = |update: &Update| update.part.rows.is_some();
            let over_rows = |update: &Update| update.kind == UpdateKind::Dora && update.transposed;
            if change.updates.iter().any(over_rows) && change.updates.iter().any(in_part) {
                problems.push(format!(
                    "{name} is rescaled by DoRA, whose norms run over all of its rows, while some \
                     of them are changed on their own; merge them one after the other"
                ));
            } else if staged {
                in_stages(&mut change.updates);
            } else if sequential {
                one_after_another(&mut change.updates);
            } else if let Err(problem) = from_their_own(change, base) {
                problems.push(format!("{name} {problem}"));
            }
        };
        for (name, change) in &mut self.tensors {
            settle(name, change, self.base.tensor(name));
        }
        for addition in additions {
            let origin = match addition.origin {
                Origin::Base(_) => None,
                Origin::Adapter(adapter) => Some((adapter, addition.source.clone())),
            };
            let mut change =
                TensorChange { origin, updates: std::mem::take(&mut addition.updates) };
            settle(&addition.name, &mut change, None);
            addition.updates = change.updates;
        }
        self.problems.extend(problems);
    }
}

/// One after another, as PEFT merges: each from what those before it left.
fn in_stages(updates: &mut [Update]) {
    let mut stage = 0;
    for position in 1..updates.len() {
        let both_add = [&updates[position - 1], &updates[position]]
            .iter()
            .all(|update| !update.kind.takes_the_place());
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
        let adds = own.iter().all(|update| !update.kind.takes_the_place());
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
    if let Some((owner, source)) = &change.origin {
        let owner = *owner;
        if change.updates.iter().filter(|update| rescaling(update)).all(|u| u.adapter == owner) {
            return Ok(());
        }
        // Another adapter's norms are those of the base's own tensor.
        if base.is_none_or(|base| base.shape != source.shape) {
            return Err(
                "is replaced by one adapter and rescaled by another's DoRA, which was trained on \
                 the base's own; merge them one after the other"
                    .into(),
            );
        }
        let replacement = Update {
            adapter: owner,
            module: source.name.clone(),
            kind: UpdateKind::Replace,
            rank: 0,
            scale: 1.0,
            weight: 1.0,
            transposed: false,
            part: Part::default(),
            on: None,
            residual: None,
            stage: 0,
        };
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
            update.adapter == replacement.adapter && update.part.rows == replacement.part.rows
        };
        let mut found = false;
        for update in updates.iter_mut() {
            if beside(update) && rescaling(update) {
                update.on = Some(replacement.module.clone());
                found = true;
            }
        }
        // The rescaled sum takes W₀'s place, not the replacement beside it.
        updates.retain(|update| !found || !beside(update) || update.kind != UpdateKind::Replace);
    }
}
