//! The precision that numbers were rounded to, whatever type they are stored in.

use half::{bf16, f16};

/// The coarsest type that holds all values, whatever type they are stored in: a float32 copy of
/// bfloat16 numbers has been rounded to bfloat16.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Precision {
    Bf16,
    F16,
    F32,
    F64,
}

impl Precision {
    /// Of these values.
    pub fn of(values: &[f64]) -> Self {
        let all = |test: fn(f64) -> bool| values.iter().all(|value| test(*value));
        if all(|value| f64::from(bf16::from_f64(value)) == value) {
            Self::Bf16
        } else if all(|value| f64::from(f16::from_f64(value)) == value) {
            Self::F16
        } else if all(|value| f64::from(value as f32) == value) {
            Self::F32
        } else {
            Self::F64
        }
    }

    /// The variance of the rounding of a value: ulp²/12.
    pub fn variance(self, value: f64) -> f64 {
        let (digits, smallest) = match self {
            Self::Bf16 => (8, -126),
            Self::F16 => (11, -14),
            Self::F32 => (24, -126),
            Self::F64 => (53, -1022),
        };
        if value == 0.0 {
            return 0.0;
        }
        let exponent = ((value.to_bits() >> 52) & 0x7ff) as i32 - 1023;
        // 2^(exponent + 1 − digits), made of its bits.
        let power = (exponent.max(smallest) + 1 - digits).max(-1022);
        let ulp = f64::from_bits(((power + 1023) as u64) << 52);
        ulp * ulp / 12.0
    }
}
