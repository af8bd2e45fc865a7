//! Strategies whose coefficients follow, tensor by tensor, from inner products of the updates.

use std::ops::Range;

use super::entries::{NoProducts, what_is_no_product};
use super::options::Options;
use super::update::Update;
use super::value::{Action, Inputs, PlannedShard};
use crate::coefficients::Gram;
use crate::error::{Error, Result};
use crate::kernel::convert::widen_f64;
use crate::linalg::{Matrix, Multiply, View};
use crate::parallel::task::Task;

/// Gives each update the coefficient that it has under the strategy of the options, if that is one of
/// these.
///
/// # Errors
/// [`Error::Unsupported`] with everything that is no product, [`Error::Plan`] for updates that overlap in
/// part, [`Error::Adapter`] if a file changed meanwhile, [`Error::Io`], [`Error::Cancelled`].
pub(super) fn weigh_by_products(
    inputs: &Inputs,
    options: &Options,
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
    refused.finish(inputs, options.strategy.name(), "weighs products of two factors")?;
    let weights = options.weights.clone().unwrap_or_else(|| vec![1.0; count]);
    let factor = options.lambda() * if options.subtract { -1.0 } else { 1.0 };
    for tensor in shards.iter_mut().flat_map(|shard| &mut shard.tensors) {
        task.check()?;
        let name = tensor.name.clone();
        let Action::Merge(updates) = &mut tensor.action else { continue };
        let mut places: Vec<Option<Range<u64>>> = Vec::new();
        for update in updates.iter() {
            if !places.contains(&update.slice.rows) {
                places.push(update.slice.rows.clone());
            }
        }
        if overlap(&places) {
            return Err(Error::Plan(vec![format!(
                "{name}: adapters change different rows of it that overlap, for which the strategy {} is \
                 not known; adapters of one format, with the same modules, can be merged",
                options.strategy.name()
            )]));
        }
        for rows in places {
            let own: Vec<&Update> =
                updates.iter().filter(|update| update.slice.rows == rows).collect();
            let products = inner_products(inputs, &own)?;
            let found = method.coefficients(&products, &weights);
            for update in updates.iter_mut().filter(|update| update.slice.rows == rows) {
                update.weight = found[update.adapter] * factor;
            }
        }
    }
    Ok(())
}

/// Whether some of different ranges share rows.
fn overlap(places: &[Option<Range<u64>>]) -> bool {
    places.iter().enumerate().any(|(index, one)| {
        places[..index].iter().any(|other| match (one, other) {
            (Some(one), Some(other)) => one.start < other.end && other.start < one.end,
            _ => true,
        })
    })
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

/// ⟨Δᵢ, Δⱼ⟩ of all adapters; 0 for those that do not change the tensor.
fn inner_products(inputs: &Inputs, updates: &[&Update]) -> Result<Matrix> {
    let read = |update: &&Update| -> Result<Factors> {
        let pair = update.pair(&inputs.adapters[update.adapter])?;
        Ok(Factors {
            adapter: update.adapter,
            scale: update.scale,
            rank: pair.rank,
            inputs: pair.inputs,
            outputs: pair.outputs,
            a: widen_f64(&pair.a_dtype, &pair.a),
            b: widen_f64(&pair.b_dtype, &pair.b),
        })
    };
    let all = updates.iter().map(read).collect::<Result<Vec<_>>>()?;
    let mut products = Matrix::zeros(inputs.adapters.len(), inputs.adapters.len());
    for one in &all {
        for other in &all {
            let (i, j) = (one.adapter, other.adapter);
            if i >= j {
                products.set(i, j, products.get(i, j) + inner(one, other));
            }
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

/// The weights of methods that need no inner products.
pub(super) fn plain_weights(method: &Gram, given: &[f64], lambda: f64) -> Vec<f64> {
    let found = match method.needs_no_products() {
        true => method.coefficients(&Matrix::zeros(0, 0), given),
        // Each tensor has its own.
        false => return given.to_vec(),
    };
    found.into_iter().map(|weight| weight * lambda).collect()
}
