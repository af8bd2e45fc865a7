//! A model that is not committed yet, as a store: shards that lie in place, and what is still in memory.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;
use std::sync::Arc;
use std::sync::atomic::AtomicBool;

use lorafast::Result;
use lorafast::storage::local::Stamp;
use lorafast::storage::memory::InMemory;
use lorafast::storage::source::Source;
use lorafast::storage::store::Store;

use crate::connection::Connection;
use crate::store::{ObjectStoreFiles, Use};

/// The files of one merge, and no others that lie beside them.
#[derive(Debug)]
pub(crate) struct Staged {
    below: ObjectStoreFiles,
    names: BTreeSet<String>,
    /// What will be written last.
    last: InMemory,
}

impl Staged {
    pub fn new(
        connection: Arc<Connection>,
        names: BTreeSet<String>,
        last: Vec<(String, Vec<u8>)>,
    ) -> Self {
        let below = ObjectStoreFiles::new(connection, Use::Checkpoint);
        let files: BTreeMap<_, _> =
            last.into_iter().map(|(name, content)| (name, Arc::new(content))).collect();
        let last = InMemory { name: below.root().to_path_buf(), files };
        Self { below, names, last }
    }

    /// What holds a file.
    fn of(&self, name: &str) -> &dyn Store {
        if self.last.files.contains_key(name) { &self.last } else { &self.below }
    }

    fn all(&self) -> impl Iterator<Item = &String> {
        self.names.iter().chain(self.last.files.keys())
    }
}

impl Store for Staged {
    fn root(&self) -> &Path {
        self.below.root()
    }

    fn path(&self, name: &str) -> std::path::PathBuf {
        self.below.path(name)
    }

    fn list(&self) -> Result<Vec<String>> {
        let tops: BTreeSet<_> =
            self.all().map(|name| name.split('/').next().unwrap_or(name).to_owned()).collect();
        Ok(tops.into_iter().collect())
    }

    fn list_in(&self, folder: &str) -> Result<Vec<String>> {
        let within = |name: &String| {
            let rest = name.strip_prefix(folder)?.strip_prefix('/')?;
            Some(rest.split('/').next().unwrap_or(rest).to_owned())
        };
        let names: BTreeSet<_> = self.all().filter_map(within).collect();
        Ok(names.into_iter().collect())
    }

    fn has(&self, name: &str) -> Result<bool> {
        let below = format!("{name}/");
        Ok(self.is_file(name) || self.all().any(|other| other.starts_with(&below)))
    }

    fn is_file(&self, name: &str) -> bool {
        self.all().any(|other| other == name)
    }

    fn stamp(&self, name: &str) -> Result<Stamp> {
        self.of(name).stamp(name)
    }

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        self.of(name).read_small(name)
    }

    fn follow(&self, stop: &Arc<AtomicBool>) {
        self.below.follow(stop);
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        self.of(name).open(name)
    }
}
