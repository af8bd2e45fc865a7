//! The toys of the methods in exact numbers, and tiles against the whole.

use super::order::Cut;
use super::selection::Room;
use super::*;

const P: [f32; 12] = [-14.0, -1.0, 9.0, -4.0, -22.0, -10.0, -13.0, -5.0, 6.0, 12.0, 28.0, 8.0];
const Q: [f32; 12] = [-4.0, 10.0, 6.0, 20.0, -14.0, -18.0, -13.0, 1.0, 9.0, 17.0, -11.0, -15.0];

fn masks(count: usize) -> Vec<Mask> {
    (0..count).map(|ordinal| Mask::new(7, "layer", ordinal)).collect()
}

/// What a method makes of updates in tiles of so many rows, counted by two threads.
fn merged(
    method: Method,
    columns: usize,
    updates: &[&[f32]],
    weights: &[f64],
    tile_rows: usize,
) -> Vec<f64> {
    let rows = updates[0].len() / columns;
    let mut finder =
        Finder::new(method, [rows, columns], weights.to_vec(), masks(updates.len()), 0);
    let tiles: Vec<(usize, usize)> =
        (0..rows).step_by(tile_rows).map(|first| (first, (first + tile_rows).min(rows))).collect();
    let tile = |(first, end): (usize, usize)| -> Vec<&[f32]> {
        updates.iter().map(|values| &values[first * columns..end * columns]).collect()
    };
    while !finder.is_done() {
        let mut threads = vec![finder.counters(), finder.counters()];
        for (place, range) in tiles.iter().enumerate().rev() {
            finder.count(&mut threads[place % 2], range.0, &tile(*range));
        }
        finder.advance(threads);
    }
    let selection = finder.selection();
    let mut result = vec![f64::NAN; rows * columns];
    let mut room = Room::default();
    for range in tiles {
        let target = &mut result[range.0 * columns..range.1 * columns];
        selection.merge(range.0, &tile(range), &tile(range), &mut room, target);
    }
    result
}

fn method(name: &str, options: serde_json::Value) -> Method {
    Method::new(name, &serde_json::from_value(options).expect("options")).expect("a method")
}

fn check(name: &str, options: serde_json::Value, weights: [f64; 2], wanted: [f64; 12]) {
    for rows in [1, 3, 4] {
        let found = merged(method(name, options.clone()), 3, &[&P, &Q], &weights, rows);
        assert_eq!(found, wanted, "{name}");
    }
}

#[test]
fn what_is_trimmed_elected_and_merged_is_that_of_the_toys() {
    let half = || serde_json::json!({"density": 0.5});
    let trimmed =
        |values: &[f32; 12]| merged(method("magnitude_prune", half()), 3, &[values], &[1.0], 4);
    assert_eq!(trimmed(&P), [-14.0, 0.0, 0.0, 0.0, -22.0, -10.0, -13.0, 0.0, 0.0, 12.0, 28.0, 0.0]);
    assert_eq!(trimmed(&Q), [0.0, 0.0, 0.0, 20.0, -14.0, -18.0, -13.0, 0.0, 0.0, 17.0, 0.0, -15.0]);
    check(
        "ties",
        half(),
        [1.0, 1.0],
        [-14.0, 0.0, 0.0, 20.0, -18.0, -14.0, -13.0, 0.0, 0.0, 14.5, 28.0, -15.0],
    );
    check(
        "ties",
        serde_json::json!({"density": 0.5, "normalize": false}),
        [1.0, 1.0],
        [-14.0, 0.0, 0.0, 20.0, -36.0, -28.0, -26.0, 0.0, 0.0, 29.0, 28.0, -15.0],
    );
    let fifth = |n: f64| n / 5.0;
    check(
        "ties",
        half(),
        [0.25, 1.0],
        [-14.0, 0.0, 0.0, 20.0, fifth(-78.0), fifth(-82.0), -13.0, 0.0, 0.0, 16.0, 28.0, -15.0],
    );
    // A negative weight turns what only the negative update has; a sum of the wrong sign would keep it.
    check(
        "ties",
        half(),
        [1.0, -0.5],
        [-14.0, 0.0, 0.0, -20.0, -22.0, -10.0, -13.0, 0.0, 0.0, 12.0, 28.0, 15.0],
    );
}

#[test]
fn breadcrumbs_leave_the_largest_and_the_smallest() {
    let options = serde_json::json!({"density": 0.5, "gamma": 0.25});
    for rows in [1, 2, 4] {
        assert_eq!(
            merged(method("breadcrumbs", options.clone()), 3, &[&P], &[1.0], rows),
            [0.0, 0.0, 9.0, 0.0, 0.0, -10.0, -13.0, 0.0, 6.0, 12.0, 0.0, 8.0]
        );
    }
    // Where too few are left, fewer of the largest are dropped; γ = 0 drops none.
    let all = serde_json::json!({"density": 1.0, "gamma": 0.25});
    assert_eq!(merged(method("breadcrumbs", all), 3, &[&P], &[1.0], 4), P.map(f64::from));
    let none = serde_json::json!({"density": 0.25, "gamma": 0.0});
    let kept = merged(method("breadcrumbs", none), 3, &[&P], &[1.0], 4);
    assert_eq!(kept.iter().filter(|value| **value != 0.0).count(), 3);
}

#[test]
fn sce_weighs_by_energy_after_masking() {
    let near = |found: &[f64], wanted: &[f64]| {
        let mut pairs = found.iter().zip(wanted);
        assert!(pairs.all(|(value, wanted)| (value - wanted).abs() < 1e-8), "{found:?}");
    };
    for rows in [1, 4] {
        let run = |options| merged(method("sce", options), 3, &[&P, &Q], &[1.0; 2], rows);
        let found = run(serde_json::json!({"select_topk": 1.0}));
        near(&found[..3], &[-9.174963036, 10.0, 7.552488911]);
        near(&found[9..], &[14.412518483, 28.0, -15.0]);
        let mut wanted = [0.0; 12];
        for (place, value) in [(0, -9.5174206968), (1, 10.0), (3, 20.0), (10, 28.0), (11, -15.0)] {
            wanted[place] = value;
        }
        near(&run(serde_json::json!({"select_topk": 0.5})), &wanted);
        near(&run(serde_json::json!({"density": 0.5})), &wanted);
    }
}

#[test]
fn random_masks_keep_by_place_and_divide_by_their_probability() {
    let dare = method("dare_linear", serde_json::json!({"density": 0.5}));
    let found = merged(dare, 3, &[&P], &[1.0], 4);
    let mask = masks(1)[0];
    for (place, value) in found.iter().enumerate() {
        let kept = mask.uniform(place as u64) < 0.5;
        assert_eq!(*value, if kept { f64::from(P[place]) * 2.0 } else { 0.0 });
    }
    let della = method("della_linear", serde_json::json!({"density": 0.5, "epsilon": 0.15}));
    let row = [-14.0f32, -1.0, 9.0];
    for seed in 0..64 {
        let mask = Mask::new(seed, "layer", 0);
        let selection = Finder::new(della, [1, 3], vec![1.0], vec![mask], 0).of(&[&row]);
        let mut found = [0.0; 3];
        selection.merge(0, &[&row], &[&row], &mut Room::default(), &mut found);
        for (place, probability) in [0.65, 0.35, 0.5].into_iter().enumerate() {
            let kept = mask.uniform(place as u64) < probability;
            let wanted = if kept { f64::from(row[place]) / probability } else { 0.0 };
            assert!((found[place] - wanted).abs() < 1e-13, "{found:?}");
        }
    }
}

#[test]
fn equal_magnitudes_are_kept_by_their_index() {
    // Nine of one magnitude, of which seven and the larger one make eight.
    let values = [1.0f32, -1.0, 1.0, 2.0, 1.0, -1.0, 0.5, 1.0, 1.0, -1.0, 1.0, 0.25];
    let kept = |k: u64, columns: usize| -> Vec<usize> {
        let cut = Cut::of(&values, columns, k);
        let place = |index: usize| ((index / columns) as u64, (index % columns) as u64);
        (0..12).filter(|index| cut.takes(values[*index], || place(*index))).collect()
    };
    for columns in [1, 3, 4, 12] {
        assert_eq!(kept(8, columns), [0, 1, 2, 3, 4, 5, 7, 8]);
        assert_eq!(kept(1, columns), [3]);
        assert_eq!(kept(10, columns), [0, 1, 2, 3, 4, 5, 7, 8, 9, 10]);
        assert_eq!(kept(0, columns), [0; 0]);
        assert_eq!(kept(12, columns).len(), 12);
    }
    let ties = method("ties", serde_json::json!({"density": 0.67}));
    let whole = merged(ties, 3, &[&values], &[1.0], 4);
    for rows in [1, 2, 3] {
        assert_eq!(merged(ties, 3, &[&values], &[1.0], rows), whole);
    }
}

#[test]
fn thresholds_are_those_of_sorting() {
    // Values over many binades, with repetitions and zeros.
    let values: Vec<f32> = (0..5000u64)
        .map(|index| {
            let number = Mask::new(3, "values", 0).uniform(index % 4000);
            let scale = [1.0, 1e-3, 1e-20, 0.0, 1e-40][index as usize % 5];
            ((number - 0.5) * scale) as f32
        })
        .collect();
    let mut order: Vec<usize> = (0..values.len()).collect();
    order.sort_by_key(|place| (std::cmp::Reverse(values[*place].abs().to_bits()), *place));
    for k in [1, 2, 99, 1000, 2345, 3999, 4999] {
        let cut = Cut::of(&values, 50, k);
        let mut wanted = vec![false; values.len()];
        order[..k as usize].iter().for_each(|place| wanted[*place] = true);
        for (index, value) in values.iter().enumerate() {
            let is_kept = cut.takes(*value, || (index as u64 / 50, index as u64 % 50));
            // Zeros are the same, kept or not.
            assert!(is_kept == wanted[index] || *value == 0.0);
        }
    }
}

#[test]
fn updates_that_are_stored_transposed_are_ordered_as_they_are() {
    let ties: [f32; 12] = [1.0, -1.0, 1.0, 2.0, 1.0, -1.0, 0.5, 1.0, 1.0, -1.0, 1.0, 0.25];
    let turned = |values: &[f32; 12]| -> Vec<f32> {
        (0..12).map(|index| values[index % 4 * 3 + index / 4]).collect()
    };
    let options = [
        ("ties", serde_json::json!({"density": 0.6})),
        ("breadcrumbs_ties", serde_json::json!({"density": 0.5, "gamma": 0.2})),
        ("dare_ties", serde_json::json!({"density": 0.6})),
        ("della", serde_json::json!({"density": 0.5, "epsilon": 0.4})),
        ("della_linear", serde_json::json!({"density": 0.6, "epsilon": 0.2})),
        ("sce", serde_json::json!({"density": 0.6})),
    ];
    for (name, options) in options {
        let method = method(name, options);
        let wanted = merged(method, 3, &[&ties, &Q], &[1.0, 0.5], 4);
        let updates = [turned(&ties), turned(&Q)];
        let updates: Vec<&[f32]> = updates.iter().map(Vec::as_slice).collect();
        let finder = Finder::new(method, [3, 4], vec![1.0, 0.5], masks(2), 0).transposed();
        let mut found = vec![0.0; 12];
        finder.of(&updates).merge(0, &updates, &updates, &mut Room::default(), &mut found);
        let back: Vec<f64> = (0..12).map(|index| found[index % 3 * 4 + index / 3]).collect();
        assert!(
            back.iter().zip(&wanted).all(|(one, other)| (one - other).abs() < 1e-12),
            "{name}: {back:?} {wanted:?}"
        );
    }
}

#[test]
fn an_adapter_without_the_tensor_counts_as_zero() {
    let sce = method("sce", serde_json::json!({"select_topk": 0.5}));
    let zeros = [0.0f32; 12];
    let run = |updates: &[&[f32]], missing: usize| {
        let finder = Finder::new(sce, [4, 3], vec![1.0; updates.len()], Vec::new(), missing);
        let mut result = vec![0.0; 12];
        finder.of(updates).merge(0, updates, updates, &mut Room::default(), &mut result);
        result
    };
    assert_eq!(run(&[&P, &Q, &zeros], 0), run(&[&P, &Q], 1));
}

#[test]
fn options_outside_of_their_domain_are_refused_by_name() {
    let message = |name: &str, options: serde_json::Value| {
        let options = serde_json::from_value(options).expect("options");
        Method::new(name, &options).expect_err("it is refused").to_string()
    };
    for density in [0.0, -0.5, 1.5, f64::NAN] {
        let options = Options { density: Some(density), ..Options::default() };
        let error = Method::new("ties", &options).expect_err("it is refused");
        assert!(error.to_string().contains("density"), "{error}");
    }
    assert!(
        message("ties", serde_json::json!({"gamma": 0.1})).contains("takes no option \"gamma\"")
    );
    assert!(message("della", serde_json::json!({"density": 0.1})).contains("keep probabilities"));
    assert!(message("della", serde_json::json!({})).contains("keep probabilities"));
    assert!(message("breadcrumbs", serde_json::json!({"gamma": 1.0})).contains("gamma"));
    assert!(
        message("sce", serde_json::json!({"density": 0.5, "select_topk": 0.5})).contains("one")
    );
    assert!(message("lines", serde_json::json!({})).contains("breadcrumbs_ties"));
    method("della", serde_json::json!({"density": 0.7, "epsilon": 0.3}));
}
