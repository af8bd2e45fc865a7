//! What only the entries of ΔW itself tell: their distribution and extremes. They are computed
//! tile by tile, looked at while they are in the cache, and forgotten; ΔW is never stored.

use rayon::prelude::*;
use serde::Serialize;

use crate::error::{Error, Result};
use crate::kernel::vector::vectorized;
use crate::linalg::LongSide;
use crate::measure::spectrum::Update;
use crate::measure::statistics::{Bins, Histogram};

/// Columns of a panel of the right factor, and of a tile's unit in registers.
const PANEL: usize = 32;

/// Rows of a tile's unit in registers.
const ROWS: usize = 4;

/// Rows of one unit of work: as many as pay for bringing a panel into the cache.
const ROW_BLOCK: usize = 128;

/// Entries that are looked at together.
const UNIT: usize = ROWS * PANEL;

/// The entries of an update, as f32 products and sums give them: s·B is rounded to f32, then
/// multiplied with A and added up in the order of the rank index.
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct EntryStatistics {
    /// All entries, m·n.
    pub count: u64,
    /// NaN and ±∞ among them; the figures below leave these out.
    pub non_finite: u64,
    /// The least entry; NaN if there is none.
    pub min: f64,
    /// The greatest entry; NaN if there is none.
    pub max: f64,
    /// max|ΔW|; 0 if there is no entry.
    pub max_abs: f64,
    /// Entries of magnitude below the threshold.
    pub below: u64,
    /// Their share of the finite entries; NaN if there is none.
    pub below_share: f64,
    /// The entries' histogram; equal to `numpy.histogram` of the same entries in f64.
    pub histogram: Histogram,
}

/// Streams over the entries of an update: twice for automatic bins, whose range has to be found
/// first, else once. The work is spread over the installed rayon pool.
///
/// # Errors
/// [`Error::Argument`] for unusable bins or a threshold that is NaN.
pub fn scan_entries(update: &Update<'_>, bins: &Bins, threshold: f64) -> Result<EntryStatistics> {
    bins.check()?;
    if threshold.is_nan() {
        return Err(Error::Argument("the threshold of the entries is not a number".into()));
    }
    let packed = Packed::of(update);
    let threshold = at_least(threshold);
    let range = match bins {
        Bins::Edges(_) => Tally::default(),
        Bins::Automatic(_) => packed.scan(None, threshold),
    };
    let binning = Binning::new(bins.edges(f64::from(range.min), f64::from(range.max)));
    let extremes = packed.scan(Some(&binning), threshold);
    let count = update.rows() as u64 * update.columns() as u64;
    let finite = count - extremes.non_finite;
    let or_nan = |value: f32| {
        if finite == 0 { f64::NAN } else { f64::from(value) }
    };
    Ok(EntryStatistics {
        count,
        non_finite: extremes.non_finite,
        min: or_nan(extremes.min),
        max: or_nan(extremes.max),
        max_abs: if finite == 0 {
            0.0
        } else {
            f64::from(extremes.min.abs().max(extremes.max.abs()))
        },
        below: extremes.below,
        below_share: extremes.below as f64 / finite as f64,
        histogram: Histogram { counts: binning.counts(&extremes.bins), edges: binning.edges },
    })
}

/// The least f32 that is not below the number.
fn at_least(number: f64) -> f32 {
    let rounded = number as f32;
    if f64::from(rounded) < number { rounded.next_up() } else { rounded }
}

/// Both factors in f32 and in the order in which the tiles read them.
struct Packed {
    rows: usize,
    columns: usize,
    rank: usize,
    /// Groups of [`ROWS`] rows of s·B: for each rank index the group's values, filled with zeros.
    left: Vec<f32>,
    /// Groups of [`PANEL`] columns of A, likewise.
    right: Vec<f32>,
}

impl Packed {
    fn of(update: &Update<'_>) -> Self {
        let scales = update.scales();
        let ones = vec![1.0; scales.len()];
        Self {
            rows: update.rows(),
            columns: update.columns(),
            rank: update.rank(),
            left: pack(&update.left(), &scales, ROWS),
            right: pack(&update.right(), &ones, PANEL),
        }
    }

    fn scan(&self, binning: Option<&Binning>, threshold: f32) -> Tally {
        let blocks: Vec<usize> = (0..self.rows).step_by(ROW_BLOCK).collect();
        let visit = |mut tally: Tally, &start: &usize| {
            self.scan_rows(start, binning, threshold, &mut tally);
            tally
        };
        let empty =
            || Tally { bins: vec![0; binning.map_or(0, Binning::slots)], ..Tally::default() };
        if blocks.len() <= 1 {
            return blocks.iter().fold(empty(), visit);
        }
        blocks.par_iter().fold(empty, visit).reduce(empty, Tally::merge)
    }

    fn scan_rows(
        &self,
        start: usize,
        binning: Option<&Binning>,
        threshold: f32,
        tally: &mut Tally,
    ) {
        let end = self.rows.min(start + ROW_BLOCK);
        let mut unit = [0.0f32; UNIT];
        let mut slots = [0u32; UNIT];
        for column in (0..self.columns).step_by(PANEL) {
            let right = &self.right[column * self.rank..(column + PANEL) * self.rank];
            let width = PANEL.min(self.columns - column);
            for row in (start..end).step_by(ROWS) {
                let left = &self.left[row * self.rank..(row + ROWS) * self.rank];
                multiply(left, right, &mut unit);
                let height = ROWS.min(end - row);
                // At the margins the filling is not part of ΔW.
                if width < PANEL {
                    for line in 1..height {
                        unit.copy_within(line * PANEL..line * PANEL + width, line * width);
                    }
                }
                let entries = &unit[..height * width];
                let finite = look(entries, threshold, tally);
                if let Some(binning) = binning {
                    let slots = &mut slots[..entries.len()];
                    binning.place(entries, slots);
                    if !finite {
                        binning.discard_non_finite(entries, slots);
                    }
                    for &slot in slots.iter() {
                        tally.bins[slot as usize] += 1;
                    }
                }
            }
        }
    }
}

/// A side in groups of `group` rows, each group rank index after rank index.
fn pack(side: &dyn LongSide, scales: &[f64], group: usize) -> Vec<f32> {
    let (length, rank) = (side.length(), side.width());
    let mut packed = vec![0.0; length.div_ceil(group) * group * rank];
    let mut columns = vec![0.0; group * rank];
    for start in (0..length).step_by(group) {
        let depth = group.min(length - start);
        let columns = &mut columns[..depth * rank];
        side.read(start, start + depth, columns);
        let target = &mut packed[start * rank..(start + group) * rank];
        for (index, scale) in scales.iter().enumerate() {
            for row in 0..depth {
                target[index * group + row] = (scale * columns[index * depth + row]) as f32;
            }
        }
    }
    packed
}

/// What was seen of the entries.
#[derive(Clone)]
struct Tally {
    non_finite: u64,
    below: u64,
    min: f32,
    max: f32,
    bins: Vec<u64>,
}

impl Default for Tally {
    fn default() -> Self {
        Self {
            non_finite: 0,
            below: 0,
            min: f32::INFINITY,
            max: f32::NEG_INFINITY,
            bins: Vec::new(),
        }
    }
}

impl Tally {
    fn merge(mut self, other: Self) -> Self {
        self.non_finite += other.non_finite;
        self.below += other.below;
        self.min = self.min.min(other.min);
        self.max = self.max.max(other.max);
        for (own, theirs) in self.bins.iter_mut().zip(other.bins) {
            *own += theirs;
        }
        self
    }
}

vectorized! {
    /// Takes extremes and counts of entries into the tally; whether all were finite.
    fn look(entries: &[f32], threshold: f32, tally: &mut Tally) -> bool {
        const LANES: usize = 16;
        let mut min = [f32::INFINITY; LANES];
        let mut max = [f32::NEG_INFINITY; LANES];
        let mut below = [0u32; LANES];
        let mut non_finite = [0u32; LANES];
        let mut each = |lane: usize, entry: f32| {
            let magnitude = entry.abs();
            let is_finite = magnitude < f32::INFINITY;
            let low = if is_finite { entry } else { f32::INFINITY };
            let high = if is_finite { entry } else { f32::NEG_INFINITY };
            min[lane] = if low < min[lane] { low } else { min[lane] };
            max[lane] = if high > max[lane] { high } else { max[lane] };
            below[lane] += u32::from(is_finite & (magnitude < threshold));
            non_finite[lane] += u32::from(!is_finite);
        };
        let (blocks, rest) = entries.as_chunks::<LANES>();
        for block in blocks {
            for (lane, &entry) in block.iter().enumerate() {
                each(lane, entry);
            }
        }
        for (lane, &entry) in rest.iter().enumerate() {
            each(lane, entry);
        }
        tally.min = min.iter().copied().fold(tally.min, f32::min);
        tally.max = max.iter().copied().fold(tally.max, f32::max);
        tally.below += u64::from(below.iter().sum::<u32>());
        let non_finite = u64::from(non_finite.iter().sum::<u32>());
        tally.non_finite += non_finite;
        non_finite == 0
    }
}

/// One unit of products in registers. Fused where the processor fuses, so the last bit of an
/// entry can differ between processors with and without FMA.
#[inline(always)]
fn multiply_body<const FUSED: bool>(left: &[f32], right: &[f32], unit: &mut [f32; UNIT]) {
    let mut sums = [[0.0f32; PANEL]; ROWS];
    let (left, right) = (left.as_chunks::<ROWS>().0, right.as_chunks::<PANEL>().0);
    for (b, a) in left.iter().zip(right) {
        for row in 0..ROWS {
            for column in 0..PANEL {
                sums[row][column] = if FUSED {
                    b[row].mul_add(a[column], sums[row][column])
                } else {
                    b[row] * a[column] + sums[row][column]
                };
            }
        }
    }
    for (target, source) in unit.chunks_exact_mut(PANEL).zip(&sums) {
        target.copy_from_slice(source);
    }
}

fn multiply(left: &[f32], right: &[f32], unit: &mut [f32; UNIT]) {
    #[cfg(target_arch = "x86_64")]
    {
        #[target_feature(enable = "avx512f,avx512bw,avx512dq,avx512vl")]
        fn wide(left: &[f32], right: &[f32], unit: &mut [f32; UNIT]) {
            multiply_body::<true>(left, right, unit);
        }
        #[target_feature(enable = "avx2,fma")]
        fn medium(left: &[f32], right: &[f32], unit: &mut [f32; UNIT]) {
            multiply_body::<true>(left, right, unit);
        }
        if crate::kernel::vector::has_avx512() {
            // SAFETY: the processor has every feature that `wide` enables.
            return unsafe { wide(left, right, unit) };
        }
        if crate::kernel::vector::has_avx2() {
            // SAFETY: the processor has every feature that `medium` enables.
            return unsafe { medium(left, right, unit) };
        }
    }
    multiply_body::<{ cfg!(target_arch = "aarch64") }>(left, right, unit);
}

/// Which bin an entry belongs to. Where the edges are evenly spaced the bin is computed, and only
/// an entry too near to an edge for the computation to be sure is looked up.
struct Binning {
    edges: Vec<f64>,
    /// Bins per unit, and how near to an edge (in bins) is too near; `None` for uneven edges.
    even: Option<(f64, f64)>,
}

/// Copies of the counts that neighbouring entries go to in turn, so that a run of entries in one
/// bin does not wait for one counter.
const COPIES: usize = 4;

impl Binning {
    fn new(edges: Vec<f64>) -> Self {
        let bins = edges.len() - 1;
        let (low, high) = (edges[0], edges[bins]);
        let step = (high - low) / bins as f64;
        // How far, in bins, rounding can carry an edge or an entry's computed place.
        let rounding = 16.0 * f64::EPSILON * (bins as f64 + (low.abs().max(high.abs()) / step));
        let even =
            (step > 0.0 && step.is_finite() && bins < 1 << 24 && rounding < 0.1).then(|| {
                let spread = edges.iter().enumerate().fold(0.0f64, |worst, (i, edge)| {
                    worst.max(((edge - low) / step - i as f64).abs())
                });
                (1.0 / step, 2.0 * (rounding + spread))
            });
        Self { edges, even: even.filter(|&(_, near)| near < 0.1) }
    }

    fn bins(&self) -> usize {
        self.edges.len() - 1
    }

    /// Counters: for each copy the bins and one for what lies outside.
    fn slots(&self) -> usize {
        COPIES * (self.bins() + 1)
    }

    fn counts(&self, slots: &[u64]) -> Vec<u64> {
        let stride = self.bins() + 1;
        (0..self.bins()).map(|bin| slots.chunks_exact(stride).map(|copy| copy[bin]).sum()).collect()
    }

    /// The bin of an entry, or the number of bins if it lies outside.
    fn look_up(&self, entry: f64) -> u32 {
        let bins = self.bins();
        if !(self.edges[0]..=self.edges[bins]).contains(&entry) {
            return bins as u32;
        }
        let passed = self.edges.partition_point(|&edge| edge <= entry);
        // Only the last edge itself passes all edges.
        (passed - 1).min(bins - 1) as u32
    }

    /// The counter of each entry.
    fn place(&self, entries: &[f32], slots: &mut [u32]) {
        if let Some((per_unit, near)) = self.even {
            place_evenly(entries, slots, self.edges[0], per_unit, near, self.bins());
            for (slot, &entry) in slots.iter_mut().zip(entries) {
                if *slot == UNSURE {
                    *slot = self.look_up(f64::from(entry));
                }
            }
        } else {
            for (slot, &entry) in slots.iter_mut().zip(entries) {
                *slot = self.look_up(f64::from(entry));
            }
        }
        let stride = self.bins() as u32 + 1;
        for (index, slot) in slots.iter_mut().enumerate() {
            *slot += index as u32 % COPIES as u32 * stride;
        }
    }

    /// Sends NaN and infinities, wherever open-ended edges have put them, outside.
    fn discard_non_finite(&self, entries: &[f32], slots: &mut [u32]) {
        for (slot, entry) in slots.iter_mut().zip(entries) {
            if !entry.is_finite() {
                *slot = self.bins() as u32;
            }
        }
    }
}

/// Stands for an entry that has to be looked up.
const UNSURE: u32 = u32::MAX;

vectorized! {
    fn place_evenly(
        entries: &[f32],
        slots: &mut [u32],
        low: f64,
        per_unit: f64,
        near: f64,
        bins: usize,
    ) {
        let end = bins as f64;
        for (slot, &entry) in slots.iter_mut().zip(entries) {
            let place = (f64::from(entry) - low) * per_unit;
            // Clamped (NaN to 0) before the conversion, which is then plain truncation.
            let inside = if place > 0.0 { place } else { 0.0 };
            let inside = if inside < end { inside } else { end };
            // SAFETY: between 0 and the number of bins, which is below 2²⁴.
            let bin = unsafe { inside.to_int_unchecked::<i32>() };
            let share = inside - f64::from(bin);
            let is_sure = (share > near) & (share < 1.0 - near);
            *slot = if is_sure { bin as u32 } else { UNSURE };
        }
    }
}

#[cfg(test)]
mod tests;
