//! Strategies whose coefficients follow, tensor by tensor, from inner products of the updates.

use std::ops::Range;

use super::entries::{NoProducts, what_is_no_product};
use super::options::Options;
use super::update::Update;
use super::value::{Action, Inputs, PlannedShard};
use super::weights::ModuleWeights;
use crate::adapter::factors::Pair;
use crate::error::{Error, Result};
use crate::kernel::convert::widen_f64;
use crate::linalg::{Matrix, Multiply, View};
use crate::parallel::task::Task;

/// Gives each update the coefficient that it has under the strategy of the options, if that is one of
/// these.
///
/// # Errors
/// [`Error::Unsupported`] with everything that is no product, [`Error::Argument`] for modules that are
/// weighed together and have different weights, [`Error::Adapter`] if a file changed meanwhile, [`Error::Io`], [`Error::Cancelled`].
pub(super) fn weigh_by_products(
    inputs: &Inputs,
    options: &Options,
    weights: &ModuleWeights,
    shards: &mut [PlannedShard],
    task: &Task,
) -> Result<()> {
    let count = inputs.adapters.len();
    let Some(method) = options.gram(count)?.filter(|method| !method.needs_no_products()) else {
        return Ok(());
    };
    let mut refused = NoProducts::default();
    let tensors = || shards.iter().flat_map(|shard| &shard.tensors);
    for tensor in tensors() {
        refused.look(tensor, &|update| what_is_no_product(tensor, update));
    }
    refused.finish(inputs, &options.named(), "weighs products of two factors")?;
    let factor = options.lambda() * if options.subtract { -1.0 } else { 1.0 };
    for tensor in shards.iter_mut().flat_map(|shard| &mut shard.tensors) {
        task.check()?;
        let (height, name) = (tensor.matrix().0 as u64, tensor.name.clone());
        let Action::Merge(updates) = &mut tensor.action else { continue };
        for unit in units(updates, height) {
            let own: Vec<&Update> = unit.iter().map(|index| &updates[*index]).collect();
            let weights = weights_of(inputs, weights, &own, &name)?;
            let products = inner_products(inputs, &own, height)?;
            let found = method.coefficients(&products, &weights);
            for index in unit {
                let update = &mut updates[index];
                update.weight = found[update.adapter] * factor;
            }
        }
    }
    Ok(())
}

/// The stored rows on which an update of a tensor of that height lies.
fn rows_of(update: &Update, height: u64) -> Range<u64> {
    update.slice.rows.clone().unwrap_or(0..height)
}

/// The updates that are weighed together, by their places: those of the same rows, and of rows that share
/// some, where one adapter changes a part of what another does. What one does not change counts as zero.
fn units(updates: &[Update], height: u64) -> Vec<Vec<usize>> {
    let mut order: Vec<usize> = (0..updates.len()).collect();
    order.sort_by_key(|index| rows_of(&updates[*index], height).start);
    let mut units: Vec<Vec<usize>> = Vec::new();
    let mut end = 0;
    for index in order {
        let rows = rows_of(&updates[index], height);
        match units.last_mut() {
            Some(last) if rows.start < end => last.push(index),
            _ => units.push(vec![index]),
        }
        end = end.max(rows.end);
    }
    units.iter_mut().for_each(|unit| unit.sort_unstable());
    units
}

/// The weight of each adapter in a unit; where it does not change it, the one of the unit's first module.
fn weights_of(
    inputs: &Inputs,
    weights: &ModuleWeights,
    unit: &[&Update],
    tensor: &str,
) -> Result<Vec<f64>> {
    let title = |update: &Update| {
        let module = &inputs.adapters[update.adapter].modules()[&update.module];
        module.title().into_owned()
    };
    let mut found = weights.of_module(&title(unit[0]));
    let mut known = vec![None; found.len()];
    for update in unit {
        let (module, adapter) = (title(update), update.adapter);
        let weight = weights.of_module(&module)[adapter];
        match &known[adapter] {
            Some(first) if found[adapter] != weight => {
                return Err(Error::Argument(format!(
                    "the weights of {} are {} for {first} and {weight} for {module}, which are parts of \
                     {tensor} that another adapter changes at once; give both modules one weight",
                    inputs.adapters[adapter].path().display(),
                    found[adapter]
                )));
            }
            Some(_) => {}
            None => {
                found[adapter] = weight;
                known[adapter] = Some(module);
            }
        }
    }
    Ok(found)
}

/// An update in numbers.
struct Factors {
    adapter: usize,
    scale: f64,
    rank: usize,
    inputs: usize,
    outputs: usize,
    a: Vec<f64>,
    b: Vec<f64>,
}

/// An update with its factors as they are stored, and the stored rows on which it lies.
struct Placed<'a> {
    update: &'a Update,
    pair: Pair,
    rows: Range<u64>,
}

impl Placed<'_> {
    /// Its numbers in some of its rows.
    fn within(&self, rows: &Range<u64>) -> Factors {
        let first = self.rows.start;
        let within = (rows.start - first) as usize..(rows.end - first) as usize;
        let pair = self.pair.clone().stored_rows(self.update.orientation(), within);
        Factors {
            adapter: self.update.adapter,
            scale: self.update.scale,
            rank: pair.rank,
            inputs: pair.inputs,
            outputs: pair.outputs,
            a: widen_f64(&pair.a_dtype, &pair.a),
            b: widen_f64(&pair.b_dtype, &pair.b),
        }
    }
}

/// ⟨Δᵢ, Δⱼ⟩ of all adapters; 0 for those that do not change the tensor.
fn inner_products(inputs: &Inputs, updates: &[&Update], height: u64) -> Result<Matrix> {
    let mut all = Vec::with_capacity(updates.len());
    for update in updates {
        let pair = update.pair(&inputs.adapters[update.adapter])?;
        all.push(Placed { update, pair, rows: rows_of(update, height) });
    }
    let whole: Vec<Factors> = all.iter().map(|placed| placed.within(&placed.rows)).collect();
    let mut products = Matrix::zeros(inputs.adapters.len(), inputs.adapters.len());
    for (one, one_whole) in all.iter().zip(&whole) {
        for (other, other_whole) in all.iter().zip(&whole) {
            let (i, j) = (one_whole.adapter, other_whole.adapter);
            if i < j {
                continue;
            }
            let rows = one.rows.start.max(other.rows.start)..one.rows.end.min(other.rows.end);
            let product = if one.rows == other.rows {
                inner(one_whole, other_whole)
            } else if rows.is_empty() {
                0.0
            } else {
                inner(&one.within(&rows), &other.within(&rows))
            };
            products.set(i, j, products.get(i, j) + product);
        }
    }
    for i in 0..products.rows {
        for j in 0..i {
            products.set(j, i, products.get(i, j));
        }
    }
    Ok(products)
}

/// s·s′·Σ (BᵀB′)∘(AA′ᵀ).
fn inner(one: &Factors, other: &Factors) -> f64 {
    let outputs = |factors: &'_ Factors| (factors.outputs, factors.rank, 1);
    let inputs = |factors: &'_ Factors| (factors.inputs, 1, factors.inputs);
    let cross = |left: &[f64], right: &[f64], sizes: [(usize, usize, usize); 2]| {
        let view = |data, (depth, depth_step, step), count| View {
            data,
            first: 0,
            depth,
            depth_step,
            count,
            step,
        };
        let mut result = vec![0.0; one.rank * other.rank];
        let (left, right) = (view(left, sizes[0], one.rank), view(right, sizes[1], other.rank));
        f64::multiply(left, right, &mut result, one.rank.max(1));
        result
    };
    let left = cross(&one.b, &other.b, [outputs(one), outputs(other)]);
    let right = cross(&one.a, &other.a, [inputs(one), inputs(other)]);
    let terms = left.iter().zip(&right).map(|(left, right)| left * right);
    one.scale * other.scale * terms.sum::<f64>()
}
