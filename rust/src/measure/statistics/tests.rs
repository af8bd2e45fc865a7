use half::{bf16, f16};
use proptest::prelude::*;

use super::*;

fn bytes_of(values: &[f64], element: ElementType) -> Vec<u8> {
    values
        .iter()
        .flat_map(|&value| match element {
            ElementType::F16 => f16::from_f64(value).to_le_bytes().to_vec(),
            ElementType::BF16 => bf16::from_f64(value).to_le_bytes().to_vec(),
            ElementType::F32 => (value as f32).to_le_bytes().to_vec(),
            ElementType::F64 => value.to_le_bytes().to_vec(),
            ElementType::I32 => (value as i32).to_le_bytes().to_vec(),
            ElementType::I8 => (value as i8).to_le_bytes().to_vec(),
            _ => unreachable!(),
        })
        .collect()
}

/// The finite values, ascending, by plain decoding.
fn sorted(tensors: &[Tensor<'_>]) -> Vec<f64> {
    let mut values = Vec::new();
    for tensor in tensors {
        let mut decoded = vec![0.0; tensor.len()];
        tensor.decode_long(&mut decoded);
        values.extend(decoded.into_iter().filter(|value| value.is_finite()));
    }
    values.sort_by(f64::total_cmp);
    values
}

fn percentile(sorted: &[f64], q: f64) -> f64 {
    let place = (sorted.len() - 1) as f64 * (q / 100.0);
    let (low, high) = (sorted[place.floor() as usize], sorted[place.ceil() as usize]);
    let share = place - place.floor();
    if share >= 0.5 { high - (high - low) * (1.0 - share) } else { low + (high - low) * share }
}

fn counts_between(values: &[f64], edges: &[f64]) -> Vec<u64> {
    let last = edges.len() - 1;
    (0..last)
        .map(|bin| {
            let is_in = |&&value: &&f64| {
                value >= edges[bin]
                    && (value < edges[bin + 1] || (bin == last - 1 && value <= edges[last]))
            };
            values.iter().filter(is_in).count() as u64
        })
        .collect()
}

fn request() -> Request {
    Request {
        percentiles: vec![0.0, 1.0, 25.0, 50.0, 75.0, 95.0, 99.0, 100.0],
        histogram: Some(Bins::Automatic(13)),
        log_histogram: Some(Bins::Automatic(9)),
    }
}

/// Compares everything with a computation that sorts and sums plainly.
fn check(tensors: &[Tensor<'_>], found: &Summary, request: &Request) {
    let values = sorted(tensors);
    let n = values.len() as f64;
    assert_eq!(found.count - found.non_finite, values.len() as u64);
    if values.is_empty() {
        assert!(found.mean.is_nan() && found.min.is_nan() && found.percentiles[0].is_nan());
        return;
    }
    let mean = values.iter().sum::<f64>() / n;
    let central = |power| values.iter().map(|x| (x - mean).powi(power)).sum::<f64>() / n;
    let close =
        |a: f64, b: f64, unit: f64| (a - b).abs() <= 1e-11 * unit || a.to_bits() == b.to_bits();
    let size = values.iter().fold(0.0f64, |m, x| m.max(x.abs()));
    assert!(close(found.mean, mean, size), "{} {mean}", found.mean);
    assert!(close(found.std, central(2).sqrt(), size));
    assert_eq!((found.min, found.max), (values[0], values[values.len() - 1]));
    assert_eq!(found.max_norm, size);
    assert!(close(found.l1_norm, values.iter().map(|x| x.abs()).sum(), size * n));
    assert!(close(found.l2_norm, values.iter().map(|x| x * x).sum::<f64>().sqrt(), size * n));
    assert_eq!(found.zeros, values.iter().filter(|&&x| x == 0.0).count() as u64);
    if central(2).sqrt() > 1e-6 * size {
        let skewness = central(3) / central(2).powf(1.5);
        let kurtosis = central(4) / central(2).powi(2) - 3.0;
        assert!((found.skewness - skewness).abs() <= 1e-7 * (1.0 + skewness.abs()));
        assert!((found.kurtosis - kurtosis).abs() <= 1e-7 * (1.0 + kurtosis.abs()));
    }
    for (&q, &value) in request.percentiles.iter().zip(&found.percentiles) {
        assert_eq!(value, percentile(&values, q), "percentile {q}");
    }
    let histogram = found.histogram.as_ref().unwrap();
    assert_eq!(histogram.counts, counts_between(&values, &histogram.edges));
    let logs: Vec<f64> = values.iter().map(|&x| log_magnitude(x)).collect();
    let histogram = found.log_histogram.as_ref().unwrap();
    assert_eq!(histogram.counts, counts_between(&logs, &histogram.edges));
}

fn elements() -> impl Strategy<Value = ElementType> {
    prop::sample::select(vec![
        ElementType::F16,
        ElementType::BF16,
        ElementType::F32,
        ElementType::F64,
        ElementType::I32,
        ElementType::I8,
    ])
}

/// Values of several shapes: spread over decades, tied, constant, or with holes.
fn values() -> impl Strategy<Value = Vec<f64>> {
    let wide = (-30.0..30.0f64, -9..4i32).prop_map(|(x, e)| x * 10f64.powi(e));
    let holed = prop_oneof![
        4 => -2.0..2.0f64,
        1 => Just(0.0), 1 => Just(-0.0), 1 => Just(f64::NAN),
        1 => Just(f64::INFINITY), 1 => Just(f64::NEG_INFINITY),
    ];
    let narrow = (0..400u32).prop_map(|i| 1.0 + f64::from(i) * 1e-6);
    prop_oneof![
        prop::collection::vec(wide, 0..3000),
        prop::collection::vec(holed, 0..300),
        prop::collection::vec(narrow, 0..3000),
        (0..5000usize, -3.0..3.0f64).prop_map(|(n, x)| vec![x; n]),
    ]
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(120))]

    #[test]
    fn everything_equals_sorting_and_summing(
        parts in prop::collection::vec((values(), elements()), 0..4), shift in 0usize..3,
    ) {
        // At an odd offset, so that no element is aligned.
        let stored: Vec<(Vec<u8>, ElementType)> = parts
            .iter()
            .map(|(values, element)| {
                let mut bytes = vec![0; shift];
                bytes.extend(bytes_of(values, *element));
                (bytes, *element)
            })
            .collect();
        let tensors: Vec<Tensor<'_>> = stored
            .iter()
            .map(|(bytes, element)| Tensor::new(&bytes[shift..], *element).unwrap())
            .collect();
        let request = request();
        let all = describe(&tensors, &request).unwrap();
        check(&tensors, &all, &request);
        let (each, together) = describe_each(&tensors, &request, &Task::new()).unwrap();
        prop_assert_eq!(format!("{together:?}"), format!("{all:?}"));
        for (tensor, found) in tensors.iter().zip(&each) {
            check(std::slice::from_ref(tensor), found, &request);
        }
    }
}

/// Numbers with a heavy tail, more than several units of work hold.
fn many(count: usize) -> Vec<f64> {
    let mut state = 1u64;
    (0..count)
        .map(|_| {
            state = state.wrapping_mul(6364136223846793005).wrapping_add(1442695040888963407);
            let x = (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
            x * x * x * 0.1
        })
        .collect()
}

#[test]
fn the_threads_do_not_matter() {
    for element in [ElementType::F32, ElementType::F64, ElementType::BF16] {
        let bytes = bytes_of(&many(1_500_000), element);
        let tensors = [Tensor::new(&bytes, element).unwrap()];
        let run = |threads| {
            let pool = crate::parallel::task::build_pool(Some(threads)).unwrap();
            pool.install(|| describe(&tensors, &request()).unwrap())
        };
        let one = run(1);
        assert_eq!(one, run(3));
        check(&tensors, &one, &request());
    }
}

#[test]
fn crowded_buckets_are_counted_by_further_digits() {
    // All in one bucket of the upper 16 bits, and more than are kept one by one.
    let values: Vec<f64> = (0..90_000).map(|i| 1.0 + f64::from(i % 50_000) * 1e-9).collect();
    for element in [ElementType::F32, ElementType::F64] {
        let bytes = bytes_of(&values, element);
        let tensors = [Tensor::new(&bytes, element).unwrap()];
        check(&tensors, &describe(&tensors, &request()).unwrap(), &request());
    }
}

#[test]
fn unusable_requests_are_refused() {
    let refuse =
        |request: Request| assert!(describe::<Tensor>(&[], &request).is_err(), "{request:?}");
    refuse(Request { percentiles: vec![101.0], ..Request::default() });
    refuse(Request { percentiles: vec![f64::NAN], ..Request::default() });
    refuse(Request { histogram: Some(Bins::Automatic(0)), ..Request::default() });
    refuse(Request { log_histogram: Some(Bins::Edges(vec![1.0])), ..Request::default() });
    refuse(Request { histogram: Some(Bins::Edges(vec![1.0, 0.0])), ..Request::default() });
}
