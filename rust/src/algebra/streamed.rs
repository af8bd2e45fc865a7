//! Products with the factors of an update, and the factors themselves laid side by side, for which a few
//! rows at a time are widened: what is in memory is what was read and what is made.

use super::factored::{Grams, Rows};
use super::made::without_scale;
use crate::error::Result;
use crate::kernel::convert::{convert, for_each_f64, widen_f64_into};
use crate::linalg::{LongSide, Matrix, Multiply, View, gram_by_one_thread};
use crate::measure::spectrum::{Update, Values};
use crate::measure::statistics::ElementType;
use crate::tensor::dtype::Dtype;

/// Values that are widened together: with what is made of them they stay in the second-level cache.
const BLOCK: usize = 1 << 15;

/// L·map, row after row, with the left factors next to one another as L.
pub(super) fn left_times(update: &Update<'_>, map: &Matrix) -> Rows {
    let (rows, rank, width) = (update.rows(), update.rank(), map.columns);
    let mut result = Rows::zeros(rows, width);
    let height = (BLOCK / rank.max(1)).max(1);
    let (mut block, mut room) = (vec![0.0; height.min(rows) * rank], Vec::new());
    for first in (0..rows).step_by(height) {
        let count = height.min(rows - first);
        let block = &mut block[..count * rank];
        read_left(update, first, block, &mut room);
        let left = View { data: block, first: 0, depth: rank, depth_step: 1, count, step: rank };
        // Row-major is the transpose of what is written: the columns of the map come first.
        let target = &mut result.values[first * width..(first + count) * width];
        f64::multiply(columns_of(map), left, target, width.max(1));
    }
    result
}

/// mapᵀ·Rᵀ, row after row, with the right factors below one another as Rᵀ.
pub(super) fn times_right(map: &Matrix, update: &Update<'_>) -> Rows {
    let (columns, rank) = (update.columns(), update.rank());
    let mut result = Rows::zeros(map.columns, columns);
    let width = (BLOCK / rank.max(1)).max(1);
    let mut block = vec![0.0; width.min(columns) * rank];
    for start in (0..columns).step_by(width) {
        let count = width.min(columns - start);
        let block = &mut block[..count * rank];
        let mut rows = block.chunks_exact_mut(count);
        for term in update.terms() {
            for (row, target) in rows.by_ref().take(term.rank).enumerate() {
                term.right.read(row * columns + start, target);
            }
        }
        let right = View { data: block, first: 0, depth: rank, depth_step: count, count, step: 1 };
        if map.columns > 0 {
            f64::multiply(right, columns_of(map), &mut result.values[start..], columns);
        }
    }
    result
}

fn columns_of(map: &Matrix) -> View<'_, f64> {
    let (depth, count) = (map.rows, map.columns);
    View { data: &map.data, first: 0, depth, depth_step: 1, count, step: depth }
}

/// Rows of the left factors next to one another.
fn read_left(update: &Update<'_>, first: usize, block: &mut [f64], room: &mut Vec<f64>) {
    let rank = update.rank();
    let mut begin = 0;
    for term in update.terms() {
        let own = term.rank;
        if own == rank {
            term.left.read(first * own, block);
            return;
        }
        room.resize(block.len() / rank * own, 0.0);
        term.left.read(first * own, room);
        for (target, source) in block.chunks_exact_mut(rank).zip(room.chunks_exact(own.max(1))) {
            target[begin..begin + own].copy_from_slice(source);
        }
        begin += own;
    }
}

/// The factors of a sum next to one another, in the type in which they are written, which holds the
/// stored ones: only scales are rounded.
pub(super) struct Layout<'u> {
    /// Without the scale with which it is written.
    inner: Update<'u>,
    scale_out: f64,
    dtype: Dtype,
    /// ‖ΔW‖.
    pub norm: f64,
    /// The Gram matrix of the factors that are not scaled, those of the larger side.
    gram: Matrix,
}

/// Whether numbers of one type are numbers of another.
fn holds(dtype: &Dtype, values: &Values<'_>) -> bool {
    let own = match values {
        Values::F32(_) => Dtype::F32,
        Values::F64(_) => Dtype::F64,
        Values::Stored(tensor) => match tensor.element() {
            ElementType::F16 => Dtype::F16,
            ElementType::BF16 => Dtype::Bf16,
            ElementType::F32 => Dtype::F32,
            _ => Dtype::F64,
        },
    };
    match dtype {
        Dtype::F64 => true,
        Dtype::F32 => own != Dtype::F64,
        _ => own == *dtype,
    }
}

impl<'u> Layout<'u> {
    /// That of a sum; `None` where a factor is rounded that has no scale, where the sum is zero or not
    /// finite, and where its products cancel, so that Gram matrices do not tell its norm.
    pub fn of(
        total: &Update<'u>,
        grams: Option<&Grams>,
        scale_out: f64,
        dtype: &Dtype,
    ) -> Option<Self> {
        let terms = total.terms();
        if !terms.iter().all(|term| holds(dtype, &term.left) && holds(dtype, &term.right)) {
            return None;
        }
        let inner = without_scale(total, scale_out);
        let scales = inner.scales();
        let grams = grams.cloned().unwrap_or_else(|| Grams::of(&inner));
        let all = 0..inner.rank();
        let square = grams.product(&all, &all, &scales);
        let Grams { left, right } = grams;
        let sizes = |k: usize| (left.get(k, k) * right.get(k, k)).sqrt();
        let bound: f64 = scales.iter().enumerate().map(|(k, scale)| scale.abs() * sizes(k)).sum();
        // Nine digits are left of what is a thousandth of its terms.
        let norm = square.sqrt() * scale_out.abs();
        if !norm.is_finite() || norm == 0.0 || square <= (1e-3 * bound).powi(2) {
            return None;
        }
        let gram = if scales_left(&inner) { right } else { left };
        Some(Self { inner, scale_out, dtype: dtype.clone(), norm, gram })
    }

    pub fn rank(&self) -> usize {
        self.inner.rank()
    }

    pub fn dtype(&self) -> &Dtype {
        &self.dtype
    }

    /// Bytes of B.
    pub fn left_bytes(&self) -> u64 {
        (self.inner.rows() * self.rank() * self.dtype.size()) as u64
    }

    /// Bytes of both factors.
    pub fn bytes(&self) -> u64 {
        ((self.inner.rows() + self.inner.columns()) * self.rank() * self.dtype.size()) as u64
    }

    /// Hands on the bytes of B and then those of A, row after row, and tells ‖ΔW − written‖; `None` if a
    /// number is none in the type.
    ///
    /// # Errors
    /// Those of whoever takes the bytes.
    pub fn write(&self, sink: &mut dyn FnMut(&[u8]) -> Result<()>) -> Result<Option<f64>> {
        let Self { inner, dtype, .. } = self;
        let (rank, is_left) = (self.rank(), scales_left(inner));
        let scales = inner.scales();
        let mut rounding = Rounding { dtype, bytes: Vec::new(), back: Vec::new(), is_exact: true };
        let height = (BLOCK / rank.max(1)).max(1);
        let (mut block, mut room) = (Vec::new(), Vec::new());
        for first in (0..inner.rows()).step_by(height) {
            block.resize(height.min(inner.rows() - first) * rank, 0.0);
            read_left(inner, first, &mut block, &mut room);
            if is_left {
                for row in block.chunks_exact_mut(rank) {
                    row.iter_mut().zip(&scales).for_each(|(value, scale)| *value *= scale);
                }
            }
            let Some(bytes) = rounding.round(&block) else { return Ok(None) };
            sink(bytes)?;
        }
        for term in inner.terms() {
            for first in (0..term.right.len()).step_by(BLOCK) {
                block.resize(BLOCK.min(term.right.len() - first), 0.0);
                term.right.read(first, &mut block);
                if !is_left {
                    block.iter_mut().for_each(|value| *value *= term.scale);
                }
                let Some(bytes) = rounding.round(&block) else { return Ok(None) };
                sink(bytes)?;
            }
        }
        if rounding.is_exact {
            return Ok(Some(0.0));
        }
        // With E for what the scaled side lost, ‖E·A‖² or ‖B·E‖² from the Gram matrices of both.
        let own = gram_by_one_thread(&Lost { update: inner, scales: &scales, is_left, dtype });
        let square: f64 = own.data.iter().zip(&self.gram.data).map(|(l, r)| l * r).sum();
        Ok(Some(self.scale_out.abs() * square.max(0.0).sqrt()))
    }
}

/// Whether scales are on the left factors, which are the smaller ones; a power of two is exact on either.
pub(super) fn scales_left(update: &Update<'_>) -> bool {
    update.rows() <= update.columns()
}

/// Numbers on their way to their type.
struct Rounding<'a> {
    dtype: &'a Dtype,
    bytes: Vec<u8>,
    back: Vec<f64>,
    /// Whether none was rounded so far.
    is_exact: bool,
}

impl Rounding<'_> {
    /// Their bytes; `None` if one is no finite number of the type.
    fn round(&mut self, values: &[f64]) -> Option<&[u8]> {
        self.bytes.resize(values.len() * self.dtype.size(), 0);
        if !convert(&Dtype::F64, bytemuck::cast_slice(values), self.dtype, &mut self.bytes) {
            return None;
        }
        if self.is_exact {
            self.back.resize(values.len(), 0.0);
            widen_f64_into(self.dtype, &self.bytes, &mut self.back);
            self.is_exact = self.back == values;
        }
        Some(&self.bytes)
    }
}

/// What the elements of the scaled side lose when they are rounded.
struct Lost<'a> {
    update: &'a Update<'a>,
    scales: &'a [f64],
    is_left: bool,
    dtype: &'a Dtype,
}

impl LongSide for Lost<'_> {
    fn length(&self) -> usize {
        if self.is_left { self.update.rows() } else { self.update.columns() }
    }

    fn width(&self) -> usize {
        self.update.rank()
    }

    fn read(&self, start: usize, end: usize, output: &mut [f64]) {
        let side = if self.is_left { self.update.left() } else { self.update.right() };
        side.read(start, end, output);
        for (column, scale) in output.chunks_exact_mut((end - start).max(1)).zip(self.scales) {
            column.iter_mut().for_each(|value| *value *= scale);
        }
        let mut bytes = vec![0; output.len() * self.dtype.size()];
        convert(&Dtype::F64, bytemuck::cast_slice(output), self.dtype, &mut bytes);
        for_each_f64(self.dtype, &bytes, |index, value| output[index] -= value);
    }
}
