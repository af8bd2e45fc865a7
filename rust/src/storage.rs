//! Storage: the only layer that touches files.

pub(crate) mod digest;
pub mod directory;
pub mod file_names;
pub mod identify;
pub mod local;
pub mod memory;
pub mod resumable;
pub mod scratch;
pub mod sink;
pub mod source;
pub mod staging;
pub mod store;
