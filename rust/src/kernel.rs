//! The arithmetic of a merge: `W + left · right`, on a block of rows that lies in a cache-sized
//! buffer, rounded once to the type of W.
//!
//! Every element is one chain of fused multiply-adds in f32 over the rank index, from zero, then
//! one addition to W, then one rounding. The chain is the same whatever the width of the vectors,
//! the size of the tile or the number of threads, so the bytes are the same too.

#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx;
mod block;
pub mod convert;
mod double;
pub(crate) mod exact;
pub(crate) mod large_pages;
#[cfg(target_arch = "aarch64")]
mod neon;
mod pack;
mod simd;
#[cfg_attr(
    not(all(target_arch = "x86_64", target_os = "linux")),
    allow(dead_code, reason = "nothing multiplies tiles there but the tests' emulation")
)]
mod split;
pub(crate) mod vector;
#[cfg(target_arch = "x86_64")]
mod x86;

use serde::Serialize;

use crate::error::{Error, Result};
use crate::tensor::dtype::Dtype;

pub use exact::{ExactFactors, ExactOperand, Recomputed};
pub use pack::{Factors, Operand};
pub use split::PRODUCT_ERROR;

/// Which instructions the kernels use. The result does not depend on it, but for
/// [`InstructionSet::Amx`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum InstructionSet {
    /// Plain Rust, for every processor.
    Portable,
    /// NEON, which every 64-bit Arm processor has.
    Neon,
    /// AVX2 with FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ and VL.
    Avx512,
    /// The same and AVX-512 BF16, whose instruction rounds two vectors at once.
    Avx512Bf16,
    /// The same, and AMX for products that 16-bit weights take up: of factors in parts of bf16,
    /// hence with other sums, off by [`PRODUCT_ERROR`]. Never chosen by itself.
    Amx,
}

impl InstructionSet {
    /// All that this processor can run and that give the same bytes, the best one last.
    pub fn available() -> Vec<Self> {
        let mut sets = vec![Self::Portable];
        #[cfg(target_arch = "aarch64")]
        sets.push(Self::Neon);
        #[cfg(target_arch = "x86_64")]
        {
            if x86::has_avx2() {
                sets.push(Self::Avx2);
            }
            if x86::has_avx512() {
                sets.push(Self::Avx512);
            }
            if x86::has_avx512_bf16() {
                sets.push(Self::Avx512Bf16);
            }
        }
        sets
    }

    /// The best one for this processor.
    pub fn detect() -> Self {
        Self::available().pop().unwrap_or(Self::Portable)
    }

    /// Its name, as in reports.
    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Neon => "neon",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Avx512Bf16 => "avx512_bf16",
            Self::Amx => "amx",
        }
    }

    /// AMX, where processor and kernel have it.
    pub fn amx() -> Option<Self> {
        #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
        if amx::has_amx() {
            return Some(Self::Amx);
        }
        None
    }

    /// The one of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none or this processor cannot run it.
    pub fn from_name(name: &str) -> Result<Self> {
        let mut available = Self::available();
        available.extend(Self::amx());
        available.iter().copied().find(|set| set.name() == name).ok_or_else(|| {
            let names: Vec<_> = available.iter().map(|set| set.name()).collect();
            Error::Argument(format!(
                "no instruction set {name:?} on this processor; there are {}",
                names.join(", ")
            ))
        })
    }

    /// The register block for weights of a type: factors are packed to it.
    fn block_shape(self, weight: &Dtype) -> pack::BlockShape {
        let (rows, lanes, vectors) = match self {
            Self::Portable => (4, 8, 2),
            // Two columns of vectors leave four of the sixteen registers for the operands; three
            // columns of four rows ran at half the speed. A vector of NEON's is two of its
            // thirty-two registers.
            Self::Avx2 | Self::Neon => (6, 8, 2),
            // An even number of vectors, for 16-bit rows are widened and rounded two at a time.
            Self::Avx512 | Self::Avx512Bf16 | Self::Amx => (6, 16, 4),
        };
        let bf16 = *weight == Dtype::Bf16;
        let paired = self == Self::Avx2 && bf16;
        let plain_nans = matches!(self, Self::Avx2 | Self::Neon) && bf16;
        pack::BlockShape { rows, lanes, vectors, paired, plain_nans }
    }

    /// Whether products of that rank are made of split factors for weights of a type.
    fn splits(self, weight: &Dtype, rank: usize) -> bool {
        /// Below, the vectors need no more time for the product than tiles for storing the sums.
        /// Expected of a tile's sixteen cycles for what takes vectors 256; not measured.
        const MIN_RANK: usize = 8;
        self == Self::Amx && matches!(weight, Dtype::Bf16 | Dtype::F16) && rank >= MIN_RANK
    }
}

/// Every tile but a tensor's last one begins and ends at a multiple of this many rows, a common
/// multiple of the register blocks' heights.
pub const ROW_MULTIPLE: usize = 24;

/// Adds rows `first_row..` of `left · right` to the rows in `tile`, in place.
///
/// `tile` holds whole rows of the tensor in `dtype`, little-endian, at any alignment. Returns
/// whether every element of the result is finite.
///
/// # Panics
/// If the tile is not made of whole rows within the factors, or begins at a row that is no
/// multiple of [`ROW_MULTIPLE`], or the factors were packed for rows of another type.
pub fn merge_rows(
    set: InstructionSet,
    factors: &Factors,
    first_row: usize,
    dtype: &Dtype,
    tile: &mut [u8],
) -> bool {
    let row_bytes = factors.columns() * dtype.size();
    assert!(row_bytes > 0 && tile.len().is_multiple_of(row_bytes), "a tile holds whole rows");
    let rows = tile.len() / row_bytes;
    assert!(first_row + rows <= factors.rows(), "the tile's rows lie within the factors");
    assert!(first_row.is_multiple_of(ROW_MULTIPLE), "a tile begins at a whole register block");
    match factors {
        Factors::Double(factors) => {
            assert!(*dtype == Dtype::F64, "f64 factors meet f64 weights");
            double::merge_rows(set, factors, first_row, tile)
        }
        Factors::Split(factors) => {
            assert!(set.splits(dtype, usize::MAX), "packed for this instruction set and type");
            #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
            {
                let maximum = amx::merge_rows(factors, first_row, dtype, tile);
                maximum < overflow_threshold(dtype)
            }
            #[cfg(not(all(target_arch = "x86_64", target_os = "linux")))]
            unreachable!("never packed here, of {} columns", factors.columns())
        }
        Factors::Single(factors) => {
            let shape = set.block_shape(dtype);
            assert!(factors.shape() == shape, "packed for this instruction set and type");
            let maximum = block::merge_rows(set, factors, first_row, dtype, tile);
            maximum < overflow_threshold(dtype)
        }
    }
}

/// Converts a slice between any two mergeable types with one rounding. Returns whether every
/// element of the result is finite.
///
/// # Panics
/// If the lengths differ, or for types that cannot be merged.
pub fn convert(
    set: InstructionSet,
    from: &Dtype,
    source: &[u8],
    to: &Dtype,
    target: &mut [u8],
) -> bool {
    if *from == Dtype::F64 || *to == Dtype::F64 {
        return convert::convert(from, source, to, target);
    }
    assert_eq!(source.len() / from.size(), target.len() / to.size(), "as many elements");
    block::convert_slice(set, from, source, to, target) < overflow_threshold(to)
}

/// The least magnitude, as the bits of an f32, that rounds to infinity in `dtype`. NaN lies above.
fn overflow_threshold(dtype: &Dtype) -> u32 {
    match dtype {
        // Half way between the largest finite value and the next power of two; the tie rounds up
        // because the largest finite value is odd.
        Dtype::F16 => 65520.0f32.to_bits(),
        Dtype::Bf16 => 0x7f7f_8000,
        _ => f32::INFINITY.to_bits(),
    }
}

#[cfg(test)]
mod tests;
