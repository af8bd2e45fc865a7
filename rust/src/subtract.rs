//! How far a base that was got back by subtraction can lie from the one that was merged into.
//!
//! A stored merged weight M is W + Δ rounded once, the result R is M − Δ rounded once, so that
//! |R − W| ≤ ½ulp(M) + ½ulp(R) + γ·(Σ|terms| of either sum), with γ = n·2⁻²⁴ as in [`crate::verify`].
//! Σ|terms| of row i and column j of a product is at most |s|·‖Bᵢ‖·‖Aⱼ‖ (Cauchy and Schwarz), which
//! costs one multiplication an element and no second product.

use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::execute::compute::Computer;
use crate::execute::queue;
use crate::factors::Pair;
use crate::kernel::InstructionSet;
use crate::kernel::convert::widen_f64;
use crate::plan::{Inputs, Plan, PlannedTensor};
use crate::task::{self, Task};
use crate::verify::half_ulp;

/// A bound on the difference between what came back and what was merged into.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Distance {
    /// Tensors out of which something was taken.
    pub tensors: usize,
    /// No weight lies further from the base's than this.
    pub largest: f64,
    /// The root of the sum of squares of every weight's bound.
    pub norm: f64,
    /// ‖M − R‖: what was taken out.
    pub change: f64,
}

impl Distance {
    /// Both together, `norm` and `change` being squares still.
    fn and(self, other: Self) -> Self {
        Self {
            tensors: self.tensors + other.tensors,
            largest: self.largest.max(other.largest),
            norm: self.norm + other.norm,
            change: self.change + other.change,
        }
    }
}

/// Bounds the distance for a plan that subtracts, once it is carried out into `output`.
///
/// # Errors
/// [`Error::Io`], [`Error::Cancelled`], or [`Error::Checkpoint`] if the output is not the plan's.
pub fn distance(
    inputs: &Inputs,
    plan: &Plan,
    output: &Path,
    threads: Option<usize>,
    task: &Task,
) -> Result<Distance> {
    let result = Checkpoint::open(output)?;
    let pool = task::build_pool(threads)?;
    let computer = Computer { inputs, set: InstructionSet::detect(), task };
    let merged: Vec<_> =
        plan.tensors().map(|(_, tensor)| tensor).filter(|t| !t.updates().is_empty()).collect();
    task.expect(merged.iter().map(|tensor| tensor.source.bytes()).sum());
    let total = pool.install(|| {
        merged
            .par_iter()
            .map(|tensor| distance_of(computer, tensor, &result))
            .try_reduce(Distance::default, |left, right| Ok(left.and(right)))
    })?;
    Ok(Distance { norm: total.norm.sqrt(), change: total.change.sqrt(), ..total })
}

/// One product: where it lies, and the norms of its factors' vectors.
struct Norms {
    start: usize,
    rows: Vec<f64>,
    columns: Vec<f64>,
}

impl Norms {
    /// The bound on Σ|terms| at a row and column of the tensor.
    fn size(&self, row: usize, column: usize) -> f64 {
        match row.checked_sub(self.start).and_then(|row| self.rows.get(row)) {
            Some(norm) => norm * self.columns[column],
            None => 0.0,
        }
    }
}

fn norms(inputs: &Inputs, tensor: &PlannedTensor) -> (Vec<Norms>, usize) {
    let mut steps = 0;
    let all = tensor.updates().iter().map(|update| {
        let pair = Pair::of(&inputs.adapters[update.adapter], update);
        steps += pair.rank + 4;
        let squares = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
        let scale = update.coefficient().abs();
        let b = widen_f64(&pair.b_dtype, &pair.b);
        let of_outputs: Vec<_> = b.chunks_exact(pair.rank).map(|row| squares(row).sqrt()).collect();
        let mut of_inputs = vec![0.0; pair.inputs];
        for row in widen_f64(&pair.a_dtype, &pair.a).chunks_exact(pair.inputs) {
            of_inputs.iter_mut().zip(row).for_each(|(sum, value)| *sum += value * value);
        }
        let of_inputs = of_inputs.into_iter().map(|sum| scale * sum.sqrt()).collect();
        let (rows, columns) =
            if update.transposed { (of_inputs, of_outputs) } else { (of_outputs, of_inputs) };
        let start = update.part.rows.as_ref().map_or(0, |band| band.start as usize);
        Norms { start, rows, columns }
    });
    (all.collect(), steps)
}

fn distance_of(
    computer: Computer<'_>,
    tensor: &PlannedTensor,
    result: &Checkpoint,
) -> Result<Distance> {
    let missing = || Error::checkpoint(result.path(), format!("has no tensor {}", tensor.name));
    let location = *result.tensors().get(&tensor.name).ok_or_else(missing)?;
    let stored = result.at(location);
    let bytes = result.shards()[location.shard].file.tensor_bytes(stored);
    let (norms, steps) = norms(computer.inputs, tensor);
    let single = tensor.source.dtype != Dtype::F64;
    let gamma = (steps as f64 + 4.0) * if single { 2f64.powi(-24) } else { 2f64.powi(-53) };
    let (_, columns) = tensor.matrix();
    let (from, to) = (tensor.source.dtype.clone(), stored.dtype.clone());
    let mut total = Distance { tensors: 1, ..Distance::default() };
    let mut buffer = Vec::new();
    for tile in queue::tiles(tensor) {
        computer.task.check()?;
        buffer.resize(tile.len() * columns * from.size(), 0);
        computer.read(tensor, &mut buffer, tile.start * columns * from.size())?;
        computer.task.advance(buffer.len() as u64);
        let merged = widen_f64(&from, &buffer);
        let range = tile.start * columns * to.size()..tile.end * columns * to.size();
        let restored = widen_f64(&to, &bytes[range]);
        for (position, (merged, restored)) in merged.iter().zip(&restored).enumerate() {
            let (row, column) = (tile.start + position / columns, position % columns);
            let terms: f64 = norms.iter().map(|norm| norm.size(row, column)).sum();
            // What is left out by taking |R| for |W| is of second order.
            let sizes = (merged.abs() + restored.abs() + 2.0 * terms) * (1.0 + 2f64.powi(-6));
            let bound = half_ulp(&from, *merged) + half_ulp(&to, *restored) + gamma * sizes;
            if merged.is_finite() && restored.is_finite() {
                total.largest = total.largest.max(bound);
                total.norm += bound * bound;
                total.change += (merged - restored) * (merged - restored);
            }
        }
    }
    Ok(total)
}
