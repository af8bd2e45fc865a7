//! Which modules of several adapters are the same, whatever each calls them.
//!
//! An adapter names its modules after the model that was in memory: with the prefixes of the class
//! that was loaded, the wrappers of a trainer, the names of one release of transformers, experts one
//! by one or stacked. A merge brings names to those of the base. Without a base they are brought
//! together by rules ([`CommonNames`]), then by the one change of leading parts under which the
//! modules of two adapters are the same and have the same shapes. Where more than one would do, or
//! none, and nothing tells that the adapters change other modules of one model, they are not
//! comparable, which is not the same as having nothing in common.
//!
//! The alignment depends on all adapters, but for ties not on their order.

mod family;
mod layout;
mod parameter;

#[cfg(test)]
mod tests;

use std::cmp::Reverse;
use std::collections::HashMap;
use std::sync::Arc;

use indexmap::IndexMap;

pub use family::{Identity, Unit};
pub use layout::{Layout, Part, base_key};

use crate::checkpoint::names::common::{self, CommonName, CommonNames};
use crate::error::Result;
use crate::parallel::task::Task;
use family::{Change, Family, Joining};
use parameter::names_of;

/// What the names of heads begin with.
const HEADS: [&str; 6] =
    ["lm_head.", "score.", "classifier.", "qa_outputs.", "v_head.", "value_head."];

/// The names of adapters with one layout in their family.
#[derive(Debug, Clone, Default)]
pub struct MemberNames {
    /// The family: adapters in one can be compared.
    pub family: usize,
    /// What the adapters change, each under its name in the family.
    pub units: Vec<Unit>,
    change: Change,
    /// By the key of a module, its name in the family.
    modules: HashMap<String, String>,
}

impl MemberNames {
    /// The family's name of a module, by its key; the key of one that it does not have.
    pub fn of_module<'a>(&'a self, key: &'a str) -> &'a str {
        self.modules.get(key).map_or(key, String::as_str)
    }

    /// The family's name of a parameter that is no module's.
    pub fn of_parameter(&self, parameter: &str) -> String {
        let CommonName { full, bare, .. } = CommonNames::default().of(parameter);
        match &self.change {
            // A head stands beside the model that has a prefix.
            Change::Add(_) if HEADS.iter().any(|head| bare.starts_with(head)) => bare,
            change => common::without_containers(&change.apply(&full)).to_owned(),
        }
    }
}

/// The modules of several adapters under common names.
#[derive(Debug, Clone, Default)]
pub struct Alignment {
    /// Of each adapter, in the order given.
    pub members: Vec<Arc<MemberNames>>,
    /// What each unit is called by the first adapter that has it as it is.
    labels: HashMap<(usize, Identity), String>,
    /// Why the adapters of two families, the later one second, are not comparable.
    reasons: HashMap<(usize, usize), String>,
}

impl Alignment {
    /// Aligns adapters with these layouts.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`].
    pub fn of(layouts: &[&Layout], task: &Task) -> Result<Self> {
        let mut distinct = IndexMap::<&Layout, Vec<usize>>::new();
        for (position, layout) in layouts.iter().enumerate() {
            distinct.entry(layout).or_default().push(position);
        }
        let mut names = CommonNames::default();
        let mut named = Vec::with_capacity(distinct.len());
        for layout in distinct.keys() {
            task.check()?;
            named.push(names_of(layout, &mut names, task)?);
        }
        // What tells most comes first: names with dots, in the smallest pieces.
        let mut order: Vec<usize> = (0..distinct.len()).collect();
        order.sort_by_key(|place| {
            let (layout, named) = (distinct.get_index(*place).expect("a place").0, &named[*place]);
            let is_cut = named.iter().any(|one| one.name.slice.is_some());
            let is_stacked = layout.parts.iter().any(|part| part.expert.is_some());
            (layout.is_flattened, !is_cut, is_stacked, Reverse(layout.parts.len()))
        });
        let mut families: Vec<Family> = Vec::new();
        let mut reasons = HashMap::new();
        let mut joined: Vec<(usize, Joining)> = vec![<_>::default(); distinct.len()];
        for place in order {
            task.check()?;
            let (layout, named) = (distinct.get_index(place).expect("a place").0, &named[place]);
            let mut apart = Vec::new();
            let found = families.iter().enumerate().find_map(|(number, family)| {
                let joining = family.joining(layout, named);
                joining.map_err(|reason| apart.push(reason)).ok().map(|joining| (number, joining))
            });
            let (number, joining) = found.unwrap_or_else(|| {
                let number = families.len();
                reasons
                    .extend(apart.drain(..).enumerate().map(|(other, why)| ((other, number), why)));
                families.push(Family::founded_by(layout));
                (number, Joining::default())
            });
            families[number].add(layout, named, &joining);
            joined[place] = (number, joining);
        }
        let mut members = vec![Arc::default(); layouts.len()];
        for (place, (layout, positions)) in distinct.iter().enumerate() {
            task.check()?;
            let (family, joining) = &joined[place];
            let units = families[*family].units(layout, &named[place], joining);
            let module =
                |unit: &Unit| (layout.parts[unit.part].key.clone(), unit.identity.name.clone());
            let modules = units.iter().map(module).collect();
            let change = joining.change.clone();
            let names = Arc::new(MemberNames { family: *family, units, change, modules });
            for position in positions {
                members[*position] = Arc::clone(&names);
            }
        }
        let mut labels = HashMap::new();
        for (layout, positions) in &distinct {
            let names: &Arc<MemberNames> = &members[positions[0]];
            for unit in names.units.iter().filter(|unit| unit.outputs.is_none()) {
                let label = || layout.parts[unit.part].name.clone();
                labels.entry((names.family, unit.identity.clone())).or_insert_with(label);
            }
        }
        Ok(Self { members, labels, reasons })
    }

    /// What a unit of one of the adapters is called: by the first adapter that has it as it is.
    pub fn label(&self, family: usize, identity: &Identity) -> String {
        self.labels.get(&(family, identity.clone())).cloned().unwrap_or_else(|| {
            let Identity { name, expert, slot } = identity;
            let expert = expert.map_or_else(String::new, |expert| format!("[{expert}]"));
            format!("{name}{expert}, part {}", slot + 1)
        })
    }

    /// Why two adapters are not comparable, in words; `None` where they are.
    pub fn reason(&self, x: usize, y: usize) -> Option<&str> {
        let (x, y) = (self.members[x].family, self.members[y].family);
        (x != y).then(|| {
            let reason = self.reasons.get(&(x.min(y), x.max(y)));
            reason.map_or("no module of the one is known to be one of the other", String::as_str)
        })
    }
}
