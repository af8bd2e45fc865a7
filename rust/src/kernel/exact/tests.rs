use num_bigint::BigInt;

use super::*;

/// Numbers of a seeded generator, with bits of every kind.
struct Random(u64);

impl Random {
    fn bits(&mut self) -> u64 {
        self.0 ^= self.0 << 13;
        self.0 ^= self.0 >> 7;
        self.0 ^= self.0 << 17;
        self.0
    }

    fn below(&mut self, end: u64) -> u64 {
        (self.bits() >> 16) % end
    }

    /// A number of some bits with an exponent around zero.
    fn value(&mut self, bits: u32, spread: u64) -> f64 {
        let significand = self.below(1 << bits) as f64;
        let exponent = self.below(spread) as i32 - spread as i32 / 2 - bits as i32;
        let value = significand * 2f64.powi(exponent);
        if self.below(2) == 0 { value } else { -value }
    }
}

const TYPES: [Dtype; 4] = [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F64];

fn bytes(dtype: &Dtype, values: &[f64]) -> Vec<u8> {
    let mut bytes = vec![0; values.len() * dtype.size()];
    let wide: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    convert::convert(&Dtype::F64, &wide, dtype, &mut bytes);
    bytes
}

struct Case {
    rows: usize,
    columns: usize,
    rank: usize,
    a: Vec<f64>,
    b: Vec<f64>,
    weights: Vec<f64>,
    coefficient: [f64; 2],
    orientation: Orientation,
}

impl Case {
    /// Merges it with every instruction set and holds each element against whole numbers.
    fn check(&self, factor: &Dtype, from: &Dtype, to: &Dtype) -> Recomputed {
        let (a, b) = (bytes(factor, &self.a), bytes(factor, &self.b));
        let source = bytes(from, &self.weights);
        let (wide_a, wide_b) = (widen_f64(factor, &a), widen_f64(factor, &b));
        let weights = widen_f64(from, &source);
        let factors = Operand {
            a: &a,
            a_dtype: factor,
            b: &b,
            b_dtype: factor,
            rank: self.rank,
            coefficient: f64::NAN,
        };
        let Self { orientation, coefficient, .. } = *self;
        let operand = ExactOperand { factors, orientation, coefficient };
        let mut counts = Vec::new();
        for set in InstructionSet::available() {
            let exact = ExactFactors::pack(set, (from, to), (self.rows, self.columns), &[operand]);
            let mut target = vec![0xee; self.weights.len() * to.size()];
            let mut recomputed = Recomputed::default();
            exact.merge_rows(set, 0, (from, &source), (to, &mut target), &mut recomputed);
            let results = widen_f64(to, &target);
            for (index, (result, weight)) in results.iter().zip(&weights).enumerate() {
                let (row, column) = (index / self.columns, index % self.columns);
                let terms = (0..self.rank).map(|k| {
                    let [left, right] = match orientation {
                        Orientation::OutIn => {
                            [wide_b[row * self.rank + k], wide_a[k * self.columns + column]]
                        }
                        Orientation::InOut => {
                            [wide_a[k * self.rows + row], wide_b[column * self.rank + k]]
                        }
                    };
                    [coefficient[0], coefficient[1], left, right]
                });
                let all = std::iter::once([1.0, 1.0, 1.0, *weight]).chain(terms);
                let expected = match weight.is_finite() {
                    true => integers::round(all, Target::of(to)),
                    false => *weight,
                };
                assert!(
                    result.to_bits() == expected.to_bits() || result.is_nan() && expected.is_nan(),
                    "{set:?} {factor} {from} -> {to}: ({row}, {column}) is {result:e}, not {expected:e}"
                );
            }
            counts.push(recomputed);
        }
        assert!(counts.windows(2).all(|pair| pair[0] == pair[1]), "the same of every set");
        counts[0]
    }
}

fn case(random: &mut Random, bits: [u32; 2], spread: u64) -> Case {
    let [rows, columns] = [1 + random.below(30) as usize, 1 + random.below(90) as usize];
    let rank = 1 + random.below(9) as usize;
    let mut values =
        |count: usize, bits| (0..count).map(|_| random.value(bits, spread)).collect::<Vec<_>>();
    Case {
        a: values(rank * columns.max(rows), bits[0]),
        b: values(rank * columns.max(rows), bits[0]),
        weights: values(rows * columns, bits[1]),
        rows,
        columns,
        rank,
        coefficient: [1.0, 1.0],
        orientation: Orientation::OutIn,
    }
    .cut()
}

impl Case {
    fn cut(mut self) -> Self {
        let (outputs, inputs) = match self.orientation {
            Orientation::OutIn => (self.rows, self.columns),
            Orientation::InOut => (self.columns, self.rows),
        };
        self.a.truncate(self.rank * inputs);
        self.b.truncate(self.rank * outputs);
        self
    }
}

#[test]
fn every_element_is_the_real_number_rounded_once() {
    let mut random = Random(0x9e37_79b9_7f4a_7c15);
    for round in 0..160 {
        // Few bits make ties of most elements.
        let bits = [[24, 24], [3, 8], [2, 3], [11, 11]][round % 4];
        let spread = [4, 12, 30, 60][round / 4 % 4];
        let mut case = case(&mut random, bits, spread);
        if round % 3 == 0 {
            case.coefficient = [random.value(50, 4), random.value(53, 3)];
        }
        if round % 5 == 0 {
            std::mem::swap(&mut case.rows, &mut case.columns);
            case.orientation = Orientation::InOut;
        }
        let (factor, from, to) = (&TYPES[round % 4], &TYPES[round / 2 % 4], &TYPES[round / 16 % 4]);
        let case = case.cut();
        case.check(factor, from, to);
        case.check(factor, to, to);
    }
}

#[test]
fn a_tie_is_a_tie_to_sixty_bits_on_both_sides() {
    for to in &TYPES[..3] {
        let (precision, _) = Target::of(to).format();
        for step in [0.0, 2f64.powi(-60), -2f64.powi(-60), 2f64.powi(-30), -2f64.powi(-30)] {
            for odd in [0.0, 1.0] {
                // 1 (or the next number) plus half a unit, plus or minus next to nothing.
                let unit = 2f64.powi(1 - precision as i32);
                let case = Case {
                    rows: 1,
                    columns: 1,
                    rank: 2,
                    a: vec![unit / 2.0, step],
                    b: vec![1.0, 1.0],
                    weights: vec![1.0 + odd * unit],
                    coefficient: [1.0, 1.0],
                    orientation: Orientation::OutIn,
                };
                let counts = case.check(&Dtype::F32, to, to);
                // What is summed in f64 from the start is decided by it.
                let near = step.abs() < 1e-12 || *to != Dtype::F32;
                assert_eq!(counts.near_ties, u64::from(near), "{to} {step:e}");
                assert_eq!(counts.in_integers, u64::from(step.abs() < 1e-12), "{to} {step:e}");
            }
        }
    }
}

#[test]
fn ends_of_the_range_are_as_ieee_has_them() {
    for to in &TYPES {
        let (precision, smallest) = Target::of(to).format();
        let least = 2f64.powi(smallest as i32);
        let largest = Target::of(to).largest();
        let top = 2f64.powi((largest.log2().floor() as i32) - precision as i32);
        let half = 2f64.powi(smallest as i32 / 2);
        let rest = least / half;
        for (weight, [b, a]) in [
            (0.0, [0.0, 1.0]),
            (-0.0, [0.0, 1.0]),
            (1.0, [-1.0, 1.0]),
            (least, [-rest / 2.0, half]),
            (0.0, [rest / 2.0, half]),
            (0.0, [-rest * 0.75, half]),
            (-least, [rest, half]),
            (largest, [top, 0.5]),
            (largest, [top, 1.0]),
            (-largest, [top, 1.0]),
        ] {
            let case = Case {
                rows: 1,
                columns: 1,
                rank: 1,
                a: vec![a],
                b: vec![b],
                weights: vec![weight],
                coefficient: [1.0, 1.0],
                orientation: Orientation::OutIn,
            };
            case.check(&Dtype::F64, to, to);
        }
    }
}

#[test]
fn what_is_not_finite_stays_and_says_so() {
    let operand = |a: &'static [u8], b: &'static [u8]| ExactOperand {
        factors: Operand {
            a,
            a_dtype: &Dtype::F32,
            b,
            b_dtype: &Dtype::F32,
            rank: 1,
            coefficient: 1.0,
        },
        orientation: Orientation::OutIn,
        coefficient: [1.0, 1.0],
    };
    static ONES: [u8; 12] = [0, 0, 0x80, 0x3f, 0, 0, 0x80, 0x3f, 0, 0, 0x80, 0x3f];
    static NAN: [u8; 4] = [0, 0, 0xc0, 0x7f];
    for set in InstructionSet::available() {
        for to in &TYPES {
            let source = bytes(to, &[f64::INFINITY, f64::NAN, 1.0]);
            let mut recomputed = Recomputed::default();
            let mut merge = |operand| {
                let exact = ExactFactors::pack(set, (to, to), (1, 3), &[operand]);
                let mut target = vec![0; source.len()];
                let finite =
                    exact.merge_rows(set, 0, (to, &source), (to, &mut target), &mut recomputed);
                (finite, widen_f64(to, &target))
            };
            let (finite, values) = merge(operand(&ONES, &ONES[..4]));
            assert!(!finite && values[0] == f64::INFINITY && values[1].is_nan());
            assert_eq!(values[2], 2.0);
            let (finite, values) = merge(operand(&ONES, &NAN));
            assert!(!finite && values[2].is_nan());
        }
    }
}

#[test]
fn whole_numbers_are_rounded_as_they_should() {
    let mut random = Random(7);
    for _ in 0..2000 {
        let significand = random.bits() >> random.below(60);
        let value =
            integers::round(
                std::iter::once([significand as u32 as f64, 1.0, 1.0, 1.0])
                    .chain(std::iter::once([(significand >> 32) as f64, 65536.0, 65536.0, 1.0])),
                Target::F64,
            );
        assert_eq!(BigInt::from(value as u128), BigInt::from((significand as f64) as u128));
        let narrow = integers::round(std::iter::once([value, 1.0, 1.0, 1.0]), Target::F32);
        assert_eq!(narrow, f64::from(value as f32));
    }
}
