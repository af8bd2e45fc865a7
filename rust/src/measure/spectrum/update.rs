//! An update in factored form.

use std::ops::Range;

use crate::error::{Error, Result};
use crate::kernel::vector::vectorized;
use crate::linalg::{LongSide, PANEL};
use crate::measure::statistics::{Tensor, panels};

/// The values of a factor, row-major.
#[derive(Debug, Clone, Copy)]
pub enum Values<'a> {
    /// In f32.
    F32(&'a [f32]),
    /// In f64.
    F64(&'a [f64]),
    /// As they lie in a file.
    Stored(Tensor<'a>),
}

impl Values<'_> {
    /// The number of values.
    pub fn len(&self) -> usize {
        match self {
            Self::F32(values) => values.len(),
            Self::F64(values) => values.len(),
            Self::Stored(tensor) => tensor.len(),
        }
    }

    /// Whether there is no value.
    pub fn is_empty(&self) -> bool {
        self.len() == 0
    }

    /// Values `start..start + output.len()` as f64.
    pub(crate) fn read(&self, start: usize, output: &mut [f64]) {
        let end = start + output.len();
        match self {
            Self::F32(values) => {
                for (target, &value) in output.iter_mut().zip(&values[start..end]) {
                    *target = f64::from(value);
                }
            }
            Self::F64(values) => output.copy_from_slice(&values[start..end]),
            Self::Stored(tensor) => tensor.slice(start, end).decode_long(output),
        }
    }
}

/// One product s·B·A.
#[derive(Debug, Clone, Copy)]
pub struct Term<'a> {
    /// B, m×r.
    pub left: Values<'a>,
    /// A, r×n.
    pub right: Values<'a>,
    /// r.
    pub rank: usize,
    /// s.
    pub scale: f64,
}

/// An update ΔW = Σ sᵢ·Bᵢ·Aᵢ of an m×n weight, as its factors. Everything measured of it is of
/// ΔW, the scales included, and does not depend on which factors it is written in.
#[derive(Debug, Clone)]
pub struct Update<'a> {
    rows: usize,
    columns: usize,
    terms: Vec<Term<'a>>,
}

impl<'a> Update<'a> {
    /// s·B·A with B `rows`×`rank` and A `rank`×`columns`.
    ///
    /// # Errors
    /// [`Error::Argument`] when a factor has another number of values than its shape says.
    pub fn new(
        rows: usize,
        columns: usize,
        rank: usize,
        left: Values<'a>,
        right: Values<'a>,
        scale: f64,
    ) -> Result<Self> {
        let term = Term { left, right, rank, scale };
        Self::sum(rows, columns, vec![term])
    }

    /// A sum of products; of none, zero.
    ///
    /// # Errors
    /// [`Error::Argument`] when a factor has another number of values than its shape says.
    pub fn sum(rows: usize, columns: usize, terms: Vec<Term<'a>>) -> Result<Self> {
        for term in &terms {
            let rank = term.rank;
            for (values, expected, shape) in [
                (term.left, rows.checked_mul(rank), [rows, rank]),
                (term.right, rank.checked_mul(columns), [rank, columns]),
            ] {
                if expected != Some(values.len()) {
                    return Err(Error::Argument(format!(
                        "a factor of shape {shape:?} was given {} values",
                        values.len()
                    )));
                }
            }
        }
        Ok(Self { rows, columns, terms })
    }

    /// m, the rows of ΔW.
    pub fn rows(&self) -> usize {
        self.rows
    }

    /// n, the columns of ΔW.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The products.
    pub fn terms(&self) -> &[Term<'a>] {
        &self.terms
    }

    /// The sum of the products' ranks, which bounds the rank of ΔW.
    pub fn rank(&self) -> usize {
        self.terms.iter().map(|term| term.rank).sum()
    }

    /// The number of singular values that can differ from zero: min(rank, m, n).
    pub fn spectrum_len(&self) -> usize {
        self.rank().min(self.rows).min(self.columns)
    }

    /// The update times a number.
    #[must_use]
    pub fn scaled(&self, factor: f64) -> Self {
        let mut result = self.clone();
        for term in &mut result.terms {
            term.scale *= factor;
        }
        result
    }

    /// The sum of two updates of one weight.
    ///
    /// # Errors
    /// [`Error::Argument`] when their shapes differ.
    pub fn plus(&self, other: &Self) -> Result<Self> {
        self.check_shape(other)?;
        let mut result = self.clone();
        result.terms.extend_from_slice(&other.terms);
        Ok(result)
    }

    pub(crate) fn check_shape(&self, other: &Self) -> Result<()> {
        if (self.rows, self.columns) == (other.rows, other.columns) {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "updates of {}×{} and {}×{} weights cannot be compared",
            self.rows, self.columns, other.rows, other.columns
        )))
    }

    /// The factor s for each column of the stacked left side.
    pub(crate) fn scales(&self) -> Vec<f64> {
        self.terms.iter().flat_map(|term| std::iter::repeat_n(term.scale, term.rank)).collect()
    }

    /// The left factors side by side: m × rank.
    pub(crate) fn left(&self) -> Side<'_> {
        Side { update: self, is_left: true }
    }

    /// The transposed right factors side by side: n × rank.
    pub(crate) fn right(&self) -> Side<'_> {
        Side { update: self, is_left: false }
    }
}

/// One side's factors as a tall matrix.
pub(crate) struct Side<'a> {
    update: &'a Update<'a>,
    is_left: bool,
}

/// Puts rows of `width` values into panels that begin with the first of them.
fn pack_rows(values: &[f64], width: usize, panel: usize, output: &mut [f64]) {
    for (row, source) in values.chunks_exact(width).enumerate() {
        let (parts, rest) = source.as_chunks::<PANEL>();
        let mut start = row * PANEL;
        for part in parts {
            output[start..start + PANEL].copy_from_slice(part);
            start += panel;
        }
        for (place, &value) in (start..).zip(rest) {
            output[place] = value;
        }
    }
}

vectorized! {
    /// Puts eight columns of `output.len() / PANEL` values side by side.
    fn interleave(columns: &[f64], output: &mut [f64]) {
        let lines = output.as_chunks_mut::<PANEL>().0;
        let depth = lines.len();
        for (index, line) in lines.iter_mut().enumerate() {
            for (place, value) in line.iter_mut().enumerate() {
                *value = columns[place * depth + index];
            }
        }
    }
}

impl LongSide for Side<'_> {
    fn length(&self) -> usize {
        if self.is_left { self.update.rows } else { self.update.columns }
    }

    fn width(&self) -> usize {
        self.update.rank()
    }

    fn read(&self, start: usize, end: usize, output: &mut [f64]) {
        let depth = end - start;
        let mut first = 0;
        for term in &self.update.terms {
            let target = &mut output[first * depth..(first + term.rank) * depth];
            if self.is_left {
                let mut values = vec![0.0; target.len()];
                term.left.read(start * term.rank, &mut values);
                for row in 0..depth {
                    for column in 0..term.rank {
                        target[column * depth + row] = values[row * term.rank + column];
                    }
                }
            } else {
                for row in 0..term.rank {
                    let target = &mut target[row * depth..(row + 1) * depth];
                    term.right.read(row * self.update.columns + start, target);
                }
            }
            first += term.rank;
        }
    }

    fn pack(&self, start: usize, end: usize, scratch: &mut Vec<f64>, output: &mut [f64]) {
        // Where no panel is left with room, everything is written anyway.
        if !self.width().is_multiple_of(PANEL) {
            output.fill(0.0);
        }
        let mut first = 0;
        for term in &self.update.terms {
            if self.is_left {
                pack_left(term, start..end, first, scratch, output);
            } else {
                pack_right(term, start..end, self.update.columns, first, scratch, output);
            }
            first += term.rank;
        }
    }
}

/// Packs rows of B, whose columns begin with the panels' column `first`.
fn pack_left(
    term: &Term<'_>,
    rows: Range<usize>,
    first: usize,
    scratch: &mut Vec<f64>,
    output: &mut [f64],
) {
    let panel = rows.len() * PANEL;
    // Factors of several products may meet within a panel; single ones never do.
    let is_aligned = first.is_multiple_of(PANEL) && term.rank > 0;
    if let (true, Values::Stored(tensor)) = (is_aligned, term.left) {
        let stored = tensor.slice(rows.start * term.rank, rows.end * term.rank);
        if panels::pack_rows(&stored, term.rank, panel, &mut output[first / PANEL * panel..]) {
            return;
        }
    }
    scratch.resize(rows.len() * term.rank, 0.0);
    term.left.read(rows.start * term.rank, scratch);
    if is_aligned {
        pack_rows(scratch, term.rank, panel, &mut output[first / PANEL * panel..]);
        return;
    }
    for (row, source) in scratch.chunks_exact(term.rank.max(1)).enumerate() {
        for (column, &value) in (first..).zip(source) {
            output[column / PANEL * panel + row * PANEL + column % PANEL] = value;
        }
    }
}

/// Packs columns of A, whose rows are `length` long and begin with the panels' column `first`.
fn pack_right(
    term: &Term<'_>,
    columns: Range<usize>,
    length: usize,
    first: usize,
    scratch: &mut Vec<f64>,
    output: &mut [f64],
) {
    let depth = columns.len();
    let panel = depth * PANEL;
    let begin = |row: usize| row * length + columns.start;
    // As on the left.
    let whole = if first.is_multiple_of(PANEL) { term.rank / PANEL * PANEL } else { 0 };
    for row in (0..whole).step_by(PANEL) {
        let target = &mut output[(first + row) / PANEL * panel..][..panel];
        if let Values::Stored(tensor) = term.right {
            let stored = |place| tensor.slice(begin(row + place), begin(row + place) + depth);
            if panels::pack_columns(std::array::from_fn(stored), target) {
                continue;
            }
        }
        scratch.resize(PANEL * depth, 0.0);
        for (place, values) in scratch.chunks_exact_mut(depth.max(1)).enumerate() {
            term.right.read(begin(row + place), values);
        }
        interleave(scratch, target);
    }
    for row in whole..term.rank {
        scratch.resize(depth, 0.0);
        term.right.read(begin(row), scratch);
        let (number, place) = ((first + row) / PANEL, (first + row) % PANEL);
        for (index, &value) in scratch.iter().enumerate() {
            output[number * panel + index * PANEL + place] = value;
        }
    }
}
