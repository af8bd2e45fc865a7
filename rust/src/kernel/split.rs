//! Products of factors in parts of bf16, for processors that multiply tiles of bf16 many times as
//! fast as vectors of f32.
//!
//! An f32 is split in two bf16: what it rounds to, and what the rest rounds to. Of the four
//! products of two such numbers the smallest is left out, and the others make one product of
//! longer factors: `[hi, hi, lo] · [hi; lo; hi]`. A part in which every element is zero, as the
//! second one of bf16 factors is, takes no place.
//!
//! A bf16 is off by 2⁻⁸ of what it rounds at most, and two of them by 2⁻¹⁷ (the rest lies below
//! 2⁻⁸, where a unit in the last place is 2⁻¹⁶). So what is left out of a product is 2⁻¹⁶ of its
//! size, and what its factors are off as much again: [`PRODUCT_ERROR`]. That is little beside the
//! 2⁻⁸ or 2⁻¹¹ by which 16-bit weights are rounded, and too much for f32 ones, which are merged
//! exactly.

use half::bf16;

use super::block::add_part;
use super::convert::Element;
use super::pack::Side;
use super::simd::{Largest, Simd};

/// What the splitting changes in a sum of products at most, as a share of the sum of their sizes.
pub const PRODUCT_ERROR: f64 = 1.0 / 32768.0;

/// Rows of a block: two tiles of left factors. Blocks begin where the vector kernels' do.
pub(super) const ROWS: usize = super::ROW_MULTIPLE;
/// Columns of a block: two tiles of right factors.
pub(super) const COLUMNS: usize = 32;
/// Rank indices that tiles hold.
pub(super) const CHUNK: usize = 32;
/// Columns of one tile.
pub(super) const TILE_COLUMNS: usize = 16;

/// What multiplies tiles of bf16.
///
/// # Safety
/// `multiply` touches `chunks` chunks of both factors and the sums of one block, nothing else.
pub(super) unsafe trait Tiles {
    /// Sets this thread's tiles up.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn begin();

    /// Writes the sums of one block, row after row, from factors in the order of
    /// [`SplitFactors`].
    ///
    /// # Safety
    /// The processor has the instructions, [`Tiles::begin`] was called on this thread and no
    /// [`Tiles::end`] since, there are `chunks` chunks of factors, one or more, and `sums` holds a
    /// block.
    unsafe fn multiply(left: *const u16, right: *const u16, chunks: usize, sums: *mut f32);

    /// Gives this thread's tiles back.
    ///
    /// # Safety
    /// The processor has the instructions.
    unsafe fn end();
}

/// An f32 as two bf16, the second of what the first leaves. What is not finite has no second one.
pub(super) fn split(value: f32) -> [u16; 2] {
    let rounded = bf16::from_f32(value);
    let first = if rounded.is_infinite() && value.is_finite() {
        // Too large to round up: cut instead, which leaves up to twice as much.
        bf16::from_bits((value.to_bits() >> 16) as u16)
    } else {
        rounded
    };
    let rest = if value.is_finite() { value - first.to_f32() } else { 0.0 };
    [first.to_bits(), bf16::from_f32(rest).to_bits()]
}

/// Both factors in parts of bf16, in the order in which tiles are read, padded with zeros: of
/// each block of rows or columns one chunk of rank indices behind another.
#[derive(Debug)]
pub struct SplitFactors {
    rows: usize,
    columns: usize,
    /// Chunks of rank indices of all parts.
    chunks: usize,
    /// Of each chunk [`ROWS`] rows of [`CHUNK`] rank indices.
    left: Vec<u16>,
    /// Of each chunk two tiles, each of [`CHUNK`] / 2 rows in which pairs of rank indices of
    /// [`TILE_COLUMNS`] columns lie beside one another.
    right: Vec<u16>,
}

impl SplitFactors {
    /// Packs the sides of a product, operand by operand.
    pub(super) fn pack(
        (rows, columns): (usize, usize),
        lefts: &[Side<'_>],
        rights: &[Side<'_>],
    ) -> Self {
        let halves = |sides: &[Side<'_>], extent| -> Vec<_> {
            sides.iter().map(|side| Halves::of(side, extent)).collect()
        };
        let (lefts, rights) = (halves(lefts, rows), halves(rights, columns));
        // Which rank index of which part stands where in the long product.
        let mut places = Vec::new();
        for (operand, (left, right)) in lefts.iter().zip(&rights).enumerate() {
            for (of_left, of_right) in [(0, 0), (0, 1), (1, 0)] {
                if of_left < left.parts && of_right < right.parts {
                    places.extend((0..left.rank).map(|k| (operand, k, of_left, of_right)));
                }
            }
        }
        let chunks = places.len().div_ceil(CHUNK);
        let mut this = Self {
            rows,
            columns,
            chunks,
            left: vec![0; rows.div_ceil(ROWS) * ROWS * chunks * CHUNK],
            right: vec![0; columns.div_ceil(COLUMNS) * COLUMNS * chunks * CHUNK],
        };
        // Block by block, so that what a block's rank indices are scattered over stays in the cache.
        for first in (0..rows).step_by(ROWS) {
            let block = &mut this.left[first * chunks * CHUNK..][..ROWS * chunks * CHUNK];
            for (place, &(operand, k, part, _)) in places.iter().enumerate() {
                let chunk = &mut block[place / CHUNK * ROWS * CHUNK..][..ROWS * CHUNK];
                let values = &lefts[operand].row(k)[first..rows.min(first + ROWS)];
                for (row, value) in chunk.chunks_exact_mut(CHUNK).zip(values) {
                    row[place % CHUNK] = value[part];
                }
            }
        }
        for first in (0..columns).step_by(TILE_COLUMNS) {
            let panel = first / COLUMNS * COLUMNS * chunks * CHUNK;
            for (place, &(operand, k, _, part)) in places.iter().enumerate() {
                let tile = place / CHUNK * COLUMNS + first % COLUMNS;
                let tile = &mut this.right[panel + tile * CHUNK..][..TILE_COLUMNS * CHUNK];
                let row = &mut tile[place % CHUNK / 2 * 2 * TILE_COLUMNS..][..2 * TILE_COLUMNS];
                let values = &rights[operand].row(k)[first..columns.min(first + TILE_COLUMNS)];
                for (pair, value) in row.chunks_exact_mut(2).zip(values) {
                    pair[place % 2] = value[part];
                }
            }
        }
        this
    }

    pub(super) fn rows(&self) -> usize {
        self.rows
    }

    pub(super) fn columns(&self) -> usize {
        self.columns
    }
}

/// One operand's side, split: rank × extent.
struct Halves {
    values: Vec<[u16; 2]>,
    extent: usize,
    rank: usize,
    /// 1 if every second part is zero.
    parts: usize,
}

impl Halves {
    fn of(side: &Side<'_>, extent: usize) -> Self {
        let values: Vec<_> = (0..side.rank)
            .flat_map(|k| (0..extent).map(move |other| split(side.at(k, other))))
            .collect();
        let zero = |bits: u16| bits << 1 == 0;
        let parts = if values.iter().all(|[_, second]| zero(*second)) { 1 } else { 2 };
        Self { values, extent, rank: side.rank, parts }
    }

    fn row(&self, k: usize) -> &[[u16; 2]] {
        &self.values[k * self.extent..(k + 1) * self.extent]
    }
}

/// Sums of one block, where tiles are stored to and vectors read from.
#[repr(align(64))]
struct Sums([f32; ROWS * COLUMNS]);

/// Adds the product to the tile's rows; returns the largest magnitude of the result as the bits of
/// an f32.
///
/// # Safety
/// The processor has the instructions of `T` and `S`, `VECTORS` vectors of `S` are [`COLUMNS`], and
/// the tile is made of whole rows within the factors from `first_row` on, a multiple of [`ROWS`].
#[inline(always)]
pub(super) unsafe fn merge_rows<T: Tiles, S: Simd, E: Element, const VECTORS: usize>(
    factors: &SplitFactors,
    first_row: usize,
    tile: &mut [u8],
) -> u32 {
    const { assert!(VECTORS * S::LANES == COLUMNS) };
    /// As many rows as are read before the first is written; see the vector kernels.
    const GROUP: usize = 6;
    let stride = factors.columns * E::SIZE;
    let tile_rows = tile.len() / stride;
    let step = factors.chunks * CHUNK;
    let mut sums = Sums([0.0; ROWS * COLUMNS]);
    // SAFETY: the instructions are there by the caller's contract. Blocks and panels are whole in
    // the packed factors, sums hold a block, and only rows and columns that exist are touched.
    unsafe {
        let mut largest = Largest::<S>::none();
        T::begin();
        for (panel, right) in factors.right.chunks_exact(COLUMNS * step).enumerate() {
            let first_column = panel * COLUMNS;
            let columns = COLUMNS.min(factors.columns - first_column);
            for row in (0..tile_rows).step_by(ROWS) {
                let block = (first_row + row) / ROWS * ROWS * step;
                let left = &factors.left[block..block + ROWS * step];
                T::multiply(left.as_ptr(), right.as_ptr(), factors.chunks, sums.0.as_mut_ptr());
                let rows = ROWS.min(tile_rows - row);
                let target = tile[row * stride + first_column * E::SIZE..].as_mut_ptr();
                if columns == COLUMNS {
                    for group in (0..rows).step_by(GROUP) {
                        let mut merged = [[S::splat(0.0); VECTORS]; GROUP];
                        let in_group = GROUP.min(rows - group);
                        for (row, merged) in merged.iter_mut().enumerate().take(in_group) {
                            let row = group + row;
                            for (vector, merged) in merged.iter_mut().enumerate() {
                                let place = row * COLUMNS + vector * S::LANES;
                                *merged = S::load_f32(sums.0.as_ptr().add(place));
                            }
                            E::add_stored::<S, VECTORS>(target.add(row * stride), merged);
                        }
                        for (row, merged) in merged.iter().enumerate().take(in_group) {
                            let place = target.add((group + row) * stride);
                            E::store_sums::<S, VECTORS>(merged, place, &mut largest);
                        }
                    }
                } else {
                    for row in 0..rows {
                        for first in (0..columns).step_by(S::LANES) {
                            let sum = S::load_f32(sums.0.as_ptr().add(row * COLUMNS + first));
                            let place = target.add(row * stride + first * E::SIZE);
                            let count = S::LANES.min(columns - first);
                            add_part::<S, E>(place, count, sum, &mut largest);
                        }
                    }
                }
            }
        }
        T::end();
        largest.reduce()
    }
}
