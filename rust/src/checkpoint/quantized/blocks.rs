//! Blocks: the elements of a weight that share a scale.

use std::ops::Range;

/// Blocks this tall or lower are held whole while they are encoded; of taller ones the scales are
/// found in a pass of their own.
const TALL: usize = 512;

/// The blocks of a row-major tensor, numbered as their scales are stored.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Blocks {
    /// Rectangles of the last two dimensions; those at the right and at the bottom may be smaller.
    Grid {
        /// Rows of one matrix.
        height: usize,
        /// Columns.
        width: usize,
        /// Rows of a block.
        block_height: usize,
        /// Columns of a block.
        block_width: usize,
        /// How many matrices there are.
        matrices: usize,
    },
    /// Runs of so many elements, whatever the rows.
    Runs {
        /// Elements of a block; even.
        length: usize,
        /// Elements of all.
        elements: usize,
    },
}

impl Blocks {
    /// How many there are.
    pub fn count(&self) -> usize {
        match self {
            Self::Grid { matrices, .. } => {
                let (rows, columns) = self.grid();
                matrices * rows * columns
            }
            Self::Runs { length, elements } => elements.div_ceil(*length),
        }
    }

    /// Rows and columns of blocks in one matrix.
    fn grid(&self) -> (usize, usize) {
        match self {
            Self::Grid { height, width, block_height, block_width, .. } => {
                (height.div_ceil(*block_height), width.div_ceil(*block_width))
            }
            Self::Runs { .. } => (self.count(), 1),
        }
    }

    /// How many neighbors in a row share a scale.
    pub fn width_of_run(&self) -> usize {
        match self {
            Self::Grid { block_width, .. } => *block_width,
            Self::Runs { length, .. } => *length,
        }
    }

    /// The first block of the row of blocks in which an element lies.
    fn row_of_blocks(&self, element: usize) -> usize {
        match self {
            Self::Grid { height, width, block_height, .. } => {
                let (rows, columns) = self.grid();
                let (matrix, row) = (element / (height * width), element / width % height);
                (matrix * rows + row / block_height) * columns
            }
            Self::Runs { length, .. } => element / length,
        }
    }

    /// The blocks that a run of elements touches, and their neighbours in the same rows of blocks.
    pub fn covering(&self, elements: &Range<usize>) -> Range<usize> {
        if elements.is_empty() {
            return 0..0;
        }
        let (_, columns) = self.grid();
        self.row_of_blocks(elements.start)..self.row_of_blocks(elements.end - 1) + columns
    }

    /// Calls `each` with every run of neighbours in one block, and the block.
    pub fn runs(&self, elements: &Range<usize>, mut each: impl FnMut(Range<usize>, usize)) {
        let mut start = elements.start;
        while start < elements.end {
            let (block, end) = match self {
                Self::Grid { width, block_width, .. } => {
                    let column = start % width;
                    let across = column / block_width;
                    let end = start - column + ((across + 1) * block_width).min(*width);
                    (self.row_of_blocks(start) + across, end)
                }
                Self::Runs { length, .. } => (start / length, (start / length + 1) * length),
            };
            let end = end.min(elements.end);
            each(start..end, block);
            start = end;
        }
    }

    /// Whether the scales have to be found in a pass of their own.
    pub fn are_tall(&self) -> bool {
        matches!(self, Self::Grid { block_height, height, .. } if (*block_height).min(*height) > TALL)
    }

    /// Whether every block ends before an element or begins at it or after.
    fn end_at(&self, element: usize) -> bool {
        match self {
            Self::Grid { height, width, block_height, .. } => {
                let within = element % (height * width);
                within.is_multiple_of(*width)
                    && (self.are_tall() || (within / width).is_multiple_of(*block_height))
            }
            Self::Runs { length, .. } => element.is_multiple_of(*length),
        }
    }

    /// Runs of rows of so many columns that can be encoded each on its own: at least `target` rows
    /// and as few more as its blocks need.
    pub fn units(&self, rows: usize, columns: usize, target: usize) -> Vec<Range<usize>> {
        let mut units = Vec::new();
        let mut start = 0;
        for end in 1..=rows {
            if end == rows || end - start >= target && self.end_at(end * columns) {
                units.push(start..end);
                start = end;
            }
        }
        units
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn blocks_are_numbered_row_after_row_with_remainders() {
        let grid =
            Blocks::Grid { height: 5, width: 7, block_height: 2, block_width: 3, matrices: 2 };
        assert_eq!(grid.count(), 2 * 3 * 3);
        let mut seen = vec![0; grid.count()];
        grid.runs(&(0..70), |run, block| seen[block] += run.len());
        assert_eq!(seen, [6, 6, 2, 6, 6, 2, 3, 3, 1].repeat(2));
        assert_eq!(grid.covering(&(14..21)), 3..6);
        assert_eq!(grid.covering(&(28..42)), 6..12);
        assert_eq!(grid.units(10, 7, 1), [0..2, 2..4, 4..5, 5..7, 7..9, 9..10]);
        let runs = Blocks::Runs { length: 4, elements: 18 };
        assert_eq!(runs.count(), 5);
        assert_eq!(runs.units(6, 3, 1), [0..4, 4..6]);
    }
}
