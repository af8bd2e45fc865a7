//! What differs between two views of one base: the tensors that are made in another way.

use std::collections::HashMap;

use super::View;
use crate::error::Result;
use crate::execute::session::TensorId;
use crate::plan::{Action, Origin, PlannedTensor};

/// A tensor that is not what it was.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Difference {
    /// Its name, in this view or in the other.
    pub name: String,
    /// The tensor of this view.
    pub id: TensorId,
}

impl View {
    /// The tensors that are made in another way than in another view: what adapters change here, or
    /// changed there. One that only the other has, such as a head that is tied again, is the tensor
    /// here that it began as; if it began as none of the base's, it is left out.
    ///
    /// # Errors
    /// That an adapter changed meanwhile, [`crate::Error::Io`].
    pub fn differences(&self, other: &Self) -> Result<Vec<Difference>> {
        let (ours, theirs) = (self.identities()?, other.identities()?);
        let mut differences = Vec::new();
        for id in &self.order {
            let name = &self.tensor(*id).name;
            let same = other
                .find(name)
                .is_some_and(|there| self.recipe(*id, &ours) == other.recipe(there, &theirs));
            if !same {
                differences.push(Difference { name: name.clone(), id: *id });
            }
        }
        let mut of_base = HashMap::new();
        for id in &self.order {
            let tensor = self.tensor(*id);
            if matches!(tensor.origin, Origin::Base(_)) && tensor.name == tensor.source.name {
                of_base.insert(&tensor.source.name, *id);
            }
        }
        for id in &other.order {
            let tensor = other.tensor(*id);
            if self.find(&tensor.name).is_none()
                && matches!(tensor.origin, Origin::Base(_))
                && let Some(id) = of_base.get(&tensor.source.name)
            {
                differences.push(Difference { name: tensor.name.clone(), id: *id });
            }
        }
        Ok(differences)
    }

    /// What tells the base's shards, and the adapters, from others.
    fn identities(&self) -> Result<Identities> {
        let shards = self.inputs.base.shards().iter();
        Ok(Identities {
            shards: shards
                .map(|shard| format!("{} {:?}", shard.name, shard.file.stamp()))
                .collect(),
            adapters: (self.inputs.adapters.iter())
                .map(|adapter| adapter.identity())
                .collect::<Result<_>>()?,
        })
    }

    /// All that decides a tensor's bytes.
    fn recipe(&self, id: TensorId, identities: &Identities) -> String {
        let tensor = self.tensor(id);
        let weight = self.owners.get(&id).map(|owner| self.tensor(*owner));
        let own = recipe(tensor, identities);
        weight.map_or(own.clone(), |weight| format!("{own} {}", recipe(weight, identities)))
    }
}

struct Identities {
    shards: Vec<String>,
    adapters: Vec<String>,
}

fn recipe(tensor: &PlannedTensor, identities: &Identities) -> String {
    let origin = match tensor.origin {
        Origin::Base(shard) => &identities.shards[shard],
        Origin::Adapter(adapter) => &identities.adapters[adapter],
    };
    let updates: Vec<_> = (tensor.updates().iter())
        .map(|update| {
            let adapter = &identities.adapters[update.adapter];
            let mut update = serde_json::to_value(update).expect("plain data");
            // Whose it is, whatever its position.
            update["adapter"] = adapter.as_str().into();
            update
        })
        .collect();
    let method = match &tensor.action {
        // Random masks depend on the positions.
        Action::MergeEntries(merge) => {
            let positions: Vec<_> = merge.updates.iter().map(|update| update.adapter).collect();
            format!("{:?} {} {} {positions:?}", merge.method, merge.seed, merge.adapters)
        }
        _ => String::new(),
    };
    format!(
        "{origin} {:?} {} {} {} {} {method}",
        tensor.source,
        tensor.output_dtype,
        tensor.requantized,
        tensor.action.name(),
        serde_json::to_string(&updates).expect("plain data"),
    )
}
