//! Stores: where files lie, in a directory or in memory.

use std::collections::BTreeMap;
use std::fmt::Debug;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use super::local::{self, Stamp};
use super::source::{LocalFile, Memory, Source};
use crate::error::{Error, Result};

/// Files under names, which can be listed, looked at and opened.
pub trait Store: Debug + Send + Sync {
    /// What messages call an entry of that name.
    fn path(&self, name: &str) -> PathBuf;

    /// The names of all entries, in no order.
    ///
    /// # Errors
    /// [`Error::Io`] if they cannot be listed.
    fn list(&self) -> Result<Vec<String>>;

    /// Whether there is an entry of that name. Only "not found" is absence.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Checkpoint`] for a link that leads nowhere.
    fn has(&self, name: &str) -> Result<bool>;

    /// Whether an entry is a plain file; what cannot be looked at is none.
    fn is_file(&self, name: &str) -> bool;

    /// All of a small file, and what it was when it was opened.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Checkpoint`] for what is no plain file.
    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)>;

    /// A file, opened for reads at positions.
    ///
    /// # Errors
    /// As [`Store::read_small`].
    fn open(&self, name: &str) -> Result<Box<dyn Source>>;
}

/// A directory of the file system.
#[derive(Debug, Clone)]
pub struct LocalDirectory(pub PathBuf);

impl Store for LocalDirectory {
    fn path(&self, name: &str) -> PathBuf {
        self.0.join(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(local::paths_in(&self.0)?.into_iter().filter_map(name).collect())
    }

    fn has(&self, name: &str) -> Result<bool> {
        Ok(local::find(&self.path(name))?.is_some())
    }

    fn is_file(&self, name: &str) -> bool {
        local::metadata(&self.path(name)).is_ok_and(|metadata| metadata.is_file())
    }

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        local::read_small(&self.path(name))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        Ok(Box::new(LocalFile::open(&self.path(name))?))
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
    fn path(&self, name: &str) -> PathBuf {
        self.name.join(name)
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

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        let content = self.content(name)?;
        let stamp = Stamp { length: content.len() as u64, modified: 0, identity: (0, 0) };
        Ok((content.to_vec(), stamp))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        let content = self.content(name)?;
        let length = content.len() as u64;
        Ok(Box::new(Memory::new(vec![(0, content.to_vec())], length)))
    }
}

/// The store in which a file lies, and the file's name in it.
pub fn of_file(path: &Path) -> (LocalDirectory, String) {
    let directory = match path.parent() {
        Some(parent) if !parent.as_os_str().is_empty() => parent.to_path_buf(),
        _ => PathBuf::from("."),
    };
    let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
    (LocalDirectory(directory), name)
}
