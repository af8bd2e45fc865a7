//! Directories of the file system, as stores and as destinations.

use std::path::{Path, PathBuf};

use super::local::{self, Stamp};
use super::sink::{Destination, Request, StagedModel};
use super::source::{LocalFile, Source};
use super::staging::{self, Staging};
use super::store::Store;
use crate::error::{Error, Result};

/// A directory of the file system.
#[derive(Debug, Clone)]
pub struct LocalDirectory(pub PathBuf);

impl Store for LocalDirectory {
    fn root(&self) -> &Path {
        &self.0
    }

    fn as_directory(&self) -> Option<&Path> {
        Some(&self.0)
    }

    fn list(&self) -> Result<Vec<String>> {
        let name = |path: PathBuf| path.file_name().map(|name| name.to_string_lossy().into_owned());
        Ok(local::paths_in(&self.0)?.into_iter().filter_map(name).collect())
    }

    fn list_in(&self, folder: &str) -> Result<Vec<String>> {
        let path = self.path(folder);
        match local::find(&path)? {
            Some(metadata) if metadata.is_dir() => Self(path).list(),
            _ => Ok(Vec::new()),
        }
    }

    fn has(&self, name: &str) -> Result<bool> {
        Ok(local::find(&self.path(name))?.is_some())
    }

    fn is_file(&self, name: &str) -> bool {
        local::metadata(&self.path(name)).is_ok_and(|metadata| metadata.is_file())
    }

    fn stamp(&self, name: &str) -> Result<Stamp> {
        let path = self.path(name);
        let found = local::find(&path)?;
        let metadata = found.ok_or_else(|| Error::io(&path, local::absence_of(&path)))?;
        Ok(Stamp::of(&metadata))
    }

    fn read_small(&self, name: &str) -> Result<(Vec<u8>, Stamp)> {
        local::read_small(&self.path(name))
    }

    fn open(&self, name: &str) -> Result<Box<dyn Source>> {
        Ok(Box::new(LocalFile::open(&self.path(name))?))
    }

    fn check_whole(&self) -> Result<()> {
        staging::check_whole(&self.0)
    }
}

impl Destination for LocalDirectory {
    fn root(&self) -> &Path {
        &self.0
    }

    fn begin(&self, request: Request) -> Result<Box<dyn StagedModel>> {
        Ok(Box::new(Staging::create(&self.0, request)?))
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
