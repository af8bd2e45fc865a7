//! The subspaces that two updates write to and read from.

use crate::error::{Error, Result};
use crate::linalg::{Matrix, cross_product, singular_values, triangular_factor};
use crate::measure::spectrum::{Update, decompose_update};

/// The singular vectors of an update that belong to its nonzero singular values, computed once
/// and compared with any number of others.
pub struct SingularBases {
    left: Matrix,
    values: Vec<f64>,
    right: Matrix,
}

impl SingularBases {
    /// The bases of an update; `None` if it is not finite. Directions below max(m, n)·ε·σ₁ are
    /// left out: they are rounding.
    pub fn of(update: &Update<'_>) -> Option<Self> {
        let decomposition = decompose_update(update)?;
        let values = decomposition.values;
        let extent = update.rows().max(update.columns()) as f64;
        let floor = extent * f64::EPSILON * values.first().copied().unwrap_or(0.0);
        let rank = values.partition_point(|&value| value > floor);
        Some(Self {
            left: decomposition.left.leading(rank),
            values: values[..rank].to_vec(),
            right: decomposition.right.leading(rank),
        })
    }

    /// The number of directions: the update's numerical rank.
    pub fn rank(&self) -> usize {
        self.values.len()
    }

    /// The singular values of the directions, descending.
    pub fn singular_values(&self) -> &[f64] {
        &self.values
    }

    /// The left singular vector of the k-th greatest singular value (from 0), m values.
    pub fn left_vector(&self, index: usize) -> &[f64] {
        self.left.column(index)
    }

    /// The right singular vector of the k-th greatest singular value (from 0), n values.
    pub fn right_vector(&self, index: usize) -> &[f64] {
        self.right.column(index)
    }

    fn check(&self, other: &Self) -> Result<()> {
        if self.left.rows == other.left.rows && self.right.rows == other.right.rows {
            return Ok(());
        }
        Err(Error::Argument(format!(
            "subspaces of {}×{} and {}×{} weights cannot be compared",
            self.left.rows, self.right.rows, other.left.rows, other.right.rows
        )))
    }

    /// φ(i, j) of the left (output) subspaces.
    ///
    /// # Errors
    /// [`Error::Argument`] when the updates are of weights of different shapes.
    pub fn left_similarity(&self, other: &Self) -> Result<SubspaceSimilarity> {
        self.check(other)?;
        Ok(SubspaceSimilarity::of(&self.left, &other.left))
    }

    /// φ(i, j) of the right (input) subspaces.
    ///
    /// # Errors
    /// [`Error::Argument`] when the updates are of weights of different shapes.
    pub fn right_similarity(&self, other: &Self) -> Result<SubspaceSimilarity> {
        self.check(other)?;
        Ok(SubspaceSimilarity::of(&self.right, &other.right))
    }

    /// The principal angles between the left subspaces of the `i` and `j` leading directions
    /// (all there are, where there are fewer).
    ///
    /// # Errors
    /// [`Error::Argument`] when the updates are of weights of different shapes.
    pub fn left_angles(&self, other: &Self, i: usize, j: usize) -> Result<PrincipalAngles> {
        self.check(other)?;
        Ok(PrincipalAngles::of(
            &self.left.leading(i.min(self.rank())),
            &other.left.leading(j.min(other.rank())),
        ))
    }

    /// The principal angles between the right subspaces of the `i` and `j` leading directions.
    ///
    /// # Errors
    /// [`Error::Argument`] when the updates are of weights of different shapes.
    pub fn right_angles(&self, other: &Self, i: usize, j: usize) -> Result<PrincipalAngles> {
        self.check(other)?;
        Ok(PrincipalAngles::of(
            &self.right.leading(i.min(self.rank())),
            &other.right.leading(j.min(other.rank())),
        ))
    }
}

/// φ(i, j) = ‖U_iᵀU_j‖²_F / min(i, j) for all leading subspaces of two bases (Hu et al. 2021,
/// LoRA, §7.2): 0 for orthogonal subspaces, 1 where one contains the other.
#[derive(Debug, Clone, PartialEq)]
pub struct SubspaceSimilarity {
    ranks: [usize; 2],
    dimension: usize,
    values: Vec<f64>,
}

impl SubspaceSimilarity {
    fn of(x: &Matrix, y: &Matrix) -> Self {
        let overlaps = cross_product(x, y);
        let ranks = [x.columns, y.columns];
        let mut values = Vec::with_capacity(ranks[0] * ranks[1]);
        let mut above = vec![0.0; ranks[1]];
        for row in 0..ranks[0] {
            let mut sum = 0.0;
            for (column, above) in above.iter_mut().enumerate() {
                sum += overlaps.get(row, column).powi(2);
                *above += sum;
                values.push(*above / (row.min(column) + 1) as f64);
            }
        }
        Self { ranks, dimension: x.rows, values }
    }

    /// The ranks of the two bases: the greatest i and j.
    pub fn ranks(&self) -> [usize; 2] {
        self.ranks
    }

    /// φ(i, j), with i and j counted from 1; `None` beyond the ranks.
    pub fn phi(&self, i: usize, j: usize) -> Option<f64> {
        let inside = (1..=self.ranks[0]).contains(&i) && (1..=self.ranks[1]).contains(&j);
        inside.then(|| self.values[(i - 1) * self.ranks[1] + j - 1])
    }

    /// The expectation of φ(i, j) for random subspaces of the same space: max(i, j)/d.
    pub fn expected(&self, i: usize, j: usize) -> f64 {
        i.max(j) as f64 / self.dimension as f64
    }

    /// All φ(i, j), row i after row.
    pub fn values(&self) -> &[f64] {
        &self.values
    }
}

/// The angles between two subspaces, and the distances made of them.
#[derive(Debug, Clone, PartialEq)]
pub struct PrincipalAngles {
    /// θ in radians, ascending, from 0 to π/2: as many as the smaller subspace has dimensions.
    pub angles: Vec<f64>,
    /// ‖θ‖₂, the distance along the Grassmann manifold.
    pub grassmann_distance: f64,
    /// ‖sin θ‖₂.
    pub chordal_distance: f64,
}

impl PrincipalAngles {
    /// Cosines are blind to small angles and sines to large ones, so each angle is taken from
    /// the one that sees it (Björck & Golub 1973).
    fn of(x: &Matrix, y: &Matrix) -> Self {
        let (x, y) = if x.columns < y.columns { (y, x) } else { (x, y) };
        let overlaps = cross_product(x, y);
        let cosines = singular_values(&overlaps);
        let mut outside = x.product(&overlaps);
        for (projected, own) in outside.data.iter_mut().zip(&y.data) {
            *projected = own - *projected;
        }
        let mut sines = singular_values(&triangular_factor(&outside));
        sines.reverse();
        let angles: Vec<f64> =
            cosines
                .iter()
                .zip(&sines)
                .map(|(&cosine, &sine)| {
                    if cosine * cosine >= 0.5 {
                        sine.min(1.0).asin()
                    } else {
                        cosine.min(1.0).acos()
                    }
                })
                .collect();
        let norm =
            |values: &mut dyn Iterator<Item = f64>| values.map(|v| v * v).sum::<f64>().sqrt();
        Self {
            grassmann_distance: norm(&mut angles.iter().copied()),
            chordal_distance: norm(&mut angles.iter().map(|angle| angle.sin())),
            angles,
        }
    }
}
