//! IEEE halves as f64: exact, with the processor's own conversion where it has one.

use half::f16;

use super::moments::LANES;

/// Widens little-endian halves at any alignment; `output` has one place for each.
#[inline]
pub(super) fn widen(bytes: &[u8], output: &mut [f64]) {
    debug_assert_eq!(bytes.len(), 2 * output.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("f16c") {
        if crate::kernel::vector::has_avx512() {
            // SAFETY: the processor has every feature that `wide` enables.
            return unsafe { x86::wide(bytes, output) };
        }
        if crate::kernel::vector::has_avx2() {
            // SAFETY: the processor has every feature that `medium` enables.
            return unsafe { x86::medium(bytes, output) };
        }
    }
    portable(bytes, output);
}

/// Widens little-endian halves and adds them up on the way: the sums of the values and of their
/// magnitudes, each of so many lanes as [`LANES`]. `None` where the processor is not made for it;
/// then nothing is done.
pub(super) fn widen_and_add(bytes: &[u8], output: &mut [f64]) -> Option<[[f64; LANES]; 2]> {
    debug_assert_eq!(bytes.len(), 2 * output.len());
    #[cfg(target_arch = "x86_64")]
    if is_x86_feature_detected!("f16c") && crate::kernel::vector::has_avx512() {
        let whole = output.len() / LANES * LANES;
        let (start, rest) = output.split_at_mut(whole);
        // SAFETY: the processor has every feature that it enables.
        let mut sums = unsafe { x86::wide_and_add(&bytes[..2 * whole], start) };
        portable(&bytes[2 * whole..], rest);
        for (lane, &value) in rest.iter().enumerate() {
            sums[0][lane] += value;
            sums[1][lane] += value.abs();
        }
        return Some(sums);
    }
    let _ = (bytes, output);
    None
}

fn portable(bytes: &[u8], output: &mut [f64]) {
    for (target, &source) in output.iter_mut().zip(bytes.as_chunks::<2>().0) {
        *target = f64::from(f16::from_le_bytes(source));
    }
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_cvtph_ps, _mm_loadl_epi64, _mm_loadu_si128, _mm256_cvtph_ps, _mm256_cvtps_pd,
        _mm256_storeu_pd, _mm512_abs_pd, _mm512_add_pd, _mm512_cvtps_pd, _mm512_setzero_pd,
        _mm512_storeu_pd,
    };

    use super::LANES;

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    pub(super) fn wide(bytes: &[u8], output: &mut [f64]) {
        let (sources, rest) = bytes.as_chunks::<16>();
        let (targets, last) = output.as_chunks_mut::<8>();
        for (target, source) in targets.iter_mut().zip(sources) {
            // SAFETY: both arrays are of a whole vector's size; neither has to be aligned.
            unsafe {
                let halves = _mm_loadu_si128(source.as_ptr().cast::<__m128i>());
                let values = _mm512_cvtps_pd(_mm256_cvtph_ps(halves));
                _mm512_storeu_pd(target.as_mut_ptr(), values);
            }
        }
        super::portable(rest, last);
    }

    /// Of a whole number of [`LANES`].
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    pub(super) fn wide_and_add(bytes: &[u8], output: &mut [f64]) -> [[f64; LANES]; 2] {
        let mut sums = [_mm512_setzero_pd(); LANES / 8];
        let mut magnitudes = sums;
        let sources = bytes.as_chunks::<{ 2 * LANES }>().0;
        for (target, source) in output.as_chunks_mut::<LANES>().0.iter_mut().zip(sources) {
            let parts = source.as_chunks::<16>().0.iter().zip(target.as_chunks_mut::<8>().0);
            for (part, (source, target)) in parts.enumerate() {
                // SAFETY: both arrays are of a whole vector's size; neither has to be aligned.
                let values = unsafe {
                    let halves = _mm_loadu_si128(source.as_ptr().cast::<__m128i>());
                    let values = _mm512_cvtps_pd(_mm256_cvtph_ps(halves));
                    _mm512_storeu_pd(target.as_mut_ptr(), values);
                    values
                };
                sums[part] = _mm512_add_pd(sums[part], values);
                magnitudes[part] = _mm512_add_pd(magnitudes[part], _mm512_abs_pd(values));
            }
        }
        [sums, magnitudes].map(|vectors| {
            let mut lanes = [0.0; LANES];
            for (target, vector) in lanes.as_chunks_mut::<8>().0.iter_mut().zip(vectors) {
                // SAFETY: the array is of a whole vector's size and does not have to be aligned.
                unsafe { _mm512_storeu_pd(target.as_mut_ptr(), vector) };
            }
            lanes
        })
    }

    #[target_feature(enable = "avx2,fma,f16c")]
    pub(super) fn medium(bytes: &[u8], output: &mut [f64]) {
        let (sources, rest) = bytes.as_chunks::<8>();
        let (targets, last) = output.as_chunks_mut::<4>();
        for (target, source) in targets.iter_mut().zip(sources) {
            // SAFETY: both arrays are of a whole vector's size; neither has to be aligned.
            unsafe {
                let halves = _mm_loadl_epi64(source.as_ptr().cast::<__m128i>());
                let values = _mm256_cvtps_pd(_mm_cvtph_ps(halves));
                _mm256_storeu_pd(target.as_mut_ptr(), values);
            }
        }
        super::portable(rest, last);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_half_is_widened_by_value_whatever_the_instructions() {
        let bits: Vec<u8> = (0..=u16::MAX).flat_map(u16::to_le_bytes).collect();
        // Lengths that no vector divides, at an odd address.
        let bytes = &bits[..bits.len() - 6];
        let mut shifted = vec![0];
        shifted.extend(bytes);
        let count = bytes.len() / 2;
        let (mut expected, mut found) = (vec![0.0; count], vec![0.0; count]);
        portable(bytes, &mut expected);
        let check = |found: &[f64]| {
            for (index, (a, b)) in expected.iter().zip(found).enumerate() {
                assert!(a.to_bits() == b.to_bits() || (a.is_nan() && b.is_nan()), "{index:#x}");
            }
        };
        widen(&shifted[1..], &mut found);
        check(&found);
        #[cfg(target_arch = "x86_64")]
        if is_x86_feature_detected!("f16c") && crate::kernel::vector::has_avx2() {
            found.fill(0.0);
            // SAFETY: the processor has every feature that it enables.
            unsafe { x86::medium(&shifted[1..], &mut found) };
            check(&found);
        }
        assert_eq!(expected[0x3c00], 1.0);
        assert_eq!(expected[0x0001], 2.0f64.powi(-24));
        assert_eq!(expected[0xfc00], f64::NEG_INFINITY);
    }
}
