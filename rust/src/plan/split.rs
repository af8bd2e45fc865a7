//! Parts of a plan: groups of shards that can be written apart, by processes that plan again and
//! hold the digests of their plans against each other.

use std::collections::HashMap;

use sha2::{Digest, Sha256};

use super::{Action, Inputs, Plan, PlannedShard, PlannedTensor};
use crate::error::{Error, Result};
use crate::storage::digest::hexadecimal;

/// Raised whenever the same plan would be carried out to other bytes.
const VERSION: &str = "lorafast plan 3";

impl PlannedTensor {
    /// All that decides its bytes but the updates and what is read, in one line.
    pub(crate) fn recipe(&self) -> String {
        let action = match &self.action {
            // Their settings are no update's.
            Action::MergeEntries(merge) => {
                format!("{:?} {} {}", merge.method, merge.seed, merge.adapters)
            }
            action => action.name().to_owned(),
        };
        let quantized = self.quantized.as_ref().map(|quantized| &quantized.scheme);
        format!(
            "{:?} {:?} {:?} {} {:?} {action} {quantized:?} {} {:?}",
            self.name,
            self.origin,
            self.source,
            self.output_dtype,
            self.target,
            self.requantized,
            self.precision
        )
    }
}

impl Plan {
    /// The SHA-256, in hexadecimal, of all that decides the output's weights: every action, and what
    /// the inputs are (of the base its headers and its config, of adapters their whole content).
    ///
    /// # Errors
    /// [`Error::Adapter`] if an adapter changed meanwhile, [`Error::Io`].
    pub fn digest(&self, inputs: &Inputs) -> Result<String> {
        let mut hasher = Sha256::new();
        let mut add = |part: &[u8]| {
            hasher.update((part.len() as u64).to_le_bytes());
            hasher.update(part);
        };
        add(VERSION.as_bytes());
        add(env!("CARGO_PKG_VERSION").as_bytes());
        for shard in inputs.base.shards() {
            add(shard.name.as_bytes());
            add(&shard.file.size().to_le_bytes());
            add(shard.file.header_bytes());
        }
        let configs = inputs.base.configs();
        match configs.as_slice() {
            [] => add(&[]),
            configs => configs.iter().for_each(|(_, (_, bytes), _)| add(bytes)),
        }
        for adapter in &inputs.adapters {
            add(adapter.identity()?.as_bytes());
        }
        for shard in &self.shards {
            add(shard.name.as_bytes());
            add(&shard.header);
            for tensor in &shard.tensors {
                add(tensor.recipe().as_bytes());
                add(&json(tensor.updates()));
            }
        }
        add(&json(&self.config_changes));
        Ok(hexadecimal(&hasher.finalize()))
    }

    /// The positions of the shards in groups that have nothing to do with each other, in order: the
    /// scales of a weight that is quantized again may lie in another shard than the weight.
    pub fn groups(&self) -> Vec<Vec<usize>> {
        let mut shard_of = HashMap::<&str, usize>::new();
        for (position, shard) in self.shards.iter().enumerate() {
            shard_of.extend(shard.tensors.iter().map(|tensor| (tensor.name.as_str(), position)));
        }
        // The first shard of each one's group.
        let mut group: Vec<usize> = (0..self.shards.len()).collect();
        for (position, shard) in self.shards.iter().enumerate() {
            let requantized = shard.tensors.iter().filter(|tensor| tensor.requantized);
            let scales = requantized.filter_map(|tensor| tensor.quantized.as_ref());
            for scale in scales.flat_map(|quantized| quantized.scales.tensors()) {
                let Some(&other) = shard_of.get(scale.tensor.name.as_str()) else { continue };
                let (one, other) = (group[position], group[other]);
                let (first, joined) = (one.min(other), one.max(other));
                group.iter_mut().filter(|of| **of == joined).for_each(|of| *of = first);
            }
        }
        let mut groups = Vec::<Vec<usize>>::new();
        for first in 0..self.shards.len() {
            let members: Vec<usize> =
                (0..self.shards.len()).filter(|shard| group[*shard] == first).collect();
            if !members.is_empty() {
                groups.push(members);
            }
        }
        groups
    }

    /// The same plan with these shards alone.
    ///
    /// # Errors
    /// [`Error::Argument`] for a shard that the plan does not have, or a group that is cut.
    pub fn restricted_to(&self, shards: &[usize]) -> Result<Self> {
        let whole = self.groups().into_iter().all(|group| {
            let inside = group.iter().filter(|shard| shards.contains(shard)).count();
            inside == 0 || inside == group.len()
        });
        if shards.iter().any(|shard| *shard >= self.shards.len()) || !whole {
            return Err(Error::Argument(format!(
                "the shards {shards:?} are no groups of this plan's {} shards",
                self.shards.len()
            )));
        }
        let chosen: Vec<PlannedShard> =
            shards.iter().map(|shard| self.shards[*shard].clone()).collect();
        Ok(Self { shards: chosen, ..self.clone() })
    }
}

fn json(value: &(impl serde::Serialize + ?Sized)) -> Vec<u8> {
    serde_json::to_vec(value).expect("plain data")
}
