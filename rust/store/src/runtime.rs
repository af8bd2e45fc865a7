//! The runtime on which everything asynchronous runs: two threads, made when they are first needed.

use std::future::Future;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::Duration;

use lorafast::{Error, Result};
use tokio::runtime::{Builder, Handle, Runtime};

/// Threads of the runtime. They move bytes between sockets and memory; whoever waits for an answer
/// does the rest.
const THREADS: usize = 2;
/// How often a waiting thread looks whether it is still to wait.
const STEP: Duration = Duration::from_millis(50);

/// The runtime, and the process that it belongs to.
static RUNTIME: Mutex<Option<(u32, Runtime)>> = Mutex::new(None);

/// The runtime of this process: threads do not survive a fork.
pub(crate) fn handle() -> Handle {
    let own = std::process::id();
    let mut runtime = RUNTIME.lock().unwrap_or_else(PoisonError::into_inner);
    if let Some((process, runtime)) = &*runtime
        && *process == own
    {
        return runtime.handle().clone();
    }
    let made = Builder::new_multi_thread()
        .worker_threads(THREADS)
        .thread_name("lorafast-store")
        .enable_all()
        .build()
        .expect("the system starts two threads");
    let handle = made.handle().clone();
    // One whose threads are gone would wait for them.
    std::mem::forget(runtime.replace((own, made)));
    handle
}

/// Waits for something, until the caller is asked to stop.
///
/// # Errors
/// [`Error::Cancelled`], and those of the future.
pub(crate) fn wait<T>(stop: &Stop, future: impl Future<Output = Result<T>>) -> Result<T> {
    handle().block_on(async {
        let mut future = std::pin::pin!(future);
        loop {
            match tokio::time::timeout(STEP, &mut future).await {
                Ok(result) => return result,
                Err(_) if stop.is_raised() => return Err(Error::Cancelled),
                Err(_) => {}
            }
        }
    })
}

/// Whether a job is to stop, shared by all that wait for its sake.
#[derive(Debug, Clone, Default)]
pub(crate) struct Stop(Arc<Mutex<Arc<AtomicBool>>>);

impl Stop {
    /// Waits on behalf of another job from now on.
    pub fn follow(&self, flag: &Arc<AtomicBool>) {
        *self.0.lock().unwrap_or_else(PoisonError::into_inner) = flag.clone();
    }

    /// Whether the job is to stop.
    pub fn is_raised(&self) -> bool {
        self.0.lock().unwrap_or_else(PoisonError::into_inner).load(Ordering::Relaxed)
    }
}
