//! The vector operations in AVX2 and AVX-512.

use std::arch::x86_64::*;

use super::simd::{Largest, Simd};

/// Whether [`Avx2`] can be used.
pub(super) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c")
}

/// Whether [`Avx512`] can be used.
pub(super) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && has_avx2()
}

/// Whether [`Avx512`] can round by the instruction.
pub(super) fn has_avx512_bf16() -> bool {
    is_x86_feature_detected!("avx512bf16") && has_avx512()
}

/// AVX2 with FMA and F16C.
#[derive(Clone, Copy)]
pub(super) struct Avx2;

/// AVX-512 F, BW, DQ, VL; with BF16 if `ROUNDS`.
#[derive(Clone, Copy)]
pub(super) struct Avx512<const ROUNDS: bool>;

// SAFETY: the trait's contract is that the instructions are there and the pointers valid for a
// whole vector; every intrinsic used is the unaligned form. The same holds for each block below.
unsafe impl Simd for Avx2 {
    type Vector = __m256;
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load_f32(source: *const f32) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_loadu_ps(source) }
    }

    #[inline(always)]
    unsafe fn store_f32(value: __m256, target: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm256_storeu_ps(target, value) }
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe {
            let bits = _mm256_cvtepu16_epi32(_mm_loadu_si128(source.cast()));
            _mm256_castsi256_ps(_mm256_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(value: __m256, target: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe {
            let bits = _mm256_castps_si256(value);
            let high = _mm256_srli_epi32::<16>(bits);
            let odd = _mm256_and_si256(high, _mm256_set1_epi32(1));
            let bias = _mm256_add_epi32(odd, _mm256_set1_epi32(0x7fff));
            let rounded = _mm256_srli_epi32::<16>(_mm256_add_epi32(bits, bias));
            let quiet = _mm256_or_si256(high, _mm256_set1_epi32(0x40));
            let is_nan = _mm256_castps_si256(_mm256_cmp_ps::<_CMP_UNORD_Q>(value, value));
            let chosen = _mm256_blendv_epi8(rounded, quiet, is_nan);
            // Packs within each 128-bit half; the permutation brings the halves together.
            let packed = _mm256_packus_epi32(chosen, chosen);
            let ordered = _mm256_permute4x64_epi64::<0b00_00_10_00>(packed);
            _mm_storeu_si128(target.cast(), _mm256_castsi256_si128(ordered));
        }
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_cvtph_ps(_mm_loadu_si128(source.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(value: __m256, target: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe {
            let rounded = _mm256_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value);
            _mm_storeu_si128(target.cast(), rounded);
        }
    }

    #[inline(always)]
    unsafe fn add(left: __m256, right: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_add_ps(left, right) }
    }

    #[inline(always)]
    unsafe fn fused_multiply_add(left: __m256, right: __m256, sum: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe { _mm256_fmadd_ps(left, right, sum) }
    }

    const PAIRED: bool = true;

    #[inline(always)]
    unsafe fn add_pair_bf16(place: *const u16, (even, odd): (__m256, __m256)) -> (__m256, __m256) {
        // SAFETY: the trait's contract.
        unsafe {
            let stored = _mm256_loadu_si256(place.cast());
            let low = _mm256_slli_epi32::<16>(stored);
            let high = _mm256_and_si256(stored, _mm256_set1_epi32(!0xffff));
            let low = _mm256_add_ps(_mm256_castsi256_ps(low), even);
            (low, _mm256_add_ps(_mm256_castsi256_ps(high), odd))
        }
    }

    #[inline(always)]
    unsafe fn store_pair_bf16(
        place: *mut u16,
        (low, high): (__m256, __m256),
        largest: &mut Largest<Self>,
    ) {
        // SAFETY: the trait's contract.
        unsafe {
            let (low, high) = (_mm256_castps_si256(low), _mm256_castps_si256(high));
            // The upper and the lower 16 bits of sixteen elements, each in a vector.
            let kept = _mm256_blend_epi16::<0xaa>(_mm256_srli_epi32::<16>(low), high);
            let cut = _mm256_blend_epi16::<0xaa>(low, _mm256_slli_epi32::<16>(high));
            // Up where more than half a unit is cut, or half a unit from an odd number: with that
            // number's last bit put among the bits that are cut, both are more than half. What is
            // infinite, or a NaN, has nothing to cut, and what is too large becomes infinite.
            let odd = _mm256_and_si256(kept, _mm256_set1_epi16(1));
            let half = _mm256_set1_epi16(i16::MIN);
            let beyond = _mm256_subs_epu16(_mm256_or_si256(cut, odd), half);
            let step = _mm256_min_epu16(beyond, _mm256_set1_epi16(1));
            let rounded = _mm256_add_epi16(kept, step);
            _mm256_storeu_si256(place.cast(), rounded);
            let magnitude = _mm256_and_si256(rounded, _mm256_set1_epi16(i16::MAX));
            let narrow = _mm256_castps_si256(largest.narrow);
            largest.narrow = _mm256_castsi256_ps(_mm256_max_epu16(narrow, magnitude));
        }
    }

    #[inline(always)]
    unsafe fn pair_in_order((even, odd): (__m256, __m256)) -> (__m256, __m256) {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm256_unpacklo_ps(even, odd);
            let high = _mm256_unpackhi_ps(even, odd);
            let first = _mm256_permute2f128_ps::<0x20>(low, high);
            (first, _mm256_permute2f128_ps::<0x31>(low, high))
        }
    }

    #[inline(always)]
    unsafe fn reduce_narrow(narrow: __m256) -> u32 {
        let mut lanes = [0u16; 16];
        // SAFETY: the trait's contract; the array holds a whole vector.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr().cast(), narrow) };
        u32::from(lanes.into_iter().max().unwrap_or(0)) << 16
    }

    #[inline(always)]
    unsafe fn max_magnitude(maximum: __m256, value: __m256) -> __m256 {
        // SAFETY: the trait's contract.
        unsafe {
            let magnitude =
                _mm256_and_si256(_mm256_castps_si256(value), _mm256_set1_epi32(0x7fff_ffff));
            let maximum = _mm256_castps_si256(maximum);
            _mm256_castsi256_ps(_mm256_max_epu32(maximum, magnitude))
        }
    }

    #[inline(always)]
    unsafe fn reduce_magnitude(maximum: __m256) -> u32 {
        let mut lanes = [0f32; 8];
        // SAFETY: the trait's contract; the array holds a whole vector.
        unsafe { _mm256_storeu_ps(lanes.as_mut_ptr(), maximum) };
        lanes.map(f32::to_bits).into_iter().max().unwrap_or(0)
    }
}

/// Where the words of a vector's lower half go when they become the upper halves of 32 bits.
static WORD_PLACES: [u16; 32] = {
    let mut places = [0; 32];
    let mut word = 0;
    while word < 32 {
        places[word] = word as u16 / 2;
        word += 1;
    }
    places
};

// SAFETY: as above.
unsafe impl<const ROUNDS: bool> Simd for Avx512<ROUNDS> {
    type Vector = __m512;
    const LANES: usize = 16;

    #[inline(always)]
    unsafe fn splat(value: f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_set1_ps(value) }
    }

    #[inline(always)]
    unsafe fn load_f32(source: *const f32) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_loadu_ps(source) }
    }

    #[inline(always)]
    unsafe fn store_f32(value: __m512, target: *mut f32) {
        // SAFETY: the trait's contract.
        unsafe { _mm512_storeu_ps(target, value) }
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe {
            let bits = _mm512_cvtepu16_epi32(_mm256_loadu_si256(source.cast()));
            _mm512_castsi512_ps(_mm512_slli_epi32::<16>(bits))
        }
    }

    #[inline(always)]
    unsafe fn store_bf16(value: __m512, target: *mut u16) {
        // SAFETY: the trait's contract. VCVTNEPS2BF16 is not used: it flushes subnormals.
        unsafe {
            let bits = _mm512_castps_si512(value);
            let high = _mm512_srli_epi32::<16>(bits);
            let odd = _mm512_and_si512(high, _mm512_set1_epi32(1));
            let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
            let rounded = _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias));
            let is_nan = _mm512_cmp_ps_mask::<_CMP_UNORD_Q>(value, value);
            let chosen = _mm512_mask_or_epi32(rounded, is_nan, high, _mm512_set1_epi32(0x40));
            _mm256_storeu_si256(target.cast(), _mm512_cvtepi32_epi16(chosen));
        }
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_cvtph_ps(_mm256_loadu_si256(source.cast())) }
    }

    #[inline(always)]
    unsafe fn store_f16(value: __m512, target: *mut u16) {
        // SAFETY: the trait's contract.
        unsafe {
            let rounded = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(value);
            _mm256_storeu_si256(target.cast(), rounded);
        }
    }

    #[inline(always)]
    unsafe fn store_decided_bf16(low: __m512, high: __m512, target: *mut u16) -> u32 {
        // SAFETY: the trait's contract.
        unsafe {
            // A NaN is told by its magnitude, and need not stay one here.
            let rounded = |value: __m512| {
                let bits = _mm512_castps_si512(value);
                let odd = _mm512_and_si512(_mm512_srli_epi32::<16>(bits), _mm512_set1_epi32(1));
                let bias = _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff));
                _mm512_srli_epi32::<16>(_mm512_add_epi32(bits, bias))
            };
            let (low, high) = (rounded(low), rounded(high));
            _mm256_storeu_si256(target.cast(), _mm512_cvtepi32_epi16(high));
            u32::from(_mm512_cmpneq_epi32_mask(low, high))
        }
    }

    #[inline(always)]
    unsafe fn store_decided_f16(low: __m512, high: __m512, target: *mut u16) -> u32 {
        // SAFETY: the trait's contract.
        unsafe {
            let low = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(low);
            let high = _mm512_cvtps_ph::<_MM_FROUND_TO_NEAREST_INT>(high);
            _mm256_storeu_si256(target.cast(), high);
            u32::from(_mm256_cmpneq_epi16_mask(low, high))
        }
    }

    #[inline(always)]
    unsafe fn add(left: __m512, right: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_add_ps(left, right) }
    }

    #[inline(always)]
    unsafe fn fused_multiply_add(left: __m512, right: __m512, sum: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_fmadd_ps(left, right, sum) }
    }

    #[inline(always)]
    unsafe fn add_pair_bf16(
        place: *const u16,
        (first, second): (__m512, __m512),
    ) -> (__m512, __m512) {
        // SAFETY: the trait's contract.
        unsafe {
            if !ROUNDS {
                let after = Self::load_bf16(place.add(Self::LANES));
                let low = Self::add(Self::load_bf16(place), first);
                return (low, Self::add(after, second));
            }
            let stored = _mm512_loadu_si512(place.cast());
            // Every element to the upper half of its 32 bits, in one step.
            let places = _mm512_loadu_si512(WORD_PLACES.as_ptr().cast());
            let others = _mm512_add_epi16(places, _mm512_set1_epi16(16));
            let low = _mm512_maskz_permutexvar_epi16(0xaaaa_aaaa, places, stored);
            let high = _mm512_maskz_permutexvar_epi16(0xaaaa_aaaa, others, stored);
            let low = _mm512_add_ps(_mm512_castsi512_ps(low), first);
            (low, _mm512_add_ps(_mm512_castsi512_ps(high), second))
        }
    }

    #[inline(always)]
    unsafe fn store_pair_bf16(
        place: *mut u16,
        (low, high): (__m512, __m512),
        largest: &mut Largest<Self>,
    ) {
        // SAFETY: the trait's contract, which with `ROUNDS` includes AVX-512 BF16.
        unsafe {
            if ROUNDS {
                // SAFETY: both are vectors of 512 bits without invalid values.
                let rounded: __m512i = std::mem::transmute(_mm512_cvtne2ps_pbh(high, low));
                // It makes zeros of subnormals, so a zero may be wrong; and what is not finite
                // counts as the largest. Twice the element less one puts both at the upper end.
                let doubled = _mm512_add_epi16(rounded, rounded);
                let rank = _mm512_add_epi16(doubled, _mm512_set1_epi16(-1));
                if _mm512_cmpge_epu16_mask(rank, _mm512_set1_epi16(0xfeff_u16 as i16)) == 0 {
                    _mm512_storeu_si512(place.cast(), rounded);
                    return;
                }
            }
            Self::store_bf16(low, place);
            Self::store_bf16(high, place.add(Self::LANES));
            largest.wide = Self::max_magnitude(largest.wide, low);
            largest.wide = Self::max_magnitude(largest.wide, high);
        }
    }

    #[inline(always)]
    unsafe fn max_magnitude(maximum: __m512, value: __m512) -> __m512 {
        // SAFETY: the trait's contract.
        unsafe {
            let magnitude =
                _mm512_and_si512(_mm512_castps_si512(value), _mm512_set1_epi32(0x7fff_ffff));
            let maximum = _mm512_castps_si512(maximum);
            _mm512_castsi512_ps(_mm512_max_epu32(maximum, magnitude))
        }
    }

    #[inline(always)]
    unsafe fn reduce_magnitude(maximum: __m512) -> u32 {
        // SAFETY: the trait's contract.
        unsafe { _mm512_reduce_max_epu32(_mm512_castps_si512(maximum)) }
    }
}
