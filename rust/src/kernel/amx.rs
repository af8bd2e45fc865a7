//! Tiles of bf16 in AMX, whose intrinsics stable compilers do not have yet.

use std::arch::asm;
use std::arch::x86_64::__cpuid_count;
use std::sync::OnceLock;

use super::convert::{Element, PlainBf16, PlainF16};
use super::split::{self, CHUNK, COLUMNS, ROWS, SplitFactors, TILE_COLUMNS, Tiles};
use super::x86::Avx512;
use crate::tensor::dtype::Dtype;

/// AMX-TILE and AMX-BF16.
pub(super) struct Amx;

/// Whether [`Amx`] can be used: the processor has it, and the kernel lets this process use it.
/// Asks the kernel once.
pub(super) fn has_amx() -> bool {
    static ANSWER: OnceLock<bool> = OnceLock::new();
    *ANSWER.get_or_init(|| super::x86::has_avx512_bf16() && in_processor() && permitted())
}

fn in_processor() -> bool {
    const BF16_AND_TILE: u32 = 1 << 22 | 1 << 24;
    #[allow(unused_unsafe, reason = "later compilers take the instruction for safe")]
    // SAFETY: every 64-bit processor has the instruction.
    let [highest, features] = unsafe { [__cpuid_count(0, 0).eax, __cpuid_count(7, 0).edx] };
    highest >= 7 && features & BF16_AND_TILE == BF16_AND_TILE
}

/// The kernel gives the 8 KB that a thread's tiles take in a switch only to who asks (Linux,
/// Documentation/arch/x86/xstate.rst).
fn permitted() -> bool {
    const REQUEST_PERMISSION: libc::c_long = 0x1023;
    const TILE_DATA: libc::c_long = 18;
    // SAFETY: a system call that changes nothing but this process's permission.
    unsafe { libc::syscall(libc::SYS_arch_prctl, REQUEST_PERMISSION, TILE_DATA) == 0 }
}

/// Adds the product to the tile's rows; returns the largest magnitude of the result as the bits of
/// an f32. The caller has checked that the tile is made of whole rows within the factors, and
/// that there is AMX.
pub(super) fn merge_rows(
    factors: &SplitFactors,
    first_row: usize,
    dtype: &Dtype,
    tile: &mut [u8],
) -> u32 {
    match dtype {
        // SAFETY: the caller's contract; a tile begins at a whole block.
        Dtype::Bf16 => unsafe { rows::<PlainBf16>(factors, first_row, tile) },
        // SAFETY: as above.
        Dtype::F16 => unsafe { rows::<PlainF16>(factors, first_row, tile) },
        _ => panic!("split factors meet {dtype} weights"),
    }
}

/// # Safety
/// The processor has AMX and the instructions named, and the tile is one of the factors'.
#[target_feature(enable = "avx512bf16,avx512f,avx512bw,avx512dq,avx512vl,avx2,fma,f16c")]
unsafe fn rows<E: Element>(factors: &SplitFactors, first_row: usize, tile: &mut [u8]) -> u32 {
    // SAFETY: this function's own contract.
    unsafe { split::merge_rows::<Amx, Avx512<true>, E, 2>(factors, first_row, tile) }
}

/// The shapes of the tiles as LDTILECFG reads them.
#[repr(align(64))]
struct Shapes([u8; 64]);

/// Sums in tiles 0 to 3, two left tiles in 4 and 5, two right ones in 6 and 7.
static SHAPES: Shapes = {
    let mut shapes = [0; 64];
    // Palette 1.
    shapes[0] = 1;
    let mut tile = 0;
    while tile < 8 {
        // Bytes of a row, then rows.
        shapes[16 + 2 * tile] = 64;
        shapes[48 + tile] = if tile < 6 { ROWS as u8 / 2 } else { CHUNK as u8 / 2 };
        tile += 1;
    }
    Shapes(shapes)
};

// The displacements below are of these.
const _: () = assert!(ROWS == 24 && COLUMNS == 32 && CHUNK == 32 && TILE_COLUMNS == 16);

// SAFETY: a chunk is 24 rows of 64 bytes on the left and two tiles of 16 rows of 64 bytes on the
// right; the sums are 24 rows of 128 bytes.
unsafe impl Tiles for Amx {
    unsafe fn begin() {
        // SAFETY: the trait's contract; the shapes are valid ones.
        unsafe {
            asm!("ldtilecfg [{}]", in(reg) SHAPES.0.as_ptr(), options(nostack, preserves_flags))
        }
    }

    #[inline]
    unsafe fn multiply(left: *const u16, right: *const u16, chunks: usize, sums: *mut f32) {
        // SAFETY: the trait's contract; the loop runs `chunks` times.
        unsafe {
            asm!(
                "tilezero tmm0",
                "tilezero tmm1",
                "tilezero tmm2",
                "tilezero tmm3",
                "2:",
                "tileloadd tmm6, [{right} + {line}*1]",
                "tileloadd tmm4, [{left} + {line}*1]",
                "tdpbf16ps tmm0, tmm4, tmm6",
                "tileloadd tmm7, [{right} + {line}*1 + 1024]",
                "tdpbf16ps tmm1, tmm4, tmm7",
                "tileloadd tmm5, [{left} + {line}*1 + 768]",
                "tdpbf16ps tmm2, tmm5, tmm6",
                "tdpbf16ps tmm3, tmm5, tmm7",
                "add {left}, 1536",
                "add {right}, 2048",
                "dec {chunks}",
                "jnz 2b",
                "tilestored [{sums} + {row}*1], tmm0",
                "tilestored [{sums} + {row}*1 + 64], tmm1",
                "tilestored [{sums} + {row}*1 + 1536], tmm2",
                "tilestored [{sums} + {row}*1 + 1600], tmm3",
                left = inout(reg) left => _,
                right = inout(reg) right => _,
                chunks = inout(reg) chunks => _,
                sums = in(reg) sums,
                line = in(reg) 64usize,
                row = in(reg) 128usize,
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nostack),
            );
        }
    }

    unsafe fn end() {
        // SAFETY: the trait's contract.
        unsafe {
            asm!("tilerelease",
                out("tmm0") _, out("tmm1") _, out("tmm2") _, out("tmm3") _,
                out("tmm4") _, out("tmm5") _, out("tmm6") _, out("tmm7") _,
                options(nomem, nostack, preserves_flags));
        }
    }
}
