//! Orthonormal bases and thin singular value decompositions of matrices in memory.

use faer::MatRef;

use super::factored::{Decomposed, Rows};
use crate::linalg::{Decomposition, Matrix, decompose};

/// How many singular values are above what rounding in f64 makes of zero.
pub(crate) fn numerical_rank(values: &[f64], rows: usize, columns: usize) -> usize {
    let first = values.first().copied().unwrap_or(0.0);
    let floor = rows.max(columns) as f64 * f64::EPSILON * first;
    values.iter().take_while(|value| **value > floor).count()
}

/// Orthonormal columns Q and a small C with Q·C the matrix.
pub(crate) fn orthonormal(matrix: &Rows) -> (Rows, Matrix) {
    let width = matrix.rows.min(matrix.columns);
    if width == 0 {
        return (Rows::zeros(matrix.rows, 0), Matrix::zeros(0, matrix.columns));
    }
    let view = MatRef::from_row_major_slice(&matrix.values, matrix.rows, matrix.columns);
    let found = view.qr();
    let (thin, triangle) = (found.compute_thin_Q(), found.thin_R());
    let mut q = Rows::zeros(matrix.rows, width);
    for (row, values) in q.values.chunks_exact_mut(width).enumerate() {
        values.iter_mut().enumerate().for_each(|(column, value)| *value = thin[(row, column)]);
    }
    let mut c = Matrix::zeros(width, matrix.columns);
    for column in 0..matrix.columns {
        let filled = c.column_mut(column).iter_mut().enumerate().take(column + 1);
        filled.for_each(|(row, value)| *value = triangle[(row, column)]);
    }
    (q, c)
}

/// U, σ and V of a matrix up to its numerical rank.
pub(crate) fn thin(matrix: &Rows) -> Decomposed<'static> {
    let is_tall = matrix.rows >= matrix.columns;
    let (q, c) = if is_tall { orthonormal(matrix) } else { orthonormal(&matrix.transposed()) };
    let found = decompose(&c);
    let rank = numerical_rank(&found.values, matrix.rows, matrix.columns);
    let long = q.times(&found.left.leading(rank));
    let short = Rows::of_columns(&found.right.leading(rank));
    let (left, right) = if is_tall { (long, short) } else { (short, long) };
    Decomposed::explicit(left, found.values[..rank].to_vec(), right)
}

/// A decomposition whose small values are exact relative to the largest alone, in a fraction of the time;
/// `None` if it cannot be found.
pub(crate) fn fast_decomposition(matrix: MatRef<'_, f64>) -> Option<Decomposition> {
    let found = matrix.thin_svd().ok()?;
    let columns = |matrix: MatRef<'_, f64>| {
        let mut own = Matrix::zeros(matrix.nrows(), matrix.ncols());
        for column in 0..own.columns {
            let target = own.column_mut(column).iter_mut().enumerate();
            target.for_each(|(row, value)| *value = matrix[(row, column)]);
        }
        own
    };
    let values = found.S().column_vector().iter().copied().collect();
    Some(Decomposition { left: columns(found.U()), values, right: columns(found.V()) })
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::ramp;

    fn matrix(rows: usize, columns: usize) -> Rows {
        let values = ramp((rows * columns) as u64, 3).into_iter().map(f64::from).collect();
        Rows { rows, columns, values }
    }

    fn far(one: &Rows, other: &Rows) -> f64 {
        let pairs = one.values.iter().zip(&other.values);
        pairs.map(|(x, y)| (x - y).abs()).fold(0.0, f64::max)
    }

    #[test]
    fn a_basis_times_its_coordinates_is_the_matrix() {
        for (rows, columns) in [(9, 4), (4, 9), (5, 5), (3, 0), (0, 3)] {
            let matrix = matrix(rows, columns);
            let (q, c) = orthonormal(&matrix);
            assert!(far(&q.times(&c), &matrix) < 1e-13);
            let gram = q.gram();
            for (index, value) in gram.data.iter().enumerate() {
                let wanted = f64::from(index % (gram.rows + 1) == 0);
                assert!((value - wanted).abs() < 1e-13);
            }
        }
    }

    #[test]
    fn a_thin_decomposition_ends_at_the_numerical_rank() {
        let product = matrix(9, 2).times(&matrix(2, 7).to_matrix());
        for matrix in [product.clone(), product.transposed()] {
            let found = thin(&matrix);
            assert_eq!(found.values.len(), 2);
            let factors = found.with_scales(&found.values, &[1.0; 2]);
            assert!(far(&factors.b.times(&factors.a.to_matrix()), &matrix) < 1e-12);
        }
    }
}
