//! The types in which tiles are accumulated, and their sums.

use crate::tensor::dtype::Dtype;

/// A type in which tiles are accumulated.
pub(crate) trait Real: bytemuck::Pod + Default + Into<f64> {
    /// Its dtype.
    const DTYPE: Dtype;
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    /// self · factor, rounded.
    fn times(self, factor: Self) -> Self;
    /// self + other, rounded.
    fn plus(self, other: Self) -> Self;
}

macro_rules! real {
    ($type:ty, $dtype:expr) => {
        impl Real for $type {
            const DTYPE: Dtype = $dtype;

            fn from_f64(value: f64) -> Self {
                value as $type
            }

            fn to_f64(self) -> f64 {
                f64::from(self)
            }

            fn times(self, factor: Self) -> Self {
                self * factor
            }

            fn plus(self, other: Self) -> Self {
                self + other
            }
        }
    };
}

real!(f32, Dtype::F32);
real!(f64, Dtype::F64);

/// In f64, over eight sums side by side, so that the order is the same on every processor and the
/// compiler may still use vectors.
pub(super) fn sum_of_squares<T: Real>(values: &[T]) -> f64 {
    let mut sums = [0.0; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value.to_f64() * value.to_f64();
        }
    }
    let rest: f64 = rest.iter().map(|value| value.to_f64() * value.to_f64()).sum();
    sums.iter().sum::<f64>() + rest
}
