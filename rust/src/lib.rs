//! The core of lorafast: it reads checkpoints and adapters, plans merges and carries them out,
//! and measures adapters, all on memory-mapped safetensors files.
//!
//! The core knows no Python, prints nothing, reads no environment and owns no global pool:
//! threads, progress and cancellation are arguments ([`task::Task`]).

pub mod error;
pub mod task;

pub use error::{Error, Result};
