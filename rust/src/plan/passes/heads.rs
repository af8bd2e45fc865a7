//! The pass over task heads: an adapter that brings one makes the output a model of another class, with
//! labels, and its config has to say so.

use indexmap::IndexMap;
use serde_json::{Map, Value};

use crate::adapter::{Adapter, Directory};
use crate::checkpoint::heads::{self, Task};
use crate::error::Result;
use crate::plan::context::Context;
use crate::plan::draft::{Messages, NewTensor};
use crate::plan::value::{Origin, TaskHead};

/// The head that adapters bring and the base does not have, for the output's config.
///
/// # Errors
/// [`crate::Error::Io`] if a config beside an adapter cannot be read.
pub(in crate::plan) fn resolve(
    context: &Context<'_>,
    new_tensors: &[NewTensor],
    messages: &mut Messages,
) -> Result<Option<TaskHead>> {
    let found = new_tensors.iter().find_map(|tensor| match tensor.origin {
        Origin::Adapter(position) => {
            let (labels, task) = heads::output_layer(&tensor.name, &tensor.source.shape)?;
            Some((tensor, position, labels, task))
        }
        Origin::Base(_) => None,
    });
    let Some((tensor, position, labels, by_name)) = found else { return Ok(None) };
    let adapter = &context.inputs.adapters[position];
    let label = adapter.path().display();
    let config = context.base.config();
    let class = config.and_then(heads::class_of);
    // A base whose config is of such a class already says what it is for; else the adapter does, or
    // the name of the layer. Of one named `score` that is all there is to go by.
    let told = adapter.semantics().task.filter(|task| task.ending().is_some());
    let by_class = class.and_then(Task::of_class);
    let usual = tensor.name.ends_with("score.weight").then_some(Task::SequenceClassification);
    let Some(task) = told.or(by_name).or(by_class).or(usual) else {
        messages.warn(format!(
            "{label}: brings the head {}, but does not say for which task (task_type); set \
             architectures and id2label in the output's config.json by hand",
            tensor.name
        ));
        return Ok(None);
    };
    let new_class = class.and_then(|class| task.class_of(class));
    match (&new_class, config) {
        (None, Some(_)) => messages.warn(format!(
            "{label}: brings the head {} with {labels} label{}, but which class of transformers \
             has it cannot be told from the base's config; set architectures in the output's \
             config.json by hand",
            tensor.name,
            if labels == 1 { "" } else { "s" }
        )),
        (Some(class), _) => messages.note(format!(
            "{label}: makes the output a {class} with {labels} label{}",
            if labels == 1 { "" } else { "s" }
        )),
        (None, None) => {}
    }
    let names = names_beside(adapter, labels)?;
    let is_named = names.is_some() || config.is_some_and(|config| has_names(config, labels));
    if config.is_some() && task != Task::QuestionAnswering && labels > 1 && !is_named {
        messages.note(format!(
            "{label}: nothing beside it names its {labels} labels; the output's config calls them \
             LABEL_0 and so on"
        ));
    }
    Ok(Some(TaskHead { class: new_class, labels, names }))
}

/// Whether a config has that many names of labels.
fn has_names(config: &Map<String, Value>, labels: u64) -> bool {
    config.contains_key("id2label") && heads::labels_of(config) == labels
}

/// The labels' names in the config of a model that lies beside an adapter, where it has that many.
fn names_beside(adapter: &Adapter, labels: u64) -> Result<Option<IndexMap<String, Value>>> {
    const CONFIG: &str = "config.json";
    let Some(directory) =
        adapter.directory().map(Directory::store).filter(|directory| directory.is_file(CONFIG))
    else {
        return Ok(None);
    };
    let (text, _) = directory.read_small(CONFIG)?;
    let Ok(config) = serde_json::from_slice::<Map<String, Value>>(&text) else { return Ok(None) };
    if !has_names(&config, labels) {
        return Ok(None);
    }
    let names = config.get("id2label").and_then(Value::as_object);
    Ok(names.map(|names| names.clone().into_iter().collect()))
}
