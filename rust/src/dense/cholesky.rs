//! From a Gram matrix to a factor of it, where that is safe.

use super::Matrix;

/// The least pivot of the unit-diagonal Gram matrix's factor that is trusted. The factor's
/// relative error is about ε·κ², and this pivot is about 1/κ: 1e-3 leaves ten digits.
const LEAST_PIVOT: f64 = 1e-3;

/// A square `R` with `RᵀR = gram`, or `None` where rounding in the Gram matrix would show in it.
/// Columns are brought to unit length first (their lengths do no harm) and taken in the order of
/// what is left of them, so that the last pivot tells the condition.
pub(crate) fn gram_factor(gram: &Matrix) -> Option<Matrix> {
    let size = gram.rows;
    let lengths: Vec<f64> = (0..size).map(|i| gram.get(i, i).sqrt()).collect();
    if lengths.iter().any(|&length| !length.is_normal()) {
        return None;
    }
    let mut rest: Vec<f64> = vec![1.0; size];
    let mut open: Vec<usize> = (0..size).collect();
    // Row `step` of R, for all columns, is kept as column `step` so that it is contiguous.
    let mut factor = Matrix::zeros(size, size);
    for step in 0..size {
        let (position, &pivot) =
            open.iter().enumerate().max_by(|a, b| rest[*a.1].total_cmp(&rest[*b.1]))?;
        open.swap_remove(position);
        if rest[pivot] < LEAST_PIVOT * LEAST_PIVOT {
            return None;
        }
        let root = rest[pivot].sqrt();
        factor.set(pivot, step, root);
        for &column in &open {
            let mut value = gram.get(pivot, column) / (lengths[pivot] * lengths[column]);
            for earlier in 0..step {
                value -= factor.get(pivot, earlier) * factor.get(column, earlier);
            }
            value /= root;
            factor.set(column, step, value);
            rest[column] -= value * value;
        }
    }
    let mut factor = factor.transposed();
    for (column, length) in lengths.iter().enumerate() {
        for value in factor.column_mut(column) {
            *value *= length;
        }
    }
    Some(factor)
}
