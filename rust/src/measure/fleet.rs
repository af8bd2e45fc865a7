//! Many adapters at once: what each of them holds, in rows for tables.
//!
//! Figures are those of [`crate::measure::analysis`], bit for bit: the same functions find them. What is
//! different is the way there. A unit of work is a module of an adapter (a small adapter is one
//! unit), and all threads take from one queue, so that one large adapter and ten thousand small
//! ones both keep them busy. No more adapters are open than twice the threads, and memory is two
//! buffers a thread, of the largest module or small adapter. Adapters that are still in training
//! shrink and grow: what changed while it was read is an error of that adapter.

mod measure;
mod read;
pub mod record;
pub mod tables;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::adapter::format::AdapterSource;
use crate::error::{Error, Result};
use crate::parallel::task::Task;
use measure::{Open, Unit};
use record::Record;

/// How often a thread that waits for work looks whether the job was cancelled.
const PATIENCE: Duration = Duration::from_millis(50);

/// How much to find.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Level {
    /// The moments of every tensor.
    pub moments: bool,
    /// The spectrum of every update.
    pub spectra: bool,
}

impl Level {
    /// The names of the levels.
    pub const NAMES: [&str; 4] = ["full", "headers", "moments", "spectra"];

    /// The level of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        let (moments, spectra) = match name {
            "full" => (true, true),
            "headers" => (false, false),
            "moments" => (true, false),
            "spectra" => (false, true),
            _ => {
                let names = Self::NAMES.join(", ");
                return Err(Error::Argument(format!("metrics must be one of {names}, not {name}")));
            }
        };
        Ok(Self { moments, spectra })
    }

    /// Whether more is read than headers.
    pub fn reads_data(self) -> bool {
        self.moments || self.spectra
    }
}

/// A tensor with values that are no numbers.
#[derive(Debug, Clone, PartialEq)]
pub struct NonFinite {
    /// Its name.
    pub name: String,
    /// All of its values.
    pub count: u64,
    /// NaN and ±∞ among them.
    pub non_finite: u64,
}

/// What one adapter holds.
#[derive(Debug, Clone)]
pub struct Scanned {
    /// What the tables take of it.
    pub record: Record,
    /// The tensors with NaN or infinities.
    pub non_finite: Vec<NonFinite>,
    /// The modules' positions of which a merge changes nothing, as far as this level tells, each with
    /// why, in words.
    pub zero_causes: Vec<(usize, String)>,
    /// The positions of those that DoRA's magnitudes rescale.
    pub rescaled: Vec<usize>,
    /// What there is beside plain low-rank products, in words.
    pub features: Vec<String>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
}

/// Looks at every source and hands what it holds, or why it could not be read, to `deliver` with
/// the source's position: in the order in which they are done, from the pool's threads. Progress
/// is counted in bytes.
///
/// # Errors
/// [`Error::Cancelled`]; whatever is wrong with an adapter is delivered.
pub fn scan(
    sources: &[AdapterSource],
    level: Level,
    pool: &rayon::ThreadPool,
    task: &Task,
    deliver: &(dyn Fn(usize, Result<Scanned>) + Sync),
) -> Result<()> {
    task.expect(sources.iter().map(AdapterSource::expected_bytes).sum());
    let scan = Scan {
        sources,
        level,
        task,
        deliver,
        queue: Mutex::new(Queue { next: 0, opening: 0, units: VecDeque::new() }),
        arrived: Condvar::new(),
    };
    pool.broadcast(|_| scan.work());
    task.check()
}

/// What is left to do.
struct Queue {
    /// The first source that nobody has opened.
    next: usize,
    /// Sources that are being opened, which may bring more units.
    opening: usize,
    /// Units of opened adapters.
    units: VecDeque<(Arc<Open>, Unit)>,
}

enum Work {
    Open(usize),
    Unit(Arc<Open>, Unit),
}

struct Scan<'a> {
    sources: &'a [AdapterSource],
    level: Level,
    task: &'a Task,
    deliver: &'a (dyn Fn(usize, Result<Scanned>) + Sync),
    queue: Mutex<Queue>,
    arrived: Condvar,
}

impl Scan<'_> {
    /// What one thread does, with room for what it reads.
    fn work(&self) {
        let mut buffer = Vec::new();
        while let Some(work) = self.next() {
            match work {
                Work::Open(position) => self.open(position, &mut buffer),
                Work::Unit(open, unit) => {
                    let path = &self.sources[open.position()].path;
                    let result = guarded(path, || open.measure(unit, &mut buffer, self.task));
                    if open.finished(result) {
                        self.deliver(open.position(), guarded(path, || open.result()));
                    }
                }
            }
        }
    }

    fn lock(&self) -> MutexGuard<'_, Queue> {
        // Nothing that can panic runs under the lock.
        self.queue.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Something to do, if need be after waiting for it. Units of opened adapters come first, so
    /// that few adapters are open at a time.
    fn next(&self) -> Option<Work> {
        let mut queue = self.lock();
        loop {
            self.task.check().ok()?;
            if let Some((open, unit)) = queue.units.pop_front() {
                return Some(Work::Unit(open, unit));
            }
            if queue.next < self.sources.len() {
                queue.next += 1;
                queue.opening += 1;
                return Some(Work::Open(queue.next - 1));
            }
            if queue.opening == 0 {
                return None;
            }
            let waited = self.arrived.wait_timeout(queue, PATIENCE);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn open(&self, position: usize, buffer: &mut Vec<u8>) {
        let source = &self.sources[position];
        let opened = guarded(&source.path, || {
            let adapter = source.open(self.task)?;
            Open::new(position, adapter, source, self.level)
        });
        let split = match opened {
            Ok(open) if open.is_small() => {
                self.opened([]);
                let whole = || {
                    open.measure_whole(buffer, self.task)?;
                    self.task.check().and_then(|()| open.result())
                };
                return self.deliver(position, guarded(&source.path, whole));
            }
            Ok(open) => Arc::new(open),
            Err(error) => {
                self.opened([]);
                self.task.advance(source.expected_bytes());
                return self.deliver(position, Err(error));
            }
        };
        self.opened(split.units().iter().map(|unit| (Arc::clone(&split), *unit)));
    }

    fn opened(&self, units: impl IntoIterator<Item = (Arc<Open>, Unit)>) {
        let mut queue = self.lock();
        queue.units.extend(units);
        queue.opening -= 1;
        drop(queue);
        self.arrived.notify_all();
    }

    fn deliver(&self, position: usize, result: Result<Scanned>) {
        if !matches!(result, Err(Error::Cancelled)) {
            (self.deliver)(position, result);
        }
    }
}

/// A panic is a bug of this package, but the other adapters' figures are not to be lost for it.
fn guarded<T>(path: &Path, work: impl FnOnce() -> Result<T>) -> Result<T> {
    catch_unwind(AssertUnwindSafe(work)).unwrap_or_else(|_| {
        Err(Error::adapter(
            path,
            "made lorafast fail where it should not; please report it with this adapter",
        ))
    })
}
