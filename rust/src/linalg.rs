//! The small dense linear algebra under factored updates, in f64: products over the long side of
//! tall matrices, Cholesky, Householder QR, and a singular value decomposition by one-sided
//! Jacobi rotations.
//!
//! Written here rather than taken from a library because the accuracy of the smallest singular
//! values is the point: one-sided Jacobi after a pivoted QR finds them to high relative accuracy
//! (Drmač & Veselić 2008), where a bidiagonalisation guarantees them relative to the largest
//! alone. The matrices it is run on are r×r. Where the spectrum turns out to be so short that the
//! two are the same, the bidiagonalisation is what is used, for it takes a fraction of the time.

mod bidiagonal;
mod cholesky;
mod multiply;
mod product;
mod qr;
mod svd;

#[cfg(test)]
mod tests;

pub(crate) use bidiagonal::leading_singular_values;
pub(crate) use cholesky::gram_factor;
pub(crate) use multiply::{Multiply, View};
#[cfg(test)]
pub(crate) use product::gram;
pub(crate) use product::{LongSide, PANEL, cross_product, gram_and_sums, gram_by_one_thread};
pub(crate) use qr::{Reflectors, triangular_factor};
pub(crate) use svd::{Decomposition, decompose, singular_values};

/// A dense matrix, column after column.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Matrix {
    pub rows: usize,
    pub columns: usize,
    pub data: Vec<f64>,
}

impl Matrix {
    pub(crate) fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, data: vec![0.0; rows * columns] }
    }

    pub(crate) fn column(&self, column: usize) -> &[f64] {
        &self.data[column * self.rows..(column + 1) * self.rows]
    }

    pub(crate) fn column_mut(&mut self, column: usize) -> &mut [f64] {
        &mut self.data[column * self.rows..(column + 1) * self.rows]
    }

    pub(crate) fn get(&self, row: usize, column: usize) -> f64 {
        self.data[column * self.rows + row]
    }

    pub(crate) fn set(&mut self, row: usize, column: usize, value: f64) {
        self.data[column * self.rows + row] = value;
    }

    pub(crate) fn transposed(&self) -> Self {
        let mut result = Self::zeros(self.columns, self.rows);
        for column in 0..self.columns {
            for row in 0..self.rows {
                result.set(column, row, self.get(row, column));
            }
        }
        result
    }

    /// The first `count` columns.
    pub(crate) fn leading(&self, count: usize) -> Self {
        Self { rows: self.rows, columns: count, data: self.data[..self.rows * count].to_vec() }
    }

    /// `self · diag(scales) · otherᵀ`.
    pub(crate) fn scaled_product(&self, scales: &[f64], other: &Self) -> Self {
        let mut result = Self::zeros(self.rows, other.rows);
        for (inner, &scale) in scales.iter().enumerate() {
            for column in 0..other.rows {
                let factor = scale * other.get(column, inner);
                accumulate(result.column_mut(column), factor, self.column(inner));
            }
        }
        result
    }

    /// `self · other`.
    pub(crate) fn product(&self, other: &Self) -> Self {
        let mut result = Self::zeros(self.rows, other.columns);
        for column in 0..other.columns {
            for inner in 0..self.columns {
                let factor = other.get(inner, column);
                accumulate(result.column_mut(column), factor, self.column(inner));
            }
        }
        result
    }
}

/// Partial sums that run side by side in a dot product, whatever the vector width.
const LANES: usize = 16;

/// The dot product, added in a fixed order.
#[inline(always)]
fn dot(x: &[f64], y: &[f64]) -> f64 {
    let mut lanes = [0.0; LANES];
    let (x_blocks, x_rest) = x.as_chunks::<LANES>();
    let (y_blocks, y_rest) = y.as_chunks::<LANES>();
    for (a, b) in x_blocks.iter().zip(y_blocks) {
        for lane in 0..LANES {
            lanes[lane] += a[lane] * b[lane];
        }
    }
    for (lane, (a, b)) in x_rest.iter().zip(y_rest).enumerate() {
        lanes[lane] += a * b;
    }
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] += lanes[lane + width];
        }
        width /= 2;
    }
    lanes[0]
}

/// `target += factor · source`.
#[inline(always)]
fn add_scaled(target: &mut [f64], factor: f64, source: &[f64]) {
    for (t, s) in target.iter_mut().zip(source) {
        *t += factor * s;
    }
}

crate::kernel::vector::vectorized! {
    fn accumulate(target: &mut [f64], factor: f64, source: &[f64]) {
        add_scaled(target, factor, source);
    }
}
