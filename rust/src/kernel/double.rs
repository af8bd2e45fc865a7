//! The product for f64 weights. They are rare, so one plain loop serves; it is still one chain of
//! fused multiply-adds over the rank index, whatever the instructions.

use super::InstructionSet;
use super::pack::DoubleFactors;

/// Adds the product to the tile's rows; returns whether every element of the result is finite.
pub(super) fn merge_rows(
    set: InstructionSet,
    factors: &DoubleFactors,
    first_row: usize,
    tile: &mut [u8],
) -> bool {
    match set {
        #[cfg(target_arch = "x86_64")]
        InstructionSet::Avx2
        | InstructionSet::Avx512
        | InstructionSet::Avx512Bf16
        | InstructionSet::Amx => {
            // SAFETY: an `InstructionSet` other than the portable one comes from detection alone,
            // and all of these include FMA.
            unsafe { rows_fused(factors, first_row, tile) }
        }
        _ => rows(factors, first_row, tile),
    }
}

/// # Safety
/// The processor must have the instructions named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma")]
unsafe fn rows_fused(factors: &DoubleFactors, first_row: usize, tile: &mut [u8]) -> bool {
    rows(factors, first_row, tile)
}

#[inline(always)]
fn rows(factors: &DoubleFactors, first_row: usize, tile: &mut [u8]) -> bool {
    let columns = factors.columns();
    let mut sums = vec![0.0f64; columns];
    let mut finite = true;
    for (row, target) in tile.chunks_exact_mut(columns * 8).enumerate() {
        sums.fill(0.0);
        let left = &factors.left[(first_row + row) * factors.rank..][..factors.rank];
        for (factor, right) in left.iter().zip(factors.right.chunks_exact(columns)) {
            for (sum, value) in sums.iter_mut().zip(right) {
                *sum = factor.mul_add(*value, *sum);
            }
        }
        for (place, sum) in target.chunks_exact_mut(8).zip(&sums) {
            let weight = f64::from_le_bytes(place.try_into().expect("eight bytes"));
            let merged = weight + sum;
            finite &= merged.is_finite();
            place.copy_from_slice(&merged.to_le_bytes());
        }
    }
    finite
}
