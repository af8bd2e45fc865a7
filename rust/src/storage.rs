//! Storage: the only layer that touches files.

pub(crate) mod digest;
pub mod file_names;
pub mod local;
pub mod source;
pub mod staging;
pub mod store;
