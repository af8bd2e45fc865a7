//! Parameters that hold a matrix for each expert: every expert's update is computed by itself, and all of
//! them are written, and reported, as the one parameter that they are.

use std::sync::Arc;

use super::report::{Record, overall};
use super::sums::Sum;
use crate::adapter::deltas::SharedReads;
use crate::adapter::expert_factors::{self, Stack, StackLayout};
use crate::adapter::{Delta, Expert, Module};
use crate::error::{Error, Result};
use crate::tensor::safetensors::Tensor;

/// The places of the sums that make one parameter each, in order.
pub(crate) fn parameters(sums: &[Sum<'_>]) -> Vec<Vec<usize>> {
    let mut found: Vec<Vec<usize>> = Vec::with_capacity(sums.len());
    let mut stacks = std::collections::HashMap::<*const Module, usize>::new();
    for (index, sum) in sums.iter().enumerate() {
        if sum.expert.is_some() {
            let place = *stacks.entry(std::ptr::from_ref(sum.module)).or_insert(found.len());
            if let Some(stack) = found.get_mut(place) {
                stack.push(index);
                continue;
            }
        }
        found.push(vec![index]);
    }
    found
}

/// What became of a parameter, by what became of its experts.
pub(crate) fn record(mut experts: Vec<(Option<Expert>, Record)>) -> Record {
    if let [(None, _)] = experts.as_slice() {
        return experts.swap_remove(0).1;
    }
    experts.sort_by_key(|(expert, _)| expert.map_or(0, |expert| expert.index));
    let records = || experts.iter().map(|(_, record)| record);
    let first = &experts[0].1;
    let squares: f64 = records().map(|record| record.norm * record.norm).sum();
    let kept: f64 = records().map(|record| record.kept * record.norm * record.norm).sum();
    let mut values: Vec<f64> =
        records().flat_map(|record| record.singular_values.iter().copied()).collect();
    values.sort_by(|x, y| y.total_cmp(x));
    let are_alike = records().all(|record| record.coefficients == first.coefficients);
    Record {
        shape: first.shape,
        source_rank: records().map(|record| record.source_rank).max().unwrap_or(0),
        rank: records().map(|record| record.rank).max().unwrap_or(0),
        kept: if squares == 0.0 { 1.0 } else { kept / squares },
        error: overall(records()),
        norm: squares.sqrt(),
        singular_values: values,
        coefficients: first.coefficients.clone().filter(|_| are_alike),
        expert_ranks: Some(records().map(|record| record.rank).collect()),
    }
}

/// A module like another, with the factors of all experts: A (experts, rank, in) and B (experts, out, rank).
///
/// # Errors
/// [`Error::Adapter`] for more of them than a model has.
pub(crate) fn module(like: &Module, [a, b]: [Tensor; 2], scaling: f64) -> Result<Module> {
    let name = like.only_parameter().map_or("weight", |parameter| parameter.name.as_str());
    let own = made(&format!("{}.{name}", like.path), [a, b], scaling)?;
    Ok(Module { key: like.key.clone(), ..own })
}

/// A module of a parameter, with the factors of all experts.
///
/// # Errors
/// As [`module`].
pub(crate) fn made(parameter: &str, [a, b]: [Tensor; 2], scaling: f64) -> Result<Module> {
    let (count, rank) = (a.shape[0], a.shape[1]);
    let stack = Stack { layout: StackLayout::Stacked, count, rank };
    let path = a.file().path().to_path_buf();
    let made = stack.delta(a, b, &Arc::new(SharedReads::default()));
    let delta: Arc<dyn Delta> = made.map_err(|problem| Error::adapter(path, problem))?;
    Ok(expert_factors::module(parameter.to_owned(), parameter, delta, rank, scaling))
}
