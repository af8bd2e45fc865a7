//! Sources: bytes that are read at positions, whether they lie in a file, in memory or elsewhere.

use std::fmt::Debug;
use std::fs::{self, File, Metadata};
use std::io;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;
use std::thread;
use std::time::Duration;

use serde::Serialize;

use super::local::{self, Stamp};
use crate::error::Result;

/// What a store is asked for.
#[derive(Debug, Default, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Requests {
    /// How often.
    pub requests: u64,
    /// How many bytes in all.
    pub bytes: u64,
}

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

    /// Tells what will be read, about in this order, so that it can be brought here before; what waits for
    /// that ends once `stop` is raised. Only a hint, and of no use for what lies here.
    fn will_read(&self, _ranges: &[Range<u64>], _stop: &Arc<AtomicBool>) {}

    /// What reading all of these ranges asks of a store; nothing, where the bytes lie here.
    fn requests(&self, _ranges: &[Range<u64>]) -> Requests {
        Requests::default()
    }

    /// Whether the bytes lie on this machine, and the path that messages name is one of its file system.
    fn is_local(&self) -> bool {
        true
    }

    /// How many bytes are best read together where all of them go by, if fewer take as long.
    fn piece(&self) -> Option<u64> {
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
