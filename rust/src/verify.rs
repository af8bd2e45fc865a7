//! Proof that a merged checkpoint is what base and adapters make, whoever merged them.
//!
//! Untouched tensors are compared byte for byte. Merged ones are computed again: by the kernels,
//! every element, and, for a seeded sample of rows (or all of them), in f64 as well. A stored
//! value passes if it lies within half a unit in the last place of its type around the exact one,
//! widened by the bound on a chain of f32 additions: |error| ≤ γ·Σ|terms| with γ = n·2⁻²⁴ (Higham,
//! «Accuracy and Stability of Numerical Algorithms», 2nd ed., §3.1). So any correct order of
//! summation passes, and a doubled scale or a flipped bit does not.

mod exact;

use std::path::Path;
use std::sync::Mutex;
use std::sync::atomic::{AtomicUsize, Ordering};

use serde::Serialize;
use serde_json::Value;

use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::execute::compute::{Buffers, Computer, lock};
use crate::execute::queue;
use crate::kernel::InstructionSet;
use crate::kernel::convert::widen_f64;
use crate::plan::{Action, Inputs, Plan, PlannedTensor};
use crate::safetensors::TensorInfo;
use crate::task::{self, Task};
use crate::writer;

use exact::ExactRow;

/// Rows of each merged tensor that are computed again in f64 when not all are asked for.
const SAMPLED_ROWS: usize = 8;
/// A delta counts as mostly lost when rounding takes away at least this share of it.
const LOST: f64 = 0.5;

/// What the caller decides.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Worker threads; `None` is one per core.
    pub threads: Option<usize>,
    /// Compute every row in f64, not a sample.
    pub full: bool,
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
    /// Tensors compared byte for byte.
    pub tensors_copied: usize,
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
}

/// Sums over the rows of one tensor that were computed in f64.
#[derive(Debug, Clone, Copy, Default)]
struct Change {
    rows: u64,
    error: f64,
    delta: f64,
    moving: u64,
    unmoved: u64,
}

impl Change {
    fn add(&mut self, other: Self) {
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

/// Verifies a merged checkpoint against the plan that should have made it. The plan's dtypes give
/// way to the checkpoint's, so that a converted one can be verified too.
///
/// # Errors
/// [`Error::Io`] and [`Error::Cancelled`]; whatever is wrong with the checkpoint itself is a
/// problem in the result, not an error.
pub fn verify(
    inputs: &Inputs,
    plan: &Plan,
    merged: &Path,
    options: &Options,
    task: &Task,
) -> Result<Verification> {
    let mut outcome = Verification::default();
    let merged = match Checkpoint::open(merged) {
        Ok(merged) => merged,
        Err(error @ Error::Checkpoint { .. }) => {
            outcome.problems.push(error.to_string());
            return Ok(outcome);
        }
        Err(error) => return Err(error),
    };
    outcome.warnings.extend_from_slice(merged.warnings());
    let mut jobs = Vec::new();
    let mut names = Vec::new();
    for (_, planned) in plan.tensors() {
        names.push(planned.name.as_str());
        match match_up(planned, &merged) {
            Ok((planned, stored)) => jobs.push(Job { planned, stored }),
            Err(problem) => outcome.problems.push(problem),
        }
    }
    check_extra(&merged, &names, &mut outcome);
    check_index(&merged, &mut outcome);
    check_config(inputs, plan, &merged, &mut outcome);
    let pool = task::build_pool(options.threads)?;
    task.expect(jobs.iter().map(|job| job.stored.bytes()).sum());
    let checker = Checker {
        merged: &merged,
        computer: Computer { inputs, set: InstructionSet::detect(), task },
        full: options.full,
    };
    let next = AtomicUsize::new(0);
    let results: Vec<_> = jobs.iter().map(|_| Mutex::new(None)).collect();
    pool.broadcast(|_| {
        let mut buffers = Buffers::default();
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
    let mut total = Change::default();
    for (job, result) in jobs.iter().zip(results) {
        let Some(result) = lock(&result).take() else { continue };
        let (problem, change) = result?;
        outcome.problems.extend(problem);
        outcome.elements += job.planned.source.elements();
        match job.planned.action {
            Action::Merge(_) => {
                outcome.tensors_merged += 1;
                outcome.rows_exact += change.rows;
                total.add(change);
                outcome.rounding.push(Rounding {
                    tensor: job.planned.name.clone(),
                    lost: change.lost(),
                    unmoved: change.unmoved_share(),
                });
            }
            Action::Copy | Action::Cast => outcome.tensors_copied += 1,
        }
    }
    outcome.lost = total.lost();
    outcome.unmoved = total.unmoved_share();
    if outcome.lost >= LOST {
        outcome.warnings.push(format!(
            "rounding took away {:.0} % of the adapters' change, and {:.0} % of the weights that \
             should move did not; merge into a wider dtype (float32) to keep it",
            100.0 * outcome.lost,
            100.0 * outcome.unmoved
        ));
    }
    Ok(outcome)
}

/// One tensor: what it should be, and what is stored.
struct Job {
    planned: PlannedTensor,
    stored: TensorInfo,
}

/// Finds a planned tensor in the merged checkpoint, and gives the plan the dtype that is there.
fn match_up(
    planned: &PlannedTensor,
    merged: &Checkpoint,
) -> Result<(PlannedTensor, TensorInfo), String> {
    let name = &planned.name;
    let Some(stored) = merged.tensor(name) else {
        return Err(format!("tensor {name} is missing"));
    };
    if stored.shape != planned.source.shape {
        return Err(format!(
            "tensor {name} has shape {:?} instead of {:?}",
            stored.shape, planned.source.shape
        ));
    }
    let mut planned = planned.clone();
    if stored.dtype != planned.output_dtype {
        if !(stored.dtype.is_mergeable() && planned.output_dtype.is_mergeable()) {
            return Err(format!(
                "tensor {name} is stored as {} instead of {}",
                stored.dtype, planned.output_dtype
            ));
        }
        planned.output_dtype = stored.dtype.clone();
        planned.action = match planned.action {
            Action::Merge(updates) => Action::Merge(updates),
            _ if planned.output_dtype == planned.source.dtype => Action::Copy,
            _ => Action::Cast,
        };
    }
    Ok((planned, stored.clone()))
}

/// Tensors that the merge does not make: a head written out beside the embeddings that it is tied
/// to is only odd, if it equals them; anything else is wrong.
fn check_extra(merged: &Checkpoint, names: &[&str], outcome: &mut Verification) {
    for name in merged.tensors().keys().filter(|name| !names.contains(&name.as_str())) {
        if name.ends_with("lm_head.weight") && merged.ties_embeddings() {
            continue;
        }
        outcome.problems.push(format!("tensor {name} is in neither the base nor the adapters"));
    }
    if !merged.ties_embeddings() {
        return;
    }
    let find = |ending: &str| merged.tensors().iter().find(|(name, _)| name.ends_with(ending));
    let embedding = find("embed_tokens.weight").or_else(|| find("wte.weight"));
    if let (Some((head, at_head)), Some((embedding, at_embedding))) =
        (find("lm_head.weight"), embedding)
    {
        let bytes = |location: &crate::checkpoint::Location| {
            merged.shards()[location.shard].file.tensor_bytes(merged.at(*location))
        };
        if bytes(at_head) != bytes(at_embedding) {
            outcome.problems.push(format!(
                "tensor {head} differs from {embedding}, to which config.json ties it; \
                 one of the two is stale"
            ));
        }
    }
}

/// The index's own arithmetic; opening has held its names against the shards.
fn check_index(merged: &Checkpoint, outcome: &mut Verification) {
    let Some(index) = merged.index() else { return };
    let size: u64 = merged.tensors().values().map(|location| merged.at(*location).bytes()).sum();
    let claimed = index.content.get("metadata").and_then(|metadata| metadata.get("total_size"));
    match claimed.and_then(Value::as_f64) {
        Some(claimed) if claimed == size as f64 => {}
        Some(claimed) => outcome.problems.push(format!(
            "{}: total_size is {claimed}, but the tensors have {size} bytes",
            index.file_name
        )),
        None => outcome.warnings.push(format!("{}: has no total_size", index.file_name)),
    }
}

/// The config's entries that depend on the merge.
fn check_config(inputs: &Inputs, plan: &Plan, merged: &Checkpoint, outcome: &mut Verification) {
    let Some(config) = merged.config() else {
        if inputs.base.config().is_some() {
            outcome.problems.push("config.json is missing".into());
        }
        return;
    };
    let rows = |name: &str| {
        let tensor = merged.tensors().keys().find(|other| other.ends_with(name));
        tensor.and_then(|name| merged.tensor(name)).and_then(|tensor| tensor.shape.first().copied())
    };
    let tokens = config.get("vocab_size").and_then(Value::as_u64);
    let embedded = rows("embed_tokens.weight").or_else(|| rows("wte.weight"));
    if let (Some(tokens), Some(vocabulary)) = (tokens, plan.config_changes.vocabulary)
        && (tokens != vocabulary || embedded.is_some_and(|embedded| embedded != tokens))
    {
        outcome.problems.push(format!(
            "config.json: vocab_size is {tokens}, but the embeddings have {vocabulary} tokens"
        ));
    }
    let counts = || writer::LAYER_COUNTS.iter().find_map(|name| config.get(*name)?.as_u64());
    if let (Some(layers), Some(count)) = (&plan.config_changes.layers, counts())
        && count != layers.order.len() as u64
    {
        outcome.problems.push(format!(
            "config.json: counts {count} layers, but the adapter makes them {}",
            layers.order.len()
        ));
    }
    if plan.config_changes.tied == Some(false) && merged.ties_embeddings() {
        outcome.problems.push(
            "config.json: ties the output head to the embeddings, but the adapter made them differ"
                .into(),
        );
    }
}

struct Checker<'a> {
    merged: &'a Checkpoint,
    computer: Computer<'a>,
    full: bool,
}

impl Checker<'_> {
    /// The first problem of a tensor, and what rounding did to it.
    fn check(&self, job: &Job, buffers: &mut Buffers) -> Result<(Option<String>, Change)> {
        let Job { planned, stored } = job;
        let location = self.merged.tensors()[&planned.name];
        let bytes = self.merged.shards()[location.shard].file.tensor_bytes(stored);
        match self.compare(planned, bytes, buffers) {
            // The recomputation itself overflowed: then so did the merge.
            Err(Error::Numeric { message, .. }) => {
                Ok((Some(format!("tensor {}: {message}", planned.name)), Change::default()))
            }
            other => other,
        }
    }

    fn compare(
        &self,
        planned: &PlannedTensor,
        stored: &[u8],
        buffers: &mut Buffers,
    ) -> Result<(Option<String>, Change)> {
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
                for start in (0..stored.len()).step_by(queue::TILE_BYTES) {
                    task.check()?;
                    let stored = &stored[start..stored.len().min(start + queue::TILE_BYTES)];
                    let buffer = buffers.stored(stored.len());
                    self.computer.read(planned, buffer, start)?;
                    task.advance(stored.len() as u64);
                    if let Some(byte) = first_difference(buffer, stored) {
                        let text = "differs from the base, though no adapter changes this tensor";
                        problem = complain((start + byte) / size, text);
                        break;
                    }
                }
                Ok((problem, Change::default()))
            }
            Action::Cast => {
                let unit = (queue::TILE_BYTES / 8) as u64;
                for start in (0..planned.source.elements()).step_by(unit as usize) {
                    task.check()?;
                    let elements = start..planned.source.elements().min(start + unit);
                    let expected = self.computer.cast(planned, &elements, buffers)?;
                    let stored = &stored[start as usize * size..][..expected.len()];
                    task.advance(stored.len() as u64);
                    if let Some(byte) = first_difference(expected, stored) {
                        let text = "is not the base's value converted";
                        problem = complain(start as usize + byte / size, text);
                        break;
                    }
                }
                Ok((problem, Change::default()))
            }
            Action::Merge(_) => self.compare_merged(planned, stored, buffers),
        }
    }

    fn compare_merged(
        &self,
        planned: &PlannedTensor,
        stored: &[u8],
        buffers: &mut Buffers,
    ) -> Result<(Option<String>, Change)> {
        let (rows, columns) = planned.matrix();
        let row_bytes = columns * planned.output_dtype.size();
        let prepared = self.computer.prepare(planned)?;
        let mut exact = ExactRow::new(self.computer, planned)?;
        let mut change = Change::default();
        let sample = sample_rows(&planned.name, rows);
        for tile in queue::tiles(planned) {
            self.computer.task.check()?;
            let start = tile.start;
            let computed = self.computer.merge(planned, &prepared, &tile, buffers)?;
            let tile_bytes = &stored[tile.start * row_bytes..tile.end * row_bytes];
            self.computer.task.advance(tile_bytes.len() as u64);
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
                let stored = &stored[row * row_bytes..(row + 1) * row_bytes];
                let stored = widen_f64(&planned.output_dtype, stored);
                match exact.compare(row, &stored)? {
                    Ok(row_change) => change.add(row_change),
                    Err((column, text)) => {
                        let name = &planned.name;
                        let problem = format!("tensor {name}: row {row}, column {column}: {text}");
                        return Ok((Some(problem), change));
                    }
                }
            }
        }
        Ok((None, change))
    }
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
