//! Run-time choice of the instruction set for loops that the compiler vectorises by itself.

/// Compiles a function once for each x86-64 vector width and picks the widest that the processor
/// has. The body is plain Rust without fused operations, so every version returns the same bits.
macro_rules! vectorized {
    (
        $(#[$attribute:meta])*
        $visibility:vis fn $name:ident($($argument:ident: $type:ty),* $(,)?) $(-> $result:ty)?
        $body:block
    ) => {
        $(#[$attribute])*
        $visibility fn $name($($argument: $type),*) $(-> $result)? {
            #[inline(always)]
            fn portable($($argument: $type),*) $(-> $result)? $body

            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
                fn wide($($argument: $type),*) $(-> $result)? {
                    portable($($argument),*)
                }
                #[target_feature(enable = "avx2")]
                fn medium($($argument: $type),*) $(-> $result)? {
                    portable($($argument),*)
                }
                if $crate::kernel::vector::has_avx512() {
                    // SAFETY: the processor has every feature that `wide` enables.
                    return unsafe { wide($($argument),*) };
                }
                if $crate::kernel::vector::has_avx2() {
                    // SAFETY: the processor has every feature that `medium` enables.
                    return unsafe { medium($($argument),*) };
                }
            }
            portable($($argument),*)
        }
    };
}

pub(crate) use vectorized;

/// Whether the processor has the AVX-512 subset that this crate uses.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx512() -> bool {
    is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
}

/// Whether the processor has AVX2 and, as every processor with AVX2 in use does, FMA.
#[cfg(target_arch = "x86_64")]
#[inline]
pub(crate) fn has_avx2() -> bool {
    is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma")
}
