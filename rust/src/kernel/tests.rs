use super::*;
use crate::tensor::orientation::Orientation;
use proptest::prelude::*;

mod split;

fn random(seed: u64, count: usize) -> Vec<f32> {
    let mut state = seed.wrapping_mul(2).wrapping_add(0x9e37_79b9_7f4a_7c15);
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1 << 23) as f32 - 1.0
        })
        .collect()
}

fn bytes_of(dtype: &Dtype, values: &[f32]) -> Vec<u8> {
    let wide: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    let mut bytes = vec![0; values.len() * dtype.size()];
    assert!(convert::convert(&Dtype::F32, &wide, dtype, &mut bytes), "in range");
    bytes
}

/// A, B and the coefficient.
type Update = (Vec<u8>, Vec<u8>, f64);

struct Case {
    dtype: Dtype,
    factor_dtype: Dtype,
    rows: usize,
    columns: usize,
    ranks: Vec<usize>,
    orientation: Orientation,
    seed: u64,
}

impl Case {
    /// Weight, then a pair of factors for each update, as bytes.
    fn inputs(&self) -> (Vec<u8>, Vec<Update>) {
        let (outputs, inputs) = match self.orientation {
            Orientation::OutIn => (self.rows, self.columns),
            Orientation::InOut => (self.columns, self.rows),
        };
        let weight = bytes_of(&self.dtype, &random(self.seed, self.rows * self.columns));
        let factors = self
            .ranks
            .iter()
            .enumerate()
            .map(|(index, rank)| {
                let a = random(self.seed + 1 + index as u64, rank * inputs);
                let b = random(self.seed + 9 + index as u64, rank * outputs);
                let coefficient = [0.75, -2.0, 1.0 / 3.0][index % 3];
                (bytes_of(&self.factor_dtype, &a), bytes_of(&self.factor_dtype, &b), coefficient)
            })
            .collect();
        (weight, factors)
    }

    fn merged(&self, set: InstructionSet, tile_rows: usize) -> Vec<u8> {
        self.merged_by(set, tile_rows, |factors, first_row, tile| {
            merge_rows(set, factors, first_row, &self.dtype, tile)
        })
    }

    /// By a kernel that gets the factors packed for `set`, the tile's first row, and the tile.
    fn merged_by(
        &self,
        set: InstructionSet,
        tile_rows: usize,
        kernel: impl Fn(&Factors, usize, &mut [u8]) -> bool,
    ) -> Vec<u8> {
        let (mut weight, factors) = self.inputs();
        let operands: Vec<_> = factors
            .iter()
            .zip(&self.ranks)
            .map(|((a, b, coefficient), rank)| Operand {
                a,
                a_dtype: &self.factor_dtype,
                b,
                b_dtype: &self.factor_dtype,
                rank: *rank,
                coefficient: *coefficient,
            })
            .collect();
        let shape = (self.rows, self.columns);
        let factors = Factors::pack(set, &self.dtype, shape, self.orientation, &operands);
        let row_bytes = self.columns * self.dtype.size();
        for (index, tile) in weight.chunks_mut(tile_rows * row_bytes).enumerate() {
            assert!(kernel(&factors, index * tile_rows, tile));
        }
        weight
    }

    /// The same in f64 from the same bytes, unrounded.
    fn reference(&self) -> Vec<f64> {
        self.sums(|term| term)
    }

    /// The sum of the sizes of what each element is the sum of.
    fn sizes(&self) -> Vec<f64> {
        self.sums(f64::abs)
    }

    /// Sums in f64 of a function of each term.
    fn sums(&self, of: impl Fn(f64) -> f64) -> Vec<f64> {
        let (weight, factors) = self.inputs();
        let mut result = convert::widen_f64(&self.dtype, &weight);
        result.iter_mut().for_each(|value| *value = of(*value));
        for ((a, b, coefficient), rank) in factors.iter().zip(&self.ranks) {
            let a = convert::widen_f64(&self.factor_dtype, a);
            let b = convert::widen_f64(&self.factor_dtype, b);
            for row in 0..self.rows {
                for column in 0..self.columns {
                    let (output, input) = match self.orientation {
                        Orientation::OutIn => (row, column),
                        Orientation::InOut => (column, row),
                    };
                    let inputs = a.len() / rank;
                    let sum: f64 = (0..*rank)
                        .map(|k| of(coefficient * b[output * rank + k] * a[k * inputs + input]))
                        .sum();
                    result[row * self.columns + column] += sum;
                }
            }
        }
        result
    }
}

fn dtypes() -> impl Strategy<Value = Dtype> {
    prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16), Just(Dtype::F16), Just(Dtype::F64)]
}

prop_compose! {
    fn cases()(
        dtype in dtypes(),
        factor_dtype in dtypes(),
        rows in 1usize..80,
        columns in 1usize..130,
        ranks in prop::collection::vec(1usize..9, 1..4),
        transposed in any::<bool>(),
        seed in 0u64..1 << 30,
    ) -> Case {
        let orientation = if transposed { Orientation::InOut } else { Orientation::OutIn };
        Case { dtype, factor_dtype, rows, columns, ranks, orientation, seed }
    }
}

impl std::fmt::Debug for Case {
    fn fmt(&self, formatter: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self { dtype, factor_dtype, rows, columns, ranks, orientation, seed } = self;
        write!(
            formatter,
            "{rows}×{columns} {dtype} += {ranks:?} {factor_dtype} {orientation:?}, seed {seed}"
        )
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn every_instruction_set_and_tile_gives_the_same_bytes(case in cases()) {
        let expected = case.merged(InstructionSet::Portable, case.rows.next_multiple_of(ROW_MULTIPLE));
        for set in InstructionSet::available() {
            for tile_rows in [ROW_MULTIPLE, 2 * ROW_MULTIPLE] {
                prop_assert!(case.merged(set, tile_rows) == expected, "{set:?}, {tile_rows} rows");
            }
        }
    }

    #[test]
    fn the_result_is_the_f64_result_within_rounding(case in cases()) {
        let merged = convert::widen_f64(&case.dtype, &case.merged(InstructionSet::detect(), ROW_MULTIPLE));
        // Half a unit in the last place of the type, and the error of a chain of 24 f32 steps
        // on sums below 24 · 2.
        let (relative, absolute) = match case.dtype {
            Dtype::F64 => (2f64.powi(-52), 1e-13),
            Dtype::F32 => (2f64.powi(-23), 48.0 * 24.0 * 2f64.powi(-24)),
            Dtype::F16 => (2f64.powi(-11) * 1.01, 1e-4),
            _ => (2f64.powi(-8) * 1.01, 1e-4),
        };
        for (index, (actual, expected)) in merged.iter().zip(case.reference()).enumerate() {
            let bound = absolute + relative * expected.abs();
            prop_assert!((actual - expected).abs() <= bound, "{index}: {actual} for {expected}");
        }
    }
}

/// Of two vectors in f32.
fn outer_product<'a>(a: &'a [u8], b: &'a [u8]) -> Operand<'a> {
    let (a_dtype, b_dtype) = (&Dtype::F32, &Dtype::F32);
    Operand { a, a_dtype, b, b_dtype, rank: 1, coefficient: 1.0 }
}

#[test]
fn an_overflow_is_seen_in_every_type_and_place() {
    // Far beyond the largest number, and only just so far that it rounds to infinity.
    let near = [
        (Dtype::F16, 65000.0, 6500.0),
        (Dtype::F16, 65504.0, 16.0),
        (Dtype::Bf16, 3.38e38, 3.38e37),
        (Dtype::Bf16, f32::from_bits(0x7f7f_0000), 9e35),
        (Dtype::F32, 3.4e38, 3.4e37),
        (Dtype::F32, f32::MAX, 2e31),
    ];
    // A row alone, which is no whole register block, and whole blocks, the culprit in the last row.
    let shapes = [1usize, 15, 16, 47, 48, 50, 100].map(|columns| (1, columns));
    for set in InstructionSet::available() {
        for (dtype, limit, step) in &near {
            for (rows, columns) in shapes.into_iter().chain([(ROW_MULTIPLE, 192)]) {
                for culprit in [0, columns / 2, columns - 1] {
                    let a: Vec<f32> = (0..columns)
                        .map(|column| if column == culprit { 1.0 } else { 0.0 })
                        .collect();
                    let mut b = vec![0.0; rows];
                    b[rows - 1] = *step;
                    let (a, b) = (bytes_of(&Dtype::F32, &a), bytes_of(&Dtype::F32, &b));
                    let operand = outer_product(&a, &b);
                    let shape = (rows, columns);
                    let factors = Factors::pack(set, dtype, shape, Orientation::OutIn, &[operand]);
                    let mut calm = bytes_of(dtype, &vec![0.5; rows * columns]);
                    assert!(merge_rows(set, &factors, 0, dtype, &mut calm));
                    let mut full = bytes_of(dtype, &vec![*limit; rows * columns]);
                    let finite = merge_rows(set, &factors, 0, dtype, &mut full);
                    assert!(
                        !finite,
                        "{set:?} {dtype} {limit:e} + {step:e} at {culprit} of {columns}"
                    );
                }
            }
        }
    }
}

#[test]
fn conversion_rounds_once_and_reports_overflow() {
    // 1 + 2⁻⁸ + 2⁻³⁰ lies above the tie between two bf16 values; by way of f32 it would be the tie.
    let value = 1.0 + 2f64.powi(-8) + 2f64.powi(-30);
    let mut narrow = [0; 2];
    assert!(convert::convert(&Dtype::F64, &value.to_le_bytes(), &Dtype::Bf16, &mut narrow));
    assert_eq!(half::bf16::from_le_bytes(narrow).to_f64(), 1.0 + 2f64.powi(-7));
    let large = [1.0f32, 1e6].map(f32::to_le_bytes).concat();
    let mut narrow = [0; 4];
    assert!(!convert::convert(&Dtype::F32, &large, &Dtype::F16, &mut narrow));
    for set in InstructionSet::available() {
        assert!(!convert(set, &Dtype::F32, &large, &Dtype::F16, &mut narrow));
    }
}

#[test]
fn every_instruction_set_converts_alike() {
    let mut values = random(7, 1000);
    values.extend([0.0, -0.0, 1e-40, -1e-7, 65504.0, f32::NAN, f32::INFINITY, 3.0e38]);
    let wide: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
    for middle in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
        let mut source = vec![0; values.len() * middle.size()];
        convert::convert(&Dtype::F32, &wide, &middle, &mut source);
        for to in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
            let mut expected = vec![0; values.len() * to.size()];
            convert::convert(&middle, &source, &to, &mut expected);
            for set in InstructionSet::available() {
                let mut actual = vec![0; expected.len()];
                assert!(!convert(set, &middle, &source, &to, &mut actual), "NaN is not finite");
                // A NaN may keep its payload or not.
                for (actual, expected) in actual.chunks(to.size()).zip(expected.chunks(to.size())) {
                    let pair = [actual, expected].map(|bytes| convert::widen_f64(&to, bytes)[0]);
                    assert!(actual == expected || pair.iter().all(|value| value.is_nan()));
                }
            }
        }
    }
}

#[test]
fn every_instruction_set_treats_subnormals_zeros_and_what_is_not_finite_alike() {
    // Weights of every kind against sums that are zero, subnormal, tiny, ordinary and huge, so that
    // results are subnormal, zero of both signs, or round to infinity, each in every lane.
    let weights = [
        0x0000u16, 0x8000, 0x0001, 0x8001, 0x007f, 0x0080, 0x8080, 0x3f80, 0xbf81, 0x7f7f, 0xff7f,
        0x7f80, 0xff80, 0x7fc0, 0x7f81, 0xffff,
    ];
    let sums = [
        0.0,
        -0.0,
        1e-45,
        -1e-40,
        1.2e-38,
        -1.2e-38,
        0.0039,
        0.00390625,
        -0.00390625,
        1.0,
        -1.0,
        9e35,
        -2e38,
    ];
    let (rows, columns) = (weights.len() * 3, 2 * sums.len() * 16 + 5);
    let a: Vec<u8> =
        (0..columns).flat_map(|column| (sums[column % sums.len()] as f32).to_le_bytes()).collect();
    let b: Vec<u8> = (0..rows).flat_map(|_| 1f32.to_le_bytes()).collect();
    let operand = outer_product(&a, &b);
    let merged = |set, spread: usize| {
        let shape = (rows, columns);
        let factors = Factors::pack(set, &Dtype::Bf16, shape, Orientation::OutIn, &[operand]);
        let weight = |row: usize, column: usize| weights[(row + column / spread) % weights.len()];
        let mut tile: Vec<u8> = (0..rows * columns)
            .flat_map(|index| weight(index / columns, index % columns).to_le_bytes())
            .collect();
        let finite = merge_rows(set, &factors, 0, &Dtype::Bf16, &mut tile);
        (tile, finite)
    };
    // One weight for many columns, so that whole vectors are alike; and all of them in a vector.
    for spread in [1, 64] {
        let (expected, finite) = merged(InstructionSet::Portable, spread);
        assert!(!finite);
        let subnormal = |pair: &[u8; 2]| matches!(u16::from_le_bytes(*pair) & 0x7fff, 1..0x80);
        assert!(expected.as_chunks::<2>().0.iter().filter(|pair| subnormal(pair)).count() > 1000);
        for set in InstructionSet::available() {
            let (actual, finite) = merged(set, spread);
            assert!(!finite, "{set:?}");
            for (index, (actual, expected)) in actual.chunks(2).zip(expected.chunks(2)).enumerate()
            {
                let pair = [actual, expected].map(|b| convert::widen_f64(&Dtype::Bf16, b)[0]);
                // A NaN may keep its payload or not.
                let same = actual == expected || pair.iter().all(|value| value.is_nan());
                assert!(same, "{set:?} at {}, {}: {pair:?}", index / columns, index % columns);
            }
        }
    }
}

#[test]
fn a_nan_of_a_factor_stays_one_whatever_its_bits() {
    // Rounded like a number, a NaN of all bits would become a zero.
    let (rows, columns) = (ROW_MULTIPLE, 130);
    for bits in [0x7fff_ffffu32, 0xffff_ffff, 0x7f80_0001, 0xff80_0001] {
        for row_of_nan in [0, rows - 1] {
            let mut b = vec![0f32; rows];
            b[row_of_nan] = f32::from_bits(bits);
            let b: Vec<u8> = b.iter().flat_map(|value| value.to_le_bytes()).collect();
            let a = bytes_of(&Dtype::F32, &vec![0.5; columns]);
            let operand = outer_product(&a, &b);
            for set in InstructionSet::available() {
                for dtype in [Dtype::F32, Dtype::Bf16, Dtype::F16] {
                    let shape = (rows, columns);
                    let factors = Factors::pack(set, &dtype, shape, Orientation::OutIn, &[operand]);
                    let mut tile = bytes_of(&dtype, &vec![0.5; rows * columns]);
                    assert!(!merge_rows(set, &factors, 0, &dtype, &mut tile));
                    for (index, value) in convert::widen_f64(&dtype, &tile).iter().enumerate() {
                        assert_eq!(
                            value.is_nan(),
                            index / columns == row_of_nan,
                            "{set:?} {dtype}"
                        );
                    }
                }
            }
        }
    }
}
