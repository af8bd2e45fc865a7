//! Products of split factors, on tiles that are emulated on every machine, and on AMX where it is.

use crate::tensor::orientation::Orientation;
use half::bf16;

use super::super::convert::{Element, PlainBf16, PlainF16};
use super::super::simd::Portable;
use super::super::split::{self, CHUNK, COLUMNS, ROWS, TILE_COLUMNS, Tiles};
use super::*;

/// What TDPBF16PS does (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 2),
/// but for subnormals.
struct Emulated;

// SAFETY: the slices are of the sizes that the trait's contract names.
unsafe impl Tiles for Emulated {
    unsafe fn begin() {}

    unsafe fn multiply(left: *const u16, right: *const u16, chunks: usize, sums: *mut f32) {
        // SAFETY: the trait's contract.
        let (left, right, sums) = unsafe {
            (
                std::slice::from_raw_parts(left, chunks * ROWS * CHUNK),
                std::slice::from_raw_parts(right, chunks * COLUMNS * CHUNK),
                std::slice::from_raw_parts_mut(sums, ROWS * COLUMNS),
            )
        };
        let wide = |bits: u16| bf16::from_bits(bits).to_f32();
        sums.fill(0.0);
        for (left, right) in left.chunks(ROWS * CHUNK).zip(right.chunks(COLUMNS * CHUNK)) {
            for (place, sum) in sums.iter_mut().enumerate() {
                let left = &left[place / COLUMNS * CHUNK..][..CHUNK];
                let column = place % COLUMNS;
                let right = &right[column / TILE_COLUMNS * TILE_COLUMNS * CHUNK..];
                let mut of_pair = [0.0f32; 2];
                for pair in 0..CHUNK / 2 {
                    for (half, of_pair) in of_pair.iter_mut().enumerate() {
                        let place = 2 * (pair * TILE_COLUMNS + column % TILE_COLUMNS) + half;
                        *of_pair =
                            wide(left[2 * pair + half]).mul_add(wide(right[place]), *of_pair);
                    }
                }
                *sum += of_pair[0] + of_pair[1];
            }
        }
    }

    unsafe fn end() {}
}

fn emulated<E: Element>(factors: &Factors, first_row: usize, tile: &mut [u8]) -> u32 {
    let Factors::Split(factors) = factors else { panic!("packed for AMX, and not split") };
    // SAFETY: the portable vectors need nothing; the tile is one of the factors'.
    unsafe { split::merge_rows::<Emulated, Portable, E, 4>(factors, first_row, tile) }
}

impl Case {
    fn merged_on_tiles(&self, tile_rows: usize) -> Vec<u8> {
        self.merged_by(InstructionSet::Amx, tile_rows, |factors, first_row, tile| {
            let largest = match self.dtype {
                Dtype::Bf16 => emulated::<PlainBf16>(factors, first_row, tile),
                _ => emulated::<PlainF16>(factors, first_row, tile),
            };
            largest < overflow_threshold(&self.dtype)
        })
    }
}

prop_compose! {
    fn split_cases()(
        dtype in prop_oneof![Just(Dtype::Bf16), Just(Dtype::F16)],
        factor_dtype in prop_oneof![Just(Dtype::F32), Just(Dtype::Bf16), Just(Dtype::F16)],
        rows in 1usize..80,
        columns in 1usize..130,
        ranks in prop::collection::vec(8usize..40, 1..4),
        transposed in any::<bool>(),
        seed in 0u64..1 << 30,
    ) -> Case {
        let orientation = if transposed { Orientation::InOut } else { Orientation::OutIn };
        Case { dtype, factor_dtype, rows, columns, ranks, orientation, seed }
    }
}

proptest! {
    #![proptest_config(ProptestConfig { failure_persistence: None, ..ProptestConfig::default() })]

    #[test]
    fn split_products_are_off_by_what_is_said(case in split_cases()) {
        let merged = case.merged_on_tiles(2 * ROW_MULTIPLE);
        prop_assert!(case.merged_on_tiles(ROW_MULTIPLE) == merged, "the tiles do not matter");
        if InstructionSet::amx().is_some() {
            prop_assert!(case.merged(InstructionSet::Amx, ROW_MULTIPLE) == merged);
        }
        let half_unit = if case.dtype == Dtype::F16 { 2f64.powi(-11) } else { 2f64.powi(-8) };
        // Sums of three products for each rank index, and the first two numbers of a chain.
        let steps = 3 * case.ranks.iter().sum::<usize>() + 2;
        let relative = PRODUCT_ERROR + steps as f64 * 2f64.powi(-24);
        let expected = case.reference().into_iter().zip(case.sizes());
        for (index, (actual, (expected, size))) in
            convert::widen_f64(&case.dtype, &merged).iter().zip(expected).enumerate()
        {
            // The least normal f16 is 2⁻¹⁴, the unit below it 2⁻²⁴.
            let bound = half_unit * expected.abs() * 1.0001 + relative * size + 2f64.powi(-25);
            prop_assert!((actual - expected).abs() <= bound, "{index}: {actual} for {expected}");
        }
    }
}

/// The root mean square of what is wrong, in units of what is wrong of the exact result rounded.
fn errors(case: &Case) -> [f64; 2] {
    let reference = case.reference();
    let rounded: Vec<u8> = (reference.iter())
        .flat_map(|value| {
            let mut narrow = [0; 2];
            convert::convert(&Dtype::F64, &value.to_le_bytes(), &case.dtype, &mut narrow);
            narrow
        })
        .collect();
    let error = |merged: &[u8]| {
        let merged = convert::widen_f64(&case.dtype, merged);
        let squares = merged.iter().zip(&reference).map(|(is, should)| (is - should).powi(2));
        squares.sum::<f64>().sqrt()
    };
    let least = error(&rounded);
    let vectors = case.merged(InstructionSet::detect(), ROW_MULTIPLE);
    [vectors, case.merged_on_tiles(ROW_MULTIPLE)].map(|merged| error(&merged) / least)
}

#[test]
fn split_products_cost_no_accuracy_that_one_rounding_leaves() {
    for (dtype, most) in [(Dtype::Bf16, 1.000_01), (Dtype::F16, 1.001)] {
        for rank in [16, 64] {
            let case = Case {
                dtype: dtype.clone(),
                factor_dtype: Dtype::F32,
                rows: 96,
                columns: 160,
                ranks: vec![rank],
                orientation: Orientation::OutIn,
                seed: 3,
            };
            let [vectors, tiles] = errors(&case);
            assert!(vectors < 1.000_01 && tiles < most, "{dtype} {rank}: {vectors}, {tiles}");
        }
    }
}

#[test]
fn two_parts_hold_a_number_within_two_to_the_minus_17() {
    let mut numbers = random(5, 1000);
    // Where the first part rounds up, would become infinite, or is all there is.
    numbers.extend([1.0, 257.0 / 256.0, 65504.0, f32::MAX, -3.4e38, 1e-30, 0.0, -0.0]);
    for number in numbers {
        let parts = split::split(number).map(|bits| bf16::from_bits(bits).to_f64());
        let off = (parts[0] + parts[1] - f64::from(number)).abs();
        // The largest ones are cut, which loses one bit more.
        let units = if number.abs() > 3.39e38 { 2.0 } else { 1.0 };
        assert!(off <= units * f64::from(number).abs() * 2f64.powi(-17), "{number:e}: {parts:?}");
    }
}

#[test]
fn what_is_not_finite_does_not_become_finite() {
    let (rows, columns, rank) = (30, 40, 8);
    for culprit in [f32::NAN, f32::INFINITY, f32::NEG_INFINITY, f32::from_bits(0x7fff_ffff)] {
        let mut b = vec![0.5f32; rows * rank];
        b[25 * rank + 3] = culprit;
        let a = vec![0.25f32; rank * columns];
        let [a, b] = [a, b].map(|values| values.into_iter().flat_map(f32::to_le_bytes).collect());
        let (a, b): (Vec<u8>, Vec<u8>) = (a, b);
        let operand = Operand { rank, ..outer_product(&a, &b) };
        for dtype in [Dtype::Bf16, Dtype::F16] {
            let shape = (rows, columns);
            let factors =
                Factors::pack(InstructionSet::Amx, &dtype, shape, Orientation::OutIn, &[operand]);
            let mut tile = bytes_of(&dtype, &vec![1.0; rows * columns]);
            let largest = match dtype {
                Dtype::Bf16 => emulated::<PlainBf16>(&factors, 0, &mut tile),
                _ => emulated::<PlainF16>(&factors, 0, &mut tile),
            };
            assert!(largest >= overflow_threshold(&dtype));
            for (index, value) in convert::widen_f64(&dtype, &tile).iter().enumerate() {
                assert_eq!(value.is_finite(), index / columns != 25, "{dtype} {culprit} {index}");
            }
        }
    }
}

#[test]
fn products_are_split_for_16_bits_and_ranks_from_8_on() {
    let (a, b) = (vec![0; 64 * 4], vec![0; 64 * 4]);
    let mut kinds = Vec::new();
    for dtype in [Dtype::Bf16, Dtype::F16, Dtype::F32, Dtype::F64] {
        for rank in [4usize, 8] {
            let operand = Operand { rank, ..outer_product(&a[..rank * 16], &b[..rank * 16]) };
            let shape = (4, 4);
            let factors =
                Factors::pack(InstructionSet::Amx, &dtype, shape, Orientation::OutIn, &[operand]);
            kinds.push(matches!(factors, Factors::Split(_)));
        }
    }
    assert_eq!(kinds, [false, true, false, true, false, false, false, false]);
}
