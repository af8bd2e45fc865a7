//! The commit: the older model moves aside, the new one into its place, and either all of it
//! happens or all of it is taken back.
//!
//! Many files cannot be exchanged with many others at once. So the config leaves first and comes
//! last, that no loader takes what is between for a model, and a journal in the staging directory
//! says what was to move where. Whoever finds the journal knows that the process was cut off, and
//! can finish what it did or take it back from what lies where, for files move and are never copied.

use std::collections::BTreeSet;
use std::fs::{self, File};
use std::io::{self, Write};
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::lock::Lock;
use super::moves::{exists, remove, shift, sync_directory};
use super::{COMMITTED, DIRECTORY, KEPT, Kept, MODEL, Staging, is_index, place, stays_inside};
use crate::error::{Error, Result};
use crate::storage::file_names;
use crate::storage::local::{self, Stamp};
use crate::storage::sink::FileMark;

/// In the staging directory: the files of the older model, while the new one takes their place.
const OLDER: &str = "older";
pub(super) const JOURNAL: &str = "commit.json";
/// The journal before it counts.
const DRAFT: &str = "commit.json.draft";
const SCHEMA: u32 = 1;

/// What moves where.
#[derive(Debug, Serialize, Deserialize)]
struct Journal {
    schema: u32,
    /// The directory in which the new model was made.
    model: String,
    /// The new model's files, in the order in which they come.
    new: Vec<NewFile>,
    /// The older model's files, in the order in which they leave.
    older: Vec<String>,
}

/// A file of the new model. Renaming changes none of this.
#[derive(Debug, Serialize, Deserialize)]
struct NewFile {
    name: String,
    bytes: u64,
    inode: u64,
    /// Nanoseconds from 1970.
    modified: u128,
}

impl NewFile {
    fn of(name: &str, metadata: &fs::Metadata) -> Self {
        let Stamp { length, modified, identity: (_, inode) } = Stamp::of(metadata);
        Self { name: name.to_owned(), bytes: length, inode, modified }
    }

    /// Whether it is the file that lies there. Not every file system keeps inodes, or times.
    fn is_at(&self, path: &Path) -> bool {
        fs::symlink_metadata(path).is_ok_and(|metadata| {
            let found = Self::of(&self.name, &metadata);
            let is_inode = self.inode != 0 && found.inode == self.inode;
            let is_same = is_inode || found.modified == self.modified;
            metadata.is_file() && found.bytes == self.bytes && is_same
        })
    }
}

/// What [`recover`] found and did.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Recovery {
    /// No merge was cut off there.
    Nothing,
    /// A merge was cut off while it wrote; what it left is removed, and the output as it was.
    Cleared,
    /// A merge was cut off in its commit or after it; the new model is in its place.
    Finished,
    /// A commit was cut off and not all of the new model is there; the older one is back.
    TakenBack,
    /// A finished model could not be moved into place; it lies in the staging directory still.
    Kept,
}

/// An error in the middle of a commit.
fn broken(output: &Path, message: impl Into<String>) -> Error {
    Error::output(output, message)
}

/// Where files lie in the course of a commit.
struct Layout<'a> {
    output: &'a Path,
    model: PathBuf,
    older: PathBuf,
    journal: PathBuf,
}

impl<'a> Layout<'a> {
    fn new(output: &'a Path, directory: &Path, model: &str) -> Self {
        Self {
            output,
            model: directory.join(model),
            older: directory.join(OLDER),
            journal: directory.join(JOURNAL),
        }
    }

    /// Moves a file of the older model aside.
    fn retire(&self, name: &str) -> Result<()> {
        shift(&self.output.join(name), &self.older.join(name))
    }

    /// Moves a file of the new model into its place.
    fn place(&self, name: &str) -> Result<()> {
        shift(&self.model.join(name), &self.output.join(name))
    }

    /// Whether a new file is in its place: no more where it was made, and an older one of that name
    /// has moved aside.
    ///
    /// # Errors
    /// [`Error::Output`] if somebody else's file has come there.
    fn is_placed(&self, file: &NewFile, journal: &Journal) -> Result<bool> {
        let place = self.output.join(&file.name);
        if exists(&self.model.join(&file.name))? || !exists(&place)? {
            return Ok(false);
        }
        let had_older = journal.older.contains(&file.name);
        if had_older && !exists(&self.older.join(&file.name))? {
            return Ok(false);
        }
        if file.is_at(&place) {
            return Ok(true);
        }
        let message = "has come there after a merge was cut off, and is not its file; move it away";
        Err(broken(&place, message))
    }

    /// Moves everything back, whatever has moved: the new files that are in their places, then the
    /// older ones, the config last.
    fn take_back(&self, journal: &Journal) -> Result<()> {
        for file in journal.new.iter().rev() {
            if self.is_placed(file, journal)? {
                shift(&self.output.join(&file.name), &self.model.join(&file.name))?;
            }
        }
        for name in journal.older.iter().rev() {
            if exists(&self.older.join(name))? {
                shift(&self.older.join(name), &self.output.join(name))?;
            }
        }
        remove(&self.journal)?;
        remove_empty_folders(self.output, journal.new.iter().map(|file| file.name.as_str()));
        Ok(())
    }

    /// Whether every new file is in its place or ready to be moved there.
    fn is_whole(&self, journal: &Journal) -> Result<bool> {
        for file in &journal.new {
            if !self.is_placed(file, journal)? && !file.is_at(&self.model.join(&file.name)) {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Whether every new file is in its place.
    fn is_done(&self, journal: &Journal) -> bool {
        journal.new.iter().all(|file| self.is_placed(file, journal).unwrap_or(false))
    }

    /// Moves whatever has not moved yet.
    fn carry_on(&self, journal: &Journal, sync: bool) -> Result<()> {
        for name in &journal.older {
            if !exists(&self.older.join(name))? && exists(&self.output.join(name))? {
                self.retire(name)?;
            }
        }
        for file in &journal.new {
            if exists(&self.model.join(&file.name))? {
                self.place(&file.name)?;
            }
        }
        if sync {
            sync_directories(self.output, journal);
        }
        remove(&self.journal)?;
        if sync && let Some(directory) = self.journal.parent() {
            // Before anything is deleted that the journal tells of.
            sync_directory(directory);
        }
        // Folders of the older model in which nothing is left.
        remove_empty_folders(self.output, journal.older.iter().map(String::as_str));
        Ok(())
    }
}

/// Carries a commit out. Returns what is to be known of the output beside the new model.
pub fn commit(staging: &mut Staging) -> Result<Vec<String>> {
    let (output, directory) = (staging.output.clone(), staging.directory.clone());
    let layout = Layout::new(&output, &directory, &staging.model);
    let new = check_written(staging, &layout)?;
    staging.kept = true;
    let keep = |message: String| {
        // Under a name that the next merge does not clear away.
        let kept = directory.join(staging.model.replacen(MODEL, KEPT, 1));
        let kept = if fs::rename(&layout.model, &kept).is_ok() { &kept } else { &layout.model };
        let place = kept.display();
        broken(
            &output,
            format!(
                "{message}; the finished model lies in {place} until a merge into this directory \
                 succeeds"
            ),
        )
    };
    // Looked at again: what has come since the merge began is nobody's to replace, but for reports,
    // which may be written anew beside a model at any time.
    let occupancy = place::Occupancy::find(&output, &staging.names, &staging.inputs)
        .map_err(|error| keep(format!("cannot be replaced any more: {error}")))?;
    let has_come =
        |name: &&String| !staging.occupancy.older.contains(name) && !file_names::is_report(name);
    if let Some(name) = occupancy.older.iter().find(has_come) {
        return Err(keep(format!("{name} has come into it while the model was written")));
    }
    // What stays is of both models, and moves in no case.
    let older = occupancy.older.into_iter().filter(|name| !staging.keeps(name)).collect();
    let (new, older) = in_order(new, older);
    let journal = Journal { schema: SCHEMA, model: staging.model.clone(), new, older };
    let unmoved =
        |error| keep(format!("the model could not be moved into it, which is as it was: {error}"));
    write_journal(&layout, &directory, &journal, staging.sync).map_err(unmoved)?;
    let moved = layout.carry_on(&journal, staging.sync);
    // Where only the journal could not be removed, it says itself that all is done, and what is
    // left is removed with the staging directory or reported with it.
    if let Err(error) = moved
        && !layout.is_done(&journal)
    {
        return Err(match layout.take_back(&journal) {
            Ok(()) => unmoved(error),
            Err(second) => broken(
                &output,
                format!(
                    "the model could not be moved into it ({error}), nor back ({second}); the \
                     older model's files lie in it and in {}, the new one's in it and in {}: mend \
                     the cause, and `lorafast recover` finishes the one or the other",
                    layout.older.display(),
                    layout.model.display()
                ),
            ),
        });
    }
    let stays = |name: &String| {
        let path = output.join(name);
        format!("{}: stays there with weights that are no part of the model", path.display())
    };
    Ok(occupancy.bystanders.iter().map(stays).collect())
}

/// The new files in the order in which they come, and the older ones in that in which they leave: the
/// config, without which nothing is a model (of a pipeline the list of its components, and then their
/// configs), leaves first and comes last, and the index is next to it.
fn in_order(mut new: Vec<NewFile>, mut older: Vec<String>) -> (Vec<NewFile>, Vec<String>) {
    let rank = |name: &str| match name {
        "config.json" | "model_index.json" => 3,
        name if file_names::last_part(name) == "config.json" => 2,
        name => u8::from(is_index(name)),
    };
    new.sort_by(|left, right| {
        (rank(&left.name), &left.name).cmp(&(rank(&right.name), &right.name))
    });
    older.sort_by_key(|name| std::cmp::Reverse(rank(name)));
    (new, older)
}

/// The error for a merge whose files somebody took away.
pub fn lost(output: &Path, what: String) -> Error {
    let message =
        "while the merge was written, and nothing in the output was changed; start it again";
    broken(output, format!("{what} {message}"))
}

/// Holds what lies in the staging directory against what was written: a cleaner of temporary files,
/// or a merge that took the same place, may have been there. The files are open still, so what has
/// their identity is theirs.
fn check_written(staging: &Staging, layout: &Layout<'_>) -> Result<Vec<NewFile>> {
    let lost = |what| lost(layout.output, what);
    if staging.lock.as_ref().is_none_or(|lock| !lock.is_held()) {
        return Err(lost(format!("something removed the lock in {}", staging.directory.display())));
    }
    let mut new = Vec::new();
    for written in &staging.written {
        let path = layout.model.join(&written.name);
        let found = fs::symlink_metadata(&path).ok();
        let is_it = |metadata: &&fs::Metadata| {
            metadata.is_file()
                && local::identity(metadata) == written.identity
                && metadata.len() == written.bytes
        };
        let Some(metadata) = found.as_ref().filter(is_it) else {
            let how = if found.is_some() { "changed" } else { "removed" };
            return Err(lost(format!("something {how} {}", path.display())));
        };
        new.push(NewFile::of(&written.name, metadata));
    }
    for kept in &staging.kept_files {
        let path = layout.output.join(&kept.name);
        if FileMark::of_file(&path) != Some(kept.mark) {
            return Err(lost(format!("something changed {}", path.display())));
        }
    }
    Ok(new)
}

/// Writes the journal, after which a commit can be carried on by whoever finds it.
fn write_journal(
    layout: &Layout<'_>,
    directory: &Path,
    journal: &Journal,
    sync: bool,
) -> Result<()> {
    fs::create_dir(&layout.older).map_err(|error| Error::io(&layout.older, error))?;
    let path = directory.join(DRAFT);
    let failed = |error| Error::io(&path, error);
    let mut draft = File::options().write(true).create_new(true).open(&path).map_err(failed)?;
    let content = serde_json::to_vec(journal).expect("names and numbers serialise");
    draft.write_all(&content).map_err(failed)?;
    if sync {
        draft.sync_all().map_err(failed)?;
        // What is renamed must be found under its name after a loss of power.
        sync_directories(&layout.model, journal);
    }
    drop(draft);
    shift(&path, &layout.journal)?;
    if sync {
        sync_directory(directory);
    }
    Ok(())
}

fn read_journal(directory: &Path) -> Result<Option<Journal>> {
    let path = directory.join(JOURNAL);
    if !exists(&path)? {
        return Ok(None);
    }
    let (mut file, _) = local::open(&path)?;
    let content = local::read_whole(&mut file).map_err(|error| Error::io(&path, error))?;
    let journal: Journal = serde_json::from_slice(&content).map_err(|error| {
        broken(
            &path,
            format!(
                "is no journal of a commit ({error}), so nobody knows how far it came: the older \
                 model's files lie beside it in {OLDER} and in the output, the new one's in \
                 {MODEL}… and in the output; put them in place, and remove the directory"
            ),
        )
    })?;
    if journal.schema != SCHEMA {
        return Err(broken(&path, "is of another version of lorafast; recover it with that"));
    }
    let names = journal.new.iter().map(|file| &file.name).chain(&journal.older);
    let output = directory.parent().unwrap_or(directory);
    let is_inside = |name: &&String| stays_inside(output, name);
    let is_number = |text: &str| text.bytes().all(|byte| byte.is_ascii_digit());
    let wrong = names.clone().find(|name| !is_inside(name));
    let model =
        Some(&journal.model).filter(|model| !model.strip_prefix(MODEL).is_some_and(is_number));
    match wrong.or(model) {
        Some(name) => Err(broken(&path, format!("names {name:?}, which leaves its directory"))),
        None => Ok(Some(journal)),
    }
}

/// Whether a commit was cut off in an output.
///
/// # Errors
/// [`Error::Io`] if it cannot be looked at.
fn is_cut_off(output: &Path) -> Result<bool> {
    let directory = output.join(DIRECTORY);
    match fs::symlink_metadata(&directory) {
        Ok(metadata) if metadata.is_dir() => exists(&directory.join(JOURNAL)),
        _ => Ok(false),
    }
}

/// Refuses a model in the middle of a commit, which may be one that was cut off.
///
/// # Errors
/// [`Error::Checkpoint`].
pub fn check_whole(root: &Path) -> Result<()> {
    if !is_cut_off(root)? {
        return Ok(());
    }
    let directory = root.join(DIRECTORY);
    // Another process may remove the journal at this moment.
    if let Ok(Some(journal)) = read_journal(&directory)
        && Layout::new(root, &directory, &journal.model).is_done(&journal)
    {
        return Ok(());
    }
    if !is_cut_off(root)? {
        return Ok(());
    }
    Err(Error::checkpoint(
        root,
        "is in the middle of being replaced by a merge; wait for it, or if it was cut off, finish \
         it with: lorafast recover",
    ))
}

/// Before a merge begins: finishes a commit that was cut off. One that was cut off where no model had
/// been, and is not all in its place, is taken back, so that the merge can be run again as it was.
/// Returns whether a model was finished.
pub fn take_back_or_finish(output: &Path, directory: &Path) -> Result<bool> {
    let Some(journal) = read_journal(directory)? else { return Ok(false) };
    let layout = Layout::new(output, directory, &journal.model);
    let is_wanted = !journal.older.is_empty() || layout.is_done(&journal);
    if is_wanted && layout.is_whole(&journal)? {
        layout.carry_on(&journal, true)?;
        return Ok(true);
    }
    layout.take_back(&journal)?;
    Ok(false)
}

/// Finishes or takes back what a merge that was cut off left in an output, and removes the rest of
/// it.
///
/// # Errors
/// [`Error::Output`] if a merge is at work there, [`Error::Io`].
pub fn recover(output: &Path) -> Result<Recovery> {
    let directory = output.join(DIRECTORY);
    match fs::symlink_metadata(&directory) {
        Err(error) if error.kind() == io::ErrorKind::NotFound => {
            // The directory itself has to be one.
            fs::metadata(output).map_err(|error| Error::io(output, error))?;
            return Ok(Recovery::Nothing);
        }
        Err(error) => return Err(Error::io(&directory, error)),
        Ok(_) => {}
    }
    let lock = Lock::take(output, &directory)?;
    let recovery = match read_journal(&directory)? {
        None if exists(&directory.join(COMMITTED))? => Recovery::Finished,
        None => Recovery::Cleared,
        Some(journal) => {
            let layout = Layout::new(output, &directory, &journal.model);
            if layout.is_whole(&journal)? {
                layout.carry_on(&journal, true)?;
                Recovery::Finished
            } else {
                layout.take_back(&journal)?;
                Recovery::TakenBack
            }
        }
    };
    lock.remove(&directory, Kept::Stays).map_err(|error| Error::io(&directory, error))?;
    let is_kept = recovery == Recovery::Cleared && exists(&directory)?;
    Ok(if is_kept { Recovery::Kept } else { recovery })
}

/// Removes the folders of files that are there no more, as far as they are empty.
fn remove_empty_folders<'a>(output: &Path, names: impl DoubleEndedIterator<Item = &'a str>) {
    for name in names.rev() {
        let parents = Path::new(name).ancestors().skip(1);
        for parent in parents.take_while(|parent| !parent.as_os_str().is_empty()) {
            if fs::remove_dir(output.join(parent)).is_err() {
                break;
            }
        }
    }
}

/// Makes the renames of new files below a directory durable.
fn sync_directories(root: &Path, journal: &Journal) {
    let root = place::resolve(root);
    let folders =
        journal.new.iter().filter_map(|file| root.join(&file.name).parent().map(Path::to_path_buf));
    let above = root.parent().map(Path::to_path_buf);
    let directories: BTreeSet<_> = folders.chain(above).chain([root.clone()]).collect();
    directories.iter().for_each(|directory| sync_directory(directory));
}

/// Carries out that many steps of a commit and no more, as if the process had been killed then.
/// Whether it was all.
#[cfg(test)]
pub fn cut_off(staging: &mut Staging, steps: usize) -> bool {
    let (output, directory) = (staging.output.clone(), staging.directory.clone());
    let layout = Layout::new(&output, &directory, &staging.model);
    let mut older = place::Occupancy::find(&output, &staging.names, &[]).expect("found").older;
    older.retain(|name| !staging.keeps(name));
    let new = check_written(staging, &layout).expect("all there");
    let (new, older) = in_order(new, older);
    let journal = Journal { schema: SCHEMA, model: staging.model.clone(), new, older };
    if steps == 0 {
        return false;
    }
    write_journal(&layout, &directory, &journal, false).expect("written");
    let moves = journal.older.iter().map(|name| (true, name));
    let moves = moves.chain(journal.new.iter().map(|file| (false, &file.name)));
    let all = journal.older.len() + journal.new.len();
    for (is_older, name) in moves.take(steps - 1) {
        if is_older { layout.retire(name) } else { layout.place(name) }.expect("moved");
    }
    steps > all
}
