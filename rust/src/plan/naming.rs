//! How an adapter's parameters are called in the base, and in which pieces the base stores them.

use std::cell::RefCell;
use std::collections::HashMap;
use std::ops::Range;

use indexmap::IndexMap;

use super::planner::Planner;
use super::targets::{self, Target};
use crate::adapter::Adapter;
use crate::adapter::Expert;
use crate::checkpoint::names::prefix::{self, Mapping};
use crate::checkpoint::names::renames::{Names, Piece, Renames, Stored};
use crate::error::Result;

/// The one way from an adapter's names to the base's.
pub(super) struct Naming<'a> {
    names: Names<'a>,
    mapping: Mapping,
    /// By the last part of a parameter's name: the pieces that the adapter's modules are.
    pieces: RefCell<HashMap<String, OwnPieces>>,
}

/// By the canonical name of a parameter: the slot and the outputs of each module that is a piece of
/// it, in the adapter's order.
type OwnPieces = HashMap<String, Vec<(usize, u64)>>;

/// An adapter's targets under a naming, and what fits nothing.
pub(super) struct Named<'a> {
    pub naming: Naming<'a>,
    pub targets: IndexMap<String, Target>,
    pub problems: Vec<String>,
    /// Saved parameters that the base does not have, which is not wrong in itself.
    unknown: usize,
    /// Modules of which the base has nothing by their names.
    strangers: usize,
}

impl Named<'_> {
    /// How much does not fit; of two that are equal in that, the one that knows the names can say
    /// more.
    fn misfits(&self) -> (usize, usize) {
        (self.problems.len() + self.unknown, self.strangers)
    }

    pub fn fits(&self) -> bool {
        self.problems.len() + self.unknown == 0
    }
}

/// Where the base holds a parameter.
pub(super) enum Placing {
    /// In a tensor of its own.
    Whole(String),
    /// In pieces, each a tensor.
    Slices(Vec<Slice>),
    /// With others in one tensor, in whole rows of it.
    Band { tensor: String, piece: Piece },
}

/// A tensor that holds one piece of a parameter.
pub(super) struct Slice {
    pub tensor: String,
    pub expert: Option<Expert>,
    /// The rows of the parameter that it holds, counted within its expert.
    pub rows: Range<u64>,
}

impl Naming<'_> {
    /// The base's name for a parameter; without one, the name that it would have.
    pub fn apply(&self, parameter: &str) -> Result<Option<String>, String> {
        if !self.names.are_renamed() {
            return Ok(self.mapping.apply(parameter));
        }
        match self.place(parameter)? {
            Some(Placing::Whole(name)) => Ok(Some(name)),
            None => Ok(self.mapping.apply(parameter)),
            Some(Placing::Slices(slices)) => Err(format!(
                "its {parameter} is stored in {} pieces in the base ({} and others), into which \
                 this cannot be cut; merge with PEFT",
                slices.len(),
                slices[0].tensor
            )),
            Some(Placing::Band { tensor, .. }) => Err(format!(
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
        renamed.into_iter().chain(self.mapping.describe()).collect()
    }

    /// Whether the base has anything under a parameter's name.
    fn has(&self, parameter: &str) -> bool {
        let canonical = self.names.canonical(parameter).name;
        self.mapping.apply(&canonical).is_some_and(|name| self.names.has(&name))
    }

    /// Whether names are more than a leading part away from each other.
    pub fn is_renamed(&self) -> bool {
        self.names.are_renamed()
    }

    /// The outputs of those of an adapter's own modules that are the pieces of a parameter, by slot.
    pub fn own_heights(
        &self,
        adapter: &Adapter,
        parameter: &str,
        slots: usize,
    ) -> Vec<Option<u64>> {
        let kind = parameter.rsplit('.').next().unwrap_or_default();
        let mut pieces = self.pieces.borrow_mut();
        let pieces = pieces.entry(kind.to_owned()).or_insert_with(|| {
            let mut pieces = OwnPieces::new();
            for module in adapter.modules().values() {
                let found = self.names.canonical(&format!("{}.{kind}", module.path));
                if let Some(piece) = found.piece {
                    pieces.entry(found.name).or_default().push((piece.slot, module.outputs()));
                }
            }
            pieces
        });
        let mut heights = vec![None; slots];
        for (slot, outputs) in
            pieces.get(&self.names.canonical(parameter).name).into_iter().flatten()
        {
            heights[*slot] = Some(*outputs);
        }
        heights
    }

    /// Where a parameter lies in a base whose names are not the adapter's.
    pub fn place(&self, parameter: &str) -> Result<Option<Placing>, String> {
        let canonical = self.names.canonical(parameter);
        let Some(name) = self.mapping.apply(&canonical.name) else { return Ok(None) };
        let stored = self.names.stored(&name);
        let obstacles = stored.iter().filter_map(|one| one.obstacle.as_ref());
        if let Some(obstacle) = canonical.obstacle.iter().chain(obstacles).next() {
            return Err(format!("its {parameter} cannot be followed to the base: {obstacle}"));
        }
        let is_same = |one: &&Stored| match (&one.piece, &canonical.piece) {
            (None, None) => true,
            (Some(one), Some(other)) => (one.expert, one.slot) == (other.expert, other.slot),
            _ => false,
        };
        match (stored.iter().filter(is_same).collect::<Vec<_>>().as_slice(), stored) {
            ([one], _) if stored.len() == 1 || canonical.piece.is_some() => {
                Ok(Some(Placing::Whole(one.name.clone())))
            }
            (_, []) => Ok(None),
            ([], [one]) if one.piece.is_none() => {
                let piece = canonical.piece.expect("else it is the same");
                Ok(Some(Placing::Band { tensor: one.name.clone(), piece }))
            }
            ([], pieces) if canonical.piece.is_none() => {
                let heights = self.names.heights(&name).ok_or_else(|| {
                    format!(
                        "its {parameter} is stored in pieces in the base ({} and others), which do \
                         not fit together",
                        pieces[0].name
                    )
                })?;
                Ok(Some(Placing::Slices(slices(pieces, &heights))))
            }
            _ => Err(format!(
                "its {parameter} can be {} tensors of the base ({}), and nothing tells which",
                stored.len(),
                stored.iter().map(|one| one.name.as_str()).collect::<Vec<_>>().join(", ")
            )),
        }
    }
}

/// Which rows of a parameter each of its pieces holds.
fn slices(pieces: &[Stored], heights: &[u64]) -> Vec<Slice> {
    let count = (pieces.len() / heights.len()) as u64;
    let slice = |stored: &Stored| {
        let piece = stored.piece.as_ref()?;
        let start = heights[..piece.slot].iter().sum();
        Some(Slice {
            tensor: stored.name.clone(),
            expert: piece.expert.map(|index| Expert { index, count }),
            rows: start..start + heights[piece.slot],
        })
    };
    pieces.iter().filter_map(slice).collect()
}

impl<'a> Planner<'a> {
    /// Finds how an adapter's names fit the base: as they stand, but for a leading part, or else by
    /// the rules for the base's model type.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`], and [`crate::Error::Adapter`] for patterns of the config that
    /// take too many steps.
    pub(super) fn name(&self, adapter: &Adapter) -> Result<Named<'a>> {
        let plain = self.try_names(adapter, Names::plain(self.base))?;
        if plain.fits() {
            return Ok(plain);
        }
        let given = self.options.renames.clone();
        let Some(renames) = given.or_else(|| Renames::built_in(self.base)) else {
            return Ok(plain);
        };
        let renamed = self.try_names(adapter, Names::renamed(self.base, renames, self.task)?)?;
        Ok(if renamed.misfits() < plain.misfits() { renamed } else { plain })
    }

    fn try_names(&self, adapter: &Adapter, names: Names<'a>) -> Result<Named<'a>> {
        let layout = self.options.expert_layout;
        let (targets, mut problems) = targets::find(adapter, &names, layout, self.task)?;
        // A head that shares the embeddings' tensor has none of its own to be found by.
        let known = |parameter: &String| self.name_in_tie(parameter).is_none();
        let canonical = |parameter: String| names.canonical(&parameter).name;
        let whole = adapter.saved().iter().map(|saved| saved.path.clone());
        let rows = adapter.trained_rows().iter().map(|rows| format!("{}.weight", rows.path));
        let saved: Vec<String> = whole.chain(rows).collect();
        let mapping = if targets.is_empty() {
            // Saved parameters need not be in the base; each is asked for below.
            let parameters: Vec<_> = saved.iter().cloned().map(canonical).collect();
            prefix::find_mapping(&parameters, &names, self.task)?.mapping
        } else {
            let parameters = targets.values().map(|target| target.parameter.clone());
            let parameters: Vec<_> = parameters.filter(known).map(canonical).collect();
            let fit = prefix::find_mapping(&parameters, &names, self.task)?;
            problems.extend(fit.problems);
            fit.mapping
        };
        let naming = Naming { names, mapping, pieces: RefCell::default() };
        let unknown = saved.iter().filter(|path| known(path) && !naming.has(path)).count();
        let strangers = (adapter.modules().values())
            .filter(|module| {
                let own = module
                    .parameters
                    .iter()
                    .map(|parameter| parameter.name.as_str())
                    .chain(["weight"]);
                !own.map(|leaf| format!("{}.{leaf}", module.path)).any(|path| naming.has(&path))
            })
            .count();
        Ok(Named { naming, targets, problems, unknown, strangers })
    }
}
