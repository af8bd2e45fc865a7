//! Side files: what lies beside a model's weights and belongs to the model: config, tokenizer, generation
//! config, chat template, code, license, cards.
//!
//! A base's directory may hold anything: checkpoints of its training, a user's own files, links to
//! places that are nobody's business. Only files of known kinds are carried over; the rest is left
//! out and said.

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::storage::file_names;
use crate::storage::local::{self, Entry, Stamp};
use crate::storage::staging;

/// The files of a checkpoint's directory beside its own shards and index.
#[derive(Debug, Default, Clone)]
pub struct SideFiles {
    /// Carried over, by their path within the directory, as they were found.
    pub carried: Vec<(String, Stamp)>,
    /// Not carried over, folders with a slash at the end: other weights, hidden files, folders with
    /// models of their own, links that lead out of the model, and what no model needs.
    pub left_out: Vec<String>,
}

/// Endings of the files that belong to models: configs, tokenizers, templates, code, and what their
/// cards show.
const CARRIED: [&str; 28] = [
    ".json",
    ".jinja",
    ".txt",
    ".md",
    ".model",
    ".tiktoken",
    ".vocab",
    ".bpe",
    ".spm",
    ".codes",
    ".tokenizer",
    ".ttf",
    ".py",
    ".c",
    ".h",
    ".cpp",
    ".cu",
    ".yaml",
    ".yml",
    ".toml",
    ".rst",
    ".pdf",
    ".png",
    ".jpg",
    ".jpeg",
    ".gif",
    ".svg",
    ".webp",
];
/// What the names of files without an ending hold that belong to models.
const PLAIN: [&str; 8] =
    ["license", "licence", "notice", "copying", "readme", "use_policy", "authors", "changelog"];
/// Folders of other copies of the weights.
const LEFT_OUT: [&str; 6] = ["original", "onnx", "openvino", "coreml", "metal", "flax"];
/// Files that describe the directory they lie in, not the model.
const OWN: [&str; 7] = [
    ".gitattributes",
    ".gitignore",
    ".git",
    ".cache",
    ".huggingface",
    staging::DIRECTORY,
    staging::MANIFEST,
];
/// What training leaves, and no model needs.
const OF_TRAINING: [&str; 4] =
    ["trainer_state.json", "all_results.json", "train_results.json", "eval_results.json"];
/// What a sentence model's parts are listed in.
const MODULES: &str = "modules.json";

/// Lists the side files of a checkpoint. A single file has none.
///
/// # Errors
/// [`Error::Io`] if something cannot be looked at, [`Error::Checkpoint`] for a link that leads
/// nowhere, a pipe in the place of a file, and a file of the model that is a link out of it.
pub fn list(base: &Checkpoint) -> Result<SideFiles> {
    let mut files = SideFiles::default();
    if base.is_directory() {
        let mut own: Vec<&str> = base.shards().iter().map(|shard| shard.name.as_str()).collect();
        own.extend(base.indexes().iter().map(|index| index.file_name.as_str()));
        match base.store().as_directory() {
            Some(root) => {
                let (homes, parts) = (homes(base, root)?, parts(base)?);
                let components = components(base);
                Walk { root, own, homes, parts, components }.folder(Path::new(""), &mut files)?;
            }
            None => in_store(base, &own, &mut files)?,
        }
        files.carried.sort_by(|left, right| left.0.cmp(&right.0));
        files.left_out.sort();
    }
    Ok(files)
}

/// The side files of a store that is no directory, in which there are no links.
fn in_store(base: &Checkpoint, own: &[&str], files: &mut SideFiles) -> Result<()> {
    let (store, components, parts) = (base.store(), components(base), parts(base)?);
    let mut names = store.list()?;
    let mut next = 0;
    while let Some(name) = names.get(next).cloned() {
        next += 1;
        if !store.is_file(&name) {
            let within = store.list_in(&name)?;
            let is_named = parts.contains(&name) || components.contains_key(&name);
            if is_named || is_part_of_a_model(&name, &within) {
                names.extend(within.iter().map(|file| format!("{name}/{file}")));
            } else if !is_own(&name) {
                files.left_out.push(format!("{name}/"));
            }
            continue;
        }
        let (folder, file_name) = name.rsplit_once('/').unwrap_or(("", &name));
        if own.contains(&name.as_str()) || is_own(file_name) {
            continue;
        }
        let is_known = match components.get(folder) {
            Some(has_tensors) => is_carried_in_component(file_name, *has_tensors),
            None => is_carried(file_name) && !file_names::holds_weights(file_name),
        };
        if is_known {
            let stamp = store.stamp(&name)?;
            files.carried.push((name, stamp));
        } else {
            files.left_out.push(name);
        }
    }
    Ok(())
}

/// The directories in which a base's files may lie: its own first, and those in which its shards do
/// if they are links, as in a hub's cache.
fn homes(base: &Checkpoint, root: &Path) -> Result<Vec<PathBuf>> {
    let mut homes = vec![local::real_path(root)?];
    for shard in base.shards() {
        let shard = local::real_path(shard.file.path())?;
        homes.extend(shard.parent().map(Path::to_path_buf));
    }
    homes.dedup();
    Ok(homes)
}

/// The folders of a pipeline's components, and whether each has tensors that are the pipeline's.
fn components(base: &Checkpoint) -> BTreeMap<String, bool> {
    let parts = base.pipeline().into_iter().flat_map(|pipeline| &pipeline.parts);
    parts.map(|part| (part.folder.clone(), part.has_tensors)).collect()
}

/// The folders that a sentence model's `modules.json` names: parts of it, which may hold weights.
fn parts(base: &Checkpoint) -> Result<BTreeSet<String>> {
    let store = base.store();
    if !store.has(MODULES)? {
        return Ok(BTreeSet::new());
    }
    let (content, _) = store.read_small(MODULES)?;
    let modules: Value = serde_json::from_slice(&content).unwrap_or_default();
    let modules = modules.as_array().into_iter().flatten();
    Ok(modules.filter_map(|module| Some(module.get("path")?.as_str()?.to_owned())).collect())
}

struct Walk<'a> {
    root: &'a Path,
    /// Shards and index, which are no side files.
    own: Vec<&'a str>,
    homes: Vec<PathBuf>,
    parts: BTreeSet<String>,
    /// Of a pipeline: the folders of components, and whether the weights in each are shards.
    components: BTreeMap<String, bool>,
}

impl Walk<'_> {
    fn folder(&self, below: &Path, files: &mut SideFiles) -> Result<()> {
        let directory = self.root.join(below);
        for Entry { path, name, is_directory } in local::entries_in(&directory)? {
            let file_name = match name.into_string() {
                Ok(file_name) => file_name,
                Err(odd) => {
                    files.left_out.push(below.join(odd).to_string_lossy().into_owned());
                    continue;
                }
            };
            let relative = below.join(&file_name);
            let name = relative.to_string_lossy().into_owned();
            if self.own.contains(&name.as_str()) || is_own(&file_name) {
                continue;
            }
            if is_directory {
                if self.is_part(&relative, &file_name)? {
                    self.folder(&relative, files)?;
                } else {
                    files.left_out.push(format!("{name}/"));
                }
            } else if self.belongs(below, &file_name) {
                if let Some(stamp) = self.look_at(&path, &file_name)? {
                    files.carried.push((name, stamp));
                } else {
                    files.left_out.push(name);
                }
            } else {
                files.left_out.push(name);
            }
        }
        Ok(())
    }

    /// Whether a file in that folder is of a kind that belongs to the model.
    fn belongs(&self, folder: &Path, name: &str) -> bool {
        if let Some(has_tensors) = folder.to_str().and_then(|folder| self.components.get(folder)) {
            return is_carried_in_component(name, *has_tensors);
        }
        // Folders below it are parts of the model, and their weights no other copies of these.
        let is_top = folder.as_os_str().is_empty();
        is_carried(name) && !(is_top && file_names::holds_weights(name))
    }

    /// Whether a folder belongs to the model: it has no weights of its own, or is named as a part.
    fn is_part(&self, relative: &Path, name: &str) -> Result<bool> {
        if name.starts_with('.') || LEFT_OUT.contains(&name) {
            return Ok(false);
        }
        let is_named = |path: &str| self.parts.contains(path) || self.components.contains_key(path);
        if relative.to_str().is_some_and(is_named) {
            return Ok(true);
        }
        let directory = self.root.join(relative);
        // Such as lost+found; what nobody may look at is no part of a model.
        let Some(paths) = local::paths_in_if_allowed(&directory)? else { return Ok(false) };
        let name_of =
            |path: &PathBuf| path.file_name().unwrap_or_default().to_string_lossy().into_owned();
        Ok(is_part_of_a_model(name, &paths.iter().map(name_of).collect::<Vec<_>>()))
    }

    /// A side file as it is; `None` for what is no plain file, and for a link that leads out of
    /// the model, unless the model would be another one without the file.
    fn look_at(&self, path: &Path, name: &str) -> Result<Option<Stamp>> {
        let Some(metadata) = local::find(path)? else { return Ok(None) };
        let needed = file_names::OF_A_MODEL.contains(&name);
        if !metadata.is_file() {
            let what = local::kind(&metadata);
            return if needed {
                Err(Error::checkpoint(path, format!("is {what}; a plain file is needed here")))
            } else {
                Ok(None)
            };
        }
        let real = local::real_path(path)?;
        let [root, beside_shards @ ..] = self.homes.as_slice() else { return Ok(None) };
        let is_beside = |home: &PathBuf| real.parent() == Some(home.as_path());
        if real.starts_with(root) || beside_shards.iter().any(is_beside) {
            return Ok(Some(Stamp::of(&metadata)));
        }
        if needed {
            return Err(Error::checkpoint(
                path,
                format!(
                    "is a link out of the model, to {}; put a copy in its place",
                    real.display()
                ),
            ));
        }
        Ok(None)
    }
}

/// Whether a folder belongs to the model around it, by its name and the names in it: it has no weights and
/// no model of its own.
fn is_part_of_a_model(name: &str, within: &[String]) -> bool {
    let own = name.rsplit('/').next().unwrap_or(name);
    let of_a_model = [file_names::ADAPTER_CONFIG, "trainer_state.json", "model_index.json"];
    let is_other = |name: &String| {
        file_names::holds_weights(name) || is_index(name) || of_a_model.contains(&name.as_str())
    };
    !own.starts_with('.') && !LEFT_OUT.contains(&own) && !within.iter().any(is_other)
}

fn is_own(name: &str) -> bool {
    OWN.contains(&name) || file_names::REPORTS.contains(&name)
}

fn is_index(name: &str) -> bool {
    let lower = name.to_lowercase();
    lower.contains(".index") && lower.ends_with(".json")
}

/// Whether a file in the folder of a pipeline's component belongs to it beside its shards. A component
/// without shards keeps whatever weights it has, for the pipeline does not load without it.
fn is_carried_in_component(name: &str, has_tensors: bool) -> bool {
    match (file_names::holds_weights(name), has_tensors) {
        (true, true) => false,
        (true, false) => !name.starts_with('.'),
        (false, _) => is_carried(name),
    }
}

/// Whether a file is of a kind that belongs to models.
fn is_carried(name: &str) -> bool {
    let lower = name.to_lowercase();
    let is_known = || {
        CARRIED.iter().any(|ending| lower.ends_with(ending))
            || lower.ends_with(".safetensors")
            || !lower.contains('.') && PLAIN.iter().any(|plain| lower.contains(plain))
    };
    let is_other = lower.starts_with('.')
        || is_index(&lower)
        || OF_TRAINING.contains(&lower.as_str())
        || lower == file_names::ADAPTER_CONFIG;
    !is_other && is_known()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn only_what_belongs_to_models_is_carried() {
        for name in ["config.json", "LICENSE", "LICENSE.txt", "README", "a.PY", "vocab.bpe"] {
            assert!(is_carried(name), "{name}");
        }
        for name in [".env", "id_rsa", "notes", "train.log", "model.safetensors.index.json"] {
            assert!(!is_carried(name), "{name}");
        }
    }
}
