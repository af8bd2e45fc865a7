//! From a Gram matrix to a factor of it, where that is safe.

use super::{Matrix, dot};
use crate::kernel::vector::vectorized;

/// The least pivot of the unit-diagonal Gram matrix's factor that is trusted. The factor's
/// relative error is about ε·κ², and this pivot is about 1/κ: 1e-3 leaves ten digits.
const MIN_PIVOT: f64 = 1e-3;

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
    let mut factor = Matrix::zeros(size, size);
    for step in 0..size {
        let (position, &pivot) =
            open.iter().enumerate().max_by(|a, b| rest[*a.1].total_cmp(&rest[*b.1]))?;
        open.swap_remove(position);
        if rest[pivot] < MIN_PIVOT * MIN_PIVOT {
            return None;
        }
        eliminate(&mut factor.data, gram.column(pivot), &lengths, &mut rest, &open, (step, pivot));
    }
    for (column, length) in lengths.iter().enumerate() {
        for value in factor.column_mut(column) {
            *value *= length;
        }
    }
    Some(factor)
}

vectorized! {
    /// Finds row `step` of the factor, of which the pivot's column of the Gram matrix is given.
    fn eliminate(
        factor: &mut [f64],
        products: &[f64],
        lengths: &[f64],
        rest: &mut [f64],
        open: &[usize],
        place: (usize, usize),
    ) {
        let (step, pivot) = place;
        let size = lengths.len();
        let root = rest[pivot].sqrt();
        factor[pivot * size + step] = root;
        for &column in open {
            let (own, other) = (&factor[pivot * size..][..step], &factor[column * size..][..step]);
            let unit = products[column] / (lengths[pivot] * lengths[column]);
            let value = (unit - dot(own, other)) / root;
            factor[column * size + step] = value;
            rest[column] -= value * value;
        }
    }
}
