//! The product kernel on one core, as a share of what the core can do on registers alone.
//!
//!     cargo bench --bench kernel                  # a minute; a table at the end
//!     cargo bench --bench kernel -- avx512/bf16   # some of it
//!
//! A tile of the size that the executor takes lies in the second-level cache, as it does there
//! when it has just been read; from one call to the next the left factor moves on, as from tile to
//! tile. Counted are the product's multiplications and additions; reading, adding and rounding the
//! weight are part of the time. Wall-clock time on one thread: keep the machine quiet.

#[path = "peak.rs"]
#[allow(missing_docs, reason = "a program of its own")]
mod peak;

use std::cell::RefCell;
use std::hint::black_box;
use std::time::{Duration, Instant};

use criterion::{BenchmarkId, Criterion, Throughput};
use lorafast::kernel::{Factors, InstructionSet, Operand, ROW_MULTIPLE, merge_rows};
use lorafast::tensor::dtype::Dtype;
use lorafast::tensor::orientation::Orientation;

/// As the executor has it.
const TILE_BYTES: usize = 512 << 10;
/// Rows and columns of the weight.
const SIZE: usize = 2048;
const RANKS: [usize; 6] = [8, 16, 32, 64, 128, 256];
const DTYPES: [Dtype; 3] = [Dtype::Bf16, Dtype::F16, Dtype::F32];

/// What was measured of one kernel: GFLOP/s at each rank, NaN where the command line left it out.
struct Row {
    set: InstructionSet,
    dtype: Dtype,
    rates: [f64; RANKS.len()],
}

/// Small numbers of both signs, so that a tile can take the same product often.
fn noise(count: usize) -> Vec<u8> {
    let mut state = 1u32;
    let mut next = || {
        state = state.wrapping_mul(1_664_525).wrapping_add(1_013_904_223);
        (state as f32 / u32::MAX as f32 - 0.5) * 1e-3
    };
    (0..count).flat_map(|_| next().to_le_bytes()).collect()
}

fn pack(set: InstructionSet, dtype: &Dtype, rank: usize) -> Factors {
    let values = noise(SIZE * rank);
    let operand = Operand {
        a: &values,
        a_dtype: &Dtype::F32,
        b: &values,
        b_dtype: &Dtype::F32,
        rank,
        coefficient: 1.0,
    };
    Factors::pack(set, dtype, (SIZE, SIZE), Orientation::OutIn, &[operand])
}

/// GFLOP/s by the fastest sample, as the peak is: a neighbour on the machine only slows. NaN if the
/// command line leaves this one out.
fn measure(criterion: &mut Criterion, set: InstructionSet, dtype: &Dtype, rank: usize) -> f64 {
    let row_bytes = SIZE * dtype.size();
    let rows = match set {
        // Bound by arithmetic wherever the tile lies; a whole tile would take a quarter second.
        InstructionSet::Portable => ROW_MULTIPLE,
        _ => TILE_BYTES / row_bytes / ROW_MULTIPLE * ROW_MULTIPLE,
    };
    let operations = 2 * rank * rows * SIZE;
    let mut tile = vec![0u8; rows * row_bytes];
    let samples = RefCell::new(Vec::new());
    let mut factors = None;
    let mut group = criterion.benchmark_group(format!("{}/{dtype}", set.name()).to_lowercase());
    group.throughput(Throughput::Elements(operations as u64));
    group.bench_function(BenchmarkId::from_parameter(rank), |bencher| {
        let factors = factors.get_or_insert_with(|| pack(set, dtype, rank));
        bencher.iter_custom(|count| {
            let begin = Instant::now();
            let mut first_row = 0;
            for _ in 0..count {
                black_box(merge_rows(set, factors, first_row, dtype, black_box(&mut tile)));
                first_row += rows;
                if first_row + rows > SIZE {
                    first_row = 0;
                }
            }
            let elapsed = begin.elapsed();
            samples.borrow_mut().push(elapsed.as_secs_f64() / count as f64);
            elapsed
        });
    });
    group.finish();
    let fastest = samples.into_inner().into_iter().min_by(f64::total_cmp);
    fastest.map_or(f64::NAN, |seconds| operations as f64 / seconds / 1e9)
}

fn main() {
    println!("one core, fused multiply-adds on registers alone:");
    let peaks = peak::peaks(1);
    for peak in &peaks {
        println!("  {:8} {:6.1} GFLOP/s", peak.set, peak.single);
    }
    let peak_of = |name: &str| {
        let peak = peaks.iter().find(|peak| peak.set == name.trim_end_matches("_bf16"))?;
        // Three products of parts make one of f32.
        Some(if name == "amx" { peak.single / 3.0 } else { peak.single })
    };
    let mut criterion = Criterion::default()
        .sample_size(10)
        .warm_up_time(Duration::from_millis(80))
        .measurement_time(Duration::from_millis(400))
        .nresamples(2000)
        .without_plots()
        .configure_from_args();
    let mut measured = Vec::new();
    for set in InstructionSet::available().into_iter().chain(InstructionSet::amx()) {
        // Weights of 32 bits meet no tiles.
        for dtype in if InstructionSet::amx() == Some(set) { &DTYPES[..2] } else { &DTYPES[..] } {
            let rates = RANKS.map(|rank| measure(&mut criterion, set, dtype, rank));
            measured.push(Row { set, dtype: dtype.clone(), rates });
        }
    }
    criterion.final_summary();

    println!("\nGFLOP/s, and the share of the set's peak, by rank:\n");
    println!("| Kernel |{}", RANKS.map(|rank| format!(" {rank} |")).concat());
    println!("|---|{}", "---:|".repeat(RANKS.len()));
    for Row { set, dtype, rates } in measured {
        let cells = rates.map(|rate| match (rate.is_nan(), peak_of(set.name())) {
            (true, _) => " – |".to_owned(),
            (false, None) => format!(" {rate:.1} |"),
            (false, Some(peak)) => format!(" {rate:.0}, {:.0} % |", 100.0 * rate / peak),
        });
        println!("| {}, {} |{}", set.name(), dtype.name().to_lowercase(), cells.concat());
    }
}
