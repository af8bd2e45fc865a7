//! The pass that takes adapters out of a merged model again: by subtraction, or with the base at
//! hand.

use std::collections::HashSet;

use super::quantized::writing_problems;
use super::side_files;
use crate::adapter::{Initialization, Saved};
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::{Error, Result};
use crate::plan::context::{AdapterContext, Context};
use crate::plan::draft::{IgnoredTensors, Messages, PlanDraft, TensorChanges};
use crate::plan::layout;
use crate::plan::options::Options;
use crate::plan::update::UpdateKind;
use crate::plan::value::{ConfigChanges, Inputs, Plan};
use crate::tensor::dtype::Dtype;

/// The way out where a subtraction alone cannot give the base back.
pub(in crate::plan) const GIVE_THE_BASE: &str =
    "give the base that it was merged into as well (original=…, --base)";

impl Plan {
    /// The plan that writes this one's base as it is, in that type or its own: what is left once
    /// everything is taken out of a merge of this plan.
    ///
    /// # Errors
    /// [`Error::Plan`] if the base is quantised in a way that cannot be written in that type.
    pub fn of_base_alone(&self, inputs: &Inputs, dtype: Option<Dtype>) -> Result<Self> {
        let options = Options { dtype, ..self.options.clone() };
        let (weights, coverage) = (self.weights.clone(), self.coverage.clone());
        Ok(Self { weights, coverage, ..Self::of_base(inputs, options)? })
    }

    /// The plan that writes a base as it is, in the type that the options have or its own.
    ///
    /// # Errors
    /// As [`Plan::of_base_alone`].
    pub fn of_base(inputs: &Inputs, options: Options) -> Result<Self> {
        let mut config_changes = ConfigChanges {
            dtype: options.dtype.as_ref().and_then(Dtype::torch_name).map(str::to_owned),
            ..ConfigChanges::default()
        };
        let quantized = QuantizedWeights::of(&inputs.base);
        if let Some(dtype) = &config_changes.dtype {
            let problems = writing_problems(&quantized, dtype, &|_| true);
            if !problems.is_empty() {
                return Err(Error::Plan(problems));
            }
            config_changes.unquantized = !quantized.entries().is_empty();
        }
        let shards = layout::plan_shards(inputs, &options, PlanDraft::default(), &quantized);
        Ok(Self {
            weights: Vec::new(),
            shards,
            config_changes,
            warnings: inputs.base.warnings().to_vec(),
            side_files: side_files::of_base(&inputs.base)?,
            zero_updates: Vec::new(),
            notes: Vec::new(),
            coverage: Vec::new(),
            options,
        })
    }
}

/// What a parameter saved whole means where adapters are taken out again.
///
/// # Errors
/// In words, where the base's own is lost.
pub(in crate::plan) fn leave(
    adapter: &AdapterContext<'_>,
    saved: &Saved,
    messages: &mut Messages,
    ignored: &mut IgnoredTensors,
) -> Result<(), String> {
    let module = saved.path.strip_suffix(".weight").unwrap_or_default();
    let is_updated = adapter.adapter.modules().values().any(|updated| updated.path == module);
    if is_updated && !saved.trained_apart {
        messages.note(format!(
            "{}: carries {} of its own, to which its update was added; that is what comes back",
            adapter.label(),
            saved.path
        ));
        ignored.add(adapter.position, &saved.tensor.name, "is what its update was added to");
        return Ok(());
    }
    Err(format!(
        "its tensor {} stands in the place of the base's {}, which is in neither the merged \
         model nor the adapter; {GIVE_THE_BASE}",
        saved.tensor.name, saved.path
    ))
}

/// Refuses what a subtraction cannot undo: whatever is made from the base's own weight in another
/// way than by adding to it.
pub(in crate::plan) fn check(
    context: &Context<'_>,
    changes: &TensorChanges,
    messages: &mut Messages,
) {
    let mut known: HashSet<String> = messages.problems().iter().cloned().collect();
    let mut complain = |position: usize, what: String| {
        let path = context.inputs.adapters[position].path().display();
        let problem = format!("{path}: {what}; {GIVE_THE_BASE}");
        if known.insert(problem.clone()) {
            messages.problem(problem);
        }
    };
    for (position, adapter) in context.inputs.adapters.iter().enumerate() {
        if adapter.semantics().initialization != Initialization::Plain {
            complain(
                position,
                "its start took components out of the base's weights, which are in neither the \
                 merged model nor the adapter"
                    .into(),
            );
        }
    }
    for (name, change) in changes.iter() {
        if let (Some(quantized), Some(update)) =
            (context.quantized.get(name), change.updates.first())
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
        let replaced = change.origin.as_ref().map(|origin| origin.adapter);
        let others = change.updates.iter().filter(|update| !adds(update.kind));
        for position in replaced.into_iter().chain(others.map(|update| update.adapter)) {
            complain(
                position,
                format!("what it makes of {name} is no sum, so that nothing can be subtracted"),
            );
        }
    }
}
