//! Groups of adapters that belong to one base.

use std::collections::HashMap;

use serde::Serialize;

use super::collection::Collection;
use crate::adapter::alignment::{Identity, base_key};

/// Adapters that can be compared: what they update has the same shapes, and their configs name
/// the same base.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Group {
    /// The base, as the first member names it; of a group that names none, or of a second group of
    /// one base, in words.
    pub base: String,
    /// Positions of the members, ascending.
    pub members: Vec<usize>,
}

/// What is known of a group while it grows.
struct Growing {
    key: Option<String>,
    base: Option<String>,
    shapes: HashMap<(usize, Identity), (usize, usize)>,
    members: Vec<usize>,
}

impl Collection {
    /// Sorts the adapters by their base. A base is known by the last part of its name, whatever
    /// its case, so that a local copy is taken for what it is a copy of; adapters whose modules
    /// clash in shape are apart, whatever they say. Adapters that name no base belong to the
    /// only base there is, where their shapes allow it. With `by_shape_alone` names do not count.
    pub fn groups(&self, by_shape_alone: bool) -> Vec<Group> {
        let mut groups: Vec<Growing> = Vec::new();
        let keys: Vec<Option<String>> = (self.members.iter())
            .map(|member| member.base().filter(|_| !by_shape_alone).map(base_key))
            .collect();
        let mut named: Vec<&String> = keys.iter().flatten().collect();
        named.sort_unstable();
        named.dedup();
        let only = if let [only] = named[..] { Some(only.clone()) } else { None };
        for (position, member) in self.members.iter().enumerate() {
            let key = keys[position].clone().or_else(|| only.clone());
            let fitting = groups
                .iter()
                .position(|group| group.key == key && self.fits(&group.shapes, position));
            let index = fitting.unwrap_or_else(|| {
                let (base, shapes) = (None, HashMap::new());
                groups.push(Growing { key, base, shapes, members: Vec::new() });
                groups.len() - 1
            });
            let group = &mut groups[index];
            group.members.push(position);
            if group.base.is_none() {
                group.base = member.base().map(str::to_owned);
            }
            for piece in &member.pieces {
                let module = &self.modules[piece.module];
                let identity = self.identities[piece.module].clone();
                group.shapes.insert(identity, (module.rows, module.columns));
            }
        }
        let mut taken = HashMap::<String, usize>::new();
        let label = |group: Growing| {
            let base = group.base.unwrap_or_else(|| "no base named".to_owned());
            let count = taken.entry(base.clone()).and_modify(|count| *count += 1).or_insert(1);
            let base = if *count > 1 { format!("{base}, shapes {count}") } else { base };
            Group { base, members: group.members }
        };
        groups.into_iter().map(label).collect()
    }

    fn fits(&self, shapes: &HashMap<(usize, Identity), (usize, usize)>, member: usize) -> bool {
        self.members[member].pieces.iter().all(|piece| {
            let module = &self.modules[piece.module];
            let known = shapes.get(&self.identities[piece.module]);
            known.is_none_or(|known| *known == (module.rows, module.columns))
        })
    }
}
