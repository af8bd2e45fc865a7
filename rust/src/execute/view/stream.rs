//! Whole tensors of a view, one after the other, computed ahead of who takes them.

use std::collections::VecDeque;
use std::sync::mpsc::{Receiver, RecvTimeoutError, SyncSender, sync_channel};
use std::sync::{Arc, Mutex};
use std::time::Duration;

use super::View;
use crate::error::{Error, Result};
use crate::execute::compute::lock;
use crate::execute::session::TensorId;
use crate::parallel::task::Task;

/// Bytes of tensors that are computed together, or one tensor.
const BATCH_BYTES: usize = 16 << 20;

/// A tensor with its bytes.
#[derive(Debug)]
pub struct Item {
    /// Its position in the list that was asked for.
    pub position: usize,
    /// Its bytes.
    pub bytes: Vec<u8>,
}

/// Tensors that are computed on threads of their own while somebody uses those before. Two batches are
/// in memory at most: the one that is handed out, and the next.
#[derive(Debug)]
pub struct Stream {
    state: Mutex<State>,
    task: Arc<Task>,
}

#[derive(Debug)]
struct State {
    /// Those that are computed and not handed out.
    ready: VecDeque<Item>,
    /// `None` once there are no more, or none was asked for.
    batches: Option<Receiver<Result<Vec<Item>>>>,
}

impl View {
    /// These tensors, in this order.
    ///
    /// # Errors
    /// [`Error::Argument`] if the system cannot start a thread.
    pub fn stream(self: &Arc<Self>, ids: Vec<TensorId>) -> Result<Stream> {
        let (sender, receiver) = sync_channel(0);
        let task = Arc::new(Task::new());
        let (view, its_task) = (self.clone(), task.clone());
        std::thread::Builder::new()
            .name("lorafast-view".into())
            .spawn(move || view.send_all(&ids, &sender, &its_task))
            .map_err(|error| Error::Argument(format!("cannot start a worker thread: {error}")))?;
        let state = State { ready: VecDeque::new(), batches: Some(receiver) };
        Ok(Stream { state: Mutex::new(state), task })
    }

    /// Computes tensors batch after batch, until they are done or nobody takes them any more.
    fn send_all(&self, ids: &[TensorId], to: &SyncSender<Result<Vec<Item>>>, task: &Task) {
        let mut start = 0;
        while start < ids.len() {
            let (mut end, mut bytes) = (start, 0);
            // The first one alone, so that there is something to begin with.
            while end < ids.len() && (end == start || start > 0 && bytes < BATCH_BYTES) {
                bytes += self.bytes(ids[end]);
                if end > start && bytes > BATCH_BYTES {
                    break;
                }
                end += 1;
            }
            let read = self.read_all(&ids[start..end], task);
            let items = |read: Vec<Vec<u8>>| {
                let item = |(position, bytes)| Item { position, bytes };
                (start..end).zip(read).map(item).collect()
            };
            let failed = read.is_err();
            if to.send(read.map(items)).is_err() || failed {
                return;
            }
            start = end;
        }
    }
}

impl Stream {
    /// The next tensor, for which it waits so long at most. After an error there is none any more.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn next(&self, wait: Duration) -> Result<Next> {
        let mut state = lock(&self.state);
        if let Some(item) = state.ready.pop_front() {
            return Ok(Next::Item(item));
        }
        let Some(batches) = &state.batches else { return Ok(Next::End) };
        match batches.recv_timeout(wait) {
            Ok(Ok(items)) => {
                state.ready = items.into();
                Ok(state.ready.pop_front().map_or(Next::Later, Next::Item))
            }
            Ok(Err(error)) => {
                state.batches = None;
                Err(error)
            }
            Err(RecvTimeoutError::Timeout) => Ok(Next::Later),
            Err(RecvTimeoutError::Disconnected) => {
                state.batches = None;
                Ok(Next::End)
            }
        }
    }

    /// Lets nothing more be computed.
    pub fn stop(&self) {
        self.task.cancel();
        let mut state = lock(&self.state);
        state.batches = None;
        state.ready.clear();
    }
}

impl Drop for Stream {
    fn drop(&mut self) {
        // The thread is not waited for: it sees that nobody listens, or this.
        self.task.cancel();
    }
}

/// What a stream has to give.
#[derive(Debug)]
pub enum Next {
    /// A tensor.
    Item(Item),
    /// Nothing within the time.
    Later,
    /// There is none any more.
    End,
}
