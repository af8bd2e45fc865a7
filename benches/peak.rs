//! What this processor can do at most: fused multiply-adds on registers, on every thread at once.
//!
//!     rustc -O benches/peak.rs && ./peak 2        # GFLOP/s in f32 and in f64 of two threads
//!
//! Each thread runs independent chains, enough to fill the pipelines, that touch no memory; the
//! best of several runs counts, of every vector width that there is.

use std::time::Instant;

/// Chains that run side by side: latency 4 times 2 or 3 units, and registers for all of them.
const CHAINS: usize = 12;
const STEPS: u64 = 4_000_000;
const RUNS: usize = 60;

macro_rules! chains {
    ($name:ident, $feature:literal, $splat:path, $add:path) => {
        #[cfg(target_arch = "x86_64")]
        #[target_feature(enable = $feature)]
        fn $name() {
            use std::arch::x86_64::*;
            use std::hint::black_box;
            let (factor, term) = ($splat(black_box(0.999)), $splat(black_box(0.5)));
            let mut sums = [$splat(black_box(0.0)); CHAINS];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = $add(factor, *sum, term);
                }
            }
            black_box(sums);
        }
    };
}

chains!(single_256, "avx2,fma", _mm256_set1_ps, _mm256_fmadd_ps);
chains!(double_256, "avx2,fma", _mm256_set1_pd, _mm256_fmadd_pd);
chains!(single_512, "avx512f", _mm512_set1_ps, _mm512_fmadd_ps);
chains!(double_512, "avx512f", _mm512_set1_pd, _mm512_fmadd_pd);

#[cfg(target_arch = "aarch64")]
mod neon {
    use super::{CHAINS, STEPS};
    use std::arch::aarch64::*;
    use std::hint::black_box;

    pub fn single() {
        // SAFETY: every aarch64 processor has NEON.
        unsafe {
            let (factor, term) = (vdupq_n_f32(black_box(0.999)), vdupq_n_f32(black_box(0.5)));
            let mut sums = [vdupq_n_f32(black_box(0.0)); CHAINS];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = vfmaq_f32(term, factor, *sum);
                }
            }
            black_box(sums);
        }
    }

    pub fn double() {
        // SAFETY: every aarch64 processor has NEON.
        unsafe {
            let (factor, term) = (vdupq_n_f64(black_box(0.999)), vdupq_n_f64(black_box(0.5)));
            let mut sums = [vdupq_n_f64(black_box(0.0)); CHAINS];
            for _ in 0..STEPS {
                for sum in &mut sums {
                    *sum = vfmaq_f64(term, factor, *sum);
                }
            }
            black_box(sums);
        }
    }
}

/// GFLOP/s of a loop whose vectors have so many lanes, the best of some runs.
fn rate(threads: usize, lanes: usize, body: fn()) -> f64 {
    let operations = (threads * CHAINS * lanes * 2) as f64 * STEPS as f64;
    let run = || {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            (0..threads).for_each(|_| drop(scope.spawn(body)));
        });
        operations / begin.elapsed().as_secs_f64() / 1e9
    };
    (0..RUNS).map(|_| run()).fold(0.0, f64::max)
}

fn main() {
    let available = std::thread::available_parallelism().map_or(1, |count| count.get());
    let threads = std::env::args().nth(1).and_then(|text| text.parse().ok()).unwrap_or(available);
    let mut best = [0.0f64; 2];
    let mut take = |which: usize, rate: f64| best[which] = best[which].max(rate);
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has these instructions.
            take(0, rate(threads, 8, || unsafe { single_256() }));
            // SAFETY: as above.
            take(1, rate(threads, 4, || unsafe { double_256() }));
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has these instructions.
            take(0, rate(threads, 16, || unsafe { single_512() }));
            // SAFETY: as above.
            take(1, rate(threads, 8, || unsafe { double_512() }));
        }
    }
    #[cfg(target_arch = "aarch64")]
    {
        take(0, rate(threads, 4, neon::single));
        take(1, rate(threads, 2, neon::double));
    }
    println!("{:.1} {:.1}", best[0], best[1]);
}
