//! Between the stored types and f32: the element types that the kernels are written over, and the
//! conversion of whole slices, with one rounding to nearest even.

use super::simd::{Largest, Simd};
use super::vector::vectorized;
use crate::error::Result;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;

/// A stored element type.
///
/// # Safety
/// Implementations touch exactly `S::LANES` elements of `SIZE` bytes at the pointer.
pub(super) unsafe trait Element {
    /// Bytes in one element.
    const SIZE: usize;

    /// # Safety
    /// The processor has the instructions of `S`, and a whole vector of elements can be read.
    unsafe fn load<S: Simd>(source: *const u8) -> S::Vector;

    /// # Safety
    /// The processor has the instructions of `S`, and a whole vector of elements can be written.
    unsafe fn store<S: Simd>(value: S::Vector, target: *mut u8);

    /// Whether panels of columns for these weights are paired ([`Simd::PAIRED`]).
    const PAIRED: bool = false;

    /// Adds the elements at `place` to the vectors of a whole panel.
    ///
    /// # Safety
    /// The processor has the instructions of `S`, and as many whole vectors of elements can be read.
    #[inline(always)]
    unsafe fn add_stored<S: Simd, const COUNT: usize>(
        place: *const u8,
        sums: &mut [S::Vector; COUNT],
    ) where
        Self: Sized,
    {
        for (vector, sum) in sums.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            unsafe {
                let place = place.add(vector * S::LANES * Self::SIZE);
                *sum = S::add(Self::load::<S>(place), *sum);
            }
        }
    }

    /// Rounds and stores what [`Element::add_stored`] made.
    ///
    /// # Safety
    /// The processor has the instructions of `S`, and as many whole vectors of elements can be
    /// written.
    #[inline(always)]
    unsafe fn store_sums<S: Simd, const COUNT: usize>(
        sums: &[S::Vector; COUNT],
        place: *mut u8,
        largest: &mut Largest<S>,
    ) where
        Self: Sized,
    {
        for (vector, sum) in sums.iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe {
                Self::store::<S>(*sum, place.add(vector * S::LANES * Self::SIZE));
                largest.wide = S::max_magnitude(largest.wide, *sum);
            }
        }
    }
}

/// A stored element type of 16 bits, to which intervals are rounded.
///
/// # Safety
/// As [`Element`].
pub(super) unsafe trait Narrow: Element {
    /// Rounds the upper ends of intervals and stores them; the lanes, as bits, in which the lower ends
    /// are rounded to something else.
    ///
    /// # Safety
    /// As [`Element::store`].
    unsafe fn store_decided<S: Simd>(low: S::Vector, high: S::Vector, target: *mut u8) -> u32;
}

pub(super) struct PlainF32;
pub(super) struct PlainBf16;
pub(super) struct PlainF16;

macro_rules! element {
    ($name:ident, $size:literal, $load:ident, $store:ident, { $($pairs:item)* }) => {
        // SAFETY: the vector operations touch LANES elements of this size, unaligned.
        unsafe impl Element for $name {
            const SIZE: usize = $size;

            #[inline(always)]
            unsafe fn load<S: Simd>(source: *const u8) -> S::Vector {
                // SAFETY: the caller's contract.
                unsafe { S::$load(source.cast()) }
            }

            #[inline(always)]
            unsafe fn store<S: Simd>(value: S::Vector, target: *mut u8) {
                // SAFETY: the caller's contract.
                unsafe { S::$store(value, target.cast()) }
            }

            $($pairs)*
        }
    };
}

element!(PlainF32, 4, load_f32, store_f32, {});
element!(PlainF16, 2, load_f16, store_f16, {});
element!(PlainBf16, 2, load_bf16, store_bf16, {
    const PAIRED: bool = true;

    #[inline(always)]
    unsafe fn add_stored<S: Simd, const COUNT: usize>(
        place: *const u8,
        sums: &mut [S::Vector; COUNT],
    ) {
        let place: *const u16 = place.cast();
        let (pairs, rest) = sums.as_chunks_mut::<2>();
        for (index, [first, second]) in pairs.iter_mut().enumerate() {
            // SAFETY: the caller's contract.
            unsafe {
                let place = place.add(2 * index * S::LANES);
                (*first, *second) = S::add_pair_bf16(place, (*first, *second));
            }
        }
        if let [last] = rest {
            // SAFETY: the caller's contract.
            unsafe {
                *last = S::add(S::load_bf16(place.add((COUNT - 1) * S::LANES)), *last);
            }
        }
    }

    #[inline(always)]
    unsafe fn store_sums<S: Simd, const COUNT: usize>(
        sums: &[S::Vector; COUNT],
        place: *mut u8,
        largest: &mut Largest<S>,
    ) {
        let place: *mut u16 = place.cast();
        let (pairs, rest) = sums.as_chunks::<2>();
        for (index, [first, second]) in pairs.iter().enumerate() {
            // SAFETY: the caller's contract.
            unsafe {
                let place = place.add(2 * index * S::LANES);
                S::store_pair_bf16(place, (*first, *second), largest);
            }
        }
        if let [last] = rest {
            // SAFETY: the caller's contract.
            unsafe {
                S::store_bf16(*last, place.add((COUNT - 1) * S::LANES));
                largest.wide = S::max_magnitude(largest.wide, *last);
            }
        }
    }
});

macro_rules! narrow {
    ($name:ident, $store:ident) => {
        // SAFETY: the vector operation writes LANES elements of 16 bits, unaligned.
        unsafe impl Narrow for $name {
            #[inline(always)]
            unsafe fn store_decided<S: Simd>(
                low: S::Vector,
                high: S::Vector,
                target: *mut u8,
            ) -> u32 {
                // SAFETY: the caller's contract.
                unsafe { S::$store(low, high, target.cast()) }
            }
        }
    };
}

narrow!(PlainF16, store_decided_f16);
narrow!(PlainBf16, store_decided_bf16);

/// Calls `each` with every element of `bytes`, widened to f64 (exact for every stored type).
///
/// # Panics
/// For a type that cannot be merged.
#[inline(always)]
pub fn for_each_f64(dtype: &Dtype, bytes: &[u8], mut each: impl FnMut(usize, f64)) {
    let pairs = |chunk: &[u8]| u16::from_le_bytes([chunk[0], chunk[1]]);
    match dtype {
        Dtype::F64 => {
            for (index, chunk) in bytes.chunks_exact(8).enumerate() {
                each(index, f64::from_le_bytes(chunk.try_into().expect("eight bytes")));
            }
        }
        Dtype::F32 => {
            for (index, chunk) in bytes.chunks_exact(4).enumerate() {
                let value = f32::from_le_bytes(chunk.try_into().expect("four bytes"));
                each(index, f64::from(value));
            }
        }
        Dtype::Bf16 => {
            for (index, chunk) in bytes.chunks_exact(2).enumerate() {
                each(index, f64::from(half::bf16::from_bits(pairs(chunk)).to_f32()));
            }
        }
        Dtype::F16 => {
            for (index, chunk) in bytes.chunks_exact(2).enumerate() {
                each(index, half::f16::from_bits(pairs(chunk)).to_f64());
            }
        }
        Dtype::Other(name) => panic!("a {name} tensor was to be converted"),
    }
}

/// Widens to f32. f64 elements are rounded.
///
/// # Panics
/// If the lengths differ, or for a type that cannot be merged.
pub fn widen(dtype: &Dtype, bytes: &[u8], values: &mut [f32]) {
    assert_eq!(bytes.len(), values.len() * dtype.size(), "as many elements on both sides");
    match dtype {
        // Without the way over f64, which the compiler does not see through.
        Dtype::F32 => {
            for (value, chunk) in values.iter_mut().zip(bytes.chunks_exact(4)) {
                *value = f32::from_le_bytes(chunk.try_into().expect("four bytes"));
            }
        }
        Dtype::Bf16 => {
            for (value, chunk) in values.iter_mut().zip(bytes.chunks_exact(2)) {
                let bits = u16::from_le_bytes([chunk[0], chunk[1]]);
                *value = f32::from_bits(u32::from(bits) << 16);
            }
        }
        _ => for_each_f64(dtype, bytes, |index, value| values[index] = value as f32),
    }
}

/// Widens to f64, exactly.
///
/// # Panics
/// For a type that cannot be merged.
pub fn widen_f64(dtype: &Dtype, bytes: &[u8]) -> Vec<f64> {
    let mut values = vec![0.0; bytes.len() / dtype.size()];
    widen_f64_into(dtype, bytes, &mut values);
    values
}

/// The same into a slice.
///
/// # Panics
/// If the lengths differ, or for a type that cannot be merged.
pub fn widen_f64_into(dtype: &Dtype, bytes: &[u8], values: &mut [f64]) {
    assert_eq!(bytes.len(), values.len() * dtype.size(), "as many elements on both sides");
    match dtype {
        Dtype::F32 => widen_single(bytes, values),
        _ => for_each_f64(dtype, bytes, |index, value| values[index] = value),
    }
}

vectorized! {
    fn widen_single(bytes: &[u8], values: &mut [f64]) {
        for (value, chunk) in values.iter_mut().zip(bytes.as_chunks::<4>().0) {
            *value = f64::from(f32::from_le_bytes(*chunk));
        }
    }
}

vectorized! {
    /// Rounds f64 to f32, and tells whether all of these are finite.
    fn narrow(source: &[u8], target: &mut [u8]) -> bool {
        let pairs = source.as_chunks::<8>().0.iter().zip(target.as_chunks_mut::<4>().0);
        let mut largest = 0;
        for (value, target) in pairs {
            let narrow = f64::from_le_bytes(*value) as f32;
            largest = narrow.abs().to_bits().max(largest);
            *target = narrow.to_le_bytes();
        }
        largest < f32::INFINITY.to_bits()
    }
}

/// The f32 beside `value` whose last bit is odd, or `value` itself where it is an f32. Rounding it
/// once more, to a type at least two bits shorter, gives what rounding `value` at once would.
/// (`half` converts from f64 without the lower half of the bits, which loses ties.)
pub(super) fn round_to_odd(value: f64) -> f32 {
    let nearest = value as f32;
    let back = f64::from(nearest);
    if back == value || !nearest.is_finite() || nearest.to_bits() & 1 == 1 {
        return nearest;
    }
    let step = if value.abs() > back.abs() { 1 } else { u32::MAX };
    f32::from_bits(nearest.to_bits().wrapping_add(step))
}

/// Converts between any two mergeable types with one rounding. Returns whether every element of
/// the result is finite.
///
/// # Panics
/// If the lengths differ, or for types that cannot be merged.
pub fn convert(from: &Dtype, source: &[u8], to: &Dtype, target: &mut [u8]) -> bool {
    assert_eq!(source.len() / from.size(), target.len() / to.size(), "as many elements");
    let mut finite = true;
    match to {
        Dtype::F64 => for_each_f64(from, source, |index, value| {
            finite &= value.is_finite();
            target[index * 8..][..8].copy_from_slice(&value.to_le_bytes());
        }),
        Dtype::F32 if *from == Dtype::F64 => return narrow(source, target),
        Dtype::F32 => for_each_f64(from, source, |index, value| {
            let narrow = value as f32;
            finite &= narrow.is_finite();
            target[index * 4..][..4].copy_from_slice(&narrow.to_le_bytes());
        }),
        Dtype::Bf16 => for_each_f64(from, source, |index, value| {
            let narrow = half::bf16::from_f32(round_to_odd(value));
            finite &= narrow.is_finite();
            target[index * 2..][..2].copy_from_slice(&narrow.to_le_bytes());
        }),
        Dtype::F16 => for_each_f64(from, source, |index, value| {
            let narrow = half::f16::from_f32(round_to_odd(value));
            finite &= narrow.is_finite();
            target[index * 2..][..2].copy_from_slice(&narrow.to_le_bytes());
        }),
        Dtype::Other(name) => panic!("a tensor was to become {name}"),
    }
    finite
}
impl Tensor {
    /// Its values widened to f32, row-major.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    ///
    /// # Panics
    /// If it is not of a floating-point type, which reading an adapter has ruled out for factors.
    pub fn read_f32(&self) -> Result<Vec<f32>> {
        let bytes = self.read()?;
        let mut values = vec![0.0; self.elements() as usize];
        widen(&self.dtype, &bytes, &mut values);
        Ok(values)
    }

    /// Its values widened to f64, row-major. The same panic applies.
    ///
    /// # Errors
    /// As [`Tensor::read`].
    pub fn read_f64(&self) -> Result<Vec<f64>> {
        Ok(widen_f64(&self.dtype, &self.read()?))
    }
}
