//! The first bound: the product of the merge's own kernel in f32, and intervals around its sums that
//! are rounded to 16 bits at both ends.
//!
//! With u = 2⁻²⁴ and a rank of n, an element of the product is off by at most (n + 3)·u·‖row‖·‖column‖:
//! a chain of n operations, and what the factors lost when they were rounded to f32. Adding W and the
//! two ends of the interval round once more each.

use super::ExactFactors;
use crate::kernel::block::{product, unrolled};
use crate::kernel::convert::{Narrow, PlainBf16, PlainF16, PlainF32};
use crate::kernel::pack::PackedFactors;
use crate::kernel::simd::{Largest, Portable, Simd};
use crate::kernel::{InstructionSet, convert::Element, overflow_threshold};
use crate::tensor::dtype::Dtype;

#[cfg(target_arch = "aarch64")]
use crate::kernel::neon::Neon;
#[cfg(target_arch = "x86_64")]
use crate::kernel::x86::{Avx2, Avx512};

/// u of f32.
const UNIT: f64 = 1.0 / (1u64 << 24) as f64;
/// The share of a sum's magnitude by which it and the ends of its interval may be off: three roundings, of
/// which the last two are of the ends, either of which is one.
const SHARE_OF_SUM: f32 = 2.125 / (1u64 << 24) as f32;
/// Room for the roundings of the bound itself.
const SLACK: f64 = 1.05;

/// Packed factors with what bounds the error of their product.
#[derive(Debug)]
pub(super) struct Filter {
    factors: PackedFactors,
    /// For each row, filled up to whole blocks: the bound for a column of norm 1, and what underflow adds.
    row_bounds: Vec<f32>,
    row_floors: Vec<f32>,
    /// For each column, filled up to whole vectors, a little more than its norm.
    column_bounds: Vec<f32>,
}

/// The f32 that is not below a number.
fn at_least(value: f64) -> f32 {
    let nearest = value as f32;
    if f64::from(nearest) < value { nearest.next_up() } else { nearest }
}

impl Filter {
    pub(super) fn new(set: InstructionSet, exact: &ExactFactors) -> Self {
        let (rank, columns) = (exact.rank(), exact.columns);
        let shape = set.block_shape(&Dtype::F32);
        let scales = exact.coefficients.iter().map(|[scale, weight]| scale * weight).cycle();
        let left: Vec<f32> =
            exact.left.iter().zip(scales).map(|(value, scale)| (value * scale) as f32).collect();
        let right: Vec<f32> = exact.right.iter().map(|value| *value as f32).collect();
        let factors = PackedFactors::of(shape, (exact.rows, columns), rank, (&left, &right));
        let count = rank as f64;
        // Every operation in which something can underflow is off by half of the smallest number at most.
        let smallest = f64::from(f32::from_bits(1));
        let bound = |norm: &f64| match *norm {
            0.0 => 0.0,
            norm => at_least((count + 4.0) * UNIT * SLACK * norm + 2.0 * count * smallest),
        };
        let floor = |norm: &f64| match *norm {
            0.0 => 0.0,
            _ => at_least(2.0 * count * smallest),
        };
        let mut row_bounds: Vec<_> = exact.row_norms.iter().map(bound).collect();
        let mut row_floors: Vec<_> = exact.row_norms.iter().map(floor).collect();
        for values in [&mut row_bounds, &mut row_floors] {
            values.resize(exact.rows.next_multiple_of(shape.rows), 0.0);
        }
        let widest = |norm: &f64| at_least(norm * SLACK + 2f64.powi(-100)).min(f32::MAX);
        let mut column_bounds: Vec<_> = exact.column_norms.iter().map(widest).collect();
        column_bounds.resize(columns.next_multiple_of(shape.lanes), 0.0);
        Self { factors, row_bounds, row_floors, column_bounds }
    }

    /// Merges whole rows and lists the elements that are not decided; false where something is not finite,
    /// so that nothing is.
    pub(super) fn merge_rows(
        &self,
        set: InstructionSet,
        first_row: usize,
        (from, source): (&Dtype, &[u8]),
        (to, target): (&Dtype, &mut [u8]),
        doubtful: &mut Vec<u32>,
    ) -> bool {
        assert!(source.len() / from.size() <= u32::MAX as usize, "a tile's places have 32 bits");
        assert!(self.factors.shape() == set.block_shape(&Dtype::F32), "packed for this set");
        let tile = Tile { filter: self, first_row, source, target, doubtful };
        let largest = match (from, to) {
            (Dtype::Bf16, Dtype::Bf16) => tile.dispatch::<PlainBf16, PlainBf16>(set),
            (Dtype::F16, Dtype::F16) => tile.dispatch::<PlainF16, PlainF16>(set),
            (Dtype::F32, Dtype::Bf16) => tile.dispatch::<PlainF32, PlainBf16>(set),
            (Dtype::F32, Dtype::F16) => tile.dispatch::<PlainF32, PlainF16>(set),
            _ => panic!("no interval of {from} is rounded to {to}"),
        };
        largest < overflow_threshold(to)
    }
}

/// Whole rows in their type and in the output's.
struct Tile<'a> {
    filter: &'a Filter,
    first_row: usize,
    source: &'a [u8],
    target: &'a mut [u8],
    doubtful: &'a mut Vec<u32>,
}

impl Tile<'_> {
    fn dispatch<F: Element, T: Narrow>(self, set: InstructionSet) -> u32 {
        match set {
            // SAFETY: the portable form needs no instructions beyond the target's baseline.
            InstructionSet::Portable => unsafe { self.rows::<Portable, F, T, 4, 2>() },
            #[cfg(target_arch = "aarch64")]
            // SAFETY: NEON is in the target's baseline.
            InstructionSet::Neon => unsafe { self.rows::<Neon, F, T, 6, 2>() },
            #[cfg(not(target_arch = "aarch64"))]
            InstructionSet::Neon => unreachable!("never detected here"),
            #[cfg(target_arch = "x86_64")]
            // SAFETY: an `InstructionSet` other than the portable one comes from detection alone.
            InstructionSet::Avx2 => unsafe { self.rows_avx2::<F, T>() },
            #[cfg(target_arch = "x86_64")]
            // SAFETY: as above.
            InstructionSet::Avx512 | InstructionSet::Avx512Bf16 | InstructionSet::Amx => unsafe {
                self.rows_avx512::<F, T>()
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
    unsafe fn rows_avx2<F: Element, T: Narrow>(self) -> u32 {
        // SAFETY: this function's own contract.
        unsafe { self.rows::<Avx2, F, T, 6, 2>() }
    }

    /// # Safety
    /// The processor must have the instructions named.
    #[cfg(target_arch = "x86_64")]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
    unsafe fn rows_avx512<F: Element, T: Narrow>(self) -> u32 {
        // SAFETY: this function's own contract.
        unsafe { self.rows::<Avx512<false>, F, T, 6, 4>() }
    }

    /// All blocks of the tile, a panel of columns at a time; the largest magnitude as the bits of an f32.
    ///
    /// # Safety
    /// The processor must have the instructions of `S`; `ROWS` and `VECTORS` must be those that the
    /// factors were packed for.
    #[inline(always)]
    unsafe fn rows<S: Simd, F: Element, T: Narrow, const ROWS: usize, const VECTORS: usize>(
        mut self,
    ) -> u32 {
        let columns = self.filter.factors.columns();
        let tile_rows = self.source.len() / (columns * F::SIZE);
        // SAFETY: the instructions are there by the caller's contract.
        let mut largest = unsafe { Largest::<S>::none() };
        for panel in self.filter.factors.panels() {
            let vectors = panel.columns.div_ceil(S::LANES);
            for row in (0..tile_rows).step_by(ROWS) {
                let place = Place {
                    row,
                    rows: ROWS.min(tile_rows - row),
                    column: panel.first_column,
                    columns: panel.columns,
                };
                let right = panel.values;
                // SAFETY: the caller's contract; the panel holds rank × vectors × LANES values, and the
                // place lies within the tile.
                unsafe {
                    match vectors {
                        1 => self.block::<S, F, T, ROWS, 1>(&place, right, &mut largest),
                        2 => self.block::<S, F, T, ROWS, 2>(&place, right, &mut largest),
                        3 => self.block::<S, F, T, ROWS, 3>(&place, right, &mut largest),
                        _ => self.block::<S, F, T, ROWS, VECTORS>(&place, right, &mut largest),
                    }
                }
            }
        }
        // SAFETY: the caller's contract.
        unsafe { largest.reduce() }
    }

    /// # Safety
    /// The processor has the instructions of `S`; `right` holds rank × VECTORS × LANES values, and the place
    /// lies within the tile.
    #[inline(always)]
    unsafe fn block<S: Simd, F: Element, T: Narrow, const ROWS: usize, const VECTORS: usize>(
        &mut self,
        place: &Place,
        right: &[f32],
        largest: &mut Largest<S>,
    ) {
        let filter = self.filter;
        let (columns, first) = (filter.factors.columns(), self.first_row + place.row);
        let left = filter.factors.left_block(first);
        // SAFETY: the caller's contract; a left block holds rank × ROWS values.
        let sums = unsafe {
            product::<S, ROWS, VECTORS>(left.as_ptr(), right.as_ptr(), filter.factors.rank())
        };
        // A row below the last one computes on the last one's place, and writes nothing.
        let is_whole = place.rows == ROWS && place.columns == VECTORS * S::LANES;
        unrolled!(row < ROWS, {
            if row < place.rows {
                let start = (place.row + row) * columns + place.column;
                let bound = filter.row_bounds[first + row];
                let floor = filter.row_floors[first + row];
                for (vector, sum) in sums[row].iter().enumerate() {
                    let done = vector * S::LANES;
                    let count =
                        if is_whole { S::LANES } else { S::LANES.min(place.columns - done) };
                    // SAFETY: `count` elements exist from there on in the source and in the target, and a
                    // whole vector of bounds, which are filled up.
                    let (mask, magnitude) = unsafe {
                        let weights = self.source.as_ptr().add((start + done) * F::SIZE);
                        let results = self.target.as_mut_ptr().add((start + done) * T::SIZE);
                        let bounds = filter.column_bounds.as_ptr().add(place.column + done);
                        let interval = Interval { bounds, bound, floor };
                        if count == S::LANES {
                            interval.store::<S, F, T>(*sum, weights, results)
                        } else {
                            // Through buffers of one vector, as wide as the widest.
                            let (mut from, mut to) = ([0u8; 16 * 4], [0u8; 16 * 4]);
                            std::ptr::copy_nonoverlapping(
                                weights,
                                from.as_mut_ptr(),
                                count * F::SIZE,
                            );
                            let (mask, magnitude) =
                                interval.store::<S, F, T>(*sum, from.as_ptr(), to.as_mut_ptr());
                            std::ptr::copy_nonoverlapping(to.as_ptr(), results, count * T::SIZE);
                            (mask & ((1 << count) - 1), magnitude)
                        }
                    };
                    // SAFETY: the caller's contract.
                    largest.wide = unsafe { S::max_magnitude(largest.wide, magnitude) };
                    if mask != 0 {
                        note(self.doubtful, mask, start + done);
                    }
                }
            }
        });
    }
}

/// Lists the lanes of a mask.
#[cold]
fn note(doubtful: &mut Vec<u32>, mut mask: u32, first: usize) {
    while mask != 0 {
        doubtful.push(first as u32 + mask.trailing_zeros());
        mask &= mask - 1;
    }
}

/// Where in a tile a block lies, and how much of it exists.
struct Place {
    row: usize,
    rows: usize,
    column: usize,
    columns: usize,
}

/// What bounds the errors of a vector of sums.
struct Interval {
    /// Of a vector of columns.
    bounds: *const f32,
    /// Of the row.
    bound: f32,
    floor: f32,
}

impl Interval {
    /// Adds the weights, rounds both ends, and stores one of them: the lanes in which they differ, and
    /// the sums' magnitudes.
    ///
    /// # Safety
    /// The processor has the instructions of `S`; a whole vector can be read of bounds and weights, and
    /// written.
    #[inline(always)]
    unsafe fn store<S: Simd, F: Element, T: Narrow>(
        &self,
        product: S::Vector,
        weights: *const u8,
        results: *mut u8,
    ) -> (u32, S::Vector) {
        // SAFETY: the caller's contract.
        unsafe {
            let sum = S::add(F::load::<S>(weights), product);
            let magnitude = S::max_magnitude(S::splat(0.0), sum);
            let of_product = S::fused_multiply_add(
                S::splat(self.bound),
                S::load_f32(self.bounds),
                S::splat(self.floor),
            );
            let error = S::fused_multiply_add(magnitude, S::splat(SHARE_OF_SUM), of_product);
            let low = S::fused_multiply_add(error, S::splat(-1.0), sum);
            let mask = T::store_decided::<S>(low, S::add(sum, error), results);
            (mask, magnitude)
        }
    }
}
