//! The vector operations in NEON, which every 64-bit Arm processor has.

use std::arch::aarch64::*;
use std::arch::asm;

use super::simd::{Largest, Simd};

/// NEON, two registers to a vector: eight elements of 16 bits fill one.
#[derive(Clone, Copy)]
pub(super) struct Neon;

/// The upper 16 bits of eight f32 in order, and the lower ones.
#[inline(always)]
fn cut_in_two(value: float32x4x2_t) -> (uint16x8_t, uint16x8_t) {
    // SAFETY: NEON is part of the target.
    unsafe {
        let (first, second) = (vreinterpretq_u16_f32(value.0), vreinterpretq_u16_f32(value.1));
        (vuzp2q_u16(first, second), vuzp1q_u16(first, second))
    }
}

/// Rounds to nearest even what has nothing to cut where it is infinite or a NaN.
#[inline(always)]
fn rounded_to_bf16(value: float32x4x2_t) -> uint16x8_t {
    let (kept, cut) = cut_in_two(value);
    // SAFETY: NEON is part of the target.
    unsafe {
        // Up where more than half a unit is cut, or half a unit from an odd number: with that
        // number's last bit put among the bits that are cut, both are more than half.
        let odd = vandq_u16(kept, vdupq_n_u16(1));
        let up = vcgtq_u16(vorrq_u16(cut, odd), vdupq_n_u16(0x8000));
        // All bits set are minus one.
        vsubq_u16(kept, up)
    }
}

// SAFETY: the target has NEON; loads and stores are of whole vectors, at any alignment. The same
// holds for each block below.
unsafe impl Simd for Neon {
    type Vector = float32x4x2_t;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> float32x4x2_t {
        // SAFETY: the trait's contract.
        let half = unsafe { vdupq_n_f32(value) };
        float32x4x2_t(half, half)
    }

    #[inline(always)]
    unsafe fn load_f32(source: *const f32) -> float32x4x2_t {
        // SAFETY: the trait's contract.
        unsafe { float32x4x2_t(vld1q_f32(source), vld1q_f32(source.add(4))) }
    }

    #[inline(always)]
    unsafe fn store_f32(value: float32x4x2_t, target: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe {
            vst1q_f32(target, value.0);
            vst1q_f32(target.add(4), value.1);
        }
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> float32x4x2_t {
        // SAFETY: the trait's contract.
        unsafe {
            let (stored, zeros) = (vld1q_u16(source), vdupq_n_u16(0));
            float32x4x2_t(
                vreinterpretq_f32_u16(vzip1q_u16(zeros, stored)),
                vreinterpretq_f32_u16(vzip2q_u16(zeros, stored)),
            )
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(value: float32x4x2_t, target: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe {
            let quiet = vorrq_u16(cut_in_two(value).0, vdupq_n_u16(0x40));
            let number = vuzp1q_u16(
                vreinterpretq_u16_u32(vceqq_f32(value.0, value.0)),
                vreinterpretq_u16_u32(vceqq_f32(value.1, value.1)),
            );
            vst1q_u16(target, vbslq_u16(number, rounded_to_bf16(value), quiet));
        }
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> float32x4x2_t {
        let (first, second): (float32x4_t, float32x4_t);
        // SAFETY: the trait's contract; the instructions touch registers alone. Written out, for
        // the intrinsics need a later compiler than the project asks for.
        unsafe {
            let stored = vld1q_u16(source);
            asm!(
                "fcvtl {first:v}.4s, {stored:v}.4h",
                "fcvtl2 {second:v}.4s, {stored:v}.8h",
                stored = in(vreg) stored,
                first = out(vreg) first,
                second = lateout(vreg) second,
                options(pure, nomem, nostack, preserves_flags),
            );
        }
        float32x4x2_t(first, second)
    }

    #[inline(always)]
    unsafe fn store_f16(value: float32x4x2_t, target: *mut u16) {
        let rounded: uint16x8_t;
        // SAFETY: as for loading.
        unsafe {
            asm!(
                "fcvtn {rounded:v}.4h, {first:v}.4s",
                "fcvtn2 {rounded:v}.8h, {second:v}.4s",
                first = in(vreg) value.0,
                second = in(vreg) value.1,
                rounded = out(vreg) rounded,
                options(pure, nomem, nostack, preserves_flags),
            );
            vst1q_u16(target, rounded);
        }
    }

    #[inline(always)]
    unsafe fn add(left: float32x4x2_t, right: float32x4x2_t) -> float32x4x2_t {
        // SAFETY: the trait's contract.
        unsafe { float32x4x2_t(vaddq_f32(left.0, right.0), vaddq_f32(left.1, right.1)) }
    }

    #[inline(always)]
    unsafe fn fused_multiply_add(
        left: float32x4x2_t,
        right: float32x4x2_t,
        sum: float32x4x2_t,
    ) -> float32x4x2_t {
        // SAFETY: the trait's contract.
        unsafe {
            float32x4x2_t(vfmaq_f32(sum.0, left.0, right.0), vfmaq_f32(sum.1, left.1, right.1))
        }
    }

    #[inline(always)]
    unsafe fn store_pair_bf16(
        place: *mut u16,
        (first, second): (float32x4x2_t, float32x4x2_t),
        largest: &mut Largest<Self>,
    ) {
        let (first, second) = (rounded_to_bf16(first), rounded_to_bf16(second));
        // SAFETY: the trait's contract.
        unsafe {
            vst1q_u16(place, first);
            vst1q_u16(place.add(Self::LANES), second);
            let magnitude = vdupq_n_u16(0x7fff);
            let larger = |maximum: float32x4_t, rounded: uint16x8_t| {
                let rounded = vandq_u16(rounded, magnitude);
                vreinterpretq_f32_u16(vmaxq_u16(vreinterpretq_u16_f32(maximum), rounded))
            };
            largest.narrow =
                float32x4x2_t(larger(largest.narrow.0, first), larger(largest.narrow.1, second));
        }
    }

    #[inline(always)]
    unsafe fn reduce_narrow(narrow: float32x4x2_t) -> u32 {
        // SAFETY: the trait's contract.
        unsafe {
            let (first, second) =
                (vreinterpretq_u16_f32(narrow.0), vreinterpretq_u16_f32(narrow.1));
            u32::from(vmaxvq_u16(vmaxq_u16(first, second))) << 16
        }
    }

    #[inline(always)]
    unsafe fn max_magnitude(maximum: float32x4x2_t, value: float32x4x2_t) -> float32x4x2_t {
        // SAFETY: the trait's contract.
        unsafe {
            let larger = |maximum: float32x4_t, value: float32x4_t| {
                let magnitude = vreinterpretq_u32_f32(vabsq_f32(value));
                vreinterpretq_f32_u32(vmaxq_u32(vreinterpretq_u32_f32(maximum), magnitude))
            };
            float32x4x2_t(larger(maximum.0, value.0), larger(maximum.1, value.1))
        }
    }

    #[inline(always)]
    unsafe fn reduce_magnitude(maximum: float32x4x2_t) -> u32 {
        // SAFETY: the trait's contract.
        unsafe {
            vmaxvq_u32(vmaxq_u32(
                vreinterpretq_u32_f32(maximum.0),
                vreinterpretq_u32_f32(maximum.1),
            ))
        }
    }
}
