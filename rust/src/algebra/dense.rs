//! Updates that are no product of small factors: made row by row, and decomposed as far as is asked for.
//!
//! The leading singular triplets come from a randomized subspace iteration (Halko, Martinsson and Tropp
//! 2011, arXiv:0909.4061), which goes on until the energy that it finds no longer grows; where a large part
//! of all triplets is asked for, from a decomposition of the whole. What a truncation leaves out is measured
//! against the matrix itself.

use std::ops::Range;

use faer::MatRef;
use rayon::prelude::*;

use super::bases::{fast_decomposition, orthonormal};
use super::extract::Source;
use super::factored::{Decomposed, Factors, Rows, sides};
use super::merge::Updates;
use super::ranks::Rule;
use crate::entrywise::{self, Mask, Room};
use crate::error::Result;
use crate::linalg::Matrix;
use crate::measure::spectrum::Update;

/// Elements of one tile.
const TILE: usize = 1 << 18;
/// Up to this extent the whole is decomposed.
const SMALL: usize = 96;
/// How many more directions are iterated than are asked for, at least.
const OVERSAMPLING: usize = 10;
/// An iteration that adds less than this share of what is left out is the last.
const GAIN: f64 = 1e-4;
const MOST_ITERATIONS: usize = 12;
/// Triplets that are tried first where a rule decides about their number.
const FIRST_GUESS: usize = 32;
/// The rows are split in so many parts at most, whose sums are added in their order.
const PARTS: usize = 8;

/// A matrix in f32, row after row.
pub(crate) struct Dense {
    rows: usize,
    columns: usize,
    values: Vec<f32>,
}

/// Rows of an update: what elements are chosen by, and what they are.
struct Tile {
    narrow: Vec<f32>,
    wide: Vec<f64>,
}

impl Tile {
    fn of(wide: Vec<f64>) -> Self {
        Self { narrow: wide.iter().map(|value| *value as f32).collect(), wide }
    }
}

/// One adapter's update.
enum Member<'a> {
    /// Its factors, B with the scales.
    Factors(Rows, Matrix),
    Whole(&'a Dense),
}

impl Member<'_> {
    /// Some rows of it.
    fn rows(&self, range: &Range<usize>) -> Vec<f64> {
        match self {
            Self::Factors(left, right) => {
                let width = left.columns;
                let values = left.values[range.start * width..range.end * width].to_vec();
                Rows { rows: range.len(), columns: width, values }.times(right).values
            }
            Self::Whole(dense) => {
                let own = &dense.values[range.start * dense.columns..range.end * dense.columns];
                own.iter().map(|value| f64::from(*value)).collect()
            }
        }
    }
}

/// By adapter.
fn members<'a>(of: &'a Updates<'_, '_>) -> Vec<Option<Member<'a>>> {
    let factors = |update: &Update<'_>| {
        let (mut left, right) = sides(update);
        let scales = update.scales();
        for row in left.values.chunks_exact_mut(scales.len().max(1)) {
            row.iter_mut().zip(&scales).for_each(|(value, scale)| *value *= scale);
        }
        Member::Factors(left, right.to_matrix())
    };
    let member = |index: usize| {
        let whole = of.dense.get(index).and_then(Option::as_ref).map(Member::Whole);
        whole.or_else(|| of.updates[index].as_ref().map(factors))
    };
    (0..of.updates.len()).map(member).collect()
}

fn tiles_of([rows, columns]: [usize; 2]) -> Vec<Range<usize>> {
    let height = (TILE / columns.max(1)).max(1);
    (0..rows).step_by(height).map(|first| first..rows.min(first + height)).collect()
}

/// ⟨Δᵢ, Δⱼ⟩ of updates of which some are whole matrices.
pub(super) fn products(of: &Updates<'_, '_>) -> Matrix {
    let members = members(of);
    let count = members.len();
    let of_tile = |range: &Range<usize>| {
        let rows: Vec<Option<Vec<f64>>> =
            members.iter().map(|member| member.as_ref().map(|member| member.rows(range))).collect();
        let mut own = vec![0.0; count * count];
        for (i, one) in rows.iter().enumerate() {
            for (j, other) in rows[..=i].iter().enumerate() {
                let (Some(one), Some(other)) = (one, other) else { continue };
                own[i * count + j] = one.iter().zip(other).map(|(x, y)| x * y).sum();
            }
        }
        own
    };
    let parts: Vec<Vec<f64>> = tiles_of(of.shape).par_iter().map(of_tile).collect();
    let mut products = Matrix::zeros(count, count);
    for i in 0..count {
        for j in 0..=i {
            let sum = parts.iter().map(|part| part[i * count + j]).sum();
            products.set(i, j, sum);
            products.set(j, i, sum);
        }
    }
    products
}

impl Source for Dense {
    fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    fn held(&self) -> Option<&[f32]> {
        Some(&self.values)
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        values.copy_from_slice(&self.values[rows.start * self.columns..rows.end * self.columns]);
        Ok(())
    }
}

/// Some leading singular triplets.
pub(crate) struct Leading {
    /// The triplets that were found, of which the first `trusted` are the leading ones.
    pub found: Decomposed<'static>,
    pub trusted: usize,
    pub is_all: bool,
}

impl Dense {
    /// Of numbers row after row.
    pub fn new(rows: usize, columns: usize, values: Vec<f32>) -> Self {
        Self { rows, columns, values }
    }

    /// All of it, row after row.
    pub fn values(&self) -> &[f32] {
        &self.values
    }

    /// Its transpose.
    pub fn transposed(&self) -> Self {
        let mut values = vec![0f32; self.values.len()];
        for (row, own) in self.values.chunks_exact(self.columns.max(1)).enumerate() {
            for (column, value) in own.iter().enumerate() {
                values[column * self.rows + row] = *value;
            }
        }
        Self { rows: self.columns, columns: self.rows, values }
    }

    /// Some of its rows.
    pub fn part(&self, rows: Range<usize>) -> Self {
        let values = self.values[rows.start * self.columns..rows.end * self.columns].to_vec();
        Self { rows: rows.len(), columns: self.columns, values }
    }

    /// Σ cᵢΔᵢ of updates of which some are whole matrices; `None` if it is not finite.
    pub fn sum(coefficients: &[f64], of: &Updates<'_, '_>) -> Option<Self> {
        let [rows, columns] = of.shape;
        let members = members(of);
        let height = (TILE / columns.max(1)).max(1);
        let mut values = vec![0f32; rows * columns];
        let parts = values.par_chunks_mut((height * columns).max(1)).zip(tiles_of(of.shape));
        parts.for_each(|(target, range)| {
            let mut sum = vec![0.0; target.len()];
            for (member, coefficient) in members.iter().zip(coefficients) {
                let Some(member) = member.as_ref().filter(|_| *coefficient != 0.0) else {
                    continue;
                };
                let own = member.rows(&range);
                sum.iter_mut().zip(own).for_each(|(sum, value)| *sum += coefficient * value);
            }
            target.iter_mut().zip(sum).for_each(|(target, sum)| *target = sum as f32);
        });
        values.iter().all(|value| value.is_finite()).then_some(Self { rows, columns, values })
    }

    /// What an entry-wise method makes of updates, times a number; `None` if it is not finite.
    pub fn of(method: entrywise::Method, lambda: f64, of: &Updates<'_, '_>) -> Option<Self> {
        let [rows, columns] = of.shape;
        let members: Vec<Member<'_>> = members(of).into_iter().flatten().collect();
        let height = (TILE / columns.max(1)).max(1);
        let tiles = tiles_of(of.shape);
        let tile = |range: &Range<usize>| -> Vec<Tile> {
            members.iter().map(|member| Tile::of(member.rows(range))).collect()
        };
        let mut finder = of.finder(method, of.shape);
        while !finder.is_done() {
            let each = tiles.len().div_ceil(rayon::current_num_threads()).max(1);
            let counted = tiles.par_chunks(each).map(|tiles| {
                let mut counters = finder.counters();
                for range in tiles {
                    let tile = tile(range);
                    let views: Vec<&[f32]> = tile.iter().map(|tile| &tile.narrow[..]).collect();
                    finder.count(&mut counters, range.start, &views);
                }
                counters
            });
            let counted = counted.collect();
            finder.advance(counted);
        }
        let selection = finder.selection();
        let mut values = vec![0.0f32; rows * columns];
        let parts = values.par_chunks_mut((height * columns).max(1)).zip(&tiles);
        parts.for_each_init(
            || (Room::default(), Vec::new()),
            |(room, merged), (target, range)| {
                let tile = tile(range);
                let narrow: Vec<&[f32]> = tile.iter().map(|tile| &tile.narrow[..]).collect();
                let wide: Vec<&[f64]> = tile.iter().map(|tile| &tile.wide[..]).collect();
                merged.clear();
                merged.resize(target.len(), 0.0);
                selection.merge(range.start, &narrow, &wide, room, merged);
                target
                    .iter_mut()
                    .zip(merged)
                    .for_each(|(value, wide)| *value = (lambda * *wide) as f32);
            },
        );
        values.iter().all(|value| value.is_finite()).then_some(Self { rows, columns, values })
    }

    /// ‖·‖.
    pub fn norm(&self) -> f64 {
        let square = |values: &[f32]| values.iter().map(|value| f64::from(*value).powi(2)).sum();
        let parts: Vec<f64> = self.values.par_chunks(TILE).map(square).collect();
        parts.into_iter().sum::<f64>().sqrt()
    }

    /// ‖this − B·A‖.
    pub fn distance(&self, factors: &Factors) -> f64 {
        let right = factors.a.to_matrix();
        let height = (TILE / self.columns.max(1)).max(1);
        let tiles = self.values.par_chunks((height * self.columns).max(1)).enumerate();
        let squares = tiles.map(|(index, values)| {
            let (rows, width) = (values.len() / self.columns, factors.b.columns);
            let own = factors.b.values[index * height * width..][..rows * width].to_vec();
            let product = Rows { rows, columns: width, values: own }.times(&right);
            let pairs = values.iter().zip(&product.values);
            pairs.map(|(value, other)| (f64::from(*value) - other).powi(2)).sum()
        });
        squares.collect::<Vec<f64>>().into_iter().sum::<f64>().sqrt()
    }

    /// Singular triplets of which so many are the leading ones, or all.
    pub fn leading(&self, count: usize) -> Option<Leading> {
        let most = self.rows.min(self.columns);
        let width = count.saturating_add(OVERSAMPLING.max(count / 2));
        if most <= SMALL || width >= most / 2 {
            return self.all();
        }
        let mask = Mask::new(0, "", 0);
        let mut start = Rows::zeros(self.columns, width);
        for (index, value) in start.values.iter_mut().enumerate() {
            *value = mask.uniform(index as u64) - 0.5;
        }
        let whole = self.norm().powi(2);
        let mut energy = 0.0;
        for iteration in 0.. {
            let (q, _) = orthonormal(&self.times(&start));
            let (right, core) = orthonormal(&self.transposed_times(&q));
            // D ≈ Q·Qᵀ·D = Q·(right·core)ᵀ.
            let core = MatRef::from_column_major_slice(&core.data, core.rows, core.columns);
            let small = fast_decomposition(core)?;
            let own: f64 = small.values[..count].iter().map(|value| value * value).sum();
            if iteration > 0 && own - energy <= GAIN * (whole - own).max(0.0)
                || iteration == MOST_ITERATIONS
            {
                let left = q.times(&small.right);
                let found = Decomposed::explicit(left, small.values, right.times(&small.left));
                return Some(Leading { found, trusted: count, is_all: false });
            }
            energy = own;
            start = right;
        }
        unreachable!("iterations end")
    }

    /// All singular triplets of one that is so small that they are found as quickly as some.
    pub fn all_of_small(&self) -> Option<Decomposed<'static>> {
        let is_small = self.rows.min(self.columns) <= SMALL;
        is_small.then(|| self.all()).flatten().map(|all| all.found)
    }

    /// All singular triplets; `None` if they cannot be found.
    pub fn all(&self) -> Option<Leading> {
        let wide: Vec<f64> = self.values.iter().map(|value| f64::from(*value)).collect();
        let whole = MatRef::from_row_major_slice(&wide, self.rows, self.columns);
        let found = fast_decomposition(whole)?;
        let (left, right) = (Rows::of_columns(&found.left), Rows::of_columns(&found.right));
        let trusted = found.values.len();
        let found = Decomposed::explicit(left, found.values, right);
        Some(Leading { found, trusted, is_all: true })
    }

    /// The triplets that a rule keeps, and how many they are.
    pub fn chosen(&self, rule: Rule, is_kohya: bool) -> Option<(Leading, usize)> {
        let mut count = FIRST_GUESS;
        loop {
            let needs_all = matches!(rule, Rule::SvCumulative(_) | Rule::Budget(..));
            let found = match rule {
                Rule::Fixed(number) => self.leading(number as usize)?,
                _ if needs_all => self.all()?,
                _ => self.leading(count)?,
            };
            let mut values = found.found.values[..found.trusted].to_vec();
            if found.is_all || matches!(rule, Rule::Fixed(_)) {
                let k = rule.choose(&values, 0.0, is_kohya);
                return Some((found, k));
            }
            // What was not found counts as one more value, which decides nothing of what lies before it.
            if !matches!(rule, Rule::SvRatio(_)) {
                let energy: f64 = values.iter().map(|value| value * value).sum();
                values.push((self.norm().powi(2) - energy).max(0.0).sqrt());
            }
            let k = rule.choose(&values, 0.0, is_kohya);
            if k < found.trusted || (k == found.trusted && values.len() > k) {
                return Some((found, k));
            }
            count *= 2;
        }
    }

    /// this · small.
    fn times(&self, small: &Rows) -> Rows {
        let right = small.to_matrix();
        let height = (TILE / self.columns.max(1)).max(1);
        let tiles = self.values.par_chunks(height * self.columns);
        let products = tiles.map(|values| self.tile(values).times(&right).values);
        let values = products.collect::<Vec<_>>().concat();
        Rows { rows: self.rows, columns: small.columns, values }
    }

    /// thisᵀ · tall.
    fn transposed_times(&self, tall: &Rows) -> Rows {
        let height = (TILE / self.columns.max(1)).max(1);
        let part = self.rows.div_ceil(PARTS).next_multiple_of(height);
        let width = tall.columns;
        let parts = self.values.par_chunks(part * self.columns).enumerate();
        let sums: Vec<Matrix> = parts
            .map(|(index, values)| {
                let mut sum = Matrix::zeros(self.columns, width);
                let tiles = values.chunks(height * self.columns).enumerate();
                for (tile, values) in tiles {
                    let own = self.tile(values);
                    let first = (index * part + tile * height) * width;
                    let values = tall.values[first..first + own.rows * width].to_vec();
                    let other = Rows { rows: own.rows, columns: width, values };
                    let product = own.cross(&other);
                    sum.data.iter_mut().zip(product.data).for_each(|(sum, value)| *sum += value);
                }
                sum
            })
            .collect();
        let mut sums = sums.into_iter();
        let mut total = sums.next().unwrap_or_else(|| Matrix::zeros(self.columns, width));
        for other in sums {
            total.data.iter_mut().zip(other.data).for_each(|(sum, value)| *sum += value);
        }
        Rows::of_columns(&total)
    }

    fn tile(&self, values: &[f32]) -> Rows {
        let rows = values.len() / self.columns.max(1);
        let values = values.iter().map(|value| f64::from(*value)).collect();
        Rows { rows, columns: self.columns, values }
    }
}
