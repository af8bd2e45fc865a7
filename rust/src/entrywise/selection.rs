//! The elements of updates that a method keeps, and what it makes of them, tile by tile.

use std::sync::Arc;

use super::masks::Mask;
use super::method::Join;
use super::order::{Cut, Layout, ranks};
use super::ranks::RowRanks;

/// Which elements of one update are kept.
#[derive(Debug, Clone, PartialEq)]
pub(super) enum Keep {
    /// The first in the order of magnitudes.
    Largest(Cut),
    /// Those of the lower cut that are not of the upper one.
    Middle { upper: Cut, lower: Cut },
    /// Each with one probability, by which it is divided.
    Random { mask: Mask, density: f64 },
    /// Each with a probability by its rank in the row.
    Ranked { mask: Mask, density: f64, epsilon: f64 },
    /// The same with ranks that are known, where tiles have no whole rows.
    Known { mask: Mask, density: f64, epsilon: f64, ranks: Arc<RowRanks> },
    /// The positions of largest variance.
    Positions(Cut),
}

/// What a method found out about a tensor: with it each tile is merged by itself.
#[derive(Debug, Clone, PartialEq)]
pub struct Selection {
    pub(super) keeps: Vec<Keep>,
    pub(super) join: Join,
    pub(super) lambda: f64,
    pub(super) weights: Vec<f64>,
    pub(super) layout: Layout,
    pub(super) missing: usize,
}

/// Buffers of a thread, which tiles use one after the other.
#[derive(Debug, Default)]
pub struct Room {
    kept: Vec<f64>,
    deviations: Vec<f32>,
    order: Vec<u32>,
}

/// At each position, the standard deviation over the updates and `missing` zeros. It orders positions as
/// the variance does, and is not lost where that is too small for the type.
pub(super) fn deviations(tile: &[&[f32]], missing: usize, result: &mut Vec<f32>) {
    let count = (tile.len() + missing) as f64;
    let length = tile.first().map_or(0, |values| values.len());
    result.clear();
    result.extend((0..length).map(|place| {
        let values = || tile.iter().map(|values| f64::from(values[place]));
        let mean = values().sum::<f64>() / count;
        let squares: f64 = values().map(|value| (value - mean) * (value - mean)).sum();
        ((squares + missing as f64 * mean * mean) / count).sqrt() as f32
    }));
}

impl Selection {
    /// The merged update of a tile, the rows from `first_row` of every update, in place of `result`.
    ///
    /// What is kept is decided by `tile`, and what is merged are `values`: the same, or the same before they
    /// were rounded.
    ///
    /// # Panics
    /// If tiles are not of whole rows and of one size.
    pub fn merge<T: Copy + Into<f64>>(
        &self,
        first_row: usize,
        tile: &[&[f32]],
        values: &[&[T]],
        room: &mut Room,
        result: &mut [f64],
    ) {
        let columns = self.layout.columns;
        assert!(tile.len() == self.keeps.len() && result.len().is_multiple_of(columns.max(1)));
        let length = result.len();
        let Room { kept, deviations: spread, order } = room;
        kept.clear();
        kept.resize(length * tile.len(), 0.0);
        spread.clear();
        if self.join == Join::Energies {
            deviations(tile, self.missing, spread);
        }
        for (update, keep) in self.keeps.iter().enumerate() {
            let target = &mut kept[update * length..][..length];
            let rows = tile[update].chunks_exact(columns).zip(values[update].chunks_exact(columns));
            for (row, (pair, target)) in rows.zip(target.chunks_exact_mut(columns)).enumerate() {
                let positions = spread.get(row * columns..).unwrap_or_default();
                let trimming = Trimming { layout: self.layout, row: first_row + row, positions };
                keep.trim(&trimming, pair, order, target);
            }
        }
        self.join_kept(kept, result);
        if self.lambda != 1.0 {
            result.iter_mut().for_each(|value| *value *= self.lambda);
        }
    }

    fn join_kept(&self, kept: &[f64], result: &mut [f64]) {
        let length = result.len();
        let updates = || self.weights.iter().zip(kept.chunks_exact(length));
        for (place, target) in result.iter_mut().enumerate() {
            let weighted = updates().map(|(weight, values)| (*weight, weight * values[place]));
            *target = match self.join {
                Join::Sum => weighted.map(|(_, term)| term).sum(),
                Join::Elect { normalize } => {
                    let total: f64 = weighted.clone().map(|(_, term)| term).sum();
                    mean_of_agreeing(weighted.clone(), total, normalize)
                }
                Join::Count => {
                    let values = updates().map(|(weight, values)| (*weight, values[place]));
                    sum_over_count(values)
                }
                Join::Energies => {
                    let total: f64 = updates().map(|(_, values)| values[place]).sum();
                    mean_of_agreeing(weighted, total, true)
                }
            };
        }
    }
}

/// The sum of the terms that have the sign of the total; where that is 0, those that are positive.
fn mean_of_agreeing(
    weighted: impl Iterator<Item = (f64, f64)>,
    total: f64,
    normalize: bool,
) -> f64 {
    if total.is_nan() {
        return total;
    }
    let agrees = |term: f64| if total >= 0.0 { term > 0.0 } else { term < 0.0 };
    let (mut sum, mut weights) = (0.0, 0.0);
    for (weight, term) in weighted.filter(|(_, term)| agrees(*term)) {
        sum += term;
        weights += weight.abs();
    }
    match normalize && weights > 0.0 {
        true => sum / weights,
        false => sum,
    }
}

/// Σwx over those whose x has the sign of Σx (0 counts as positive), over how many these are.
fn sum_over_count(values: impl Iterator<Item = (f64, f64)> + Clone) -> f64 {
    let total: f64 = values.clone().map(|(_, value)| value).sum();
    if total.is_nan() {
        return total;
    }
    let agrees = |value: f64| if total >= 0.0 { value > 0.0 } else { value < 0.0 };
    let (mut sum, mut count) = (0.0, 0);
    for (weight, value) in values.filter(|(_, value)| agrees(*value)) {
        sum += weight * value;
        count += 1;
    }
    sum / f64::from(count.max(1))
}

/// DELLA's probability of the element of that rank in a row of that length.
fn probability(density: f64, epsilon: f64, rank: usize, length: usize) -> f64 {
    let last = length.saturating_sub(1) as f64;
    let share = if last == 0.0 { 0.5 } else { rank as f64 / last };
    density - epsilon + 2.0 * epsilon * share
}

/// A row that is trimmed.
struct Trimming<'a> {
    layout: Layout,
    /// Its place among those that are stored.
    row: usize,
    /// The deviations of the positions from its beginning on.
    positions: &'a [f32],
}

impl Keep {
    /// The elements of a row that are kept, the others zero.
    fn trim<T: Copy + Into<f64>>(
        &self,
        at: &Trimming<'_>,
        (keys, values): (&[f32], &[T]),
        order: &mut Vec<u32>,
        target: &mut [f64],
    ) {
        let place = |column: usize| at.layout.place(at.row, column);
        let index = |column: usize| at.layout.index(at.row, column);
        let mut fill = |keeps: &dyn Fn(usize) -> bool, share: f64| {
            for (column, (target, value)) in target.iter_mut().zip(values).enumerate() {
                *target = if keeps(column) { (*value).into() / share } else { 0.0 };
            }
        };
        match self {
            Self::Largest(cut) => {
                fill(&|column| cut.takes(keys[column], || place(column)), 1.0);
            }
            Self::Middle { upper, lower } => fill(
                &|column| {
                    lower.takes(keys[column], || place(column))
                        && !upper.takes(keys[column], || place(column))
                },
                1.0,
            ),
            Self::Random { mask, density } => {
                fill(&|column| mask.uniform(index(column)) < *density, *density);
            }
            Self::Positions(cut) => {
                fill(&|column| cut.takes(at.positions[column], || place(column)), 1.0);
            }
            Self::Ranked { mask, density, epsilon } => {
                ranks(keys, order);
                for (rank, column) in order.iter().map(|column| *column as usize).enumerate() {
                    let probability = probability(*density, *epsilon, rank, order.len());
                    target[column] = match mask.uniform(index(column)) < probability {
                        true => values[column].into() / probability,
                        false => 0.0,
                    };
                }
            }
            Self::Known { mask, density, epsilon, ranks } => {
                let length = at.layout.inputs();
                for (column, (target, value)) in target.iter_mut().zip(values).enumerate() {
                    let rank = ranks.rank(at.row, column);
                    let probability = probability(*density, *epsilon, rank, length);
                    *target = match mask.uniform(index(column)) < probability {
                        true => (*value).into() / probability,
                        false => 0.0,
                    };
                }
            }
        }
    }
}
