//! A directory for the parts of a long computation that are finished, so that another call can go on.

use std::fs::File;
use std::io::{Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};

use super::local;
use crate::error::{Error, Result};

/// What is finished, a line each in a log, and the bytes that belong to it. One process has it at a time.
#[derive(Debug)]
pub struct Resumable {
    path: PathBuf,
    data: File,
    log: File,
    length: u64,
}

impl Resumable {
    /// Opens a directory, which is made where it is not there, with the whole lines of a computation with
    /// this key; those of another are forgotten.
    ///
    /// # Errors
    /// [`Error::Output`] if another process has it; [`Error::Io`].
    pub fn open(path: PathBuf, key: &str) -> Result<(Self, Vec<Vec<u8>>)> {
        local::create_directories(&path)?;
        let failed = |error| Error::io(&path, error);
        let mut log = local::open_or_create(&path.join("finished.jsonl"))?;
        if log.try_lock().is_err() {
            return Err(Error::Output {
                path: path.clone(),
                message: "is in use by another process".to_owned(),
            });
        }
        let text = local::read_whole(&mut log).map_err(failed)?;
        let beginning = format!("{key}\n");
        let mut lines = text.split_inclusive(|byte| *byte == b'\n');
        let is_same = lines.next().is_some_and(|line| line == beginning.as_bytes());
        let found: Vec<Vec<u8>> = match is_same {
            true => lines.filter(|line| line.ends_with(b"\n")).map(<[u8]>::to_vec).collect(),
            false => Vec::new(),
        };
        let good = found.iter().map(Vec::len).sum::<usize>() + beginning.len();
        log.set_len(if is_same { good as u64 } else { 0 }).map_err(failed)?;
        log.seek(SeekFrom::End(0)).map_err(failed)?;
        if !is_same {
            log.write_all(beginning.as_bytes()).map_err(failed)?;
        }
        let data = local::open_or_create(&path.join("data"))?;
        let length = local::metadata_of(&data).map_err(failed)?.len();
        Ok((Self { path, data, log, length }, found))
    }

    /// The file of bytes.
    pub fn data_path(&self) -> PathBuf {
        self.path.join("data")
    }

    /// How many bytes there were when it was opened.
    pub fn length(&self) -> u64 {
        self.length
    }

    /// Writes bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn write_at(&self, bytes: &[u8], start: u64) -> Result<()> {
        local::write_at(&self.data, bytes, start).map_err(|error| Error::io(&self.path, error))
    }

    /// Reads bytes.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn read_at(&self, start: u64, length: u64) -> Result<Vec<u8>> {
        let mut bytes = vec![0; length as usize];
        local::read_at(&self.data, &mut bytes, start)
            .map_err(|error| Error::io(&self.path, error))?;
        Ok(bytes)
    }

    /// Adds a line, of which the bytes are written.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn finish(&mut self, mut line: Vec<u8>) -> Result<()> {
        line.push(b'\n');
        self.log.write_all(&line).map_err(|error| Error::io(&self.path, error))
    }

    /// The directory.
    pub fn path(&self) -> &Path {
        &self.path
    }
}
