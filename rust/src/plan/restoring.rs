//! Adapters taken out of a merged model again: by subtraction, or with the base at hand.

use std::collections::HashSet;

use super::planner::{Decided, Planner};
use super::{ConfigChanges, Inputs, Plan, UpdateKind, layout};
use crate::adapter::{Initialization, Saved};
use crate::checkpoint::quantized::Catalog;
use crate::error::{Error, Result};
use crate::tensor::dtype::Dtype;

/// The way out where a subtraction alone cannot give the base back.
pub(super) const GIVE_THE_BASE: &str =
    "give the base that it was merged into as well (original=…, --base)";

impl Plan {
    /// The plan that writes this one's base as it is, in that type or its own: what is left once
    /// everything is taken out of a merge of this plan.
    ///
    /// # Errors
    /// [`Error::Plan`] if the base is quantised in a way that cannot be written in that type.
    pub fn of_base_alone(&self, inputs: &Inputs, dtype: Option<Dtype>) -> Result<Self> {
        let mut options = self.options.clone();
        let mut config_changes = ConfigChanges {
            dtype: dtype.as_ref().and_then(Dtype::torch_name).map(str::to_owned),
            ..ConfigChanges::default()
        };
        let quantized = Catalog::of(&inputs.base);
        if let Some(dtype) = &config_changes.dtype {
            let problems = quantized.problems_of_writing(dtype);
            if !problems.is_empty() {
                return Err(Error::Plan(problems));
            }
            config_changes.unquantized = !quantized.entries().is_empty();
        }
        options.dtype = dtype;
        let shards = layout::plan_shards(inputs, &options, Decided::of_base_alone(&inputs.base));
        let warnings = inputs.base.warnings().to_vec();
        Ok(Self { options, shards, config_changes, warnings, notes: Vec::new(), ..self.clone() })
    }
}

impl Planner<'_> {
    /// What a parameter saved whole means where adapters are taken out again.
    pub(super) fn leave(&mut self, position: usize, saved: &Saved) -> Result<(), String> {
        let adapter = &self.inputs.adapters[position];
        let module = saved.path.strip_suffix(".weight").unwrap_or_default();
        let is_updated = adapter.modules().values().any(|updated| updated.path == module);
        if is_updated && !saved.trained_apart {
            self.notes.push(format!(
                "{}: carries {} of its own, to which its update was added; that is what comes back",
                adapter.path().display(),
                saved.path
            ));
            self.waive(position, &saved.tensor.name, "is what its update was added to");
            return Ok(());
        }
        Err(format!(
            "its tensor {} stands in the place of the base's {}, which is in neither the merged \
             model nor the adapter; {GIVE_THE_BASE}",
            saved.tensor.name, saved.path
        ))
    }

    /// Refuses what a subtraction cannot undo: whatever is made from the base's own weight in
    /// another way than by adding to it.
    pub(super) fn check_subtraction(&mut self) {
        let mut known: HashSet<String> = self.problems.iter().cloned().collect();
        let mut complain = |position: usize, what: String| {
            let path = self.inputs.adapters[position].path().display();
            let problem = format!("{path}: {what}; {GIVE_THE_BASE}");
            if known.insert(problem.clone()) {
                self.problems.push(problem);
            }
        };
        for (position, adapter) in self.inputs.adapters.iter().enumerate() {
            if adapter.semantics().initialization != Initialization::Plain {
                complain(
                    position,
                    "its start took components out of the base's weights, which are in neither the \
                     merged model nor the adapter"
                        .into(),
                );
            }
        }
        for (name, change) in &self.tensors {
            if let (Some(quantized), Some(update)) =
                (self.quantized.get(name), change.updates.first())
            {
                complain(
                    update.adapter,
                    format!(
                        "{name} is stored as {}, whose rounding is too coarse to subtract from",
                        quantized.scheme
                    ),
                );
            }
            let adds = |kind| matches!(kind, UpdateKind::LowRank | UpdateKind::Vector);
            let replaced = change.origin.as_ref().map(|(owner, _)| *owner);
            let others = change.updates.iter().filter(|update| !adds(update.kind));
            for position in replaced.into_iter().chain(others.map(|update| update.adapter)) {
                complain(
                    position,
                    format!("what it makes of {name} is no sum, so that nothing can be subtracted"),
                );
            }
        }
    }
}
