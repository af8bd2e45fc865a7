//! Pipelines of diffusers: `model_index.json`, and a folder for each component with its weights and
//! its config.

use std::path::{Component as PathPart, Path};

use serde_json::{Map, Value};

use super::index::{self, Files, ShardFile};
use super::{CONFIG, Object, read_object};
use crate::error::{Error, Result};
use crate::storage::file_names;
use crate::storage::store::{Folder, Store};

/// What lists the components of a pipeline.
pub const MODEL_INDEX: &str = "model_index.json";

/// A pipeline's own description, and its components.
#[derive(Debug)]
pub struct Pipeline {
    /// What `model_index.json` holds.
    pub content: Map<String, Value>,
    /// The same as it stands in the file.
    pub bytes: Vec<u8>,
    /// The components that have folders, in the order of the list.
    pub parts: Vec<Part>,
}

/// A component of a pipeline: a model, a tokenizer, a scheduler.
#[derive(Debug)]
pub struct Part {
    /// Its folder within the pipeline.
    pub folder: String,
    /// Its class.
    pub class_name: String,
    /// Its own config, with the bytes that it was read from.
    pub config: Option<Object>,
    /// Whether it has safetensors files, whose tensors are the pipeline's.
    pub has_tensors: bool,
}

impl Part {
    /// What the names of its tensors begin with in the pipeline.
    pub fn prefix(&self) -> String {
        format!("{}.", self.folder)
    }

    /// The name of its config within the pipeline.
    pub fn config_name(&self) -> String {
        format!("{}/{CONFIG}", self.folder)
    }
}

/// What a store holds of a pipeline, and what to say of it.
pub(super) struct FoundPipeline {
    pub pipeline: Pipeline,
    pub files: Files,
    pub warnings: Vec<String>,
    pub notes: Vec<String>,
}

/// Reads what a pipeline lists and which files belong to each of its components.
pub(super) fn find(store: &dyn Store) -> Result<FoundPipeline> {
    let (content, bytes) = read_object(store, MODEL_INDEX)?;
    let path = store.path(MODEL_INDEX);
    let mut files = Files::default();
    let (mut warnings, mut notes) = (Vec::new(), Vec::new());
    let mut parts = Vec::new();
    for (folder, entry) in &content {
        let [Value::String(library), Value::String(class)] =
            entry.as_array().map(Vec::as_slice).unwrap_or_default()
        else {
            continue;
        };
        let is_plain = {
            let mut components = Path::new(folder).components();
            let is_one =
                matches!((components.next(), components.next()), (Some(PathPart::Normal(_)), None));
            is_one && !folder.starts_with('.') && !folder.contains('/')
        };
        if !is_plain {
            let message = format!("lists the component {folder:?}, which is the name of no folder");
            return Err(Error::checkpoint(path, message));
        }
        let names = store.list_in(folder)?;
        if names.is_empty() {
            warnings.push(format!(
                "{}: lists the component {folder} ({class}), whose folder is not there or empty; \
                 the output lacks it, too",
                path.display()
            ));
            continue;
        }
        let inner = Folder::new(store, folder);
        let has = |ending: &str| names.iter().any(|name| name.ends_with(ending));
        let has_tensors = has(".safetensors");
        if has_tensors {
            let found = index::find_files_of(&inner, library)?;
            let others = other_variants(&names, &found);
            if !others.is_empty() {
                let shard = &found.shards[0].name;
                let is_plain = index::variant_of(shard).is_none();
                notes.push(format!(
                    "{folder}: merged {shard}, {}; left out {}",
                    if is_plain { "the plain one" } else { "the one that there is" },
                    others.join(", ")
                ));
            }
            files.add(found, folder);
        } else if names.iter().any(|name| file_names::holds_weights(name)) {
            warnings.push(format!(
                "{}: its weights are no safetensors files; they are carried over as they are, and \
                 nothing can be merged into them",
                store.path(folder).display()
            ));
        }
        let config = match inner.has(CONFIG)? {
            true => Some(read_object(&inner, CONFIG)?),
            false => None,
        };
        let (folder, class_name) = (folder.clone(), class.clone());
        parts.push(Part { folder, class_name, config, has_tensors });
    }
    if files.shards.is_empty() {
        let message = "is a diffusers pipeline, but none of the components that its \
                       model_index.json lists has weights as safetensors files; fetch it again, or \
                       save it with safe_serialization (save_pretrained in diffusers)";
        return Err(Error::checkpoint(store.root(), message));
    }
    Ok(FoundPipeline { pipeline: Pipeline { content, bytes, parts }, files, warnings, notes })
}

/// The files of weights of a component that are other variants than the one that is read.
fn other_variants(names: &[String], found: &Files) -> Vec<String> {
    let is_read =
        |name: &String| found.shards.iter().any(|ShardFile { name: shard, .. }| shard == name);
    let mut others: Vec<_> = names
        .iter()
        .filter(|name| name.ends_with(".safetensors") && !is_read(name))
        .cloned()
        .collect();
    others.sort();
    others
}
