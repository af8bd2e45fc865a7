//! Proof that a merged checkpoint is what base and adapters make, whoever merged them.
//!
//! Untouched tensors are compared byte for byte. Merged ones are computed again: by the kernels,
//! every element, and, for a seeded sample of rows (or all of them), in f64 as well. A stored
//! value passes if it lies within half a unit in the last place of its type around the exact one,
//! widened by the bound on a chain of f32 additions: |error| ≤ γ·Σ|terms| with γ = n·2⁻²⁴ (Higham,
//! «Accuracy and Stability of Numerical Algorithms», 2nd ed., §3.1). So any correct order of
//! summation passes, and a doubled scale or a flipped bit does not. PEFT rounds some sums more than
//! once; for a plan that is to be PEFT's (`compat`), those roundings are allowed as well.

mod consistency;
mod exact;
mod matching;
mod quantized;
pub mod subtraction;
mod transforms;

use std::collections::HashSet;
use std::ops::Range;
use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::{Deserialize, Serialize};
use sha2::{Digest, Sha256};

use crate::checkpoint::Checkpoint;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::{Error, Result, shorten_all};
use crate::execute::compute::{Buffers, Computer, lock};
use crate::execute::queue;
use crate::execute::rounding::LOST as LOST_IN_ROUNDING;
use crate::execute::session::Session;
use crate::kernel::InstructionSet;
use crate::kernel::convert::widen_f64;
use crate::parallel::task::{self, Task};
use crate::plan::{
    Action, Compat, Inputs, Plan, PlannedChange, PlannedTensor, Precision, base_as_named,
};
use crate::storage::digest::hexadecimal;
use crate::storage::local;
use crate::tensor::safetensors::{TensorFile, TensorInfo};

use exact::{ExactRow, Tolerance, half_ulp};
pub(crate) use exact::{HalfUlp, PEFT_ROUNDINGS};
use matching::Job;

/// Rows of each merged tensor that are computed again in f64 when not all are asked for.
const SAMPLED_ROWS: usize = 8;

/// What the caller decides.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Worker threads; `None` is one per core.
    pub threads: Option<usize>,
    /// Compute every row in f64, not a sample.
    pub full: bool,
    /// How the products were made.
    pub arithmetic: Arithmetic,
}

/// How the products of a merge were made.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub enum Arithmetic {
    /// Of the factors as they are.
    #[default]
    Plain,
    /// Of factors split into numbers of 16 bits ([`InstructionSet::Amx`]), whose error is allowed.
    SplitFactors,
}

/// What rounding to the output's type did to one adapter set's change of one tensor.
#[derive(Debug, Clone, Serialize)]
pub struct Rounding {
    /// The tensor.
    pub tensor: String,
    /// ‖stored − exact‖ / ‖exact − W₀‖ over the rows computed in f64.
    pub lost: f64,
    /// Share of the weights there that did not move although the exact ones do.
    pub unmoved: f64,
}

/// The outcome.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Verification {
    /// What is wrong, in the order of the checkpoint: each names a tensor or file and says how it
    /// differs. Empty: the checkpoint is proved.
    pub problems: Vec<String>,
    /// What is odd but not wrong.
    pub warnings: Vec<String>,
    /// Tensors of the base compared byte for byte, or converted.
    pub tensors_copied: usize,
    /// Tensors compared with what an adapter, or another tensor of the base, puts in their place.
    pub tensors_replaced: usize,
    /// Tensors computed again.
    pub tensors_merged: usize,
    /// Rows computed again in f64.
    pub rows_exact: u64,
    /// Elements compared in all.
    pub elements: u64,
    /// ‖stored − exact‖ / ‖exact − W₀‖ over all merged tensors.
    pub lost: f64,
    /// Share of the weights that the adapters should move and that did not.
    pub unmoved: f64,
    /// The same for each merged tensor.
    pub rounding: Vec<Rounding>,
    /// The same for each adapter, over the tensors that it changes.
    pub adapters: Vec<AdapterRounding>,
    /// The digest of each tensor that is the base's, byte for byte.
    pub untouched: Vec<Untouched>,
}

/// What rounding did to one adapter's change.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterRounding {
    /// The adapter.
    pub adapter: String,
    /// ‖stored − exact‖ / ‖w·Δ‖ with Δ this adapter's alone: near 1, what it adds drowns in rounding.
    pub lost: f64,
    /// Share of the weights it should move that are still the base's.
    pub unmoved: f64,
}

/// A tensor that no adapter changes.
#[derive(Debug, Clone, Serialize)]
pub struct Untouched {
    /// Its name in the base.
    pub tensor: String,
    /// The SHA-256 of its bytes, here and there, in hexadecimal.
    pub sha256: String,
}

/// Sums over the rows of one tensor that were computed in f64.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Change {
    rows: u64,
    error: f64,
    delta: f64,
    moving: u64,
    unmoved: u64,
    /// The part of `delta` that each adapter asks for, by its position.
    by_adapter: Vec<(usize, f64)>,
}

impl Change {
    /// Adds what one adapter asks for.
    fn add_delta(&mut self, adapter: usize, delta: f64) {
        match self.by_adapter.iter_mut().find(|(position, _)| *position == adapter) {
            Some((_, sum)) => *sum += delta,
            None => self.by_adapter.push((adapter, delta)),
        }
    }

    /// What is known of one adapter alone, as if its change were the only one.
    fn of(&self, adapter: usize) -> Self {
        match self.by_adapter.iter().find(|(position, _)| *position == adapter) {
            Some((_, delta)) => Self { delta: *delta, by_adapter: Vec::new(), ..*self },
            None => Self::default(),
        }
    }

    fn add(&mut self, other: &Self) {
        for (adapter, delta) in &other.by_adapter {
            self.add_delta(*adapter, *delta);
        }
        self.rows += other.rows;
        self.error += other.error;
        self.delta += other.delta;
        self.moving += other.moving;
        self.unmoved += other.unmoved;
    }

    fn lost(&self) -> f64 {
        if self.delta > 0.0 { (self.error / self.delta).sqrt() } else { 0.0 }
    }

    fn unmoved_share(&self) -> f64 {
        if self.moving > 0 { self.unmoved as f64 / self.moving as f64 } else { 0.0 }
    }
}

/// What was found of one tensor, which another process can be told.
#[derive(Debug, Clone, Serialize, Deserialize)]
pub struct Finding {
    /// The tensor's name in the plan.
    tensor: String,
    checked: Checked,
}

/// Verifies a merged checkpoint against the plan that should have made it. The plan's dtypes give
/// way to the checkpoint's, so that a converted one can be verified too.
///
/// # Errors
/// That a file changed meanwhile, [`Error::Io`] and [`Error::Cancelled`]; whatever is wrong with the
/// checkpoint itself is a problem in the result, not an error.
pub fn verify(
    inputs: &Inputs,
    plan: &Plan,
    merged: &Path,
    options: &Options,
    task: &Task,
) -> Result<Verification> {
    verify_opened(inputs, plan, Checkpoint::open(merged), options, task)
}

/// The same of what a session has written, before it is a model.
///
/// # Errors
/// As [`verify`], and those of the output.
pub fn verify_staged(
    session: &mut Session,
    inputs: &Inputs,
    plan: &Plan,
    options: &Options,
    task: &Task,
) -> Result<Verification> {
    session.complete(plan, task)?;
    // The base's shards, the output's as they are written, and again as they are read.
    local::allow_open(3 * plan.shards.len() + inputs.adapters.len());
    let staged = Checkpoint::open_in(session.staged(), task);
    verify_opened(inputs, plan, staged, options, task)
}

/// The same of a checkpoint of any store, or of why it could not be opened.
///
/// # Errors
/// As [`verify`].
pub fn verify_opened(
    inputs: &Inputs,
    plan: &Plan,
    merged: Result<Checkpoint>,
    options: &Options,
    task: &Task,
) -> Result<Verification> {
    let mut matched = match Matched::of(inputs, plan, merged, task)? {
        Ok(matched) => matched,
        Err(outcome) => return Ok(outcome),
    };
    consistency::check(inputs, plan, &matched.merged, &matched.known, &mut matched.outcome)?;
    inputs.base.will_read_all(task);
    matched.merged.will_read_all(task);
    let checked = check_all(inputs, plan, &matched.merged, &matched.jobs, options, task)?;
    inputs.check_unchanged()?;
    matched.merged.check_unchanged()?;
    Ok(conclude(inputs, &matched.jobs, checked, matched.outcome))
}

/// The part of a verification that has so many parts, by its number. All parts together are
/// [`verify_found`]'s.
///
/// # Errors
/// As [`verify`].
pub fn verify_part(
    inputs: &Inputs,
    plan: &Plan,
    merged: &Path,
    (part, parts): (usize, usize),
    options: &Options,
    task: &Task,
) -> Result<Vec<Finding>> {
    // What cannot be opened is told by whoever puts the parts together.
    let Ok(matched) = Matched::of(inputs, plan, Checkpoint::open(merged), task)? else {
        return Ok(Vec::new());
    };
    let total: u64 = matched.jobs.iter().map(|job| job.stored.bytes()).sum();
    let mut before = 0;
    let mut own = Vec::new();
    for job in matched.jobs {
        // A tensor belongs to the part in which it begins.
        let place = u128::from(before) * parts as u128 / u128::from(total.max(1));
        before += job.stored.bytes();
        if place.min(parts as u128 - 1) == part as u128 {
            own.push(job);
        }
    }
    let checked = check_all(inputs, plan, &matched.merged, &own, options, task)?;
    inputs.check_unchanged()?;
    matched.merged.check_unchanged()?;
    let named =
        |(job, checked): (&Job, Checked)| Finding { tensor: job.planned.name.clone(), checked };
    Ok(own.iter().zip(checked).map(named).collect())
}

/// [`verify`] with what the parts found, in their order.
///
/// # Errors
/// As [`verify`]; [`Error::Plan`] if the parts looked at other tensors.
pub fn verify_found(
    inputs: &Inputs,
    plan: &Plan,
    merged: &Path,
    found: Vec<Finding>,
    task: &Task,
) -> Result<Verification> {
    let mut matched = match Matched::of(inputs, plan, Checkpoint::open(merged), task)? {
        Ok(matched) => matched,
        Err(outcome) => return Ok(outcome),
    };
    consistency::check(inputs, plan, &matched.merged, &matched.known, &mut matched.outcome)?;
    let names = matched.jobs.iter().map(|job| &job.planned.name);
    if !names.eq(found.iter().map(|finding| &finding.tensor)) {
        let path = matched.merged.path().display();
        let problem =
            format!("{path}: changed while it was verified, or not all parts looked at the same");
        return Err(Error::Plan(vec![problem]));
    }
    let checked = found.into_iter().map(|finding| finding.checked).collect();
    inputs.check_unchanged()?;
    matched.merged.check_unchanged()?;
    Ok(conclude(inputs, &matched.jobs, checked, matched.outcome))
}

/// A merged checkpoint, its tensors beside the plan's.
struct Matched {
    merged: Checkpoint,
    jobs: Vec<Job>,
    /// Names there that belong to the plan.
    known: HashSet<String>,
    outcome: Verification,
}

impl Matched {
    /// Of an opened checkpoint; the outcome where it could not be read.
    fn of(
        inputs: &Inputs,
        plan: &Plan,
        merged: Result<Checkpoint>,
        task: &Task,
    ) -> Result<std::result::Result<Self, Verification>> {
        let mut outcome = Verification::default();
        let merged = match merged {
            Ok(merged) => merged,
            Err(error @ Error::Checkpoint { .. }) => {
                outcome.problems.push(error.to_string());
                return Ok(Err(outcome));
            }
            Err(error) => return Err(error),
        };
        outcome.warnings.extend_from_slice(merged.warnings());
        outcome.warnings.extend_from_slice(&plan.zero_updates);
        let quantized = QuantizedWeights::of(&base_as_named(inputs, plan));
        let (jobs, known) = matching::match_up(plan, &quantized, &merged, &mut outcome, task)?;
        Ok(Ok(Self { merged, jobs, known, outcome }))
    }
}

/// Looks at tensors, on all threads.
fn check_all(
    inputs: &Inputs,
    plan: &Plan,
    merged: &Checkpoint,
    jobs: &[Job],
    options: &Options,
    task: &Task,
) -> Result<Vec<Checked>> {
    let pool = task::build_pool(options.threads)?;
    task.expect(jobs.iter().map(|job| job.stored.bytes()).sum());
    let set = match options.arithmetic {
        Arithmetic::Plain => None,
        Arithmetic::SplitFactors => InstructionSet::amx(),
    };
    let set = set.unwrap_or_else(InstructionSet::detect);
    let checker = Checker {
        merged,
        computer: Computer { inputs, set, task },
        full: options.full,
        tolerance: Tolerance {
            peft: plan.options.compat == Some(Compat::Peft),
            arithmetic: options.arithmetic,
        },
        quantized: QuantizedWeights::of(merged),
    };
    let next = AtomicUsize::new(0);
    let results: Vec<_> = jobs.iter().map(|_| Mutex::new(None)).collect();
    pool.broadcast(|_| {
        let mut buffers = (Buffers::default(), Vec::new());
        loop {
            let position = next.fetch_add(1, Ordering::Relaxed);
            let Some(job) = jobs.get(position) else { break };
            let result = task.check().and_then(|()| checker.check(job, &mut buffers));
            if result.is_err() {
                next.store(jobs.len(), Ordering::Relaxed);
            }
            *lock(&results[position]) = Some(result);
        }
    });
    results.iter().filter_map(|result| lock(result).take()).collect()
}

/// The outcome of what was found of all tensors.
fn conclude(
    inputs: &Inputs,
    jobs: &[Job],
    checked: Vec<Checked>,
    mut outcome: Verification,
) -> Verification {
    let mut total = Change::default();
    let mut of_adapters = vec![Change::default(); inputs.adapters.len()];
    for (job, Checked { problem, change, sha256 }) in jobs.iter().zip(checked) {
        outcome.problems.extend(problem);
        outcome.elements += job.planned.source.elements();
        match job.planned.action {
            Action::Merge(_) | Action::MergeEntries(_) => {
                outcome.tensors_merged += 1;
                outcome.rows_exact += change.rows;
                total.add(&change);
                for (position, of_adapter) in of_adapters.iter_mut().enumerate() {
                    of_adapter.add(&change.of(position));
                }
                outcome.rounding.push(Rounding {
                    tensor: job.planned.name.clone(),
                    lost: change.lost(),
                    unmoved: change.unmoved_share(),
                });
            }
            // Held against the base with the weight that it belongs to.
            Action::Rescale => {}
            Action::Copy | Action::Cast if replaces(&job.planned) => outcome.tensors_replaced += 1,
            Action::Copy | Action::Cast => {
                outcome.tensors_copied += 1;
                let tensor = job.planned.name.clone();
                outcome.untouched.extend(sha256.map(|sha256| Untouched { tensor, sha256 }));
            }
        }
    }
    outcome.lost = total.lost();
    outcome.unmoved = total.unmoved_share();
    for (adapter, change) in inputs.adapters.iter().zip(of_adapters) {
        let rounding = AdapterRounding {
            adapter: adapter.path().display().to_string(),
            lost: change.lost(),
            unmoved: change.unmoved_share(),
        };
        if rounding.lost >= LOST_IN_ROUNDING {
            outcome.warnings.push(format!(
                "rounding took away {:.0} % of what {} changes, and {:.0} % of the weights that \
                 should move did not; merge into a wider dtype (float32) to keep it",
                100.0 * rounding.lost.min(1.0),
                rounding.adapter,
                100.0 * rounding.unmoved
            ));
        }
        outcome.adapters.push(rounding);
    }
    shorten_all(outcome.problems.iter_mut().chain(&mut outcome.warnings));
    outcome
}

/// A thread's memory: for what is computed again, and for what is stored.
type Room = (Buffers, Vec<u8>);

/// A tensor of the merged checkpoint.
#[derive(Clone, Copy)]
struct Merged<'a> {
    file: &'a TensorFile,
    tensor: &'a TensorInfo,
}

impl Merged<'_> {
    /// Some of its bytes, in a buffer that grows as needed.
    fn read<'b>(&self, bytes: Range<usize>, buffer: &'b mut Vec<u8>) -> Result<&'b [u8]> {
        if buffer.len() < bytes.len() {
            buffer.resize(bytes.len(), 0);
        }
        let buffer = &mut buffer[..bytes.len()];
        self.file.read_into(self.tensor, bytes.start as u64, buffer)?;
        Ok(buffer)
    }
}

struct Checker<'a> {
    merged: &'a Checkpoint,
    computer: Computer<'a>,
    full: bool,
    tolerance: Tolerance,
    /// The merged checkpoint's quantised weights.
    quantized: QuantizedWeights,
}

/// What was found of one tensor.
#[derive(Debug, Clone, Default, Serialize, Deserialize)]
struct Checked {
    /// The first thing that is wrong.
    problem: Option<String>,
    /// What rounding did.
    change: Change,
    /// The digest of what is the base's, byte for byte.
    sha256: Option<String>,
}

impl Checker<'_> {
    fn check(&self, job: &Job, room: &mut Room) -> Result<Checked> {
        let Job { planned, location, stored } = job;
        let file = &self.merged.shards()[location.shard].file;
        match self.compare(planned, Merged { file, tensor: stored }, room) {
            // The recomputation itself overflowed: then so did the merge.
            Err(Error::Numeric { message, .. }) => {
                let problem = Some(format!("tensor {}: {message}", planned.name));
                Ok(Checked { problem, ..Checked::default() })
            }
            other => other,
        }
    }

    fn compare(
        &self,
        planned: &PlannedTensor,
        merged: Merged<'_>,
        room: &mut Room,
    ) -> Result<Checked> {
        let (buffers, stored) = room;
        let task = self.computer.task;
        let size = planned.output_dtype.bits().unwrap_or(8).div_ceil(8) as usize;
        let complain = |element: usize, text: &str| {
            let columns = planned.matrix().1.max(1);
            let (row, column) = (element / columns, element % columns);
            Some(format!("tensor {}: row {row}, column {column}: {text}", planned.name))
        };
        let mut problem = None;
        match &planned.action {
            Action::Copy => {
                let mut hasher = Sha256::new();
                let length = merged.tensor.bytes() as usize;
                for start in (0..length).step_by(queue::TILE_BYTES) {
                    task.check()?;
                    let stored =
                        merged.read(start..length.min(start + queue::TILE_BYTES), stored)?;
                    let buffer = buffers.stored(stored.len());
                    self.computer.read(planned, buffer, start)?;
                    task.advance(stored.len() as u64);
                    hasher.update(stored);
                    if let Some(byte) = first_difference(buffer, stored) {
                        let text = match planned.change() {
                            PlannedChange::Replace => "is not what the adapter puts in its place",
                            PlannedChange::Repeat => "is not the base's tensor that it repeats",
                            _ => "differs from the base, though no adapter changes this tensor",
                        };
                        problem = complain((start + byte) / size, text);
                        break;
                    }
                }
                let same = problem.is_none().then(|| hexadecimal(&hasher.finalize()));
                Ok(Checked { problem, sha256: same, ..Checked::default() })
            }
            Action::Cast => {
                let unit = (queue::TILE_BYTES / 8) as u64;
                for start in (0..planned.source.elements()).step_by(unit as usize) {
                    task.check()?;
                    let elements = start..planned.source.elements().min(start + unit);
                    let expected = self.computer.cast(planned, &elements, buffers)?;
                    let first = start as usize * size;
                    let stored = merged.read(first..first + expected.len(), stored)?;
                    task.advance(stored.len() as u64);
                    if let Some(byte) = first_difference(expected, stored) {
                        let text = match planned.change() {
                            PlannedChange::Replace => "is not the adapter's value converted",
                            _ => "is not the base's value converted",
                        };
                        problem = complain(start as usize + byte / size, text);
                        break;
                    }
                }
                Ok(Checked { problem, ..Checked::default() })
            }
            Action::Rescale => Ok(Checked::default()),
            Action::Merge(_) | Action::MergeEntries(_) if planned.requantized => {
                self.compare_requantized(planned, merged, room)
            }
            Action::Merge(_) | Action::MergeEntries(_) => {
                self.compare_merged(planned, merged, room)
            }
        }
    }

    fn compare_merged(
        &self,
        planned: &PlannedTensor,
        merged: Merged<'_>,
        (buffers, stored): &mut Room,
    ) -> Result<Checked> {
        let (rows, columns) = planned.matrix();
        let row_bytes = columns * planned.output_dtype.size();
        let prepared = self.computer.prepare(planned)?;
        let mut exact = ExactRow::new(self.computer, planned, &prepared, self.tolerance)?;
        let mut change = Change::default();
        let sample = sample_rows(&planned.name, rows);
        for tile in queue::tiles(planned) {
            self.computer.task.check()?;
            let start = tile.start;
            // Once: what lies in a store is not asked for again for the rows below.
            let read = exact.read_tile(&tile)?;
            let given = (Some(read), None);
            let computed = self.computer.merge_read(planned, &prepared, &tile, buffers, given)?;
            let tile_bytes = merged.read(start * row_bytes..tile.end * row_bytes, stored)?;
            self.computer.task.advance(tile_bytes.len() as u64);
            if planned.precision == Precision::Exact
                && let Some(byte) = first_difference(computed, tile_bytes)
            {
                let size = planned.output_dtype.size();
                let element = byte / size;
                let value = |bytes: &[u8]| {
                    widen_f64(&planned.output_dtype, &bytes[element * size..][..size])[0]
                };
                let (is, right) = (value(tile_bytes), value(computed));
                let (row, column) = (start + element / columns, element % columns);
                let problem = format!(
                    "tensor {}: row {row}, column {column}: is {is:e} instead of {right:e}, to which the \
                     exact sum is rounded",
                    planned.name
                );
                return Ok(Checked { problem: Some(problem), change, sha256: None });
            }
            // Rows that are not what the kernels make are held against the exact value.
            let differing = tile.clone().filter(|row| {
                let range = (row - start) * row_bytes..(row - start + 1) * row_bytes;
                computed[range.clone()] != tile_bytes[range]
            });
            let mut wanted: Vec<usize> = differing.collect();
            wanted.extend(tile.filter(|row| self.full || sample.contains(row)));
            wanted.sort_unstable();
            wanted.dedup();
            for row in wanted {
                let range = (row - start) * row_bytes..(row - start + 1) * row_bytes;
                let stored = widen_f64(&planned.output_dtype, &tile_bytes[range]);
                let rounding = |_, exact| half_ulp(&planned.output_dtype, exact);
                match exact.compare(row, &stored, &rounding)? {
                    Ok(row_change) => change.add(&row_change),
                    Err((column, text)) => {
                        let name = &planned.name;
                        let problem = format!("tensor {name}: row {row}, column {column}: {text}");
                        return Ok(Checked { problem: Some(problem), change, sha256: None });
                    }
                }
            }
        }
        Ok(Checked { change, ..Checked::default() })
    }
}

/// Whether something else than the base's tensor of that name stands in its place.
fn replaces(planned: &PlannedTensor) -> bool {
    matches!(planned.change(), PlannedChange::Replace | PlannedChange::Repeat)
}

fn first_difference(left: &[u8], right: &[u8]) -> Option<usize> {
    if left == right {
        return None;
    }
    left.iter().zip(right).position(|(left, right)| left != right)
}

/// Rows spread over the tensor, the first and the last among them, seeded by its name so that two
/// runs look at the same ones.
fn sample_rows(name: &str, rows: usize) -> Vec<usize> {
    let mut state = name.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |state, byte| {
        (state ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    let mut sample = vec![0, rows.saturating_sub(1)];
    while sample.len() < SAMPLED_ROWS {
        state =
            state.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1_442_695_040_888_963_407);
        sample.push((state >> 33) as usize % rows.max(1));
    }
    sample
}

#[cfg(test)]
mod tests;
