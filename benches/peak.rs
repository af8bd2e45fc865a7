//! What this processor can do at most: fused multiply-adds on registers, on every thread at once.
//!
//!     rustc -O benches/peak.rs && ./peak 2        # GFLOP/s in f32 and in f64 of two threads
//!     ./peak 2 --by-set                           # a line for each instruction set
//!
//! Each thread runs independent chains, enough to fill the pipelines, that touch no memory; the
//! best of several runs counts, of every vector width that there is.

use std::time::Instant;

/// Chains that run side by side: latency 4 times 2 or 3 units, and registers for all of them.
const CHAINS: usize = 12;
const STEPS: u64 = 4_000_000;
const RUNS: usize = 60;

/// An instruction set's GFLOP/s.
pub struct Peak {
    /// Its name: `avx2`, `avx512` or `neon` for vectors of floats; `amx` for tiles of bf16.
    pub set: &'static str,
    /// In f32; for `amx`, of bf16 products summed in f32.
    pub single: f64,
    /// In f64; zero for `amx`.
    pub double: f64,
}

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

/// Tiles of bf16, whose intrinsics the stable compiler does not have yet.
#[cfg(all(target_arch = "x86_64", target_os = "linux"))]
mod amx {
    use std::arch::asm;

    /// Steps of a run; a step takes 16 cycles for each of its four products.
    pub const STEPS: u64 = 400_000;
    /// Multiplications and additions of a step: four times 16 × 16 × 32.
    pub const OPERATIONS: u64 = 4 * 2 * 16 * 16 * 32;

    /// Whether processor and kernel have it, and the kernel lets this process use it.
    pub fn allowed() -> bool {
        let flags = std::fs::read_to_string("/proc/cpuinfo").unwrap_or_default();
        if !flags.contains(" amx_bf16") {
            return false;
        }
        const ARCH_PRCTL: u64 = 158;
        const REQUEST_PERMISSION: u64 = 0x1023;
        const TILE_DATA: u64 = 18;
        let refused: i64;
        // SAFETY: a system call that changes nothing but this process's permission.
        unsafe {
            asm!("syscall", inlateout("rax") ARCH_PRCTL as i64 => refused,
                in("rdi") REQUEST_PERMISSION, in("rsi") TILE_DATA, out("rcx") _, out("r11") _);
        }
        refused == 0
    }

    /// Four products that do not wait for each other, over and over.
    pub fn products() {
        // Palette 1; every tile 16 rows of 64 bytes.
        let mut shape = [0u8; 64];
        shape[0] = 1;
        for tile in 0..8 {
            shape[16 + 2 * tile] = 64;
            shape[48 + tile] = 16;
        }
        // SAFETY: called where `allowed` said yes; the tiles are zeroed before they are used, and
        // given back at the end. The loop runs STEPS times.
        unsafe {
            asm!(
                "ldtilecfg [{shape}]",
                "tilezero tmm0", "tilezero tmm1", "tilezero tmm2", "tilezero tmm3",
                "tilezero tmm4", "tilezero tmm5", "tilezero tmm6", "tilezero tmm7",
                "2:",
                "tdpbf16ps tmm0, tmm4, tmm6", "tdpbf16ps tmm1, tmm4, tmm7",
                "tdpbf16ps tmm2, tmm5, tmm6", "tdpbf16ps tmm3, tmm5, tmm7",
                "dec {steps}",
                "jnz 2b",
                "tilerelease",
                shape = in(reg) shape.as_ptr(),
                steps = inout(reg) STEPS => _,
            );
        }
    }
}

/// GFLOP/s of a loop of so many operations, the best of some runs.
fn rate(threads: usize, operations: u64, body: fn()) -> f64 {
    let operations = threads as f64 * operations as f64;
    let run = || {
        let begin = Instant::now();
        std::thread::scope(|scope| {
            (0..threads).for_each(|_| drop(scope.spawn(body)));
        });
        operations / begin.elapsed().as_secs_f64() / 1e9
    };
    (0..RUNS).map(|_| run()).fold(0.0, f64::max)
}

/// What each instruction set of this processor reaches on so many threads.
pub fn peaks(threads: usize) -> Vec<Peak> {
    let mut found = Vec::new();
    let mut take = |set, lanes: u64, single: fn(), double: fn()| {
        let operations = CHAINS as u64 * STEPS * 2;
        let single = rate(threads, operations * lanes, single);
        found.push(Peak { set, single, double: rate(threads, operations * lanes / 2, double) });
    };
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma") {
            // SAFETY: the processor has these instructions.
            take("avx2", 8, || unsafe { single_256() }, || unsafe { double_256() });
        }
        if is_x86_feature_detected!("avx512f") {
            // SAFETY: the processor has these instructions.
            take("avx512", 16, || unsafe { single_512() }, || unsafe { double_512() });
        }
    }
    #[cfg(target_arch = "aarch64")]
    take("neon", 4, neon::single, neon::double);
    #[cfg(all(target_arch = "x86_64", target_os = "linux"))]
    if amx::allowed() {
        let single = rate(threads, amx::OPERATIONS * amx::STEPS, amx::products);
        found.push(Peak { set: "amx", single, double: 0.0 });
    }
    found
}

#[allow(dead_code, reason = "the kernels' bench includes this file for `peaks` alone")]
fn main() {
    let mut threads = std::thread::available_parallelism().map_or(1, |count| count.get());
    let mut by_set = false;
    for argument in std::env::args().skip(1) {
        match argument.as_str() {
            "--by-set" => by_set = true,
            "--bench" => {} // cargo's
            count => threads = count.parse().expect("a number of threads"),
        }
    }
    let peaks = peaks(threads);
    if by_set {
        for peak in &peaks {
            println!("{} {:.1} {:.1}", peak.set, peak.single, peak.double);
        }
        return;
    }
    let best = |of: fn(&Peak) -> f64| {
        peaks.iter().filter(|peak| peak.set != "amx").map(of).fold(0.0, f64::max)
    };
    println!("{:.1} {:.1}", best(|peak| peak.single), best(|peak| peak.double));
}
