//! The ranks of elements in their rows, of updates that come in tiles of their columns.
//!
//! No tile has a whole row then, so that some rows are gathered from all tiles in each pass and ranked at
//! its end. What is kept is two bytes for each element, four where rows are longer than 65536.

use super::order::{Layout, ranks};

/// Elements of one update that are gathered in a pass: 32 MB, and in tests so few that there are several.
const GATHERED: usize = if cfg!(test) { 6 } else { 1 << 23 };

/// The ranks of all elements of an update.
#[derive(Debug, Clone, PartialEq)]
pub(super) struct RowRanks {
    layout: Layout,
    values: Values,
}

#[derive(Debug, Clone, PartialEq)]
enum Values {
    Narrow(Vec<u16>),
    Wide(Vec<u32>),
}

impl RowRanks {
    pub fn new(layout: Layout) -> Self {
        let elements = layout.rows * layout.columns;
        let values = match layout.inputs() <= usize::from(u16::MAX) + 1 {
            true => Values::Narrow(vec![0; elements]),
            false => Values::Wide(vec![0; elements]),
        };
        Self { layout, values }
    }

    /// The rank of the element at a stored place, 0 for the smallest of its row.
    pub fn rank(&self, row: usize, column: usize) -> usize {
        let index = self.layout.index(row, column) as usize;
        match &self.values {
            Values::Narrow(values) => usize::from(values[index]),
            Values::Wide(values) => values[index] as usize,
        }
    }

    /// Ranks the elements of gathered rows of the update, which begin with that one.
    pub fn set(&mut self, first: usize, rows: &[f32], order: &mut Vec<u32>) {
        let inputs = self.layout.inputs();
        for (row, keys) in rows.chunks_exact(inputs).enumerate() {
            ranks(keys, order);
            let start = (first + row) * inputs;
            for (rank, place) in order.iter().enumerate() {
                let index = start + *place as usize;
                match &mut self.values {
                    Values::Narrow(values) => values[index] = rank as u16,
                    Values::Wide(values) => values[index] = rank as u32,
                }
            }
        }
    }
}

/// The rows of an update that one pass gathers, from the first that is not ranked yet.
pub(super) fn gathered(layout: Layout, first: usize) -> std::ops::Range<usize> {
    let count = (GATHERED / layout.inputs().max(1)).max(1);
    first..layout.outputs().min(first + count)
}

/// Puts a tile's columns, which are rows of the update, into the gathered ones.
pub(super) fn gather(
    layout: Layout,
    rows: &std::ops::Range<usize>,
    first_row: usize,
    tile: &[f32],
    target: &mut [f32],
) {
    let inputs = layout.inputs();
    for (row, values) in tile.chunks_exact(layout.columns.max(1)).enumerate() {
        for (own, value) in values[rows.clone()].iter().enumerate() {
            target[own * inputs + first_row + row] = *value;
        }
    }
}
