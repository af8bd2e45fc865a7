//! Sources: bytes that are read at positions, whether they lie in a file, in memory or elsewhere.

use std::fmt::Debug;
use std::fs::{self, File, Metadata};
use std::io;
use std::path::{Path, PathBuf};
use std::thread;
use std::time::Duration;

use super::local::{self, Stamp};
use crate::error::Result;

/// Bytes that can be read at any position, by several threads at once. What they were when the
/// source was opened is what they have to be until everything was read.
pub trait Source: Debug + Send + Sync {
    /// What the bytes were when the source was opened, their number among it.
    fn stamp(&self) -> Stamp;

    /// Fills `buffer` from that offset.
    ///
    /// # Errors
    /// Those of the operating system; `UnexpectedEof` if there are fewer bytes by now.
    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()>;

    /// Whether the bytes are still those that were opened, and are still what the source's name
    /// leads to.
    ///
    /// # Errors
    /// Those of the operating system.
    fn is_unchanged(&self) -> io::Result<bool>;

    /// The file that holds the bytes, where the kernel can copy from it.
    fn as_file(&self) -> Option<&File> {
        None
    }

    /// The file that the bytes were made from, where they are not a file's as they stand.
    fn origin(&self) -> Option<&Path> {
        None
    }
}

/// A plain file, held open.
#[derive(Debug)]
pub struct LocalFile {
    path: PathBuf,
    file: File,
    stamp: Stamp,
}

impl LocalFile {
    /// Opens a plain file, links followed. Waits for the end of the file system's tick if it was
    /// written to a moment ago, so that the next change will have another time.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if it cannot be opened, [`crate::Error::Checkpoint`] if it is something
    /// else.
    pub fn open(path: &Path) -> Result<Self> {
        let (file, metadata) = local::open(path)?;
        let metadata = settled(&file, metadata).map_err(|error| crate::Error::io(path, error))?;
        Ok(Self { path: path.to_path_buf(), file, stamp: Stamp::of(&metadata) })
    }
}

impl Source for LocalFile {
    fn stamp(&self) -> Stamp {
        self.stamp
    }

    fn read_at(&self, buffer: &mut [u8], offset: u64) -> io::Result<()> {
        local::read_at(&self.file, buffer, offset)
    }

    fn is_unchanged(&self) -> io::Result<bool> {
        if Stamp::of(&self.file.metadata()?) != self.stamp {
            return Ok(false);
        }
        leads_to(&self.path, self.stamp)
    }

    fn as_file(&self) -> Option<&File> {
        Some(&self.file)
    }
}

/// Runs of bytes in memory: what was unpickled, computed or handed over. What lies between the
/// runs was not handed over, and reads as zeros.
#[derive(Debug)]
pub struct Memory {
    /// Where each run begins, ascending, and its bytes.
    runs: Vec<(u64, Vec<u8>)>,
    length: u64,
    /// The file that they were made from, and what it was then.
    origin: Option<(PathBuf, Stamp)>,
}

impl Memory {
    /// Runs of bytes, each with where it begins, ascending and apart.
    pub fn new(runs: Vec<(u64, Vec<u8>)>, length: u64) -> Self {
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
        let first = self.runs.partition_point(|(start, run)| start + run.len() as u64 <= offset);
        for (start, run) in self.runs[first..].iter().take_while(|(start, _)| *start < end) {
            let (from, to) = (position.max(*start), end.min(start + run.len() as u64));
            buffer[(position - offset) as usize..(from - offset) as usize].fill(0);
            buffer[(from - offset) as usize..(to - offset) as usize]
                .copy_from_slice(&run[(from - start) as usize..(to - start) as usize]);
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

/// Whether a path leads to what has that stamp.
///
/// # Errors
/// Those of the operating system, but that nothing is there.
pub fn leads_to(path: &Path, stamp: Stamp) -> io::Result<bool> {
    match fs::metadata(path) {
        Ok(metadata) => Ok(Stamp::of(&metadata) == stamp),
        Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(false),
        Err(error) => Err(error),
    }
}

/// Longer than the steps in which file systems count time.
const TICK: Duration = Duration::from_millis(20);
/// How many steps to wait for a file that is being written.
const MAX_TICKS: usize = 5;

/// What is known of an open file once its time of change is so long ago that the next change will
/// have another one. A file that somebody goes on writing is taken as it is, and found changed later.
fn settled(file: &File, mut metadata: Metadata) -> io::Result<Metadata> {
    for _ in 0..MAX_TICKS {
        let age = metadata.modified().ok().and_then(|time| time.elapsed().ok());
        // A clock that runs differently tells nothing.
        let Some(rest) = age.and_then(|age| TICK.checked_sub(age)) else { break };
        thread::sleep(rest);
        metadata = file.metadata()?;
    }
    Ok(metadata)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn runs_in_memory_read_as_one_and_zeros_between() {
        let memory = Memory::new(vec![(2, vec![1, 2, 3]), (5, vec![4]), (8, vec![5, 6])], 12);
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
    fn what_was_made_from_a_file_changes_with_it() {
        let directory = tempfile::tempdir().expect("a directory");
        let path = directory.path().join("pickle");
        fs::write(&path, "one").expect("written");
        let stamp = Stamp::of(&fs::metadata(&path).expect("there"));
        let memory = Memory::new(vec![(0, vec![1])], 1).made_from(&path, stamp);
        assert!(memory.is_unchanged().expect("there"));
        fs::write(&path, "three").expect("written");
        assert!(!memory.is_unchanged().expect("there"));
        fs::remove_file(&path).expect("removed");
        assert!(!memory.is_unchanged().expect("absence is no error"));
    }
}
