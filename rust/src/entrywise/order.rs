//! The k largest elements of a tensor, found by counting: exact, in any order of tiles.
//!
//! Elements are ordered by magnitude, equal ones by their index, the lower first. The order of non-negative
//! floats is that of their bits, so that the upper half of the k-th largest one's bits follows from counts
//! of upper halves, and the lower half from counts of those within that bucket. Where only some of
//! those that equal it are kept, the last of them is found in two more passes.

use std::ops::Range;

/// |x| as a number of the same order.
pub(super) fn magnitude(value: f32) -> u32 {
    value.to_bits() & 0x7FFF_FFFF
}

/// Upper halves of magnitudes.
const UPPER: usize = 1 << 15;
/// Lower halves.
const LOWER: usize = 1 << 16;

/// Where the k-th largest of what was counted lies.
struct Place {
    bucket: usize,
    /// How many lie in buckets above.
    above: u64,
}

fn place(counts: &[u64], k: u64) -> Place {
    let mut above = 0;
    for (bucket, count) in counts.iter().enumerate().rev() {
        if above + count >= k {
            return Place { bucket, above };
        }
        above += count;
    }
    unreachable!("k is at most the number of elements")
}

/// How the rows that are stored lie in an update.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Layout {
    pub rows: usize,
    pub columns: usize,
    /// Whether they are its columns.
    pub is_transposed: bool,
}

impl Layout {
    /// Row and column in the update.
    pub fn place(self, row: usize, column: usize) -> (u64, u64) {
        let (row, column) = (row as u64, column as u64);
        if self.is_transposed { (column, row) } else { (row, column) }
    }

    /// The index in the update, in row-major order.
    pub fn index(self, row: usize, column: usize) -> u64 {
        let (rows, columns) = (self.rows as u64, self.columns as u64);
        let (row, column) = (row as u64, column as u64);
        if self.is_transposed { column * rows + row } else { row * columns + column }
    }

    /// Rows of the update.
    pub fn outputs(self) -> usize {
        if self.is_transposed { self.columns } else { self.rows }
    }

    /// Columns of the update.
    pub fn inputs(self) -> usize {
        if self.is_transposed { self.rows } else { self.columns }
    }
}

/// The first elements in the order of magnitudes: those of larger ones, and of equal ones those up to a
/// place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Cut {
    bits: u32,
    /// Row and column of the last.
    last: (u64, u64),
}

impl Cut {
    /// None of them.
    pub const NONE: Self = Self { bits: u32::MAX, last: (0, 0) };
    /// All of them.
    pub const ALL: Self = Self { bits: 0, last: (u64::MAX, u64::MAX) };

    /// The k largest of a matrix in memory, row after row.
    pub fn of(values: &[f32], columns: usize, k: u64) -> Self {
        let rows = values.len() / columns.max(1);
        let layout = Layout { rows, columns, is_transposed: false };
        let mut search = Search::new(values.len() as u64, k);
        while !search.is_done() {
            let mut counts = search.counts(layout);
            counts.add(&search, layout, 0, values);
            search.advance(counts);
        }
        search.cut()
    }

    /// Whether an element at a row and column belongs to them.
    pub fn takes(&self, value: f32, place: impl FnOnce() -> (u64, u64)) -> bool {
        let bits = magnitude(value);
        bits > self.bits || (bits == self.bits && place() <= self.last)
    }
}

/// What is known so far of the k largest.
#[derive(Debug, Clone)]
pub(super) enum Search {
    Upper {
        k: u64,
    },
    /// `k` counts within the bucket,
    Lower {
        bucket: u32,
        k: u64,
    },
    /// among equal elements,
    Equal {
        bits: u32,
        k: u64,
    },
    /// and among those of a row.
    InRow {
        bits: u32,
        row: u64,
        k: u64,
    },
    Done(Cut),
}

/// What one thread counts in one pass of a search.
#[derive(Debug)]
pub(super) struct Counts(Vec<u64>);

impl Search {
    pub fn new(elements: u64, k: u64) -> Self {
        match k {
            0 => Self::Done(Cut::NONE),
            _ if k >= elements => Self::Done(Cut::ALL),
            _ => Self::Upper { k },
        }
    }

    pub fn is_done(&self) -> bool {
        matches!(self, Self::Done(_))
    }

    /// # Panics
    /// If it is not done.
    pub fn cut(&self) -> Cut {
        let Self::Done(cut) = self else { panic!("a pass is missing") };
        *cut
    }

    /// Room for the counts of the next pass.
    pub fn counts(&self, layout: Layout) -> Counts {
        let length = match self {
            Self::Upper { .. } => UPPER,
            Self::Lower { .. } => LOWER,
            Self::Equal { .. } => layout.outputs(),
            Self::InRow { .. } => layout.inputs(),
            Self::Done(_) => 0,
        };
        Counts(vec![0; length])
    }

    /// Takes what all threads counted.
    pub fn advance(&mut self, counts: Counts) {
        let counts = counts.0;
        *self = match *self {
            Self::Upper { k } => {
                let found = place(&counts, k);
                Self::Lower { bucket: found.bucket as u32, k: k - found.above }
            }
            Self::Lower { bucket, k } => {
                let found = place(&counts, k);
                let bits = (bucket << 16) | found.bucket as u32;
                let k = k - found.above;
                // Zeros are nothing, whether they are kept or not.
                match counts[found.bucket] == k || bits == 0 {
                    true => Self::Done(Cut { bits, ..Cut::ALL }),
                    false => Self::Equal { bits, k },
                }
            }
            Self::Equal { bits, k } => {
                let mut before = 0;
                let mut row = 0;
                while before + counts[row] < k {
                    before += counts[row];
                    row += 1;
                }
                Self::InRow { bits, row: row as u64, k: k - before }
            }
            Self::InRow { bits, row, k } => {
                let mut equal = counts.iter().enumerate().filter(|(_, count)| **count > 0);
                let (column, _) = equal.nth(k as usize - 1).expect("they were counted");
                Self::Done(Cut { bits, last: (row, column as u64) })
            }
            Self::Done(cut) => Self::Done(cut),
        };
    }
}

impl Counts {
    /// Counts a tile that begins in that row.
    pub fn add(&mut self, search: &Search, layout: Layout, first_row: usize, values: &[f32]) {
        // Elements of some magnitude, by their places.
        let equal = |bits: u32| {
            values.iter().enumerate().filter(move |(_, value)| magnitude(**value) == bits).map(
                move |(index, _)| {
                    layout.place(first_row + index / layout.columns, index % layout.columns)
                },
            )
        };
        match *search {
            Search::Upper { .. } => {
                for value in values {
                    self.0[(magnitude(*value) >> 16) as usize] += 1;
                }
            }
            Search::Lower { bucket, .. } => {
                for bits in values.iter().map(|value| magnitude(*value)) {
                    if bits >> 16 == bucket {
                        self.0[(bits & 0xFFFF) as usize] += 1;
                    }
                }
            }
            Search::Equal { bits, .. } => {
                equal(bits).for_each(|(row, _)| self.0[row as usize] += 1);
            }
            Search::InRow { bits, row, .. } => {
                let found = equal(bits).filter(|place| place.0 == row);
                found.for_each(|(_, column)| self.0[column as usize] += 1);
            }
            Search::Done(_) => {}
        }
    }

    /// Adds what another thread counted.
    pub fn join(&mut self, other: &Self) {
        self.0.iter_mut().zip(&other.0).for_each(|(sum, count)| *sum += count);
    }
}

/// The places of a row's elements from the smallest to the largest, of equal ones the last first: the
/// order of all, the other way round.
pub(super) fn ranks(row: &[f32], order: &mut Vec<u32>) {
    order.clear();
    order.extend(Range { start: 0, end: row.len() as u32 });
    order
        .sort_unstable_by_key(|place| (magnitude(row[*place as usize]), std::cmp::Reverse(*place)));
}
