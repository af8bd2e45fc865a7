use proptest::prelude::*;

use super::*;
use crate::measure::spectrum::Values;

/// Numbers in −1..1 from a seed.
fn random(count: usize, seed: u64) -> Vec<f64> {
    let mut state = seed.wrapping_mul(0x9e37_79b9_7f4a_7c15) | 1;
    (0..count)
        .map(|_| {
            state ^= state << 13;
            state ^= state >> 7;
            state ^= state << 17;
            (state >> 11) as f64 / (1u64 << 52) as f64 - 1.0
        })
        .collect()
}

/// Factors, row-major, and what they are of.
struct Owned {
    rows: usize,
    columns: usize,
    rank: usize,
    b: Vec<f64>,
    a: Vec<f64>,
    scale: f64,
}

impl Owned {
    fn random(rows: usize, columns: usize, rank: usize, scale: f64, seed: u64) -> Self {
        let (b, a) = (random(rows * rank, seed), random(rank * columns, seed ^ 99));
        Self { rows, columns, rank, b, a, scale }
    }

    fn update(&self) -> Update<'_> {
        let (b, a) = (Values::F64(&self.b), Values::F64(&self.a));
        Update::new(self.rows, self.columns, self.rank, b, a, self.scale).unwrap()
    }

    fn dense(&self) -> Vec<f64> {
        let mut entries = vec![0.0; self.rows * self.columns];
        for row in 0..self.rows {
            for k in 0..self.rank {
                for column in 0..self.columns {
                    entries[row * self.columns + column] += self.scale
                        * self.b[row * self.rank + k]
                        * self.a[k * self.columns + column];
                }
            }
        }
        entries
    }
}

fn dot(x: &[f64], y: &[f64]) -> f64 {
    x.iter().zip(y).map(|(a, b)| a * b).sum()
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(60))]

    #[test]
    fn alignment_equals_the_dense_one(
        m in 1usize..40, n in 1usize..40, r in 1usize..6, q in 1usize..9,
        s in -2.0..-0.1f64, seed: u64,
    ) {
        let (x, y) = (Owned::random(m, n, r, s, seed), Owned::random(m, n, q, 0.7, seed ^ 1));
        let (dx, dy) = (x.dense(), y.dense());
        let found = Alignment::of(&x.update(), &y.update()).unwrap();
        let norms = [dot(&dx, &dx).sqrt(), dot(&dy, &dy).sqrt()];
        let unit = norms[0] * norms[1];
        prop_assert!((found.inner_product - dot(&dx, &dy)).abs() <= 1e-11 * (unit + 1.0));
        prop_assert!((found.cosine - dot(&dx, &dy) / unit).abs() <= 1e-10);
        let difference: Vec<f64> = dx.iter().zip(&dy).map(|(a, b)| a - b).collect();
        let expected = dot(&difference, &difference).sqrt();
        prop_assert!((found.difference_norm - expected).abs() <= 1e-11 * (expected + 1.0));
        let compared = dx.iter().zip(&dy).filter(|(a, b)| (**a > 0.0) == (**b > 0.0)).count();
        let signs = sign_agreement(&x.update(), &y.update(), SIGN_SAMPLES, 0).unwrap();
        prop_assert!(!signs.sampled);
        prop_assert_eq!((signs.compared, signs.agreeing), ((m * n) as u64, compared as u64));
    }

    #[test]
    fn a_multiple_points_the_same_or_the_opposite_way(c in prop::num::f64::NORMAL, seed: u64) {
        prop_assume!((1e-100..1e100).contains(&c.abs()));
        let x = Owned::random(33, 21, 4, 1.0, seed);
        let update = x.update();
        let found = cosine(&update, &update.scaled(c)).unwrap();
        prop_assert!((found - c.signum()).abs() < 1e-12);
        let bases = SingularBases::of(&update).unwrap();
        let others = SingularBases::of(&update.scaled(c)).unwrap();
        prop_assert!(bases.left_angles(&others, 4, 4).unwrap().grassmann_distance < 1e-12);
        prop_assert!((bases.right_similarity(&others).unwrap().phi(4, 4).unwrap() - 1.0).abs() < 1e-12);
    }
}

#[test]
fn the_difference_of_near_duplicates_keeps_its_digits() {
    let x = Owned::random(60, 50, 4, 1.0, 1);
    let mut y = Owned::random(60, 50, 4, 1.0, 1);
    y.b[17] += 1e-10;
    // The difference is 1e-10 times one row of A.
    let k = 17 % 4;
    let row = &y.a[k * 50..(k + 1) * 50];
    let step = y.b[17] - x.b[17];
    let expected = step * dot(row, row).sqrt();
    let found = difference_norm(&x.update(), &y.update()).unwrap();
    assert!((found / expected - 1.0).abs() < 1e-4, "{found} {expected}");
    assert!(difference_norm(&x.update(), &x.update()).unwrap() < 1e-13);
}

/// An update whose left singular vectors are two orthonormal columns.
fn with_left(columns: [Vec<f64>; 2]) -> Owned {
    let rows = columns[0].len();
    let b = (0..rows).flat_map(|row| [2.0 * columns[0][row], columns[1][row]]).collect();
    let mut a = vec![0.0; 2 * 3];
    (a[0], a[4]) = (1.0, 1.0);
    Owned { rows, columns: 3, rank: 2, b, a, scale: 1.0 }
}

fn unit(rows: usize, entries: &[(usize, f64)]) -> Vec<f64> {
    let mut vector = vec![0.0; rows];
    for &(row, value) in entries {
        vector[row] = value;
    }
    vector
}

#[test]
fn planted_angles_are_found() {
    for (small, large) in [(1e-9, 1.0), (1e-3, 1.5), (0.3, 0.9), (0.0, 1.2)] {
        let x = with_left([unit(7, &[(0, 1.0)]), unit(7, &[(1, 1.0)])]);
        let y = with_left([
            unit(7, &[(1, f64::cos(large)), (2, f64::sin(large))]),
            unit(7, &[(0, f64::cos(small)), (3, f64::sin(small))]),
        ]);
        let (x, y) =
            (SingularBases::of(&x.update()).unwrap(), SingularBases::of(&y.update()).unwrap());
        let found = x.left_angles(&y, usize::MAX, 2).unwrap();
        assert!((found.angles[0] - small).abs() <= 1e-9 * small + 1e-15, "{:?}", found.angles);
        assert!((found.angles[1] - large).abs() < 1e-14);
        assert!((found.grassmann_distance - small.hypot(large)).abs() < 1e-14);
        assert!((found.chordal_distance - small.sin().hypot(large.sin())).abs() < 1e-14);
        // The first directions are orthogonal; the second of the one is near the first of the
        // other.
        let phi = x.left_similarity(&y).unwrap();
        assert!(phi.phi(1, 1).unwrap().abs() < 1e-15);
        assert!((phi.phi(1, 2).unwrap() - small.cos().powi(2)).abs() < 1e-14);
        let both = (small.cos().powi(2) + large.cos().powi(2)) / 2.0;
        assert!((phi.phi(2, 2).unwrap() - both).abs() < 1e-14);
        assert_eq!((phi.phi(0, 1), phi.phi(3, 1)), (None, None));
        // One direction against two.
        let one = x.left_angles(&y, 1, 2).unwrap();
        assert_eq!(one.angles.len(), 1);
        assert!((one.angles[0] - small).abs() <= 1e-9 * small + 1e-15);
    }
}

#[test]
fn random_subspaces_meet_their_expectation() {
    let (mut sum, runs) = (0.0, 40);
    for seed in 0..runs {
        let x = Owned::random(200, 30, 6, 1.0, seed * 2 + 1);
        let y = Owned::random(200, 30, 10, 1.0, seed * 2 + 2000);
        let bases = SingularBases::of(&x.update()).unwrap();
        let phi = bases.left_similarity(&SingularBases::of(&y.update()).unwrap()).unwrap();
        assert_eq!(phi.expected(6, 10), 0.05);
        sum += phi.phi(6, 10).unwrap();
    }
    let mean = sum / runs as f64;
    assert!((mean - 0.05).abs() < 0.003, "{mean}");
}

#[test]
fn sampled_signs_are_near_the_exact_ones_and_repeatable() {
    let (x, y) = (Owned::random(700, 600, 3, 1.0, 1), Owned::random(700, 600, 5, 1.0, 2));
    let mixed = x.update().plus(&y.update()).unwrap();
    let exact = sign_agreement(&x.update(), &mixed, usize::MAX, 0).unwrap();
    let run = |threads, seed| {
        let pool = crate::parallel::task::build_pool(Some(threads)).unwrap();
        pool.install(|| sign_agreement(&x.update(), &mixed, 1 << 16, seed).unwrap())
    };
    let sampled = run(1, 7);
    assert!(sampled.sampled && sampled.compared == 1 << 16);
    assert!((sampled.share - exact.share).abs() < 0.01, "{sampled:?} {exact:?}");
    assert_eq!(sampled, run(3, 7));
    assert_ne!(sampled, run(1, 8));
}

#[test]
fn degenerate_pairs_have_defined_figures() {
    let x = Owned::random(6, 5, 2, 1.0, 1);
    let zero = Owned::random(6, 5, 2, 0.0, 1);
    let found = Alignment::of(&x.update(), &zero.update()).unwrap();
    assert!(found.cosine.is_nan());
    assert!((found.relative_difference - 1.0).abs() < 1e-14);
    assert_eq!(SingularBases::of(&zero.update()).unwrap().rank(), 0);
    assert!(SingularBases::of(&x.update().scaled(f64::NAN)).is_none());
    let signs = sign_agreement(&x.update(), &zero.update(), 100, 0).unwrap();
    assert!(signs.compared == 0 && signs.share.is_nan());
    let other = Owned::random(5, 6, 2, 1.0, 1);
    assert!(cosine(&x.update(), &other.update()).is_err());
}
