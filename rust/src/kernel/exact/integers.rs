//! Sums of products in whole numbers of any length, for what no bound decides.

use num_bigint::{BigInt, BigUint, Sign};

use super::Target;

/// A sum of products of four numbers, rounded once to nearest even; NaN where a number is not finite.
pub(super) fn round(terms: impl Iterator<Item = [f64; 4]>, target: Target) -> f64 {
    let mut parts = Vec::new();
    for term in terms {
        if term.iter().any(|value| !value.is_finite()) {
            return f64::NAN;
        }
        let mut product = BigInt::from(1);
        let mut exponent = 0;
        for value in term {
            let (significand, own) = decomposed(value);
            product *= significand;
            exponent += own;
        }
        if product.sign() != Sign::NoSign {
            parts.push((product, exponent));
        }
    }
    let Some(least) = parts.iter().map(|(_, exponent)| *exponent).min() else { return 0.0 };
    let sum: BigInt =
        parts.into_iter().map(|(product, exponent)| product << (exponent - least) as u64).sum();
    let (sign, magnitude) = sum.into_parts();
    let value = rounded(&magnitude, least, target);
    if sign == Sign::Minus { -value } else { value }
}

/// A finite number as an integer times a power of two.
fn decomposed(value: f64) -> (i64, i64) {
    let bits = value.to_bits();
    let fraction = (bits & ((1 << 52) - 1)) as i64;
    let biased = (bits >> 52 & 0x7ff) as i64;
    let (significand, exponent) =
        if biased == 0 { (fraction, -1074) } else { (fraction | 1 << 52, biased - 1075) };
    (if value.is_sign_negative() { -significand } else { significand }, exponent)
}

/// `magnitude` · 2^`exponent`, rounded.
fn rounded(magnitude: &BigUint, exponent: i64, target: Target) -> f64 {
    let bits = magnitude.bits() as i64;
    if bits == 0 {
        return 0.0;
    }
    let (precision, smallest) = target.format();
    // The exponent of the last place that the result has.
    let last = (exponent + bits - precision as i64).max(smallest);
    let significand = match last - exponent {
        ..=0 => magnitude << (exponent - last) as u64,
        cut => {
            let cut = cut as u64;
            let kept = magnitude >> cut;
            let is_half_or_more = magnitude.bit(cut - 1);
            let is_more = is_half_or_more && magnitude.trailing_zeros() != Some(cut - 1);
            if is_more || is_half_or_more && kept.bit(0) { kept + 1u8 } else { kept }
        }
    };
    let significand = u64::try_from(significand).expect("as many bits as the type has");
    if last > 1023 {
        return f64::INFINITY;
    }
    // In two steps, of which the first stays far from both ends of the range; both are exact but where
    // the result is infinite.
    let half = last / 2;
    let value = significand as f64 * power(half) * power(last - half);
    if value > target.largest() { f64::INFINITY } else { value }
}

/// 2^`exponent`, of a normal number.
fn power(exponent: i64) -> f64 {
    f64::from_bits(((exponent + 1023) as u64) << 52)
}
