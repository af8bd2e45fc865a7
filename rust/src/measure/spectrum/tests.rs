use proptest::prelude::*;

use super::*;
use crate::linalg::cross_product;

/// A matrix of numbers in −1..1 from a seed.
fn random(rows: usize, columns: usize, seed: u64) -> Matrix {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    let mut matrix = Matrix::zeros(rows, columns);
    for value in &mut matrix.data {
        state ^= state << 13;
        state ^= state >> 7;
        state ^= state << 17;
        *value = (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0;
    }
    matrix
}

fn row_major(matrix: &Matrix) -> Vec<f64> {
    matrix.transposed().data
}

fn narrow(values: &[f64]) -> Vec<f32> {
    values.iter().map(|&value| value as f32).collect()
}

/// s·B·A as an update in f64, for as long as `body` looks at it.
fn with_update<T>(b: &Matrix, a: &Matrix, scale: f64, body: impl FnOnce(&Update<'_>) -> T) -> T {
    let (left, right) = (row_major(b), row_major(a));
    let (left, right) = (Values::F64(&left), Values::F64(&right));
    body(&Update::new(b.rows, a.columns, b.columns, left, right, scale).unwrap())
}

fn spectrum(b: &Matrix, a: &Matrix, scale: f64) -> Spectrum {
    with_update(b, a, scale, Spectrum::of)
}

/// Fails unless the figures of two spectra agree.
fn assert_same(a: &Spectrum, b: &Spectrum, tolerance: f64) {
    let figures = |s: &Spectrum| {
        let mut all = s.singular_values.clone();
        all.extend([
            s.frobenius_norm,
            s.spectral_norm,
            s.stable_rank,
            s.participation_ratio,
            s.effective_rank,
            s.energy_effective_rank,
        ]);
        all
    };
    let (x, y) = (figures(a), figures(b));
    assert_eq!(x.len(), y.len());
    for (x, y) in x.iter().zip(&y) {
        assert!((x - y).abs() <= tolerance * y.abs(), "{x} is not {y}");
    }
    assert_eq!((a.k90, a.k95, a.k99), (b.k90, b.k95, b.k99));
    assert!((a.entry_mean - b.entry_mean).abs() <= tolerance * b.frobenius_norm);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn factored_equals_dense(m in 1usize..40, n in 1usize..40, r in 1usize..50, scale in 0.1..5.0f64, seed: u64) {
        let (b, a) = (random(m, r, seed), random(r, n, seed ^ 3));
        let found = spectrum(&b, &a, -scale);
        let mut product = b.product(&a);
        product.data.iter_mut().for_each(|x| *x *= scale);
        let expected = singular_values(&product);
        prop_assert_eq!(found.singular_values.len(), r.min(m).min(n));
        // The dense product is rounded itself, by r·2⁻⁵³·‖B‖·‖A‖ at most (Higham, §3.5), and twice
        // that leaves room for both decompositions.
        let norm_of = |x: &[f64]| x.iter().map(|x| x * x).sum::<f64>().sqrt();
        let rounding = r as f64 * f64::EPSILON * scale * norm_of(&b.data) * norm_of(&a.data);
        for (value, expected) in found.singular_values.iter().zip(&expected) {
            prop_assert!((value - expected).abs() <= 1e-12 * expected + rounding);
        }
        let squares: f64 = product.data.iter().map(|x| x * x).sum();
        prop_assert!((found.frobenius_norm - squares.sqrt()).abs() <= 1e-12 * squares.sqrt());
        let norm = with_update(&b, &a, scale, frobenius_norm);
        prop_assert!((norm - squares.sqrt()).abs() <= 1e-12 * squares.sqrt());
        let mean = -product.data.iter().sum::<f64>() / (m * n) as f64;
        prop_assert!((found.entry_mean - mean).abs() <= 1e-13 * found.spectral_norm);
    }

    #[test]
    fn the_gauge_and_the_place_of_alpha_do_not_matter(r in 1usize..12, seed: u64) {
        let (b, a) = (random(60, r, seed), random(r, 45, seed ^ 3));
        // An orthogonal mixture of stretched columns: condition 100.
        let q = Reflectors::of(random(r, r, seed ^ 5)).expand(&identity(r));
        let stretch: Vec<f64> = (0..r).map(|i| 100f64.powf(i as f64 / r as f64)).collect();
        let back: Vec<f64> = stretch.iter().map(|x| 1.0 / x).collect();
        let gauge = q.scaled_product(&stretch, &q);
        let inverse = q.scaled_product(&back, &q);
        let plain = spectrum(&b, &a, 2.0);
        assert_same(&spectrum(&b.product(&gauge), &inverse.product(&a), 2.0), &plain, 1e-9);
        let baked = b.scaled_product(&vec![2.0; r], &identity(r));
        assert_same(&spectrum(&baked, &a, 1.0), &plain, 1e-12);
    }

    #[test]
    fn a_sum_of_products_is_one_update(seed: u64) {
        let (b1, a1) = (random(30, 3, seed), random(3, 20, seed ^ 1));
        let (b2, a2) = (random(30, 5, seed ^ 2), random(5, 20, seed ^ 4));
        let (l1, r1, l2, r2) = (row_major(&b1), row_major(&a1), row_major(&b2), row_major(&a2));
        let one = Update::new(30, 20, 3, Values::F64(&l1), Values::F64(&r1), 1.5).unwrap();
        let two = Update::new(30, 20, 5, Values::F64(&l2), Values::F64(&r2), -0.5).unwrap();
        let sum = Spectrum::of(&one.plus(&two).unwrap());
        let mut product = b1.product(&a1);
        for (x, y) in product.data.iter_mut().zip(b2.product(&a2).data) {
            *x = 1.5 * *x - 0.5 * y;
        }
        for (value, expected) in sum.singular_values.iter().zip(singular_values(&product)) {
            prop_assert!((value - expected).abs() <= 1e-12 * expected);
        }
    }
}

fn identity(size: usize) -> Matrix {
    let mut matrix = Matrix::zeros(size, size);
    for index in 0..size {
        matrix.set(index, index, 1.0);
    }
    matrix
}

#[test]
fn small_values_survive_f32_factors() {
    // Columns graded over seven decades; what the f32 factors hold is found by QR of the dense
    // product's own small side, with no Gram matrix in between.
    for shortest in [1e-4, 1e-6, 1e-7] {
        let rank = 8;
        let grade = |i: usize| f64::powf(shortest, i as f64 / (rank - 1) as f64);
        let grades: Vec<f64> = (0..rank).map(grade).collect();
        let u = Reflectors::of(random(700, rank, 1)).expand(&identity(rank));
        let v = Reflectors::of(random(500, rank, 2)).expand(&identity(rank));
        // Mix, so that no factor is graded by columns.
        let q = Reflectors::of(random(rank, rank, 3)).expand(&identity(rank));
        let b = narrow(&row_major(&u.scaled_product(&grades, &q)));
        let a = narrow(&row_major(&q.transposed().product(&v.transposed())));
        let update = Update::new(700, 500, rank, Values::F32(&b), Values::F32(&a), 1.0).unwrap();
        let found = Spectrum::of(&update);
        let widen = |x: &[f32], rows, columns| {
            Matrix { rows: columns, columns: rows, data: x.iter().map(|&x| f64::from(x)).collect() }
                .transposed()
        };
        let dense = widen(&b, 700, rank).product(&widen(&a, rank, 500));
        let expected = singular_values(&dense);
        for (value, expected) in found.singular_values.iter().zip(&expected) {
            assert!((value / expected - 1.0).abs() < 1e-6, "{shortest}: {value} {expected}");
        }
    }
}

#[test]
fn figures_of_a_known_spectrum() {
    // σ = 2, 1, 1 by diagonal factors.
    let mut b = Matrix::zeros(4, 3);
    let mut a = Matrix::zeros(3, 5);
    for (i, value) in [1.0, -2.0, 1.0].into_iter().enumerate() {
        b.set(i, i, value);
        a.set(i, i, 1.0);
    }
    let found = spectrum(&b, &a, 1.0);
    assert_eq!(found.singular_values, [2.0, 1.0, 1.0]);
    assert!((found.frobenius_norm - 6f64.sqrt()).abs() < 1e-15);
    assert!((found.stable_rank - 1.5).abs() < 1e-15);
    assert!((found.participation_ratio - 2.0).abs() < 1e-15);
    // exp(½ ln 2 + 2·¼ ln 4) and exp(⅔ ln 3/2 + 2·⅙ ln 6).
    assert!((found.effective_rank - 2f64.powf(1.5)).abs() < 1e-14);
    assert!((found.energy_effective_rank - 1.5f64.powf(2.0 / 3.0) * 6f64.cbrt()).abs() < 1e-14);
    assert_eq!((found.k90, found.k95, found.k99), (3, 3, 3));
    assert_eq!((found.condition_number, found.numerical_rank), (2.0, 3));
    assert_eq!(found.entry_mean, 0.0);
}

#[test]
fn a_geometric_spectrum_has_the_published_effective_ranks() {
    let sigma: Vec<f64> = (0..16).map(|i| 1e-2f64.powf(f64::from(i) / 15.0)).collect();
    let b = identity(16).scaled_product(&sigma, &identity(16));
    let found = spectrum(&b, &identity(16), 1.0);
    let near = |value: f64, expected: f64| assert!((value - expected).abs() < 0.005, "{value}");
    near(found.effective_rank, 8.51);
    near(found.energy_effective_rank, 4.49);
    near(found.participation_ratio, 3.36);
    near(found.stable_rank, 2.18);
}

#[test]
fn degenerate_updates_have_defined_figures() {
    let (b, a) = (random(6, 2, 1), random(2, 5, 2));
    let zero = spectrum(&Matrix::zeros(6, 2), &a, 1.0);
    assert_eq!(zero.singular_values, [0.0, 0.0]);
    assert_eq!((zero.frobenius_norm, zero.effective_rank, zero.k99), (0.0, 0.0, 0));
    assert_eq!(zero.condition_number, f64::INFINITY);
    let mut broken = b.clone();
    broken.set(3, 1, f64::NAN);
    for found in [spectrum(&broken, &a, 1.0), spectrum(&b, &a, f64::INFINITY)] {
        assert!(!found.is_finite() && found.stable_rank.is_nan() && found.entry_mean.is_nan());
        assert!(found.singular_values.len() == 2 && found.singular_values[0].is_nan());
    }
    for (m, n, r) in [(0, 5, 2), (6, 0, 2), (6, 5, 0)] {
        let empty = spectrum(&Matrix::zeros(m, r), &Matrix::zeros(r, n), 1.0);
        assert_eq!((empty.singular_values.len(), empty.frobenius_norm), (0, 0.0));
    }
    // One column repeated: the rank is 1 of 2.
    let mut twice = b.clone();
    let first = twice.column(0).to_vec();
    twice.column_mut(1).copy_from_slice(&first);
    assert_eq!(spectrum(&twice, &a, 1.0).numerical_rank, 1);
    let wrong = Update::new(6, 5, 3, Values::F64(&[0.0; 12]), Values::F64(&[0.0; 15]), 1.0);
    assert!(wrong.unwrap_err().to_string().contains("[6, 3]"));
}

#[test]
fn stored_bytes_are_factors_too() {
    let (b, a) = (random(70, 3, 1), random(3, 50, 2));
    let (left, right) = (row_major(&b), narrow(&row_major(&a)));
    let bytes: Vec<u8> =
        std::iter::once(0).chain(right.iter().flat_map(|x| x.to_le_bytes())).collect();
    let stored = crate::measure::statistics::Tensor::new(
        &bytes[1..],
        crate::measure::statistics::ElementType::F32,
    );
    let of = |right| Update::new(70, 50, 3, Values::F64(&left), right, 1.0).unwrap();
    let found = Spectrum::of(&of(Values::Stored(stored.unwrap())));
    assert_eq!(found, Spectrum::of(&of(Values::F32(&right))));
}

#[test]
fn the_threads_do_not_matter() {
    for shortest in [1.0, 1e-7] {
        let mut b = random(5000, 6, 1);
        b.column_mut(5).iter_mut().for_each(|x| *x *= shortest);
        let a = random(6, 4500, 2);
        let run = |threads| {
            let pool = crate::parallel::task::build_pool(Some(threads)).unwrap();
            pool.install(|| spectrum(&b, &a, 1.0))
        };
        assert_eq!(run(1), run(3));
    }
}

#[test]
fn the_decomposition_of_an_update_multiplies_back() {
    let (b, a) = (random(50, 4, 1), random(4, 30, 2));
    let found = with_update(&b, &a, -1.5, decompose_update).unwrap();
    let product = found.left.scaled_product(&found.values, &found.right);
    for (x, y) in product.data.iter().zip(b.product(&a).data) {
        assert!((x + 1.5 * y).abs() < 1e-13);
    }
    let inner = cross_product(&found.left, &found.left);
    assert!((inner.get(2, 2) - 1.0).abs() < 1e-14 && inner.get(1, 2).abs() < 1e-14);
}
