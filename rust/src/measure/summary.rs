//! What the modules of an adapter come to: its own norms and ranks.

use serde::Serialize;

use crate::measure::metrics::Shape;
use crate::measure::spectrum::Spectrum;

/// The updates of an adapter taken together. What is not finite is left out of all but the norm.
#[derive(Debug, Clone, Copy, PartialEq, Serialize)]
pub struct UpdateSummary {
    /// √Σ‖ΔW‖_F².
    pub frobenius_norm: f64,
    /// The greatest ‖ΔW‖₂; NaN if there is none.
    pub max_spectral_norm: f64,
    /// The median of ‖ΔW‖₂; NaN if there is none.
    pub median_spectral_norm: f64,
    /// The mean of the effective ranks; NaN if there is none.
    pub mean_effective_rank: f64,
}

impl UpdateSummary {
    /// Of these modules' updates.
    pub fn of<'a>(spectra: impl Iterator<Item = &'a Spectrum> + Clone) -> Self {
        let finite = |value: fn(&Spectrum) -> f64| -> Vec<f64> {
            spectra.clone().map(value).filter(|value| value.is_finite()).collect()
        };
        let spectral = ascending(finite(|spectrum| spectrum.spectral_norm));
        let effective = finite(|spectrum| spectrum.effective_rank);
        let mut sum = Sum::default();
        effective.iter().for_each(|rank| sum.add(*rank, 0.0));
        let half = spectral.len() / 2;
        Self {
            frobenius_norm: length(spectra.clone().map(|spectrum| spectrum.frobenius_norm)),
            max_spectral_norm: spectral.last().copied().unwrap_or(f64::NAN),
            median_spectral_norm: match spectral.len() {
                0 => f64::NAN,
                count if count % 2 == 1 => spectral[half],
                _ => f64::midpoint(spectral[half - 1], spectral[half]),
            },
            // Of no ranks 0/0, which is NaN.
            mean_effective_rank: sum.value() / effective.len() as f64,
        }
    }
}

/// The shapes and scales of an adapter's modules taken together.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct ShapeSummary {
    /// How many modules there are.
    pub modules: usize,
    /// Their ranks, each once, ascending.
    pub ranks: Vec<usize>,
    /// Their alphas, each once, ascending.
    pub alphas: Vec<f64>,
    /// Their scales, each once, ascending.
    pub scalings: Vec<f64>,
}

impl ShapeSummary {
    /// Of these modules.
    pub fn of(shapes: &[Shape]) -> Self {
        let mut ranks: Vec<usize> = shapes.iter().map(|shape| shape.rank).collect();
        ranks.sort_unstable();
        ranks.dedup();
        let distinct = |value: fn(&Shape) -> f64| {
            // NaN is of an adapter of which nothing tells the scale.
            let known = shapes.iter().map(value).filter(|value| !value.is_nan());
            let mut values = ascending(known.collect());
            values.dedup();
            values
        };
        let (alphas, scalings) = (distinct(|shape| shape.alpha), distinct(|shape| shape.scaling));
        Self { modules: shapes.len(), ranks, alphas, scalings }
    }
}

/// The value that comes most often, the greatest of several; `None` of nothing.
pub fn most_common(values: impl Iterator<Item = f64>) -> Option<f64> {
    let values = ascending(values.collect());
    let runs = values.chunk_by(|one, next| one == next);
    runs.max_by_key(|run| run.len()).map(|run| run[0])
}

fn ascending(mut values: Vec<f64>) -> Vec<f64> {
    values.sort_unstable_by(f64::total_cmp);
    values
}

/// A sum in twice the precision of f64, so that one rounding is left (Dekker 1971).
#[derive(Default)]
struct Sum {
    high: f64,
    low: f64,
}

impl Sum {
    /// Adds a number of two parts.
    fn add(&mut self, high: f64, low: f64) {
        let sum = self.high + high;
        let part = sum - self.high;
        let rest = (self.high - (sum - part)) + (high - part);
        self.low += rest + low;
        self.high = sum;
    }

    fn value(&self) -> f64 {
        self.high + self.low
    }
}

/// √Σx² to the last bit but one, as Python's `math.hypot`; infinite before it is NaN.
fn length(values: impl Iterator<Item = f64> + Clone) -> f64 {
    let largest = values.clone().fold(0.0, |largest: f64, value| largest.max(value.abs()));
    if largest == f64::INFINITY {
        return largest;
    }
    if values.clone().any(f64::is_nan) {
        return f64::NAN;
    }
    if largest == 0.0 {
        return 0.0;
    }
    // By a power of two, so that nothing is rounded and no square over- or underflows.
    let exponent = ((largest.to_bits() >> 52) as i32 - 1023).max(-1022);
    let scale = 2f64.powi(-exponent);
    let mut sum = Sum::default();
    for value in values {
        let scaled = value * scale;
        let square = scaled * scaled;
        sum.add(square, scaled.mul_add(scaled, -square));
    }
    let high = sum.value();
    let low = (sum.high - high) + sum.low;
    let root = high.sqrt();
    // One step of Newton's method on what the root's square leaves.
    let rest = (-root).mul_add(root, high) + low;
    (root + rest / (2.0 * root)) / scale
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn lengths_are_pythons() {
        // Those of CPython's `math.hypot`.
        for (values, expected) in [
            (&[][..], 0.0),
            (&[3.0, 4.0], 5.0),
            (&[0.1, 0.2, 0.3], 0.374_165_738_677_394_1),
            (&[1e300, 1e300], 1.414_213_562_373_095_2e300),
            (&[3e-320, 4e-320], 5e-320),
            (&[5e-324], 5e-324),
            (&[f64::NAN, f64::INFINITY], f64::INFINITY),
        ] {
            assert_eq!(length(values.iter().copied()), expected, "{values:?}");
        }
        assert!(length([1.0, f64::NAN].into_iter()).is_nan());
        let thirds = length((1..=1000).map(|index| 1.0 / f64::from(index) / 3.0));
        assert_eq!(thirds, 0.427_386_705_803_948_8);
    }

    #[test]
    fn what_comes_most_often_is_the_greatest_of_several() {
        assert_eq!(most_common([].into_iter()), None);
        assert_eq!(most_common([8.0, 4.0, 8.0, 16.0, 16.0].into_iter()), Some(16.0));
        assert_eq!(most_common([4.0, 4.0, 8.0].into_iter()), Some(4.0));
    }

    #[test]
    fn what_is_not_finite_is_left_out() {
        let spectrum = |norm: f64, rank: f64| Spectrum {
            frobenius_norm: norm,
            spectral_norm: norm,
            effective_rank: rank,
            ..Spectrum::from_values(1, 1, vec![1.0], 0.0)
        };
        let spectra = [spectrum(3.0, 2.0), spectrum(f64::NAN, f64::NAN), spectrum(4.0, 3.0)];
        let found = UpdateSummary::of(spectra.iter());
        assert!(found.frobenius_norm.is_nan());
        assert_eq!(found.max_spectral_norm, 4.0);
        assert_eq!(found.median_spectral_norm, 3.5);
        assert_eq!(found.mean_effective_rank, 2.5);
        let nothing = UpdateSummary::of([].iter());
        assert_eq!(nothing.frobenius_norm, 0.0);
        assert!(nothing.median_spectral_norm.is_nan() && nothing.mean_effective_rank.is_nan());
    }
}
