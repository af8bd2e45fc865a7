//! What a plan makes of each config field and each tensor of its adapters.

use std::collections::{HashMap, HashSet};

use super::planner::Planner;
use super::{Inputs, Origin, PlannedShard, Update, UpdateKind};
use crate::adapter::{Accounts, Adapter, Verdict};

/// A tensor that turned out not to be needed, and why.
#[derive(Debug, Clone)]
pub(super) struct Waived {
    adapter: usize,
    tensor: String,
    reason: String,
}

impl Planner<'_> {
    /// Notes that a tensor of an adapter is not needed.
    pub(super) fn waive(&mut self, adapter: usize, tensor: &str, reason: impl Into<String>) {
        let (tensor, reason) = (tensor.to_owned(), reason.into());
        self.waived.push(Waived { adapter, tensor, reason });
    }

    /// Notes the same of all that an update is made from.
    pub(super) fn waive_update(&mut self, update: &Update, reason: &str) {
        let adapter = self.inputs.adapters[update.adapter].clone();
        for tensor in tensors_of(&adapter, update) {
            self.waive(update.adapter, tensor, reason);
        }
    }
}

/// The names of an adapter's tensors that an update is made from.
fn tensors_of<'a>(adapter: &'a Adapter, update: &'a Update) -> Vec<&'a str> {
    if update.kind == UpdateKind::Replace {
        return vec![&update.module];
    }
    let Some(module) = adapter.modules().get(&update.module) else { return Vec::new() };
    if update.kind == UpdateKind::Vector {
        return module.bias.iter().map(|tensor| tensor.name.as_str()).collect();
    }
    let factors = module.product_tensors().into_iter().map(|(_, tensor)| tensor);
    let tensors = factors.chain(&module.magnitude);
    tensors.map(|tensor| tensor.name.as_str()).chain(update.on.as_deref()).collect()
}

/// Every adapter's account: a tensor counts as used where some tensor of the output is made from it,
/// and not otherwise.
pub(super) fn settle(
    inputs: &Inputs,
    allow: &[String],
    shards: &[PlannedShard],
    waived: &[Waived],
) -> Vec<Accounts> {
    let mut used = HashSet::<(usize, &str)>::new();
    for tensor in shards.iter().flat_map(|shard| &shard.tensors) {
        if let Origin::Adapter(adapter) = tensor.origin {
            used.insert((adapter, &tensor.source.name));
        }
        for update in tensor.updates() {
            let names = tensors_of(&inputs.adapters[update.adapter], update);
            used.extend(names.into_iter().map(|name| (update.adapter, name)));
        }
    }
    let mut reasons = HashMap::<(usize, &str), &str>::new();
    for waived in waived {
        reasons.entry((waived.adapter, &waived.tensor)).or_insert(&waived.reason);
    }
    let account = |(position, adapter): (usize, &std::sync::Arc<Adapter>)| {
        let mut accounts = adapter.account(allow);
        for account in &mut accounts.tensors {
            if account.verdict != Verdict::Used || used.contains(&(position, &account.name)) {
                continue;
            }
            let known = reasons.get(&(position, account.name.as_str())).copied();
            account.verdict = Verdict::NotNeeded;
            account.reason = known.unwrap_or("the result is the same without it").to_owned();
        }
        accounts
    };
    inputs.adapters.iter().enumerate().map(account).collect()
}
