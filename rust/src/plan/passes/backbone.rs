//! The pass over the backbone's names: an adapter that brings a head can make the output a model of a
//! class that calls the backbone otherwise than the base's does, and loads it under that name alone.

use std::sync::Arc;

use crate::checkpoint::heads::{self, BACKBONE, BACKBONE_OF_ANSWERS, Task};
use crate::plan::value::Inputs;

/// The inputs with the base under the names of the output's class, where they are not its own, and a
/// note that says so.
pub(in crate::plan) fn apply(inputs: &Inputs) -> Option<(Inputs, String)> {
    let base = &inputs.base;
    let config = base.config().filter(|config| heads::renames_backbone(config))?;
    let has = |prefix: &str| base.tensors().keys().any(|name| name.starts_with(prefix));
    // A module that is loaded stays of its class.
    if !base.is_stored() || !has(BACKBONE) || has(BACKBONE_OF_ANSWERS) || !bring_answers(inputs) {
        return None;
    }
    let renamed = base.tensors().iter().map(|(name, location)| {
        (heads::name_for_answers(name).unwrap_or_else(|| name.clone()), *location)
    });
    let class = heads::class_of(config).and_then(|class| Task::QuestionAnswering.class_of(class));
    let note = format!(
        "the base's names begin with {BACKBONE:?} and the output's with {BACKBONE_OF_ANSWERS:?}, \
         which is what {} calls the backbone",
        class.as_deref().unwrap_or("the class for question answering")
    );
    let base = Arc::new(base.with_tensors(renamed.collect()));
    Some((Inputs { base, adapters: inputs.adapters.clone() }, note))
}

/// Whether an adapter brings a head for answers.
fn bring_answers(inputs: &Inputs) -> bool {
    let saved = inputs.adapters.iter().flat_map(|adapter| adapter.saved());
    let mut heads = saved.filter_map(|saved| heads::output_layer(&saved.path, &saved.tensor.shape));
    heads.any(|(_, task)| task == Some(Task::QuestionAnswering))
}
