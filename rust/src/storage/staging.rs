//! The output directory: what may be written where, the hidden directory in which a model is made,
//! and the commit that makes the output a model.
//!
//! Everything is written into [`DIRECTORY`] inside the output, so that it is on the same file
//! system, under names and sizes that are known before. The commit ([`commit`]) looks whether all
//! of it is there, moves the older model aside, moves the new one into place, the config last, and
//! deletes the older one at the very end. Until then every step can be taken back.

mod commit;
mod lock;
mod manifest;
mod moves;
mod place;
mod staged;

use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Component, Path, PathBuf};
use std::sync::Arc;

pub use commit::{Recovery, check_whole, recover};
pub use manifest::{MANIFEST, encode as encode_manifest, missing_files};

use crate::error::{Error, Owner, Result};
use crate::storage::directory::LocalDirectory;
use crate::storage::file_names;
use crate::storage::local::{self, CopyError, Stamp};
use crate::storage::sink::{Committed, FileMark, Input, OutputLock, Request, Sink, StagedModel};
use crate::storage::source::Source;
use crate::storage::store::Store;
use lock::Lock;
use place::Occupancy;
use staged::StagedFiles;

/// The directory inside the output in which a merge is prepared.
pub const DIRECTORY: &str = ".lorafast-partial";
/// In it: the new model, in a directory of this name and a number that no merge before has used.
const MODEL: &str = "model-";
/// In it: finished models that could not be moved into place, for whoever merged them.
const KEPT: &str = "kept-";

/// In it: says that the new model is in its place, and that what is written about it may be missing.
const COMMITTED: &str = "committed";

/// Bytes of a side file that are in memory at a time.
const COPIED_AT_ONCE: usize = 1 << 20;

/// A file of the new model.
#[derive(Debug)]
struct Written {
    name: String,
    bytes: u64,
    identity: (u64, u64),
    /// Open until the commit, that no other file can have its identity. Weights are held open by
    /// whoever writes them.
    _file: Option<File>,
}

/// A file of the older model that stays where it is.
#[derive(Debug)]
struct KeptFile {
    name: String,
    mark: FileMark,
    /// Open until the commit, that no other file can have its inode.
    _file: File,
}

/// The checked and locked place for one merge. Dropped before [`Staging::commit`], it leaves the
/// output as it was found.
#[derive(Debug)]
pub struct Staging {
    output: PathBuf,
    directory: PathBuf,
    /// The name of the model's directory in it.
    model: String,
    sync: bool,
    occupancy: Occupancy,
    names: Vec<String>,
    inputs: Vec<Input>,
    written: Vec<Written>,
    /// Files of the older model that the new one has, too.
    kept_files: Vec<KeptFile>,
    lock: Option<Lock>,
    /// The outermost directory that did not exist before, removed again on failure.
    created: Option<PathBuf>,
    /// Whether the directory stays as it is.
    kept: bool,
}

impl Staging {
    /// Checks the output and takes possession of it. A commit that was cut off there is finished
    /// or taken back before.
    ///
    /// # Errors
    /// [`Error::Output`] or [`Error::Io`], with the output left as it was.
    pub fn create(output: &Path, request: Request) -> Result<Self> {
        let Request { overwrite, sync, bytes, mut names, inputs, .. } = request;
        names.push(MANIFEST.to_owned());
        place::check_place(&inputs, output)?;
        // What an earlier merge left is cleared away first, whether the output may be used or not.
        if fs::symlink_metadata(output.join(DIRECTORY)).is_err() {
            place::check_content(output, overwrite)?;
        }
        let created = place::first_missing(output)?;
        let directory = output.join(DIRECTORY);
        let mut this = Self {
            output: output.to_path_buf(),
            directory: directory.clone(),
            model: String::new(),
            sync,
            occupancy: Occupancy::default(),
            names,
            inputs,
            written: Vec::new(),
            kept_files: Vec::new(),
            lock: None,
            created,
            kept: false,
        };
        this.lock = Some(Lock::take(output, &directory)?);
        let has_finished = commit::take_back_or_finish(output, &directory)?;
        place::check_content(output, overwrite).map_err(|error| match error {
            Error::Output { path, message } if has_finished => {
                let note = "a merge that was cut off there has just been finished; it";
                Error::Output { path, message: format!("{note} {message}") }
            }
            other => other,
        })?;
        // One that has lost its lock without knowing writes to another directory.
        let highest = clear(&directory, Kept::Stays);
        let highest = highest.map_err(|error| Error::io(&directory, error))?;
        this.model = format!("{MODEL}{}", highest + 1);
        place::check_space(output, bytes)?;
        let model = directory.join(&this.model);
        fs::create_dir(&model).map_err(|error| Error::io(&model, error))?;
        this.occupancy = Occupancy::find(output, &this.names, &this.inputs)?;
        Ok(this)
    }

    /// Where a file of the output is prepared. Makes the directories that its name asks for, and
    /// no other: those of the merge were made at its beginning.
    fn path(&self, name: &str) -> Result<PathBuf> {
        let mut path = self.directory.join(&self.model);
        let mut parts = Path::new(name).components().peekable();
        while let Some(part) = parts.next() {
            path.push(part);
            if parts.peek().is_some()
                && let Err(error) = fs::create_dir(&path)
                && error.kind() != io::ErrorKind::AlreadyExists
            {
                return Err(self.failed(&path, error));
            }
        }
        Ok(path)
    }

    /// Whether a file is of the older model and of the new one.
    fn keeps(&self, name: &str) -> bool {
        self.kept_files.iter().any(|kept| kept.name == name)
    }

    /// What a failure to write there means: what is not there any more was there.
    fn failed(&self, path: &Path, error: io::Error) -> Error {
        if error.kind() == io::ErrorKind::NotFound {
            commit::lost(&self.output, format!("something removed {}", self.directory.display()))
        } else {
            Error::io(path, error)
        }
    }

    /// Where a file of the new model is prepared, which must be among the announced names.
    fn place_of(&self, name: &str) -> Result<PathBuf> {
        debug_assert!(self.names.iter().any(|known| known == name), "{name} was announced");
        if self.lock.as_ref().is_none_or(|lock| !lock.is_held()) {
            let what = format!("something removed the lock in {}", self.directory.display());
            return Err(commit::lost(&self.output, what));
        }
        self.path(name)
    }

    /// Makes a file of the new model, which must be among the announced names, with the
    /// permissions of the file that it is made from.
    fn create_new(&mut self, name: &str, bytes: u64, like: Option<&dyn Source>) -> Result<File> {
        let path = self.place_of(name)?;
        let failed = |error| Error::io(&path, error);
        // Never through a link, and never over what somebody else has put there.
        let file = File::options().read(true).write(true).create_new(true).open(&path);
        let file = file.map_err(|error| self.failed(&path, error))?;
        if let Some(like) = like.and_then(Source::as_file) {
            // Some file systems have no permissions to set.
            let like = like.metadata().map_err(failed)?;
            let _ = file.set_permissions(local::permissions(&like));
        }
        let identity = local::identity(&file.metadata().map_err(failed)?);
        self.written.push(Written { name: name.to_owned(), bytes, identity, _file: None });
        Ok(file)
    }

    /// Syncs a file that is written, and keeps it open.
    fn close(&mut self, name: &str, file: File) -> Result<()> {
        if self.sync {
            file.sync_all().map_err(|error| Error::io(self.output.join(name), error))?;
        }
        if let Some(written) = self.written.last_mut() {
            written._file = Some(file);
        }
        Ok(())
    }
}

impl StagedModel for Staging {
    /// The file stays open until the commit: what is deleted meanwhile is then known, for no other file
    /// can be the same.
    fn create(
        &mut self,
        name: &str,
        bytes: u64,
        like: Option<&dyn Source>,
    ) -> Result<Box<dyn Sink>> {
        let file = self.create_new(name, bytes, like)?;
        let failed = |error| Error::io(self.output.join(name), error);
        file.set_len(bytes).map_err(failed)?;
        local::allocate(&file, bytes);
        Ok(Box::new(file))
    }

    fn put(&mut self, name: &str, content: &[u8], like: Option<&dyn Source>) -> Result<()> {
        let mut file = self.create_new(name, content.len() as u64, like)?;
        file.write_all(content).map_err(|error| Error::io(self.output.join(name), error))?;
        self.close(name, file)
    }

    fn copy(&mut self, name: &str, source: &dyn Source, path: &Path) -> Result<()> {
        let length = source.stamp().length;
        let file = self.create_new(name, length, Some(source))?;
        let mut buffer = vec![0; COPIED_AT_ONCE.min(length as usize).max(1)];
        file.take_range(source, 0..length, 0, &mut buffer).map_err(|error| match error {
            CopyError::Read(error) => Owner::Checkpoint.unread(path, error),
            CopyError::Write(error) => Error::io(self.output.join(name), error),
        })?;
        self.close(name, file)
    }

    fn staged(&self) -> Arc<dyn Store> {
        let made = LocalDirectory(self.directory.join(&self.model));
        if self.kept_files.is_empty() {
            return Arc::new(made);
        }
        let kept = self.kept_files.iter().map(|file| file.name.clone()).collect();
        Arc::new(StagedFiles { made, output: LocalDirectory(self.output.clone()), kept })
    }

    fn keep(&mut self, files: &[(&str, FileMark)]) -> Result<bool> {
        let mut kept = Vec::new();
        for (name, mark) in files {
            debug_assert!(self.names.iter().any(|known| known == name), "{name} was announced");
            let path = self.output.join(name);
            let is_it = |found: fs::Metadata| found.is_file() && FileMark::of(&found) == *mark;
            if !stays_inside(&self.output, name) || FileMark::of_file(&path) != Some(*mark) {
                return Ok(false);
            }
            let Ok(file) = File::open(&path) else { return Ok(false) };
            if !file.metadata().is_ok_and(is_it) {
                return Ok(false);
            }
            if self.sync {
                // Whoever wrote it may not have waited for the disk.
                file.sync_all().map_err(|error| Error::io(&path, error))?;
            }
            kept.push(KeptFile { name: (*name).to_owned(), mark: *mark, _file: file });
        }
        self.kept_files.extend(kept);
        Ok(true)
    }

    fn adopt(&mut self, name: &str, source: &dyn Source, path: &Path) -> Result<bool> {
        let place = self.place_of(name)?;
        if fs::hard_link(path, &place).is_err() {
            return Ok(false);
        }
        let failed = |error| Error::io(&place, error);
        let file = File::open(&place).map_err(failed)?;
        let stamp = Stamp::of(&file.metadata().map_err(failed)?);
        if stamp != source.stamp() {
            return Err(Owner::Checkpoint.changed(path));
        }
        let (name, bytes, identity) = (name.to_owned(), stamp.length, stamp.identity);
        self.written.push(Written { name: name.clone(), bytes, identity, _file: None });
        self.close(&name, file)?;
        Ok(true)
    }

    /// The model is listed in a manifest beside it. What of an older model the new one does not replace
    /// is deleted at the end; whatever else lies in the output stays. An error says where the new
    /// model lies.
    fn commit(mut self: Box<Self>) -> Result<Committed> {
        let written = self.written.iter().map(|file| (&*file.name, file.bytes));
        let kept = self.kept_files.iter().map(|file| (&*file.name, file.mark.bytes));
        let content = manifest::encode(written.chain(kept));
        self.put(MANIFEST, &content, None)?;
        let mut warnings = commit::commit(&mut self)?;
        let Some(lock) = self.lock.take() else {
            return Ok(Committed { warnings, ..Committed::default() });
        };
        let directory = self.directory.clone();
        let failed = |directory: &Path, error: io::Error| {
            format!("{}: could not be removed ({error}); remove it by hand", directory.display())
        };
        // The model is complete: what fails now is no failure of the merge.
        let cleared = lock.clear(&directory, Kept::Goes);
        if let Err(error) = cleared {
            warnings.push(failed(&directory, error));
            let release = move || {
                lock.release();
                None
            };
            return Ok(Committed {
                warnings,
                lock: OutputLock::new(release),
                ..Committed::default()
            });
        }
        // Only a note for whoever finds that the process was killed before the end.
        let _ = File::create_new(directory.join(COMMITTED));
        let release = move || {
            let removed = lock.remove(&directory, Kept::Goes);
            removed.err().map(|error| failed(&directory, error))
        };
        Ok(Committed { warnings, lock: OutputLock::new(release), ..Committed::default() })
    }
}

impl Drop for Staging {
    fn drop(&mut self) {
        let lock = self.lock.take();
        if self.kept {
            lock.into_iter().for_each(Lock::release);
            return;
        }
        // Nothing can be done about a failure here, and the name says what the remains are.
        if let Some(lock) = lock {
            let _ = lock.remove(&self.directory, Kept::Stays);
        }
        if let Some(created) = &self.created {
            // From the output upwards, as long as the directories are empty.
            let place = place::resolve(&self.output);
            for path in place.ancestors().take_while(|path| path.starts_with(created)) {
                if fs::remove_dir(path).is_err() {
                    break;
                }
            }
        }
    }
}

/// What becomes of finished models that could not be moved into place.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Kept {
    Stays,
    Goes,
}

/// Removes what merges left in their directory, but for the lock. Returns the highest number of a
/// model there.
fn clear(directory: &Path, kept: Kept) -> io::Result<u64> {
    let mut highest = 0;
    for entry in fs::read_dir(directory)? {
        let entry = entry?;
        let name = entry.file_name();
        let text = name.to_string_lossy();
        let number = text.strip_prefix(MODEL).or_else(|| text.strip_prefix(KEPT));
        highest = highest.max(number.and_then(|number| number.parse().ok()).unwrap_or(0));
        if lock::is_lock(&name) || kept == Kept::Stays && text.starts_with(KEPT) {
            continue;
        }
        let path = entry.path();
        if entry.file_type()?.is_dir() {
            fs::remove_dir_all(&path)?;
        } else {
            fs::remove_file(&path)?;
        }
    }
    Ok(highest)
}

/// Whether it is an index of shards, of safetensors or of torch's files.
fn is_index(name: &str) -> bool {
    let name = file_names::last_part(name);
    let of_weights = name.contains(".safetensors.index") || name.contains(".bin.index");
    of_weights && name.ends_with(".json")
}

/// Whether a name from a file leads to something below a directory and past no link on the way
/// there, and not into the staging directory.
fn stays_inside(directory: &Path, name: &str) -> bool {
    let mut parts = Path::new(name).components().peekable();
    let mut path = directory.to_path_buf();
    if parts.peek().is_none_or(|part| part.as_os_str() == DIRECTORY) {
        return false;
    }
    while let Some(part) = parts.next() {
        if !matches!(part, Component::Normal(_)) {
            return false;
        }
        path.push(part);
        // What is not there yet will be made.
        let is_passed = parts.peek().is_some();
        if is_passed && fs::symlink_metadata(&path).is_ok_and(|metadata| !metadata.is_dir()) {
            return false;
        }
    }
    true
}

#[cfg(test)]
mod tests;
