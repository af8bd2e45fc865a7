//! Stores: files under names, wherever they lie.

use std::fmt::Debug;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use super::local::Stamp;
use super::source::Source;
use crate::error::Result;

/// Files under names, which can be listed, looked at and opened.
pub trait Store: Debug + Send + Sync {
    /// What messages call it.
    fn root(&self) -> &Path;

    /// The directory of the file system that it is, if it is one: there, files can be links and lie
    /// in folders.
    fn as_directory(&self) -> Option<&Path> {
        None
    }

    /// What messages call an entry of that name.
    fn path(&self, name: &str) -> PathBuf {
        self.root().join(name)
    }

    /// The names of all entries, in no order.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if they cannot be listed.
    fn list(&self) -> Result<Vec<String>>;

    /// The names of what lies in a folder; none, where there is no such folder.
    ///
    /// # Errors
    /// [`crate::Error::Io`] if they cannot be listed.
    fn list_in(&self, folder: &str) -> Result<Vec<String>> {
        let within = |name: String| {
            let rest = name.strip_prefix(folder)?.strip_prefix('/')?;
            Some(rest.split('/').next().unwrap_or(rest).to_owned())
        };
        let mut names: Vec<_> = self.list()?.into_iter().filter_map(within).collect();
        names.sort();
        names.dedup();
        Ok(names)
    }

    /// Whether there is an entry of that name. Only "not found" is absence.
    ///
    /// # Errors
    /// [`crate::Error::Io`], or [`crate::Error::Checkpoint`] for a link that leads nowhere.
    fn has(&self, name: &str) -> Result<bool>;

    /// Whether an entry is a plain file; what cannot be looked at is none.
    fn is_file(&self, name: &str) -> bool;

    /// What an entry is now.
    ///
    /// # Errors
    /// [`crate::Error::Io`], or [`crate::Error::Checkpoint`] for a link that leads nowhere.
    fn stamp(&self, name: &str) -> Result<Stamp>;

    /// All of a small file, and what it was when it was opened.
    ///
    /// # Errors
    /// [`crate::Error::Io`], or [`crate::Error::Checkpoint`] for what is no plain file.
    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)>;

    /// A file, opened for reads at positions.
    ///
    /// # Errors
    /// As [`Store::read_small`].
    fn open(&self, name: &str) -> Result<Box<dyn Source>>;

    /// Says that these files will be looked at and opened, so that a store that is far away can be asked for
    /// all of them at once. What is wrong with one is told when it is opened.
    fn will_open(&self, _names: &[String]) {}

    /// Ends what waits for an answer once `stop` is raised. Of no use for what lies here.
    fn follow(&self, _stop: &Arc<AtomicBool>) {}

    /// Refuses what is in the middle of being replaced by another model.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`].
    fn check_whole(&self) -> Result<()> {
        Ok(())
    }
}

/// A folder of a store, as a store of its own.
#[derive(Debug)]
pub struct Folder<'a> {
    store: &'a dyn Store,
    name: &'a str,
    root: PathBuf,
}

impl<'a> Folder<'a> {
    /// The folder of that name.
    pub fn new(store: &'a dyn Store, name: &'a str) -> Self {
        Self { store, name, root: store.path(name) }
    }

    fn within(&self, name: &str) -> String {
        format!("{}/{name}", self.name)
    }
}

impl Store for Folder<'_> {
    fn root(&self) -> &Path {
        &self.root
    }

    fn list(&self) -> Result<Vec<String>> {
        self.store.list_in(self.name)
    }

    fn has(&self, name: &str) -> Result<bool> {
        self.store.has(&self.within(name))
    }

    fn is_file(&self, name: &str) -> bool {
        self.store.is_file(&self.within(name))
    }

    fn stamp(&self, name: &str) -> Result<Stamp> {
        self.store.stamp(&self.within(name))
    }

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        self.store.read_small(&self.within(name))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.store.open(&self.within(name))
    }

    fn will_open(&self, names: &[String]) {
        let names: Vec<_> = names.iter().map(|name| self.within(name)).collect();
        self.store.will_open(&names);
    }
}
