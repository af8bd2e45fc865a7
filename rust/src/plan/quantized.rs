//! What becomes of the base's quantised weights: what is merged is quantised again with the same
//! scheme, or, where the output has a dtype, all of them are written out in that and their scales
//! left out.

use std::collections::HashSet;
use std::sync::Arc;

use indexmap::IndexMap;

use super::planner::{Planner, TensorChange};
use super::targets::Target;
use super::{Action, ConfigChanges, Options, Origin, PlannedTensor, Update};
use crate::adapter::Saved;
use crate::checkpoint::quantized::{Catalog, Quantized};

impl Planner<'_> {
    /// The refusal of an adapter that changes modules in a format that is not read.
    pub(super) fn refuse_foreign<'t>(
        &self,
        targets: impl Iterator<Item = &'t Target>,
    ) -> Option<String> {
        let foreign = self.quantized.foreign()?;
        let mut touched = targets.filter_map(|target| {
            let name = &target.parameter;
            foreign.module(name.strip_suffix(".weight").unwrap_or(name))
        });
        let module = touched.next()?;
        Some(format!(
            "its modules change layers that the base stores quantised with {} (the first: \
             {module}), and {}",
            foreign.format,
            foreign.advice()
        ))
    }

    /// # Errors
    /// In words, where the weight is quantised in a layout that cannot be read.
    pub(super) fn refuse_unreadable(&self, path: &str, name: &str) -> Result<(), String> {
        match self.quantized.problem(name) {
            Some(problem) => Err(format!(
                "its module {path} updates {name}, which {problem}; merge into the unquantised base \
                 instead"
            )),
            None => Ok(()),
        }
    }

    /// # Errors
    /// In words, where a parameter saved whole would have to be quantised.
    pub(super) fn refuse_replacing(&self, saved: &Saved, name: &str) -> Result<(), String> {
        match self.quantized.get(name) {
            Some(quantized) => Err(format!(
                "its tensor {} of type {} replaces {name}, which the base stores as {}; merge into \
                 the unquantised base instead",
                saved.tensor.name, saved.tensor.dtype, quantized.scheme
            )),
            None => Ok(()),
        }
    }

    /// Says what becomes of the quantised weights, and what cannot be.
    pub(super) fn settle_quantized(&mut self, changes: &mut ConfigChanges) {
        let schemes = |names: &mut dyn Iterator<Item = &Arc<Quantized>>| {
            let mut schemes = IndexMap::<&str, usize>::new();
            names.for_each(|quantized| *schemes.entry(&quantized.scheme).or_default() += 1);
            let words: Vec<_> =
                schemes.iter().map(|(scheme, count)| format!("{count} × {scheme}")).collect();
            words.join("; ")
        };
        let Some(dtype) =
            self.options.dtype.as_ref().and_then(crate::tensor::dtype::Dtype::torch_name)
        else {
            let changed = |(name, _): &(&String, &Arc<Quantized>)| {
                self.tensors.get(*name).is_some_and(|change| !change.is_empty())
            };
            let entries = self.quantized.entries();
            let words = schemes(&mut entries.iter().filter(changed).map(|(_, entry)| entry));
            if !words.is_empty() {
                self.notes.push(format!(
                    "what changes of the base's quantised weights is dequantised, merged and \
                     quantised again with the same scheme ({words}); to write the base out \
                     unquantised instead, give a dtype such as bfloat16"
                ));
            }
            return;
        };
        self.problems.extend(self.quantized.problems_of_writing(dtype));
        let words = schemes(&mut self.quantized.entries().values());
        if !words.is_empty() {
            changes.unquantized = true;
            self.notes.push(format!(
                "the base's quantised weights ({words}) are written as {dtype}, their scales and the \
                 config's entry on quantisation are left out"
            ));
        }
    }
}

impl Catalog {
    /// In words, why not all of a checkpoint can be written unquantised.
    pub(super) fn problems_of_writing(&self, dtype: &str) -> Vec<String> {
        let foreign = self.foreign().map(|foreign| {
            format!(
                "the base is quantised with {}, which cannot be written as {dtype}: {}",
                foreign.format,
                foreign.advice()
            )
        });
        let unreadable = self.problems().first().map(|(name, problem)| {
            format!("{name} cannot be written as {dtype}: it {problem}; leave the dtype as it is")
        });
        foreign.into_iter().chain(unreadable).collect()
    }
}

/// What becomes of the tensors of quantised weights.
pub(super) struct Fates<'a> {
    catalog: &'a Catalog,
    /// Tensors that the output does not have.
    left_out: HashSet<&'a str>,
    /// Scales that are written anew.
    rescaled: HashSet<&'a str>,
}

/// Decides on all of them.
pub(super) fn fates<'a>(
    catalog: &'a Catalog,
    changes: &IndexMap<String, TensorChange>,
    options: &Options,
) -> Fates<'a> {
    let mut fates = Fates { catalog, left_out: HashSet::new(), rescaled: HashSet::new() };
    for (name, quantized) in catalog.entries() {
        if options.dtype.is_some() {
            fates.left_out.extend(quantized.companions.iter().map(String::as_str));
        } else if changes.get(name).is_some_and(|change| !change.updates.is_empty()) {
            let scales = quantized.scales.tensors();
            fates.rescaled.extend(scales.iter().map(|stored| stored.tensor.name.as_str()));
        }
    }
    fates
}

impl Fates<'_> {
    pub fn is_left_out(&self, name: &str) -> bool {
        self.left_out.contains(name)
    }

    /// The plan of one tensor, with respect to how it is stored.
    pub fn settle(
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
        let Some(quantized) = self.catalog.get(&planned.name).filter(|_| is_base) else {
            return planned;
        };
        let merges = !updates.is_empty() && quantized.logical.elements() > 0;
        if options.dtype.is_none() && !merges {
            return planned;
        }
        means(planned, quantized, options.dtype.as_ref(), updates)
    }
}

/// A quantised tensor planned as what it means, to be written in a dtype or quantised again.
pub(crate) fn means(
    planned: PlannedTensor,
    quantized: &Arc<Quantized>,
    dtype: Option<&crate::tensor::dtype::Dtype>,
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
