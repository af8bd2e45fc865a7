//! The map from an adapter's parameter names to the base's tensors, and to the slices in which the
//! base stores them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use crate::adapter::Adapter;
use crate::adapter::Expert;
use crate::checkpoint::names::canonical::Lie;
use crate::checkpoint::names::prefix::PrefixChange;
use crate::checkpoint::names::renames::{IndexedTensor, NameIndex, SliceIndex};

/// The one way from an adapter's names to the base's.
pub(super) struct NameMap<'a> {
    names: NameIndex<'a>,
    prefix: PrefixChange,
    /// By the last part of a parameter's name: the slices that the adapter's modules are.
    slices: RefCell<HashMap<String, AdapterSlices>>,
}

/// By the canonical name of a parameter: the modules that are slices of it, in the adapter's order.
type AdapterSlices = HashMap<String, Vec<AdapterSlice>>;

/// A module that is a slice of a parameter.
struct AdapterSlice {
    slot: usize,
    outputs: u64,
}

/// Where the base holds a parameter.
pub(super) enum ParameterLocation {
    /// In a tensor of its own.
    Tensor(String),
    /// In a tensor of its own, whose rows lie otherwise.
    Otherwise { tensor: String, lie: Lie },
    /// In slices, each a tensor.
    Slices(Vec<StoredSlice>),
    /// With others in one tensor, in whole rows of it.
    Rows { tensor: String, slice: SliceIndex },
}

/// A tensor that holds one slice of a parameter.
pub(super) struct StoredSlice {
    pub tensor: String,
    pub expert: Option<Expert>,
    /// The rows of the parameter that it holds, counted within its expert.
    pub rows: Range<u64>,
}

impl<'a> NameMap<'a> {
    /// From the canonical names, by what the two sides' leading parts differ in.
    pub fn new(names: NameIndex<'a>, prefix: PrefixChange) -> Self {
        Self { names, prefix, slices: RefCell::default() }
    }

    /// The base's name for a parameter; without one, the name that it would have.
    pub fn apply(&self, parameter: &str) -> Result<Option<String>, String> {
        if !self.names.are_renamed() {
            return Ok(self.prefix.apply(parameter));
        }
        match self.locate(parameter)? {
            Some(ParameterLocation::Tensor(name)) => Ok(Some(name)),
            None => Ok(self.prefix.apply(parameter)),
            Some(ParameterLocation::Otherwise { tensor, .. }) => Err(format!(
                "its {parameter} is {tensor} in the base with its rows in another order, which this \
                 cannot be brought to"
            )),
            Some(ParameterLocation::Slices(slices)) => Err(format!(
                "its {parameter} is stored in {} pieces in the base ({} and others), into which \
                 this cannot be cut; merge with PEFT",
                slices.len(),
                slices[0].tensor
            )),
            Some(ParameterLocation::Rows { tensor, .. }) => Err(format!(
                "its {parameter} is stored as a part of {tensor} in the base, which this cannot be \
                 made; merge with PEFT"
            )),
        }
    }

    /// In words, for the plan's notes.
    pub fn describe(&self) -> Vec<String> {
        let renamed = self.names.are_renamed().then(|| {
            "its names are those that transformers gives the model in memory, or gave it in an \
             earlier release; they were brought to the base's by the rules for its model type"
                .to_owned()
        });
        renamed.into_iter().chain(self.prefix.describe()).collect()
    }

    /// Whether the base has anything under a parameter's name.
    pub fn has(&self, parameter: &str) -> bool {
        let canonical = self.names.canonical(parameter).name;
        self.prefix.apply(&canonical).is_some_and(|name| self.names.has(&name))
    }

    /// The base's tensors that a parameter consists of, or is a part of, whatever their shapes.
    pub fn tensors_of(&self, parameter: &str) -> Vec<String> {
        let canonical = self.names.canonical(parameter).name;
        let Some(name) = self.prefix.apply(&canonical) else { return Vec::new() };
        self.names.tensors_of(&name)
    }

    /// Whether names are more than a leading part away from each other.
    pub fn is_renamed(&self) -> bool {
        self.names.are_renamed()
    }

    /// The outputs of those of an adapter's own modules that are the slices of a parameter, by slot.
    pub fn own_heights(
        &self,
        adapter: &Adapter,
        parameter: &str,
        slots: usize,
    ) -> Vec<Option<u64>> {
        let kind = parameter.rsplit('.').next().unwrap_or_default();
        let mut known = self.slices.borrow_mut();
        let slices = known.entry(kind.to_owned()).or_insert_with(|| {
            let mut slices = AdapterSlices::new();
            for module in adapter.modules().values() {
                let found = self.names.canonical(&format!("{}.{kind}", module.path));
                // Of a module of no product it may be unknown, which is 0.
                if let Some(slice) = found.slice.filter(|_| module.outputs() > 0) {
                    let slice = AdapterSlice { slot: slice.slot, outputs: module.outputs() };
                    slices.entry(found.name).or_default().push(slice);
                }
            }
            slices
        });
        let mut heights = vec![None; slots];
        let canonical = self.names.canonical(parameter).name;
        for slice in slices.get(&canonical).into_iter().flatten() {
            heights[slice.slot] = Some(slice.outputs);
        }
        heights
    }

    /// Where a parameter lies in a base whose names are not the adapter's.
    pub fn locate(&self, parameter: &str) -> Result<Option<ParameterLocation>, String> {
        let canonical = self.names.canonical(parameter);
        let Some(name) = self.prefix.apply(&canonical.name) else { return Ok(None) };
        let stored = self.names.stored(&name);
        let obstacles = stored.iter().filter_map(|one| one.obstacle.as_ref());
        if let Some(obstacle) = canonical.obstacle.iter().chain(obstacles).next() {
            return Err(format!("its {parameter} cannot be followed to the base: {obstacle}"));
        }
        let is_same = |one: &&IndexedTensor| match (&one.slice, &canonical.slice) {
            (None, None) => true,
            (Some(one), Some(other)) => (one.expert, one.slot) == (other.expert, other.slot),
            _ => false,
        };
        match (stored.iter().filter(is_same).collect::<Vec<_>>().as_slice(), stored) {
            ([one], _) if stored.len() == 1 || canonical.slice.is_some() => {
                let tensor = one.name.clone();
                // What is done twice is undone.
                let lie = match (one.lie, canonical.lie) {
                    (one, other) if one == other => Lie::Same,
                    (Lie::Same, lie) | (lie, _) => lie,
                };
                Ok(Some(match lie {
                    Lie::Same => ParameterLocation::Tensor(tensor),
                    lie => ParameterLocation::Otherwise { tensor, lie },
                }))
            }
            (_, []) => Ok(None),
            ([], [one]) if one.slice.is_none() => {
                let slice = canonical.slice.expect("else it is the same");
                Ok(Some(ParameterLocation::Rows { tensor: one.name.clone(), slice }))
            }
            ([], parts) if canonical.slice.is_none() => {
                let heights = self.names.heights(&name).ok_or_else(|| {
                    format!(
                        "its {parameter} is stored in pieces in the base ({} and others), which do \
                         not fit together",
                        parts[0].name
                    )
                })?;
                Ok(Some(ParameterLocation::Slices(slices(parts, &heights))))
            }
            _ => Err(format!(
                "its {parameter} can be {} tensors of the {} ({}), and nothing tells which",
                stored.len(),
                self.names.base().noun(),
                stored.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", ")
            )),
        }
    }
}

/// Which rows of a parameter each of the tensors that hold slices of it holds.
fn slices(stored: &[IndexedTensor], heights: &[u64]) -> Vec<StoredSlice> {
    let count = (stored.len() / heights.len()) as u64;
    let slice = |stored: &IndexedTensor| {
        let slice = stored.slice.as_ref()?;
        let start = heights[..slice.slot].iter().sum();
        Some(StoredSlice {
            tensor: stored.name.clone(),
            expert: slice.expert.map(|index| Expert { index, count }),
            rows: start..start + heights[slice.slot],
        })
    };
    stored.iter().filter_map(slice).collect()
}
