//! The output directory: what may be written where, the hidden place in which a model is made, and
//! the moment at which it becomes one.
//!
//! Everything is written into [`STAGING`] inside the output directory, so that it is on the same
//! file system, and then renamed into place, the config and the index last: without them no loader
//! takes the directory for a model. What an earlier, killed merge left there is recognised by its
//! name and started again.

use std::collections::HashSet;
use std::fs::{self, File, TryLockError};
use std::io::Write;
use std::path::{Path, PathBuf};

use serde_json::{Map, Value};

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::file;
use crate::plan::{ConfigChanges, Inputs, Plan};

/// The directory inside the output in which a merge is prepared.
pub const STAGING: &str = ".lorafast-partial";
const LOCK: &str = "lock";

/// The checked and locked place for one merge. Dropped before [`Staging::commit`], it leaves the
/// output as it was found.
#[derive(Debug)]
pub struct Staging {
    output: PathBuf,
    staging: PathBuf,
    sync: bool,
    lock: Option<File>,
    /// The outermost directory that did not exist before, removed again on failure.
    created: Option<PathBuf>,
    committed: bool,
}

/// The path with every link resolved, as far as it exists.
fn resolve(path: &Path) -> PathBuf {
    let absolute = std::path::absolute(path).unwrap_or_else(|_| path.to_path_buf());
    let mut missing = Vec::new();
    let mut existing = absolute.as_path();
    loop {
        if let Ok(resolved) = existing.canonicalize() {
            return missing.iter().rev().fold(resolved, |path, part| path.join(part));
        }
        match (existing.parent(), existing.file_name()) {
            (Some(parent), Some(name)) => {
                missing.push(name.to_owned());
                existing = parent;
            }
            _ => return absolute,
        }
    }
}

/// Refuses an output that would overwrite what the merge reads.
fn check_place(inputs: &Inputs, output: &Path) -> Result<()> {
    let place = resolve(output);
    let base = resolve(inputs.base.root());
    if place == base {
        return Err(Error::output(output, "is the base itself; give another directory"));
    }
    if inputs.base.is_directory() && place.starts_with(&base) {
        let base = inputs.base.path().display();
        return Err(Error::output(
            output,
            format!("lies inside the base {base}; give another directory"),
        ));
    }
    for adapter in &inputs.adapters {
        let files = [adapter.path(), adapter.config().path(), adapter.file().path()];
        if files.iter().any(|file| resolve(file) == place || resolve(file).parent() == Some(&place))
        {
            return Err(Error::output(
                output,
                format!(
                    "is where the adapter {} lies; give another directory",
                    adapter.path().display()
                ),
            ));
        }
    }
    Ok(())
}

/// Refuses an output that exists with something in it, unless it may be overwritten.
fn check_content(output: &Path, overwrite: bool) -> Result<()> {
    match fs::symlink_metadata(output) {
        Err(_) => return Ok(()),
        Ok(_) if output.is_dir() => {}
        Ok(_) => {
            return Err(Error::output(output, "exists and is not a directory; give another path"));
        }
    }
    let entries = fs::read_dir(output).map_err(|error| Error::io(output, error))?;
    let occupied = entries.flatten().any(|entry| entry.file_name() != STAGING);
    if occupied && !overwrite {
        return Err(Error::output(
            output,
            "exists and is not empty; give another directory, or replace it with --overwrite \
             (overwrite=True)",
        ));
    }
    Ok(())
}

/// Refuses to begin what the file system has no room for.
#[cfg(unix)]
fn check_space(output: &Path, needed: u64) -> Result<()> {
    let place = resolve(output);
    let existing = place.ancestors().find(|path| path.exists()).unwrap_or(Path::new("/"));
    let Ok(status) = rustix::fs::statvfs(existing) else {
        return Ok(());
    };
    let free = status.f_bavail.saturating_mul(status.f_frsize);
    if free < needed {
        let mib = |bytes: u64| bytes.div_ceil(1 << 20);
        return Err(Error::output(
            output,
            format!(
                "the merge needs {} MiB but its file system has only {} MiB free",
                mib(needed),
                mib(free)
            ),
        ));
    }
    Ok(())
}

#[cfg(not(unix))]
fn check_space(_output: &Path, _needed: u64) -> Result<()> {
    Ok(())
}

impl Staging {
    /// Checks the output and takes possession of it. With `sync`, what is committed has reached
    /// the disk.
    ///
    /// # Errors
    /// [`Error::Output`] or [`Error::Io`], with the output left as it was.
    pub fn create(
        inputs: &Inputs,
        output: &Path,
        overwrite: bool,
        sync: bool,
        bytes: u64,
    ) -> Result<Self> {
        check_place(inputs, output)?;
        check_content(output, overwrite)?;
        check_space(output, bytes)?;
        let place = resolve(output);
        let created =
            place.ancestors().take_while(|path| !path.exists()).last().map(Path::to_path_buf);
        let staging = output.join(STAGING);
        let output_path = output.to_path_buf();
        let mut this =
            Self { output: output_path, staging, sync, lock: None, created, committed: false };
        fs::create_dir_all(&this.staging).map_err(|error| Error::io(&this.staging, error))?;
        let path = this.staging.join(LOCK);
        let lock = File::create(&path).map_err(|error| Error::io(&path, error))?;
        match lock.try_lock() {
            Ok(()) => {}
            Err(TryLockError::WouldBlock) => {
                // It is the other merge's: leave everything to it.
                this.committed = true;
                return Err(Error::output(output, "another merge is writing there at this moment"));
            }
            // File systems without locks exist; the lock only guards against accidents.
            Err(TryLockError::Error(_)) => {}
        }
        this.lock = Some(lock);
        this.clear()?;
        Ok(this)
    }

    /// Removes what an earlier merge left behind.
    fn clear(&self) -> Result<()> {
        let failed = |error| Error::io(&self.staging, error);
        for entry in fs::read_dir(&self.staging).map_err(failed)? {
            let entry = entry.map_err(failed)?;
            if entry.file_name() == LOCK {
                continue;
            }
            let is_directory = entry.file_type().map_err(failed)?.is_dir();
            let path = entry.path();
            let removed =
                if is_directory { fs::remove_dir_all(&path) } else { fs::remove_file(&path) };
            removed.map_err(|error| Error::io(&path, error))?;
        }
        Ok(())
    }

    /// Where a file of the output is prepared. Makes the directories that its name asks for.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn path(&self, name: &str) -> Result<PathBuf> {
        let path = self.staging.join("model").join(name);
        let parent = path.parent().unwrap_or(&self.staging);
        fs::create_dir_all(parent).map_err(|error| Error::io(parent, error))?;
        Ok(path)
    }

    /// Makes a file of that many bytes for positioned writes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn create_file(&self, name: &str, bytes: u64) -> Result<File> {
        let path = self.path(name)?;
        let failed = |error| Error::io(&path, error);
        let file = File::options()
            .read(true)
            .write(true)
            .create(true)
            .truncate(true)
            .open(&path)
            .map_err(failed)?;
        file.set_len(bytes).map_err(failed)?;
        file::allocate(&file, bytes);
        Ok(file)
    }

    /// Writes a small file.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, name: &str, content: &[u8]) -> Result<()> {
        let path = self.path(name)?;
        let failed = |error| Error::io(&path, error);
        let mut file = File::create(&path).map_err(failed)?;
        file.write_all(content).map_err(failed)?;
        if self.sync { file.sync_all().map_err(failed) } else { Ok(()) }
    }

    /// Puts the prepared files in their places. Weights and indexes of an older model that the new
    /// one does not replace are removed; whatever else lies in the directory stays.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn commit(mut self) -> Result<()> {
        let model = self.staging.join("model");
        let mut names = list_files(&model)?;
        // Config and index make a directory a model: they leave first and come last.
        names.sort_by_key(|name| completes_model(name));
        self.retire_older_model(&names)?;
        for name in &names {
            let target = self.output.join(name);
            if let Some(parent) = target.parent() {
                fs::create_dir_all(parent).map_err(|error| Error::io(parent, error))?;
            }
            fs::rename(model.join(name), &target).map_err(|error| Error::io(&target, error))?;
        }
        self.committed = true;
        self.lock = None;
        fs::remove_dir_all(&self.staging).map_err(|error| Error::io(&self.staging, error))?;
        if self.sync {
            // The renames themselves are made durable by syncing the directories.
            let place = resolve(&self.output);
            let mut directories: Vec<_> = (names.iter().map(|name| place.join(name)))
                .chain([place.clone()])
                .filter_map(|path| path.parent().map(Path::to_path_buf))
                .chain([place.clone()])
                .collect();
            directories.sort();
            directories.dedup();
            for directory in directories {
                // Not every file system can sync a directory, and the data is safe already.
                let _ = File::open(&directory).and_then(|directory| directory.sync_all());
            }
        }
        Ok(())
    }

    fn retire_older_model(&self, names: &[String]) -> Result<()> {
        let entries = fs::read_dir(&self.output).map_err(|error| Error::io(&self.output, error))?;
        let mut older: Vec<String> = entries
            .flatten()
            .filter(|entry| entry.path().is_file())
            .map(|entry| entry.file_name().to_string_lossy().into_owned())
            .filter(|name| {
                let is_weights = name.ends_with(".safetensors") || is_index(name);
                completes_model(name) || is_weights && !names.contains(name)
            })
            .collect();
        older.sort_by_key(|name| !completes_model(name));
        for name in older {
            let path = self.output.join(name);
            fs::remove_file(&path).map_err(|error| Error::io(&path, error))?;
        }
        Ok(())
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        if self.committed {
            return;
        }
        // A file that is open cannot be removed everywhere.
        self.lock = None;
        // Nothing can be done about a failure here, and the name says what the remains are.
        let _ = fs::remove_dir_all(&self.staging);
        if let Some(created) = &self.created {
            // From the output upwards, as long as the directories are empty.
            let place = resolve(&self.output);
            for path in place.ancestors().take_while(|path| path.starts_with(created)) {
                if fs::remove_dir(path).is_err() {
                    break;
                }
            }
        }
    }
}

fn is_index(name: &str) -> bool {
    name.contains(".safetensors.index") && name.ends_with(".json")
}

/// Whether loaders take a directory for a model by this file.
fn completes_model(name: &str) -> bool {
    name == "config.json" || is_index(name)
}

/// Every file below a directory, by its path within it.
fn list_files(directory: &Path) -> Result<Vec<String>> {
    fn walk(root: &Path, directory: &Path, names: &mut Vec<String>) -> std::io::Result<()> {
        for entry in fs::read_dir(directory)? {
            let path = entry?.path();
            if path.is_dir() {
                walk(root, &path, names)?;
            } else if let Ok(name) = path.strip_prefix(root) {
                names.push(name.to_string_lossy().into_owned());
            }
        }
        Ok(())
    }
    let mut names = Vec::new();
    walk(directory, directory, &mut names).map_err(|error| Error::io(directory, error))?;
    names.sort();
    Ok(names)
}

/// The output's index: the base's, with every tensor that the shards hold and their size in bytes;
/// its very bytes, where that changes nothing. `None` where the base has none.
pub fn index_content(base: &Checkpoint, plan: &Plan) -> Option<(String, Vec<u8>)> {
    let index = base.index()?;
    let mut content = index.content.clone();
    let mut map = match content.get("weight_map") {
        Some(Value::Object(map)) => map.clone(),
        _ => Map::new(),
    };
    // What stands in no shard any more.
    let planned: HashSet<_> = plan.tensors().map(|(_, tensor)| tensor.name.as_str()).collect();
    map.retain(|name, _| planned.contains(name.as_str()));
    for (shard, tensor) in plan.tensors() {
        map.insert(tensor.name.clone(), Value::from(shard.name.clone()));
    }
    let mut metadata = match content.get("metadata") {
        Some(Value::Object(metadata)) => metadata.clone(),
        _ => Map::new(),
    };
    metadata.insert("total_size".into(), Value::from(plan.tensor_bytes()));
    // The metadata stands first, as libraries write it.
    content.remove("weight_map");
    content.insert("metadata".into(), Value::Object(metadata));
    content.insert("weight_map".into(), Value::Object(map));
    if content == index.content
        && let Ok(bytes) = fs::read(base.root().join(&index.file_name))
    {
        return Some((index.file_name.clone(), bytes));
    }
    Some((index.file_name.clone(), pretty(&Value::Object(content))))
}

/// The names under which configs count layers.
pub const LAYER_COUNTS: [&str; 4] = ["num_hidden_layers", "n_layer", "num_layers", "n_layers"];

/// The base's config with what the merge changes in it, in every place that names it.
pub fn changed_config(config: &Map<String, Value>, changes: &ConfigChanges) -> Vec<u8> {
    fn change(fields: &mut Map<String, Value>, changes: &ConfigChanges) -> (bool, bool) {
        let (mut has_dtype, mut has_tie) = (false, false);
        for (name, value) in fields.iter_mut() {
            match (name.as_str(), &mut *value) {
                ("torch_dtype" | "dtype", Value::String(old)) => {
                    has_dtype = true;
                    if let Some(dtype) = &changes.dtype {
                        old.clone_from(dtype);
                    }
                }
                ("vocab_size", Value::Number(_)) => {
                    if let Some(vocabulary) = changes.vocabulary {
                        *value = Value::from(vocabulary);
                    }
                }
                (name, Value::Number(number)) if LAYER_COUNTS.contains(&name) => {
                    if let Some(layers) = &changes.layers
                        && number.as_u64() == Some(layers.layers)
                    {
                        *value = Value::from(layers.order.len());
                    }
                }
                // One entry for each layer: layer_types, no_rope_layers and their like.
                (name, Value::Array(entries)) if name.contains("layer") => {
                    if let Some(layers) = &changes.layers
                        && entries.len() as u64 == layers.layers
                    {
                        let old = |layer: &u64| entries[*layer as usize].clone();
                        *value = layers.order.iter().map(old).collect();
                    }
                }
                ("tie_word_embeddings", Value::Bool(tied)) => {
                    has_tie = true;
                    *tied = changes.tied.unwrap_or(*tied);
                }
                ("quantization_config", _) => {}
                (name, Value::Object(inner)) if name.ends_with("_config") => {
                    change(inner, changes);
                }
                _ => {}
            }
        }
        (has_dtype, has_tie)
    }
    let mut config = config.clone();
    if changes.unquantised {
        remove_quantisation(&mut config);
    }
    let (has_dtype, has_tie) = change(&mut config, changes);
    if let Some(dtype) = changes.dtype.as_ref().filter(|_| !has_dtype) {
        config.insert("torch_dtype".into(), Value::from(dtype.as_str()));
    }
    if let Some(tied) = changes.tied.filter(|_| !has_tie) {
        config.insert("tie_word_embeddings".into(), Value::from(tied));
    }
    pretty(&Value::Object(config))
}

/// Takes the entries on quantisation out, wherever they stand.
fn remove_quantisation(fields: &mut Map<String, Value>) {
    fields.retain(|name, _| name != "quantization_config" && name != "compression_config");
    for (_, value) in fields.iter_mut().filter(|(name, _)| name.ends_with("_config")) {
        if let Value::Object(inner) = value {
            remove_quantisation(inner);
        }
    }
}

fn pretty(value: &Value) -> Vec<u8> {
    let mut text = serde_json::to_string_pretty(value).expect("a JSON value serialises");
    text.push('\n');
    text.into_bytes()
}
