//! What a long job shares with the one who asked for it: progress, a cancel flag, and threads.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};

use crate::error::{Error, Result};
use crate::limits;

/// Progress and cancellation of one job. Workers write progress, the caller reads it; the caller
/// raises the cancel flag, workers look at it between units of work.
#[derive(Debug, Default)]
pub struct Task {
    done: AtomicU64,
    total: AtomicU64,
    cancelled: Arc<AtomicBool>,
}

impl Task {
    /// A job of which nothing is done yet.
    pub fn new() -> Self {
        Self::default()
    }

    /// Says how much there is to do, in the job's own unit (bytes, for a merge).
    pub fn expect(&self, total: u64) {
        self.total.store(total, Ordering::Relaxed);
    }

    /// Adds to what is done.
    pub fn advance(&self, amount: u64) {
        self.done.fetch_add(amount, Ordering::Relaxed);
    }

    /// What is done and what there is to do; the second is 0 until it is known.
    pub fn progress(&self) -> (u64, u64) {
        (self.done.load(Ordering::Relaxed), self.total.load(Ordering::Relaxed))
    }

    /// Asks the workers to stop at the next opportunity.
    pub fn cancel(&self) {
        self.cancelled.store(true, Ordering::Relaxed);
    }

    /// The cancel flag, for what waits below the core.
    pub fn cancel_flag(&self) -> &Arc<AtomicBool> {
        &self.cancelled
    }

    /// # Errors
    /// [`Error::Cancelled`] once [`Task::cancel`] was called.
    pub fn check(&self) -> Result<()> {
        if self.cancelled.load(Ordering::Relaxed) { Err(Error::Cancelled) } else { Ok(()) }
    }
}

/// How many threads a job has: so many, or with `None` one per available core.
///
/// # Errors
/// [`Error::Argument`] for no threads, and for more than there can be.
pub fn thread_count(threads: Option<usize>) -> Result<usize> {
    if let Some(threads) = threads.filter(|threads| !(1..=limits::THREADS).contains(threads)) {
        return Err(Error::Argument(format!(
            "threads is {threads}; it is 1 to {}, or left out for one per core",
            limits::THREADS
        )));
    }
    let available = std::thread::available_parallelism().map_or(1, std::num::NonZero::get);
    Ok(threads.unwrap_or(available.min(limits::THREADS)))
}

/// A pool of `threads` workers (`None`: one per available core) that lives as long as the job.
/// Owned by the job rather than shared, so that a forked child never inherits a pool whose
/// threads did not survive the fork.
///
/// # Errors
/// [`Error::Argument`] for no threads, for more than there can be, or when the system cannot start
/// them.
pub fn build_pool(threads: Option<usize>) -> Result<rayon::ThreadPool> {
    rayon::ThreadPoolBuilder::new()
        .num_threads(thread_count(threads)?)
        .thread_name(|index| format!("lorafast-{index}"))
        .build()
        .map_err(|error| Error::Argument(format!("cannot start the worker threads: {error}")))
}
