//! What is staged, with what stays of the older model, as the files of one store.

use std::path::{Path, PathBuf};

use crate::error::Result;
use crate::storage::directory::LocalDirectory;
use crate::storage::local::Stamp;
use crate::storage::source::Source;
use crate::storage::store::Store;

/// A model in the making of which some files lie in its output already.
#[derive(Debug)]
pub(super) struct StagedFiles {
    pub made: LocalDirectory,
    pub output: LocalDirectory,
    /// The names of the files that stay where they are.
    pub kept: Vec<String>,
}

impl StagedFiles {
    fn of(&self, name: &str) -> &LocalDirectory {
        if self.kept.iter().any(|kept| kept == name) { &self.output } else { &self.made }
    }
}

impl Store for StagedFiles {
    fn root(&self) -> &Path {
        Store::root(&self.made)
    }

    fn path(&self, name: &str) -> PathBuf {
        self.of(name).path(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        let mut names = self.made.list()?;
        names.extend(self.kept.iter().filter(|name| !name.contains('/')).cloned());
        Ok(names)
    }

    fn list_in(&self, folder: &str) -> Result<Vec<String>> {
        let within = |name: &String| {
            let rest = name.strip_prefix(folder)?.strip_prefix('/')?;
            Some(rest.split('/').next().unwrap_or(rest).to_owned())
        };
        let mut names = self.made.list_in(folder)?;
        names.extend(self.kept.iter().filter_map(within));
        names.sort();
        names.dedup();
        Ok(names)
    }

    fn has(&self, name: &str) -> Result<bool> {
        self.of(name).has(name)
    }

    fn is_file(&self, name: &str) -> bool {
        self.of(name).is_file(name)
    }

    fn stamp(&self, name: &str) -> Result<Stamp> {
        self.of(name).stamp(name)
    }

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        self.of(name).read_small(name)
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.of(name).open(name)
    }
}
