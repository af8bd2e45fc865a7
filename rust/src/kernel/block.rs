//! The register-blocked product, added to a tile in place; and the conversions of whole rows.

use super::InstructionSet;
use super::convert::{Element, PlainBf16, PlainF16, PlainF32};
#[cfg(target_arch = "aarch64")]
use super::neon::Neon;
use super::pack::PackedFactors;
use super::simd::{Largest, Portable, Simd};
#[cfg(target_arch = "x86_64")]
use super::x86::{Avx2, Avx512};
use crate::tensor::dtype::Dtype;

/// Adds the product to the tile's rows; returns the largest magnitude of the result as the bits of
/// an f32. The caller has checked that the tile is made of whole rows within the factors.
pub(super) fn merge_rows(
    set: InstructionSet,
    factors: &PackedFactors,
    first_row: usize,
    dtype: &Dtype,
    tile: &mut [u8],
) -> u32 {
    match dtype {
        Dtype::F32 => dispatch::<PlainF32>(set, factors, first_row, tile),
        Dtype::Bf16 => dispatch::<PlainBf16>(set, factors, first_row, tile),
        Dtype::F16 => dispatch::<PlainF16>(set, factors, first_row, tile),
        Dtype::F64 | Dtype::Other(_) => panic!("single-precision factors meet {dtype} weights"),
    }
}

fn dispatch<E: Element>(
    set: InstructionSet,
    factors: &PackedFactors,
    first_row: usize,
    tile: &mut [u8],
) -> u32 {
    match set {
        // SAFETY: the portable form needs no instructions beyond the target's baseline.
        InstructionSet::Portable => unsafe { rows::<Portable, E, 4, 2>(factors, first_row, tile) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is in the target's baseline.
        InstructionSet::Neon => unsafe { rows::<Neon, E, 6, 2>(factors, first_row, tile) },
        #[cfg(not(target_arch = "aarch64"))]
        InstructionSet::Neon => unreachable!("never detected here"),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `InstructionSet` other than the portable one comes from detection alone.
        InstructionSet::Avx2 => unsafe { rows_avx2::<E>(factors, first_row, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        InstructionSet::Avx512 => unsafe { rows_avx512::<E>(factors, first_row, tile) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        InstructionSet::Avx512Bf16 | InstructionSet::Amx => unsafe {
            rows_avx512_bf16::<E>(factors, first_row, tile)
        },
        #[cfg(not(target_arch = "x86_64"))]
        InstructionSet::Avx2
        | InstructionSet::Avx512
        | InstructionSet::Avx512Bf16
        | InstructionSet::Amx => unreachable!("never detected here"),
    }
}

/// # Safety
/// The processor must have the instructions named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn rows_avx2<E: Element>(factors: &PackedFactors, first_row: usize, tile: &mut [u8]) -> u32 {
    // SAFETY: this function's own contract.
    unsafe { rows::<Avx2, E, 6, 2>(factors, first_row, tile) }
}

/// # Safety
/// The processor must have the instructions named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn rows_avx512<E: Element>(
    factors: &PackedFactors,
    first_row: usize,
    tile: &mut [u8],
) -> u32 {
    // SAFETY: this function's own contract.
    unsafe { rows::<Avx512<false>, E, 6, 4>(factors, first_row, tile) }
}

/// # Safety
/// The processor must have the instructions named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn rows_avx512_bf16<E: Element>(
    factors: &PackedFactors,
    first_row: usize,
    tile: &mut [u8],
) -> u32 {
    // SAFETY: this function's own contract.
    unsafe { rows::<Avx512<true>, E, 6, 4>(factors, first_row, tile) }
}

/// Converts a slice between single-precision types; returns the largest magnitude of the source as
/// the bits of an f32. The caller has checked the lengths.
pub(super) fn convert_slice(
    set: InstructionSet,
    from: &Dtype,
    source: &[u8],
    to: &Dtype,
    target: &mut [u8],
) -> u32 {
    match from {
        Dtype::F32 => convert_from::<PlainF32>(set, source, to, target),
        Dtype::Bf16 => convert_from::<PlainBf16>(set, source, to, target),
        Dtype::F16 => convert_from::<PlainF16>(set, source, to, target),
        Dtype::F64 | Dtype::Other(_) => panic!("{from} is no single-precision type"),
    }
}

fn convert_from<F: Element>(
    set: InstructionSet,
    source: &[u8],
    to: &Dtype,
    target: &mut [u8],
) -> u32 {
    match to {
        Dtype::F32 => convert_dispatch::<F, PlainF32>(set, source, target),
        Dtype::Bf16 => convert_dispatch::<F, PlainBf16>(set, source, target),
        Dtype::F16 => convert_dispatch::<F, PlainF16>(set, source, target),
        Dtype::F64 | Dtype::Other(_) => panic!("{to} is no single-precision type"),
    }
}

fn convert_dispatch<F: Element, T: Element>(
    set: InstructionSet,
    source: &[u8],
    target: &mut [u8],
) -> u32 {
    match set {
        // SAFETY: the portable form needs no instructions beyond the target's baseline.
        InstructionSet::Portable => unsafe { convert_elements::<Portable, F, T>(source, target) },
        #[cfg(target_arch = "aarch64")]
        // SAFETY: NEON is in the target's baseline.
        InstructionSet::Neon => unsafe { convert_elements::<Neon, F, T>(source, target) },
        #[cfg(not(target_arch = "aarch64"))]
        InstructionSet::Neon => unreachable!("never detected here"),
        #[cfg(target_arch = "x86_64")]
        // SAFETY: an `InstructionSet` other than the portable one comes from detection alone.
        InstructionSet::Avx2 => unsafe { convert_avx2::<F, T>(source, target) },
        #[cfg(target_arch = "x86_64")]
        // SAFETY: as above.
        InstructionSet::Avx512 | InstructionSet::Avx512Bf16 | InstructionSet::Amx => unsafe {
            convert_avx512::<F, T>(source, target)
        },
        #[cfg(not(target_arch = "x86_64"))]
        InstructionSet::Avx2
        | InstructionSet::Avx512
        | InstructionSet::Avx512Bf16
        | InstructionSet::Amx => unreachable!("never detected here"),
    }
}

/// # Safety
/// The processor must have the instructions named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2,fma,f16c")]
unsafe fn convert_avx2<F: Element, T: Element>(source: &[u8], target: &mut [u8]) -> u32 {
    // SAFETY: this function's own contract.
    unsafe { convert_elements::<Avx2, F, T>(source, target) }
}

/// # Safety
/// The processor must have the instructions named.
#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn convert_avx512<F: Element, T: Element>(source: &[u8], target: &mut [u8]) -> u32 {
    // SAFETY: this function's own contract.
    unsafe { convert_elements::<Avx512<false>, F, T>(source, target) }
}

/// # Safety
/// The processor must have the instructions of `S`.
#[inline(always)]
unsafe fn convert_elements<S: Simd, F: Element, T: Element>(
    source: &[u8],
    target: &mut [u8],
) -> u32 {
    // SAFETY: a vector of zeros; the instructions are there by the caller's contract.
    let mut maximum = unsafe { S::splat(0.0) };
    let mut sources = source.chunks_exact(S::LANES * F::SIZE);
    let mut targets = target.chunks_exact_mut(S::LANES * T::SIZE);
    for (source, target) in sources.by_ref().zip(targets.by_ref()) {
        // SAFETY: each chunk holds one whole vector.
        unsafe {
            let value = F::load::<S>(source.as_ptr());
            maximum = S::max_magnitude(maximum, value);
            T::store::<S>(value, target.as_mut_ptr());
        }
    }
    let (rest, place) = (sources.remainder(), targets.into_remainder());
    let mut buffer = [0u8; 16 * 4];
    buffer[..rest.len()].copy_from_slice(rest);
    // SAFETY: the buffer holds a whole vector of the widest element.
    unsafe {
        let value = F::load::<S>(buffer.as_ptr());
        maximum = S::max_magnitude(maximum, value);
        T::store::<S>(value, buffer.as_mut_ptr());
        place.copy_from_slice(&buffer[..place.len()]);
        S::reduce_magnitude(maximum)
    }
}

/// All blocks of a tile, a panel of columns at a time: the panel stays in the first-level cache
/// while the tile's rows pass it.
///
/// # Safety
/// The processor must have the instructions of `S`; `ROWS` and `VECTORS` must be those that the
/// factors were packed for, and the tile must be made of whole rows within them.
#[inline(always)]
unsafe fn rows<S: Simd, E: Element, const ROWS: usize, const VECTORS: usize>(
    factors: &PackedFactors,
    first_row: usize,
    tile: &mut [u8],
) -> u32 {
    let stride = factors.columns() * E::SIZE;
    let tile_rows = tile.len() / stride;
    // SAFETY: the instructions are there by the caller's contract.
    let mut largest = unsafe { Largest::<S>::none() };
    for panel in factors.panels() {
        let vectors = panel.columns.div_ceil(S::LANES);
        for row in (0..tile_rows).step_by(ROWS) {
            let left = factors.left_block(first_row + row);
            let block = Block {
                left: left.as_ptr(),
                right: panel.values.as_ptr(),
                rank: factors.rank(),
                // Within the tile: `row` is below its rows, the panel's first column below its
                // columns.
                target: tile[row * stride + panel.first_column * E::SIZE..].as_mut_ptr(),
                stride,
                rows: ROWS.min(tile_rows - row),
                columns: panel.columns,
            };
            // SAFETY: `left_block` and the panel hold rank × ROWS and rank × vectors × LANES
            // values (checked by their constructors), and the target has the block's rows and
            // columns inside the tile.
            unsafe {
                match vectors {
                    1 => block.add::<S, E, ROWS, 1>(&mut largest),
                    2 => block.add::<S, E, ROWS, 2>(&mut largest),
                    3 => block.add::<S, E, ROWS, 3>(&mut largest),
                    _ => block.add::<S, E, ROWS, VECTORS>(&mut largest),
                }
            }
        }
    }
    // SAFETY: the caller's contract.
    unsafe { largest.reduce() }
}

/// A loop of at most eight rounds that is unrolled whatever the size of its body: a loop that is
/// left makes the compiler keep in memory what it goes through.
macro_rules! unrolled {
    ($index:ident < $count:ident, $body:block) => {
        unrolled!($index < $count, $body, 0 1 2 3 4 5 6 7)
    };
    ($index:ident < $count:ident, $body:block, $($number:literal)*) => {
        const { assert!($count <= 8) };
        $(if $number < $count {
            let $index = $number;
            $body
        })*
    };
}
pub(super) use unrolled;

/// The product of one register block: each element one chain of fused multiply-adds, from zero.
///
/// # Safety
/// The processor has the instructions of `S`; `left` holds rank × ROWS values, `right` rank × VECTORS ×
/// LANES.
#[inline(always)]
pub(super) unsafe fn product<S: Simd, const ROWS: usize, const VECTORS: usize>(
    left: *const f32,
    right: *const f32,
    rank: usize,
) -> [[S::Vector; VECTORS]; ROWS] {
    // SAFETY: indices stay below what the caller's contract says.
    unsafe {
        let mut sums = [[S::splat(0.0); VECTORS]; ROWS];
        for k in 0..rank {
            let right = right.add(k * VECTORS * S::LANES);
            let left = left.add(k * ROWS);
            let mut columns = [S::splat(0.0); VECTORS];
            for (vector, column) in columns.iter_mut().enumerate() {
                *column = S::load_f32(right.add(vector * S::LANES));
            }
            for (row, sums) in sums.iter_mut().enumerate() {
                let factor = S::splat(*left.add(row));
                for (sum, column) in sums.iter_mut().zip(&columns) {
                    *sum = S::fused_multiply_add(factor, *column, *sum);
                }
            }
        }
        sums
    }
}

/// One register block: `target += left · right`.
struct Block {
    /// Rank × ROWS, the rows of one rank index beside each other.
    left: *const f32,
    /// Rank × (VECTORS · LANES).
    right: *const f32,
    rank: usize,
    target: *mut u8,
    /// Bytes from one row of the target to the next.
    stride: usize,
    /// Rows of the target that exist, at most ROWS.
    rows: usize,
    /// Columns of the target that exist, at most VECTORS · LANES.
    columns: usize,
}

impl Block {
    /// # Safety
    /// The processor has the instructions of `S`, and the pointers cover what the fields say.
    #[inline(always)]
    unsafe fn add<S: Simd, E: Element, const ROWS: usize, const VECTORS: usize>(
        self,
        largest: &mut Largest<S>,
    ) {
        // SAFETY: indices stay below rank × ROWS and rank × VECTORS × LANES on the factors' side;
        // on the target's side whole vectors are touched only where all their columns exist, and
        // single elements elsewhere.
        unsafe {
            let mut sums = product::<S, ROWS, VECTORS>(self.left, self.right, self.rank);
            if self.rows == ROWS && self.columns == VECTORS * S::LANES {
                // All reads before the first write: rows are mostly a multiple of 4 KB apart, and
                // processors take a read for one of what was just written where the lowest twelve
                // bits of the addresses agree.
                unrolled!(row < ROWS, {
                    let target = self.target.add(row * self.stride);
                    E::add_stored::<S, VECTORS>(target, &mut sums[row]);
                });
                unrolled!(row < ROWS, {
                    let target = self.target.add(row * self.stride);
                    E::store_sums::<S, VECTORS>(&sums[row], target, largest);
                });
            } else {
                self.add_parts::<S, E, ROWS, VECTORS>(&sums, largest);
            }
        }
    }

    /// A block at the tensor's edge, of which some rows or columns do not exist.
    ///
    /// # Safety
    /// As [`Block::add`].
    #[inline(always)]
    unsafe fn add_parts<S: Simd, E: Element, const ROWS: usize, const VECTORS: usize>(
        &self,
        sums: &[[S::Vector; VECTORS]; ROWS],
        largest: &mut Largest<S>,
    ) {
        // A copy, so that indices into it keep nobody else's sums out of the registers.
        let mut sums = *sums;
        if S::PAIRED && E::PAIRED && self.columns == VECTORS * S::LANES {
            for pair in sums.iter_mut().flat_map(|sums| sums.as_chunks_mut::<2>().0) {
                // SAFETY: the processor has the instructions.
                (pair[0], pair[1]) = unsafe { S::pair_in_order((pair[0], pair[1])) };
            }
        }
        for (row, sums) in sums.iter().enumerate().take(self.rows) {
            for (vector, sum) in sums.iter().enumerate() {
                let first = vector * S::LANES;
                let count = S::LANES.min(self.columns.saturating_sub(first));
                // SAFETY: the caller's contract; `count` columns of the row exist from there on.
                unsafe {
                    let place = self.target.add(row * self.stride + first * E::SIZE);
                    add_part::<S, E>(place, count, *sum, largest);
                }
            }
        }
    }
}

/// The last columns of a row, fewer than a vector: through a buffer of one vector.
///
/// # Safety
/// The processor has the instructions of `S`, `count` is at most `S::LANES` (itself at most 16),
/// and `count` elements at `place` may be read and written.
#[inline(always)]
pub(super) unsafe fn add_part<S: Simd, E: Element>(
    place: *mut u8,
    count: usize,
    sum: S::Vector,
    largest: &mut Largest<S>,
) {
    // As many bytes as the widest vector of the widest element has.
    let mut buffer = [0u8; 16 * 4];
    // SAFETY: the buffer holds a whole vector of E, the place `count` elements.
    unsafe {
        std::ptr::copy_nonoverlapping(place, buffer.as_mut_ptr(), count * E::SIZE);
        // The lanes beyond `count` are zero in the buffer and, by the packing, in the sum.
        let merged = S::add(E::load::<S>(buffer.as_ptr()), sum);
        E::store::<S>(merged, buffer.as_mut_ptr());
        std::ptr::copy_nonoverlapping(buffer.as_ptr(), place, count * E::SIZE);
        largest.wide = S::max_magnitude(largest.wide, merged);
    }
}
