//! The core of lorafast: it reads checkpoints and adapters, plans merges and carries them out,
//! and measures adapters, all on safetensors files that are read at positions.
//!
//! The core knows no Python, prints nothing, reads no environment and owns no global pool:
//! threads, progress and cancellation are arguments ([`task::Task`]).

// The kernels read stored numbers as they lie in memory, and safetensors files are little-endian.
#[cfg(not(target_endian = "little"))]
compile_error!("lorafast runs on little-endian processors only");

pub mod adapter;
pub mod alike;
pub mod analysis;
pub mod checkpoint;
pub mod describe;
pub mod dtype;
pub mod entries;
pub mod error;
pub mod execute;
pub mod factors;
pub mod file;
#[cfg(test)]
mod fixtures;
pub mod fleet;
pub mod kernel;
pub mod limits;
pub mod names;
pub mod orientation;
pub mod overlap;
pub mod plan;
pub mod quantised;
pub mod renames;
mod residual;
pub mod safetensors;
pub mod side_files;
pub mod spectrum;
pub mod staging;
pub mod statistics;
pub mod subtract;
pub mod task;
pub mod verify;
pub mod waiting;

mod dense;
mod digest;
mod memory;
mod vector;

pub use error::{Error, Result};
