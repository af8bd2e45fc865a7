//! The leading singular triplets of a large matrix by a randomized method, with a bound on what they miss.
//!
//! A basis Q of what D does to random vectors is improved by power iterations, and D is replaced by QQᵀD
//! (Halko, Martinsson and Tropp 2011, arXiv:0909.4061). With E = D − QQᵀD, ‖E‖² = ‖D‖² − ‖QᵀD‖² is
//! exact, σ̂ᵢ ≤ σᵢ, and Σ_{i≤k}(σᵢ² − σ̂ᵢ²) ≤ ‖E‖². Where the kept values stand clear of E, the residual S
//! = DV − ÛΣ̂ tells more: σ̂ᵢ² are eigenvalues of a diagonal block of DDᵀ whose other block is no larger than
//! τ ≥ ‖E‖₂² and whose corner is SΣ̂, so that σᵢ² − σ̂ᵢ² ≤ 2‖SΣ̂‖²/(g + √(g² + 4‖SΣ̂‖²)), g = σ̂ᵢ² − τ
//! (Li and Li 2005, doi:10.1016/j.laa.2004.07.026). S costs a pass over D, and its DV is then the better
//! left side: DV·Vᵀ has ‖S‖² more of D than QQᵀD, since S is orthogonal to Û.

use std::ops::Range;

use rayon::prelude::*;
use serde::{Deserialize, Serialize};

use crate::algebra::factored::Rows;
use crate::error::Result;
use crate::linalg::{Matrix, Multiply, Reflectors, View, decompose, gram_factor};

/// Terms of a sum that are added in f32; such sums are added in f64.
const DEPTH: usize = 512;
/// Elements of the rows that are worked on together.
const TILE: usize = 1 << 20;
/// Columns of the transposed product that are.
const BLOCK: usize = 512;
/// Rows of them in f64, which stay in the cache.
const DOUBLE_DEPTH: usize = 128;
/// Elements of the rows of a matrix that is not held in memory.
const BAND: usize = 1 << 24;
/// What rounding a vector to f32, and a sum of [`DEPTH`] terms, can add to a column of a product, over ‖D‖.
const SINGLE: f64 = (DEPTH + 8) as f64 * 5.960_464_477_539_063e-8;
/// What rounding in f64 can add to ‖E‖², over ‖D‖².
const DOUBLE: f64 = 1e-11;
/// A certificate below this share of the error squared asks for no further power iteration: the error is then
/// half a percent above the optimum at most.
const EXCESS: f64 = 1e-2;
/// Nor does one below this, whatever the error, and one above the other always does.
const ROOM: (f64, f64) = (1e-8, 1e-4);
/// Nor does an iteration that took less than this share off the error squared.
const GAIN: f64 = 1e-2;
/// Power iterations at most.
const ITERATIONS: usize = 4;
/// The least share of a column that stands clear of those before it for a Cholesky factor to be trusted.
const LEAST_PIVOT: f64 = 1e-12;

/// A matrix of which rows are read, as often as they are needed.
pub(in crate::algebra) trait Source: Sync {
    /// Rows and columns.
    fn shape(&self) -> [usize; 2];

    /// All of it row after row, where it is in memory.
    fn held(&self) -> Option<&[f32]>;

    /// Reads some rows.
    fn read(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()>;
}

/// Leading singular triplets.
pub(super) struct Leading {
    pub spectrum: Spectrum,
    /// Û, m×l.
    pub left: Rows,
    /// V̂, n×l.
    pub right: Rows,
}

/// Leading singular values, and what is known of the others.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
pub(super) struct Spectrum {
    /// σ̂, descending.
    pub values: Vec<f64>,
    /// ‖D‖².
    pub total: f64,
    /// What S = DV̂ − ÛΣ̂ tells; none where it was not made.
    residuals: Option<Residuals>,
}

/// What a spectrum was before it was improved, the norms of the columns of S, and whether it was.
#[derive(Debug, Clone, Serialize, Deserialize)]
struct Residuals {
    values: Vec<f64>,
    norms: Vec<f64>,
    is_improved: bool,
}

impl Spectrum {
    /// Whether a power iteration would bring nothing that counts to the first k.
    fn is_enough(&self, k: usize) -> bool {
        let kept: f64 = self.values[..k].iter().map(|value| value * value).sum();
        let error = (1.0 - kept / self.total).max(0.0);
        self.certificate(k) <= (EXCESS * error).clamp(ROOM.0, ROOM.1)
    }

    /// A bound on Σ_{i≤k}(σᵢ² − σ̂ᵢ²) over ‖D‖²: how much of the error squared a best approximation of rank
    /// k could at most avoid.
    pub fn certificate(&self, k: usize) -> f64 {
        if self.total == 0.0 || k == 0 {
            return 0.0;
        }
        let values = self.residuals.as_ref().map_or(&self.values, |residuals| &residuals.values);
        let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let missed = (self.total - square(values)).max(0.0) + DOUBLE * self.total;
        let bound = match &self.residuals {
            None => missed,
            Some(residuals) => {
                let next = values.get(k).copied().unwrap_or(0.0).powi(2);
                let slack = SINGLE * self.total.sqrt();
                let all = residuals.corner(slack, values.len(), k, missed);
                let own = residuals.corner(slack, k, k, missed + next);
                // What the improvement is sure to have taken of it.
                let gains = residuals.norms[..k].iter().map(|norm| (norm - slack).max(0.0));
                let gain: f64 = gains.map(|gain| gain * gain).sum();
                let gain = if residuals.is_improved { gain } else { 0.0 };
                (missed.min(all).min(own) - gain).max(0.0)
            }
        };
        (bound / self.total).min(1.0)
    }
}

impl Residuals {
    /// The bound from the corner that the first `count` triplets have with the rest, which is no larger
    /// than `rest`; infinite where they do not stand clear of it.
    fn corner(&self, slack: f64, count: usize, k: usize, rest: f64) -> f64 {
        let terms = self.values[..count].iter().zip(&self.norms);
        let corner: f64 = terms.map(|(value, norm)| (value * (norm + slack)).powi(2)).sum();
        let of = |value: &f64| {
            let gap = value * value - rest;
            if gap <= 0.0 {
                return f64::INFINITY;
            }
            2.0 * corner / (gap + (gap * gap + 4.0 * corner).sqrt())
        };
        self.values[..k].iter().map(of).sum()
    }
}

/// The leading `width` triplets of a matrix with ‖D‖² = `total`; `kept` tells of singular values how many
/// will be used, whose certificate is looked at.
pub(super) fn leading(
    matrix: &dyn Source,
    total: f64,
    width: usize,
    key: u64,
    kept: &dyn Fn(&[f64]) -> usize,
) -> Result<Leading> {
    let [rows, columns] = matrix.shape();
    let least = rows.min(columns);
    let width = width.min(least);
    let mut basis = if width == least {
        whole_basis(matrix)?
    } else {
        orthonormal(&times(matrix, &random(columns, width, key))?).0
    };
    let mut before: Option<f64> = None;
    for iteration in 1.. {
        // QᵀD, in f64: what it misses is found by a difference.
        let (right, triangle) = orthonormal(&transposed_times(matrix, &basis)?);
        let found = decompose(&triangle.transposed());
        let mut result = Leading {
            left: product(&basis, &found.left),
            right: product(&right, &found.right),
            spectrum: Spectrum { values: found.values, total, residuals: None },
        };
        let k = kept(&result.spectrum.values).min(result.spectrum.values.len());
        if width == least || result.spectrum.is_enough(k) {
            return Ok(result);
        }
        let image = times(matrix, &result.right)?;
        result.improve(&image);
        let energy: f64 = result.spectrum.values[..k].iter().map(|value| value * value).sum();
        let has_gained = before.is_none_or(|before| energy - before > GAIN * (total - before));
        if result.spectrum.is_enough(k) || !has_gained || iteration == ITERATIONS {
            return Ok(result);
        }
        before = Some(energy);
        basis = orthonormal(&image).0;
    }
    unreachable!("the last iteration returns")
}

/// A basis of all that a matrix makes: random vectors would only lose digits.
fn whole_basis(matrix: &dyn Source) -> Result<Rows> {
    let [rows, columns] = matrix.shape();
    let mut all = Rows::zeros(rows, rows.min(columns));
    if rows <= columns {
        (0..rows).for_each(|index| all.values[index * rows + index] = 1.0);
        return Ok(all);
    }
    bands(matrix, |range, band| {
        let target = &mut all.values[range.start * columns..range.end * columns];
        target.iter_mut().zip(band).for_each(|(target, value)| *target = f64::from(*value));
    })?;
    Ok(orthonormal(&all).0)
}

impl Leading {
    /// Takes DV̂·V̂ᵀ for ÛΣ̂V̂ᵀ, given the image DV̂. Its Gram matrix is Σ̂² + SᵀS, for S is orthogonal to Û:
    /// made so, it has the rounding of the image in S alone, which is small.
    fn improve(&mut self, image: &Rows) {
        let values = &self.spectrum.values;
        let width = values.len();
        let mut rest = image.clone();
        rest.values.par_chunks_mut(width).zip(self.left.values.par_chunks(width)).for_each(
            |(own, left)| {
                for ((own, left), value) in own.iter_mut().zip(left).zip(values) {
                    *own -= left * value;
                }
            },
        );
        let mut gram = gram_of(&rest);
        let norms = (0..width).map(|index| gram.get(index, index).sqrt()).collect();
        for (index, value) in values.iter().enumerate() {
            gram.set(index, index, gram.get(index, index) + value * value);
        }
        let mut values = values.clone();
        // None where a value is zero.
        let factor = gram_factor(&gram);
        let is_improved = factor.is_some();
        if let Some(factor) = factor {
            let found = decompose(&factor);
            let mut turned = found.right.clone();
            for (index, value) in found.values.iter().enumerate() {
                turned.column_mut(index).iter_mut().for_each(|own| *own /= value);
            }
            self.left = product(image, &turned);
            self.right = product(&self.right, &found.right);
            values = std::mem::replace(&mut self.spectrum.values, found.values);
        }
        self.spectrum.residuals = Some(Residuals { values, norms, is_improved });
    }
}

/// SplitMix64's increment.
const STEP: u64 = 0x9e37_79b9_7f4a_7c15;

/// SplitMix64's finalizer.
fn mix(mut value: u64) -> u64 {
    value = (value ^ (value >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    value = (value ^ (value >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    value ^ (value >> 31)
}

/// The key of a module's random numbers: mix(seed + γ) xor the FNV-1a of `"{module}#0"`.
pub(super) fn key(seed: u64, module: &str) -> u64 {
    let bytes = module.bytes().chain(*b"#0");
    let hash = bytes.fold(0xcbf2_9ce4_8422_2325u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0000_0100_0000_01b3)
    });
    mix(seed.wrapping_add(STEP)) ^ hash
}

/// Random vectors as columns. Each number is the sum of four uniform ones, which is near enough to a
/// Gaussian and the same on every machine; it depends on the key, the row and the column alone.
fn random(rows: usize, columns: usize, key: u64) -> Rows {
    let mut result = Rows::zeros(rows, columns);
    result.values.par_chunks_mut(columns.max(1)).enumerate().for_each(|(row, values)| {
        for (column, value) in values.iter_mut().enumerate() {
            let index = (column * rows + row) as u64;
            let bits = mix(key.wrapping_add((index + 1).wrapping_mul(STEP)));
            let sum: i64 = (0..4).map(|part| (bits >> (16 * part) & 0xffff) as i64 - 0x8000).sum();
            *value = sum as f64 / 65536.0;
        }
    });
    result
}

/// Hands all rows on in order, in bands.
fn bands(matrix: &dyn Source, mut each: impl FnMut(Range<usize>, &[f32])) -> Result<()> {
    let [rows, columns] = matrix.shape();
    if let Some(values) = matrix.held() {
        each(0..rows, values);
        return Ok(());
    }
    // A multiple of the depth of sums, so that the results are those of a matrix that is held.
    let height = (BAND / columns.max(1) / DEPTH).max(1) * DEPTH;
    let tile = (TILE / columns.max(1)).max(1);
    let mut band = Vec::new();
    for start in (0..rows).step_by(height) {
        let range = start..rows.min(start + height);
        band.resize(range.len() * columns, 0f32);
        band.par_chunks_mut(tile * columns).enumerate().try_for_each(|(index, values)| {
            let first = start + index * tile;
            matrix.read(first..first + values.len() / columns, values)
        })?;
        each(range, &band);
    }
    Ok(())
}

/// D · X, in f32 with sums of at most [`DEPTH`] terms.
fn times(matrix: &dyn Source, right: &Rows) -> Result<Rows> {
    let [rows, columns] = matrix.shape();
    let width = right.columns;
    let turned: Vec<f32> = right.transposed().values.iter().map(|value| *value as f32).collect();
    let tile = (TILE / columns.max(1)).max(1);
    let mut result = Rows::zeros(rows, width);
    bands(matrix, |range, band| {
        let target = &mut result.values[range.start * width..range.end * width];
        target.par_chunks_mut(tile * width).zip(band.par_chunks(tile * columns)).for_each(
            |(target, values)| {
                let mut sums = vec![0f32; target.len()];
                for first in (0..columns).step_by(DEPTH) {
                    let depth = DEPTH.min(columns - first);
                    let along = |data, count| View {
                        data,
                        first,
                        depth,
                        depth_step: 1,
                        count,
                        step: columns,
                    };
                    let (left, right) =
                        (along(&turned, width), along(values, values.len() / columns));
                    f32::multiply(left, right, &mut sums, width);
                    target.iter_mut().zip(&sums).for_each(|(sum, value)| *sum += f64::from(*value));
                }
            },
        );
    })?;
    Ok(result)
}

/// Dᵀ · Q, in f64.
fn transposed_times(matrix: &dyn Source, left: &Rows) -> Result<Rows> {
    let [_, columns] = matrix.shape();
    let width = left.columns;
    let mut result = Rows::zeros(columns, width);
    bands(matrix, |range, band| {
        let blocks = result.values.par_chunks_mut(BLOCK * width).enumerate();
        blocks.for_each(|(index, target)| {
            let (first, count) = (index * BLOCK, target.len() / width);
            let mut sums = vec![0f64; target.len()];
            let mut wide = Vec::with_capacity(DOUBLE_DEPTH * count);
            for start in (0..range.len()).step_by(DOUBLE_DEPTH) {
                let depth = DOUBLE_DEPTH.min(range.len() - start);
                let own = (range.start + start) * width;
                wide.clear();
                for row in start..start + depth {
                    let values = &band[row * columns + first..][..count];
                    wide.extend(values.iter().map(|value| f64::from(*value)));
                }
                let own = across(&left.values, own, depth, width, width);
                let values = across(&wide, 0, depth, count, count);
                f64::multiply(own, values, &mut sums, width);
                target.iter_mut().zip(&sums).for_each(|(sum, value)| *sum += value);
            }
        });
    })?;
    Ok(result)
}

/// Columns of a matrix of rows.
fn across<T>(data: &[T], first: usize, depth: usize, width: usize, count: usize) -> View<'_, T> {
    View { data, first, depth, depth_step: width, count, step: 1 }
}

/// The product of a tall matrix and a small one.
fn product(tall: &Rows, small: &Matrix) -> Rows {
    let mut result = Rows::zeros(tall.rows, small.columns);
    let height = (TILE / 4 / tall.columns.max(1)).max(1);
    result
        .values
        .par_chunks_mut(height * small.columns.max(1))
        .zip(tall.values.par_chunks(height * tall.columns.max(1)))
        .for_each(|(target, values)| {
            let columns = View {
                data: &small.data,
                first: 0,
                depth: small.rows,
                depth_step: 1,
                count: small.columns,
                step: small.rows,
            };
            let count = values.len() / tall.columns.max(1);
            let rows = View {
                data: values,
                first: 0,
                depth: tall.columns,
                depth_step: 1,
                count,
                step: tall.columns,
            };
            f64::multiply(columns, rows, target, small.columns);
        });
    result
}

/// Q and R of a tall matrix: by Cholesky factors twice (Yamamoto et al. 2015, doi:10.1553/etna_vol44s306)
/// where its columns are independent enough, else by reflections.
fn orthonormal(tall: &Rows) -> (Rows, Matrix) {
    let twice = || {
        let (first, upper) = by_cholesky(tall)?;
        let (second, inner) = by_cholesky(&first)?;
        Some((second, inner.product(&upper)))
    };
    twice().unwrap_or_else(|| {
        let width = tall.columns.min(tall.rows);
        let reflectors = Reflectors::of(as_matrix(tall));
        let mut unit = Matrix::zeros(width, width);
        (0..width).for_each(|index| unit.set(index, index, 1.0));
        (Rows::of_columns(&reflectors.expand(&unit)), reflectors.triangle())
    })
}

fn as_matrix(rows: &Rows) -> Matrix {
    Matrix { rows: rows.rows, columns: rows.columns, data: rows.transposed().values }
}

/// TᵀT of a tall matrix.
fn gram_of(tall: &Rows) -> Matrix {
    let width = tall.columns;
    let height = (TILE / 4 / width.max(1)).max(1);
    let parts: Vec<Matrix> = (tall.values.par_chunks(height * width.max(1)))
        .map(|values| {
            let mut part = Matrix::zeros(width, width);
            let own = || across(values, 0, values.len() / width, width, width);
            f64::multiply(own(), own(), &mut part.data, width);
            part
        })
        .collect();
    let mut gram = Matrix::zeros(width, width);
    for part in parts {
        gram.data.iter_mut().zip(part.data).for_each(|(sum, value)| *sum += value);
    }
    gram
}

fn by_cholesky(tall: &Rows) -> Option<(Rows, Matrix)> {
    let width = tall.columns;
    let gram = gram_of(tall);
    let lengths: Vec<f64> = (0..width).map(|index| gram.get(index, index).sqrt()).collect();
    if lengths.iter().any(|length| !length.is_normal()) {
        return None;
    }
    // Upper triangular U with UᵀU the Gram matrix of the columns at unit length.
    let mut upper = Matrix::zeros(width, width);
    for column in 0..width {
        for row in 0..=column {
            let before: f64 =
                (0..row).map(|inner| upper.get(inner, row) * upper.get(inner, column)).sum();
            let value = gram.get(row, column) / (lengths[row] * lengths[column]) - before;
            if row < column {
                upper.set(row, column, value / upper.get(row, row));
            } else if value < LEAST_PIVOT {
                return None;
            } else {
                upper.set(row, row, value.sqrt());
            }
        }
    }
    let mut inverse = Matrix::zeros(width, width);
    for column in 0..width {
        inverse.set(column, column, 1.0 / upper.get(column, column));
        for row in (0..column).rev() {
            let terms = row + 1..=column;
            let sum: f64 =
                terms.map(|inner| upper.get(row, inner) * inverse.get(inner, column)).sum();
            inverse.set(row, column, -sum / upper.get(row, row));
        }
    }
    for (row, length) in lengths.iter().enumerate() {
        for column in 0..width {
            inverse.set(row, column, inverse.get(row, column) / length);
            upper.set(column, row, upper.get(column, row) * length);
        }
    }
    Some((product(tall, &inverse), upper))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::linalg::singular_values;

    struct Dense {
        rows: usize,
        columns: usize,
        values: Vec<f32>,
        is_held: bool,
    }

    impl Source for Dense {
        fn shape(&self) -> [usize; 2] {
            [self.rows, self.columns]
        }

        fn held(&self) -> Option<&[f32]> {
            self.is_held.then_some(&self.values)
        }

        fn read(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
            values
                .copy_from_slice(&self.values[rows.start * self.columns..rows.end * self.columns]);
            Ok(())
        }
    }

    impl Dense {
        /// Random columns, the i-th times shrink^i, and noise.
        fn new(
            rows: usize,
            columns: usize,
            rank: usize,
            shrink: f64,
            noise: f64,
            key: u64,
        ) -> Self {
            let left = random(rows, rank, mix(key));
            let right = random(columns, rank, mix(key + 1));
            let rest = random(rows, columns, mix(key + 2));
            let values = (0..rows * columns)
                .map(|place| {
                    let (row, column) = (place / columns, place % columns);
                    let sum: f64 = (0..rank)
                        .map(|index| {
                            let pair = left.values[row * rank + index]
                                * right.values[column * rank + index];
                            pair * shrink.powi(index as i32)
                        })
                        .sum();
                    (sum + noise * rest.values[place]) as f32
                })
                .collect();
            Self { rows, columns, values, is_held: true }
        }

        fn total(&self) -> f64 {
            self.values.iter().map(|value| f64::from(*value).powi(2)).sum()
        }

        fn exact(&self) -> Vec<f64> {
            let values = self.values.iter().map(|value| f64::from(*value)).collect();
            let rows = Rows { rows: self.rows, columns: self.columns, values };
            singular_values(&as_matrix(&rows))
        }
    }

    fn square(values: &[f64]) -> f64 {
        values.iter().map(|value| value * value).sum()
    }

    fn check(matrix: &Dense, k: usize, width: usize, key: u64) -> f64 {
        let found = leading(matrix, matrix.total(), width, key, &|_| k).expect("readable");
        let exact = matrix.exact();
        let k = k.min(found.spectrum.values.len());
        let excess = (square(&exact[..k]) - square(&found.spectrum.values[..k])) / matrix.total();
        let bound = found.spectrum.certificate(k);
        assert!(excess <= bound + 1e-12, "{excess} above {bound}");
        for (own, exact) in found.spectrum.values.iter().zip(&exact) {
            assert!(*own <= exact * (1.0 + 1e-6) + 1e-12, "{own} above {exact}");
        }
        bound
    }

    #[test]
    fn the_numbers_are_those_of_the_reference() {
        assert_eq!(key(42, "model.layers.0.self_attn.q_proj"), 0xd53e_53da_cbf6_c7ed);
        let key = key(42, "model.layers.0.self_attn.q_proj");
        assert_eq!(mix(key.wrapping_add(STEP)), 0x7c04_3e24_6c60_57ed);
    }

    #[test]
    fn an_adapter_in_noise_is_certified_closely() {
        let matrix = Dense::new(300, 200, 8, 0.9, 1e-2, 5);
        assert!(check(&matrix, 8, 16, 1) < 1e-4);
        let exact = Dense::new(300, 200, 8, 0.9, 0.0, 5);
        assert!(check(&exact, 8, 16, 1) < 1e-9);
    }

    #[test]
    fn what_is_read_in_bands_is_what_is_held() {
        let mut matrix = Dense::new(1500, 40, 4, 0.8, 1e-3, 2);
        let total = matrix.total();
        let one = leading(&matrix, total, 12, 3, &|_| 4).expect("readable");
        matrix.is_held = false;
        let other = leading(&matrix, total, 12, 3, &|_| 4).expect("readable");
        assert_eq!((one.spectrum.values, one.left), (other.spectrum.values, other.left));
    }

    #[test]
    fn triplets_rebuild_a_small_matrix() {
        for (rows, columns) in [(7, 5), (5, 7), (1, 9), (9, 1)] {
            let matrix = Dense::new(rows, columns, 3, 0.5, 0.0, 11);
            let found = leading(&matrix, matrix.total(), 20, 3, &|_| 3).expect("readable");
            let width = found.spectrum.values.len();
            for row in 0..rows {
                for column in 0..columns {
                    let sum: f64 = (0..width)
                        .map(|index| {
                            found.left.values[row * width + index]
                                * found.spectrum.values[index]
                                * found.right.values[column * width + index]
                        })
                        .sum();
                    let wanted = f64::from(matrix.values[row * columns + column]);
                    assert!((sum - wanted).abs() < 1e-9, "{sum} {wanted}");
                }
            }
        }
    }

    proptest! {
        #![proptest_config(ProptestConfig::with_cases(1000))]
        #[test]
        fn certificates_are_never_wrong(
            rows in 1usize..40,
            columns in 1usize..40,
            rank in 1usize..12,
            shrink in 0.2f64..1.0,
            noise in prop_oneof![Just(0.0), 1e-6f64..1e-1],
            (k, more) in (1usize..10, 0usize..6),
            key in 0u64..1 << 40,
        ) {
            let matrix = Dense::new(rows, columns, rank, shrink, noise, key);
            check(&matrix, k, k + more, key);
        }
    }
}
