//! The few vector operations that the kernels are written in, and the portable form of them.

/// A vector of f32 and what the kernels do with it.
///
/// # Safety
/// Every method requires that the processor has the instructions of the implementing type, and
/// that pointers are valid for [`Simd::LANES`] elements of the type named; no alignment is needed.
pub(super) unsafe trait Simd: Copy {
    /// The vector.
    type Vector: Copy;
    /// Elements in it.
    const LANES: usize;

    unsafe fn splat(value: f32) -> Self::Vector;
    unsafe fn load_f32(source: *const f32) -> Self::Vector;
    unsafe fn store_f32(value: Self::Vector, target: *mut f32);
    unsafe fn load_bf16(source: *const u16) -> Self::Vector;
    /// Rounds to nearest even; a NaN stays one.
    unsafe fn store_bf16(value: Self::Vector, target: *mut u16);
    unsafe fn load_f16(source: *const u16) -> Self::Vector;
    /// Rounds to nearest even; a NaN stays one.
    unsafe fn store_f16(value: Self::Vector, target: *mut u16);
    /// Rounds `high` and stores it; the lanes, as bits, in which `low` is rounded to something else.
    #[inline(always)]
    unsafe fn store_decided_bf16(low: Self::Vector, high: Self::Vector, target: *mut u16) -> u32 {
        let mut other = [0u16; 16];
        // SAFETY: the caller's contract; the array holds a whole vector.
        let stored = unsafe {
            Self::store_bf16(low, other.as_mut_ptr());
            Self::store_bf16(high, target);
            std::slice::from_raw_parts(target.cast::<[u8; 2]>(), Self::LANES)
        };
        differing(stored, &other)
    }
    /// The same with f16.
    #[inline(always)]
    unsafe fn store_decided_f16(low: Self::Vector, high: Self::Vector, target: *mut u16) -> u32 {
        let mut other = [0u16; 16];
        // SAFETY: the caller's contract; the array holds a whole vector.
        let stored = unsafe {
            Self::store_f16(low, other.as_mut_ptr());
            Self::store_f16(high, target);
            std::slice::from_raw_parts(target.cast::<[u8; 2]>(), Self::LANES)
        };
        differing(stored, &other)
    }
    unsafe fn add(left: Self::Vector, right: Self::Vector) -> Self::Vector;
    /// `left · right + sum`, rounded once.
    unsafe fn fused_multiply_add(
        left: Self::Vector,
        right: Self::Vector,
        sum: Self::Vector,
    ) -> Self::Vector;
    /// Whether two vectors of columns that meet bf16 weights hold the elements at even places and
    /// those at odd ones, where a panel has both as a whole. Elements of 16 bits then become
    /// elements of 32, and these 16 again, without crossing from one place to another.
    const PAIRED: bool = false;
    /// Such a pair with the elements at `place` added; of a set without pairs, two vectors in order.
    #[inline(always)]
    unsafe fn add_pair_bf16(
        place: *const u16,
        (first, second): (Self::Vector, Self::Vector),
    ) -> (Self::Vector, Self::Vector) {
        // SAFETY: the caller's contract covers two vectors of elements.
        unsafe {
            let after = Self::load_bf16(place.add(Self::LANES));
            (Self::add(Self::load_bf16(place), first), Self::add(after, second))
        }
    }
    /// Rounds and stores what [`Simd::add_pair_bf16`] made. NaNs have no bit among the lower 16.
    #[inline(always)]
    unsafe fn store_pair_bf16(
        place: *mut u16,
        (first, second): (Self::Vector, Self::Vector),
        largest: &mut Largest<Self>,
    ) {
        // SAFETY: the caller's contract covers two vectors of elements.
        unsafe {
            Self::store_bf16(first, place);
            Self::store_bf16(second, place.add(Self::LANES));
            largest.wide = Self::max_magnitude(largest.wide, first);
            largest.wide = Self::max_magnitude(largest.wide, second);
        }
    }
    /// The elements of a pair in their order.
    #[inline(always)]
    unsafe fn pair_in_order(pair: (Self::Vector, Self::Vector)) -> (Self::Vector, Self::Vector) {
        pair
    }
    /// The largest of [`Largest::narrow`]'s bf16 magnitudes, as the bits of an f32.
    #[inline(always)]
    unsafe fn reduce_narrow(_narrow: Self::Vector) -> u32 {
        0
    }
    /// The larger of `maximum` and |value|, compared as integers, so that a NaN is the largest.
    unsafe fn max_magnitude(maximum: Self::Vector, value: Self::Vector) -> Self::Vector;
    /// The largest element's bits.
    unsafe fn reduce_magnitude(maximum: Self::Vector) -> u32;
}

/// The largest magnitudes so far, in the two forms in which vectors keep them.
#[derive(Clone, Copy)]
pub(super) struct Largest<S: Simd> {
    /// The bits of f32 magnitudes.
    pub wide: S::Vector,
    /// The bits of bf16 magnitudes, twice as many; zeros of a set that keeps none.
    pub narrow: S::Vector,
}

impl<S: Simd> Largest<S> {
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    pub unsafe fn none() -> Self {
        // SAFETY: the caller's contract.
        unsafe { Self { wide: S::splat(0.0), narrow: S::splat(0.0) } }
    }

    /// The largest of all as the bits of an f32.
    ///
    /// # Safety
    /// The processor has the instructions of `S`.
    #[inline(always)]
    pub unsafe fn reduce(self) -> u32 {
        // SAFETY: the caller's contract.
        unsafe { S::reduce_magnitude(self.wide).max(S::reduce_narrow(self.narrow)) }
    }
}

/// The places, as bits, in which numbers of 16 bits differ. They were stored at any alignment.
#[inline(always)]
fn differing(stored: &[[u8; 2]], other: &[u16]) -> u32 {
    let pairs = stored.iter().zip(other).enumerate();
    pairs.map(|(lane, (left, right))| u32::from(*left != right.to_ne_bytes()) << lane).sum()
}

/// Plain Rust on arrays that the compiler puts into whatever registers the target has.
#[derive(Clone, Copy)]
pub(super) struct Portable;

/// An array with the element operation applied to each place.
#[inline(always)]
fn map2(left: [f32; 8], right: [f32; 8], operation: impl Fn(f32, f32) -> f32) -> [f32; 8] {
    std::array::from_fn(|lane| operation(left[lane], right[lane]))
}

// SAFETY: no special instructions are used; pointer reads are as the trait's contract allows.
unsafe impl Simd for Portable {
    type Vector = [f32; 8];
    const LANES: usize = 8;

    #[inline(always)]
    unsafe fn splat(value: f32) -> [f32; 8] {
        [value; 8]
    }

    #[inline(always)]
    unsafe fn load_f32(source: *const f32) -> [f32; 8] {
        // SAFETY: the caller's contract covers eight elements; unaligned reads are made as such.
        unsafe { source.cast::<[f32; 8]>().read_unaligned() }
    }

    #[inline(always)]
    unsafe fn store_f32(value: [f32; 8], target: *mut f32) {
        // SAFETY: as above, for writing.
        unsafe { target.cast::<[f32; 8]>().write_unaligned(value) }
    }

    #[inline(always)]
    unsafe fn load_bf16(source: *const u16) -> [f32; 8] {
        // SAFETY: the caller's contract covers eight elements.
        let bits = unsafe { source.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|bits| f32::from_bits(u32::from(bits) << 16))
    }

    #[inline(always)]
    unsafe fn store_bf16(value: [f32; 8], target: *mut u16) {
        let bits = value.map(|element| half::bf16::from_f32(element).to_bits());
        // SAFETY: the caller's contract covers eight elements.
        unsafe { target.cast::<[u16; 8]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn load_f16(source: *const u16) -> [f32; 8] {
        // SAFETY: the caller's contract covers eight elements.
        let bits = unsafe { source.cast::<[u16; 8]>().read_unaligned() };
        bits.map(|bits| half::f16::from_bits(bits).to_f32())
    }

    #[inline(always)]
    unsafe fn store_f16(value: [f32; 8], target: *mut u16) {
        let bits = value.map(|element| half::f16::from_f32(element).to_bits());
        // SAFETY: the caller's contract covers eight elements.
        unsafe { target.cast::<[u16; 8]>().write_unaligned(bits) }
    }

    #[inline(always)]
    unsafe fn add(left: [f32; 8], right: [f32; 8]) -> [f32; 8] {
        map2(left, right, |left, right| left + right)
    }

    #[inline(always)]
    unsafe fn fused_multiply_add(left: [f32; 8], right: [f32; 8], sum: [f32; 8]) -> [f32; 8] {
        std::array::from_fn(|lane| fused_multiply_add(left[lane], right[lane], sum[lane]))
    }

    #[inline(always)]
    unsafe fn max_magnitude(maximum: [f32; 8], value: [f32; 8]) -> [f32; 8] {
        map2(maximum, value, |maximum, value| {
            f32::from_bits(maximum.to_bits().max(value.to_bits() & 0x7fff_ffff))
        })
    }

    #[inline(always)]
    unsafe fn reduce_magnitude(maximum: [f32; 8]) -> u32 {
        maximum.map(f32::to_bits).into_iter().max().unwrap_or(0)
    }
}

/// A fused multiply-add that needs no fused instruction.
///
/// The product of two f32 is exact in f64. Its sum with the third is rounded to odd there, which
/// loses nothing that the final rounding to f32 could need (Boldo and Melquiond 2008, «Emulation
/// of FMA and correctly rounded sums: proved algorithms using rounding to odd», IEEE Trans.
/// Computers 57). Where the target's baseline has the instruction, that one is used.
#[inline(always)]
pub(super) fn fused_multiply_add(left: f32, right: f32, sum: f32) -> f32 {
    if cfg!(any(target_arch = "aarch64", target_feature = "fma")) {
        return left.mul_add(right, sum);
    }
    let product = f64::from(left) * f64::from(right);
    let addend = f64::from(sum);
    let rounded = product + addend;
    // The exact error of the addition (Knuth's two-sum).
    let virtual_addend = rounded - product;
    let error = (product - (rounded - virtual_addend)) + (addend - virtual_addend);
    let bits = rounded.to_bits();
    // To odd: if inexact and even, step to the neighbour on the error's side.
    let inexact_and_even = error != 0.0 && bits & 1 == 0;
    let away_from_zero = (error > 0.0) == (rounded > 0.0);
    let step = if away_from_zero { 1 } else { u64::MAX };
    let odd = if inexact_and_even && rounded.is_finite() { bits.wrapping_add(step) } else { bits };
    f64::from_bits(odd) as f32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_emulated_fused_multiply_add_is_the_real_one() {
        // Bit patterns of every magnitude, so that cancellation, ties and subnormals occur.
        let mut state = 0x9e37_79b9_7f4a_7c15_u64;
        let mut next = |spread: u32| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            let exponent = 127 - spread / 2 + (state >> 40) as u32 % spread;
            let few_bits = if state & 3 == 0 { 0x007f_0000 } else { 0x007f_ffff };
            f32::from_bits(
                (state as u32 & 0x8000_0000) | exponent << 23 | (state >> 9) as u32 & few_bits,
            )
        };
        for spread in [2, 8, 30, 120, 250] {
            for _ in 0..200_000 {
                let (left, right, sum) = (next(spread), next(spread), next(spread));
                let expected = left.mul_add(right, sum);
                let actual = fused_multiply_add(left, right, sum);
                assert!(
                    actual.to_bits() == expected.to_bits(),
                    "{left:e} * {right:e} + {sum:e} = {expected:e}, not {actual:e}"
                );
                let tie = -(left * right);
                assert_eq!(
                    fused_multiply_add(left, right, tie).to_bits(),
                    left.mul_add(right, tie).to_bits()
                );
            }
        }
        assert!(fused_multiply_add(f32::INFINITY, 0.0, 1.0).is_nan());
        assert_eq!(fused_multiply_add(f32::MAX, f32::MAX, 1.0), f32::INFINITY);
    }
}
