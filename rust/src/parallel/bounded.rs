//! Results on their way from a job's threads to a slower taker: no more than a bounded room holds.

use std::collections::VecDeque;
use std::sync::{Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::parallel::task::Task;

/// How often a thread that waits for room looks whether the job was cancelled.
const PATIENCE: Duration = Duration::from_millis(50);

/// A queue whose producers wait where the taker, who may be slower at a thousand small results than
/// the threads that find them, has not kept up.
pub struct Waiting<T> {
    state: Mutex<State<T>>,
    left_room: Condvar,
    room: usize,
}

struct State<T> {
    results: VecDeque<(usize, T)>,
    taken: usize,
}

impl<T> Waiting<T> {
    /// Room for results of so many bytes together, and for one result of any size.
    pub fn new(room: usize) -> Self {
        let state = State { results: VecDeque::new(), taken: 0 };
        Self { state: Mutex::new(state), left_room: Condvar::new(), room }
    }

    fn lock(&self) -> MutexGuard<'_, State<T>> {
        // Nothing that can panic runs under the lock.
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Puts a result of so many bytes behind the others, as soon as there is room for it; where
    /// the job was cancelled nobody makes room any more.
    pub fn push(&self, task: &Task, size: usize, result: T) {
        let mut state = self.lock();
        while !state.results.is_empty() && state.taken + size > self.room && task.check().is_ok() {
            let waited = self.left_room.wait_timeout(state, PATIENCE);
            state = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
        state.taken += size;
        state.results.push_back((size, result));
    }

    /// The first results, at most so many of them.
    pub fn take(&self, most: usize) -> Vec<T> {
        let mut state = self.lock();
        let count = most.min(state.results.len());
        let (sizes, results): (Vec<_>, Vec<_>) = state.results.drain(..count).unzip();
        state.taken -= sizes.iter().sum::<usize>();
        drop(state);
        self.left_room.notify_all();
        results
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::atomic::{AtomicUsize, Ordering};

    #[test]
    fn results_come_in_their_order_and_wait_for_room() {
        let waiting = Waiting::new(10);
        let task = Task::new();
        let pushed = AtomicUsize::new(0);
        std::thread::scope(|scope| {
            scope.spawn(|| {
                for result in 0..100 {
                    waiting.push(&task, 3, result);
                    pushed.fetch_add(1, Ordering::SeqCst);
                }
            });
            let mut seen = Vec::new();
            while seen.len() < 100 {
                // Three have room; a fourth one has not, however long nobody takes them.
                while pushed.load(Ordering::SeqCst) < 100.min(seen.len() + 3) {
                    std::thread::yield_now();
                }
                std::thread::sleep(Duration::from_millis(1));
                assert!(waiting.lock().taken <= 10);
                seen.extend(waiting.take(2));
            }
            assert_eq!(seen, (0..100).collect::<Vec<_>>());
        });
    }

    #[test]
    fn one_of_any_size_has_room_and_the_cancelled_do_not_wait() {
        let waiting = Waiting::new(10);
        let task = Task::new();
        waiting.push(&task, 1000, "large");
        task.cancel();
        waiting.push(&task, 1000, "late");
        assert_eq!(waiting.take(5), ["large", "late"]);
        assert!(waiting.take(5).is_empty());
    }
}
