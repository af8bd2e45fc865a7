//! An adapter's directory: what lies in it beside the adapter's own files, and which of that holds weights
//! that belong to the adapter as much as its own do.

use std::sync::Arc;

use serde_json::Value;

use super::coverage::{PartUse, Usage};
use crate::error::{Error, Owner, Result};
use crate::storage::directory::LocalDirectory;
use crate::storage::file_names::{self, ADAPTER_FILES, OF_A_MODEL};
use crate::storage::identify;
use crate::storage::store::Store;

/// Endings of files that are no weights, whatever their content: these are not opened.
const NO_WEIGHTS: [&str; 18] = [
    ".json",
    ".jsonl",
    ".txt",
    ".md",
    ".jinja",
    ".py",
    ".model",
    ".csv",
    ".yaml",
    ".yml",
    ".toml",
    ".log",
    ".png",
    ".jpg",
    ".html",
    ".sh",
    ".tiktoken",
    ".lock",
];
/// Weights that trainers save beside an adapter's: how their names begin, and what they are.
const KNOWN: [(&str, &str); 5] = [
    ("non_lora_trainables", "what was trained beside the LoRA (a projector, say)"),
    ("mm_projector", "the trained projector between a vision tower and its language model"),
    ("value_head", "the value head of a reinforcement learner or a reward model"),
    ("v_head", "the value head of a reinforcement learner or a reward model"),
    ("new_embeddings", "embeddings of added tokens"),
];
/// What a sentence model's parts are listed in.
const PARTS: &str = "modules.json";

/// The directory that an adapter was read from.
#[derive(Debug, Clone)]
pub struct Directory {
    store: Arc<dyn Store>,
    config: Option<String>,
    weights: String,
    /// The files of the weights, where these are several; then that above is their index.
    shards: Vec<String>,
}

impl Directory {
    /// Of an adapter whose own files are these.
    pub fn new(store: Arc<dyn Store>, config: Option<&str>, weights: impl Into<String>) -> Self {
        let (config, weights) = (config.map(str::to_owned), weights.into());
        Self { store, config, weights, shards: Vec::new() }
    }

    /// The same of an adapter whose weights are several files.
    #[must_use]
    pub fn with_shards(self, shards: Vec<String>) -> Self {
        Self { shards, ..self }
    }

    /// What holds the files.
    pub fn store(&self) -> &dyn Store {
        &*self.store
    }

    /// The names of everything in it that is not the adapter's own, in order.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be listed.
    pub fn others(&self) -> Result<Vec<String>> {
        let mut names = self.store.list()?;
        names.retain(|name| {
            let is_own = *name == self.weights || self.shards.contains(name);
            !is_own && Some(name) != self.config.as_ref()
        });
        names.sort();
        Ok(names)
    }

    /// What becomes of every file with weights: the adapter's own is used, the same in another format
    /// and states of training are not needed, and whatever else there is is refused.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be listed.
    pub fn weights(&self) -> Result<Vec<PartUse>> {
        let used = |name: &String| PartUse::new(&**name, (Usage::Used, "the adapter's weights"));
        let mut uses: Vec<_> = match self.shards.as_slice() {
            [] => vec![used(&self.weights)],
            shards => shards.iter().map(used).collect(),
        };
        let parts = self.parts();
        for name in self.others()? {
            if self.store.is_file(&name) {
                uses.extend(self.use_of(&*self.store, &name, &name));
            } else if let Some(folder) = self.folder(&name, &parts) {
                let mut names = folder.list().unwrap_or_default();
                names.sort();
                let files = names.iter().filter(|file| folder.is_file(file));
                uses.extend(
                    files.filter_map(|file| self.use_of(&folder, file, &format!("{name}/{file}"))),
                );
            }
        }
        Ok(uses)
    }

    /// What becomes of one file; `None` for what is no weights.
    fn use_of(&self, store: &dyn Store, file: &str, name: &str) -> Option<PartUse> {
        let is = |usage, reason: String| Some(PartUse::new(name, (usage, reason)));
        if identify::state_of_training(file) {
            return is(Usage::NotNeeded, "a state of the training, to go on from".to_owned());
        }
        if file.starts_with('.') || !holds_weights(store, file) {
            return None;
        }
        if name == file && is_twin(file, &self.weights) {
            return is(
                Usage::NotNeeded,
                format!("the weights of {} in another format", self.weights),
            );
        }
        let known = KNOWN.iter().find(|(begin, _)| file.to_lowercase().starts_with(begin));
        let what = match known {
            Some((_, what)) => format!(", {what}"),
            None if file.starts_with(stem(ADAPTER_FILES[0])) => {
                ", another file of an adapter's weights".to_owned()
            }
            None => String::new(),
        };
        is(
            Usage::Refused,
            format!(
                "has weights beside its own in {name}{what}, which a merge would leave out; merge \
                 without them by allowing {name} by name, or move the file away if it does not \
                 belong to the adapter"
            ),
        )
    }

    /// A folder that is a part of the adapter's directory: no adapter and no model of its own, nothing
    /// of a training's, nothing hidden.
    fn folder(&self, name: &str, parts: &[String]) -> Option<LocalDirectory> {
        let folder = LocalDirectory(self.store.as_directory()?.join(name));
        if parts.iter().any(|part| part == name) {
            return Some(folder);
        }
        let of_training = ["checkpoint", "global_step", "runs", "logs", "wandb", "optimizer_"];
        let [config, ..] = OF_A_MODEL;
        let of_its_own = || {
            ADAPTER_FILES
                .iter()
                .chain([&config, &"model_index.json"])
                .any(|mark| folder.is_file(mark))
        };
        let is_other = name.starts_with('.')
            || identify::state_of_training(name)
            || of_training.iter().any(|begin| name.starts_with(begin))
            || of_its_own();
        (!is_other).then_some(folder)
    }

    /// The folders that a sentence model's list of modules names.
    fn parts(&self) -> Vec<String> {
        let Ok((content, _)) = self.store.read_small(PARTS) else { return Vec::new() };
        let modules: Value = serde_json::from_slice(&content).unwrap_or_default();
        let modules = modules.as_array().into_iter().flatten();
        modules.filter_map(|module| Some(module.get("path")?.as_str()?.to_owned())).collect()
    }
}

/// What stands before a name's ending of a weights file.
fn stem(name: &str) -> &str {
    name.rsplit_once('.').map_or(name, |(stem, _)| stem)
}

/// Whether a file holds the weights of another one in another format, by their names.
fn is_twin(name: &str, weights: &str) -> bool {
    // llama.cpp's script put this before what it converted.
    let bare = name.strip_prefix("ggml-").map(|bare| bare.replace('-', "_"));
    stem(bare.as_deref().unwrap_or(name)) == stem(weights)
}

/// Whether a file holds weights: by its ending, unless its content says otherwise, or by its content.
fn holds_weights(store: &dyn Store, name: &str) -> bool {
    let lower = name.to_lowercase();
    if NO_WEIGHTS.iter().any(|ending| lower.ends_with(ending)) {
        return false;
    }
    let found = identify::of_file(store, name);
    match file_names::holds_weights(name) {
        true => !found.is_some_and(|found| found.is_text()),
        false => found.is_some_and(|found| found.is_weights()),
    }
}

/// Errors of what is refused in an adapter's directory are errors about the adapter.
pub(super) fn of_adapter(error: Error) -> Error {
    error.of(Owner::Adapter)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_same_weights_in_another_format_are_twins() {
        for twin in ["adapter_model.bin", "adapter_model.gguf", "ggml-adapter-model.bin"] {
            assert!(is_twin(twin, "adapter_model.safetensors"), "{twin}");
        }
        for other in ["adapter_model-00002-of-00002.safetensors", "value_head.bin", "adapter.bin"] {
            assert!(!is_twin(other, "adapter_model.safetensors"), "{other}");
        }
    }
}
