use proptest::prelude::*;

use super::*;

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

fn distance(a: &Matrix, b: &Matrix) -> f64 {
    assert_eq!((a.rows, a.columns), (b.rows, b.columns));
    a.data.iter().zip(&b.data).fold(0.0, |m, (x, y)| m.max((x - y).abs()))
}

fn identity(size: usize) -> Matrix {
    let mut matrix = Matrix::zeros(size, size);
    for index in 0..size {
        matrix.set(index, index, 1.0);
    }
    matrix
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(40))]

    #[test]
    fn products_equal_the_plain_ones(length in 0usize..5000, a in 1usize..20, b in 1usize..20, seed: u64) {
        let (x, y) = (random(length, a, seed), random(length, b, seed ^ 1));
        let plain = x.transposed().product(&y);
        prop_assert!(distance(&cross_product(&x, &y), &plain) < 1e-10);
        prop_assert!(distance(&gram(&x), &x.transposed().product(&x)) < 1e-10);
        let (_, sums) = gram_and_sums(&x);
        prop_assert_eq!(sums.len(), a);
        for (column, sum) in sums.iter().enumerate() {
            let plain: f64 = x.column(column).iter().sum();
            prop_assert!((sum - plain).abs() < 1e-10);
        }
    }

    #[test]
    fn qr_and_its_tree_and_cholesky_give_one_gram(rows in 1usize..1500, columns in 1usize..24, seed: u64) {
        let matrix = random(rows, columns, seed);
        let squared = gram(&matrix);
        let reflectors = Reflectors::of(matrix.clone());
        let triangle = reflectors.triangle();
        prop_assert!(distance(&gram(&triangle), &squared) < 1e-10);
        prop_assert!(distance(&gram(&triangular_factor(&matrix)), &squared) < 1e-10);
        prop_assert!(distance(&reflectors.expand(&triangle), &matrix) < 1e-12);
        let q = reflectors.expand(&identity(triangle.rows));
        prop_assert!(distance(&gram(&q), &identity(triangle.rows)) < 1e-13);
        if let Some(factor) = gram_factor(&squared) {
            prop_assert!(distance(&gram(&factor), &squared) < 1e-10);
        }
    }

    #[test]
    fn the_decomposition_multiplies_back(rows in 1usize..40, columns in 1usize..40, seed: u64) {
        let matrix = random(rows, columns, seed);
        let Decomposition { left, values, right } = decompose(&matrix);
        let size = rows.min(columns);
        prop_assert_eq!(values.len(), size);
        prop_assert!(values.is_sorted_by(|a, b| a >= b));
        prop_assert!(distance(&gram(&left), &identity(size)) < 1e-13);
        prop_assert!(distance(&gram(&right), &identity(size)) < 1e-13);
        prop_assert!(distance(&left.scaled_product(&values, &right), &matrix) < 1e-13);
        for (a, b) in values.iter().zip(singular_values(&matrix)) {
            prop_assert!((a - b).abs() <= 1e-13 * values[0]);
        }
    }
}

#[test]
fn graded_columns_keep_every_singular_value() {
    // X·D with orthonormal X: the singular values are D's diagonal, sixty decades apart.
    let q = Reflectors::of(random(30, 6, 3)).expand(&identity(6));
    let expected = [1e30, 1e18, 1e6, 1e-6, 1e-18, 1e-30];
    let values = singular_values(&q.scaled_product(&expected, &identity(6)));
    for (value, expected) in values.iter().zip(expected) {
        assert!((value / expected - 1.0).abs() < 1e-13, "{value} {expected}");
    }
}

#[test]
fn an_ill_conditioned_gram_is_refused() {
    let mut matrix = random(50, 3, 5);
    let copy: Vec<f64> = matrix.column(0).iter().map(|x| x * (1.0 + 1e-9)).collect();
    matrix.column_mut(2).copy_from_slice(&copy);
    assert!(gram_factor(&gram(&matrix)).is_none());
    assert!(gram_factor(&gram(&random(50, 3, 5))).is_some());
}

#[test]
fn zero_and_empty_matrices_decompose() {
    assert_eq!(singular_values(&Matrix::zeros(4, 3)), [0.0; 3]);
    assert_eq!(singular_values(&Matrix::zeros(0, 3)), [] as [f64; 0]);
    assert_eq!(decompose(&Matrix::zeros(3, 4)).values, [0.0; 3]);
    assert_eq!(decompose(&Matrix::zeros(3, 0)).values.len(), 0);
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(200))]

    #[test]
    fn the_two_ways_to_singular_values_agree(size in 1usize..70, fall in 0.0f64..0.9, rank in 1usize..70, seed: u64) {
        // Graded columns, a few orders of magnitude apart, and sometimes of lower rank.
        let mut matrix = random(size, size, seed);
        for column in 0..size {
            let factor = if column < rank { (-fall * column as f64).exp() } else { 0.0 };
            matrix.column_mut(column).iter_mut().for_each(|value| *value *= factor);
        }
        let mixed = matrix.product(&random(size, size, seed ^ 1));
        for matrix in [matrix, mixed] {
            let exact = singular_values(&matrix);
            let quick = leading_singular_values(&matrix).expect("converges");
            prop_assert_eq!(quick.len(), size);
            for (a, b) in quick.iter().zip(&exact) {
                prop_assert!((a - b).abs() <= 1e-14 * size as f64 * exact[0], "{} {}", a, b);
            }
        }
    }
}

#[test]
fn singular_values_of_special_matrices_converge() {
    let ones = Matrix { rows: 5, columns: 5, data: vec![1.0; 25] };
    let mut shift = Matrix::zeros(6, 6);
    for index in 0..5 {
        shift.set(index, index + 1, 1.0);
    }
    let mut tiny = identity(4);
    tiny.data.iter_mut().for_each(|value| *value *= 1e-300);
    for (matrix, expected) in [
        (identity(7), vec![1.0; 7]),
        (Matrix::zeros(3, 3), vec![0.0; 3]),
        (ones, vec![5.0, 0.0, 0.0, 0.0, 0.0]),
        (shift, vec![1.0, 1.0, 1.0, 1.0, 1.0, 0.0]),
        (tiny, vec![1e-300; 4]),
    ] {
        let found = leading_singular_values(&matrix).expect("converges");
        for (a, b) in found.iter().zip(&expected) {
            assert!((a - b).abs() <= 1e-14 * expected[0], "{found:?}");
        }
    }
}
