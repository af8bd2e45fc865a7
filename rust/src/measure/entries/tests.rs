use proptest::prelude::*;

use super::*;
use crate::measure::spectrum::Values;

/// Numbers in −1..1 from a seed.
fn random(count: usize, seed: u64) -> Vec<f32> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 40) as f32 / (1u64 << 23) as f32 - 1.0
        })
        .collect()
}

/// The entries as the documentation defines them, up to fused rounding.
fn dense(b: &[f32], a: &[f32], rows: usize, columns: usize, rank: usize, scale: f64) -> Vec<f32> {
    let mut entries = Vec::with_capacity(rows * columns);
    for row in 0..rows {
        for column in 0..columns {
            let mut sum = 0.0f32;
            for k in 0..rank {
                let left = (scale * f64::from(b[row * rank + k])) as f32;
                sum = left.mul_add(a[k * columns + column], sum);
            }
            entries.push(sum);
        }
    }
    entries
}

fn reference(entries: &[f32], edges: &[f64]) -> Vec<u64> {
    let last = edges.len() - 1;
    (0..last)
        .map(|bin| {
            let is_in = |&&entry: &&f32| {
                let entry = f64::from(entry);
                entry >= edges[bin]
                    && (entry < edges[bin + 1] || (bin == last - 1 && entry <= edges[last]))
            };
            entries.iter().filter(is_in).count() as u64
        })
        .collect()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    // Small integers make every product exact, so that entries fall on edges, with or without
    // fused rounding.
    #[test]
    fn a_scan_equals_the_dense_update(
        rows in 1usize..150, columns in 1usize..90, rank in 0usize..6, bins in 1usize..40, seed: u64,
    ) {
        let whole = |count, seed| -> Vec<f32> {
            random(count, seed).iter().map(|x| (x * 5.0).trunc()).collect()
        };
        let (b, a) = (whole(rows * rank, seed), whole(rank * columns, seed ^ 7));
        let update =
            Update::new(rows, columns, rank, Values::F32(&b), Values::F32(&a), 0.5).unwrap();
        let entries = dense(&b, &a, rows, columns, rank, 0.5);
        let found = scan_entries(&update, &Bins::Automatic(bins), 1.5).unwrap();
        let magnitudes = entries.iter().map(|x| x.abs());
        prop_assert_eq!(found.count, entries.len() as u64);
        prop_assert_eq!(found.max_abs, f64::from(magnitudes.clone().fold(0.0, f32::max)));
        prop_assert_eq!(found.below, magnitudes.filter(|&x| x < 1.5).count() as u64);
        prop_assert_eq!(&found.histogram.counts, &reference(&entries, &found.histogram.edges));
        let uneven = vec![-3.0, -1.0, -0.5, 0.0, 0.0, 2.5, 4.0];
        let given = scan_entries(&update, &Bins::Edges(uneven.clone()), 1.5).unwrap();
        prop_assert_eq!(given.histogram.counts, reference(&entries, &uneven));
        prop_assert_eq!((given.min, given.max, given.below), (found.min, found.max, found.below));
    }
}

#[test]
fn non_finite_entries_are_counted_and_left_out() {
    let b = [1.0f32, f32::INFINITY, 2.0];
    let a = [1.0f32, 0.0];
    let update = Update::new(3, 2, 1, Values::F32(&b), Values::F32(&a), 1.0).unwrap();
    let edges = vec![f64::NEG_INFINITY, 0.5, f64::INFINITY];
    let found = scan_entries(&update, &Bins::Edges(edges), 0.5).unwrap();
    assert_eq!((found.count, found.non_finite, found.below), (6, 2, 2));
    assert_eq!(found.histogram.counts, [2, 2]);
    assert_eq!((found.min, found.max), (0.0, 2.0));
}

#[test]
fn a_threshold_between_two_f32_is_respected() {
    let b = [0.1f32];
    let update = Update::new(1, 1, 1, Values::F32(&b), Values::F32(&[1.0]), 1.0).unwrap();
    let below = |threshold| scan_entries(&update, &Bins::Automatic(1), threshold).unwrap().below;
    // 0.1 as f32 is a little above 0.1.
    assert_eq!(below(0.1), 0);
    assert_eq!(below(f64::from(0.1f32)), 0);
    assert_eq!(below(f64::from(0.1f32) + 1e-12), 1);
}

#[test]
fn the_threads_do_not_matter() {
    let (b, a) = (random(700 * 5, 1), random(5 * 300, 2));
    let update = Update::new(700, 300, 5, Values::F32(&b), Values::F32(&a), 0.3).unwrap();
    let run = |threads| {
        let pool = crate::parallel::task::build_pool(Some(threads)).unwrap();
        pool.install(|| scan_entries(&update, &Bins::Automatic(20), 0.1).unwrap())
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn an_update_without_entries_has_none() {
    let update = Update::new(0, 4, 2, Values::F32(&[]), Values::F32(&[0.0; 8]), 1.0).unwrap();
    let found = scan_entries(&update, &Bins::Automatic(3), 1.0).unwrap();
    assert_eq!((found.count, found.max_abs), (0, 0.0));
    assert!(found.min.is_nan());
    assert_eq!(found.histogram.counts, [0; 3]);
}
