//! What a file or a directory is that is not what was asked for: told by the first bytes of a file, and by
//! the names in a directory.
//!
//! Every reader asks here once something cannot be read, so that an error says what the thing is and
//! what to do with it.

mod bytes;
mod folders;

use super::source::Source;
use super::store::Store;
pub use bytes::of_bytes;
pub use folders::{of_folder, state_of_training};

/// The bytes of a file that tell what it is.
pub const BEGINNING: u64 = 1024;

/// What something is, and what to do with it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Identity {
    /// What it is, in words that follow "is": "a Git LFS pointer".
    pub what: String,
    /// What to do, as half a sentence.
    pub advice: String,
}

impl Identity {
    /// Of something that is `what`.
    pub fn new(what: impl Into<String>, advice: impl Into<String>) -> Self {
        Self { what: what.into(), advice: advice.into() }
    }

    /// Whether it is a safetensors file, whose own errors say what is wrong with it.
    pub fn is_safetensors(&self) -> bool {
        self.what == bytes::SAFETENSORS
    }

    /// Whether it is what torch saves, or another pickle.
    pub fn is_pickle(&self) -> bool {
        self.what.starts_with(bytes::PYTORCH) || self.what == bytes::PICKLE
    }

    /// Whether it is a GGUF file of an adapter.
    pub fn is_gguf_adapter(&self) -> bool {
        self.what.starts_with(bytes::GGUF_ADAPTER)
    }

    /// Whether it is something to read, or nothing at all, and no weights.
    pub fn is_text(&self) -> bool {
        bytes::TEXTS.iter().any(|begin| self.what.starts_with(begin))
    }

    /// Whether it can hold weights, in whatever format.
    pub fn is_weights(&self) -> bool {
        self.is_safetensors()
            || self.is_pickle()
            || bytes::WEIGHTS.iter().any(|begin| self.what.starts_with(begin))
    }

    /// Both as a message about a path.
    pub fn sentence(&self) -> String {
        format!("is {}; {}", self.what, self.advice)
    }
}

/// What an opened file is, where its first bytes tell.
pub fn of_source(source: &dyn Source) -> Option<Identity> {
    let size = source.stamp().length;
    let mut beginning = vec![0; size.min(BEGINNING) as usize];
    source.read_at(&mut beginning, 0).ok()?;
    of_bytes(&beginning, size)
}

/// What a file of a store is, where its first bytes tell.
pub fn of_file(store: &dyn Store, name: &str) -> Option<Identity> {
    of_source(&*store.open(name).ok()?)
}
