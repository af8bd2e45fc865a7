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
mod rows;

#[cfg(test)]
mod tests;

use std::collections::VecDeque;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use serde::Serialize;
use serde_json::{Map, Value};

pub use rows::{Column, Kind, columns};

use crate::adapter::format::AdapterSource;
use crate::error::{Error, Result};
use crate::measure::statistics::Summary;
use crate::parallel::task::Task;
use crate::storage::digest::{hexadecimal, sha256_of_both, sha256_of_bytes};
use measure::{Open, Unit};

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
#[derive(Debug, Clone, PartialEq, Serialize)]
pub struct NonFinite {
    /// Its name.
    pub name: String,
    /// All of its values.
    pub count: u64,
    /// NaN and ±∞ among them.
    pub non_finite: u64,
}

/// The modules of one adapter as rows, in the order of the file.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Modules {
    /// The module's path of each row.
    pub paths: Vec<String>,
    /// linear, embedding or convolution.
    pub kinds: Vec<&'static str>,
    /// The numbers, row after row: eight bytes each, little-endian, as [`columns`] lists them.
    pub rows: Vec<u8>,
    /// The singular values of all rows, one row after the other, as f64; how many each row has is
    /// in its `singular_values` column.
    pub singular_values: Vec<f64>,
}

/// What one adapter holds.
#[derive(Debug, Clone, Serialize)]
pub struct Scanned {
    /// `adapter_config.json` as it stands.
    pub config: Map<String, Value>,
    /// Whether s is α/√r.
    #[serde(rename = "rank_stabilised")]
    pub rank_stabilized: bool,
    /// Bytes of the weights file.
    pub total_bytes: u64,
    /// The number of its tensors.
    pub tensors: usize,
    /// The number of values in them.
    pub parameters: u64,
    /// The types of its tensors, sorted.
    pub dtypes: Vec<String>,
    /// SHA-256 of the weights file, where more than headers was read.
    pub sha256: Option<String>,
    /// All values of all tensors taken together, where moments were asked for.
    pub weights: Option<Summary>,
    /// The tensors with NaN or infinities.
    pub non_finite: Vec<NonFinite>,
    /// What there is beside plain low-rank products, in words.
    pub features: Vec<String>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
    /// Its modules.
    #[serde(skip)]
    pub modules: Modules,
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

/// What one thread has before it.
#[derive(Default)]
struct Desk {
    /// Room for what is read.
    buffer: Vec<u8>,
    /// A small adapter that is measured but for its digest, and its file.
    waiting: Option<(Open, Vec<u8>)>,
    /// Room for the next one's file while the digest of the last is waiting.
    spare: Vec<u8>,
}

impl Scan<'_> {
    /// What one thread does.
    fn work(&self) {
        let mut desk = Desk::default();
        while let Some(work) = self.next(&mut desk) {
            match work {
                Work::Open(position) => self.open(position, &mut desk),
                Work::Unit(open, unit) => {
                    let path = &self.sources[open.position()].path;
                    let result = guarded(path, || open.measure(unit, &mut desk.buffer, self.task));
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

    /// Something to do, if need be after waiting for it. Nobody is kept waiting meanwhile.
    fn next(&self, desk: &mut Desk) -> Option<Work> {
        if desk.waiting.is_some() {
            if let Some(work) = self.take(false) {
                return Some(work);
            }
            self.task.check().ok()?;
            if let Some((open, content)) = desk.waiting.take() {
                open.keep_sha256(sha256_of_bytes(open.content(&content)));
                self.deliver_small(&open);
                desk.spare = content;
            }
        }
        self.take(true)
    }

    /// Units of opened adapters come first, so that few adapters are open at a time.
    fn take(&self, is_patient: bool) -> Option<Work> {
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
            if queue.opening == 0 || !is_patient {
                return None;
            }
            let waited = self.arrived.wait_timeout(queue, PATIENCE);
            queue = waited.unwrap_or_else(PoisonError::into_inner).0;
        }
    }

    fn open(&self, position: usize, desk: &mut Desk) {
        let source = &self.sources[position];
        let opened = guarded(&source.path, || {
            let adapter = source.open(self.task)?;
            Open::new(position, adapter, source, self.level)
        });
        let split = match opened {
            Ok(open) if open.is_small() => {
                self.opened([]);
                let whole = || open.measure_whole(&mut desk.buffer, self.task);
                return match guarded(&source.path, whole) {
                    Ok(()) if open.awaits_digest() => self.digest(open, desk),
                    Ok(()) => self.deliver_small(&open),
                    Err(error) => self.deliver(position, Err(error)),
                };
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

    /// Leaves an adapter, of which the file lies in the buffer, to wait for a second one: the
    /// digests of both take the time of one.
    fn digest(&self, open: Open, desk: &mut Desk) {
        let Some((first, content)) = desk.waiting.take() else {
            let next = std::mem::take(&mut desk.spare);
            desk.waiting = Some((open, std::mem::replace(&mut desk.buffer, next)));
            return;
        };
        let both = sha256_of_both(first.content(&content), open.content(&desk.buffer));
        desk.spare = content;
        for (open, digest) in [first, open].iter().zip(both) {
            open.keep_sha256(hexadecimal(&digest));
            self.deliver_small(open);
        }
    }

    fn deliver_small(&self, open: &Open) {
        let path = &self.sources[open.position()].path;
        let result = guarded(path, || self.task.check().and_then(|()| open.result()));
        self.deliver(open.position(), result);
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
