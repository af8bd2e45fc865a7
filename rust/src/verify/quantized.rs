//! Weights that were quantised again, held against the exact ones.
//!
//! The bytes are computed once more. Rows in which they differ, and a sample of the others, are
//! decoded: each weight must be the exact one rounded to a code, so no farther from it than half the
//! gap between the codes around it in units of the stored scale. Another rounding of the scale
//! passes, such as one to a power of two; a scale that fits the weights badly does not.

use super::exact::{ExactRow, Tolerance};
use super::{Change, Checked, Checker, Merged, Room, sample_rows};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::{Quantized, QuantizedWeights, Scales};
use crate::error::Result;
use crate::execute::queue;
use crate::execute::requantize::{Finished, Requantizing};
use crate::plan::{Action, Origin, PlannedTensor, dequantized_plan, updates_in_model};

/// By how much a stored scale may be less than the right one, or more than a power of two above it:
/// scales in 16 bits are rounded.
const SLACK: f64 = 0.01;

/// What the names of bitsandbytes' states have.
const STATE: &str = ".quant_state.bitsandbytes__";

/// The plan of a tensor as the merged checkpoint writes it: a quantised weight may have been written
/// out in floats, under the name that the model gives it, and then its scales need not be there
/// (`None`). `name` is the one it has there.
pub(super) fn as_written(
    planned: &PlannedTensor,
    name: &str,
    quantized: &QuantizedWeights,
    merged: &Checkpoint,
) -> Option<PlannedTensor> {
    let widened = |name: &str| {
        let meant = quantized.get(name)?;
        let stored = merged.tensor(name)?;
        let is_float = stored.dtype.is_mergeable() && stored.shape == meant.logical.shape;
        is_float.then(|| (meant.clone(), stored.dtype.clone()))
    };
    if quantized.owner(&planned.name).is_some_and(|owner| widened(owner).is_some()) {
        return merged.tensor(name).map(|_| planned.clone());
    }
    // Text, in which a number can have more digits.
    if matches!(planned.action, Action::Rescale) && planned.name.contains(STATE) {
        let mut planned = planned.clone();
        if let Some(stored) = merged.tensor(name) {
            planned.source.shape.clone_from(&stored.shape);
        }
        return Some(planned);
    }
    match (planned.origin, widened(quantized.weight_of(&planned.name))) {
        (Origin::Base(_), Some((meant, dtype))) => {
            let updates = updates_in_model(planned);
            Some(dequantized_plan(planned.clone(), &meant, Some(&dtype), updates))
        }
        _ => Some(planned.clone()),
    }
}

/// Whether every scale is near enough to the right one; else the block and both.
fn odd_scale(
    scheme: &Quantized,
    right: &[f32],
    stored: &[f32],
    outer: &[f64],
) -> Option<(usize, String)> {
    for (block, (right, stored)) in right.iter().zip(stored).enumerate() {
        let (right, stored) = (f64::from(*right), f64::from(*stored));
        let fits = match &scheme.scales {
            Scales::None => true,
            // One that is too small shows in the weights that are beyond it.
            Scales::Plain(..) | Scales::InUnits(_) => {
                right == 0.0 || stored.abs() <= 2.0 * right * (1.0 + SLACK)
            }
            Scales::Nested(nested) => {
                let bound = nested.half_step() * outer[block / nested.run];
                (stored - right).abs() <= bound * (1.0 + SLACK) + 1e-6 * right.abs()
            }
        };
        if !fits {
            return Some((block, format!("is {stored:e} instead of {right:e}")));
        }
    }
    None
}

impl Checker<'_> {
    pub(super) fn compare_requantized(
        &self,
        planned: &PlannedTensor,
        merged: Merged<'_>,
        (buffers, stored): &mut Room,
    ) -> Result<Checked> {
        let name = &planned.name;
        let Some(scheme) = self.quantized.of_codes(name) else {
            let problem = format!("tensor {name} is quantised, but its scales are not beside it");
            return Ok(Checked { problem: Some(problem), ..Checked::default() });
        };
        let (rows, columns) = planned.matrix();
        let prepared = self.computer.prepare(planned)?;
        let requantizing = Requantizing::new(planned, Vec::new());
        let sample = sample_rows(name, rows);
        let mut wanted: Vec<usize> =
            (0..rows).filter(|row| self.full || sample.contains(row)).collect();
        let mut finished = None;
        for unit in queue::encoded_units(planned) {
            self.computer.task.check()?;
            let encoded =
                requantizing.encode(&self.computer, planned, &prepared, &unit, buffers)?;
            let (first, codes) = (encoded.first, encoded.codes);
            let bytes = merged.read(first as usize..first as usize + codes.len(), stored)?;
            self.computer.task.advance(bytes.len() as u64);
            if codes != bytes {
                wanted.extend(unit.filter(|row| {
                    let start = scheme.byte_at(row * columns) - first as usize;
                    let end = scheme.byte_at((row + 1) * columns - 1) - first as usize + 1;
                    codes[start..end] != bytes[start..end]
                }));
            }
            finished = encoded.scales.or(finished);
        }
        let Some(Finished { tensors: right_scales, values: right }) = finished else {
            return Ok(Checked::default());
        };
        let count = scheme.blocks.count();
        if count != right.len() {
            let problem = format!("tensor {name} has {count} scales instead of {}", right.len());
            return Ok(Checked { problem: Some(problem), ..Checked::default() });
        }
        let scales = scheme.scales.read(self.merged, 0..count)?;
        let mut same = true;
        for (stored, right) in scheme.scales.tensors().iter().zip(&right_scales) {
            same &= stored.read(self.merged, 0..stored.tensor.bytes() as usize)? == *right;
        }
        let outer = match &scheme.scales {
            Scales::Nested(nested) => nested.largest(self.merged)?,
            _ => Vec::new(),
        };
        if !same {
            if let Some((block, text)) = odd_scale(scheme, &right, &scales, &outer) {
                let problem = format!("tensor {name}: the scale of block {block} {text}");
                return Ok(Checked { problem: Some(problem), ..Checked::default() });
            }
            // Other scales make other weights of the same codes.
            wanted.extend(0..rows);
        }
        wanted.sort_unstable();
        wanted.dedup();
        let mut exact = ExactRow::new(self.computer, planned, &prepared, Tolerance::default())?;
        let mut change = Change::default();
        for row in wanted {
            self.computer.task.check()?;
            let elements = row * columns..(row + 1) * columns;
            let decoded = scheme.decode(self.merged, &elements)?;
            let decoded: Vec<f64> = decoded.into_iter().map(f64::from).collect();
            let mut of_column = vec![0; columns];
            scheme.blocks.runs(&elements, |run, block| {
                of_column[run.start - elements.start..run.end - elements.start].fill(block);
            });
            let rounding = |column: usize, exact: f64| {
                let (block, value) = (of_column[column], decoded[column]);
                let (right, scale) = (f64::from(right[block]), f64::from(scales[block]));
                let largest = f64::from(scheme.codes.largest());
                // A nested scheme encodes with the scale as it was before that was quantised.
                let nested = matches!(scheme.scales, Scales::Nested(_));
                let unit = if nested { right } else { scale };
                if unit == 0.0 {
                    return 0.0;
                }
                let beyond = (exact.abs() - largest * unit).max(0.0);
                // A scale of 8 bits is off by more, and the largest one can be too small.
                let is_coarse = matches!(scheme.scales, Scales::InUnits(_));
                let slack = if is_coarse { 1.0 / 6.0 } else { SLACK };
                let beyond = if beyond <= slack * exact.abs() { beyond } else { 0.0 };
                let moved = if nested && scale != 0.0 {
                    (value / scale).abs() * (scale - right).abs()
                } else {
                    0.0
                };
                scheme.codes.half_gap(exact / unit) * unit + beyond + moved + 1e-6 * value.abs()
            };
            match exact.compare(row, &decoded, &rounding)? {
                Ok(row_change) => change.add(&row_change),
                Err((column, text)) => {
                    let problem = format!("tensor {name}: row {row}, column {column}: {text}");
                    return Ok(Checked { problem: Some(problem), change, sha256: None });
                }
            }
        }
        Ok(Checked { change, ..Checked::default() })
    }
}
