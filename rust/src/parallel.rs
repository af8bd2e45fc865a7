//! Jobs of many threads: progress and cancellation.

pub mod task;
