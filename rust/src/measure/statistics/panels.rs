//! Stored halves widened straight into the panels of a product of tall matrices: eight columns side
//! by side, row after row. Through a buffer of f64 it takes three times as long.

use super::element::{ElementType, Tensor};

/// Columns of a panel.
const PANEL: usize = 8;

/// Puts a row-major matrix of halves into panels that begin `panel` values after each other.
/// Whether it could: `width` has to be a multiple of a panel's, and the processor able to.
pub(crate) fn pack_rows(
    values: &Tensor<'_>,
    width: usize,
    panel: usize,
    output: &mut [f64],
) -> bool {
    if values.element() != ElementType::F16 || width == 0 || !width.is_multiple_of(PANEL) {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    if x86::is_available() {
        // SAFETY: the processor has every feature that it enables.
        unsafe { x86::pack_rows(values.bytes(), width, panel, output) };
        return true;
    }
    let _ = (panel, output);
    false
}

/// Puts eight rows of halves, of one length, side by side as the columns of one panel. Whether the
/// processor could.
pub(crate) fn pack_columns(rows: [Tensor<'_>; PANEL], output: &mut [f64]) -> bool {
    if rows.iter().any(|row| row.element() != ElementType::F16) {
        return false;
    }
    #[cfg(target_arch = "x86_64")]
    if x86::is_available() {
        // SAFETY: the processor has every feature that it enables.
        unsafe { x86::pack_columns(rows.map(|row| row.bytes()), output) };
        return true;
    }
    let _ = output;
    false
}

#[cfg(target_arch = "x86_64")]
mod x86 {
    use std::arch::x86_64::{
        __m128i, _mm_loadu_si128, _mm_setzero_si128, _mm_unpackhi_epi16, _mm_unpackhi_epi32,
        _mm_unpackhi_epi64, _mm_unpacklo_epi16, _mm_unpacklo_epi32, _mm_unpacklo_epi64,
        _mm256_cvtph_ps, _mm512_cvtps_pd, _mm512_storeu_pd,
    };

    use half::f16;

    use super::PANEL;

    pub(super) fn is_available() -> bool {
        is_x86_feature_detected!("f16c") && crate::kernel::vector::has_avx512()
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    pub(super) fn pack_rows(bytes: &[u8], width: usize, panel: usize, output: &mut [f64]) {
        for (row, source) in bytes.chunks_exact(2 * width).enumerate() {
            for (number, part) in source.as_chunks::<16>().0.iter().enumerate() {
                let start = number * panel + row * PANEL;
                // SAFETY: the array is a vector's size; it does not have to be aligned.
                let halves = unsafe { _mm_loadu_si128(part.as_ptr().cast::<__m128i>()) };
                widen(halves, &mut output[start..]);
            }
        }
    }

    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    pub(super) fn pack_columns(rows: [&[u8]; PANEL], output: &mut [f64]) {
        let parts = rows.map(|row| row.as_chunks::<16>().0);
        let count = parts.iter().map(|part| part.len()).min().unwrap_or(0);
        let (whole, rest) = output.split_at_mut(count * PANEL * PANEL);
        for (index, square) in whole.as_chunks_mut::<{ PANEL * PANEL }>().0.iter_mut().enumerate() {
            let mut lines = [_mm_setzero_si128(); PANEL];
            for (line, part) in lines.iter_mut().zip(parts) {
                // SAFETY: the array is a vector's size; it does not have to be aligned.
                *line = unsafe { _mm_loadu_si128(part[index].as_ptr().cast::<__m128i>()) };
            }
            for (target, column) in square.as_chunks_mut::<PANEL>().0.iter_mut().zip(turned(lines))
            {
                widen(column, target);
            }
        }
        let rows = rows.map(|row| row.as_chunks::<2>().0);
        for (index, line) in rest.as_chunks_mut::<PANEL>().0.iter_mut().enumerate() {
            for (target, row) in line.iter_mut().zip(rows) {
                *target = f64::from(f16::from_le_bytes(row[count * PANEL + index]));
            }
        }
    }

    /// Eight halves into the first eight places of `output`.
    #[inline]
    #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl,f16c")]
    fn widen(halves: __m128i, output: &mut [f64]) {
        let target = &mut output[..PANEL];
        let values = _mm512_cvtps_pd(_mm256_cvtph_ps(halves));
        // SAFETY: the slice is a vector's size; it does not have to be aligned.
        unsafe { _mm512_storeu_pd(target.as_mut_ptr(), values) };
    }

    /// The transpose of an 8×8 matrix of halves.
    #[inline]
    #[target_feature(enable = "sse2")]
    fn turned(rows: [__m128i; PANEL]) -> [__m128i; PANEL] {
        let [a, b, c, d, e, f, g, h] = rows;
        let (ab, cd) = (_mm_unpacklo_epi16(a, b), _mm_unpacklo_epi16(c, d));
        let (ef, gh) = (_mm_unpacklo_epi16(e, f), _mm_unpacklo_epi16(g, h));
        let (upper_ab, upper_cd) = (_mm_unpackhi_epi16(a, b), _mm_unpackhi_epi16(c, d));
        let (upper_ef, upper_gh) = (_mm_unpackhi_epi16(e, f), _mm_unpackhi_epi16(g, h));
        let pairs = [
            (_mm_unpacklo_epi32(ab, cd), _mm_unpacklo_epi32(ef, gh)),
            (_mm_unpackhi_epi32(ab, cd), _mm_unpackhi_epi32(ef, gh)),
            (_mm_unpacklo_epi32(upper_ab, upper_cd), _mm_unpacklo_epi32(upper_ef, upper_gh)),
            (_mm_unpackhi_epi32(upper_ab, upper_cd), _mm_unpackhi_epi32(upper_ef, upper_gh)),
        ];
        let mut columns = [_mm_setzero_si128(); PANEL];
        for (target, (first, second)) in columns.as_chunks_mut::<2>().0.iter_mut().zip(pairs) {
            *target = [_mm_unpacklo_epi64(first, second), _mm_unpackhi_epi64(first, second)];
        }
        columns
    }
}

#[cfg(test)]
mod tests {
    use half::f16;

    use super::*;

    /// Halves that differ from each other and are no NaN, at an odd address.
    fn stored(count: usize) -> Vec<u8> {
        std::iter::once(0)
            .chain((0..count).flat_map(|index| ((index * 37) as u16 & 0x7bff).to_le_bytes()))
            .collect()
    }

    fn value(bytes: &[u8], index: usize) -> f64 {
        f64::from(f16::from_le_bytes([bytes[2 * index], bytes[2 * index + 1]]))
    }

    #[test]
    fn rows_lie_in_panels() {
        for (rows, width) in [(1, 8), (5, 16), (9, 40)] {
            let bytes = stored(rows * width);
            let tensor = Tensor::new(&bytes[1..], ElementType::F16).unwrap();
            let panel = rows * PANEL;
            let mut output = vec![f64::NAN; rows * width];
            if !pack_rows(&tensor, width, panel, &mut output) {
                return;
            }
            for row in 0..rows {
                for column in 0..width {
                    let place = column / PANEL * panel + row * PANEL + column % PANEL;
                    assert_eq!(output[place], value(&bytes[1..], row * width + column));
                }
            }
            assert!(!pack_rows(&tensor, width - 1, panel, &mut output));
        }
    }

    #[test]
    fn columns_stand_side_by_side() {
        for length in [0, 3, 8, 29, 128] {
            let bytes = stored(PANEL * length);
            let tensor = Tensor::new(&bytes[1..], ElementType::F16).unwrap();
            let rows = std::array::from_fn(|row| tensor.slice(row * length, (row + 1) * length));
            let mut output = vec![f64::NAN; PANEL * length];
            if !pack_columns(rows, &mut output) {
                return;
            }
            for row in 0..PANEL {
                for index in 0..length {
                    assert_eq!(
                        output[index * PANEL + row],
                        value(&bytes[1..], row * length + index)
                    );
                }
            }
        }
    }
}
