//! Methods that bring the directions of several updates together: KnOTS, TSV-M, Iso-C and Core Space, in
//! factored form.
//!
//! Each result is given by its singular value decomposition. With QR decompositions of the factors next to
//! one another, all that is decomposed has no more rows and columns than the sum of the ranks, but for
//! KnOTS' coordinates, which have as many columns as the weight. Directions count up to the numerical rank:
//! singular values above max(rows, columns)·ε·σ₁.
//!
//! Sources: KnOTS, arXiv:2410.19735; TSV-M, arXiv:2412.00081; Iso-C, arXiv:2502.04959; Core Space,
//! arXiv:2509.17786.

use super::bases::{numerical_rank, orthonormal, thin};
use super::factored::{Decomposed, Rows, decomposed, fix_signs, sides};
use super::merge::{Merge, Updates};
use super::rounding;
use crate::error::{Error, Result};
use crate::linalg::{Matrix, decompose};
use crate::measure::spectrum::Update;

/// A method with what it was given.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Joint {
    /// The updates' coordinates in the left singular vectors of [Δ₁ … Δ_N], merged.
    Knots(Merge),
    /// All singular triplets of the updates, with the nearest orthonormal vectors in the place of theirs.
    TsvM {
        /// At most so many triplets of each.
        k: Option<usize>,
    },
    /// The sum with the mean of its singular values in the place of each.
    IsoC,
    /// The updates' coordinates in bases of all left and of all right factors, merged.
    CoreSpace(Merge),
}

/// The least eigenvalue of UᵀU at which directions count as different: unit vectors 0.3° apart have it.
/// Copies in 16-bit types lie below, and the nearest orthonormal vectors would be made of their rounding.
const SAME_DIRECTIONS: f64 = 1e-5;

impl Joint {
    /// The result; `None` if an update is not finite.
    ///
    /// # Errors
    /// [`Error::Argument`] where the method is not defined for these updates.
    pub fn result(
        &self,
        of: &Updates<'_, '_>,
        counts: Directions,
    ) -> Result<Option<Decomposed<'static>>> {
        match self {
            Self::Knots(merge) => Ok(knots(of, merge)),
            Self::TsvM { k } => tsv_m(of, *k, counts),
            Self::IsoC => iso_c(of, counts),
            Self::CoreSpace(merge) => Ok(core_space(of, merge)),
        }
    }
}

/// Which directions of an update there are.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub(crate) enum Directions {
    /// Those up to the numerical rank.
    #[default]
    Numerical,
    /// Those above what the rounding of the stored factors explains.
    AboveRounding,
}

impl Directions {
    fn count(self, update: &Update<'_>, found: &Decomposed<'_>) -> usize {
        let rank = numerical_rank(&found.values, update.rows(), update.columns());
        match self {
            Self::Numerical => rank,
            Self::AboveRounding => {
                let floor = rounding::floor(update);
                found.values[..rank].iter().take_while(|value| **value > floor).count()
            }
        }
    }
}

/// The factors of all adapters next to one another.
struct Stacks {
    /// [s₁B₁ …], m×R.
    left: Rows,
    /// [A₁ᵀ …], n×R.
    right: Rows,
    /// The columns of each adapter.
    ranges: Vec<std::ops::Range<usize>>,
}

impl Stacks {
    /// `None` of what is not finite.
    fn of(of: &Updates<'_, '_>) -> Option<Self> {
        let [rows, columns] = of.shape;
        let mut ranges = Vec::with_capacity(of.updates.len());
        let mut total = Update::sum(rows, columns, Vec::new()).ok()?;
        for update in of.updates {
            let first = total.rank();
            if let Some(update) = update {
                total = total.plus(update).ok()?;
            }
            ranges.push(first..total.rank());
        }
        let (mut left, right) = sides(&total);
        let scales = total.scales();
        for row in left.values.chunks_exact_mut(scales.len().max(1)) {
            row.iter_mut().zip(&scales).for_each(|(value, scale)| *value *= scale);
        }
        let is_finite = |side: &Rows| side.values.iter().all(|value| value.is_finite());
        (is_finite(&left) && is_finite(&right)).then(|| Self {
            left,
            right: right.transposed(),
            ranges,
        })
    }

    /// The columns of an adapter.
    fn part(side: &Matrix, range: &std::ops::Range<usize>) -> Matrix {
        let data = side.data[range.start * side.rows..range.end * side.rows].to_vec();
        Matrix { rows: side.rows, columns: range.len(), data }
    }
}

fn knots(of: &Updates<'_, '_>, merge: &Merge) -> Option<Decomposed<'static>> {
    let [rows, columns] = of.shape;
    let stacks = Stacks::of(of)?;
    let (basis, core) = orthonormal(&stacks.left);
    // The updates in that basis, each n×p: their transposes next to one another are [Δ₁ … Δ_N]ᵀ·Q.
    let width = core.rows;
    let blocks: Vec<Rows> = (stacks.ranges.iter())
        .map(|range| {
            let part = Stacks::part(&core, range).transposed();
            let mut own = Rows::zeros(columns, range.len());
            let whole = stacks.right.columns.max(1);
            for (target, source) in (own.values.chunks_exact_mut(range.len().max(1)))
                .zip(stacks.right.values.chunks_exact(whole))
            {
                target.copy_from_slice(&source[range.clone()]);
            }
            own.times(&part)
        })
        .collect();
    let tall = Rows {
        rows: columns * blocks.len(),
        columns: width,
        values: blocks.iter().flat_map(|block| block.values.iter().copied()).collect(),
    };
    // [Δ₁ … Δ_N] = Q·P·Σ·Wᵀ with tall = W·Σ·Pᵀ.
    let (_, triangle) = orthonormal(&tall);
    let found = decompose(&triangle);
    let rank = numerical_rank(&found.values, rows, tall.rows);
    let turn = found.right.leading(rank);
    let mut left = basis.times(&turn);
    let mut turn = Rows::of_columns(&turn);
    fix_signs(&mut left, &mut turn);
    let turn = turn.to_matrix();
    let coordinates: Vec<Option<Rows>> = (of.updates.iter().zip(&blocks))
        .map(|(update, block)| update.as_ref().map(|_| block.times(&turn).transposed()))
        .collect();
    let merged = merge.small(of, [rank, columns], &coordinates);
    // Orthonormal columns times a decomposition are one.
    Some(thin(&merged).turned(&left, None))
}

fn core_space(of: &Updates<'_, '_>, merge: &Merge) -> Option<Decomposed<'static>> {
    let stacks = Stacks::of(of)?;
    // An orthonormal basis of the columns, and the columns in it.
    let basis = |side: &Rows| {
        let (q, c) = orthonormal(side);
        let found = decompose(&c);
        let rank = numerical_rank(&found.values, side.rows, side.columns);
        let turn = found.left.leading(rank);
        let mut basis = q.times(&turn);
        let mut turn = Rows::of_columns(&turn);
        fix_signs(&mut basis, &mut turn);
        (basis, turn.to_matrix().transposed().product(&c))
    };
    let (left, left_core) = basis(&stacks.left);
    let (right, right_core) = basis(&stacks.right);
    let coordinates: Vec<Option<Rows>> = (of.updates.iter().zip(&stacks.ranges))
        .map(|(update, range)| {
            update.as_ref().map(|_| {
                let (b, a) = (Stacks::part(&left_core, range), Stacks::part(&right_core, range));
                Rows::of_columns(&b.product(&a.transposed()))
            })
        })
        .collect();
    let shape = [left.columns, right.columns];
    let merged = merge.small(of, shape, &coordinates);
    Some(thin(&merged).turned(&left, Some(&right)))
}

fn tsv_m(
    of: &Updates<'_, '_>,
    k: Option<usize>,
    counts: Directions,
) -> Result<Option<Decomposed<'static>>> {
    let [rows, columns] = of.shape;
    let mut triplets: Vec<(f64, usize)> = Vec::new();
    let (mut left, mut right) = (Vec::new(), Vec::new());
    for (update, weight) in of.updates.iter().zip(of.weights) {
        let Some(update) = update.as_ref().filter(|_| *weight != 0.0) else { continue };
        let Some(found) = decomposed(update) else { return Ok(None) };
        let rank = counts.count(update, &found).min(k.unwrap_or(usize::MAX));
        let one = vec![1.0; rank];
        let vectors = found.with_scales(&one, &one);
        for (index, value) in found.values[..rank].iter().enumerate() {
            triplets.push((weight * value, left.len() + index));
        }
        let (u, v) = (vectors.b.to_matrix(), vectors.a.transposed().to_matrix());
        left.extend(u.data.chunks_exact(rows).map(<[f64]>::to_vec));
        right.extend(v.data.chunks_exact(columns).map(<[f64]>::to_vec));
    }
    // Of equal values the first adapter's is first.
    triplets.sort_by(|x, y| y.0.abs().total_cmp(&x.0.abs()));
    let count = triplets.len();
    if count > rows.min(columns) {
        return Err(Error::Argument(format!(
            "{}: tsv_m needs directions that are all different, and a {rows}×{columns} weight has \
             fewer than the {count} of these adapters; the option k takes the first of each",
            of.name
        )));
    }
    let polar = |vectors: &[Vec<f64>], extent: usize, side: &str| -> Result<Rows> {
        let mut matrix = Matrix::zeros(extent, count);
        for (target, (_, source)) in triplets.iter().enumerate() {
            matrix.column_mut(target).copy_from_slice(&vectors[*source]);
        }
        let matrix = Rows::of_columns(&matrix);
        // Of a symmetric matrix that is not negative, this is the eigendecomposition.
        let found = decompose(&matrix.gram());
        let least = found.values.last().copied().unwrap_or(1.0);
        if least < SAME_DIRECTIONS {
            return Err(Error::Argument(format!(
                "{}: tsv_m needs directions that are all different, and adapters share some of their \
                 {side} ones (the smallest eigenvalue of their inner products is {:.1e}, and at least \
                 {SAME_DIRECTIONS:.0e} is needed): leave duplicates out, or use the method linear",
                of.name,
                least.max(0.0)
            )));
        }
        let roots: Vec<f64> = found.values.iter().map(|value| 1.0 / value.sqrt()).collect();
        Ok(matrix.times(&found.left.scaled_product(&roots, &found.left)))
    };
    let (mut left, right) = (polar(&left, rows, "left")?, polar(&right, columns, "right")?);
    for row in left.values.chunks_exact_mut(count.max(1)) {
        row.iter_mut().zip(&triplets).for_each(|(value, (weighted, _))| {
            *value *= weighted.signum();
        });
    }
    let values = triplets.iter().map(|(weighted, _)| weighted.abs()).collect();
    Ok(Some(Decomposed::explicit(left, values, right)))
}

fn iso_c(of: &Updates<'_, '_>, counts: Directions) -> Result<Option<Decomposed<'static>>> {
    let [rows, columns] = of.shape;
    let mut total = Update::sum(rows, columns, Vec::new())?;
    for (update, weight) in of.updates.iter().zip(of.weights) {
        if let Some(update) = update.as_ref().filter(|_| *weight != 0.0) {
            total = total.plus(&update.scaled(*weight))?;
        }
    }
    let Some(found) = decomposed(&total) else { return Ok(None) };
    let rank = counts.count(&total, &found);
    let mean = found.values[..rank].iter().sum::<f64>() / rank.max(1) as f64;
    let one = vec![1.0; rank];
    let vectors = found.with_scales(&one, &one);
    Ok(Some(Decomposed::explicit(vectors.b, vec![mean; rank], vectors.a.transposed())))
}
