//! The singular values of an update and what follows from them, without forming the update.
//!
//! With thin QR decompositions B = Q_B·R_B and Aᵀ = Q_A·R_A, ΔW = s·B·A has the singular values
//! of the r×r matrix s·R_B·R_Aᵀ. The R factors come from the f64 Gram matrices where the factors
//! are well conditioned and the spectrum is short (σ_r/σ₁ ≥ 1e-5); otherwise from Householder QR
//! in f64, which costs more and keeps the small values.
//!
//! Figures do not change when ΔW is written in other factors, nor when a part of the scale is
//! moved into them. Thresholds are relative, never absolute.

mod update;

#[cfg(test)]
mod tests;

pub use update::{Term, Update, Values};

use crate::adapter::zero;
use crate::linalg::{
    Decomposition, Matrix, Reflectors, decompose, gram_and_sums, gram_factor,
    leading_singular_values, singular_values, triangular_factor,
};

/// Below this σ_r/σ₁ the Gram matrices are not trusted.
const SHORT_SPECTRUM: f64 = 1e-5;

/// From this σ_r/σ₁ on, values that are exact relative to σ₁ have as many digits as Gram matrices
/// leave.
const EVEN_SPECTRUM: f64 = 1e-4;

/// How far the energy of the first k values may fall short of a share and still count as it, so
/// that rounding does not decide about k.
const SHARE_TOLERANCE: f64 = 1e-9;

/// The singular values of ΔW and the figures made of them. All are of ΔW with its scale.
///
/// Of an update with NaN or infinity in its factors or scale, every figure is NaN and every
/// count 0. Of a zero update (B never trained, or factors that cancel but for rounding), norms,
/// ranks and counts are 0 and the condition number is infinite.
#[derive(Debug, Clone, PartialEq)]
pub struct Spectrum {
    /// σ, descending: min(rank, m, n) of them, the others of ΔW being zero.
    pub singular_values: Vec<f64>,
    /// ‖ΔW‖_F = √Σσ².
    pub frobenius_norm: f64,
    /// ‖ΔW‖₂ = σ₁.
    pub spectral_norm: f64,
    /// Σσ²/σ₁².
    pub stable_rank: f64,
    /// (Σσ²)²/Σσ⁴.
    pub participation_ratio: f64,
    /// exp H(σ/Σσ), the effective rank of Roy & Vetterli (2007).
    pub effective_rank: f64,
    /// exp H(σ²/Σσ²).
    pub energy_effective_rank: f64,
    /// The least k for which σ₁² + … + σ_k² is 90 % of Σσ².
    pub k90: usize,
    /// The same for 95 %.
    pub k95: usize,
    /// The same for 99 %.
    pub k99: usize,
    /// The number of σ above max(m, n)·ε·σ₁ with the ε of f64, as `numpy.linalg.matrix_rank`.
    pub numerical_rank: usize,
    /// σ₁ over the last of the singular values; infinite where that is zero.
    pub condition_number: f64,
    /// The mean of ΔW's entries.
    pub entry_mean: f64,
}

impl Spectrum {
    /// Puts NaN in the place of every figure that is multiplied where the update is.
    pub fn blank_what_is_scaled(&mut self) {
        self.singular_values.fill(f64::NAN);
        self.frobenius_norm = f64::NAN;
        self.spectral_norm = f64::NAN;
        self.entry_mean = f64::NAN;
    }

    /// Measures an update.
    pub fn of(update: &Update<'_>) -> Self {
        let (core, bound, entry_mean) = gram_core(update);
        let mut values = values_from(core, update);
        if is_rounding(values.first().copied().unwrap_or(0.0), bound, update) {
            values.fill(0.0);
        }
        Self::from_values(update.rows(), update.columns(), values, entry_mean)
    }

    /// Whether the update was free of NaN and infinities.
    pub fn is_finite(&self) -> bool {
        self.frobenius_norm.is_finite()
    }

    /// The figures that follow from the singular values, descending, of an update of so many rows
    /// and columns.
    pub fn from_values(
        rows: usize,
        columns: usize,
        singular_values: Vec<f64>,
        entry_mean: f64,
    ) -> Self {
        let first = singular_values.first().copied().unwrap_or(0.0);
        let nothing = if first.is_finite() { 0.0 } else { f64::NAN };
        if !first.is_finite() || first == 0.0 {
            return Self {
                singular_values,
                frobenius_norm: nothing,
                spectral_norm: nothing,
                stable_rank: nothing,
                participation_ratio: nothing,
                effective_rank: nothing,
                energy_effective_rank: nothing,
                k90: 0,
                k95: 0,
                k99: 0,
                numerical_rank: 0,
                condition_number: f64::INFINITY + nothing,
                entry_mean: nothing,
            };
        }
        // Relative to σ₁, nothing over- or underflows.
        let relative: Vec<f64> = singular_values.iter().map(|value| value / first).collect();
        let squares: Vec<f64> = relative.iter().map(|value| value * value).collect();
        let energy: f64 = squares.iter().sum();
        let fourth: f64 = squares.iter().map(|square| square * square).sum();
        let floor = rows.max(columns) as f64 * f64::EPSILON;
        Self {
            frobenius_norm: first * energy.sqrt(),
            spectral_norm: first,
            stable_rank: energy,
            participation_ratio: energy * energy / fourth,
            effective_rank: perplexity(&relative),
            energy_effective_rank: perplexity(&squares),
            k90: leading(&squares, 0.90 * energy),
            k95: leading(&squares, 0.95 * energy),
            k99: leading(&squares, 0.99 * energy),
            numerical_rank: relative.iter().filter(|&&value| value > floor).count(),
            condition_number: 1.0 / relative.last().expect("there is a first value"),
            entry_mean,
            singular_values,
        }
    }
}

/// exp of the Shannon entropy of the weights' distribution.
fn perplexity(weights: &[f64]) -> f64 {
    let total: f64 = weights.iter().sum();
    let entropy: f64 = weights
        .iter()
        .map(|weight| weight / total)
        .filter(|&share| share > 0.0)
        .map(|share| -share * share.ln())
        .sum();
    entropy.exp()
}

/// The least k whose first k squares reach `target`.
fn leading(squares: &[f64], target: f64) -> usize {
    let mut sum = 0.0;
    for (index, square) in squares.iter().enumerate() {
        sum += square;
        if sum >= target * (1.0 - SHARE_TOLERANCE) {
            return index + 1;
        }
    }
    squares.len()
}

/// s·(1ᵀB)(A1)/mn, summed over the products, from the sums of the columns of both sides.
fn entry_mean(update: &Update<'_>, scales: &[f64], left: &[f64], right: &[f64]) -> f64 {
    let count = update.rows() as f64 * update.columns() as f64;
    let sum: f64 =
        scales.iter().zip(left.iter().zip(right)).map(|(scale, (b, a))| scale * b * a).sum();
    sum / count
}

/// What is known of the two sides without a QR decomposition.
enum Core {
    /// A factor, or a scale, is not finite.
    NotFinite,
    /// One side is zero.
    Zero,
    /// An r×r matrix with the singular values of the update.
    Small(Matrix),
    /// The Gram matrices do not say.
    IllConditioned,
}

/// The core, what ‖ΔW‖ could at most be, and the mean of the entries, for which the factors are read
/// once.
fn gram_core(update: &Update<'_>) -> (Core, f64, f64) {
    let scales = update.scales();
    let (left, left_sums) = gram_and_sums(&update.left());
    let (right, right_sums) = gram_and_sums(&update.right());
    let mean = entry_mean(update, &scales, &left_sums, &right_sums);
    let trace = |gram: &Matrix| -> f64 { (0..gram.rows).map(|i| gram.get(i, i)).sum() };
    let (left_trace, right_trace) = (trace(&left), trace(&right));
    let is_finite = left_trace.is_finite()
        && right_trace.is_finite()
        && scales.iter().all(|scale| scale.is_finite());
    let sizes = |k: usize| left.get(k, k).sqrt() * right.get(k, k).sqrt();
    let bound = scales.iter().enumerate().map(|(k, scale)| scale.abs() * sizes(k)).sum();
    let core = if !is_finite {
        Core::NotFinite
    } else if left_trace == 0.0 || right_trace == 0.0 || scales.iter().all(|&scale| scale == 0.0) {
        Core::Zero
    } else if update.rank() > update.spectrum_len() {
        Core::IllConditioned
    } else {
        match (gram_factor(&left), gram_factor(&right)) {
            (Some(left), Some(right)) => Core::Small(left.scaled_product(&scales, &right)),
            _ => Core::IllConditioned,
        }
    };
    (core, bound, mean)
}

/// Whether a norm of an update is what rounding leaves of one product that is zero, though its
/// factors are not. `bound` is Σ‖b_k‖‖a_k‖ of the columns and rows of the factors, with the scale.
fn is_rounding(norm: f64, bound: f64, update: &Update<'_>) -> bool {
    let [term] = update.terms() else { return false };
    let (rows, columns, rank) = (update.rows(), update.columns(), term.rank);
    let terms = rows.max(columns) + rank;
    // Only what may be so is looked at again.
    let may_be = norm > 0.0 && norm <= terms as f64 * f64::EPSILON * bound;
    if !may_be {
        return false;
    }
    let read = |values: &Values<'_>, length| {
        let mut read = vec![0.0; length];
        values.read(0, &mut read);
        read
    };
    let (b, a) = (read(&term.left, rows * rank), read(&term.right, rank * columns));
    zero::vanishes([rows, columns, rank], &|index| b[index], &|index| a[index])
}

/// All singular values, descending.
pub(crate) fn values_of(update: &Update<'_>) -> Vec<f64> {
    let (core, bound, _) = gram_core(update);
    let mut values = values_from(core, update);
    if is_rounding(values.first().copied().unwrap_or(0.0), bound, update) {
        values.fill(0.0);
    }
    values
}

fn values_from(core: Core, update: &Update<'_>) -> Vec<f64> {
    let count = update.spectrum_len();
    match core {
        Core::NotFinite => return vec![f64::NAN; count],
        Core::Zero => return vec![0.0; count],
        Core::Small(core) => {
            if let Some(values) = leading_singular_values(&core)
                && values[count - 1] >= EVEN_SPECTRUM * values[0]
            {
                return values;
            }
            let values = singular_values(&core);
            if values[count - 1] >= SHORT_SPECTRUM * values[0] {
                return values;
            }
        }
        Core::IllConditioned => {}
    }
    let left = triangular_factor(&update.left());
    let right = triangular_factor(&update.right());
    singular_values(&left.scaled_product(&update.scales(), &right))
}

/// ‖ΔW‖_F; NaN of an update that is not finite.
pub fn frobenius_norm(update: &Update<'_>) -> f64 {
    let (core, bound, _) = gram_core(update);
    let norm = match core {
        Core::NotFinite => f64::NAN,
        Core::Zero => 0.0,
        Core::Small(core) => norm(&core),
        Core::IllConditioned => {
            let left = triangular_factor(&update.left());
            let right = triangular_factor(&update.right());
            norm(&left.scaled_product(&update.scales(), &right))
        }
    };
    if is_rounding(norm, bound, update) { 0.0 } else { norm }
}

fn norm(matrix: &Matrix) -> f64 {
    let largest = matrix.data.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    if largest == 0.0 {
        return 0.0;
    }
    let squares: f64 = matrix.data.iter().map(|x| (x / largest).powi(2)).sum();
    largest * squares.sqrt()
}

/// U, σ and V of the update, through Householder QR: m×k, k and n×k, k = min(rank, m, n). `None`
/// for an update that is not finite.
pub(crate) fn decompose_update(update: &Update<'_>) -> Option<Decomposition> {
    if update.scales().iter().any(|scale| !scale.is_finite()) {
        return None;
    }
    let whole = |side: update::Side<'_>| {
        use crate::linalg::LongSide;
        let mut matrix = Matrix::zeros(side.length(), side.width());
        side.read(0, side.length(), &mut matrix.data);
        let is_finite = matrix.data.iter().all(|value| value.is_finite());
        is_finite.then(|| Reflectors::of(matrix))
    };
    let left = whole(update.left())?;
    let right = whole(update.right())?;
    let core = left.triangle().scaled_product(&update.scales(), &right.triangle());
    let small = decompose(&core);
    Some(Decomposition {
        left: left.expand(&small.left),
        values: small.values,
        right: right.expand(&small.right),
    })
}
