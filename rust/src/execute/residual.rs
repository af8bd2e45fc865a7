//! The residual: what an initialisation took out of a weight before training began (PiSSA, OLoRA,
//! KaSA).
//!
//! The file of such an adapter holds the trained factors alone; the base that they were trained
//! beside is the original one less a product P that the original determines. P is found again here,
//! in f64, as the two factors of a product, so that taking it out is one more low-rank update.
//!
//! Singular vectors come from the eigenvectors of the smaller of WᵀW and WWᵀ. Squaring costs
//! accuracy in the smallest singular values themselves, but what enters the result is W projected
//! on their vectors, whose error stays near ε₆₄·σ₁²/σ: far below f32's rounding of W.
//!
//! Unlike everything else in a merge this takes memory that grows with the tensor: the weight and
//! a square of its smaller extent in f64, once a thread.

use faer::{Mat, MatRef, Side};

use crate::adapter::factors::Pair;
use crate::plan::Residual;
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;

/// Enough for the digits that an error bound needs.
const POWER_STEPS: usize = 24;

/// A stored weight in f64, row after row.
#[derive(Debug)]
pub(crate) struct Weight {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f64>,
}

impl Weight {
    fn view(&self) -> MatRef<'_, f64> {
        MatRef::from_row_major_slice(&self.values, self.rows, self.columns)
    }

    /// The largest singular value, from below, by power iteration.
    pub fn largest(&self) -> f64 {
        let weight = self.view();
        let mut vector = Mat::from_fn(self.columns, 1, |row, _| 1.0 + (row % 7) as f64);
        let mut norm = 0.0;
        for _ in 0..POWER_STEPS {
            vector = weight.transpose() * (weight * (faer::Scale(1.0 / vector.norm_l2()) * vector));
            norm = vector.norm_l2();
        }
        norm.sqrt()
    }

    /// The factors of P, as a module's product lies on a weight that is stored that way; without
    /// the scale that [`Residual::scale`] tells.
    ///
    /// # Errors
    /// In words, if the weight cannot be decomposed.
    pub fn removed(
        &self,
        what: Residual,
        rank: usize,
        orientation: Orientation,
    ) -> Result<Pair, String> {
        if self.values.iter().any(|value| !value.is_finite()) {
            return Err("holds numbers that are not finite, so that it cannot be decomposed as \
                        the adapter's initialisation did"
                .into());
        }
        let weight = self.view();
        let (left, right) = match what {
            Residual::Largest => singular(weight, rank, true),
            Residual::Smallest => singular(weight, rank, false),
            Residual::Leading => {
                let rank = rank.min(self.rows).min(self.columns);
                let basis = weight.subcols(0, rank).to_owned().qr().compute_thin_Q();
                let right = basis.transpose() * weight;
                Some((basis, right))
            }
        }
        .ok_or("has no singular value decomposition that could be found")?;
        let (b, a) = match orientation {
            Orientation::OutIn => (left, right),
            Orientation::InOut => (right.transpose().to_owned(), left.transpose().to_owned()),
        };
        Ok(Pair {
            rank: a.nrows(),
            outputs: b.nrows(),
            inputs: a.ncols(),
            a: row_major(&a),
            a_dtype: Dtype::F64,
            b: row_major(&b),
            b_dtype: Dtype::F64,
        })
    }
}

/// The factors U·Σ and Vᵀ (or U and Σ·Vᵀ) of the largest or smallest singular components.
fn singular(weight: MatRef<'_, f64>, rank: usize, largest: bool) -> Option<(Mat<f64>, Mat<f64>)> {
    let tall = weight.nrows() >= weight.ncols();
    let gram = if tall { weight.transpose() * weight } else { weight * weight.transpose() };
    let extent = gram.nrows();
    let rank = rank.min(extent);
    let vectors = gram.self_adjoint_eigen(Side::Lower).ok()?;
    // In the order of their values, the smallest first.
    let first = if largest { extent - rank } else { 0 };
    let vectors = vectors.U().subcols(first, rank).to_owned();
    Some(if tall {
        (weight * &vectors, vectors.transpose().to_owned())
    } else {
        let right = vectors.transpose() * weight;
        (vectors, right)
    })
}

fn row_major(matrix: &Mat<f64>) -> Vec<u8> {
    let row = |row: usize| (0..matrix.ncols()).map(move |column| matrix[(row, column)]);
    (0..matrix.nrows()).flat_map(row).flat_map(f64::to_le_bytes).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::fixtures::ramp;
    use crate::kernel::convert::widen_f64;

    fn weight(rows: usize, columns: usize) -> Weight {
        let values = ramp((rows * columns) as u64, 5).into_iter().map(f64::from).collect();
        Weight { rows, columns, values }
    }

    /// P as it lies on the stored weight.
    fn product(pair: &Pair, orientation: Orientation) -> Mat<f64> {
        let a = widen_f64(&pair.a_dtype, &pair.a);
        let b = widen_f64(&pair.b_dtype, &pair.b);
        let a = MatRef::from_row_major_slice(&a, pair.rank, pair.inputs);
        let b = MatRef::from_row_major_slice(&b, pair.outputs, pair.rank);
        match orientation {
            Orientation::OutIn => b * a,
            Orientation::InOut => (b * a).transpose().to_owned(),
        }
    }

    #[test]
    fn the_singular_components_are_the_decompositions() {
        for (rows, columns) in [(12, 7), (7, 12), (9, 9)] {
            let weight = weight(rows, columns);
            let svd = weight.view().thin_svd().expect("finite");
            let extent = rows.min(columns);
            for (what, range) in
                [(Residual::Largest, 0..3), (Residual::Smallest, extent - 3..extent)]
            {
                let mut expected = Mat::<f64>::zeros(rows, columns);
                for k in range.clone() {
                    let value = svd.S().column_vector()[k];
                    expected += faer::Scale(value) * svd.U().col(k) * svd.V().col(k).transpose();
                }
                for orientation in [Orientation::OutIn, Orientation::InOut] {
                    let pair = weight.removed(what, 3, orientation).expect("finite");
                    let error = (product(&pair, orientation) - &expected).norm_max();
                    assert!(error < 1e-12, "{what:?} of {rows}×{columns}: {error}");
                }
            }
        }
    }

    #[test]
    fn the_largest_singular_value_is_found() {
        let weight = weight(12, 7);
        let svd = weight.view().thin_svd().expect("finite");
        assert!((weight.largest() / svd.S().column_vector()[0] - 1.0).abs() < 1e-2);
    }

    #[test]
    fn the_leading_part_leaves_nothing_of_the_first_columns() {
        let weight = weight(10, 8);
        let pair = weight.removed(Residual::Leading, 4, Orientation::OutIn).expect("finite");
        let rest = weight.view() - product(&pair, Orientation::OutIn);
        assert!(rest.subcols(0, 4).norm_max() < 1e-12);
        // What is left of the others stands on the first ones.
        let crossed = weight.view().subcols(0, 4).transpose() * rest.subcols(4, 4);
        assert!(crossed.norm_max() < 1e-12);
        assert!(rest.subcols(4, 4).norm_max() > 0.1);
    }

    #[test]
    fn a_weight_that_is_not_finite_is_refused() {
        let mut weight = weight(4, 3);
        weight.values[5] = f64::NAN;
        let problem = weight.removed(Residual::Largest, 1, Orientation::OutIn);
        assert!(problem.expect_err("NaN").contains("not finite"));
    }
}
