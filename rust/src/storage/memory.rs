//! Memory as a source, as a store and as a destination: for what was unpickled, computed or handed over,
//! and for merges that touch no file.

use std::collections::BTreeMap;
use std::fmt::{self, Debug};
use std::io;
use std::mem;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, MutexGuard, OnceLock, PoisonError};

use super::local::{CopyError, Stamp};
use super::sink::{
    Committed, Destination, OutputLock, Request, Sink, StagedModel, take_through_buffer,
};
use super::source::{Source, leads_to};
use super::store::Store;
use crate::error::{Error, Owner, Result};

/// What reads bytes when somebody asks for them.
pub type Load = Arc<dyn Fn() -> Result<Vec<u8>> + Send + Sync>;

/// Bytes that are in memory, or will be once somebody asks for them.
#[derive(Clone)]
pub enum Bytes {
    /// These.
    Loaded(Vec<u8>),
    /// So many, which are read once.
    Deferred {
        /// Their number.
        length: u64,
        /// What reads them.
        load: Load,
        /// What was read.
        loaded: Arc<OnceLock<Vec<u8>>>,
    },
}

impl Bytes {
    /// Bytes that are read when somebody asks for them.
    pub fn deferred(length: u64, load: Load) -> Self {
        Self::Deferred { length, load, loaded: Arc::default() }
    }

    /// Their number.
    pub fn length(&self) -> u64 {
        match self {
            Self::Loaded(bytes) => bytes.len() as u64,
            Self::Deferred { length, .. } => *length,
        }
    }

    /// All of them.
    fn get(&self) -> io::Result<&[u8]> {
        match self {
            Self::Loaded(bytes) => Ok(bytes),
            Self::Deferred { length, load, loaded } => {
                if loaded.get().is_none() {
                    let bytes = load().map_err(io::Error::other)?;
                    if bytes.len() as u64 != *length {
                        return Err(io::ErrorKind::UnexpectedEof.into());
                    }
                    // Another thread may have been faster, with the same.
                    let _ = loaded.set(bytes);
                }
                Ok(loaded.get().expect("it has been set"))
            }
        }
    }
}

impl Debug for Bytes {
    fn fmt(&self, formatter: &mut fmt::Formatter<'_>) -> fmt::Result {
        formatter.debug_struct("Bytes").field("length", &self.length()).finish_non_exhaustive()
    }
}

/// Runs of bytes in memory: what was unpickled, computed or handed over. What lies between the
/// runs was not handed over, and reads as zeros.
#[derive(Debug)]
pub struct Memory {
    /// Where each run begins, ascending, and its bytes.
    runs: Vec<(u64, Bytes)>,
    length: u64,
    /// The file that they were made from, and what it was then.
    origin: Option<(PathBuf, Stamp)>,
}

impl Memory {
    /// Runs of bytes, each with where it begins, ascending and apart.
    pub fn new(runs: Vec<(u64, Bytes)>, length: u64) -> Self {
        Self { runs, length, origin: None }
    }

    /// The same of bytes that were made from a file that had that stamp.
    #[must_use]
    pub fn made_from(self, path: &Path, stamp: Stamp) -> Self {
        Self { origin: Some((path.to_path_buf(), stamp)), ..self }
    }
}

impl Source for Memory {
    fn stamp(&self) -> Stamp {
        let modified = self.origin.as_ref().map_or(0, |(_, stamp)| stamp.modified);
        let identity = self.origin.as_ref().map_or((0, 0), |(_, stamp)| stamp.identity);
        Stamp { length: self.length, modified, identity }
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        let end = offset.checked_add(buffer.len() as u64).filter(|end| *end <= self.length);
        let end = end.ok_or(io::ErrorKind::UnexpectedEof)?;
        let mut position = offset;
        let first = self.runs.partition_point(|(start, run)| start + run.length() <= offset);
        for (start, run) in self.runs[first..].iter().take_while(|(start, _)| *start < end) {
            let (from, to) = (position.max(*start), end.min(start + run.length()));
            buffer[(position - offset) as usize..(from - offset) as usize].fill(0);
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&run.get()?[(from - start) as usize..(to - start) as usize]);
            position = to;
        }
        buffer[(position - offset) as usize..].fill(0);
        Ok(())
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        self.origin.as_ref().map_or(Ok(true), |(path, stamp)| leads_to(path, *stamp))
    }

    fn origin(&self) -> Option<&Path> {
        self.origin.as_ref().map(|(path, _)| path.as_path())
    }
}

/// Files in memory.
#[derive(Debug, Clone)]
pub struct InMemory {
    /// What messages call the store.
    pub name: PathBuf,
    /// The content of each file.
    pub files: BTreeMap<String, Arc<Vec<u8>>>,
}

impl InMemory {
    fn content(&self, name: &str) -> Result<&Arc<Vec<u8>>> {
        let absent = || Error::io(self.path(name), io::ErrorKind::NotFound.into());
        self.files.get(name).ok_or_else(absent)
    }
}

impl Store for InMemory {
    fn root(&self) -> &Path {
        &self.name
    }

    fn list(&self) -> Result<Vec<String>> {
        Ok(self.files.keys().cloned().collect())
    }

    fn has(&self, name: &str) -> Result<bool> {
        Ok(self.files.contains_key(name))
    }

    fn is_file(&self, name: &str) -> bool {
        self.files.contains_key(name)
    }

    fn stamp(&self, name: &str) -> Result<Stamp> {
        let length = self.content(name)?.len() as u64;
        Ok(Stamp { length, modified: 0, identity: (0, 0) })
    }

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        Ok((self.content(name)?.to_vec(), self.stamp(name)?))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let content = self.content(name)?;
        let length = content.len() as u64;
        Ok(Box::new(Memory::new(vec![(0, Bytes::Loaded(content.to_vec()))], length)))
    }
}

/// A place in memory, which holds the files of one model.
#[derive(Debug, Clone)]
pub struct MemoryDestination {
    name: PathBuf,
    state: Arc<Mutex<State>>,
}

type Files = BTreeMap<String, Arc<Vec<u8>>>;

#[derive(Debug, Default)]
struct State {
    files: Files,
    /// Whether a model is being made there.
    is_taken: bool,
}

impl MemoryDestination {
    /// An empty one, which messages call so.
    pub fn new(name: impl Into<PathBuf>) -> Self {
        Self { name: name.into(), state: Arc::default() }
    }

    /// What it holds.
    pub fn store(&self) -> InMemory {
        InMemory { name: self.name.clone(), files: lock(&self.state).files.clone() }
    }
}

impl Destination for MemoryDestination {
    fn root(&self) -> &Path {
        &self.name
    }

    fn begin(&self, request: Request) -> Result<Box<dyn StagedModel>> {
        let mut state = lock(&self.state);
        if state.is_taken {
            return Err(Error::output(&self.name, "another merge is writing there at this moment"));
        }
        if !request.overwrite && !state.files.is_empty() {
            return Err(Error::output(&self.name, "holds a model; allow it to be overwritten"));
        }
        state.is_taken = true;
        let taken = Taken(self.state.clone());
        Ok(Box::new(StagedInMemory { taken, written: Vec::new() }))
    }
}

/// A model in the making in memory.
#[derive(Debug)]
struct StagedInMemory {
    taken: Taken,
    written: Vec<(String, MemorySink)>,
}

/// What keeps others out of a place in memory until it is dropped.
#[derive(Debug)]
struct Taken(Arc<Mutex<State>>);

impl Drop for Taken {
    fn drop(&mut self) {
        lock(&self.0).is_taken = false;
    }
}

/// A file under construction in memory.
#[derive(Debug, Clone)]
struct MemorySink(Arc<Mutex<Vec<u8>>>);

impl Sink for MemorySink {
    fn write_at(&self, bytes: &[u8], offset: u64) -> io::Result<()> {
        let mut content = lock(&self.0);
        let start = usize::try_from(offset).map_err(io::Error::other)?;
        let target = content.get_mut(start..start + bytes.len());
        target.ok_or(io::ErrorKind::UnexpectedEof)?.copy_from_slice(bytes);
        Ok(())
    }

    fn take_range(
        &self,
        source: &dyn Source,
        range: Range<u64>,
        offset: u64,
        buffer: &mut [u8],
    ) -> std::result::Result<(), CopyError> {
        take_through_buffer(self, source, range, offset, buffer)
    }

    fn sync(&self) -> io::Result<()> {
        Ok(())
    }
}

impl StagedModel for StagedInMemory {
    fn create(
        &mut self,
        name: &str,
        bytes: u64,
        _like: Option<&dyn Source>,
    ) -> Result<Box<dyn Sink>> {
        let sink = MemorySink(Arc::new(Mutex::new(vec![0; bytes as usize])));
        self.written.push((name.to_owned(), sink.clone()));
        Ok(Box::new(sink))
    }

    fn put(&mut self, name: &str, content: &[u8], like: Option<&dyn Source>) -> Result<()> {
        let sink = self.create(name, content.len() as u64, like)?;
        sink.write_at(content, 0).map_err(|error| Error::io(Path::new(name), error))
    }

    fn copy(&mut self, name: &str, source: &dyn Source, path: &Path) -> Result<()> {
        let mut content = vec![0; source.stamp().length as usize];
        let read = source.read_at(&mut content, 0);
        read.map_err(|error| Owner::Checkpoint.unread(path, error))?;
        self.written.push((name.to_owned(), MemorySink(Arc::new(Mutex::new(content)))));
        Ok(())
    }

    fn staged(&self) -> Arc<dyn Store> {
        let content =
            |(name, sink): &(String, MemorySink)| (name.clone(), Arc::new(lock(&sink.0).clone()));
        let files = self.written.iter().map(content).collect();
        Arc::new(InMemory { name: PathBuf::from("memory"), files })
    }

    fn commit(self: Box<Self>) -> Result<Committed> {
        let Self { taken, written } = *self;
        let whole = |(name, sink): (String, MemorySink)| {
            let content = mem::take(&mut *lock(&sink.0));
            (name, Arc::new(content))
        };
        lock(&taken.0).files = written.into_iter().map(whole).collect();
        let release = move || {
            drop(taken);
            None
        };
        Ok(Committed { lock: OutputLock::new(release), ..Committed::default() })
    }
}

fn lock<T>(shared: &Mutex<T>) -> MutexGuard<'_, T> {
    shared.lock().unwrap_or_else(PoisonError::into_inner)
}

#[cfg(test)]
mod tests {
    use std::fs;
    use std::sync::atomic::{AtomicUsize, Ordering};

    use super::*;

    #[test]
    fn runs_in_memory_read_as_one_and_zeros_between() {
        let memory = Memory::new(
            vec![
                (2, Bytes::Loaded(vec![1, 2, 3])),
                (5, Bytes::deferred(1, Arc::new(|| Ok(vec![4])))),
                (8, Bytes::Loaded(vec![5, 6])),
            ],
            12,
        );
        let whole = [0, 0, 1, 2, 3, 4, 0, 0, 5, 6, 0, 0];
        for start in 0..=whole.len() {
            for end in start..=whole.len() {
                let mut buffer = vec![9; end - start];
                memory.read_at(&mut buffer, start as u64).expect("within");
                assert_eq!(buffer, whole[start..end], "{start}..{end}");
            }
        }
        let beyond = memory.read_at(&mut [0; 2], 11).expect_err("beyond the end");
        assert_eq!(beyond.kind(), io::ErrorKind::UnexpectedEof);
        assert!(memory.is_unchanged().expect("it is in memory") && memory.origin().is_none());
    }

    #[test]
    fn deferred_bytes_are_read_once_when_asked_for_and_fail_in_their_own_words() {
        let count = Arc::new(AtomicUsize::new(0));
        let counted = count.clone();
        let load: Load = Arc::new(move || match counted.fetch_add(1, Ordering::Relaxed) {
            0 => Err(Error::Argument("not now".into())),
            _ => Ok(vec![7, 8]),
        });
        let memory = Memory::new(vec![(1, Bytes::deferred(2, load))], 3);
        let mut buffer = [9; 3];
        memory.read_at(&mut buffer[..1], 0).expect("none of them");
        assert_eq!(count.load(Ordering::Relaxed), 0);
        let failed = memory.read_at(&mut buffer, 0).expect_err("the first fails");
        let failed = Owner::Checkpoint.unread("x", failed);
        assert!(matches!(failed, Error::Argument(_)), "{failed}");
        memory.read_at(&mut buffer, 0).expect("the second does not");
        memory.read_at(&mut buffer, 0).expect("nor any more");
        assert_eq!((buffer, count.load(Ordering::Relaxed)), ([0, 7, 8], 2));
        let short = Memory::new(vec![(0, Bytes::deferred(2, Arc::new(|| Ok(vec![1]))))], 2);
        let short = short.read_at(&mut buffer[..2], 0).expect_err("too few");
        assert_eq!(short.kind(), io::ErrorKind::UnexpectedEof);
    }

    #[test]
    fn what_was_made_from_a_file_changes_with_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pickle");
        fs::write(&path, "one").expect("written");
        let stamp = Stamp::of(&fs::metadata(&path).expect("there"));
        let memory = Memory::new(vec![(0, Bytes::Loaded(vec![1]))], 1).made_from(&path, stamp);
        assert!(memory.is_unchanged().expect("there"));
        fs::write(&path, "three").expect("written");
        assert!(!memory.is_unchanged().expect("there"));
        fs::remove_file(&path).expect("removed");
        assert!(!memory.is_unchanged().expect("absence is no error"));
    }
}
