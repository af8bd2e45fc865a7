//! The pass over the base's quantised weights: what is merged is quantised again with the same
//! scheme, or, where the output has a dtype, all of them are written out in that and their scales
//! left out.

use std::collections::HashSet;
use std::sync::Arc;

use indexmap::IndexMap;

use super::names::meant;
use super::targets::Target;
use crate::adapter::{Adapter, Saved};
use crate::checkpoint::quantized::{Quantized, QuantizedWeights};
use crate::error::Result;
use crate::plan::context::Context;
use crate::plan::draft::{Messages, TensorChanges};
use crate::plan::layout::touched_components;
use crate::plan::name_map::NameMap;
use crate::plan::options::Options;
use crate::plan::update::{Slice, Update, UpdateKind};
use crate::plan::value::{Action, EntryMerge, Origin, PlannedTensor};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;

/// The refusal of an adapter that changes weights in a format that is not read, however it names
/// them; or of one that does not fit because a weight's layout cannot be read.
///
/// # Errors
/// [`crate::Error::Cancelled`].
pub(in crate::plan) fn refuse_unsupported(
    context: &Context<'_>,
    adapter: &Adapter,
    names: &NameMap<'_>,
    targets: Option<&IndexMap<String, Target>>,
) -> Result<Option<String>> {
    let unsupported = context.quantized.unsupported();
    if unsupported.is_none() && context.quantized.problems().is_empty() {
        return Ok(None);
    }
    let saved = adapter.saved().iter().map(|saved| saved.path.clone());
    let rows = adapter.trained_rows().iter().map(|rows| format!("{}.weight", rows.path));
    let whole = saved.chain(rows);
    let tensors: Vec<String> = match targets {
        Some(targets) => {
            let parameters = targets.values().map(|target| target.parameter.clone()).chain(whole);
            parameters.flat_map(|parameter| names.tensors_of(&parameter)).collect()
        }
        // Not even their names fit, or their shapes.
        None => {
            let of_modules = adapter.modules().values().flat_map(|module| {
                let own = module.parameters.iter().map(|parameter| parameter.name.as_str());
                own.chain(["weight"]).map(|leaf| format!("{}.{leaf}", module.path))
            });
            meant(context, &of_modules.chain(whole).collect::<Vec<_>>())?
        }
    };
    if let Some(unsupported) = unsupported
        && let Some(name) = tensors.iter().find(|name| unsupported.holds(name))
    {
        return Ok(Some(format!(
            "its modules change layers that the base stores quantised with {} (the first: {}), \
             and {}",
            unsupported.format,
            name.strip_suffix(".weight").unwrap_or(name),
            unsupported.advice()
        )));
    }
    let problem = |name: &String| {
        let problem = context.quantized.problem(name)?;
        Some(format!("it updates {name}, which {problem}; merge into the unquantised base instead"))
    };
    Ok(if targets.is_none() { tensors.iter().find_map(problem) } else { None })
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
        for (name, quantized) in context.quantized.entries() {
            let updates = changes.get(name).map_or(&[][..], |change| &change.updates);
            if updates.iter().any(|update| as_coded(update, quantized).is_none()) {
                messages.problem(format!(
                    "{name} is stored transposed ({}), and a part of its rows changes, which cannot \
                     be quantised again on its own; give a dtype such as bfloat16",
                    quantized.scheme
                ));
            }
        }
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
    for problem in writing_problems(context.quantized, dtype, &is_written) {
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
    let unsupported = quantized.unsupported().filter(|format| format.weights().any(is_written));
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
        let Some(quantized) = self.quantized.of_codes(&planned.name).filter(|_| is_base) else {
            return planned;
        };
        let merges = !updates.is_empty() && quantized.logical.elements() > 0;
        if options.dtype.is_none() && !merges {
            return planned;
        }
        dequantized_plan(planned, quantized, options.dtype.as_ref(), updates)
    }
}

/// A quantised tensor planned as what it means, to be written in a dtype or quantised again. Updates
/// are those of the weight as the model has it.
pub(crate) fn dequantized_plan(
    planned: PlannedTensor,
    quantized: &Arc<Quantized>,
    dtype: Option<&Dtype>,
    updates: Vec<Update>,
) -> PlannedTensor {
    let requantized = dtype.is_none();
    let (source, updates) = if requantized {
        let place = |update| as_coded(update, quantized).expect("checked before");
        (quantized.coded(), updates.iter().map(place).collect())
    } else {
        (quantized.logical.clone(), updates)
    };
    let output_dtype = dtype.unwrap_or(&quantized.stored.tensor.dtype).clone();
    // Decoding is a conversion even to the type in which it is done.
    let merges = !updates.is_empty() && source.elements() > 0;
    let action = match planned.action {
        Action::MergeEntries(merge) if merges => {
            Action::MergeEntries(EntryMerge { updates, ..merge })
        }
        _ if merges => Action::Merge(updates),
        _ => Action::Cast,
    };
    let quantized = Some(quantized.clone());
    // Under the name of the codes, or of what they mean.
    let name = if planned.name == planned.source.name { source.name.clone() } else { planned.name };
    PlannedTensor { name, source, output_dtype, action, quantized, requantized, ..planned }
}

/// The updates of a tensor as they lie on the weight in the model's own layout.
pub(crate) fn updates_in_model(planned: &PlannedTensor) -> Vec<Update> {
    let updates = planned.updates().iter();
    match &planned.quantized {
        Some(quantized) if planned.requantized => updates
            .map(|update| {
                turned(update, quantized, &quantized.coded(), &quantized.logical)
                    .expect("it was turned the other way before")
            })
            .collect(),
        _ => updates.cloned().collect(),
    }
}

/// An update as it lies on the weight in the order of its codes; `None` where it changes a part of a
/// matrix's rows, which are columns there.
fn as_coded(update: &Update, quantized: &Quantized) -> Option<Update> {
    turned(update, quantized, &quantized.logical, &quantized.coded())
}

fn turned(
    update: &Update,
    quantized: &Quantized,
    from: &TensorInfo,
    to: &TensorInfo,
) -> Option<Update> {
    if quantized.transposed.is_none() {
        return Some(update.clone());
    }
    let height = |tensor: &TensorInfo| tensor.shape.iter().rev().nth(1).copied();
    let (old, new) = (height(from)?, height(to)?);
    let rows = match &update.slice.rows {
        None => None,
        Some(rows) if rows.start % old == 0 && rows.end == rows.start + old => {
            let matrix = rows.start / old;
            Some(matrix * new..(matrix + 1) * new)
        }
        Some(_) => return None,
    };
    let slice = Slice { rows, ..update.slice.clone() };
    let adds = matches!(update.kind, UpdateKind::LowRank | UpdateKind::Dora);
    adds.then(|| Update { transposed: !update.transposed, slice, ..update.clone() })
}
