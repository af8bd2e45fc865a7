//! Sinks and destinations: where bytes are written at positions, and where a model is made of them.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::fs::{self, Metadata};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use serde::{Deserialize, Serialize};

use super::local::{self, CopyError, File, Stamp};
use super::source::Source;
use super::store::Store;
use crate::error::Result;

/// A file under construction, to which several threads write at positions.
pub trait Sink: Debug + Send + Sync {
    /// Writes all of `bytes` at that offset.
    ///
    /// # Errors
    /// Those of the operating system.
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()>;

    /// Takes a range of a source over: through `buffer`, where both sides know no shorter way.
    ///
    /// # Errors
    /// Those of the operating system, with the side at fault.
    fn take_range(
        &self,
        source: &dyn Source,
        range: Range<u64>,
        offset: u64,
        buffer: &mut [u8],
    ) -> std::result::Result<(), CopyError>;

    /// Whether all of it is where it belongs since an earlier merge of the same: nothing has to be written,
    /// and what is written is dropped.
    fn is_written(&self) -> bool {
        false
    }

    /// Begins to bring a range that is written to where it lasts, without waiting. Only a hint.
    fn begin_writing(&self, _range: Range<u64>) {}

    /// Waits until everything that was written lasts.
    ///
    /// # Errors
    /// Those of the operating system.
    fn sync(&self) -> io::Result<()>;
}

impl Sink for File {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        local::write_at(self, bytes, offset)
    }

    fn take_range(
        &self,
        source: &dyn Source,
        range: Range<u64>,
        offset: u64,
        buffer: &mut [u8],
    ) -> std::result::Result<(), CopyError> {
        match source.as_file() {
            Some(file) => local::copy_range(file, range, self, offset, buffer),
            None => take_through_buffer(self, source, range, offset, buffer),
        }
    }

    fn begin_writing(&self, range: Range<u64>) {
        local::begin_writing(self, range);
    }

    fn sync(&self) -> io::Result<()> {
        self.sync_all()
    }
}

/// In the place of a file that is there already, and is not written to.
#[derive(Debug)]
pub struct KeptFile;

impl Sink for KeptFile {
    fn write_at(&self, _bytes: &[u8], _offset: u64) -> io::Result<()> {
        Err(io::ErrorKind::PermissionDenied.into())
    }

    fn take_range(
        &self,
        _source: &dyn Source,
        _range: Range<u64>,
        _offset: u64,
        _buffer: &mut [u8],
    ) -> std::result::Result<(), CopyError> {
        Err(CopyError::Write(io::ErrorKind::PermissionDenied.into()))
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

/// [`Sink::take_range`] for two sides that have no other way.
///
/// # Errors
/// Those of the operating system, with the side at fault.
pub fn take_through_buffer(
    sink: &dyn Sink,
    source: &dyn Source,
    range: Range<u64>,
    mut offset: u64,
    buffer: &mut [u8],
) -> std::result::Result<(), CopyError> {
    let step = buffer.len();
    for start in range.clone().step_by(step) {
        let part = &mut buffer[..step.min((range.end - start) as usize)];
        source.read_at(part, start).map_err(CopyError::Read)?;
        sink.write_at(part, offset).map_err(CopyError::Write)?;
        offset += part.len() as u64;
    }
    Ok(())
}

/// What a file is: one that is written to, or exchanged for another, is another then. The time of its
/// last change of any kind is among it, which no program can set back.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct FileMark {
    /// Its length.
    pub bytes: u64,
    /// Its inode.
    pub inode: u64,
    /// Nanoseconds from 1970 to the last change of its content.
    pub modified: u64,
    /// Nanoseconds from 1970 to the last change of any kind, where the system knows that.
    pub changed: u64,
}

impl FileMark {
    /// Of a file with this metadata.
    pub fn of(metadata: &Metadata) -> Self {
        Self { changed: changed(metadata), ..Self::of_stamp(&Stamp::of(metadata)) }
    }

    /// Of the plain file that has this path itself; `None` where there is none.
    pub fn of_file(path: &Path) -> Option<Self> {
        let found = fs::symlink_metadata(path).ok().filter(Metadata::is_file)?;
        Some(Self::of(&found))
    }

    /// Of a source, as far as its stamp tells it where it is no file.
    pub fn of_source(source: &dyn Source) -> Self {
        let found = source.as_file().and_then(|file| file.metadata().ok());
        found.map_or_else(|| Self::of_stamp(&source.stamp()), |found| Self::of(&found))
    }

    /// As far as a stamp tells it.
    pub fn of_stamp(stamp: &Stamp) -> Self {
        let Stamp { length, modified, identity: (_, inode) } = *stamp;
        Self { bytes: length, inode, modified: modified as u64, changed: 0 }
    }
}

#[cfg(unix)]
fn changed(metadata: &Metadata) -> u64 {
    use std::os::unix::fs::MetadataExt;
    (metadata.ctime() as u64).wrapping_mul(1_000_000_000).wrapping_add(metadata.ctime_nsec() as u64)
}

#[cfg(not(unix))]
fn changed(_metadata: &Metadata) -> u64 {
    0
}

/// What a destination is asked for.
#[derive(Debug, Default)]
pub struct Request {
    /// Whether a model that is there may be replaced.
    pub overwrite: bool,
    /// Whether what is committed has to last, whatever happens to the machine.
    pub sync: bool,
    /// Bytes of everything that will be written.
    pub bytes: u64,
    /// The names of everything that will be written, but for the manifest.
    pub names: Vec<String>,
    /// What is read meanwhile and must not be written over.
    pub inputs: Vec<Input>,
    /// The stores other than directories that are read meanwhile.
    pub stores: Vec<PathBuf>,
    /// What tells the same merge of the same inputs from all others, where [`Destination::resumes`].
    pub job: String,
    /// Raised when the caller wants to stop.
    pub stop: Arc<AtomicBool>,
}

/// A file or a directory that a merge reads.
#[derive(Debug, Clone)]
pub struct Input {
    /// Where it lies.
    pub path: PathBuf,
    /// What it is, for messages: "the base".
    pub what: String,
    /// Whether the output may not lie below it either.
    pub is_base: bool,
}

/// A place in which models are made.
pub trait Destination: Debug {
    /// What messages call it.
    fn root(&self) -> &Path;

    /// Whether what an unfinished merge left there is completed by the same merge.
    fn resumes(&self) -> bool {
        false
    }

    /// Checks the place and takes possession of it.
    ///
    /// # Errors
    /// [`crate::Error::Output`] or [`crate::Error::Io`], with everything there left as it was.
    fn begin(&self, request: Request) -> Result<Box<dyn StagedModel>>;
}

/// A model in the making. Dropped before it is committed, it leaves its destination as it was.
pub trait StagedModel: Debug + Send + Sync {
    /// Makes a file of that many bytes, to be written at positions, with the permissions of the one
    /// that it is made from.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    fn create(
        &mut self,
        name: &str,
        bytes: u64,
        like: Option<&dyn Source>,
    ) -> Result<Box<dyn Sink>>;

    /// Writes a small file.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    fn put(&mut self, name: &str, content: &[u8], like: Option<&dyn Source>) -> Result<()>;

    /// Copies all of a source, which may be a large one and which messages call `path`, with its
    /// permissions.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; that the source changed.
    fn copy(&mut self, name: &str, source: &dyn Source, path: &Path) -> Result<()>;

    /// What was written so far, as files of a store: a model, once everything is.
    fn staged(&self) -> Arc<dyn Store>;

    /// Takes everything back, so that no later merge goes on from it.
    fn discard(self: Box<Self>) {
        drop(self);
    }

    /// Takes files of the older model over into the new one, as they lie there and without a copy, if
    /// all of them are what they were. Returns whether they are.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    fn keep(&mut self, _files: &[(&str, FileMark)]) -> Result<bool> {
        Ok(false)
    }

    /// Takes a whole file as it is, under one more name, where the file system can; says whether it did.
    ///
    /// # Errors
    /// [`crate::Error::Io`]; that the file is not the one that the source was opened from.
    fn adopt(&mut self, _name: &str, _source: &dyn Source, _path: &Path) -> Result<bool> {
        Ok(false)
    }

    /// Makes what was written the destination's model.
    ///
    /// # Errors
    /// [`crate::Error::Output`], [`crate::Error::Io`]; an older model is then where it was.
    fn commit(self: Box<Self>) -> Result<Committed>;
}

/// A model in its place.
#[derive(Debug, Default)]
pub struct Committed {
    /// What the shards are there, by their names, where they are no files with a path of their own.
    pub marks: BTreeMap<String, FileMark>,
    /// What went wrong once it was there.
    pub warnings: Vec<String>,
    /// What keeps other merges out still.
    pub lock: OutputLock,
}

/// What keeps other merges out of a destination after the commit, until what is written about the
/// model lies beside it. Dropped, it is released.
#[derive(Default)]
pub struct OutputLock(Option<Box<dyn FnOnce() -> Option<String> + Send + Sync>>);

impl OutputLock {
    /// One that is released so; what goes wrong then is returned in words.
    pub fn new(release: impl FnOnce() -> Option<String> + Send + Sync + 'static) -> Self {
        Self(Some(Box::new(release)))
    }

    /// Lets other merges in. Returns what went wrong.
    pub fn release(mut self) -> Option<String> {
        self.0.take().and_then(|release| release())
    }
}

impl Drop for OutputLock {
    fn drop(&mut self) {
        if let Some(release) = self.0.take() {
            release();
        }
    }
}

impl Debug for OutputLock {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("OutputLock").finish_non_exhaustive()
    }
}
