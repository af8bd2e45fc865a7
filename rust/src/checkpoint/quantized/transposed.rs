//! Weights whose codes lie transposed against the model's own layout, read in that.

use std::cell::RefCell;
use std::ops::Range;
use std::sync::atomic::{AtomicU64, Ordering};

use super::Quantized;
use crate::checkpoint::Checkpoint;
use crate::error::Result;

/// The order in which codes lie, where it is not the model's.
#[derive(Debug, Clone)]
pub struct Transposed {
    /// The weight's shape in that order: matrices, then what are the columns of each in the model,
    /// then the rows.
    pub shape: Vec<u64>,
    /// Told apart by this, for what threads keep.
    id: u64,
}

impl Transposed {
    /// Of a weight of that shape in the order of its codes.
    pub(super) fn new(shape: Vec<u64>) -> Self {
        static NEXT: AtomicU64 = AtomicU64::new(0);
        Self { shape, id: NEXT.fetch_add(1, Ordering::Relaxed) }
    }
}

/// One matrix as it is stored.
struct Matrix {
    of: (u64, usize),
    codes: Vec<u8>,
    scales: Vec<f32>,
}

thread_local! {
    /// The matrix that this thread last read from: a row of it in the model's layout has a code in
    /// each row of the file.
    static LAST: RefCell<Option<Matrix>> = const { RefCell::new(None) };
}

/// Some rows and columns of a matrix in the model's layout.
struct Window {
    rows: Range<usize>,
    columns: Range<usize>,
}

impl Quantized {
    /// The numbers that a run of elements means, counted in the model's layout.
    ///
    /// # Errors
    /// Those of [`Quantized::decode`].
    pub(super) fn decode_transposed(
        &self,
        checkpoint: &Checkpoint,
        transposed: &Transposed,
        elements: &Range<usize>,
    ) -> Result<Vec<f32>> {
        let [.., columns, rows] = transposed.shape.as_slice() else { return Ok(Vec::new()) };
        let (rows, columns) = (*rows as usize, *columns as usize);
        let mut values = vec![0.0; elements.len()];
        let mut start = elements.start;
        while start < elements.end {
            // A part of a row, or whole rows, of one matrix.
            let (matrix, within) = (start / (rows * columns), start % (rows * columns));
            let (row, column) = (within / columns, within % columns);
            let left = (elements.end - start).min(rows * columns - within);
            let window = if column > 0 || left < columns {
                let end = columns.min(column + left);
                Window { rows: row..row + 1, columns: column..end }
            } else {
                Window { rows: row..row + left / columns, columns: 0..columns }
            };
            let count = window.rows.len() * window.columns.len();
            let first = start - elements.start;
            self.gather(
                checkpoint,
                (transposed.id, matrix, rows * columns),
                rows,
                &window,
                &mut values[first..first + count],
            )?;
            start += count;
        }
        Ok(values)
    }

    /// Decodes a window of one matrix whose stored rows have that many elements.
    fn gather(
        &self,
        checkpoint: &Checkpoint,
        (id, matrix, elements): (u64, usize, usize),
        width: usize,
        window: &Window,
        values: &mut [f32],
    ) -> Result<()> {
        LAST.with_borrow_mut(|last| {
            let stored = match last {
                Some(stored) if stored.of == (id, matrix) => stored,
                _ => {
                    // Let go of first, so that there are never two.
                    *last = None;
                    let whole = matrix * elements..(matrix + 1) * elements;
                    let bytes = self.byte_at(whole.start)..self.bytes_of(whole.end);
                    let codes = self.stored.read(checkpoint, bytes)?;
                    let scales = self.checked_scales(checkpoint, self.blocks.covering(&whole))?;
                    last.insert(Matrix { of: (id, matrix), codes, scales })
                }
            };
            let run = self.blocks.width_of_run();
            let (table, runs) = (self.codes.table(), width.div_ceil(run));
            let across = window.columns.len();
            for (index, column) in window.columns.clone().enumerate() {
                let scales = &stored.scales[column * runs..(column + 1) * runs];
                for (row, value) in
                    window.rows.clone().zip(values[index..].iter_mut().step_by(across))
                {
                    let byte = stored.codes[(column * width + row) / 2];
                    let code = if row % 2 == 0 { byte & 15 } else { byte >> 4 };
                    *value = (table[usize::from(code)] * f64::from(scales[row / run])) as f32;
                }
            }
            Ok(())
        })
    }
}
