//! One element: its sum in double or double-double precision with a bound, and where that does not tell
//! how it is rounded, in whole numbers.

use super::Recomputed;
use super::integers;
use crate::kernel::convert::round_to_odd;
use crate::tensor::dtype::Dtype;

/// Half a unit in the last place of 1 in f64.
const UNIT: f64 = f64::EPSILON / 2.0;

/// A type that results are rounded to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Target {
    Bf16,
    F16,
    F32,
    F64,
}

impl Target {
    /// # Panics
    /// For a type that cannot be merged.
    pub(crate) fn of(dtype: &Dtype) -> Self {
        match dtype {
            Dtype::Bf16 => Self::Bf16,
            Dtype::F16 => Self::F16,
            Dtype::F32 => Self::F32,
            Dtype::F64 => Self::F64,
            Dtype::Other(name) => panic!("a tensor was to become {name}"),
        }
    }

    /// Bits of a significand, and the exponent of the smallest positive number.
    pub(super) fn format(self) -> (u64, i64) {
        match self {
            Self::Bf16 => (8, -133),
            Self::F16 => (11, -24),
            Self::F32 => (24, -149),
            Self::F64 => (53, -1074),
        }
    }

    /// The largest finite number.
    pub(super) fn largest(self) -> f64 {
        match self {
            Self::Bf16 => half::bf16::MAX.to_f64(),
            Self::F16 => half::f16::MAX.to_f64(),
            Self::F32 => f64::from(f32::MAX),
            Self::F64 => f64::MAX,
        }
    }

    /// The number of this type that is nearest to an f64.
    fn nearest(self, value: f64) -> f64 {
        match self {
            Self::Bf16 => half::bf16::from_f32(round_to_odd(value)).to_f64(),
            Self::F16 => half::f16::from_f32(round_to_odd(value)).to_f64(),
            Self::F32 => f64::from(value as f32),
            Self::F64 => value,
        }
    }

    /// To what everything that is `error` from `sum` or nearer is rounded, if that is one number. The
    /// bound has room for the roundings of the two ends.
    pub(super) fn decided(self, sum: f64, error: f64) -> Option<f64> {
        let (low, high) = (sum - error, sum + error);
        // Beyond f64, or a NaN.
        if !(low.is_finite() && high.is_finite()) {
            return None;
        }
        let (low, high) = (self.nearest(low), self.nearest(high));
        (low.to_bits() == high.to_bits()).then_some(high)
    }
}

/// A number of a type into its bytes.
pub(crate) fn store(dtype: &Dtype, value: f64, place: &mut [u8]) {
    match dtype {
        Dtype::Bf16 => {
            place.copy_from_slice(&half::bf16::from_f32(value as f32).to_le_bytes());
        }
        Dtype::F16 => place.copy_from_slice(&half::f16::from_f32(value as f32).to_le_bytes()),
        Dtype::F32 => place.copy_from_slice(&(value as f32).to_le_bytes()),
        Dtype::F64 => place.copy_from_slice(&value.to_le_bytes()),
        Dtype::Other(name) => panic!("a tensor was to become {name}"),
    }
}

/// `weight` plus the terms. What is not finite stays what it is; terms that are not finite make a NaN.
pub(super) fn merged(
    weight: f64,
    terms: impl Iterator<Item = [f64; 4]> + Clone,
    target: Target,
    recomputed: &mut Recomputed,
) -> f64 {
    if !weight.is_finite() {
        return weight;
    }
    round(std::iter::once([1.0, 1.0, 1.0, weight]).chain(terms), target, recomputed)
}

/// A sum of products of four numbers, rounded once.
pub(crate) fn round(
    terms: impl Iterator<Item = [f64; 4]> + Clone,
    target: Target,
    recomputed: &mut Recomputed,
) -> f64 {
    let decided = match target {
        Target::F64 => in_double_double(terms.clone()),
        _ => in_double(terms.clone(), target),
    };
    decided.unwrap_or_else(|| {
        recomputed.in_integers += 1;
        integers::round(terms, target)
    })
}

fn in_double(terms: impl Iterator<Item = [f64; 4]>, target: Target) -> Option<f64> {
    let (mut sum, mut size, mut count) = (0.0, 0.0, 0.0);
    for [first, second, third, fourth] in terms {
        let term = first * second * (third * fourth);
        // Not by the factors alone: what is infinite times zero is no zero.
        if term == 0.0 && [first, second, third, fourth].contains(&0.0) {
            continue;
        }
        sum += term;
        size += f64::abs(term);
        count += 1.0;
    }
    if count == 0.0 {
        return Some(0.0);
    }
    target.decided(sum, (count + 8.0) * 1.01 * UNIT * size + count * f64::MIN_POSITIVE)
}

/// An f64 and what it lacks.
#[derive(Clone, Copy)]
struct DoubleDouble {
    high: f64,
    low: f64,
}

impl DoubleDouble {
    /// Of two numbers, exactly (Knuth's two-sum).
    fn sum(left: f64, right: f64) -> Self {
        let high = left + right;
        let virtual_right = high - left;
        let low = (left - (high - virtual_right)) + (right - virtual_right);
        Self { high, low }
    }

    /// Of two numbers, exactly where nothing underflows.
    fn product(left: f64, right: f64) -> Self {
        let high = left * right;
        Self { high, low: left.mul_add(right, -high) }
    }

    fn times(self, factor: f64) -> Self {
        let Self { high, low } = Self::product(self.high, factor);
        Self::sum(high, self.low.mul_add(factor, low))
    }

    fn plus(self, other: Self) -> Self {
        let high = Self::sum(self.high, other.high);
        let low = Self::sum(self.low, other.low);
        let first = Self::sum(high.high, high.low + low.high);
        Self::sum(first.high, first.low + low.low)
    }
}

/// The sum rounded to f64, where twice as many digits tell how.
fn in_double_double(terms: impl Iterator<Item = [f64; 4]>) -> Option<f64> {
    let mut sum = DoubleDouble { high: 0.0, low: 0.0 };
    let (mut size, mut count) = (0.0, 0.0);
    for [first, second, third, fourth] in terms {
        let term = DoubleDouble::product(first, second).times(third).times(fourth);
        sum = sum.plus(term);
        size += term.high.abs();
        count += 1.0;
    }
    let DoubleDouble { high, low } = sum;
    // Sums are right to 3, products to 5 units of the last of 106 digits (Joldes, Muller and Popescu
    // 2017, «Tight and rigorous error bounds for basic building blocks of double-word arithmetic»,
    // ACM Trans. Math. Softw. 44); each term takes part in one sum after another.
    let error = (count + 8.0) * 8.0 * UNIT * UNIT * size + count * f64::MIN_POSITIVE;
    // Below, the lower halves of products may have underflowed.
    if !high.is_finite() || !size.is_finite() || high.abs() < 1e-250 {
        return None;
    }
    let gap = f64::min(high.next_up() - high, high - high.next_down());
    let is_decided = low.abs() + error < gap / 2.0 * (1.0 - 4.0 * UNIT);
    (is_decided && high.abs() < f64::MAX).then_some(high)
}
