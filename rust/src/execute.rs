//! The CPU's executor: carries a plan out, tile by tile, on an owned pool of threads.
//!
//! A tile is a block of rows that fits a core's second-level cache. It is read into a thread's
//! buffer, updated in place, and written to its final offset. What does not change is copied
//! inside the kernel. Memory is threads × buffers and the factors of the tensors in work.

mod queue;
mod tile;

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
use crate::kernel::{self, InstructionSet};
use crate::plan::{Action, Inputs, Origin, Plan, PlannedTensor};
use crate::side_files;
use crate::task::{self, Task};
use crate::writer::{self, Staging};

use queue::Work;
use tile::{Prepared, Real};

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
    for (name, bytes) in &side_files.carried {
        task.check()?;
        match (name.as_str(), inputs.base.config()) {
            ("config.json", Some(config)) if !plan.config_changes.is_empty() => {
                staging.write(name, &writer::changed_config(config, &plan.config_changes))?;
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

/// The prepared updates of one tensor: made by the first thread that needs them, dropped by the
/// last.
#[derive(Debug)]
struct Slot {
    prepared: Mutex<Option<Arc<Prepared>>>,
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
        let mut tiles = Vec::new();
        let queues: Vec<_> = (plan.shards.iter().enumerate())
            .map(|(position, shard)| queue::queue_of(inputs, position, shard, &mut tiles))
            .collect();
        let slots = tiles
            .into_iter()
            .map(|tiles| Slot { prepared: Mutex::new(None), remaining: AtomicUsize::new(tiles) })
            .collect();
        let remaining = queues.iter().map(|queue| AtomicUsize::new(queue.len())).collect();
        let mut work: Vec<_> =
            (0..inputs.adapters.len()).map(|adapter| Work::Digest { adapter }).collect();
        work.extend(queue::interleave(queues));
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
            Work::Place { shard, tensor } => {
                self.place(*shard, *tensor)?;
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

    /// Reads a tensor's bytes from `offset` on, wherever it comes from.
    fn read(&self, tensor: &PlannedTensor, buffer: &mut [u8], offset: usize) -> Result<()> {
        match tensor.origin {
            Origin::Base(shard) => {
                let source = &self.inputs.base.shards()[shard].file;
                let start = source.data_start() + tensor.source.range.start + offset as u64;
                file::read_at(source.file(), buffer, start)
                    .map_err(|error| Error::io(source.path(), error))
            }
            Origin::Adapter(adapter) => {
                let bytes = self.inputs.adapters[adapter].file().tensor_bytes(&tensor.source);
                buffer.copy_from_slice(&bytes[offset..offset + buffer.len()]);
                Ok(())
            }
        }
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
        let buffer = reserve(&mut buffers.stored, queue::TILE_BYTES);
        file::copy_range(from.file(), source.clone(), &self.files[shard], target, buffer)
            .map_err(|error| self.write_error(shard, error))?;
        self.task.advance(source.end - source.start);
        Ok(())
    }

    /// A planned tensor, and where it begins in its output file.
    fn tensor(&self, shard: usize, tensor: usize) -> (&PlannedTensor, u64) {
        let shard = &self.plan.shards[shard];
        let tensor = &shard.tensors[tensor];
        (tensor, shard.header.len() as u64 + tensor.target.start)
    }

    fn place(&self, shard: usize, tensor: usize) -> Result<()> {
        let (tensor, target) = self.tensor(shard, tensor);
        let Origin::Adapter(adapter) = tensor.origin else {
            unreachable!("the base's tensors are copied in the kernel")
        };
        let bytes = self.inputs.adapters[adapter].file().tensor_bytes(&tensor.source);
        self.write(shard, bytes, target)
    }

    fn cast(
        &self,
        shard: usize,
        tensor: usize,
        elements: &Range<u64>,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (tensor, target) = self.tensor(shard, tensor);
        let (from, to) = (&tensor.source.dtype, &tensor.output_dtype);
        let first = elements.start as usize;
        let count = elements.end as usize - first;
        let stored = reserve(&mut buffers.stored, count * from.size());
        let result = reserve(&mut buffers.result, count * to.size());
        self.read(tensor, stored, first * from.size())?;
        if !kernel::convert(self.set, from, stored, to, result) {
            self.find_overflow(tensor, result, first)?;
        }
        self.write(shard, result, target + (first * to.size()) as u64)
    }

    fn merge(
        &self,
        shard: usize,
        tensor: usize,
        rows: &Range<usize>,
        slot: usize,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let (tensor, target) = self.tensor(shard, tensor);
        let (from, to) = (&tensor.source.dtype, &tensor.output_dtype);
        let prepared = self.prepared(slot, tensor)?;
        let first = rows.start * prepared.columns();
        let count = rows.len() * prepared.columns();
        let stored = reserve(&mut buffers.stored, count * from.size());
        self.read(tensor, stored, first * from.size())?;
        let (finite, result) = match prepared.only_sum() {
            Some(factors) if from == to => {
                (kernel::merge_rows(self.set, factors, rows.start, from, stored), stored)
            }
            // Through the accumulator's type, so that the only rounding is the last one.
            _ => {
                let result = reserve(&mut buffers.result, count * to.size());
                let apply = if queue::accumulator(from) == Dtype::F64 {
                    let wide = &mut buffers.double;
                    apply::<f64>(
                        self.set,
                        self.inputs,
                        &prepared,
                        rows,
                        (from, stored),
                        wide,
                        (to, result),
                    )
                } else {
                    let wide = &mut buffers.single;
                    apply::<f32>(
                        self.set,
                        self.inputs,
                        &prepared,
                        rows,
                        (from, stored),
                        wide,
                        (to, result),
                    )
                };
                (apply, result)
            }
        };
        if !finite {
            self.find_overflow(tensor, result, first)?;
        }
        self.write(shard, result, target + (first * to.size()) as u64)?;
        if self.slots[slot].remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            lock(&self.slots[slot].prepared).take();
        }
        Ok(())
    }

    /// The prepared updates of a tensor.
    fn prepared(&self, slot: usize, tensor: &PlannedTensor) -> Result<Arc<Prepared>> {
        let mut prepared = lock(&self.slots[slot].prepared);
        if let Some(prepared) = &*prepared {
            return Ok(prepared.clone());
        }
        let Action::Merge(updates) = &tensor.action else { unreachable!("only merges have slots") };
        let wide = queue::accumulator(&tensor.source.dtype);
        let shape = queue::shape_of(tensor);
        let scan = |each: &mut dyn FnMut(usize, &mut [u8])| self.scan(tensor, &wide, shape, each);
        let made = Prepared::new(self.set, self.inputs, updates, &wide, shape, scan)?;
        Ok(prepared.insert(Arc::new(made)).clone())
    }

    /// Reads a tensor tile by tile in the accumulator's type.
    fn scan(
        &self,
        tensor: &PlannedTensor,
        wide: &Dtype,
        (rows, columns): (usize, usize),
        each: &mut dyn FnMut(usize, &mut [u8]),
    ) -> Result<()> {
        let from = &tensor.source.dtype;
        let unit = queue::tile_rows(columns, from);
        let (mut stored, mut widened) = (Vec::new(), Vec::new());
        for start in (0..rows).step_by(unit) {
            self.task.check()?;
            let count = unit.min(rows - start) * columns;
            let stored = reserve(&mut stored, count * from.size());
            let widened = reserve(&mut widened, count * wide.size());
            self.read(tensor, stored, start * columns * from.size())?;
            kernel::convert(self.set, from, stored, wide, widened);
            each(start, widened);
        }
        Ok(())
    }

    /// Something in the result is not finite: an error unless it came so from its source.
    fn find_overflow(&self, tensor: &PlannedTensor, result: &[u8], first: usize) -> Result<()> {
        let dtype = &tensor.source.dtype;
        let mut stored = vec![0; result.len() / tensor.output_dtype.size() * dtype.size()];
        self.read(tensor, &mut stored, first * dtype.size())?;
        let before = kernel::convert::widen_f64(dtype, &stored);
        let after = kernel::convert::widen_f64(&tensor.output_dtype, result);
        let is_made = |(before, after): (&f64, &f64)| before.is_finite() && !after.is_finite();
        match before.iter().zip(&after).position(is_made) {
            Some(index) => Err(overflow(tensor, first + index, &self.culprit(tensor))),
            None => Ok(()),
        }
    }

    /// Names an adapter whose tensors are not finite themselves, or else the operation.
    fn culprit(&self, tensor: &PlannedTensor) -> String {
        let Action::Merge(updates) = &tensor.action else { return "the conversion".into() };
        for update in updates {
            let adapter = &self.inputs.adapters[update.adapter];
            let module = adapter.modules().get(&update.module);
            let parts = module.map(|module| {
                [Some(&module.a), Some(&module.b), module.magnitude.as_ref(), module.bias.as_ref()]
            });
            for part in parts.into_iter().flatten().flatten() {
                if adapter.read_f32(part).iter().any(|value| !value.is_finite()) {
                    let path = adapter.path().display();
                    return format!("the NaN or infinity in {} of {path}", part.name);
                }
            }
        }
        "the merge".into()
    }
}

/// Applies updates to a tile in the accumulator's type and rounds once; whether all is finite.
fn apply<T: Real>(
    set: InstructionSet,
    inputs: &Inputs,
    prepared: &Prepared,
    rows: &Range<usize>,
    (from, stored): (&Dtype, &[u8]),
    wide: &mut [Vec<T>; 3],
    (to, result): (&Dtype, &mut [u8]),
) -> bool {
    let count = rows.len() * prepared.columns();
    let [start, scratch, sum] = wide;
    for buffer in [&mut *start, &mut *scratch, &mut *sum] {
        if buffer.len() < count {
            buffer.resize(count, T::default());
        }
    }
    let (start, sum) = (&mut start[..count], &mut sum[..count]);
    kernel::convert(set, from, stored, &T::DTYPE, bytemuck::cast_slice_mut(start));
    prepared.apply(set, inputs, rows, start, &mut scratch[..count], sum);
    kernel::convert(set, &T::DTYPE, bytemuck::cast_slice(sum), to, result)
}

fn overflow(tensor: &PlannedTensor, index: usize, culprit: &str) -> Error {
    let shape = &tensor.source.shape;
    let columns = shape.last().copied().unwrap_or(1).max(1) as usize;
    Error::Numeric {
        tensor: tensor.name.clone(),
        message: format!(
            "{culprit} makes a finite weight NaN or infinite in {} (the first at row {}, column {}); \
             nothing was written",
            tensor.output_dtype,
            index / columns,
            index % columns
        ),
    }
}

/// A thread's memory, grown to what its work needs and kept.
#[derive(Default)]
struct Buffers {
    /// Rows as they are stored; the result too, where products are added in place.
    stored: Vec<u8>,
    /// Rows as the output stores them.
    result: Vec<u8>,
    /// W₀, scratch and sum in the accumulator's type.
    single: [Vec<f32>; 3],
    double: [Vec<f64>; 3],
}

fn reserve(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes {
        buffer.resize(bytes, 0);
    }
    &mut buffer[..bytes]
}

#[cfg(test)]
mod tests;
