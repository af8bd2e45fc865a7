//! The difference of two stored weights: its rows, its norm, and what the rounding of both explains.

use std::ops::Range;
use std::sync::Arc;

use rayon::prelude::*;

use super::sketch::Source;
use crate::checkpoint::quantized::Quantized;
use crate::checkpoint::{Checkpoint, Location};
use crate::error::{Error, Result};
use crate::kernel::convert::{widen, widen_f64};
use crate::parallel::task::Task;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;

/// Elements of the rows whose sums are made together.
const TILE: usize = 1 << 20;
/// Elements of the rows that are worked on together: they stay in a core's second-level cache.
const STRIP: usize = 1 << 15;
/// A difference of more elements than this is not held in memory (512 MiB), but read again for each pass.
pub(super) const HELD: usize = 1 << 27;
/// How many roundings of the terms of a sum are allowed for, where the result is as fine as they are.
const TERMS: f64 = 64.0;

/// A weight of a checkpoint as the model has it, whatever it is stored as.
#[derive(Debug, Clone)]
pub(super) struct Weight<'a> {
    pub checkpoint: &'a Checkpoint,
    pub name: String,
    pub shape: Vec<u64>,
    pub stored: Stored,
    /// The place of its first element in what is stored, where that is one tensor of several matrices.
    pub first: usize,
}

#[derive(Debug, Clone)]
pub(super) enum Stored {
    Plain(Location),
    Quantized(Arc<Quantized>),
}

impl Weight<'_> {
    pub fn info(&self) -> Option<&TensorInfo> {
        match &self.stored {
            Stored::Plain(location) => Some(self.checkpoint.at(*location)),
            Stored::Quantized(_) => None,
        }
    }

    /// Its element type; of codes that of the numbers that they mean.
    pub fn dtype(&self) -> Dtype {
        self.info().map_or(Dtype::F32, |info| info.dtype.clone())
    }

    pub fn elements(&self) -> u64 {
        self.shape.iter().product()
    }

    /// Bytes that it takes in its file, codes without their scales.
    pub fn bytes(&self) -> u64 {
        let (all, bytes) = match &self.stored {
            Stored::Plain(location) => {
                let info = self.checkpoint.at(*location);
                (info.elements(), info.bytes())
            }
            Stored::Quantized(quantized) => {
                (quantized.logical.elements(), quantized.stored.tensor.bytes())
            }
        };
        match all == self.elements() {
            true => bytes,
            false => bytes / (all / self.elements().max(1)).max(1),
        }
    }

    /// One of the matrices of which a stack consists.
    pub fn matrix(&self, index: u64) -> Self {
        let shape = self.shape[1..].to_vec();
        let first = self.first + (index * shape.iter().product::<u64>()) as usize;
        Self { shape, first, ..self.clone() }
    }

    /// Some of its elements in its type, in a buffer that is as long afterwards.
    fn read_bytes(&self, elements: &Range<usize>, bytes: &mut Vec<u8>) -> Result<()> {
        let size = self.dtype().size();
        bytes.resize(elements.len() * size, 0);
        let elements = self.first + elements.start..self.first + elements.end;
        match &self.stored {
            Stored::Plain(location) => {
                let info = self.checkpoint.at(*location);
                let file = &self.checkpoint.shards()[location.shard].file;
                file.read_into(info, (elements.start * size) as u64, bytes)
            }
            Stored::Quantized(quantized) => {
                quantized.read(self.checkpoint, bytes, elements.start * size, false)
            }
        }
    }

    /// All of its elements, in its type.
    pub fn read(&self) -> Result<Vec<u8>> {
        let mut bytes = Vec::new();
        self.read_bytes(&(0..self.elements() as usize), &mut bytes)?;
        Ok(bytes)
    }

    /// The distance of neighboring codes at some of its elements.
    fn steps(
        &self,
        quantized: &Quantized,
        elements: &Range<usize>,
        values: &[f32],
    ) -> Result<Vec<f32>> {
        let elements = &(self.first + elements.start..self.first + elements.end);
        let codes = &quantized.codes;
        let mut steps = vec![0f32; values.len()];
        if quantized.transposed.is_some() {
            // Scales lie in another order; the largest number of the rows tells one for all.
            let largest = values.iter().fold(0f32, |largest, value| largest.max(value.abs()));
            let scale = f64::from(largest / codes.largest());
            steps.fill((2.0 * codes.half_gap(f64::from(codes.largest()) / 2.0) * scale) as f32);
            return Ok(steps);
        }
        let blocks = quantized.blocks.covering(elements);
        let scales = quantized.scales.read(self.checkpoint, blocks.clone())?;
        quantized.blocks.runs(elements, |run, block| {
            let scale = f64::from(scales[block - blocks.start]);
            for index in run.start - elements.start..run.end - elements.start {
                let value = if scale == 0.0 { 0.0 } else { f64::from(values[index]) / scale };
                let gap = 2.0 * codes.half_gap(value);
                steps[index] = if gap.is_finite() { (gap * scale.abs()) as f32 } else { 0.0 };
            }
        });
        Ok(steps)
    }
}

/// W₁ − W₀ of a matrix.
pub(super) struct Difference<'a> {
    pub tuned: &'a Weight<'a>,
    pub base: &'a Weight<'a>,
    pub rows: usize,
    pub columns: usize,
    held: Option<Vec<f32>>,
}

/// What rounding explains of a difference.
#[derive(Debug, Clone, Copy)]
pub(super) struct Floor {
    /// √(largest row sum of the variance) + √(largest column sum): above it, rounding explains nothing.
    pub bound: f64,
    /// √(mean variance)·(√m + √n), where the spectrum of even noise ends.
    pub mean: f64,
}

/// Sums that are made side by side.
const LANES: usize = 16;

/// Buffers for the rows of two weights, and for what they are.
#[derive(Default)]
struct Scratch {
    bytes: [Vec<u8>; 2],
    wide: [Vec<f32>; 2],
    /// Whether each weight's numbers are those of an f32.
    is_single: [bool; 2],
}

/// Sums over rows and columns of a matrix of squares.
#[derive(Clone)]
struct Sums {
    rows: Vec<f64>,
    columns: Vec<f64>,
    /// The bits that any of the numbers has, which tell what they were rounded to.
    bits: u32,
    is_single: bool,
}

impl Sums {
    fn new(rows: usize, columns: usize) -> Self {
        Self { rows: vec![0.0; rows], columns: vec![0.0; columns], bits: 0, is_single: true }
    }

    /// Of the squares of the powers of two at or below each number, none below `least` but of zero.
    ///
    /// `first` is the first of the rows. Sums of squares are made in f32 along a row and down a strip.
    fn add_powers(&mut self, first: usize, values: &[f32], least: f32) {
        let width = self.columns.len();
        let mut bits = 0;
        let mut columns = vec![0f32; width];
        for (sum, row) in self.rows[first..].iter_mut().zip(values.chunks_exact(width)) {
            // As many sums as a vector holds, so that each goes on by itself.
            let mut lanes = [0f32; LANES];
            let mut add = |lane: &mut f32, target: &mut f32, value: &f32| {
                let own = value.to_bits();
                bits |= own;
                let power = f32::from_bits(own & 0x7f80_0000);
                let power = if *value == 0.0 { 0.0 } else { power.max(least) };
                let square = power * power;
                *lane += square;
                *target += square;
            };
            let (values, rest) = row.as_chunks::<LANES>();
            let (targets, rest_of_targets) = columns.as_chunks_mut::<LANES>();
            for (values, targets) in values.iter().zip(targets) {
                for ((lane, target), value) in lanes.iter_mut().zip(targets).zip(values) {
                    add(lane, target, value);
                }
            }
            for ((lane, target), value) in lanes.iter_mut().zip(rest_of_targets).zip(rest) {
                add(lane, target, value);
            }
            *sum = lanes.iter().map(|lane| f64::from(*lane)).sum();
        }
        self.columns.iter_mut().zip(columns).for_each(|(sum, own)| *sum += f64::from(own));
        self.bits |= bits;
    }

    fn add_squares(&mut self, first: usize, values: &[f32]) {
        let width = self.columns.len();
        for (sum, row) in self.rows[first..].iter_mut().zip(values.chunks_exact(width)) {
            for (target, value) in self.columns.iter_mut().zip(row) {
                let square = f64::from(*value) * f64::from(*value);
                *sum += square;
                *target += square;
            }
        }
    }

    /// Puts those of rows below.
    fn append(&mut self, below: Self) {
        self.rows.extend(below.rows);
        self.columns.iter_mut().zip(below.columns).for_each(|(sum, value)| *sum += value);
        self.bits |= below.bits;
        self.is_single &= below.is_single;
    }

    /// ulp²/12 for each unit that was summed, by what the numbers were rounded to, whatever type they
    /// are stored in.
    fn variance(&self, dtype: &Dtype) -> f64 {
        let digits = match dtype {
            Dtype::Bf16 => 8,
            Dtype::F16 => 11,
            Dtype::F64 if !self.is_single => 53,
            _ if self.bits & 0xffff == 0 => 8,
            _ if self.bits & 0x1fff == 0 => 11,
            _ => 24,
        };
        4f64.powi(1 - digits) / 12.0
    }
}

/// What a tile tells beside its numbers.
struct Tile {
    square: f64,
    sums: [Sums; 3],
}

impl<'a> Difference<'a> {
    pub fn new(tuned: &'a Weight<'a>, base: &'a Weight<'a>, [rows, columns]: [usize; 2]) -> Self {
        Self { tuned, base, rows, columns, held: None }
    }

    /// What held it, for the next.
    pub fn into_room(self) -> Vec<f32> {
        self.held.unwrap_or_default()
    }

    fn tile(&self) -> usize {
        (TILE / self.columns.max(1)).max(1)
    }

    /// Reads rows of both and their difference.
    fn both(&self, rows: &Range<usize>, values: &mut [f32], scratch: &mut Scratch) -> Result<()> {
        let elements = rows.start * self.columns..rows.end * self.columns;
        let weights = [self.tuned, self.base];
        for (index, weight) in weights.into_iter().enumerate() {
            let (bytes, wide) = (&mut scratch.bytes[index], &mut scratch.wide[index]);
            weight.read_bytes(&elements, bytes)?;
            wide.resize(elements.len(), 0.0);
            let dtype = weight.dtype();
            scratch.is_single[index] = true;
            if dtype == Dtype::F64 {
                for (target, value) in wide.iter_mut().zip(widen_f64(&dtype, bytes)) {
                    *target = value as f32;
                    scratch.is_single[index] &= f64::from(*target) == value;
                }
            } else {
                widen(&dtype, bytes, wide);
            }
        }
        if scratch.is_single == [true; 2] {
            let [own, other] = &scratch.wide;
            for ((target, one), other) in values.iter_mut().zip(own).zip(other) {
                *target = one - other;
            }
        } else {
            let double = |index: usize| widen_f64(&weights[index].dtype(), &scratch.bytes[index]);
            for ((target, one), other) in values.iter_mut().zip(double(0)).zip(double(1)) {
                *target = (one - other) as f32;
            }
        }
        Ok(())
    }

    fn describe(&self, rows: Range<usize>, values: &mut [f32]) -> Result<Tile> {
        let mut sums = [0; 3].map(|_| Sums::new(rows.len(), self.columns));
        let mut square = 0.0;
        let mut scratch = Scratch::default();
        let is_transposed = |weight: &Weight<'_>| matches!(&weight.stored, Stored::Quantized(quantized) if quantized.transposed.is_some());
        // Of codes that lie transposed each read goes through all of a matrix.
        let strip =
            if is_transposed(self.tuned) || is_transposed(self.base) { TILE } else { STRIP };
        let height = (strip / self.columns.max(1)).max(1);
        for (index, values) in values.chunks_mut(height * self.columns).enumerate() {
            let first = index * height;
            let own = rows.start + first..rows.start + first + values.len() / self.columns;
            self.both(&own, values, &mut scratch)?;
            square += sum_of_squares(values);
            if !square.is_finite() {
                return Err(self.not_finite(&scratch));
            }
            for (index, weight) in [self.tuned, self.base].into_iter().enumerate() {
                let wide = &scratch.wide[index];
                sums[index].is_single &= scratch.is_single[index];
                match &weight.stored {
                    Stored::Quantized(quantized) => {
                        let elements = own.start * self.columns..own.end * self.columns;
                        let steps = weight.steps(quantized, &elements, wide)?;
                        sums[index].add_squares(first, &steps);
                    }
                    Stored::Plain(_) => {
                        let is_half = weight.dtype() == Dtype::F16;
                        let least = if is_half { 2f32.powi(-14) } else { 0.0 };
                        sums[index].add_powers(first, wide, least);
                    }
                }
            }
            if matches!(self.tuned.dtype(), Dtype::F32 | Dtype::F64) {
                sums[2].add_powers(first, values, 0.0);
            }
        }
        Ok(Tile { square, sums })
    }

    fn not_finite(&self, weights: &Scratch) -> Error {
        let is_at_fault = |index: usize| weights.wide[index].iter().any(|value| !value.is_finite());
        let weight = if is_at_fault(0) || !is_at_fault(1) { self.tuned } else { self.base };
        Error::checkpoint(
            weight.checkpoint.path(),
            format!(
                "{} has values that are not finite (NaN or infinity), of which no difference can be \
                 computed",
                weight.name
            ),
        )
    }

    /// Reads everything once: ‖D‖² and what rounding explains. What is small enough is held from then on,
    /// in a buffer of another that was held before.
    pub fn measure(&mut self, room: &mut Vec<f32>, task: &Task) -> Result<(f64, Floor)> {
        let (columns, tile) = (self.columns, self.tile());
        let elements = self.rows * columns;
        let bytes = (self.tuned.bytes() + self.base.bytes()) as f64 / elements as f64;
        let starts: Vec<usize> = (0..self.rows).step_by(tile).collect();
        let range = |start: usize| start..self.rows.min(start + tile);
        let each = |start: usize, values: &mut [f32]| {
            task.check()?;
            let found = self.describe(range(start), values);
            task.advance((values.len() as f64 * bytes) as u64);
            found
        };
        let mut square = 0.0;
        let mut all = [0; 3].map(|_| Sums::new(0, columns));
        let mut take = |tiles: Vec<Tile>| {
            for tile in tiles {
                square += tile.square;
                all.iter_mut().zip(tile.sums).for_each(|(all, own)| all.append(own));
            }
        };
        if elements <= HELD {
            let mut values = std::mem::take(room);
            values.resize(elements, 0.0);
            let parts: Vec<&mut [f32]> = values.chunks_mut(tile * columns).collect();
            let tiles = starts.par_iter().zip(parts).map(|(start, part)| each(*start, part));
            take(tiles.collect::<Result<_>>()?);
            self.held = Some(values);
        } else {
            for group in starts.chunks(16) {
                let tiles = group.par_iter().map(|start| {
                    let mut values = vec![0f32; range(*start).len() * columns];
                    each(*start, &mut values)
                });
                take(tiles.collect::<Result<_>>()?);
            }
        }
        Ok((square, self.floor(&all)))
    }

    fn floor(&self, [tuned, base, sums]: &[Sums; 3]) -> Floor {
        let of = |weight: &Weight<'_>, sums: &Sums| match &weight.stored {
            Stored::Quantized(_) => 1.0 / 12.0,
            Stored::Plain(_) => sums.variance(&weight.dtype()),
        };
        let (one, other) = (of(self.tuned, tuned), of(self.base, base));
        // Sums are made in f32, or in f64 where that is stored.
        let digits = if self.tuned.dtype() == Dtype::F64 && !tuned.is_single { 53 } else { 24 };
        let terms = TERMS * 4f64.powi(1 - digits) / 12.0;
        let total = |tuned: &[f64], base: &[f64], sums: &[f64]| -> (f64, f64) {
            let values = tuned.iter().zip(base).zip(sums);
            values
                .map(|((tuned, base), sums)| one * tuned + other * base + terms * sums)
                .fold((0.0, 0.0), |(largest, sum), value| (value.max(largest), sum + value))
        };
        let (row, all) = total(&tuned.rows, &base.rows, &sums.rows);
        let (column, _) = total(&tuned.columns, &base.columns, &sums.columns);
        let (rows, columns) = (self.rows as f64, self.columns as f64);
        Floor {
            bound: row.sqrt() + column.sqrt(),
            mean: (all / (rows * columns)).sqrt() * (rows.sqrt() + columns.sqrt()),
        }
    }
}

impl Source for Difference<'_> {
    fn shape(&self) -> [usize; 2] {
        [self.rows, self.columns]
    }

    fn held(&self) -> Option<&[f32]> {
        self.held.as_deref()
    }

    fn read(&self, rows: Range<usize>, values: &mut [f32]) -> Result<()> {
        self.both(&rows, values, &mut Scratch::default())
    }
}

/// Σx², in f64.
fn sum_of_squares(values: &[f32]) -> f64 {
    let mut lanes = [0f64; LANES];
    let mut add = |values: &[f32]| {
        for (lane, value) in lanes.iter_mut().zip(values) {
            *lane += f64::from(*value) * f64::from(*value);
        }
    };
    let (values, rest) = values.as_chunks::<LANES>();
    values.iter().for_each(|values| add(values));
    add(rest);
    lanes.iter().sum()
}

/// Whether two weights of one shape differ in any number.
///
/// # Errors
/// [`Error::Checkpoint`] if one has values that are not finite, [`Error::Io`].
pub(super) fn differ(tuned: &Weight<'_>, base: &Weight<'_>, task: &Task) -> Result<bool> {
    if let (Some(own), Some(other)) = (tuned.info(), base.info())
        && !(own.dtype.is_mergeable() && other.dtype.is_mergeable())
    {
        return Ok(own.dtype != other.dtype || tuned.read()? != base.read()?);
    }
    let elements = tuned.elements() as usize;
    let pair = Difference::new(tuned, base, [elements, 1]);
    let starts: Vec<usize> = (0..elements).step_by(TILE).collect();
    let is_same = starts.par_iter().map(|start| {
        task.check()?;
        let rows = *start..elements.min(start + TILE);
        let mut values = vec![0f32; rows.len()];
        let mut weights = Scratch::default();
        pair.both(&rows, &mut values, &mut weights)?;
        if weights.wide[0].iter().any(|value| !value.is_finite()) {
            return Err(pair.not_finite(&weights));
        }
        task.advance((tuned.bytes() + base.bytes()) * rows.len() as u64 / elements as u64);
        Ok(values.iter().all(|value| *value == 0.0))
    });
    let found: Vec<bool> = is_same.collect::<Result<_>>()?;
    Ok(found.contains(&false))
}
