//! Singular values and vectors of small matrices, to high relative accuracy.

use super::qr::Reflectors;
use super::{Matrix, dot};
use crate::kernel::vector::vectorized;

/// Sweeps after which the rotations are given up on; ten are many.
const MAX_SWEEPS: usize = 60;

/// `U diag(values) Vᵀ`, values descending, as many as the smaller extent.
pub(crate) struct Decomposition {
    pub left: Matrix,
    pub values: Vec<f64>,
    pub right: Matrix,
}

/// The singular values, descending, of a finite matrix.
pub(crate) fn singular_values(matrix: &Matrix) -> Vec<f64> {
    if matrix.rows < matrix.columns {
        return singular_values(&matrix.transposed());
    }
    let Some((matrix, unit)) = normalized(matrix) else {
        return vec![0.0; matrix.columns];
    };
    let (_, mut columns, _) = precondition(matrix);
    rotate_until_orthogonal(&mut columns.data, columns.rows, &mut []);
    let mut values: Vec<f64> =
        (0..columns.columns).map(|index| unit * length(columns.column(index))).collect();
    values.sort_unstable_by(|a, b| b.total_cmp(a));
    values
}

/// The singular value decomposition of a finite matrix. Vectors that belong to a singular value
/// of zero are zero on the right side.
pub(crate) fn decompose(matrix: &Matrix) -> Decomposition {
    if matrix.rows < matrix.columns {
        let Decomposition { left, values, right } = decompose(&matrix.transposed());
        return Decomposition { left: right, values, right: left };
    }
    let size = matrix.columns;
    let Some((normal, unit)) = normalized(matrix) else {
        return Decomposition {
            left: Matrix::zeros(matrix.rows, size),
            values: vec![0.0; size],
            right: Matrix::zeros(size, size),
        };
    };
    // matrix · P = Q R and Rᵀ · W = Y diag(σ), so matrix = (Q W) diag(σ) (P Y)ᵀ.
    let (reflectors, mut columns, order) = precondition(normal);
    let mut rotations = Matrix::zeros(size, size);
    for index in 0..size {
        rotations.set(index, index, 1.0);
    }
    rotate_until_orthogonal(&mut columns.data, size, &mut rotations.data);
    let lengths: Vec<f64> = (0..size).map(|index| length(columns.column(index))).collect();
    let mut descending: Vec<usize> = (0..size).collect();
    descending.sort_by(|&a, &b| lengths[b].total_cmp(&lengths[a]));
    let mut inner = Matrix::zeros(size, size);
    let mut right = Matrix::zeros(size, size);
    let mut values = Vec::with_capacity(size);
    for (target, &source) in descending.iter().enumerate() {
        values.push(unit * lengths[source]);
        inner.column_mut(target).copy_from_slice(rotations.column(source));
        if lengths[source] > 0.0 {
            for (row, &value) in columns.column(source).iter().enumerate() {
                right.set(order[row], target, value / lengths[source]);
            }
        }
    }
    Decomposition { left: reflectors.expand(&inner), values, right }
}

fn length(column: &[f64]) -> f64 {
    dot(column, column).sqrt()
}

/// The matrix divided by a power of two near its largest entry, which keeps squares in range;
/// `None` for zero.
pub(super) fn normalized(matrix: &Matrix) -> Option<(Matrix, f64)> {
    let largest = matrix.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if largest == 0.0 {
        return None;
    }
    let unit = 2.0f64.powi((largest.log2().floor() as i32).clamp(-1000, 1000));
    let mut matrix = matrix.clone();
    for value in &mut matrix.data {
        *value /= unit;
    }
    Some((matrix, unit))
}

/// QR with column pivoting, and Rᵀ, whose columns one-sided Jacobi makes orthogonal in few sweeps
/// (Drmač & Veselić 2008). `order[i]` is the matrix's column that stands at place i.
fn precondition(matrix: Matrix) -> (Reflectors, Matrix, Vec<usize>) {
    // The order is found on a copy by modified Gram-Schmidt; the decomposition itself is then an
    // ordinary one of the reordered columns.
    let mut rest = matrix.clone();
    let mut order: Vec<usize> = (0..matrix.columns).collect();
    choose_order(&mut rest.data, matrix.rows, &mut order);
    let mut sorted = Matrix::zeros(matrix.rows, matrix.columns);
    for (target, &source) in order.iter().enumerate() {
        sorted.column_mut(target).copy_from_slice(matrix.column(source));
    }
    let reflectors = Reflectors::of(sorted);
    let columns = reflectors.triangle().transposed();
    (reflectors, columns, order)
}

vectorized! {
    fn choose_order(rest: &mut [f64], rows: usize, order: &mut [usize]) {
        let count = order.len();
        for step in 0..count {
            let mut best = (step, -1.0);
            for index in step..count {
                let column = &rest[index * rows..(index + 1) * rows];
                let square = dot(column, column);
                if square > best.1 {
                    best = (index, square);
                }
            }
            if best.1 <= 0.0 {
                return;
            }
            order.swap(step, best.0);
            let (head, tail) = rest[step * rows..].split_at_mut(rows);
            if best.0 > step {
                head.swap_with_slice(&mut tail[(best.0 - step - 1) * rows..][..rows]);
            }
            for column in tail.chunks_exact_mut(rows) {
                let projection = dot(head, column) / best.1;
                super::add_scaled(column, -projection, head);
            }
        }
    }
}

vectorized! {
    /// One-sided Jacobi: rotates pairs of columns until all are orthogonal to working precision.
    /// `rotations`, unless empty, is a square matrix that the same rotations are applied to.
    fn rotate_until_orthogonal(columns: &mut [f64], rows: usize, rotations: &mut [f64]) {
        if rows == 0 {
            return;
        }
        let count = columns.len() / rows;
        let tolerance = f64::EPSILON * (rows as f64).sqrt();
        let mut squares = vec![0.0; count];
        for _ in 0..MAX_SWEEPS {
            for (square, column) in squares.iter_mut().zip(columns.chunks_exact(rows)) {
                *square = dot(column, column);
            }
            let mut rotated = false;
            for first in 0..count {
                for second in first + 1..count {
                    let (head, tail) = columns.split_at_mut(second * rows);
                    let x = &mut head[first * rows..(first + 1) * rows];
                    let y = &mut tail[..rows];
                    let (a, b) = (squares[first], squares[second]);
                    if a == 0.0 || b == 0.0 {
                        continue;
                    }
                    let product = dot(x, y);
                    if product.abs() <= tolerance * a.sqrt() * b.sqrt() {
                        continue;
                    }
                    rotated = true;
                    let zeta = (b - a) / (2.0 * product);
                    let tangent = zeta.signum() / (zeta.abs() + zeta.hypot(1.0));
                    let cosine = 1.0 / tangent.hypot(1.0);
                    let sine = cosine * tangent;
                    rotate(x, y, cosine, sine);
                    if !rotations.is_empty() {
                        let (head, tail) = rotations.split_at_mut(second * count);
                        let x = &mut head[first * count..(first + 1) * count];
                        rotate(x, &mut tail[..count], cosine, sine);
                    }
                    // Where much cancels, the updated squares are not good enough.
                    let (new_a, new_b) = (a - tangent * product, b + tangent * product);
                    squares[first] = if new_a > 0.5 * a { new_a } else { dot(x, x) };
                    squares[second] = if new_b > 0.5 * b { new_b } else { dot(y, y) };
                }
            }
            if !rotated {
                return;
            }
        }
    }
}

#[inline(always)]
fn rotate(x: &mut [f64], y: &mut [f64], cosine: f64, sine: f64) {
    for (a, b) in x.iter_mut().zip(y) {
        let (old_a, old_b) = (*a, *b);
        *a = cosine * old_a - sine * old_b;
        *b = sine * old_a + cosine * old_b;
    }
}
