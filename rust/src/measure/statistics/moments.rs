//! Moments and extremes of a population, mergeable, in one pass.

use super::element::{BLOCK, ElementType, Format, Tensor};
use super::halves;
use crate::kernel::vector::vectorized;

/// Partial sums that run side by side. Fixed, so that every vector width adds in the same order.
pub(super) const LANES: usize = 16;

/// A sum with the rounding errors of its additions carried along (Neumaier's summation).
#[derive(Debug, Clone, Copy, Default)]
struct Compensated {
    sum: f64,
    error: f64,
}

impl Compensated {
    fn add(&mut self, value: f64) {
        let sum = self.sum + value;
        // An overflowed sum has no rounding error to carry.
        if sum.is_finite() {
            self.error += if self.sum.abs() >= value.abs() {
                (self.sum - sum) + value
            } else {
                (value - sum) + self.sum
            };
        }
        self.sum = sum;
    }

    fn merge(&mut self, other: Self) {
        self.add(other.sum);
        self.error += other.error;
    }

    fn total(self) -> f64 {
        self.sum + self.error
    }
}

/// Counts, extremes, sums and central moments of the finite values of a population.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Moments {
    /// Finite values.
    pub finite: u64,
    /// NaN and ±∞.
    pub non_finite: u64,
    /// Values equal to zero.
    pub zeros: u64,
    pub min: f64,
    pub max: f64,
    /// The least magnitude.
    pub least: f64,
    sum: Compensated,
    absolute: Compensated,
    /// Σ(x−mean)², Σ(x−mean)³, Σ(x−mean)⁴.
    second: f64,
    third: f64,
    fourth: f64,
}

impl Default for Moments {
    fn default() -> Self {
        Self {
            finite: 0,
            non_finite: 0,
            zeros: 0,
            min: f64::INFINITY,
            max: f64::NEG_INFINITY,
            least: f64::INFINITY,
            sum: Compensated::default(),
            absolute: Compensated::default(),
            second: 0.0,
            third: 0.0,
            fourth: 0.0,
        }
    }
}

impl Moments {
    /// The moments of a tensor, block after block.
    pub(crate) fn of(tensor: &Tensor<'_>) -> Self {
        let mut moments = Self::default();
        let mut buffer = [0.0; BLOCK];
        let mut start = 0;
        while start < tensor.len() {
            let end = tensor.len().min(start + BLOCK);
            let values = &mut buffer[..end - start];
            let part = tensor.slice(start, end);
            let sums = decode_and_sum(&part, values);
            let first = First::of_short(&part, sums).unwrap_or_else(|| first_sums(values));
            moments.merge(&Self::of_values(values, first));
            start = end;
        }
        moments
    }

    /// The moments of one block, whose order is not kept.
    fn of_values(values: &mut [f64], mut first: First) -> Self {
        let mut count = values.len();
        if !first.absolute.is_finite() {
            // Rare: pack the finite values together and take those.
            count = 0;
            for index in 0..values.len() {
                if values[index].is_finite() {
                    values[count] = values[index];
                    count += 1;
                }
            }
            first = first_sums(&values[..count]);
        }
        let non_finite = (values.len() - count) as u64;
        if count == 0 {
            return Self { non_finite, ..Self::default() };
        }
        let [second, third, fourth] = central_sums(&values[..count], first.sum / count as f64);
        Self {
            finite: count as u64,
            non_finite,
            zeros: first.zeros as u64,
            min: first.min,
            max: first.max,
            least: first.least,
            sum: Compensated { sum: first.sum, error: 0.0 },
            absolute: Compensated { sum: first.absolute, error: 0.0 },
            second,
            third,
            fourth,
        }
    }

    /// Adds another population's moments (Chan, Golub & LeVeque 1983; Pébay, SAND2008-6212).
    pub(crate) fn merge(&mut self, other: &Self) {
        self.non_finite += other.non_finite;
        if other.finite == 0 {
            return;
        }
        if self.finite == 0 {
            *self = Self { non_finite: self.non_finite, ..*other };
            return;
        }
        let (a, b) = (self.finite as f64, other.finite as f64);
        let n = a + b;
        let delta = other.mean() - self.mean();
        let square = delta * delta;
        self.fourth += other.fourth
            + square * square * (a / n) * (b / n) * ((a * a - a * b + b * b) / n)
            + 6.0 * square * ((a / n) * (a / n) * other.second + (b / n) * (b / n) * self.second)
            + 4.0 * delta * ((a / n) * other.third - (b / n) * self.third);
        self.third += other.third
            + square * delta * (a / n) * b * ((a - b) / n)
            + 3.0 * delta * ((a / n) * other.second - (b / n) * self.second);
        self.second += other.second + square * (a / n) * b;
        self.finite += other.finite;
        self.zeros += other.zeros;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        self.least = self.least.min(other.least);
        self.sum.merge(other.sum);
        self.absolute.merge(other.absolute);
    }

    /// The mean; NaN of nothing.
    pub(crate) fn mean(&self) -> f64 {
        self.sum.total() / self.finite as f64
    }

    /// The population variance; NaN of nothing.
    pub(crate) fn variance(&self) -> f64 {
        self.second / self.finite as f64
    }

    /// Σ|x|.
    pub(crate) fn absolute_sum(&self) -> f64 {
        self.absolute.total()
    }

    /// √Σx².
    pub(crate) fn euclidean_norm(&self) -> f64 {
        if self.finite == 0 {
            return 0.0;
        }
        // Both terms are positive: nothing cancels.
        (self.second + self.mean() * self.sum.total()).sqrt()
    }

    /// Whether all values are equal up to rounding, by the rule of `scipy.stats.skew`.
    fn is_constant(&self) -> bool {
        let spread = 1e-15 * self.mean();
        self.variance() <= spread * spread
    }

    /// m₃/m₂^1.5, biased; NaN where all values are equal.
    pub(crate) fn skewness(&self) -> f64 {
        if self.is_constant() {
            return f64::NAN;
        }
        let variance = self.variance();
        (self.third / self.finite as f64) / (variance * variance.sqrt())
    }

    /// m₄/m₂² − 3, biased; NaN where all values are equal.
    pub(crate) fn kurtosis(&self) -> f64 {
        if self.is_constant() {
            return f64::NAN;
        }
        let variance = self.variance();
        (self.fourth / self.finite as f64) / (variance * variance) - 3.0
    }
}

struct First {
    sum: f64,
    absolute: f64,
    zeros: f64,
    min: f64,
    max: f64,
    least: f64,
}

impl First {
    /// Of values of 16 bits, of which the sums are known. What else there is is found in the bits,
    /// of which a vector holds four times as many. `None` of other types and where a value is not
    /// finite.
    fn of_short(tensor: &Tensor<'_>, sums: (f64, f64)) -> Option<Self> {
        let (sum, absolute) = sums;
        let format = tensor.element().format();
        if !matches!(format, Format::Half | Format::Brain) {
            return None;
        }
        let bits = extremes(tensor.bytes());
        // Signed integers that sort as the numbers do become the format's unsigned keys.
        let value = |order: i16| format.value(u64::from(order.cast_unsigned() ^ 0x8000));
        if u64::from(bits.most | 0x8000) >= format.infinity() || tensor.is_empty() {
            return None;
        }
        Some(Self {
            sum,
            absolute,
            zeros: f64::from(bits.zeros),
            min: value(bits.min),
            max: value(bits.max),
            least: value(bits.least.cast_signed()),
        })
    }
}

/// Widens a block, and finds Σx and Σ|x| as [`first_sums`] does; of types whose sums are not made
/// use of before that, zeros.
fn decode_and_sum(tensor: &Tensor<'_>, values: &mut [f64]) -> (f64, f64) {
    let add = |a: f64, b: f64| a + b;
    match tensor.element() {
        ElementType::F16 => {
            if let Some([sum, absolute]) = halves::widen_and_add(tensor.bytes(), values) {
                return (combine(sum, add), combine(absolute, add));
            }
        }
        ElementType::BF16 => {}
        _ => {
            tensor.decode(values);
            return (0.0, 0.0);
        }
    }
    tensor.decode(values);
    sums(values)
}

/// What the bits of floating-point numbers of 16 bits tell without being widened.
struct Extremes {
    /// Those that are zero, of either sign.
    zeros: u16,
    /// Magnitudes.
    least: u16,
    most: u16,
    /// Integers that sort as the numbers do.
    min: i16,
    max: i16,
}

vectorized! {
    /// Of no more numbers than fit a `u16`.
    fn extremes(bytes: &[u8]) -> Extremes {
        let (mut zeros, mut least, mut most) = (0u16, u16::MAX, 0u16);
        let (mut min, mut max) = (i16::MAX, i16::MIN);
        for &source in bytes.as_chunks::<2>().0 {
            let bits = u16::from_le_bytes(source);
            let magnitude = bits & 0x7fff;
            let order = bits.cast_signed() ^ ((bits.cast_signed() >> 15) & 0x7fff);
            zeros += u16::from(magnitude == 0);
            least = least.min(magnitude);
            most = most.max(magnitude);
            min = min.min(order);
            max = max.max(order);
        }
        Extremes { zeros, least, most, min, max }
    }
}

vectorized! {
    /// Σx and Σ|x|, added as [`first_sums`] does.
    fn sums(values: &[f64]) -> (f64, f64) {
        // One after the other: in one loop the compiler pairs the two sums, not the lanes.
        (sum_of(values, |value| value), sum_of(values, f64::abs))
    }
}

#[inline(always)]
fn sum_of(values: &[f64], map: impl Fn(f64) -> f64) -> f64 {
    let mut sum = [0.0; LANES];
    let (blocks, rest) = values.as_chunks::<LANES>();
    for block in blocks {
        for lane in 0..LANES {
            sum[lane] += map(block[lane]);
        }
    }
    for (lane, &value) in rest.iter().enumerate() {
        sum[lane] += map(value);
    }
    combine(sum, |a, b| a + b)
}

/// Adds the lanes as a balanced tree.
fn combine(mut lanes: [f64; LANES], operation: impl Fn(f64, f64) -> f64) -> f64 {
    let mut width = LANES / 2;
    while width > 0 {
        for lane in 0..width {
            lanes[lane] = operation(lanes[lane], lanes[lane + width]);
        }
        width /= 2;
    }
    lanes[0]
}

vectorized! {
    fn first_sums(values: &[f64]) -> First {
        let mut sum = [0.0; LANES];
        let mut absolute = [0.0; LANES];
        let mut zeros = [0.0; LANES];
        let mut min = [f64::INFINITY; LANES];
        let mut max = [f64::NEG_INFINITY; LANES];
        let mut least = [f64::INFINITY; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                let value = block[lane];
                let magnitude = value.abs();
                sum[lane] += value;
                absolute[lane] += magnitude;
                zeros[lane] += if value == 0.0 { 1.0 } else { 0.0 };
                min[lane] = if value < min[lane] { value } else { min[lane] };
                max[lane] = if value > max[lane] { value } else { max[lane] };
                least[lane] = if magnitude < least[lane] { magnitude } else { least[lane] };
            }
        }
        for (lane, &value) in rest.iter().enumerate() {
            sum[lane] += value;
            absolute[lane] += value.abs();
            zeros[lane] += if value == 0.0 { 1.0 } else { 0.0 };
            min[lane] = min[lane].min(value);
            max[lane] = max[lane].max(value);
            least[lane] = least[lane].min(value.abs());
        }
        First {
            sum: combine(sum, |a, b| a + b),
            absolute: combine(absolute, |a, b| a + b),
            zeros: combine(zeros, |a, b| a + b),
            min: combine(min, f64::min),
            max: combine(max, f64::max),
            least: combine(least, f64::min),
        }
    }
}

vectorized! {
    fn central_sums(values: &[f64], mean: f64) -> [f64; 3] {
        let mut second = [0.0; LANES];
        let mut third = [0.0; LANES];
        let mut fourth = [0.0; LANES];
        let (blocks, rest) = values.as_chunks::<LANES>();
        for block in blocks {
            for lane in 0..LANES {
                let delta = block[lane] - mean;
                let square = delta * delta;
                second[lane] += square;
                third[lane] += square * delta;
                fourth[lane] += square * square;
            }
        }
        for (lane, &value) in rest.iter().enumerate() {
            let delta = value - mean;
            let square = delta * delta;
            second[lane] += square;
            third[lane] += square * delta;
            fourth[lane] += square * square;
        }
        [second, third, fourth].map(|lanes| combine(lanes, |a, b| a + b))
    }
}

#[cfg(test)]
mod tests {
    use half::{bf16, f16};

    use super::*;

    #[test]
    fn short_floats_have_the_figures_of_their_widened_values() {
        let number = |index: usize| match index % 11 {
            0 => 0.0,
            1 => -0.0,
            _ => (index as f32 * 0.7).sin() * 10f32.powi(index as i32 % 7 - 5),
        };
        for count in [1, 2, 15, 64, 301, BLOCK] {
            // Of one sign alone, too.
            for sign in [|x: f32| x, f32::abs, |x: f32| -x.abs()] {
                let numbers = || (0..count).map(|index| sign(number(index + 2)));
                let halves: Vec<u8> =
                    numbers().flat_map(|x| f16::from_f32(x).to_le_bytes()).collect();
                let brains: Vec<u8> =
                    numbers().flat_map(|x| bf16::from_f32(x).to_le_bytes()).collect();
                for (bytes, element) in [(halves, ElementType::F16), (brains, ElementType::BF16)] {
                    let tensor = Tensor::new(&bytes, element).unwrap();
                    let mut values = vec![0.0; count];
                    let sums = decode_and_sum(&tensor, &mut values);
                    let found = First::of_short(&tensor, sums).expect("finite");
                    tensor.decode(&mut values);
                    let expected = first_sums(&values);
                    assert_eq!(found.sum.to_bits(), expected.sum.to_bits());
                    assert_eq!(found.absolute.to_bits(), expected.absolute.to_bits());
                    assert_eq!(found.zeros, expected.zeros);
                    assert_eq!((found.min, found.max), (expected.min, expected.max));
                    assert_eq!(found.least, expected.least);
                }
            }
        }
    }

    #[test]
    fn short_floats_that_are_not_finite_are_left_to_the_values() {
        for value in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY] {
            let numbers = [1.0, value, 2.0];
            let bytes: Vec<u8> =
                numbers.iter().flat_map(|&x| f16::from_f32(x).to_le_bytes()).collect();
            let tensor = Tensor::new(&bytes, ElementType::F16).unwrap();
            assert!(First::of_short(&tensor, (0.0, 0.0)).is_none());
            let found = Moments::of(&tensor);
            assert_eq!((found.finite, found.non_finite, found.max), (2, 1, 2.0));
            let bytes: Vec<u8> =
                numbers.iter().flat_map(|&x| bf16::from_f32(x).to_le_bytes()).collect();
            let tensor = Tensor::new(&bytes, ElementType::BF16).unwrap();
            assert!(First::of_short(&tensor, (0.0, 0.0)).is_none());
        }
    }
}
