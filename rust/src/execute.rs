//! The CPU's executor: carries a plan out, tile by tile, on an owned pool of threads.
//!
//! A tile is a block of rows that fits a core's second-level cache. It is read into a thread's
//! buffer, updated in place, and written to its final offset. What does not change is copied
//! inside the kernel. Memory is threads × buffers and the factors of the tensors in work.

mod accumulator;
pub(crate) mod compute;
pub(crate) mod entries;
mod exact;
pub mod operands;
pub mod parts;
pub(crate) mod queue;
pub mod recipes;
pub(crate) mod requantize;
pub(crate) mod residual;
pub(crate) mod rewrite;
pub mod rounding;
pub mod session;
pub(crate) mod tile;
pub mod view;

use std::collections::HashMap;
use std::ops::Range;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, PoisonError};

use indexmap::IndexMap;
use serde::de::Error as _;
use serde::{Deserialize, Deserializer, Serialize};

use crate::error::{Error, Result};
use crate::kernel::{InstructionSet, Recomputed};
use crate::parallel::task::Task;
use crate::plan::{Action, Inputs, Origin, Plan, PlannedTensor};
use crate::storage::directory::LocalDirectory;
use crate::storage::local::CopyError;
use crate::storage::sink::{Destination, OutputLock, Sink};

use compute::{Buffers, Computer, Slot, lock};
use queue::{Work, WorkQueues};
use recipes::Recipes;
use requantize::Requantizing;
use rounding::{RoundingLoss, RoundingSums};
use session::{Session, WorkFilter};
use tile::Selections;

/// What the caller decides about the execution. As plain data, see [`crate::plan::Options`].
#[derive(Debug, Clone, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub struct Options {
    /// Worker threads; `None` is one per core.
    pub threads: Option<usize>,
    /// Whether a non-empty output may be replaced.
    pub overwrite: bool,
    /// Whether to wait until the output has reached the disk. Without, as in copying, what a loss
    /// of power within the next minute leaves is no whole model.
    pub sync: bool,
    /// The kernels' instructions; `None` is the best there is.
    #[serde(deserialize_with = "instruction_set")]
    pub instruction_set: Option<InstructionSet>,
    /// The card of the output; the base's, where it has one, is then kept beside it.
    pub card: Option<String>,
    /// Shards of a model in the output, which are kept where they would become the same again; `None`
    /// where nobody asks for recipes.
    pub recipes: Option<Recipes>,
    /// Whether the summary has the SHA-256 of every shard.
    pub shard_digests: bool,
    /// Models that are read beside the base, and must not be written over either.
    #[serde(skip)]
    pub protected: Vec<PathBuf>,
    /// Whether shards that are written apart become the output's own files, rather than copies.
    #[serde(skip)]
    pub adopts: bool,
}

impl Default for Options {
    fn default() -> Self {
        Self {
            threads: None,
            overwrite: false,
            sync: true,
            instruction_set: None,
            card: None,
            recipes: None,
            shard_digests: false,
            protected: Vec::new(),
            adopts: false,
        }
    }
}

fn instruction_set<'de, D: Deserializer<'de>>(
    source: D,
) -> std::result::Result<Option<InstructionSet>, D::Error> {
    let name = Option::<String>::deserialize(source)?;
    name.map(|name| InstructionSet::from_name(&name)).transpose().map_err(D::Error::custom)
}

/// What was done.
#[derive(Debug, Clone, Serialize)]
pub struct Summary {
    /// Bytes of the shards.
    pub bytes_written: u64,
    /// Wall-clock seconds from the first check to the last rename.
    pub seconds: f64,
    /// Worker threads.
    pub threads: usize,
    /// The kernels' instructions.
    pub instruction_set: InstructionSet,
    /// SHA-256 of each adapter's weights.
    pub adapter_sha256: Vec<String>,
    /// SHA-256 of the header of each of the base's shards.
    pub base_header_sha256: Vec<String>,
    /// Files carried over beside the weights.
    pub side_files: Vec<String>,
    /// Where each of them comes from, by its name.
    pub file_origins: IndexMap<String, String>,
    /// What lies in the base's directory and was not carried over, folders with a slash.
    pub left_out: Vec<String>,
    /// What rounding took away of what the adapters change, where merged weights of the output have fewer
    /// than 32 bits.
    pub rounding: Option<RoundingLoss>,
    /// What had to be computed again, where weights are real numbers that are rounded once.
    pub recomputed: Option<Recomputed>,
    /// The SHA-256 of every shard, where that was asked for.
    pub shard_sha256: Option<IndexMap<String, String>>,
    /// Of each shard what it was made from, where that was asked for.
    pub recipes: Recipes,
    /// The shards that were there already.
    pub kept: Vec<String>,
    /// What went wrong after the output was complete, and what stays in it beside the model.
    pub warnings: Vec<String>,
}

/// Carries out a plan into a directory, which becomes a model at the end or not at all.
///
/// # Errors
/// [`Error::Output`] if the output may not or cannot be written, [`Error::Numeric`] if the result
/// leaves the range of its type, [`Error::Io`], [`Error::Cancelled`]; the output is then as it was.
pub fn execute(
    inputs: &Inputs,
    plan: &Plan,
    output: &Path,
    options: &Options,
    task: &Task,
) -> Result<Summary> {
    let output = LocalDirectory(output.to_path_buf());
    let (mut summary, lock) = execute_into(inputs, plan, &output, options, task)?;
    summary.warnings.extend(lock.release());
    Ok(summary)
}

/// The same into any destination, which is still locked afterwards.
///
/// # Errors
/// Those of [`execute`].
pub fn execute_into(
    inputs: &Inputs,
    plan: &Plan,
    output: &dyn Destination,
    options: &Options,
    task: &Task,
) -> Result<(Summary, OutputLock)> {
    let session = Session::begin(inputs, plan, output, options, task)?;
    session.run(inputs, plan, &WorkFilter::All, task)?;
    session.finish(inputs, plan, task)
}

/// Where the shards are written.
struct Output<'a> {
    directory: &'a Path,
    /// A file for each of the plan's shards.
    files: &'a [Box<dyn Sink>],
    /// Whether what is written has to have reached the disk in the end.
    sync: bool,
    /// Shards that are there already.
    kept: &'a [bool],
}

struct Job<'a> {
    inputs: &'a Inputs,
    plan: &'a Plan,
    output: Output<'a>,
    computer: Computer<'a>,
    task: &'a Task,
    queues: WorkQueues,
    slots: Vec<Slot>,
    /// Units of work left for each shard, so that the last one syncs it.
    remaining: Vec<AtomicUsize>,
    digests: Vec<Mutex<Option<String>>>,
    /// What rounding takes away, of each shard.
    rounding: Vec<Mutex<RoundingSums>>,
    /// What exact sums had to compute again.
    recomputed: Mutex<Recomputed>,
    /// What entry-wise methods found out of tensors that they merge, by shard and position.
    selections: Mutex<HashMap<(usize, usize), Arc<Selections>>>,
    /// The tensors of which that has to be found out.
    unknown: Vec<(usize, usize)>,
    /// What is known so far of tensors that are quantised again, by shard and position.
    requantizing: HashMap<(usize, usize), Requantizing>,
}

impl<'a> Job<'a> {
    fn new(
        inputs: &'a Inputs,
        plan: &'a Plan,
        output: Output<'a>,
        set: InstructionSet,
        task: &'a Task,
        filter: &WorkFilter,
    ) -> Self {
        // Those of a part's adapters are the whole's.
        let digested =
            if matches!(filter, WorkFilter::Only(_)) { 0..0 } else { 0..inputs.adapters.len() };
        Self::with_digests(inputs, plan, output, (set, task), filter, digested)
    }

    /// A job that does not read the adapters' whole content.
    fn without_digests(
        inputs: &'a Inputs,
        plan: &'a Plan,
        output: Output<'a>,
        set: InstructionSet,
        task: &'a Task,
        filter: &WorkFilter,
    ) -> Self {
        Self::with_digests(inputs, plan, output, (set, task), filter, 0..0)
    }

    fn with_digests(
        inputs: &'a Inputs,
        plan: &'a Plan,
        output: Output<'a>,
        (set, task): (InstructionSet, &'a Task),
        filter: &WorkFilter,
        digested: Range<usize>,
    ) -> Self {
        let mut tiles = Vec::new();
        let mut queues: Vec<_> = (plan.shards.iter().enumerate())
            .map(|(position, shard)| queue::queue_of(inputs, position, shard, &mut tiles))
            .collect();
        for (position, is_written) in written_before(plan, output.files).into_iter().enumerate() {
            if is_written {
                task.advance(plan.shards[position].bytes());
                queues[position].clear();
            }
        }
        let is_kept = |shard: usize| output.kept.get(shard).is_some_and(|kept| *kept);
        for (shard, queue) in queues.iter_mut().enumerate() {
            queue.retain(|work| !is_kept(shard) && filter.takes(work));
        }
        queue::tell_sources(inputs, plan, &queues, task);
        let mut unknown: Vec<_> =
            queues.iter().flatten().filter_map(|work| work.merged()).collect();
        unknown.dedup();
        unknown.retain(|(shard, tensor)| {
            let action = &plan.shards[*shard].tensors[*tensor].action;
            matches!(action, Action::MergeEntries(merge) if merge.needs_passes())
        });
        let slots = tiles.into_iter().map(Slot::new).collect();
        let computer = Computer { inputs, set, task };
        let mut remaining: Vec<_> = queues.iter().map(Vec::len).collect();
        let mut requantizing = requantize::all(plan);
        requantizing.retain(|(shard, _), _| !is_kept(*shard));
        if let WorkFilter::Only(ids) = filter {
            requantizing.retain(|id, _| ids.contains(id));
        }
        requantizing.retain(|(shard, _), _| !queues[*shard].is_empty());
        for (shard, _) in requantizing.values().flat_map(|tensor| &tensor.scales) {
            remaining[*shard] += 1;
        }
        let remaining = remaining.into_iter().map(AtomicUsize::new).collect();
        // The digests have a queue of their own in front: long units, which must not come last.
        let digests = digested.map(|adapter| Work::Digest { adapter }).collect();
        let queues = WorkQueues::new(std::iter::once(digests).chain(queues).collect());
        let digests = inputs.adapters.iter().map(|_| Mutex::new(None)).collect();
        Self {
            inputs,
            plan,
            output,
            computer,
            task,
            queues,
            slots,
            remaining,
            digests,
            rounding: plan.shards.iter().map(|_| Mutex::default()).collect(),
            recomputed: Mutex::default(),
            selections: Mutex::default(),
            unknown,
            requantizing,
        }
    }

    /// Runs all work on the pool; the first error stops it.
    fn run(&self, pool: &rayon::ThreadPool) -> Result<()> {
        // Shards without tensors have no work that would sync them at its end.
        for (shard, remaining) in self.remaining.iter().enumerate() {
            if remaining.load(Ordering::Relaxed) == 0 {
                self.sync(shard)?;
            }
        }
        let failure = Mutex::new(None);
        // A tensor's tiles wait for each other in this; so whole tensors are shared out before.
        let next = AtomicUsize::new(0);
        pool.broadcast(|_| {
            while let Some(id) = self.unknown.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) = self.task.check().and_then(|()| self.find_out(*id)) {
                    *lock(&failure) = Some(error);
                    next.store(self.unknown.len(), Ordering::Relaxed);
                    self.queues.stop();
                }
            }
        });
        pool.broadcast(|_| {
            let mut buffers = Buffers::default();
            let mut queue = None;
            while let Some(work) = self.queues.take(&mut queue) {
                if let Err(error) =
                    self.task.check().and_then(|()| self.carry_out(work, &mut buffers))
                {
                    let mut failure = lock(&failure);
                    // A thread that another one's error stopped only says that it was.
                    if matches!(*failure, None | Some(Error::Cancelled)) {
                        *failure = Some(error);
                    }
                    self.queues.stop();
                }
            }
            lock(&self.recomputed).add(buffers.recomputed);
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
    }

    /// Finds out what an entry-wise method has to know of a whole tensor.
    fn find_out(&self, (shard, tensor): (usize, usize)) -> Result<()> {
        let found = self.computer.prepare(self.tensor(shard, tensor).0)?.selections();
        lock(&self.selections).insert((shard, tensor), Arc::new(found));
        Ok(())
    }

    /// What rounding took away from a shard.
    fn rounding_of(&self, shard: usize) -> RoundingSums {
        *lock(&self.rounding[shard])
    }

    fn rounding(&self) -> Vec<RoundingSums> {
        self.rounding.iter().map(|sums| *lock(sums)).collect()
    }

    fn recomputed(&self) -> Recomputed {
        *lock(&self.recomputed)
    }

    fn digests(&self) -> Result<Vec<String>> {
        Ok(self.digests.iter().map(|digest| lock(digest).take().unwrap_or_default()).collect())
    }

    fn carry_out(&self, work: &Work, buffers: &mut Buffers) -> Result<()> {
        let shard = match work {
            Work::Digest { adapter } => {
                *lock(&self.digests[*adapter]) = Some(self.inputs.adapters[*adapter].sha256()?);
                return Ok(());
            }
            Work::Copy { shard, source, target } => {
                self.copy(*shard, source, *target, buffers)?;
                *shard
            }
            Work::CopyFromAdapter { shard, tensor } => {
                self.copy_from_adapter(*shard, *tensor, buffers)?;
                *shard
            }
            Work::Cast { shard, tensor, elements } => {
                self.cast(*shard, *tensor, elements, buffers)?;
                *shard
            }
            Work::Merge { shard, tensor, rows, slot } => {
                self.merge(*shard, *tensor, rows, *slot, buffers)?;
                *shard
            }
        };
        self.finish_unit(shard)
    }

    /// The last unit of a shard syncs it.
    fn finish_unit(&self, shard: usize) -> Result<()> {
        if self.remaining[shard].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.sync(shard)?;
        }
        Ok(())
    }

    fn sync(&self, shard: usize) -> Result<()> {
        if !self.output.sync {
            return Ok(());
        }
        self.output.files[shard].sync().map_err(|error| self.write_error(shard, error))
    }

    /// What is synced at the end is sent to the disk as early as possible, so that both overlap.
    fn begin_writing(&self, shard: usize, offset: u64, length: u64) {
        if self.output.sync {
            self.output.files[shard].begin_writing(offset..offset + length);
        }
    }

    fn write_error(&self, shard: usize, error: std::io::Error) -> Error {
        Error::io(self.output.directory.join(&self.plan.shards[shard].name), error)
    }

    fn write(&self, shard: usize, bytes: &[u8], offset: u64) -> Result<()> {
        let written = self.output.files[shard].write_at(bytes, offset);
        written.map_err(|error| self.write_error(shard, error))?;
        self.begin_writing(shard, offset, bytes.len() as u64);
        self.task.advance(bytes.len() as u64);
        Ok(())
    }

    fn copy(
        &self,
        shard: usize,
        source: &Range<u64>,
        target: u64,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let from = &self.inputs.base.shards()[self.plan.shards[shard].source].file;
        let buffer = buffers.stored(queue::TILE_BYTES);
        let taken =
            self.output.files[shard].take_range(from.source(), source.clone(), target, buffer);
        taken.map_err(|error| match error {
            CopyError::Read(error) => from.unread(error),
            CopyError::Write(error) => self.write_error(shard, error),
        })?;
        let length = source.end - source.start;
        self.begin_writing(shard, target, length);
        self.task.advance(length);
        Ok(())
    }

    /// A planned tensor, and where it begins in its output file.
    fn tensor(&self, shard: usize, tensor: usize) -> (&PlannedTensor, u64) {
        let shard = &self.plan.shards[shard];
        let tensor = &shard.tensors[tensor];
        (tensor, shard.header.len() as u64 + tensor.target.start)
    }

    fn copy_from_adapter(&self, shard: usize, tensor: usize, buffers: &mut Buffers) -> Result<()> {
        let (tensor, target) = self.tensor(shard, tensor);
        debug_assert!(matches!(tensor.origin, Origin::Adapter(_)), "the kernel copies the base's");
        let bytes = tensor.source.bytes();
        for start in (0..bytes).step_by(queue::TILE_BYTES) {
            self.task.check()?;
            let buffer = buffers.stored(queue::TILE_BYTES.min((bytes - start) as usize));
            self.computer.read(tensor, buffer, start as usize)?;
            self.write(shard, buffer, target + start)?;
        }
        Ok(())
    }

    fn cast(
        &self,
        shard: usize,
        tensor: usize,
        elements: &Range<u64>,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (tensor, target) = self.tensor(shard, tensor);
        let result = self.computer.cast(tensor, elements, buffers)?;
        self.write(shard, result, target + elements.start * tensor.output_dtype.size() as u64)
    }

    fn merge(
        &self,
        shard: usize,
        tensor: usize,
        rows: &Range<usize>,
        slot: usize,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let requantizing = self.requantizing.get(&(shard, tensor));
        let known = lock(&self.selections).get(&(shard, tensor)).cloned();
        let rounding = &self.rounding[shard];
        let (tensor, target) = self.tensor(shard, tensor);
        let slot = &self.slots[slot];
        let prepared = slot.prepared(|| self.computer.prepare_with(tensor, known.as_deref()))?;
        if let Some(requantizing) = requantizing {
            let unit = requantizing.encode(&self.computer, tensor, &prepared, rows, buffers)?;
            lock(rounding).add(&unit.rounding);
            self.write(shard, &unit.codes, target + unit.first)?;
            slot.release();
            let scales = unit.scales.map(|scales| scales.tensors).unwrap_or_default();
            for ((shard, offset), bytes) in requantizing.scales.iter().zip(scales) {
                self.write(*shard, &bytes, *offset)?;
                self.finish_unit(*shard)?;
            }
            return Ok(());
        }
        let first = rows.start * prepared.columns() * tensor.output_dtype.size();
        let mut sums = RoundingSums::default();
        let measured = rounding::is_sampled(tensor, rows).then_some(&mut sums);
        let result = self.computer.merge_measured(tensor, &prepared, rows, buffers, measured)?;
        self.write(shard, result, target + first as u64)?;
        lock(rounding).add(&sums);
        slot.release();
        Ok(())
    }
}

/// Which shards an earlier merge of the same has written: those of a group together, for scales are written
/// with the weights that they belong to.
fn written_before(plan: &Plan, files: &[Box<dyn Sink>]) -> Vec<bool> {
    let mut written: Vec<_> = files.iter().map(|file| file.is_written()).collect();
    if written.contains(&true) {
        for group in plan.groups() {
            let all = group.iter().all(|shard| written[*shard]);
            group.iter().for_each(|shard| written[*shard] = all);
        }
    }
    written
}

#[cfg(test)]
mod slice_tests;
#[cfg(test)]
mod tests;
