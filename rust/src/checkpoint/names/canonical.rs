//! What all names of one parameter come to: its canonical name, which part of that tensor it is, and how its
//! rows lie there.

use std::ops::Range;

/// Which slice of the canonical tensor a tensor is.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct SliceIndex {
    /// The expert, where the tensors of all experts are stacked.
    pub expert: Option<u64>,
    /// Which of the parts that lie below one another, in the dimension of the outputs.
    pub slot: usize,
    /// How many such parts there are.
    pub slots: usize,
    /// Which of them are of one size among themselves.
    pub alike: Range<usize>,
}

impl SliceIndex {
    /// Whether all parts are of one size.
    pub fn are_equal(&self) -> bool {
        self.alike == (0..self.slots)
    }
}

/// A name that all names of a parameter come to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Canonical {
    /// The name.
    pub name: String,
    /// Which slice of that tensor the parameter is; all of it, if none.
    pub slice: Option<SliceIndex>,
    /// How its rows lie to those of that tensor.
    pub lie: Lie,
    /// What is done to the parameter that is no renaming and no cutting into rows.
    pub obstacle: Option<String>,
}

impl Canonical {
    /// A name that is the canonical one.
    pub fn same(name: String) -> Self {
        Self { name, slice: None, lie: Lie::Same, obstacle: None }
    }
}

/// How the rows of one parameter lie to those of another.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Hash)]
pub enum Lie {
    /// In the same order.
    #[default]
    Same,
    /// With the two halves of the rows in each other's place.
    HalvesSwapped,
    /// One is the transpose of the other.
    Transposed,
}
