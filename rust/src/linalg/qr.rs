//! Householder QR of tall matrices.

use rayon::prelude::*;

use super::product::LongSide;
use super::{Matrix, add_scaled, dot};
use crate::kernel::vector::vectorized;

/// The least number of rows of one block of the tree that [`triangular_factor`] is.
const BLOCK: usize = 512;

/// The reflectors of a QR decomposition, and R above them.
pub(crate) struct Reflectors {
    matrix: Matrix,
    factors: Vec<f64>,
}

impl Reflectors {
    /// Decomposes a matrix of any shape.
    pub(crate) fn of(mut matrix: Matrix) -> Self {
        let mut factors = vec![0.0; matrix.rows.min(matrix.columns)];
        eliminate(&mut matrix.data, matrix.rows, &mut factors);
        Self { matrix, factors }
    }

    /// R: upper triangular, or trapezoidal where there are more columns than rows.
    pub(crate) fn triangle(&self) -> Matrix {
        let rows = self.factors.len();
        let mut triangle = Matrix::zeros(rows, self.matrix.columns);
        for column in 0..self.matrix.columns {
            let filled = rows.min(column + 1);
            triangle.column_mut(column)[..filled]
                .copy_from_slice(&self.matrix.column(column)[..filled]);
        }
        triangle
    }

    /// Q · small, where `small` has as many rows as R.
    pub(crate) fn expand(&self, small: &Matrix) -> Matrix {
        let rows = self.matrix.rows;
        let mut result = Matrix::zeros(rows, small.columns);
        for column in 0..small.columns {
            result.column_mut(column)[..small.rows].copy_from_slice(small.column(column));
        }
        if rows > 0 {
            reflect_back(&self.matrix.data, rows, &self.factors, &mut result.data);
        }
        result
    }
}

vectorized! {
    /// Puts R above and the reflectors v (with v₀ = 1 left out) below the diagonal.
    fn eliminate(data: &mut [f64], rows: usize, factors: &mut [f64]) {
        for step in 0..factors.len() {
            let (head, others) = data[step * rows..].split_at_mut(rows);
            let v = &mut head[step..];
            let tail = dot(&v[1..], &v[1..]);
            if tail == 0.0 {
                factors[step] = 0.0;
                continue;
            }
            let alpha = v[0];
            let norm = (alpha * alpha + tail).sqrt();
            let beta = if alpha > 0.0 { -norm } else { norm };
            let scale = 1.0 / (alpha - beta);
            for value in &mut v[1..] {
                *value *= scale;
            }
            let factor = (beta - alpha) / beta;
            factors[step] = factor;
            v[0] = 1.0;
            for column in others.chunks_exact_mut(rows) {
                let target = &mut column[step..];
                let projection = dot(v, target);
                add_scaled(target, -factor * projection, v);
            }
            v[0] = beta;
        }
    }
}

vectorized! {
    fn reflect_back(reflectors: &[f64], rows: usize, factors: &[f64], target: &mut [f64]) {
        for step in (0..factors.len()).rev() {
            let v = &reflectors[step * rows + step + 1..(step + 1) * rows];
            for column in target.chunks_exact_mut(rows) {
                let projection = column[step] + dot(v, &column[step + 1..]);
                let factor = -factors[step] * projection;
                column[step] += factor;
                add_scaled(&mut column[step + 1..], factor, v);
            }
        }
    }
}

/// R of a QR decomposition, through a tree of blocks of rows that fit a cache (Demmel, Grigori,
/// Hoemmen & Langou 2012): min(length, width) × width, with some signs of its rows.
pub(crate) fn triangular_factor(source: &dyn LongSide) -> Matrix {
    let (length, width) = (source.length(), source.width());
    let block = BLOCK.max(4 * width);
    let starts: Vec<usize> = (0..length).step_by(block).collect();
    let part = |&start: &usize| {
        let end = length.min(start + block);
        let mut matrix = Matrix::zeros(end - start, width);
        source.read(start, end, &mut matrix.data);
        Reflectors::of(matrix).triangle()
    };
    if starts.len() <= 1 {
        return starts.first().map_or(Matrix::zeros(0, width), part);
    }
    let parts: Vec<Matrix> = starts.par_iter().map(part).collect();
    let rows = parts.iter().map(|part| part.rows).sum();
    let mut stacked = Matrix::zeros(rows, width);
    let mut first = 0;
    for part in &parts {
        for column in 0..width {
            stacked.column_mut(column)[first..first + part.rows]
                .copy_from_slice(part.column(column));
        }
        first += part.rows;
    }
    triangular_factor(&stacked)
}
