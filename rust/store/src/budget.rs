//! The memory of all reads ahead and uploads of a merge: one number of bytes for all of them.

use std::sync::Arc;
use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};

use crate::buffers::Buffers;

/// What a merge takes for reads ahead and uploads, where nobody says otherwise.
pub const DEFAULT_BYTES: u64 = 128 << 20;
/// What it takes at the least: a window and a part for each of two threads.
const LEAST_BYTES: u64 = 16 << 20;
/// Bytes that are asked for at once, where the budget has room for many of them.
const WINDOW: u64 = 8 << 20;

/// How many bytes may be held, and how many are.
#[derive(Debug)]
pub struct Budget {
    limit: u64,
    read: AtomicU64,
    written: AtomicU64,
    /// Objects that are read ahead at this moment.
    readers: AtomicUsize,
    /// The memory itself.
    pub(crate) buffers: Arc<Buffers>,
}

impl Default for Budget {
    fn default() -> Self {
        Self::new(DEFAULT_BYTES)
    }
}

impl Budget {
    /// One of so many bytes.
    pub fn new(bytes: u64) -> Self {
        let limit = bytes.max(LEAST_BYTES);
        Self {
            limit,
            read: AtomicU64::new(0),
            written: AtomicU64::new(0),
            readers: AtomicUsize::new(0),
            buffers: Buffers::new(limit as usize),
        }
    }

    /// Bytes that are asked for at once.
    pub(crate) fn window(&self) -> u64 {
        WINDOW.min(self.for_reads() / 4).max(1 << 20)
    }

    /// What reads ahead may hold: uploads have the rest.
    fn for_reads(&self) -> u64 {
        self.limit / 8 * 5
    }

    /// Takes bytes for a read ahead, of an object for which `held` are taken already, if there are as many
    /// left for it.
    pub(crate) fn take_for_read(&self, bytes: u64, held: u64) -> bool {
        let readers = self.readers.load(Ordering::Relaxed).max(1) as u64;
        if held + bytes > self.for_reads() / readers {
            return false;
        }
        let within = |read: u64| (read + bytes <= self.for_reads()).then_some(read + bytes);
        self.read.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
    }

    /// Takes bytes for a read that somebody waits for, whether there are as many left or not. Whether
    /// there were.
    pub(crate) fn force_for_read(&self, bytes: u64) -> bool {
        self.read.fetch_add(bytes, Ordering::Relaxed) + bytes <= self.for_reads()
    }

    pub(crate) fn give_back_read(&self, bytes: u64) {
        self.read.fetch_sub(bytes, Ordering::Relaxed);
    }

    pub(crate) fn begin_reading(&self) {
        self.readers.fetch_add(1, Ordering::Relaxed);
    }

    pub(crate) fn end_reading(&self) {
        self.readers.fetch_sub(1, Ordering::Relaxed);
    }

    /// Takes bytes for a part of an upload, if there are as many left.
    pub(crate) fn take_for_write(&self, bytes: u64) -> bool {
        let limit = self.limit - self.for_reads();
        let within = |written: u64| (written + bytes <= limit).then_some(written + bytes);
        self.written.fetch_update(Ordering::Relaxed, Ordering::Relaxed, within).is_ok()
    }

    /// Takes them whether there are as many left or not.
    pub(crate) fn force_for_write(&self, bytes: u64) {
        self.written.fetch_add(bytes, Ordering::Relaxed);
    }

    pub(crate) fn give_back_write(&self, bytes: u64) {
        self.written.fetch_sub(bytes, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_full_budget_gives_nothing_but_what_is_waited_for() {
        let budget = Budget::new(64 << 20);
        let window = budget.window();
        assert_eq!(window, 8 << 20);
        let taken =
            (0..100).take_while(|count| budget.take_for_read(window, count * window)).count();
        assert_eq!(taken as u64, (40 << 20) / window);
        assert!(!budget.force_for_read(window));
        budget.give_back_read(2 * window);
        assert!(budget.take_for_read(window, 0));
        budget.begin_reading();
        budget.begin_reading();
        assert!(!budget.take_for_read(window, 2 * window), "another object has its share");
        assert!(budget.take_for_write(24 << 20) && !budget.take_for_write(1));
    }
}
