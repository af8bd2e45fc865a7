//! The codes in which weights are stored, each a number once its block's scale multiplies it.

/// What a stored code stands for.
#[derive(Debug, Clone, PartialEq)]
pub enum Codes {
    /// Floats of 8 bits with 4 of exponent and 3 of mantissa, without infinity.
    E4m3,
    /// Floats of 8 bits with 5 of exponent and 2 of mantissa.
    E5m2,
    /// Integers from −127 to 127, in 127ths.
    Int8,
    /// Two to a byte, the first one in the upper half; what each stands for is in the file.
    FourBit(Map),
    /// Floats of 4 bits with 2 of exponent and 1 of mantissa, two to a byte, the first one in the
    /// lower half.
    E2m1,
    /// Integers of two's complement, or counted from the least of them on; those of 4 bits lie two to
    /// a byte, the first one in the lower half.
    Integer {
        /// 4 or 8.
        bits: u32,
        /// What is added to an integer before it is stored.
        offset: i32,
    },
}

/// The magnitudes of floats of 4 bits, by the three bits below the sign.
const E2M1: [f32; 8] = [0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0];
/// The middles between them, and which of those still belong to the lower neighbor: ties go to the
/// code that is even.
const E2M1_BOUNDS: [(f32, bool); 7] = [
    (0.25, true),
    (0.75, false),
    (1.25, true),
    (1.75, false),
    (2.5, true),
    (3.5, false),
    (5.0, true),
];

/// A list of values of which a code is the position, and how the nearest is found.
#[derive(Debug, Clone, PartialEq)]
pub struct Map {
    /// The value of each code.
    pub values: Vec<f32>,
    /// The codes in the order of their values, without those whose value another one has.
    order: Vec<u8>,
    /// Between two neighbours in that order: up to here the lower one is nearer.
    bounds: Vec<f32>,
}

impl Map {
    /// # Panics
    /// For more than 256 values.
    pub fn new(values: Vec<f32>) -> Self {
        let mut order: Vec<u8> =
            (0..values.len()).map(|code| u8::try_from(code).expect("at most 256")).collect();
        order.sort_by(|left, right| {
            let value = |code: &u8| values[usize::from(*code)];
            value(left).partial_cmp(&value(right)).unwrap_or(std::cmp::Ordering::Equal)
        });
        // The first of two zeros.
        order.dedup_by(|later, first| values[usize::from(*later)] == values[usize::from(*first)]);
        let bounds = order
            .windows(2)
            .map(|pair| (values[usize::from(pair[0])] + values[usize::from(pair[1])]) / 2.0)
            .collect();
        Self { values, order, bounds }
    }

    /// The code of the value nearest to each of those, the lower one of two that are as near.
    fn encode(&self, values: impl Iterator<Item = f32>, codes: &mut [u8]) {
        // So few bounds are counted side by side faster than they are searched.
        if let Ok(bounds) = <&[f32; 15]>::try_from(self.bounds.as_slice()) {
            self.count(bounds, values, codes);
        } else if let Ok(bounds) = <&[f32; 14]>::try_from(self.bounds.as_slice()) {
            self.count(bounds, values, codes);
        } else {
            for (code, value) in codes.iter_mut().zip(values) {
                *code = self.nearest(value);
            }
        }
    }

    fn count<const N: usize>(
        &self,
        bounds: &[f32; N],
        values: impl Iterator<Item = f32>,
        codes: &mut [u8],
    ) {
        for (code, value) in codes.iter_mut().zip(values) {
            let below: u32 = bounds.iter().map(|bound| u32::from(*bound < value)).sum();
            *code = self.order[below as usize];
        }
    }

    /// The code of the nearest value, the lower one of two that are as near.
    pub fn nearest(&self, value: f32) -> u8 {
        self.order[self.bounds.partition_point(|bound| *bound < value)]
    }

    /// The distance to the value that is farther off of the two around `value`, halved: what
    /// rounding to the nearest can take away there.
    fn half_gap(&self, value: f64) -> f64 {
        let ordered = |position: usize| f64::from(self.values[usize::from(self.order[position])]);
        let position = (0..self.order.len()).take_while(|index| ordered(*index) <= value).count();
        if position == 0 || position == self.order.len() {
            return 0.0;
        }
        (ordered(position) - ordered(position - 1)) / 2.0
    }
}

impl Codes {
    /// Whether two codes share a byte.
    pub fn is_packed(&self) -> bool {
        matches!(self, Self::FourBit(_) | Self::E2m1 | Self::Integer { bits: 4, .. })
    }

    /// Whether the first of two codes in a byte is its lower half.
    pub fn lower_half_first(&self) -> bool {
        !matches!(self, Self::FourBit(_))
    }

    /// The largest magnitude of a code's value: a block's largest weight divided by it is the
    /// block's scale.
    pub fn largest(&self) -> f32 {
        match self {
            Self::E4m3 => 448.0,
            Self::E5m2 => 57344.0,
            Self::Int8 | Self::FourBit(_) => 1.0,
            Self::E2m1 => 6.0,
            // The middle between the outermost integers' magnitudes, as compressed-tensors takes it.
            Self::Integer { bits, .. } => ((1 << bits) - 1) as f32 / 2.0,
        }
    }

    /// The largest magnitude that still rounds to a code.
    pub fn reach(&self) -> f32 {
        match self {
            // The tie goes to the largest code, which is even.
            Self::E4m3 => 464.0,
            // Here it goes to infinity.
            Self::E5m2 => 61440f32.next_down(),
            Self::Int8 | Self::FourBit(_) | Self::E2m1 | Self::Integer { .. } => f32::INFINITY,
        }
    }

    /// The value of each code.
    pub fn table(&self) -> Vec<f64> {
        match self {
            Self::E4m3 => (0..=255).map(|code| f64::from(widen(code, 3, 7))).collect(),
            Self::E5m2 => (0..=255).map(|code| f64::from(widen(code, 2, 15))).collect(),
            Self::Int8 => (0..=255).map(|code: u8| f64::from(code.cast_signed()) / 127.0).collect(),
            Self::FourBit(map) => map.values.iter().map(|value| f64::from(*value)).collect(),
            Self::E2m1 => (0..16)
                .map(|code| {
                    let magnitude = f64::from(E2M1[code & 7]);
                    if code & 8 == 0 { magnitude } else { -magnitude }
                })
                .collect(),
            Self::Integer { bits, offset: 0 } => (0..1i32 << bits)
                .map(|code| f64::from(code << (32 - bits) >> (32 - bits)))
                .collect(),
            Self::Integer { bits, offset } => {
                (0..1i32 << bits).map(|code| f64::from(code - offset)).collect()
            }
        }
    }

    /// The code nearest to each value in units of `scale`; the outermost one beyond them.
    pub fn encode(&self, values: &[f32], scale: f32, codes: &mut [u8]) {
        let pairs = || values.iter().copied();
        match self {
            Self::E4m3 => narrow::<3, 7, 0x7e>(values, scale, codes),
            Self::E5m2 => narrow::<2, 15, 0x7b>(values, scale, codes),
            Self::Int8 if scale == 0.0 => codes.fill(0),
            Self::Int8 => {
                let scale = f64::from(scale);
                for (code, value) in codes.iter_mut().zip(values) {
                    let wanted = (f64::from(*value) * 127.0 / scale).clamp(-127.0, 127.0);
                    // Adding 1.5·2⁵² rounds to an integer, ties to even, and leaves it in the
                    // lowest bits.
                    *code = (wanted + 6_755_399_441_055_744.0).to_bits() as u8;
                }
            }
            Self::FourBit(map) if scale == 0.0 => codes.fill(map.nearest(0.0)),
            Self::FourBit(map) => map.encode(pairs().map(|value| value / scale), codes),
            Self::E2m1 => {
                for (code, value) in codes.iter_mut().zip(values) {
                    let value = value / scale;
                    let size = value.abs();
                    let above: u8 = (E2M1_BOUNDS.iter())
                        .map(|(bound, to_lower)| {
                            u8::from(size > *bound || size == *bound && !to_lower)
                        })
                        .sum();
                    *code = if value.is_sign_negative() { above | 8 } else { above };
                }
            }
            Self::Integer { bits, offset } => {
                let (least, most) = (-(1i32 << (bits - 1)), (1i32 << (bits - 1)) - 1);
                for (code, value) in codes.iter_mut().zip(values) {
                    let wanted = (value / scale).round_ties_even();
                    let wanted = wanted.clamp(least as f32, most as f32) as i32;
                    *code = ((wanted + offset) & ((1 << bits) - 1)) as u8;
                }
            }
        }
    }

    /// The values of codes, each times `scale` and rounded once.
    pub fn decode(&self, codes: &[u8], table: &[f64], scale: f32, values: &mut [f32]) {
        // Exact in f64 but for int8's 127ths, so that the only rounding is the one to f32.
        let scale = f64::from(scale);
        for (value, code) in values.iter_mut().zip(codes) {
            *value = (table[usize::from(*code)] * scale) as f32;
        }
    }

    /// What rounding to the nearest code can take away of `value`, both in units of the scale.
    /// Infinite beyond the outermost code.
    pub fn half_gap(&self, value: f64) -> f64 {
        let float = |mantissa: i32, least: i32| {
            let exponent = (((value.to_bits() >> 52) & 0x7ff) as i32 - 1023).max(least);
            2f64.powi(exponent - mantissa - 1)
        };
        match self {
            Self::E4m3 => float(3, -6),
            Self::E5m2 => float(2, -14),
            Self::Int8 => 0.5 / 127.0,
            Self::FourBit(map) => map.half_gap(value),
            // Beyond the least magnitude with an exponent of its own.
            Self::E2m1 if value.abs() >= 6.0 => 0.0,
            Self::E2m1 => float(1, 0),
            Self::Integer { .. } => 0.5,
        }
    }
}

/// A float of 8 bits with that many of mantissa.
fn widen(code: u8, mantissa: u32, bias: i32) -> f32 {
    let sign = if code & 0x80 == 0 { 1.0 } else { -1.0 };
    let exponent = i32::from((code & 0x7f) >> mantissa);
    let fraction = f32::from(code & ((1 << mantissa) - 1));
    let unit = 2f32.powi(-(mantissa.cast_signed()));
    if mantissa == 3 && code & 0x7f == 0x7f {
        return f32::NAN;
    }
    if mantissa == 2 && exponent == 31 {
        return if fraction == 0.0 { sign * f32::INFINITY } else { f32::NAN };
    }
    if exponent == 0 {
        return sign * fraction * unit * 2f32.powi(1 - bias);
    }
    sign * (1.0 + fraction * unit) * 2f32.powi(exponent - bias)
}

/// The nearest float of 8 bits with that much of a mantissa and that bias of its exponent to each
/// value in units of `scale`, ties to even; `TOP` beyond the largest one, NaN for what is not finite.
fn narrow<const MANTISSA: u32, const BIAS: u32, const TOP: u32>(
    values: &[f32],
    scale: f32,
    codes: &mut [u8],
) {
    let least = f32::from_bits((128 - BIAS) << 23);
    for (code, value) in codes.iter_mut().zip(values) {
        let value = value / scale;
        let sign = (value.to_bits() >> 24) & 0x80;
        let magnitude = f32::from_bits(value.to_bits() & 0x7fff_ffff);
        let power = f32::from_bits(magnitude.max(least).to_bits() & 0x7f80_0000);
        // So large that adding it leaves no bits but those of the mantissa, ties to even.
        let large = power * (1 << (23 - MANTISSA)) as f32;
        let rounded = (magnitude + large) - large;
        // Below the least power of two that has an exponent of its own, codes are linear.
        let is_small = rounded < least;
        let shifted = if is_small { rounded + least } else { rounded };
        let bits = shifted.to_bits() >> (23 - MANTISSA);
        let lowest = ((127 - BIAS) << MANTISSA) + if is_small { 1 << MANTISSA } else { 0 };
        let found = bits.wrapping_sub(lowest).min(TOP);
        *code = (sign | if magnitude < f32::INFINITY { found } else { 0x7f }) as u8;
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn nearest(codes: &Codes, value: f32, scale: f32) -> u8 {
        let mut code = [0];
        codes.encode(&[value], scale, &mut code);
        code[0]
    }

    /// By looking at every code.
    fn slowest(codes: &Codes, value: f64) -> f64 {
        let table = codes.table();
        table
            .into_iter()
            .filter(|known| known.is_finite())
            .min_by(|left, right| (left - value).abs().total_cmp(&(right - value).abs()))
            .expect("a code")
    }

    #[test]
    fn every_code_is_its_own_nearest() {
        let four = Codes::FourBit(Map::new(vec![
            0.0, 0.005, 0.66, 1.0, 0.33, 0.5, 0.16, 0.25, -0.0, -0.005, -0.66, -1.0, -0.33, -0.5,
            -0.16, -0.25,
        ]));
        let integers = Codes::Integer { bits: 8, offset: 0 };
        let four_bits = Codes::Integer { bits: 4, offset: 8 };
        let all = [Codes::E4m3, Codes::E5m2, Codes::Int8, Codes::E2m1, integers, four_bits, four];
        for codes in all {
            for (code, value) in codes.table().into_iter().enumerate() {
                if !value.is_finite() || codes == Codes::Int8 && code == 128 {
                    continue;
                }
                let nearest = nearest(&codes, value as f32 * 4.0, 4.0);
                // FourBit's two zeros are one value.
                assert!(
                    usize::from(nearest) == code || value == 0.0 && codes.is_packed(),
                    "{codes:?}: {value} is {code}, not {nearest}"
                );
            }
        }
    }

    #[test]
    fn the_nearest_code_is_the_nearest() {
        let map = Map::new(vec![-1.0, -0.5, -0.1, 0.0, 0.2, 0.3, 0.75, 1.0]);
        let integers = Codes::Integer { bits: 4, offset: 8 };
        let all =
            [Codes::E4m3, Codes::E5m2, Codes::Int8, Codes::E2m1, integers, Codes::FourBit(map)];
        for codes in all {
            let table = codes.table();
            for step in 0..20_000u32 {
                let spread = f64::from(step.wrapping_mul(2_654_435_761) >> 8) / f64::from(1 << 24);
                let value = (spread * 2.0 - 1.0) * f64::from(codes.largest());
                let value = (value * f64::from(step % 7) / 6.0) as f32;
                let nearest = table[usize::from(nearest(&codes, value, 1.0))];
                let error = (nearest - f64::from(value)).abs();
                let least = (slowest(&codes, f64::from(value)) - f64::from(value)).abs();
                assert!(error <= least * (1.0 + 1e-6), "{codes:?}: {value} became {nearest}");
                assert!(error <= codes.half_gap(f64::from(value)) * (1.0 + 1e-6));
            }
        }
    }

    #[test]
    fn what_lies_beyond_becomes_the_outermost() {
        assert_eq!(nearest(&Codes::E4m3, 1e9, 1.0), 0x7e);
        assert_eq!(nearest(&Codes::E4m3, -470.0, 1.0), 0xfe);
        assert_eq!(nearest(&Codes::E5m2, 6e4, 1.0), 0x7b);
        assert_eq!(nearest(&Codes::E4m3, f32::NAN, 1.0) & 0x7f, 0x7f);
        assert_eq!(nearest(&Codes::Int8, -9.0, 1.0).cast_signed(), -127);
        assert_eq!(nearest(&Codes::Int8, 0.0, 0.0), 0);
        assert_eq!(nearest(&Codes::E2m1, -7.9, 1.0), 0xf);
        assert_eq!(nearest(&Codes::Integer { bits: 8, offset: 128 }, -9e9, 1.0), 0);
        assert_eq!(nearest(&Codes::Integer { bits: 4, offset: 0 }, -8.2, 1.0), 8);
    }

    #[test]
    fn ties_of_four_bit_floats_go_to_the_even_code() {
        let ties = [0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0];
        for (value, code) in ties.into_iter().zip([0, 2, 2, 4, 4, 6, 6]) {
            assert_eq!(nearest(&Codes::E2m1, value, 1.0), code);
            assert_eq!(nearest(&Codes::E2m1, -2.0 * value, 2.0), code | 8);
        }
    }
}
