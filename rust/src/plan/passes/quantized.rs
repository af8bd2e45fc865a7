//! The pass over the base's quantised weights: what is merged is quantised again with the same
//! scheme, or, where the output has a dtype, all of them are written out in that and their scales
//! left out.

use std::collections::HashSet;
use std::sync::Arc;

use indexmap::IndexMap;

use super::targets::Target;
use crate::adapter::Saved;
use crate::checkpoint::quantized::{Quantized, QuantizedWeights};
use crate::plan::context::Context;
use crate::plan::draft::{Messages, TensorChanges};
use crate::plan::layout::touched_components;
use crate::plan::options::Options;
use crate::plan::update::Update;
use crate::plan::value::{Action, Origin, PlannedTensor};
use crate::tensor::dtype::Dtype;

/// The refusal of an adapter that changes modules in a format that is not read.
pub(in crate::plan) fn refuse_unsupported<'t>(
    context: &Context<'_>,
    targets: impl Iterator<Item = &'t Target>,
) -> Option<String> {
    let unsupported = context.quantized.unsupported()?;
    let mut touched = targets.filter_map(|target| {
        let name = &target.parameter;
        unsupported.module(name.strip_suffix(".weight").unwrap_or(name))
    });
    let module = touched.next()?;
    Some(format!(
        "its modules change layers that the base stores quantised with {} (the first: \
         {module}), and {}",
        unsupported.format,
        unsupported.advice()
    ))
}

/// # Errors
/// In words, where the weight is quantised in a layout that cannot be read.
pub(in crate::plan) fn refuse_unreadable(
    context: &Context<'_>,
    path: &str,
    name: &str,
) -> Result<(), String> {
    match context.quantized.problem(name) {
        Some(problem) => Err(format!(
            "its module {path} updates {name}, which {problem}; merge into the unquantised base \
             instead"
        )),
        None => Ok(()),
    }
}

/// # Errors
/// In words, where a parameter saved whole would have to be quantised.
pub(in crate::plan) fn refuse_replacing(
    context: &Context<'_>,
    saved: &Saved,
    name: &str,
) -> Result<(), String> {
    match context.quantized.get(name) {
        Some(quantized) => Err(format!(
            "its tensor {} of type {} replaces {name}, which the base stores as {}; merge into \
             the unquantised base instead",
            saved.tensor.name, saved.tensor.dtype, quantized.scheme
        )),
        None => Ok(()),
    }
}

/// Says what becomes of the quantised weights, and what cannot be; whether they are all written
/// unquantised.
pub(in crate::plan) fn check(
    context: &Context<'_>,
    changes: &TensorChanges,
    messages: &mut Messages,
) -> bool {
    let schemes = |names: &mut dyn Iterator<Item = &Arc<Quantized>>| {
        let mut schemes = IndexMap::<&str, usize>::new();
        names.for_each(|quantized| *schemes.entry(&quantized.scheme).or_default() += 1);
        let words: Vec<_> =
            schemes.iter().map(|(scheme, count)| format!("{count} × {scheme}")).collect();
        words.join("; ")
    };
    let Some(dtype) = context.options.dtype.as_ref().and_then(Dtype::torch_name) else {
        let changed = |(name, _): &(&String, &Arc<Quantized>)| {
            changes.get(name).is_some_and(|change| !change.is_empty())
        };
        let entries = context.quantized.entries();
        let words = schemes(&mut entries.iter().filter(changed).map(|(_, entry)| entry));
        if !words.is_empty() {
            messages.note(format!(
                "what changes of the base's quantised weights is dequantised, merged and \
                 quantised again with the same scheme ({words}); to write the base out \
                 unquantised instead, give a dtype such as bfloat16"
            ));
        }
        return false;
    };
    // Components of a pipeline that nothing changes are not converted.
    let touched = touched_components(context.base, changes, &[]);
    let is_written = |name: &str| touched.iter().any(|prefix| name.starts_with(prefix));
    for problem in writing_problems(&context.quantized, dtype, &is_written) {
        messages.problem(problem);
    }
    let entries = context.quantized.entries().iter().filter(|(name, _)| is_written(name));
    let words = schemes(&mut entries.map(|(_, entry)| entry));
    if !words.is_empty() {
        messages.note(format!(
            "the base's quantised weights ({words}) are written as {dtype}, their scales and the \
             config's entry on quantisation are left out"
        ));
    }
    !words.is_empty()
}

/// In words, why not all of those tensors of a checkpoint that are written can be so unquantised.
pub(super) fn writing_problems(
    quantized: &QuantizedWeights,
    dtype: &str,
    is_written: &dyn Fn(&str) -> bool,
) -> Vec<String> {
    let unsupported = quantized.unsupported().filter(|format| format.modules().any(is_written));
    let unsupported = unsupported.map(|unsupported| {
        format!(
            "the base is quantised with {}, which cannot be written as {dtype}: {}",
            unsupported.format,
            unsupported.advice()
        )
    });
    let mut unreadable = quantized.problems().iter().filter(|(name, _)| is_written(name));
    let unreadable = unreadable.next().map(|(name, problem)| {
        format!("{name} cannot be written as {dtype}: it {problem}; leave the dtype as it is")
    });
    unsupported.into_iter().chain(unreadable).collect()
}

/// What becomes of the tensors of quantised weights.
pub(in crate::plan) struct QuantizedOutcome<'a> {
    quantized: &'a QuantizedWeights,
    /// Tensors that the output does not have.
    left_out: HashSet<&'a str>,
    /// Scales that are written anew.
    rescaled: HashSet<&'a str>,
}

/// Decides on all of them.
pub(in crate::plan) fn outcome<'a>(
    quantized: &'a QuantizedWeights,
    changes: &TensorChanges,
    options: &Options,
) -> QuantizedOutcome<'a> {
    let mut outcome =
        QuantizedOutcome { quantized, left_out: HashSet::new(), rescaled: HashSet::new() };
    for (name, weight) in quantized.entries() {
        if options.dtype.is_some() {
            outcome.left_out.extend(weight.companions.iter().map(String::as_str));
        } else if changes.get(name).is_some_and(|change| !change.updates.is_empty()) {
            let scales = weight.scales.tensors();
            outcome.rescaled.extend(scales.iter().map(|stored| stored.tensor.name.as_str()));
        }
    }
    outcome
}

impl QuantizedOutcome<'_> {
    pub fn is_left_out(&self, name: &str) -> bool {
        self.left_out.contains(name)
    }

    /// The plan of one tensor, with respect to how it is stored.
    pub fn resolve(
        &self,
        mut planned: PlannedTensor,
        updates: Vec<Update>,
        options: &Options,
    ) -> PlannedTensor {
        if self.rescaled.contains(planned.name.as_str()) {
            planned.action = Action::Rescale;
            return planned;
        }
        let is_base = matches!(planned.origin, Origin::Base(_));
        let Some(quantized) = self.quantized.get(&planned.name).filter(|_| is_base) else {
            return planned;
        };
        let merges = !updates.is_empty() && quantized.logical.elements() > 0;
        if options.dtype.is_none() && !merges {
            return planned;
        }
        dequantized_plan(planned, quantized, options.dtype.as_ref(), updates)
    }
}

/// A quantised tensor planned as what it means, to be written in a dtype or quantised again.
pub(crate) fn dequantized_plan(
    planned: PlannedTensor,
    quantized: &Arc<Quantized>,
    dtype: Option<&Dtype>,
    updates: Vec<Update>,
) -> PlannedTensor {
    let source = quantized.logical.clone();
    let output_dtype = dtype.unwrap_or(&quantized.stored.tensor.dtype).clone();
    // Decoding is a conversion even to the type in which it is done.
    let merges = !updates.is_empty() && source.elements() > 0;
    let action = if merges { Action::Merge(updates) } else { Action::Cast };
    let requantized = dtype.is_none();
    let quantized = Some(quantized.clone());
    PlannedTensor { source, output_dtype, action, quantized, requantized, ..planned }
}
