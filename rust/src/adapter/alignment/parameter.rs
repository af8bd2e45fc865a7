//! The products of adapters by the names of their parameters, and how one lies on what others have
//! of a parameter: as it stands, transposed, or cut into parts.

use std::collections::HashSet;
use std::ops::Range;

use super::family::Identity;
use super::layout::{Layout, Part};
use crate::adapter::grammar;
use crate::checkpoint::names::common::{self, CommonName, CommonNames};
use crate::checkpoint::names::renames::SliceIndex;
use crate::error::Result;
use crate::parallel::task::Task;

/// A part's name and shape.
#[derive(Debug, Clone)]
pub(super) struct Named {
    pub name: CommonName,
    expert: Option<u64>,
    pub shape: [u64; 2],
    /// Whether its factors hold those of all experts, which may lie either way.
    is_stacked: bool,
    transposes: Option<bool>,
    is_by_tokens: Option<bool>,
}

impl Named {
    pub fn slots(&self) -> usize {
        self.name.slice.as_ref().map_or(1, |slice| slice.slots)
    }

    pub fn slot(&self) -> usize {
        self.name.slice.as_ref().map_or(0, |slice| slice.slot)
    }

    pub fn identity(&self, bare: &str) -> Identity {
        Identity { name: bare.to_owned(), expert: self.expert, slot: self.slot() }
    }
}

/// The common names of a layout's parts, in its order: those of all families, or where two of its
/// parts would have the same one, the names as they stand.
///
/// # Errors
/// [`crate::Error::Cancelled`].
pub(super) fn names_of(
    layout: &Layout,
    names: &mut CommonNames,
    task: &Task,
) -> Result<Vec<Named>> {
    let mut of = |part: &Part, is_plain: bool| {
        let name = match &part.parameter {
            Some(key) if layout.is_flattened && !is_plain => CommonName {
                bare: grammar::without_container(key).to_owned(),
                ..common::as_it_stands(key)
            },
            Some(parameter) if !is_plain => names.of(parameter),
            Some(parameter) => common::as_it_stands(parameter),
            None => common::as_it_stands(&part.key),
        };
        let stacked = part.expert.filter(|_| !part.is_of_one_expert);
        let of_name = name.slice.as_ref().and_then(|slice| slice.expert);
        Named {
            expert: stacked.map_or(of_name, |expert| Some(expert.index)),
            shape: part.shape,
            is_stacked: stacked.is_some(),
            transposes: layout.transposes_experts,
            is_by_tokens: part.is_by_tokens,
            name,
        }
    };
    let mut named = Vec::with_capacity(layout.parts.len());
    for part in &layout.parts {
        task.check()?;
        named.push(of(part, false));
    }
    let mut seen = HashSet::new();
    if named.iter().all(|one| seen.insert(one.identity(&one.name.bare))) {
        return Ok(named);
    }
    Ok(layout.parts.iter().map(|part| of(part, true)).collect())
}

/// A parameter that adapters of a family change.
#[derive(Debug, Clone)]
pub(super) struct Parameter {
    /// The shape of each of the parts that lie below one another, as far as an adapter has it.
    pub slots: Vec<Option<[u64; 2]>>,
    /// Whether the parts are of one size.
    is_equal: bool,
    is_stacked: bool,
    transposes: Option<bool>,
    is_by_tokens: Option<bool>,
}

/// How a product lies on what a family calls by its name.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub(super) struct Lie {
    pub is_transposed: bool,
    /// The outputs of each slot of the product, once it is transposed, where it is cut into them.
    pub cuts: Vec<Range<u64>>,
}

/// Why a product does not lie on what a family calls by its name.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Misfit {
    /// It has another shape.
    Shape,
    /// It could lie in more than one way.
    Unknown,
}

impl Parameter {
    pub fn of(named: &Named) -> Self {
        let mut slots = vec![None; named.slots()];
        slots[named.slot()] = Some(named.shape);
        let is_equal = named.name.slice.as_ref().is_some_and(SliceIndex::are_equal);
        let (is_stacked, transposes) = (named.is_stacked, named.transposes);
        let is_by_tokens = named.is_by_tokens;
        Self { slots, is_equal, is_stacked, transposes, is_by_tokens }
    }

    /// Outputs of each slot, and the inputs that they have in common; `None` where one is unknown.
    fn heights(&self) -> Option<(Vec<u64>, u64)> {
        let [height, inputs] = *self.slots.iter().flatten().next()?;
        if self.slots.iter().flatten().any(|shape| shape[1] != inputs) {
            return None;
        }
        let known = |shape: &Option<[u64; 2]>| match shape {
            Some([outputs, _]) => Some(*outputs),
            None => self.is_equal.then_some(height),
        };
        Some((self.slots.iter().map(known).collect::<Option<_>>()?, inputs))
    }

    /// Whether a product is that of an embedding which the family has the other way: one is the transpose of
    /// the weight, and the other the weight, as a format has it that knows no embeddings or has them by
    /// tokens.
    fn lies_across(&self, named: &Named) -> bool {
        let is_of_width = |by_tokens: Option<bool>| by_tokens == Some(false);
        let is_embedding = self.is_by_tokens.is_some() || named.is_by_tokens.is_some();
        is_embedding && is_of_width(self.is_by_tokens) != is_of_width(named.is_by_tokens)
    }

    pub fn lie(&self, named: &Named) -> Result<Lie, Misfit> {
        let straight = Lie::default();
        let [outputs, inputs] = named.shape;
        if named.slots() == self.slots.len() {
            let Some(shape) = self.slots[named.slot()] else { return Ok(straight) };
            let may_turn = named.slots() == 1 && (named.is_stacked || self.is_stacked);
            let fits = [shape == named.shape, may_turn && shape == [inputs, outputs]];
            let turned = Lie { is_transposed: true, cuts: Vec::new() };
            if self.lies_across(named) {
                return match shape == [inputs, outputs] {
                    true => Ok(turned),
                    false => Err(Misfit::Shape),
                };
            }
            return match fits {
                [false, false] => Err(Misfit::Shape),
                [true, false] => Ok(straight),
                [false, true] => Ok(turned),
                [true, true] if named.is_stacked && self.is_stacked => {
                    // Both may lie either way, and lie alike if one release laid them.
                    let alike = named.transposes == self.transposes;
                    if alike { Ok(straight) } else { Err(Misfit::Unknown) }
                }
                [true, true] => match named.transposes.filter(|_| named.is_stacked) {
                    Some(true) => Ok(turned),
                    Some(false) => Ok(straight),
                    None => Err(Misfit::Unknown),
                },
            };
        }
        let Some((heights, width)) = self.heights().filter(|_| named.slots() == 1) else {
            return Err(Misfit::Unknown);
        };
        let height: u64 = heights.iter().sum();
        let fits = [
            (outputs, inputs) == (height, width),
            named.is_stacked && (inputs, outputs) == (height, width),
        ];
        let is_transposed = match fits {
            [false, false] => return Err(Misfit::Shape),
            [true, true] => named.transposes.ok_or(Misfit::Unknown)?,
            [_, is_transposed] => is_transposed,
        };
        let mut end = 0;
        let cut = |height: u64| {
            end += height;
            end - height..end
        };
        Ok(Lie { is_transposed, cuts: heights.into_iter().map(cut).collect() })
    }
}
