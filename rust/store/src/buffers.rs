//! Buffers of windows and parts that are used again and again.
//!
//! The system's allocator keeps what a thread has freed for that thread, so that several threads that
//! take and free megabytes in turn hold far more than is in use at any moment.

use std::ops::Deref;
use std::sync::{Arc, Mutex, PoisonError};

/// What is shorter lies in memory of its own.
const SHORT: usize = 1 << 20;

/// Buffers that nobody uses at this moment.
#[derive(Debug)]
pub(crate) struct Buffers {
    /// Bytes that are kept at the most.
    limit: usize,
    free: Mutex<Vec<Vec<u8>>>,
}

/// A buffer, which is kept for another use when it is dropped.
#[derive(Debug)]
pub(crate) struct Buffer {
    pub content: Vec<u8>,
    kept_by: Arc<Buffers>,
}

impl Buffers {
    pub fn new(limit: usize) -> Arc<Self> {
        Arc::new(Self { limit, free: Mutex::default() })
    }

    /// Room for that many bytes; what it holds is anything.
    pub fn take(self: &Arc<Self>, bytes: usize) -> Buffer {
        let mut content = Vec::new();
        if bytes >= SHORT {
            let mut free = self.free.lock().unwrap_or_else(PoisonError::into_inner);
            let fits = |buffer: &Vec<u8>| (bytes..=2 * bytes).contains(&buffer.capacity());
            match free.iter().position(fits) {
                Some(position) => content = free.swap_remove(position),
                // Of another size: what is used is no more than before.
                None => drop(free.pop()),
            }
        }
        // Exact: the next of the same size is to find it.
        content.reserve_exact(bytes.saturating_sub(content.len()));
        Buffer { content, kept_by: self.clone() }
    }
}

impl Deref for Buffer {
    type Target = [u8];

    fn deref(&self) -> &[u8] {
        &self.content
    }
}

impl AsRef<[u8]> for Buffer {
    fn as_ref(&self) -> &[u8] {
        &self.content
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        let own = std::mem::take(&mut self.content);
        if own.capacity() < SHORT {
            return;
        }
        let mut free = self.kept_by.free.lock().unwrap_or_else(PoisonError::into_inner);
        let kept: usize = free.iter().map(Vec::capacity).sum();
        if kept + own.capacity() <= self.kept_by.limit {
            free.push(own);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_buffer_is_used_again_by_what_needs_as_much() {
        let buffers = Buffers::new(3 * SHORT);
        let mut first = buffers.take(2 * SHORT);
        first.content.resize(2 * SHORT, 1);
        let place = first.as_ptr();
        drop(first);
        assert_eq!(buffers.take(2 * SHORT - 7).content.as_ptr(), place);
        // Of another size, and too many.
        assert!(buffers.take(8 * SHORT).content.capacity() >= 8 * SHORT);
        let all: Vec<_> = (0..3).map(|_| buffers.take(2 * SHORT)).collect();
        drop(all);
        let kept: usize = buffers.free.lock().expect("unused").iter().map(Vec::capacity).sum();
        assert_eq!(kept, 2 * SHORT);
        drop(buffers.take(5));
        assert_eq!(buffers.free.lock().expect("unused").len(), 1);
    }
}
