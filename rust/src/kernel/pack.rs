//! The factors of one tensor's updates, put into the order in which the kernels read them.

use crate::tensor::orientation::Orientation;
use std::borrow::Cow;

use super::split::SplitFactors;
use crate::tensor::dtype::Dtype;

/// The register block of an instruction set.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct BlockShape {
    pub rows: usize,
    pub lanes: usize,
    pub vectors: usize,
    /// Whether whole panels have columns at even places before those at odd ones, by two vectors.
    pub paired: bool,
    /// Whether no NaN may have a bit among the lower 16, which the set's rounding then spares.
    pub plain_nans: bool,
}

impl BlockShape {
    fn panel(self) -> usize {
        self.lanes * self.vectors
    }
}

/// One low-rank product as it is read from an adapter.
#[derive(Debug, Clone, Copy)]
pub struct Operand<'a> {
    /// A, (rank, in), row-major, little-endian at any alignment.
    pub a: &'a [u8],
    /// The element type of A.
    pub a_dtype: &'a Dtype,
    /// B, (out, rank), likewise.
    pub b: &'a [u8],
    /// The element type of B.
    pub b_dtype: &'a Dtype,
    /// The rank.
    pub rank: usize,
    /// The factor on the product: scale times weight. Folded into B.
    pub coefficient: f64,
}

/// All updates of one tensor as one product `left · right`, the ranks behind one another in the
/// order of the updates.
#[derive(Debug)]
pub enum Factors {
    /// For weights of 32 bits and fewer.
    Single(PackedFactors),
    /// For weights of 16 bits, where tiles of bf16 are multiplied.
    Split(SplitFactors),
    /// For f64 weights.
    Double(DoubleFactors),
}

impl Factors {
    /// Packs the operands for a weight stored with `rows` × `columns` elements, to be added to rows
    /// of the type `weight`.
    ///
    /// # Panics
    /// If an operand's bytes do not have the length that rank and shape ask for.
    pub fn pack(
        set: super::InstructionSet,
        weight: &Dtype,
        (rows, columns): (usize, usize),
        orientation: Orientation,
        operands: &[Operand<'_>],
    ) -> Self {
        let (outputs, inputs) = match orientation {
            Orientation::OutIn => (rows, columns),
            Orientation::InOut => (columns, rows),
        };
        let rank = operands.iter().map(|operand| operand.rank).sum();
        if *weight == Dtype::F64 {
            let mut factors = DoubleFactors {
                rows,
                columns,
                rank,
                left: vec![0.0; rows * rank],
                right: vec![0.0; rank * columns],
            };
            let mut first = 0;
            for operand in operands {
                let a = super::convert::widen_f64(operand.a_dtype, operand.a);
                let mut b = super::convert::widen_f64(operand.b_dtype, operand.b);
                b.iter_mut().for_each(|value| *value *= operand.coefficient);
                let (a, b) = views(&a, &b, operand.rank, inputs, outputs);
                let (left, right) = sides(orientation, a, b);
                for k in 0..operand.rank {
                    for row in 0..rows {
                        factors.left[row * rank + first + k] = left.at(k, row);
                    }
                    for column in 0..columns {
                        factors.right[(first + k) * columns + column] = right.at(k, column);
                    }
                }
                first += operand.rank;
            }
            return Self::Double(factors);
        }
        let widened: Vec<_> = (operands.iter())
            .map(|operand| (wide(operand.a_dtype, operand.a), wide(operand.b_dtype, operand.b)))
            .collect();
        let coefficient =
            |operand: &Operand<'_>| (operand.coefficient != 1.0).then_some(operand.coefficient);
        let (lefts, rights): (Vec<_>, Vec<_>) = (operands.iter().zip(&widened))
            .map(|(operand, (a, b))| {
                let (a, b) = views(a, b, operand.rank, inputs, outputs);
                let rank = operand.rank;
                let a = Side { view: a, rank, coefficient: None };
                let b = Side { view: b, rank, coefficient: coefficient(operand) };
                sides(orientation, a, b)
            })
            .unzip();
        if set.splits(weight, rank) {
            return Self::Split(SplitFactors::pack((rows, columns), &lefts, &rights));
        }
        let shape = set.block_shape(weight);
        let mut factors = PackedFactors {
            shape,
            rows,
            columns,
            rank,
            left: in_strips(&lefts, rows, shape.rows, shape.rows),
            right: in_strips(&rights, columns, shape.panel(), shape.lanes),
        };
        if shape.paired {
            factors.pair();
        }
        if shape.plain_nans {
            factors.make_nans_plain();
        }
        Self::Single(factors)
    }

    /// Rows of the product.
    pub fn rows(&self) -> usize {
        match self {
            Self::Single(factors) => factors.rows,
            Self::Split(factors) => factors.rows(),
            Self::Double(factors) => factors.rows,
        }
    }

    /// Columns of the product.
    pub fn columns(&self) -> usize {
        match self {
            Self::Single(factors) => factors.columns,
            Self::Split(factors) => factors.columns(),
            Self::Double(factors) => factors.columns,
        }
    }
}

/// A factor addressed as (rank index, other index), whichever way it is stored.
#[derive(Clone, Copy)]
struct View<'a, T> {
    values: &'a [T],
    rank_stride: usize,
    other_stride: usize,
}

impl<T: Copy> View<'_, T> {
    #[inline(always)]
    fn at(&self, k: usize, other: usize) -> T {
        self.values[k * self.rank_stride + other * self.other_stride]
    }
}

fn views<'a, T>(
    a: &'a [T],
    b: &'a [T],
    rank: usize,
    inputs: usize,
    outputs: usize,
) -> (View<'a, T>, View<'a, T>) {
    assert!(a.len() == rank * inputs && b.len() == outputs * rank, "factors of the weight's shape");
    let a = View { values: a, rank_stride: inputs, other_stride: 1 };
    let b = View { values: b, rank_stride: 1, other_stride: rank };
    (a, b)
}

/// Left and right side of the product for that orientation.
fn sides<S>(orientation: Orientation, a: S, b: S) -> (S, S) {
    match orientation {
        Orientation::OutIn => (b, a),
        Orientation::InOut => (a, b),
    }
}

/// A factor's elements in f32, where they lie if they are f32 already.
fn wide<'a>(dtype: &Dtype, bytes: &'a [u8]) -> Cow<'a, [f32]> {
    if *dtype == Dtype::F32
        && cfg!(target_endian = "little")
        && let Ok(values) = bytemuck::try_cast_slice(bytes)
    {
        return Cow::Borrowed(values);
    }
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    super::convert::widen(dtype, bytes, &mut values);
    Cow::Owned(values)
}

/// One operand's part of a side of the product.
pub(super) struct Side<'a> {
    view: View<'a, f32>,
    pub(super) rank: usize,
    /// What each element is multiplied by.
    coefficient: Option<f64>,
}

impl Side<'_> {
    /// The element of a rank index and a row or column.
    pub(super) fn at(&self, k: usize, other: usize) -> f32 {
        let value = self.view.at(k, other);
        self.coefficient.map_or(value, |coefficient| scaled(value, coefficient))
    }
}

/// An element times a coefficient, rounded once.
fn scaled(value: f32, coefficient: f64) -> f32 {
    (f64::from(value) * coefficient) as f32
}

/// A side of the product in the order in which the kernels read it: strips of `width` rows or
/// columns, in each the rank indices of all operands one behind the other, and for each of these
/// the strip's elements beside one another. The last strip ends, filled up with zeros, at a
/// multiple of `unit`.
fn in_strips(operands: &[Side<'_>], extent: usize, width: usize, unit: usize) -> Vec<f32> {
    let rank: usize = operands.iter().map(|operand| operand.rank).sum();
    let mut strips = Vec::with_capacity(extent.next_multiple_of(unit) * rank);
    for first in (0..extent).step_by(width) {
        let count = width.min(extent - first);
        let padding = count.next_multiple_of(unit) - count;
        for Side { view, rank, coefficient } in operands {
            for k in 0..*rank {
                let start = k * view.rank_stride + first * view.other_stride;
                let values = view.values[start..].iter().step_by(view.other_stride).take(count);
                match coefficient {
                    Some(coefficient) => {
                        strips.extend(values.map(|value| scaled(*value, *coefficient)))
                    }
                    None if view.other_stride == 1 => {
                        strips.extend_from_slice(&view.values[start..start + count]);
                    }
                    None => strips.extend(values),
                }
                strips.extend(std::iter::repeat_n(0.0, padding));
            }
        }
    }
    strips
}

/// Single-precision factors in blocks of rows and panels of columns, padded with zeros.
#[derive(Debug)]
pub struct PackedFactors {
    shape: BlockShape,
    rows: usize,
    columns: usize,
    rank: usize,
    left: Vec<f32>,
    right: Vec<f32>,
}

/// The part of the right factor that one block of columns needs.
pub(super) struct Panel<'a> {
    pub first_column: usize,
    pub columns: usize,
    /// Rank × (columns rounded up to whole vectors).
    pub values: &'a [f32],
}

impl PackedFactors {
    /// Packs factors that lie side by side already, `left` rows × rank and `right` rank × columns, for
    /// blocks without pairs.
    pub(super) fn of(
        shape: BlockShape,
        (rows, columns): (usize, usize),
        rank: usize,
        (left, right): (&[f32], &[f32]),
    ) -> Self {
        assert!(!shape.paired && left.len() == rows * rank && right.len() == rank * columns);
        let side = |values, rank_stride, other_stride| {
            [Side { view: View { values, rank_stride, other_stride }, rank, coefficient: None }]
        };
        Self {
            shape,
            rows,
            columns,
            rank,
            left: in_strips(&side(left, 1, rank), rows, shape.rows, shape.rows),
            right: in_strips(&side(right, columns, 1), columns, shape.panel(), shape.lanes),
        }
    }

    /// Brings the right factor's whole panels into pairs.
    fn pair(&mut self) {
        const PAIR: usize = 16;
        debug_assert_eq!(2 * self.shape.lanes, PAIR, "two vectors of the only set with pairs");
        let whole = self.columns / self.shape.panel() * self.shape.panel();
        for pair in self.right[..whole * self.rank].as_chunks_mut::<PAIR>().0 {
            let columns = *pair;
            *pair = std::array::from_fn(|place| columns[place % 8 * 2 + place / 8]);
        }
    }

    /// Brings both factors' NaNs into the form that needs no rounding.
    fn make_nans_plain(&mut self) {
        for value in self.left.iter_mut().chain(&mut self.right) {
            *value = if value.is_nan() { f32::NAN } else { *value };
        }
    }

    pub(super) fn shape(&self) -> BlockShape {
        self.shape
    }

    pub(super) fn rank(&self) -> usize {
        self.rank
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }

    /// The left factor's block of rows that begins at `row`, a multiple of the block's height.
    pub(super) fn left_block(&self, row: usize) -> &[f32] {
        let size = self.shape.rows * self.rank;
        let block = row / self.shape.rows;
        &self.left[block * size..(block + 1) * size]
    }

    /// The right factor's panels from left to right.
    pub(super) fn panels(&self) -> impl Iterator<Item = Panel<'_>> {
        let width = self.shape.panel();
        (0..self.columns).step_by(width).map(move |first_column| {
            let columns = width.min(self.columns - first_column);
            let padded = columns.next_multiple_of(self.shape.lanes);
            let start = first_column * self.rank;
            let values = &self.right[start..start + padded * self.rank];
            Panel { first_column, columns, values }
        })
    }
}

/// Double-precision factors, row-major.
#[derive(Debug)]
pub struct DoubleFactors {
    rows: usize,
    columns: usize,
    pub(super) rank: usize,
    /// Rows × rank.
    pub(super) left: Vec<f64>,
    /// Rank × columns.
    pub(super) right: Vec<f64>,
}

impl DoubleFactors {
    pub(super) fn columns(&self) -> usize {
        self.columns
    }
}
