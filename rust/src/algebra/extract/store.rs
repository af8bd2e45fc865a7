//! What is finished of an extraction, on disk beside the output, so that the same call goes on from there.

use std::path::{Path, PathBuf};
use std::sync::Arc;

use indexmap::IndexMap;
use serde::{Deserialize, Serialize};

use super::sketch::Spectrum;
use crate::error::{Error, Owner, Result};
use crate::storage::local;
use crate::storage::resumable::Resumable;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Header, Tensor, TensorFile, TensorInfo};

/// What became of one parameter.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Done {
    pub name: String,
    pub differs: bool,
    /// Of a layer that is updated.
    pub layer: Option<Layer>,
}

/// What is known of a layer's update.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub(super) struct Layer {
    pub spectrum: Spectrum,
    pub floor: f64,
    pub mean_floor: f64,
    /// Whether the rule asks for more than the largest rank.
    pub is_limited: bool,
    pub rank: usize,
    /// What rounding the factors took away.
    pub lost: f64,
    pub place: Place,
}

/// Where the factors lie, B before A.
#[derive(Debug, Clone, Copy, Default, Serialize, Deserialize)]
pub(super) struct Place {
    pub start: u64,
    pub b: u64,
    pub a: u64,
}

impl Place {
    fn end(self) -> u64 {
        self.start + self.b + self.a
    }
}

/// The directory of an extraction that is not finished.
#[derive(Debug)]
pub(super) struct Store {
    files: Resumable,
    end: u64,
    /// What is finished, by earlier calls, too.
    pub done: IndexMap<String, Done>,
    keeps: bool,
}

impl Store {
    /// Opens the directory beside an output, with what an earlier call with this key finished.
    ///
    /// # Errors
    /// [`crate::Error::Output`] if another process works on it; [`crate::Error::Io`].
    pub fn beside(output: &Path, key: &str) -> Result<Self> {
        let mut name = std::ffi::OsString::from(".");
        name.push(output.file_name().unwrap_or_default());
        name.push(".extract");
        Self::open(output.with_file_name(name), key)
    }

    /// Takes what is finished in other directories, which are removed. Those that a process still has are
    /// left alone.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn absorb(&mut self, directories: &[PathBuf], key: &str) -> Result<()> {
        for directory in directories.iter().filter(|path| local::is_directory(path)) {
            let other = match Self::open(directory.clone(), key) {
                Err(Error::Output { .. }) => continue,
                other => other?,
            };
            for mut one in other.done.values().cloned() {
                if self.done.contains_key(&one.name) {
                    continue;
                }
                if let Some(layer) = &mut one.layer {
                    let [b, a] = other.get(layer.place)?;
                    layer.place = self.put(&b, &a)?;
                }
                self.finish(one)?;
            }
        }
        Ok(())
    }

    /// Opens a directory.
    ///
    /// # Errors
    /// As [`Store::beside`].
    pub fn open(directory: PathBuf, key: &str) -> Result<Self> {
        let (files, lines) = Resumable::open(directory, key)?;
        let mut store = Self { end: 0, done: IndexMap::new(), keeps: false, files };
        for line in lines {
            let Ok(one) = serde_json::from_slice::<Done>(&line) else { continue };
            let end = one.layer.as_ref().map_or(0, |layer| layer.place.end());
            // A machine that stopped may have lost bytes and kept the line.
            if end <= store.files.length() {
                store.end = store.end.max(end);
                store.done.insert(one.name.clone(), one);
            }
        }
        Ok(store)
    }

    /// Takes factors.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn put(&mut self, b: &[u8], a: &[u8]) -> Result<Place> {
        let place = Place { start: self.end, b: b.len() as u64, a: a.len() as u64 };
        self.files.write_at(b, place.start)?;
        self.files.write_at(a, place.start + place.b)?;
        self.end = place.end();
        Ok(place)
    }

    /// Reads factors.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn get(&self, place: Place) -> Result<[Vec<u8>; 2]> {
        let b = self.files.read_at(place.start, place.b)?;
        Ok([b, self.files.read_at(place.start + place.b, place.a)?])
    }

    /// Some of the bytes that are stored.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn read(&self, start: u64, length: u64) -> Result<Vec<u8>> {
        self.files.read_at(start, length)
    }

    /// Says that a parameter is finished.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn finish(&mut self, done: Done) -> Result<()> {
        self.files.finish(serde_json::to_vec(&done).expect("plain data"))?;
        self.done.insert(done.name.clone(), done);
        Ok(())
    }

    /// Keeps what is finished for a later call.
    pub fn keep(&mut self) {
        self.keeps = true;
    }

    /// Puts factors that are made anew behind all that is stored, `offset` bytes after it, and tells where
    /// they begin.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn put_behind(&self, bytes: &[u8], offset: u64) -> Result<u64> {
        let start = self.end + offset;
        self.files.write_at(bytes, start)?;
        Ok(start)
    }

    /// The factors under these names, each with its shape and where it begins.
    ///
    /// # Errors
    /// [`crate::Error::Io`].
    pub fn tensors(&self, wanted: Vec<(String, Dtype, Vec<u64>, u64)>) -> Result<Vec<Tensor>> {
        let mut header = Header::default();
        for (name, dtype, shape, start) in wanted {
            let bytes = shape.iter().product::<u64>() * dtype.size() as u64;
            header.tensors.push(TensorInfo { name, dtype, shape, range: start..start + bytes });
        }
        let names: Vec<String> = header.tensors.iter().map(|tensor| tensor.name.clone()).collect();
        let path = self.files.data_path();
        let file = Arc::new(TensorFile::of_raw_file(&path, Owner::Adapter, header)?);
        Ok(names.iter().map(|name| file.value(name).expect("it was put")).collect())
    }
}

impl Drop for Store {
    fn drop(&mut self) {
        if !self.keeps {
            local::remove_all(self.files.path());
        }
    }
}
