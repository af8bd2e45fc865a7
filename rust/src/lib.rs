//! The core of lorafast: it reads checkpoints and adapters, plans merges and carries them out,
//! and measures adapters, all on safetensors files that are read at positions.
//!
//! The core knows no Python, prints nothing, reads no environment and owns no global pool:
//! threads, progress and cancellation are arguments ([`parallel::task::Task`]).
//!
//! Folders are layers. Each uses those above it in this list, and none below:
//!
//! - [`error`], [`limits`]: one error type; how large what a file asks for can be.
//! - [`parallel`]: progress, cancellation and threads of a job.
//! - [`storage`]: the only place that touches files.
//! - [`tensor`]: element types, and the safetensors format.
//! - [`kernel`], `linalg`: products and conversions; decompositions in f64.
//! - `coefficients`: methods that need inner products of updates alone.
//! - [`entrywise`]: methods that look at each element of several updates.
//! - `methods`, `weights`: what methods take beside the updates, and the weights of these by modules.
//! - [`checkpoint`]: shards seen as one map from names to tensors, their names and quantization.
//! - [`adapter`]: what an adapter's modules add, and how it is read.
//! - [`plan`]: what a merge will do; [`execute`] carries it out, and [`verify`] proves the result.
//! - [`measure`]: statistics, spectra and overlap of one adapter, of several, of a fleet;
//!   [`similarity`]: of all pairs of thousands.
//! - [`convert`]: an adapter in another format, held against what it was.
//! - [`algebra`]: adapters made from adapters.
//! - [`describe`]: plain data for JSON.

// The kernels read stored numbers as they lie in memory, and safetensors files are little-endian.
#[cfg(not(target_endian = "little"))]
compile_error!("lorafast runs on little-endian processors only");

pub mod adapter;
pub mod algebra;
pub mod checkpoint;
mod coefficients;
pub mod convert;
pub mod describe;
pub mod entrywise;
pub mod error;
pub mod execute;
#[cfg(test)]
mod fixtures;
pub mod kernel;
pub mod limits;
mod linalg;
pub mod measure;
mod methods;
pub mod parallel;
pub mod plan;
pub mod similarity;
pub mod storage;
pub mod tensor;
pub mod verify;
mod weights;

pub use error::{Error, Result};
