//! The header of a GGUF file, llama.cpp's container, checked before anything is trusted.
//!
//! The format is the magic, a version, the numbers of tensors and of metadata entries, the entries,
//! the tensors' names with their extents, types and offsets, and the data, in which each tensor begins
//! at a multiple of the alignment (ggml's `docs/gguf.md`). A file's own numbers are held against its
//! size before anything is allocated by them.

mod header;
pub mod write;

use std::path::Path;

use indexmap::IndexMap;
use serde_json::Value;

use super::safetensors::TensorFile;
use crate::error::{Error, Owner, Result};
use crate::storage::source::Source;
use crate::storage::store::Store;
use header::Fault;
pub use header::MAGIC;

/// The key that tells a model from an adapter.
pub const GENERAL_TYPE: &str = "general.type";
/// The key of the alignment of tensors, and what it is without one.
const ALIGNMENT: &str = "general.alignment";
const DEFAULT_ALIGNMENT: u64 = 32;

/// An opened GGUF file.
#[derive(Debug)]
pub struct Gguf {
    /// Its metadata in the order of the file. Numbers that JSON lacks are texts, long arrays their
    /// lengths.
    pub metadata: IndexMap<String, Value>,
    /// Its tensors, with row-major shapes. Of types that are not computed with, no bytes are known.
    pub file: TensorFile,
}

impl Gguf {
    /// Opens and checks a GGUF file of a store.
    ///
    /// # Errors
    /// [`Error::Io`] if it cannot be opened, the owner's class if it is not sound.
    pub fn open_in(store: &dyn Store, name: &str, owner: Owner) -> Result<Self> {
        let source = store.open(name).map_err(|error| error.of(owner))?;
        let path = store.path(name);
        let parsed = header::parse(&*source).map_err(|fault| error_of(fault, &path, owner))?;
        let header::Parsed { metadata, header, data_start } = parsed;
        Ok(Self { metadata, file: TensorFile::of_header(&path, owner, source, data_start, header) })
    }

    /// A text of the metadata.
    pub fn text(&self, key: &str) -> Option<&str> {
        self.metadata.get(key)?.as_str()
    }
}

fn error_of(fault: Fault, path: &Path, owner: Owner) -> Error {
    match fault {
        Fault::Broken(message) => owner.broken(path, message),
        Fault::Unread(error) => owner.unread(path, error),
    }
}

/// What a GGUF file says that it holds (`general.type`: model, adapter, …), as far as its beginning
/// can be read.
pub fn general_type(source: &dyn Source) -> Option<String> {
    let found = header::entry(source, GENERAL_TYPE).ok()?;
    found?.as_str().map(str::to_owned)
}
