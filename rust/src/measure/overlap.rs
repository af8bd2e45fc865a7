//! What two updates of one weight have in common. They may differ in rank, scale and dtype; all
//! figures are of ΔW and none depends on the factors it is written in.

mod signs;
mod subspace;

#[cfg(test)]
mod tests;

pub use signs::{SIGN_SAMPLES, SignAgreement, sign_agreement};
pub use subspace::{PrincipalAngles, SingularBases, SubspaceSimilarity};

use crate::error::Result;
use crate::linalg::cross_product;
use crate::measure::spectrum::{Update, frobenius_norm};

/// ⟨X, Y⟩ = Σ XᵢⱼYᵢⱼ as s_x·s_y·tr((B_xᵀB_y)(A_yA_xᵀ)), exact but for the rounding of f64 sums.
/// NaN where a factor is not finite.
///
/// # Errors
/// [`crate::Error::Argument`] when the updates' shapes differ.
pub fn inner_product(x: &Update<'_>, y: &Update<'_>) -> Result<f64> {
    x.check_shape(y)?;
    let left = cross_product(&x.left(), &y.left());
    let right = cross_product(&x.right(), &y.right());
    let (x_scales, y_scales) = (x.scales(), y.scales());
    let mut sum = 0.0;
    for (column, y_scale) in y_scales.iter().enumerate() {
        let terms = left.column(column).iter().zip(right.column(column));
        let part: f64 = x_scales.iter().zip(terms).map(|(x_scale, (b, a))| x_scale * b * a).sum();
        sum += y_scale * part;
    }
    Ok(sum)
}

/// How two updates lie to each other.
#[derive(Debug, Clone, Copy, PartialEq)]
pub struct Alignment {
    /// ⟨X, Y⟩.
    pub inner_product: f64,
    /// ⟨X, Y⟩/(‖X‖·‖Y‖), from −1 to 1; NaN where one of the updates is zero or not finite.
    pub cosine: f64,
    /// ‖X‖_F and ‖Y‖_F.
    pub norms: [f64; 2],
    /// ‖X − Y‖_F, through QR of the stacked factors, which keeps its digits for near-duplicates.
    pub difference_norm: f64,
    /// ‖X − Y‖_F / max(‖X‖_F, ‖Y‖_F); NaN where both are zero.
    pub relative_difference: f64,
}

impl Alignment {
    /// Compares two updates.
    ///
    /// # Errors
    /// [`crate::Error::Argument`] when the updates' shapes differ.
    pub fn of(x: &Update<'_>, y: &Update<'_>) -> Result<Self> {
        let inner_product = inner_product(x, y)?;
        let norms = [frobenius_norm(x), frobenius_norm(y)];
        let difference_norm = difference_norm(x, y)?;
        Ok(Self {
            inner_product,
            cosine: cosine_of(inner_product, norms),
            norms,
            difference_norm,
            relative_difference: difference_norm / norms[0].max(norms[1]),
        })
    }
}

/// The cosine that follows from an inner product and two norms; NaN where a norm is zero.
pub fn cosine_of(inner_product: f64, norms: [f64; 2]) -> f64 {
    (inner_product / norms[0] / norms[1]).clamp(-1.0, 1.0)
}

/// ⟨X, Y⟩/(‖X‖·‖Y‖), from −1 to 1; NaN where one of the updates is zero or not finite.
///
/// # Errors
/// [`crate::Error::Argument`] when the updates' shapes differ.
pub fn cosine(x: &Update<'_>, y: &Update<'_>) -> Result<f64> {
    let norms = [frobenius_norm(x), frobenius_norm(y)];
    Ok(cosine_of(inner_product(x, y)?, norms))
}

/// ‖X − Y‖_F of the stacked factors [B_x, B_y] and [A_x; A_y], where the difference of
/// near-duplicates does not cancel as it does in ‖X‖² + ‖Y‖² − 2⟨X, Y⟩.
///
/// # Errors
/// [`crate::Error::Argument`] when the updates' shapes differ.
pub fn difference_norm(x: &Update<'_>, y: &Update<'_>) -> Result<f64> {
    Ok(frobenius_norm(&x.plus(&y.scaled(-1.0))?))
}
