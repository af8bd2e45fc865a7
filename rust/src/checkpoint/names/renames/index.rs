//! The index of a base's tensors by the canonical names of the parameters that they are, or are
//! slices of.

use std::collections::HashSet;
use std::sync::OnceLock;

use indexmap::IndexMap;

use super::{Canonical, Renames, SliceIndex};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::canonical::Lie;
use crate::checkpoint::names::endings::Backwards;
use crate::checkpoint::names::towers::TextTower;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::Result;
use crate::limits;
use crate::parallel::task::Task;

/// A stored tensor under its canonical name.
#[derive(Debug, Clone)]
pub struct IndexedTensor {
    /// Its own name.
    pub name: String,
    /// Which slice of the canonical tensor it is.
    pub slice: Option<SliceIndex>,
    /// How its rows lie to those of the canonical tensor.
    pub lie: Lie,
    /// Why no update can be followed to it.
    pub obstacle: Option<String>,
}

/// A base's tensors by the names that an adapter may give them.
#[derive(Debug, Clone)]
pub struct NameIndex<'a> {
    base: &'a Checkpoint,
    /// The base's quantised weights, whose shapes are not those of their codes.
    quantized: Option<&'a QuantizedWeights>,
    renamed: Option<Renamed>,
    /// The canonical names by their ends; made when they are asked for.
    backwards: OnceLock<Backwards>,
    /// Where its language model lies; found when it is asked for.
    text_tower: OnceLock<Option<TextTower>>,
}

#[derive(Debug, Clone)]
struct Renamed {
    renames: Renames,
    tensors: IndexMap<String, Vec<IndexedTensor>>,
}

impl<'a> NameIndex<'a> {
    /// The names as they stand.
    pub fn plain(base: &'a Checkpoint) -> Self {
        Self {
            base,
            quantized: None,
            renamed: None,
            backwards: OnceLock::new(),
            text_tower: OnceLock::new(),
        }
    }

    /// The same, with the shapes that quantised weights have in the model.
    #[must_use]
    pub fn with_quantized(self, quantized: &'a QuantizedWeights) -> Self {
        Self { quantized: Some(quantized), ..self }
    }

    /// The shape of a tensor of the base, or of the weight whose codes it holds.
    fn shape_of(&self, name: &str) -> Option<&[u64]> {
        let quantized = self.quantized.and_then(|quantized| quantized.get(name));
        let meant = quantized.map(|quantized| &quantized.logical);
        meant.or_else(|| self.base.tensor(name)).map(|tensor| tensor.shape.as_slice())
    }

    /// The canonical names under some rules.
    ///
    /// # Errors
    /// [`crate::Error::Cancelled`].
    pub fn renamed(base: &'a Checkpoint, renames: Renames, task: &Task) -> Result<Self> {
        let mut tensors = IndexMap::<String, Vec<IndexedTensor>>::new();
        for name in base.tensors().keys() {
            task.check()?;
            let Canonical { name: canonical, slice, lie, obstacle } = renames.canonical(name);
            let stored = IndexedTensor { name: name.clone(), slice, lie, obstacle };
            tensors.entry(canonical).or_default().push(stored);
        }
        let renamed = Some(Renamed { renames, tensors });
        Ok(Self { renamed, ..Self::plain(base) })
    }

    /// The checkpoint.
    pub fn base(&self) -> &'a Checkpoint {
        self.base
    }

    /// Whether rules are in use.
    pub fn are_renamed(&self) -> bool {
        self.renamed.is_some()
    }

    /// The canonical name of a parameter; without rules, its own.
    pub fn canonical(&self, parameter: &str) -> Canonical {
        match &self.renamed {
            Some(renamed) => renamed.renames.canonical(parameter),
            None => Canonical::same(parameter.to_owned()),
        }
    }

    /// How many canonical names there are.
    fn count(&self) -> usize {
        match &self.renamed {
            Some(renamed) => renamed.tensors.len(),
            None => self.base.tensors().len(),
        }
    }

    /// The canonical name at that position.
    fn key(&self, position: usize) -> &str {
        let key = match &self.renamed {
            Some(renamed) => renamed.tensors.get_index(position).map(|(name, _)| name),
            None => self.base.tensors().get_index(position).map(|(name, _)| name),
        };
        key.map_or("", String::as_str)
    }

    /// The canonical names, in their order.
    pub fn keys(&self) -> impl Iterator<Item = &str> {
        (0..self.count()).map(|position| self.key(position))
    }

    /// Where the base's language model lies, if its config tells.
    pub fn text_tower(&self) -> Option<&TextTower> {
        self.text_tower.get_or_init(|| TextTower::find(self)).as_ref()
    }

    /// The position of a canonical name.
    fn position(&self, canonical: &str) -> Option<usize> {
        match &self.renamed {
            Some(renamed) => renamed.tensors.get_index_of(canonical),
            None => self.base.tensors().get_index_of(canonical),
        }
    }

    fn positions_ending_in(&self, text: &str) -> Vec<usize> {
        let key = |position| self.key(position);
        let backwards = self.backwards.get_or_init(|| Backwards::of(self.count(), key));
        backwards.ending_in(text, key)
    }

    /// The canonical names that end in a text, in their order.
    pub fn ending_in(&self, text: &str) -> impl Iterator<Item = &str> {
        self.positions_ending_in(text).into_iter().map(|position| self.key(position))
    }

    /// The first canonical name that differs from this one by a leading part, of either, or by the
    /// name of the text tower.
    pub fn with_other_prefix(&self, canonical: &str) -> Option<&str> {
        let cuts = canonical.match_indices('.').take(limits::LEADING_PARTS);
        let shorter = cuts.filter_map(|(dot, _)| self.position(&canonical[dot + 1..])).min();
        let longer = self.positions_ending_in(&format!(".{canonical}")).first().copied();
        let in_tower = || {
            let (_, name) = self.text_tower()?.locate(canonical, self)?;
            self.position(&name)
        };
        let first = [shorter, longer].into_iter().flatten().min().or_else(in_tower)?;
        Some(self.key(first))
    }

    /// Whether the base has a tensor of that canonical name, or slices of it.
    pub fn has(&self, canonical: &str) -> bool {
        match &self.renamed {
            Some(renamed) => renamed.tensors.contains_key(canonical),
            None => self.base.tensor(canonical).is_some(),
        }
    }

    /// The name of the one stored tensor that a canonical one is, whole.
    pub fn whole(&self, canonical: &str) -> Option<&str> {
        match &self.renamed {
            None => self.base.tensors().get_key_value(canonical).map(|(name, _)| name.as_str()),
            Some(_) => match self.stored(canonical) {
                [IndexedTensor { name, slice: None, lie: Lie::Same, obstacle: None }] => Some(name),
                _ => None,
            },
        }
    }

    /// The stored tensors that a canonical one consists of.
    pub fn stored(&self, canonical: &str) -> &[IndexedTensor] {
        let renamed = self.renamed.as_ref().and_then(|renamed| renamed.tensors.get(canonical));
        renamed.map_or(&[], Vec::as_slice)
    }

    /// The names of all tensors that are a canonical one or parts of it.
    pub fn tensors_of(&self, canonical: &str) -> Vec<String> {
        match self.whole(canonical) {
            Some(name) => vec![name.to_owned()],
            None => self.stored(canonical).iter().map(|one| one.name.clone()).collect(),
        }
    }

    /// The shape of a canonical tensor, its slices put together; `None` if they do not fit.
    pub fn shape(&self, canonical: &str) -> Option<Vec<u64>> {
        if self.renamed.is_none() {
            return self.shape_of(canonical).map(<[u64]>::to_vec);
        }
        let stored = self.stored(canonical);
        if let [IndexedTensor { name, slice: None, lie, .. }] = stored {
            let mut shape = self.shape_of(name)?.to_vec();
            if *lie == Lie::Transposed {
                shape.reverse();
            }
            return Some(shape);
        }
        self.heights(canonical).and_then(|heights| {
            let first = self.shape_of(&stored[0].name)?;
            let rows = heights.iter().sum();
            let experts = stored[0].slice.as_ref()?.expert.map(|_| stored.len() / heights.len());
            let mut shape: Vec<u64> = experts.map(|count| count as u64).into_iter().collect();
            shape.push(rows);
            shape.extend(&first[1..]);
            Some(shape)
        })
    }

    /// The rows of each slot of a tensor that is stored in slices; `None` if a slice is missing, is
    /// there twice, or is not as the others are.
    pub fn heights(&self, canonical: &str) -> Option<Vec<u64>> {
        let stored = self.stored(canonical);
        let first = stored.first()?.slice.as_ref()?;
        let mut heights = vec![None; first.slots];
        let mut seen = HashSet::new();
        let mut width = None;
        for one in stored {
            let slice = one.slice.as_ref()?;
            let shape = self.shape_of(&one.name)?;
            let (rows, rest) = shape.split_first()?;
            let alike = slice.slots == first.slots
                && slice.expert.is_some() == first.expert.is_some()
                && *width.get_or_insert(rest) == rest
                && *heights[slice.slot].get_or_insert(*rows) == *rows;
            if !alike || !seen.insert((slice.expert, slice.slot)) {
                return None;
            }
        }
        let experts = seen.iter().filter_map(|(expert, _)| *expert).max().map_or(1, |max| max + 1);
        let complete = seen.len() as u64 == experts * first.slots as u64;
        heights.into_iter().collect::<Option<Vec<_>>>().filter(|_| complete)
    }
}
