//! The CPU's executor: carries a plan out, tile by tile, on an owned pool of threads.
//!
//! A tile is a block of rows that fits a core's second-level cache. It is read into a thread's
//! buffer, updated in place, and written to its final offset. What does not change is copied
//! inside the kernel. Memory is threads × buffers and the factors of the tensors in work.

use std::fs::File;
use std::ops::Range;
use std::path::Path;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Instant;

use serde::Serialize;

use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::file;
use crate::kernel::{self, Factors, InstructionSet, Operand};
use crate::plan::{Action, Inputs, Plan, PlannedShard, PlannedTensor, Update};
use crate::side_files;
use crate::task::{self, Task};
use crate::writer::{self, Staging};

/// Bytes of a tile of the widest type involved. Half of a common second-level cache, so that the
/// factors have room beside it.
const TILE_BYTES: usize = 512 << 10;
/// Bytes of one unit of copying: large enough to be cheap, small enough to be cancelled within
/// a fraction of a second and to be shared between threads.
const COPY_BYTES: u64 = 16 << 20;

/// What the caller decides about the execution.
#[derive(Debug, Clone, Default)]
pub struct Options {
    /// Worker threads; `None` is one per core.
    pub threads: Option<usize>,
    /// Whether a non-empty output may be replaced.
    pub overwrite: bool,
    /// The kernels' instructions; `None` is the best there is.
    pub instruction_set: Option<InstructionSet>,
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
    /// Other copies of the weights in the base's directory, not carried over.
    pub left_out: Vec<String>,
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
    let start = Instant::now();
    let pool = task::build_pool(options.threads)?;
    let side_files = side_files::list(&inputs.base)?;
    let side_bytes: u64 = side_files.carried.iter().map(|(_, bytes)| bytes).sum();
    let total = plan.bytes() + side_bytes;
    let staging = Staging::create(inputs, output, options.overwrite, total)?;
    task.expect(total);
    let files = plan
        .shards
        .iter()
        .map(|shard| {
            let file = staging.create_file(&shard.name, shard.bytes())?;
            let failed = |error| Error::io(output.join(&shard.name), error);
            file::write_at(&file, &shard.header, 0).map_err(failed)?;
            task.advance(shard.header.len() as u64);
            Ok(file)
        })
        .collect::<Result<Vec<_>>>()?;
    let instruction_set = options.instruction_set.unwrap_or_else(InstructionSet::detect);
    let job = Job::new(inputs, plan, output, &files, instruction_set, task);
    job.run(&pool)?;
    let adapter_sha256 = job.digests()?;
    drop(files);
    let header_dtype = plan.options.dtype.as_ref().and_then(Dtype::torch_name);
    for (name, bytes) in &side_files.carried {
        task.check()?;
        match (name.as_str(), header_dtype, inputs.base.config()) {
            ("config.json", Some(dtype), Some(config)) => {
                staging.write(name, &writer::config_with_dtype(config, dtype))?;
            }
            _ => {
                let source = inputs.base.root().join(name);
                std::fs::copy(&source, staging.path(name)?)
                    .map_err(|error| Error::io(&source, error))?;
            }
        }
        task.advance(*bytes);
    }
    if let Some((name, content)) = writer::index_content(&inputs.base, plan) {
        staging.write(&name, &content)?;
    }
    task.check()?;
    staging.commit()?;
    Ok(Summary {
        bytes_written: plan.bytes(),
        seconds: start.elapsed().as_secs_f64(),
        threads: pool.current_num_threads(),
        instruction_set,
        adapter_sha256,
        base_header_sha256: inputs
            .base
            .shards()
            .iter()
            .map(|shard| crate::adapter::sha256_of_bytes(shard.file.header_bytes()))
            .collect(),
        side_files: side_files.carried.into_iter().map(|(name, _)| name).collect(),
        left_out: side_files.left_out,
    })
}

/// One unit of work.
#[derive(Debug, Clone)]
enum Work {
    /// Bytes of the shard's file that are the same in the output, at another place perhaps.
    Copy { shard: usize, source: Range<u64>, target: u64 },
    /// A run of elements to convert.
    Cast { shard: usize, tensor: usize, elements: Range<u64> },
    /// Whole rows to update.
    Merge { shard: usize, tensor: usize, rows: Range<usize>, slot: usize },
    /// The digest of an adapter's file.
    Digest { adapter: usize },
}

/// The packed factors of one tensor: made by the first thread that needs them, dropped by the last.
#[derive(Debug)]
struct Slot {
    factors: Mutex<Option<Arc<Factors>>>,
    remaining: AtomicUsize,
}

struct Job<'a> {
    inputs: &'a Inputs,
    plan: &'a Plan,
    output: &'a Path,
    files: &'a [File],
    set: InstructionSet,
    task: &'a Task,
    work: Vec<Work>,
    slots: Vec<Slot>,
    /// Units of work left for each shard, so that the last one syncs it.
    remaining: Vec<AtomicUsize>,
    digests: Vec<Mutex<Option<String>>>,
}

/// A lock whose holder panicked protects nothing that could be half-made here.
fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl<'a> Job<'a> {
    fn new(
        inputs: &'a Inputs,
        plan: &'a Plan,
        output: &'a Path,
        files: &'a [File],
        set: InstructionSet,
        task: &'a Task,
    ) -> Self {
        let mut slots = Vec::new();
        let queues: Vec<_> = (plan.shards.iter().enumerate())
            .map(|(position, shard)| queue_of(inputs, position, shard, &mut slots))
            .collect();
        let remaining = queues.iter().map(|queue| AtomicUsize::new(queue.len())).collect();
        let mut work: Vec<_> =
            (0..inputs.adapters.len()).map(|adapter| Work::Digest { adapter }).collect();
        work.extend(interleave(queues));
        let digests = inputs.adapters.iter().map(|_| Mutex::new(None)).collect();
        Self { inputs, plan, output, files, set, task, work, slots, remaining, digests }
    }

    /// Runs all work on the pool; the first error stops it.
    fn run(&self, pool: &rayon::ThreadPool) -> Result<()> {
        // Shards without tensors have no work that would sync them at its end.
        for (shard, remaining) in self.remaining.iter().enumerate() {
            if remaining.load(Ordering::Relaxed) == 0 {
                self.sync(shard)?;
            }
        }
        let next = AtomicUsize::new(0);
        let failure = Mutex::new(None);
        pool.broadcast(|_| {
            let mut buffers = Buffers::default();
            while let Some(work) = self.work.get(next.fetch_add(1, Ordering::Relaxed)) {
                if let Err(error) =
                    self.task.check().and_then(|()| self.carry_out(work, &mut buffers))
                {
                    lock(&failure).get_or_insert(error);
                    next.store(self.work.len(), Ordering::Relaxed);
                }
            }
        });
        failure.into_inner().unwrap_or_else(PoisonError::into_inner).map_or(Ok(()), Err)
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
            Work::Cast { shard, tensor, elements } => {
                self.cast(*shard, *tensor, elements, buffers)?;
                *shard
            }
            Work::Merge { shard, tensor, rows, slot } => {
                self.merge(*shard, *tensor, rows, *slot, buffers)?;
                *shard
            }
        };
        if self.remaining[shard].fetch_sub(1, Ordering::AcqRel) == 1 {
            self.sync(shard)?;
        }
        Ok(())
    }

    fn sync(&self, shard: usize) -> Result<()> {
        self.files[shard].sync_all().map_err(|error| self.write_error(shard, error))
    }

    fn write_error(&self, shard: usize, error: std::io::Error) -> Error {
        Error::io(self.output.join(&self.plan.shards[shard].name), error)
    }

    fn read(&self, shard: usize, buffer: &mut [u8], offset: u64) -> Result<()> {
        let source = &self.inputs.base.shards()[self.plan.shards[shard].source].file;
        file::read_at(source.file(), buffer, offset)
            .map_err(|error| Error::io(source.path(), error))
    }

    fn write(&self, shard: usize, bytes: &[u8], offset: u64) -> Result<()> {
        file::write_at(&self.files[shard], bytes, offset)
            .map_err(|error| self.write_error(shard, error))?;
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
        let buffer = reserve(&mut buffers.stored, TILE_BYTES);
        file::copy_range(from.file(), source.clone(), &self.files[shard], target, buffer)
            .map_err(|error| self.write_error(shard, error))?;
        self.task.advance(source.end - source.start);
        Ok(())
    }

    fn tensor(&self, shard: usize, tensor: usize) -> (&PlannedShard, &PlannedTensor) {
        let shard = &self.plan.shards[shard];
        (shard, &shard.tensors[tensor])
    }

    /// Where a tensor's first byte lies in the base's file and in the output's.
    fn offsets(&self, shard: &PlannedShard, tensor: &PlannedTensor) -> (u64, u64) {
        let source = &self.inputs.base.shards()[shard.source].file;
        let source = source.data_start() + tensor.source.range.start;
        (source, shard.header.len() as u64 + tensor.target.start)
    }

    fn cast(
        &self,
        position: usize,
        tensor: usize,
        elements: &Range<u64>,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (shard, tensor) = self.tensor(position, tensor);
        let (from, to) = (&tensor.source.dtype, &tensor.output_dtype);
        let count = (elements.end - elements.start) as usize;
        let (source, target) = self.offsets(shard, tensor);
        let stored = reserve(&mut buffers.stored, count * from.size());
        let result = reserve(&mut buffers.result, count * to.size());
        self.read(position, stored, source + elements.start * from.size() as u64)?;
        kernel::convert::convert(from, stored, to, result)
            .map_err(|index| overflow(tensor, elements.start as usize + index, "the conversion"))?;
        self.write(position, result, target + elements.start * to.size() as u64)
    }

    fn merge(
        &self,
        position: usize,
        tensor: usize,
        rows: &Range<usize>,
        slot: usize,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (shard, tensor) = self.tensor(position, tensor);
        let Action::Merge(updates) = &tensor.action else { unreachable!("only merges have slots") };
        let (from, to) = (&tensor.source.dtype, &tensor.output_dtype);
        let (source, target) = self.offsets(shard, tensor);
        let factors = self.factors(slot, tensor, updates);
        let columns = factors.columns();
        let count = rows.len() * columns;
        let first = rows.start * columns;
        let stored = reserve(&mut buffers.stored, count * from.size());
        self.read(position, stored, source + (first * from.size()) as u64)?;
        let (finite, result) = if from == to {
            (kernel::merge_rows(self.set, &factors, rows.start, from, stored), stored)
        } else {
            // Through the accumulator's type, so that the only rounding is the last one.
            let wide_dtype = accumulator(from);
            let wide = reserve(&mut buffers.wide, count * wide_dtype.size());
            let result = reserve(&mut buffers.result, count * to.size());
            kernel::convert::convert(from, stored, &wide_dtype, wide)
                .expect("a wider type holds every value");
            let merged = kernel::merge_rows(self.set, &factors, rows.start, &wide_dtype, wide);
            let converted = kernel::convert::convert(&wide_dtype, wide, to, result);
            (merged && converted.is_ok(), result)
        };
        if !finite {
            self.find_overflow(position, tensor, result, first)?;
        }
        self.write(position, result, target + (first * to.size()) as u64)?;
        if self.slots[slot].remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            lock(&self.slots[slot].factors).take();
        }
        Ok(())
    }

    /// The packed factors of a tensor's updates.
    fn factors(&self, slot: usize, tensor: &PlannedTensor, updates: &[Update]) -> Arc<Factors> {
        let mut factors = lock(&self.slots[slot].factors);
        factors.get_or_insert_with(|| Arc::new(self.pack(tensor, updates))).clone()
    }

    fn pack(&self, tensor: &PlannedTensor, updates: &[Update]) -> Factors {
        let operands: Vec<_> = updates
            .iter()
            .map(|update| {
                let adapter = &self.inputs.adapters[update.adapter];
                let module = &adapter.modules()[&update.module];
                Operand {
                    a: adapter.file().tensor_bytes(&module.a),
                    a_dtype: &module.a.dtype,
                    b: adapter.file().tensor_bytes(&module.b),
                    b_dtype: &module.b.dtype,
                    rank: module.rank as usize,
                    coefficient: update.coefficient(),
                }
            })
            .collect();
        let orientation = updates[0].orientation();
        let shape = shape_of(tensor);
        Factors::pack(self.set, &accumulator(&tensor.source.dtype), shape, orientation, &operands)
    }

    /// Something in the result is not finite: an error unless it came so from the base.
    fn find_overflow(
        &self,
        position: usize,
        tensor: &PlannedTensor,
        result: &[u8],
        first: usize,
    ) -> Result<()> {
        let (shard, dtype) = (&self.plan.shards[position], &tensor.source.dtype);
        let (source, _) = self.offsets(shard, tensor);
        let mut stored = vec![0; result.len() / tensor.output_dtype.size() * dtype.size()];
        self.read(position, &mut stored, source + (first * dtype.size()) as u64)?;
        let before = kernel::convert::widen_f64(dtype, &stored);
        let after = kernel::convert::widen_f64(&tensor.output_dtype, result);
        let is_made = |(before, after): (&f64, &f64)| before.is_finite() && !after.is_finite();
        match before.iter().zip(&after).position(is_made) {
            Some(index) => Err(overflow(tensor, first + index, &self.culprit(tensor))),
            None => Ok(()),
        }
    }

    /// Names an adapter whose factors are not finite themselves, or else the merge.
    fn culprit(&self, tensor: &PlannedTensor) -> String {
        let Action::Merge(updates) = &tensor.action else {
            return "the merge".into();
        };
        for update in updates {
            let adapter = &self.inputs.adapters[update.adapter];
            let module = &adapter.modules()[&update.module];
            for factor in [&module.a, &module.b] {
                if adapter.read_f32(factor).iter().any(|value| !value.is_finite()) {
                    return format!(
                        "the NaN or infinity in {} of {}",
                        factor.name,
                        adapter.path().display()
                    );
                }
            }
        }
        "the merge".into()
    }
}

fn overflow(tensor: &PlannedTensor, index: usize, culprit: &str) -> Error {
    let shape = &tensor.source.shape;
    let columns = shape.last().copied().unwrap_or(1).max(1) as usize;
    Error::Numeric {
        tensor: tensor.source.name.clone(),
        message: format!(
            "{culprit} makes a finite weight NaN or infinite in {} (the first at row {}, column {}); \
             nothing was written",
            tensor.output_dtype,
            index / columns,
            index % columns
        ),
    }
}

/// The type in which a tensor of that type is added to.
fn accumulator(dtype: &Dtype) -> Dtype {
    if *dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 }
}

/// Rows and columns of a tensor that is merged into.
fn shape_of(tensor: &PlannedTensor) -> (usize, usize) {
    let shape = &tensor.source.shape;
    let rows = shape.first().copied().unwrap_or(1);
    let columns: u64 = shape.iter().skip(1).product();
    (rows as usize, columns as usize)
}

/// The work of one shard, in the order of the output's data.
fn queue_of(
    inputs: &Inputs,
    position: usize,
    shard: &PlannedShard,
    slots: &mut Vec<Slot>,
) -> Vec<Work> {
    let source = &inputs.base.shards()[shard.source].file;
    let mut queue = Vec::new();
    // A run of neighbours that are copied, in the source and in the output.
    let mut run: Option<(Range<u64>, u64)> = None;
    let flush = |run: &mut Option<(Range<u64>, u64)>, queue: &mut Vec<Work>| {
        let Some((range, target)) = run.take() else {
            return;
        };
        let mut start = range.start;
        while start < range.end {
            // Split at multiples of the unit in the file, where file systems can share blocks.
            let end = range.end.min((start / COPY_BYTES + 1) * COPY_BYTES);
            let target = target + (start - range.start);
            queue.push(Work::Copy { shard: position, source: start..end, target });
            start = end;
        }
    };
    for (index, tensor) in shard.tensors.iter().enumerate() {
        let from = source.data_start() + tensor.source.range.start;
        let to = shard.header.len() as u64 + tensor.target.start;
        match &tensor.action {
            Action::Copy => {
                let end = from + tensor.source.bytes();
                match &mut run {
                    Some((range, target))
                        if range.end == from && *target + (range.end - range.start) == to =>
                    {
                        range.end = end;
                    }
                    _ => {
                        flush(&mut run, &mut queue);
                        run = Some((from..end, to));
                    }
                }
            }
            Action::Cast => {
                flush(&mut run, &mut queue);
                let widest = tensor.source.dtype.size().max(tensor.output_dtype.size());
                let unit = (TILE_BYTES / widest) as u64;
                let elements = tensor.source.elements();
                for start in (0..elements).step_by(unit as usize) {
                    let elements = start..elements.min(start + unit);
                    queue.push(Work::Cast { shard: position, tensor: index, elements });
                }
            }
            Action::Merge(_) => {
                flush(&mut run, &mut queue);
                let (rows, columns) = shape_of(tensor);
                let unit = tile_rows(columns, &tensor.source.dtype, &tensor.output_dtype);
                let slot = slots.len();
                slots.push(Slot {
                    factors: Mutex::new(None),
                    remaining: AtomicUsize::new(rows.div_ceil(unit)),
                });
                for start in (0..rows).step_by(unit) {
                    let rows = start..rows.min(start + unit);
                    queue.push(Work::Merge { shard: position, tensor: index, rows, slot });
                }
            }
        }
    }
    flush(&mut run, &mut queue);
    queue
}

/// Rows of a tile: as many whole register blocks as fit, at least one.
fn tile_rows(columns: usize, from: &Dtype, to: &Dtype) -> usize {
    let widest = if from == to { from.size() } else { accumulator(from).size() };
    let rows = TILE_BYTES / (columns * widest).max(1);
    (rows / kernel::ROW_MULTIPLE).max(1) * kernel::ROW_MULTIPLE
}

/// Takes turns between the shards: writes to one file exclude each other in the kernel, so
/// neighbours in the queue, which different threads take, should be of different files.
fn interleave(queues: Vec<Vec<Work>>) -> Vec<Work> {
    let total = queues.iter().map(Vec::len).sum();
    let mut work = Vec::with_capacity(total);
    let mut pending = queues.into_iter().map(Vec::into_iter);
    let mut lanes: Vec<_> = pending.by_ref().take(LANES).collect();
    while !lanes.is_empty() {
        let mut index = 0;
        while index < lanes.len() {
            if let Some(unit) = lanes[index].next() {
                work.push(unit);
                index += 1;
            } else if let Some(queue) = pending.next() {
                lanes[index] = queue;
            } else {
                lanes.remove(index);
            }
        }
    }
    work
}

/// Shards that are written at the same time.
const LANES: usize = 2;

/// A thread's memory, grown to what its work needs and kept.
#[derive(Default)]
struct Buffers {
    /// Rows as the base stores them; the result too, where the type stays.
    stored: Vec<u8>,
    /// Rows in the accumulator's type.
    wide: Vec<u8>,
    /// Rows as the output stores them.
    result: Vec<u8>,
}

fn reserve(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes {
        buffer.resize(bytes, 0);
    }
    &mut buffer[..bytes]
}

#[cfg(test)]
mod tests;
