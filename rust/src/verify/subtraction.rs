//! The bound on how far a base that was got back by subtraction lies from the one merged into.
//!
//! A stored merged weight M is W + Δ rounded once, the result R is M − Δ rounded once, so that
//! |R − W| ≤ ½ulp(M) + ½ulp(R) + γ·(Σ|terms| of either sum), with γ = n·2⁻²⁴ as in [`crate::verify`].
//! Σ|terms| of row i and column j of a product is at most |s|·‖Bᵢ‖·‖Aⱼ‖ (Cauchy and Schwarz), which
//! costs one multiplication an element and no second product. Where PEFT merged (`compat`), what it
//! rounds before the last time is added.

use std::ops::Range;
use std::path::Path;

use rayon::prelude::*;
use serde::Serialize;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::execute::compute::Computer;
use crate::execute::queue;
use crate::kernel::convert::widen_f64;
use crate::kernel::{self, InstructionSet};
use crate::parallel::task::{self, Task};
use crate::plan::{Compat, Inputs, Plan, PlannedTensor};
use crate::tensor::dtype::Dtype;
use crate::verify::{HalfUlp, PEFT_ROUNDINGS};

/// What the terms of second order can add to a bound, as a share of it and by far.
const SECOND_ORDER: f64 = 1.0 / 64.0;

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

    /// Adds rows of a tensor: the merged values and those that came back.
    fn add_rows<T: Copy + Into<f64>>(
        &mut self,
        rows: Range<usize>,
        [merged, restored]: &[Vec<T>; 2],
        norms: &[Norms],
        rounding: Rounding,
        sizes: &mut [f64],
    ) {
        let columns = sizes.len();
        let values = merged.chunks_exact(columns).zip(restored.chunks_exact(columns));
        for (row, (merged, restored)) in rows.zip(values) {
            sizes.fill(0.0);
            norms.iter().for_each(|norm| norm.add_sizes(row, sizes));
            for ((merged, restored), terms) in merged.iter().zip(restored).zip(sizes.iter()) {
                let (merged, restored): (f64, f64) = ((*merged).into(), (*restored).into());
                // What is left out by taking |R| for |W| is of second order.
                let size = (merged.abs() + restored.abs() + 2.0 * terms) * (1.0 + SECOND_ORDER);
                let bound = rounding.bound(merged, restored, size);
                if merged.is_finite() && restored.is_finite() {
                    self.largest = self.largest.max(bound);
                    self.norm += bound * bound;
                    self.change += (merged - restored) * (merged - restored);
                }
            }
        }
    }
}

/// Bounds the distance for a plan that subtracts, once it is carried out into `output`.
///
/// # Errors
/// That a file changed meanwhile, [`Error::Io`], [`Error::Cancelled`], or [`Error::Checkpoint`] if
/// the output is not the plan's.
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
    let further = if plan.options.compat == Some(Compat::Peft) { PEFT_ROUNDINGS } else { 0 };
    let total = pool.install(|| {
        merged
            .par_iter()
            .map(|tensor| distance_of(computer, tensor, &result, further * tensor.updates().len()))
            .try_reduce(Distance::default, |left, right| Ok(left.and(right)))
    })?;
    inputs.check_unchanged()?;
    result.check_unchanged()?;
    Ok(Distance { norm: total.norm.sqrt(), change: total.change.sqrt(), ..total })
}

/// What rounds, of one tensor.
#[derive(Debug, Clone, Copy)]
struct Rounding {
    merged: HalfUlp,
    /// How often the merge rounded something no larger than all terms together, before the last time.
    further: f64,
    restored: HalfUlp,
    gamma: f64,
}

impl Rounding {
    /// The bound at one weight, of whose sums the terms' sizes add up to no more than `size`.
    #[inline]
    fn bound(self, merged: f64, restored: f64, size: f64) -> f64 {
        let last = self.merged.at(merged) + self.restored.at(restored);
        last + self.further * self.merged.at(size) + self.gamma * size
    }
}

/// One product: where it lies, and the norms of its factors' vectors.
struct Norms {
    start: usize,
    rows: Vec<f64>,
    columns: Vec<f64>,
}

impl Norms {
    /// Adds the bound on Σ|terms| of each element of a row of the tensor.
    fn add_sizes(&self, row: usize, sizes: &mut [f64]) {
        let Some(norm) = row.checked_sub(self.start).and_then(|row| self.rows.get(row)) else {
            return;
        };
        sizes.iter_mut().zip(&self.columns).for_each(|(size, column)| *size += norm * column);
    }
}

fn norms(inputs: &Inputs, tensor: &PlannedTensor) -> Result<(Vec<Norms>, usize)> {
    let mut steps = 0;
    let mut all = Vec::new();
    for update in tensor.updates() {
        let pair = update.pair(&inputs.adapters[update.adapter])?;
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
        let start = update.slice.rows.as_ref().map_or(0, |row_range| row_range.start as usize);
        all.push(Norms { start, rows, columns });
    }
    Ok((all, steps))
}

fn distance_of(
    computer: Computer<'_>,
    tensor: &PlannedTensor,
    result: &Checkpoint,
    further_roundings: usize,
) -> Result<Distance> {
    let missing = || Error::checkpoint(result.path(), format!("has no tensor {}", tensor.name));
    let location = *result.tensors().get(&tensor.name).ok_or_else(missing)?;
    let stored = result.at(location);
    let file = &result.shards()[location.shard].file;
    let (norms, steps) = norms(computer.inputs, tensor)?;
    let single = tensor.source.dtype != Dtype::F64;
    let gamma = (steps as f64 + 4.0) * if single { 2f64.powi(-24) } else { 2f64.powi(-53) };
    let (_, columns) = tensor.matrix();
    let (from, to) = (&tensor.source.dtype, &stored.dtype);
    let rounding = Rounding {
        merged: HalfUlp::of(from),
        further: further_roundings as f64,
        restored: HalfUlp::of(to),
        gamma,
    };
    let is_double = *from == Dtype::F64 || *to == Dtype::F64;
    let mut total = Distance { tensors: 1, ..Distance::default() };
    let (mut buffer, mut restored) = (Vec::new(), Vec::new());
    let mut sizes = vec![0.0; columns];
    let mut single = [Vec::new(), Vec::new()];
    for tile in queue::tiles(tensor) {
        computer.task.check()?;
        buffer.resize(tile.len() * columns * from.size(), 0);
        computer.read(tensor, &mut buffer, tile.start * columns * from.size())?;
        computer.task.advance(buffer.len() as u64);
        restored.resize(tile.len() * columns * to.size(), 0);
        file.read_into(stored, (tile.start * columns * to.size()) as u64, &mut restored)?;
        if is_double {
            let values = [widen_f64(from, &buffer), widen_f64(to, &restored)];
            total.add_rows(tile, &values, &norms, rounding, &mut sizes);
        } else {
            for (values, (dtype, bytes)) in
                single.iter_mut().zip([(from, &buffer), (to, &restored)])
            {
                values.resize(tile.len() * columns, 0f32);
                let wide = bytemuck::cast_slice_mut(values);
                kernel::convert(computer.set, dtype, bytes, &Dtype::F32, wide);
            }
            total.add_rows(tile, &single, &norms, rounding, &mut sizes);
        }
    }
    Ok(total)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::execute;
    use crate::fixtures::{open, plain, ramp, write, write_adapter};
    use crate::plan::{Options, PlannedChange};

    const ROWS: u64 = 30;
    const COLUMNS: u64 = 44;

    /// A base, its merge and what is left of that without the adapter, as values of one tensor.
    fn round_trip(dtype: &Dtype) -> (Distance, Vec<f64>, Vec<f64>) {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        let weight = ("a.weight", dtype.clone(), &[ROWS, COLUMNS][..], ramp(ROWS * COLUMNS, 5));
        write(&root.join("base/model.safetensors"), &[weight]);
        let adapter = write_adapter(&root.join("adapter"), &[("a", ROWS, COLUMNS)], "");
        let run = |from: &str, to: &str, options: Options| {
            let inputs = open(&root.join(from), std::slice::from_ref(&adapter));
            let plan = Plan::new(&inputs, options).expect("fits");
            let how = execute::Options::default();
            execute::execute(&inputs, &plan, &root.join(to), &how, &Task::new()).expect("written");
            (inputs, plan)
        };
        run("base", "merged", plain());
        let (inputs, plan) = run("merged", "again", Options { subtract: true, ..plain() });
        let found = distance(&inputs, &plan, &root.join("again"), None, &Task::new());
        let values = |name: &str| {
            let file = Checkpoint::open(&root.join(name)).expect("sound");
            let at = file.tensors()["a.weight"];
            widen_f64(dtype, &file.shards()[at.shard].file.read(file.at(at)).expect("read"))
        };
        (found.expect("measured"), values("base"), values("again"))
    }

    #[test]
    fn nothing_lies_further_from_the_base_than_is_said() {
        for (dtype, share) in
            [(Dtype::F64, 1e-13), (Dtype::F32, 1e-5), (Dtype::F16, 0.01), (Dtype::Bf16, 0.05)]
        {
            let (found, base, again) = round_trip(&dtype);
            let errors: Vec<_> = base.iter().zip(&again).map(|(w, r)| (w - r).abs()).collect();
            let furthest = errors.iter().copied().fold(0.0, f64::max);
            assert!(furthest <= found.largest, "{dtype}: {furthest} and {found:?}");
            let norm = errors.iter().map(|error| error * error).sum::<f64>().sqrt();
            assert!(norm <= found.norm, "{dtype}: {norm} and {found:?}");
            // And what is said is worth something.
            assert!(found.norm <= share * found.change, "{dtype}: {found:?}");
            assert_eq!(found.tensors, 1);
        }
    }

    #[test]
    fn the_base_alone_is_the_base() {
        let directory = tempfile::tempdir().expect("a directory");
        let root = directory.path();
        let weight = ("a.weight", Dtype::F32, &[ROWS, COLUMNS][..], ramp(ROWS * COLUMNS, 5));
        write(&root.join("base/model.safetensors"), &[weight]);
        let adapter = write_adapter(&root.join("adapter"), &[("a", ROWS, COLUMNS)], "");
        let inputs = open(&root.join("base"), &[adapter]);
        let plan = Plan::new(&inputs, plain()).expect("fits");
        assert_eq!((plan.count(PlannedChange::Merge), plan.count(PlannedChange::Copy)), (1, 0));
        let alone = plan.of_base_alone(&inputs, None).expect("floats");
        assert_eq!((alone.count(PlannedChange::Merge), alone.count(PlannedChange::Copy)), (0, 1));
        let wide = plan.of_base_alone(&inputs, Some(Dtype::F16)).expect("floats");
        assert_eq!(
            (wide.count(PlannedChange::Cast), wide.config_changes.dtype.as_deref()),
            (1, Some("float16"))
        );
    }
}
