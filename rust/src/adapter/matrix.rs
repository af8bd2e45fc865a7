//! Matrices in f64, row after row: what updates are composed of that are no product of two stored
//! tensors, and whole weights.

use crate::error::Result;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

use super::factors::Pair;

/// A matrix in f64, row after row.
#[derive(Debug, Clone, PartialEq)]
pub struct Matrix {
    /// Rows.
    pub rows: usize,
    /// Columns.
    pub columns: usize,
    /// The elements.
    pub values: Vec<f64>,
}

impl Matrix {
    /// Zeros.
    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, values: vec![0.0; rows * columns] }
    }

    /// Ones on the diagonal.
    pub fn identity(extent: usize) -> Self {
        let mut matrix = Self::zeros(extent, extent);
        matrix.values.iter_mut().step_by(extent + 1).for_each(|value| *value = 1.0);
        matrix
    }

    /// A stored tensor, all of its dimensions but the first taken as one.
    ///
    /// # Errors
    /// [`crate::Error::Adapter`] if a file changed meanwhile, [`crate::Error::Io`].
    pub fn read(tensor: &Tensor) -> Result<Self> {
        let rows = tensor.shape.first().copied().unwrap_or(1) as usize;
        let values = tensor.read_f64()?;
        Ok(Self { rows, columns: values.len() / rows.max(1), values })
    }

    /// One row.
    pub fn row(&self, row: usize) -> &[f64] {
        &self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// One row, to be written to.
    pub fn row_mut(&mut self, row: usize) -> &mut [f64] {
        &mut self.values[row * self.columns..(row + 1) * self.columns]
    }

    /// The transpose.
    #[must_use]
    pub fn transposed(&self) -> Self {
        let mut result = Self::zeros(self.columns, self.rows);
        for (row, values) in self.values.chunks_exact(self.columns.max(1)).enumerate() {
            for (column, value) in values.iter().enumerate() {
                result.values[column * self.rows + row] = *value;
            }
        }
        result
    }

    /// The product with another one to the right.
    #[must_use]
    pub fn times(&self, other: &Self) -> Self {
        let mut result = Self::zeros(self.rows, other.columns);
        for row in 0..self.rows {
            let factors = &self.values[row * self.columns..(row + 1) * self.columns];
            let target = &mut result.values[row * other.columns..(row + 1) * other.columns];
            for (factor, values) in factors.iter().zip(other.values.chunks(other.columns.max(1))) {
                if *factor != 0.0 {
                    target.iter_mut().zip(values).for_each(|(to, from)| *to += factor * from);
                }
            }
        }
        result
    }

    /// The Kronecker product: each element of this one times the whole other.
    #[must_use]
    pub fn kronecker(&self, other: &Self) -> Self {
        let mut result = Self::zeros(self.rows * other.rows, self.columns * other.columns);
        for row in 0..result.rows {
            let (left, right) = (self.row(row / other.rows), other.row(row % other.rows));
            let target = result.row_mut(row);
            for (factor, target) in left.iter().zip(target.chunks_exact_mut(other.columns)) {
                target.iter_mut().zip(right).for_each(|(to, from)| *to = factor * from);
            }
        }
        result
    }

    /// Σⱼ core[i, j, k…] · right[j, n], with rows i and columns (n, k…): a core of Tucker's form with
    /// its second factor. The core is (i, j·k).
    #[must_use]
    pub fn contract(core: &Self, right: &Self) -> Self {
        let kernel = core.columns / right.rows.max(1);
        let mut result = Self::zeros(core.rows, right.columns * kernel);
        for row in 0..core.rows {
            for middle in 0..right.rows {
                let core = &core.row(row)[middle * kernel..(middle + 1) * kernel];
                let start = row * right.columns * kernel;
                let target = &mut result.values[start..start + right.columns * kernel];
                for (factor, target) in
                    right.row(middle).iter().zip(target.chunks_exact_mut(kernel))
                {
                    target.iter_mut().zip(core).for_each(|(to, from)| *to += factor * from);
                }
            }
        }
        result
    }

    /// The solution X of self · X = right, by elimination with row exchanges; `None` where there is
    /// none that could be found.
    pub fn solve(&self, right: &Self) -> Option<Self> {
        let (mut left, mut result) = (self.clone(), right.clone());
        for column in 0..left.columns {
            let size = |row: &usize| left.row(*row)[column].abs();
            let pivot = (column..left.rows).max_by(|x, y| size(x).total_cmp(&size(y)))?;
            for matrix in [&mut left, &mut result] {
                let width = matrix.columns;
                for index in 0..width {
                    matrix.values.swap(column * width + index, pivot * width + index);
                }
            }
            let divisor = left.row(column)[column];
            if !divisor.is_finite() || divisor == 0.0 {
                return None;
            }
            for matrix in [&mut left, &mut result] {
                matrix.row_mut(column).iter_mut().for_each(|value| *value /= divisor);
            }
            let (own, own_result) = (left.row(column).to_vec(), result.row(column).to_vec());
            for row in (0..left.rows).filter(|row| *row != column) {
                let factor = left.row(row)[column];
                if factor != 0.0 {
                    let subtract = |target: &mut [f64], values: &[f64]| {
                        target.iter_mut().zip(values).for_each(|(to, from)| *to -= factor * from);
                    };
                    subtract(left.row_mut(row), &own);
                    subtract(result.row_mut(row), &own_result);
                }
            }
        }
        Some(result)
    }

    /// The bytes in f64.
    pub fn into_bytes(self) -> Vec<u8> {
        self.values.into_iter().flat_map(f64::to_le_bytes).collect()
    }

    /// The pair of factors B and A.
    ///
    /// # Panics
    /// If they have no common extent.
    pub fn pair(b: Self, a: Self) -> Pair {
        assert_eq!(b.columns, a.rows, "factors have a common extent");
        Pair {
            rank: a.rows,
            outputs: b.rows,
            inputs: a.columns,
            a: a.into_bytes(),
            a_dtype: Dtype::F64,
            b: b.into_bytes(),
            b_dtype: Dtype::F64,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn matrix(rows: usize, columns: usize, from: f64) -> Matrix {
        let values = (0..rows * columns).map(|index| (from + index as f64 * 1.7).sin()).collect();
        Matrix { rows, columns, values }
    }

    #[test]
    fn a_solution_solves() {
        let (mut left, right) = (matrix(5, 5, 0.3), matrix(5, 2, 2.0));
        // Sines of a plane have rank 2.
        for diagonal in 0..5 {
            left.values[diagonal * 6] += 2.0;
        }
        let product = left.times(&left.solve(&right).expect("regular"));
        let error = product.values.iter().zip(&right.values).map(|(x, y)| (x - y).abs());
        assert!(error.fold(0.0, f64::max) < 1e-12);
        assert_eq!(Matrix::zeros(3, 3).solve(&Matrix::identity(3)), None);
    }

    #[test]
    fn a_kronecker_product_of_products_is_the_product_of_kronecker_products() {
        let [a, b, c, d] =
            [matrix(2, 3, 0.1), matrix(3, 2, 0.2), matrix(4, 2, 0.3), matrix(2, 5, 0.4)];
        let whole = a.times(&b).kronecker(&c.times(&d));
        let parts = a.kronecker(&c).times(&b.kronecker(&d));
        let error = whole.values.iter().zip(&parts.values).map(|(x, y)| (x - y).abs());
        assert!(error.fold(0.0, f64::max) < 1e-14);
        assert_eq!((whole.rows, whole.columns), (8, 10));
    }
}
