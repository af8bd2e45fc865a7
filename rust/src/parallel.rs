//! Jobs of many threads: progress, cancellation, and queues of a bounded length.

pub mod bounded;
pub mod task;
