//! Truncated singular value decompositions of updates in factored form.
//!
//! ΔW = L·D·Rᵀ with L = [B₁, …] m×R, R = [A₁ᵀ, …] n×R and the scales D. With QR decompositions of both
//! sides, L = Q_L·T_L and R = Q_R·T_R, the singular values of ΔW are those of the R×R core
//! T_L·D·T_Rᵀ = U·Σ·Vᵀ. Where the Gram matrices give T (they do unless directions are shared or small),
//! no Q is formed: Q_L·U·Σ = L·D·T_Rᵀ·V, and likewise on the other side. Where they do not, or where what
//! is kept is small against what went in, both sides are decomposed by Householder reflections.

use std::ops::Range;

use super::streamed::{left_times, times_right};
use crate::error::Result;
use crate::linalg::{Matrix, Multiply, View, decompose, gram_by_one_thread, gram_factor};
use crate::measure::spectrum::{Update, decompose_update};

/// Below this share of the first singular value, the Gram matrices are not trusted.
const SHORT_SPECTRUM: f64 = 1e-5;
/// The same of ‖ΣcᵢΔᵢ‖ against Σ|cᵢ|‖Δᵢ‖: an update that cancels.
const CANCELLATION: f64 = 1e-5;

/// A matrix row after row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Rows {
    pub rows: usize,
    pub columns: usize,
    pub values: Vec<f64>,
}

impl Rows {
    pub fn zeros(rows: usize, columns: usize) -> Self {
        Self { rows, columns, values: vec![0.0; rows * columns] }
    }

    fn view(&self) -> View<'_, f64> {
        View {
            data: &self.values,
            first: 0,
            depth: self.columns,
            depth_step: 1,
            count: self.rows,
            step: self.columns,
        }
    }

    /// The columns as vectors.
    fn columns_view(&self) -> View<'_, f64> {
        View {
            data: &self.values,
            first: 0,
            depth: self.rows,
            depth_step: self.columns,
            count: self.columns,
            step: 1,
        }
    }

    /// selfᵀ · self.
    pub fn gram(&self) -> Matrix {
        self.cross(self)
    }

    /// self · selfᵀ.
    pub fn row_gram(&self) -> Matrix {
        let mut result = Matrix::zeros(self.rows, self.rows);
        f64::multiply(self.view(), self.view(), &mut result.data, self.rows.max(1));
        result
    }

    /// selfᵀ · other, of matrices of one height.
    pub fn cross(&self, other: &Self) -> Matrix {
        let mut result = Matrix::zeros(self.columns, other.columns);
        f64::multiply(
            self.columns_view(),
            other.columns_view(),
            &mut result.data,
            self.columns.max(1),
        );
        result
    }

    /// self · small.
    pub fn times(&self, small: &Matrix) -> Self {
        let mut result = Self::zeros(self.rows, small.columns);
        let right = View {
            data: &small.data,
            first: 0,
            depth: small.rows,
            depth_step: 1,
            count: small.columns,
            step: small.rows,
        };
        // Row-major is the transpose of what is written: the columns of `small` come first.
        f64::multiply(right, self.view(), &mut result.values, small.columns.max(1));
        result
    }

    /// Of a matrix column after column.
    pub fn of_columns(matrix: &Matrix) -> Self {
        let mut result = Self::zeros(matrix.rows, matrix.columns);
        for column in 0..matrix.columns {
            for (row, value) in matrix.column(column).iter().enumerate() {
                result.values[row * matrix.columns + column] = *value;
            }
        }
        result
    }

    /// Column after column.
    pub fn to_matrix(&self) -> Matrix {
        Matrix { rows: self.rows, columns: self.columns, data: self.transposed().values }
    }

    pub fn transposed(&self) -> Self {
        let mut result = Self::zeros(self.columns, self.rows);
        for (row, values) in self.values.chunks_exact(self.columns.max(1)).enumerate() {
            for (column, value) in values.iter().enumerate() {
                result.values[column * self.rows + row] = *value;
            }
        }
        result
    }
}

/// How the two factors of a truncated update share its singular values.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub(crate) enum Gauge {
    /// U·√Σ and √Σ·Vᵀ: in narrow types small updates keep most digits so.
    #[default]
    Balanced,
}

/// An update by its singular value decomposition, of which as much is made as is asked for.
pub(crate) struct Decomposed<'u> {
    /// All singular values of ΔW that can differ from zero, descending.
    pub values: Vec<f64>,
    sides: Sides<'u>,
}

enum Sides<'u> {
    /// L and R in the update, and what brings them to Q·U·Σ^½ and Q·V·Σ^½ but for a power of Σ:
    /// L·D·T_Rᵀ·V·Σ^-½.
    Gram { update: Update<'u>, left_map: Matrix, right_map: Matrix },
    /// U and V.
    Explicit { left: Rows, right: Rows },
}

/// The two factors of an update: B (m×k) and A (k×n), row after row.
#[derive(Debug, Clone, PartialEq)]
pub(crate) struct Factors {
    pub b: Rows,
    pub a: Rows,
}

/// L and R of an update without its scales, row after row.
pub(crate) fn sides(update: &Update<'_>) -> (Rows, Rows) {
    let (rows, columns, rank) = (update.rows(), update.columns(), update.rank());
    let (mut left, mut right) = (Rows::zeros(rows, rank), Rows::zeros(rank, columns));
    let mut first = 0;
    for term in update.terms() {
        let mut values = vec![0.0; rows * term.rank];
        term.left.read(0, &mut values);
        if term.rank == rank {
            left.values = values;
        } else {
            for (row, part) in values.chunks_exact(term.rank.max(1)).enumerate() {
                left.values[row * rank + first..][..term.rank].copy_from_slice(part);
            }
        }
        term.right.read(0, &mut right.values[first * columns..(first + term.rank) * columns]);
        first += term.rank;
    }
    (left, right)
}

/// Decomposes an update; `None` of one that is not finite.
pub(crate) fn decomposed<'u>(update: &Update<'u>) -> Option<Decomposed<'u>> {
    decomposed_with(update, None)
}

/// The same with its Gram matrices, where they are known.
pub(crate) fn decomposed_with<'u>(
    update: &Update<'u>,
    grams: Option<&Grams>,
) -> Option<Decomposed<'u>> {
    let scales = update.scales();
    if scales.iter().any(|scale| !scale.is_finite()) {
        return None;
    }
    if update.rank() == 0 {
        // A sum in which no adapter of a module has a weight.
        let (left, right) = (Rows::zeros(update.rows(), 0), Rows::zeros(update.columns(), 0));
        return Some(Decomposed::explicit(left, Vec::new(), right));
    }
    // ΔW is at most Σ|s_k|‖b_k‖‖a_k‖: what is nothing against that is what rounding leaves of zero.
    let explicit = |bound: f64| {
        let mut found = decompose_update(update)?;
        let terms = update.rows().max(update.columns()) + update.rank();
        if found.values.first().is_some_and(|first| *first <= terms as f64 * f64::EPSILON * bound) {
            found.values.fill(0.0);
        }
        let (left, right) = (Rows::of_columns(&found.left), Rows::of_columns(&found.right));
        Some(Decomposed { values: found.values, sides: Sides::Explicit { left, right } })
    };
    let own = grams.is_none().then(|| Grams::of(update));
    let Grams { left, right } = grams.or(own.as_ref()).expect("the given ones or its own");
    let sizes = |k: usize| left.get(k, k).sqrt() * right.get(k, k).sqrt();
    let bound: f64 = scales.iter().enumerate().map(|(k, scale)| scale.abs() * sizes(k)).sum();
    if update.rank() > update.spectrum_len() {
        return explicit(bound);
    }
    let (Some(left_root), Some(right_root)) = (gram_factor(left), gram_factor(right)) else {
        return explicit(bound);
    };
    let core = left_root.scaled_product(&scales, &right_root);
    let found = decompose(&core);
    let (first, last) = (found.values[0], *found.values.last().expect("there is one"));
    let norm = found.values.iter().map(|value| value * value).sum::<f64>().sqrt();
    if last < SHORT_SPECTRUM * first || norm < CANCELLATION * bound {
        return explicit(bound);
    }
    let scaled = |root: &Matrix, vectors: &Matrix| {
        // D·Tᵀ·V, R×R.
        let mut map = root.transposed().product(vectors);
        for column in 0..map.columns {
            for (value, scale) in map.column_mut(column).iter_mut().zip(&scales) {
                *value *= scale;
            }
        }
        map
    };
    let left_map = scaled(&right_root, &found.right);
    let right_map = scaled(&left_root, &found.left);
    Some(Decomposed {
        values: found.values,
        sides: Sides::Gram { update: update.clone(), left_map, right_map },
    })
}

impl Factors {
    /// ‖B·A‖ from the Gram matrices; `None` where the products cancel, so that too few digits are left.
    pub fn norm(&self) -> Option<f64> {
        let (left, right) = (self.b.gram(), self.a.row_gram());
        let square: f64 = left.data.iter().zip(&right.data).map(|(l, r)| l * r).sum();
        let sizes = (0..left.rows).map(|k| (left.get(k, k) * right.get(k, k)).sqrt());
        let bound: f64 = sizes.sum();
        // Nine digits are left of what is a thousandth of its terms.
        let is_safe = square > (1e-3 * bound).powi(2) || !bound.is_finite();
        is_safe.then(|| square.sqrt())
    }
}

impl Decomposed<'_> {
    /// U·diag(values)·Vᵀ with orthonormal columns in U and V.
    pub fn explicit(left: Rows, values: Vec<f64>, right: Rows) -> Self {
        Self { values, sides: Sides::Explicit { left, right } }
    }

    /// The decomposition of L·(this)·Rᵀ for L and R with orthonormal columns; without R it is one.
    pub fn turned(self, left: &Rows, right: Option<&Rows>) -> Self {
        let count = self.values.len();
        let one = vec![1.0; count];
        let own = self.with_scales(&one, &one);
        let (u, v) = (own.b.to_matrix(), own.a.transposed());
        let v = right.map_or_else(|| v.clone(), |right| right.times(&v.to_matrix()));
        Self::explicit(left.times(&u), self.values, v)
    }

    /// This times a number.
    pub fn scaled(self, factor: f64) -> Self {
        if factor == 1.0 {
            return self;
        }
        let one = vec![1.0; self.values.len()];
        let mut own = self.with_scales(&one, &one);
        if factor < 0.0 {
            own.b.values.iter_mut().for_each(|value| *value = -*value);
        }
        let values = self.values.iter().map(|value| value * factor.abs()).collect();
        Self::explicit(own.b, values, own.a.transposed())
    }

    /// The first k singular triplets as two factors; the entry of largest size in each column of U, the
    /// first of equals, is positive, so that the bytes depend on ΔW alone.
    pub fn truncated(&self, k: usize, gauge: Gauge) -> Factors {
        let Gauge::Balanced = gauge;
        let scales: Vec<f64> = self.values[..k].iter().map(|value| value.sqrt()).collect();
        self.with_scales(&scales, &scales)
    }

    /// U·diag(left) and diag(right)·Vᵀ of the first triplets.
    pub fn with_scales(&self, left_scales: &[f64], right_scales: &[f64]) -> Factors {
        let k = left_scales.len();
        let values = &self.values[..k];
        match &self.sides {
            Sides::Gram { update, left_map, right_map } => {
                // L·map is U·Σ.
                let weights = |scales: &[f64]| -> Vec<f64> {
                    scales.iter().zip(values).map(|(scale, value)| scale / value).collect()
                };
                let mut b = left_times(update, &columns_times(left_map, &weights(left_scales)));
                let mut a = times_right(&columns_times(right_map, &weights(right_scales)), update);
                let turned = turned_columns(&b);
                negate_columns(&mut b, &turned);
                let rows = a.values.chunks_exact_mut(a.columns.max(1));
                for (row, _) in rows.zip(&turned).filter(|(_, is_turned)| **is_turned) {
                    row.iter_mut().for_each(|value| *value = -*value);
                }
                Factors { b, a }
            }
            Sides::Explicit { left, right } => {
                let mut b = leading_times(left, left_scales);
                let mut a = leading_times(right, right_scales);
                fix_signs(&mut b, &mut a);
                Factors { b, a: a.transposed() }
            }
        }
    }
}

/// The first columns, each times a number.
fn columns_times(matrix: &Matrix, factors: &[f64]) -> Matrix {
    let mut result = matrix.leading(factors.len());
    for (column, factor) in factors.iter().enumerate() {
        result.column_mut(column).iter_mut().for_each(|value| *value *= factor);
    }
    result
}

fn leading_times(matrix: &Rows, factors: &[f64]) -> Rows {
    let mut result = Rows::zeros(matrix.rows, factors.len());
    for row in 0..matrix.rows {
        let source = &matrix.values[row * matrix.columns..][..factors.len()];
        let target = &mut result.values[row * factors.len()..][..factors.len()];
        for ((target, value), factor) in target.iter_mut().zip(source).zip(factors) {
            *target = value * factor;
        }
    }
    result
}

/// Turns pairs of columns so that the entry of largest size of the left one is positive.
pub(crate) fn fix_signs(left: &mut Rows, right: &mut Rows) {
    let turned = turned_columns(left);
    negate_columns(left, &turned);
    negate_columns(right, &turned);
}

/// Whether the entry of largest size of each column is negative.
fn turned_columns(matrix: &Rows) -> Vec<bool> {
    let mut largest = vec![0.0f64; matrix.columns];
    for row in matrix.values.chunks_exact(matrix.columns.max(1)) {
        for (largest, value) in largest.iter_mut().zip(row) {
            // Values that differ by rounding alone are equal: the first of them decides.
            if value.abs() > largest.abs() * (1.0 + 1e-9) {
                *largest = *value;
            }
        }
    }
    largest.iter().map(|value| *value < 0.0).collect()
}

fn negate_columns(matrix: &mut Rows, turned: &[bool]) {
    if !turned.contains(&true) {
        return;
    }
    for row in matrix.values.chunks_exact_mut(matrix.columns.max(1)) {
        for (value, is_turned) in row.iter_mut().zip(turned) {
            *value = if *is_turned { -*value } else { *value };
        }
    }
}

/// The Gram matrices of both sides of an update without its scales: LᵀL and RᵀR.
#[derive(Debug, Clone)]
pub(crate) struct Grams {
    pub left: Matrix,
    pub right: Matrix,
}

impl Grams {
    pub fn of(update: &Update<'_>) -> Self {
        Self {
            left: gram_by_one_thread(&update.left()),
            right: gram_by_one_thread(&update.right()),
        }
    }

    /// ⟨Δ, Δ′⟩ of the products in some of the columns, with these scales of all.
    pub fn product(&self, one: &Range<usize>, other: &Range<usize>, scales: &[f64]) -> f64 {
        let of = |k: usize| {
            let (left, right) =
                (&self.left.column(k)[one.clone()], &self.right.column(k)[one.clone()]);
            let terms = left.iter().zip(right).zip(&scales[one.clone()]);
            scales[k] * terms.map(|((l, r), scale)| scale * l * r).sum::<f64>()
        };
        other.clone().map(of).sum()
    }
}

/// ⟨Δᵢ, Δⱼ⟩ of updates of one weight, 0 where one is missing, and the Gram matrices of all of them next to
/// one another.
pub(crate) fn inner_products(
    [rows, columns]: [usize; 2],
    updates: &[Option<Update<'_>>],
) -> Result<(Matrix, Grams)> {
    let terms = updates.iter().flatten().flat_map(|update| update.terms().iter().copied());
    let all = Update::sum(rows, columns, terms.collect())?;
    let (grams, scales) = (Grams::of(&all), all.scales());
    let mut end = 0;
    let ranges: Vec<Range<usize>> = (updates.iter())
        .map(|update| {
            let start = end;
            end += update.as_ref().map_or(0, Update::rank);
            start..end
        })
        .collect();
    let mut products = Matrix::zeros(updates.len(), updates.len());
    for (i, one) in ranges.iter().enumerate() {
        for (j, other) in ranges[..=i].iter().enumerate() {
            let product = grams.product(one, other, &scales);
            products.set(i, j, product);
            products.set(j, i, product);
        }
    }
    Ok((products, grams))
}

/// ‖B·A − B′·A′‖ for factors that were rounded to B′ and A′, from what each element lost: with E for that,
/// it is ‖E_B·A′ + B·E_A‖, in which nothing cancels.
pub(crate) fn rounding_error(exact: &Factors, rounded: &Factors) -> f64 {
    let lost = |exact: &Rows, rounded: &Rows| -> Option<Rows> {
        if exact.values == rounded.values {
            return None;
        }
        let values = exact.values.iter().zip(&rounded.values).map(|(one, other)| one - other);
        Some(Rows { values: values.collect(), ..*exact })
    };
    let terms: Vec<(Rows, Rows)> = [
        lost(&exact.b, &rounded.b).map(|b| (b, rounded.a.transposed())),
        lost(&exact.a, &rounded.a).map(|a| (exact.b.clone(), a.transposed())),
    ]
    .into_iter()
    .flatten()
    .collect();
    let mut sum = 0.0;
    for (i, (b, a)) in terms.iter().enumerate() {
        for (j, (other_b, other_a)) in terms[..=i].iter().enumerate() {
            let (left, right) = (b.cross(other_b), a.cross(other_a));
            let inner: f64 = left.data.iter().zip(&right.data).map(|(l, r)| l * r).sum();
            sum += if i == j { inner } else { 2.0 * inner };
        }
    }
    sum.max(0.0).sqrt()
}
