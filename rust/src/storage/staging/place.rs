//! Where a model may be written: never over what is read, never over what is no model.

use std::collections::{BTreeSet, HashMap};
use std::fs;
use std::path::{Path, PathBuf};

use serde_json::Value;

use super::{DIRECTORY, Input, is_index, manifest, stays_inside};
use crate::error::{Error, Result};
use crate::storage::file_names;
use crate::storage::local::{self, identity};

/// What lists the components of a pipeline, which lie in folders.
const MODEL_INDEX: &str = "model_index.json";

/// The path with every link resolved, as far as it exists.
pub fn resolve(path: &Path) -> PathBuf {
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

/// What an output leads to, if it is there.
fn look(output: &Path) -> Result<Option<fs::Metadata>> {
    local::find(output).map_err(|error| match error {
        Error::Checkpoint { path, .. } => {
            Error::output(path, "is a link that leads nowhere; give another directory")
        }
        other => other,
    })
}

/// The outermost of an output's directories that does not exist yet.
///
/// # Errors
/// Where one of them cannot be looked at, or is a link that leads nowhere.
pub fn first_missing(output: &Path) -> Result<Option<PathBuf>> {
    let place = resolve(output);
    let mut missing = None;
    for path in place.ancestors() {
        if look(path)?.is_some() {
            break;
        }
        missing = Some(path.to_path_buf());
    }
    Ok(missing)
}

/// Refuses an output that is what the merge reads, or lies in the base. Directories are told by
/// what they are, for one can have several names.
pub fn check_place(inputs: &[Input], output: &Path) -> Result<()> {
    let place = resolve(output);
    let above: Vec<_> = (place.ancestors())
        .map(|path| fs::metadata(path).ok().map(|metadata| identity(&metadata)))
        .collect();
    let differs = |path: &Path| {
        let of_input = fs::metadata(path).ok().map(|metadata| identity(&metadata));
        (resolve(path), of_input.filter(|identity| *identity != (0, 0)))
    };
    for input in inputs {
        let (path, of_input) = differs(&input.path);
        let is = |position: usize, ancestor: &Path| {
            ancestor == path || of_input.is_some() && above[position] == of_input
        };
        let mut ancestors = place.ancestors().enumerate();
        let found = ancestors.find(|(position, ancestor)| is(*position, ancestor));
        let (what, at) = (&input.what, input.path.display());
        match found {
            Some((0, _)) if input.is_base => {
                return Err(Error::output(
                    output,
                    format!("is {what} itself; give another directory"),
                ));
            }
            Some((0, _)) => {
                return Err(Error::output(
                    output,
                    format!("is where {what} lies; give another directory"),
                ));
            }
            Some(_) if input.is_base => {
                return Err(Error::output(
                    output,
                    format!("lies inside {what} {at}; give another directory"),
                ));
            }
            _ => {}
        }
    }
    Ok(())
}

/// Refuses an output that exists with something in it, unless it may be overwritten.
pub fn check_content(output: &Path, overwrite: bool) -> Result<()> {
    match look(output)? {
        None => return Ok(()),
        Some(metadata) if metadata.is_dir() => {}
        Some(_) => {
            return Err(Error::output(output, "exists and is not a directory; give another path"));
        }
    }
    let failed = |error| Error::io(output, error);
    for entry in fs::read_dir(output).map_err(failed)? {
        if entry.map_err(failed)?.file_name() != DIRECTORY && !overwrite {
            return Err(Error::output(
                output,
                "exists and is not empty; give another directory, or replace it with --overwrite \
                 (overwrite=True)",
            ));
        }
    }
    Ok(())
}

/// Refuses to begin what the file system has no room for.
#[cfg(unix)]
pub fn check_space(output: &Path, needed: u64) -> Result<()> {
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

/// Refuses to begin what the file system has no room for.
#[cfg(not(unix))]
pub fn check_space(_output: &Path, _needed: u64) -> Result<()> {
    Ok(())
}

/// What lies in an output that a model is to replace.
#[derive(Debug, Default)]
pub struct Occupancy {
    /// The files of the model that was there, by their names; what the new one replaces is among
    /// them.
    pub older: Vec<String>,
    /// Files with weights that stay, and are no part of either model.
    pub bystanders: Vec<String>,
}

impl Occupancy {
    /// Looks at an output.
    ///
    /// # Errors
    /// [`Error::Output`] where the new files cannot go to their places, or would go over what is
    /// read; [`Error::Io`].
    pub fn find(output: &Path, names: &[String], inputs: &[Input]) -> Result<Self> {
        let mut entries = list(output)?;
        for folder in component_folders(output, names) {
            let inner = list(&output.join(&folder))?;
            entries.extend(inner.into_iter().map(|name| format!("{folder}/{name}")));
        }
        let mut older = BTreeSet::new();
        for name in names {
            if check_target(output, name)? {
                older.insert(name.clone());
            }
        }
        let known = manifest::listed(output).into_iter().map(|(name, _)| name);
        let indexes = entries.iter().filter(|name| is_index(name));
        let shards = indexes.clone().flat_map(|name| shards_of(output, name));
        let is_of_a_model = |name: &&String| file_names::is_of_a_model(file_names::last_part(name));
        let fixed = entries.iter().filter(is_of_a_model);
        for name in known.chain(shards).chain(indexes.cloned()).chain(fixed.cloned()) {
            // A file, or a link to one, which is moved as the link that it is.
            let found = fs::symlink_metadata(output.join(&name));
            if found.is_ok_and(|metadata| !metadata.is_dir()) {
                older.insert(name);
            }
        }
        refuse_adapters(output, &entries, &older)?;
        refuse_inputs(output, &older, inputs)?;
        let is_left = |name: &&String| file_names::holds_weights(name) && !older.contains(*name);
        let bystanders = entries.iter().filter(is_left).cloned().collect();
        Ok(Self { older: older.into_iter().collect(), bystanders })
    }
}

/// The names in a directory, those that are no Unicode left out.
fn list(directory: &Path) -> Result<Vec<String>> {
    let failed = |error| Error::io(directory, error);
    let mut names = Vec::new();
    for entry in fs::read_dir(directory).map_err(failed)? {
        names.extend(entry.map_err(failed)?.file_name().into_string());
    }
    names.sort();
    Ok(names)
}

/// The folders in an output that are components of a pipeline: of the one that comes there, and of the
/// one that is there by its own list. Links to folders are none.
fn component_folders(output: &Path, names: &[String]) -> BTreeSet<String> {
    let mut folders = BTreeSet::new();
    if names.iter().any(|name| name == MODEL_INDEX) {
        folders.extend(names.iter().filter_map(|name| Some(name.split_once('/')?.0.to_owned())));
    }
    let listed = || {
        let (content, _) = local::read_small(&output.join(MODEL_INDEX)).ok()?;
        let content: Value = serde_json::from_slice(&content).ok()?;
        let entries = content.as_object()?.iter().filter(|(_, entry)| entry.is_array());
        Some(entries.map(|(name, _)| name.clone()).collect::<Vec<_>>())
    };
    folders.extend(listed().unwrap_or_default());
    folders.retain(|folder| {
        let is_folder = |metadata: fs::Metadata| metadata.is_dir();
        !folder.contains('/')
            && stays_inside(output, folder)
            && fs::symlink_metadata(output.join(folder)).is_ok_and(is_folder)
    });
    folders
}

/// Whether there is something where a new file goes; an error if the file could not take its place.
fn check_target(output: &Path, name: &str) -> Result<bool> {
    let mut path = output.to_path_buf();
    let parts: Vec<_> = Path::new(name).components().collect();
    for (position, part) in parts.iter().enumerate() {
        path.push(part);
        let metadata = match fs::symlink_metadata(&path) {
            Ok(metadata) => metadata,
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return Ok(false),
            Err(error) => return Err(Error::io(&path, error)),
        };
        let is_last = position + 1 == parts.len();
        if is_last && metadata.is_dir() {
            let message = "is a directory where the model has a file; move it away";
            return Err(Error::output(&path, message));
        }
        if !is_last && !metadata.is_dir() {
            let message = "is no directory, but the model has files below it; move it away";
            return Err(Error::output(&path, message));
        }
    }
    Ok(true)
}

/// The files that an index lists.
fn shards_of(output: &Path, index: &str) -> BTreeSet<String> {
    let read = || {
        let (mut file, _) = local::open(&output.join(index)).ok()?;
        let content: Value = serde_json::from_slice(&local::read_whole(&mut file).ok()?).ok()?;
        let map = content.get("weight_map")?.as_object()?;
        let names =
            map.values().filter_map(Value::as_str).filter(|name| stays_inside(output, name));
        Some(names.map(str::to_owned).collect())
    };
    read().unwrap_or_default()
}

/// An adapter that stays beside a model makes loaders load that in its place; one that is no part
/// of the older model is not ours to delete.
fn refuse_adapters(output: &Path, entries: &[String], older: &BTreeSet<String>) -> Result<()> {
    let is_config = |name: &&String| file_names::last_part(name) == file_names::ADAPTER_CONFIG;
    match entries.iter().filter(is_config).find(|name| !older.contains(*name)) {
        Some(name) => Err(Error::output(
            output,
            format!(
                "holds an adapter ({name}), for which loaders would take the merged model; move \
                 it away or give another directory"
            ),
        )),
        None => Ok(()),
    }
}

/// Refuses to move away what the merge reads, whatever its name there.
fn refuse_inputs(output: &Path, older: &BTreeSet<String>, inputs: &[Input]) -> Result<()> {
    let known: HashMap<_, _> = inputs
        .iter()
        .filter_map(|input| Some((identity(&fs::metadata(&input.path).ok()?), input)))
        .filter(|(identity, _)| *identity != (0, 0))
        .collect();
    for name in older {
        let Ok(metadata) = fs::symlink_metadata(output.join(name)) else { continue };
        if let Some(input) = known.get(&identity(&metadata)) {
            return Err(Error::output(
                output,
                format!(
                    "its {name} is a file of {} ({}); give another directory",
                    input.what,
                    input.path.display()
                ),
            ));
        }
    }
    Ok(())
}
