//! A file for what is made before its place is known.

use std::fs::File;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU64, Ordering};

use super::local;
use crate::error::{Error, Result};

/// A file to which several threads add bytes, in any order. It is removed with this value.
#[derive(Debug)]
pub struct ScratchFile {
    path: PathBuf,
    file: File,
    end: AtomicU64,
}

impl ScratchFile {
    /// An empty one of that name.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be made.
    pub fn create(path: PathBuf) -> Result<Self> {
        let file = local::create(&path)?;
        Ok(Self { path, file, end: AtomicU64::new(0) })
    }

    /// Where it lies.
    pub fn path(&self) -> &Path {
        &self.path
    }

    /// Adds runs of bytes one after the other, and tells where the first begins.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn append(&self, runs: &[&[u8]]) -> Result<u64> {
        let length: usize = runs.iter().map(|run| run.len()).sum();
        let start = self.reserve(length as u64);
        let mut offset = start;
        for run in runs {
            self.write(run, offset)?;
            offset += run.len() as u64;
        }
        Ok(start)
    }

    /// Room for so many bytes, which are written later: where it begins.
    pub fn reserve(&self, length: u64) -> u64 {
        self.end.fetch_add(length, Ordering::Relaxed)
    }

    /// Writes bytes into room that was reserved.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write(&self, bytes: &[u8], offset: u64) -> Result<()> {
        local::write_at(&self.file, bytes, offset).map_err(|error| Error::io(&self.path, error))
    }

    /// Some of the bytes that were added.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read(&self, start: u64, length: usize) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length];
        local::read_at(&self.file, &mut bytes, start)
            .map_err(|error| Error::io(&self.path, error))?;
        Ok(bytes)
    }
}

impl Drop for ScratchFile {
    fn drop(&mut self) {
        local::remove(&self.path);
    }
}
