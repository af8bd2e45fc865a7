//! Work queues, one for each shard: a plan as units of work, in the order in which threads take them.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};

use crate::kernel;
use crate::parallel::task::Task;
use crate::plan::{Action, Inputs, Origin, Plan, PlannedShard, PlannedTensor};
use crate::storage::source::Requests;
use crate::tensor::dtype::Dtype;

/// Bytes of a tile of the widest type involved. Half of a common second-level cache, so that the
/// factors have room beside it.
pub(crate) const TILE_BYTES: usize = 512 << 10;
/// Bytes of one unit of copying: large enough to be cheap, small enough to be cancelled within
/// a fraction of a second and to be shared between threads.
const COPY_BYTES: u64 = 16 << 20;
/// What file systems share is whole blocks, which lie at the same place within a block in both files.
const BLOCK_BYTES: u64 = 4096;

/// One unit of work.
#[derive(Debug, Clone)]
pub(super) enum Work {
    /// Bytes of the shard's file that are the same in the output, at another place perhaps.
    Copy { shard: usize, source: Range<u64>, target: u64 },
    /// A tensor of an adapter, as it is.
    CopyFromAdapter { shard: usize, tensor: usize },
    /// A run of elements to convert.
    Cast { shard: usize, tensor: usize, elements: Range<u64> },
    /// Whole rows to update.
    Merge { shard: usize, tensor: usize, rows: Range<usize>, slot: usize },
    /// The digest of an adapter's file.
    Digest { adapter: usize },
}

impl Work {
    /// The tensor that it is about, by shard and position, where that is merged.
    pub fn merged(&self) -> Option<(usize, usize)> {
        match self {
            Self::Merge { shard, tensor, .. } => Some((*shard, *tensor)),
            _ => None,
        }
    }
}

/// The type in which a tensor of that type is added to.
pub(crate) fn accumulator(dtype: &Dtype) -> Dtype {
    if *dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 }
}

/// Whether a shard begins with header and tensors of the base's, so that both are copied together.
pub(super) fn copies_header(inputs: &Inputs, shard: &PlannedShard) -> bool {
    let source = &inputs.base.shards()[shard.source].file;
    let begins = |tensor: &PlannedTensor| {
        matches!(tensor.action, Action::Copy)
            && tensor.origin == Origin::Base(shard.source)
            && tensor.source.range.start == 0
            && tensor.target.start == 0
    };
    shard.header == source.header_bytes() && shard.tensors.first().is_some_and(begins)
}

/// The work of one shard, in the order of the output's data. Each merged tensor takes the next
/// place in `tiles`, which says in how many units it comes.
pub(super) fn queue_of(
    inputs: &Inputs,
    position: usize,
    shard: &PlannedShard,
    tiles: &mut Vec<usize>,
) -> Vec<Work> {
    let source = &inputs.base.shards()[shard.source].file;
    let mut queue = Vec::new();
    // A run of neighbours that are copied, in the source and in the output.
    let mut run: Option<(Range<u64>, u64)> =
        copies_header(inputs, shard).then(|| (0..source.data_start(), 0));
    let flush = |run: &mut Option<(Range<u64>, u64)>, queue: &mut Vec<Work>| {
        let Some((range, target)) = run.take() else {
            return;
        };
        let mut start = range.start;
        while start < range.end {
            // Split at multiples of the unit in the file, and where the first block begins: a copy
            // that begins within a block shares nothing.
            let unit = if start % BLOCK_BYTES == 0 { COPY_BYTES } else { BLOCK_BYTES };
            let end = range.end.min((start / unit + 1) * unit);
            let target = target + (start - range.start);
            queue.push(Work::Copy { shard: position, source: start..end, target });
            start = end;
        }
    };
    for (index, tensor) in shard.tensors.iter().enumerate() {
        let from = source.data_start() + tensor.source.range.start;
        let to = shard.header.len() as u64 + tensor.target.start;
        match &tensor.action {
            Action::Copy if matches!(tensor.origin, Origin::Adapter(_)) => {
                flush(&mut run, &mut queue);
                queue.push(Work::CopyFromAdapter { shard: position, tensor: index });
            }
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
            // Written with the weight that it belongs to.
            Action::Rescale => {}
            Action::Merge(_) | Action::MergeEntries(_) => {
                flush(&mut run, &mut queue);
                let slot = tiles.len();
                let units =
                    if tensor.requantized { encoded_units(tensor) } else { self::tiles(tensor) };
                tiles.push(units.len());
                queue.extend(units.into_iter().map(|rows| Work::Merge {
                    shard: position,
                    tensor: index,
                    rows,
                    slot,
                }));
            }
        }
    }
    flush(&mut run, &mut queue);
    queue
}

/// What a plan asks of the store in which the base lies, beside its headers.
pub(crate) fn requests(inputs: &Inputs, plan: &Plan) -> Requests {
    let shards = plan.shards.iter().enumerate();
    let queues: Vec<_> = shards
        .map(|(position, shard)| queue_of(inputs, position, shard, &mut Vec::new()))
        .collect();
    let ranges = ranges_of(inputs, plan, &queues);
    let of_shards = inputs
        .base
        .shards()
        .iter()
        .zip(&ranges)
        .map(|(shard, ranges)| shard.file.source().requests(ranges));
    of_shards.fold(Requests::default(), |all, own| Requests {
        requests: all.requests + own.requests,
        bytes: all.bytes + own.bytes,
    })
}

/// Tells the base's files what the work of all shards will read of them, in its order.
pub(super) fn tell_sources(inputs: &Inputs, plan: &Plan, queues: &[Vec<Work>], task: &Task) {
    let ranges = ranges_of(inputs, plan, queues);
    for (shard, ranges) in inputs.base.shards().iter().zip(&ranges) {
        shard.file.source().will_read(ranges, task.cancel_flag());
    }
}

/// The ranges of each of the base's files that the work of all shards reads, in its order.
fn ranges_of(inputs: &Inputs, plan: &Plan, queues: &[Vec<Work>]) -> Vec<Vec<Range<u64>>> {
    let shards = inputs.base.shards();
    let mut ranges: Vec<Vec<Range<u64>>> = vec![Vec::new(); shards.len()];
    let mut merged = None;
    for work in queues.iter().flatten() {
        match work {
            Work::Copy { shard, source, .. } => {
                ranges[plan.shards[*shard].source].push(source.clone());
            }
            Work::Cast { shard, tensor, .. } | Work::Merge { shard, tensor, .. } => {
                // All units of a tensor together read all of it.
                if merged.replace((*shard, *tensor)) != Some((*shard, *tensor)) {
                    let planned = &plan.shards[*shard].tensors[*tensor];
                    let quantized = planned.quantized.as_ref();
                    let from = match (quantized, planned.origin) {
                        (Some(quantized), _) => quantized.stored.shard,
                        (None, Origin::Base(from)) => from,
                        (None, Origin::Adapter(_)) => continue,
                    };
                    let (start, range) = (shards[from].file.data_start(), &planned.stored().range);
                    ranges[from].push(start + range.start..start + range.end);
                }
            }
            Work::CopyFromAdapter { .. } | Work::Digest { .. } => {}
        }
    }
    ranges
}

/// Rows of a tile: as many whole register blocks as fit, at least one. The same for every output
/// type and kind of update, so that a plan's tiles are a matter of shapes alone.
pub(super) fn tile_rows(columns: usize, from: &Dtype) -> usize {
    let rows = TILE_BYTES / (columns * from.size()).max(1);
    (rows / kernel::ROW_MULTIPLE).max(1) * kernel::ROW_MULTIPLE
}

/// The tiles of a merged tensor, each within one of its segments.
pub(crate) fn tiles(tensor: &PlannedTensor) -> Vec<Range<usize>> {
    let (_, columns) = tensor.matrix();
    let unit = tile_rows(columns, &tensor.source.dtype);
    let of_segment = |rows: Range<usize>| {
        rows.clone().step_by(unit).map(move |start| start..rows.end.min(start + unit))
    };
    tensor.segments().into_iter().flat_map(of_segment).collect()
}

/// The units of a tensor that is quantised again: whole blocks.
pub(crate) fn encoded_units(tensor: &PlannedTensor) -> Vec<Range<usize>> {
    let (rows, columns) = tensor.matrix();
    let quantized = tensor.quantized.as_ref().expect("it is quantised");
    quantized.blocks.units(rows, columns, tile_rows(columns, &tensor.source.dtype))
}

/// The tiles that cover some rows of a merged tensor. They begin where tiles may begin, which can
/// be a few rows before.
pub(crate) fn tiles_covering(tensor: &PlannedTensor, rows: &Range<usize>) -> Vec<Range<usize>> {
    let (_, columns) = tensor.matrix();
    let unit = tile_rows(columns, &tensor.source.dtype);
    let mut tiles = Vec::new();
    for segment in tensor.segments() {
        let (start, end) = (segment.start.max(rows.start), segment.end.min(rows.end));
        if start < end {
            let within = (start - segment.start) / kernel::ROW_MULTIPLE * kernel::ROW_MULTIPLE;
            let first = segment.start + within;
            tiles.extend((first..end).step_by(unit).map(|start| start..end.min(start + unit)));
        }
    }
    tiles
}

/// The work of all shards, shared out between threads.
///
/// Writes to one file exclude each other in the kernel, where a waiting thread spins. So a thread
/// stays with its shard until nothing is left of it, and then goes where the fewest others are.
#[derive(Debug)]
pub(super) struct WorkQueues {
    queues: Vec<WorkQueue>,
}

#[derive(Debug)]
struct WorkQueue {
    work: Vec<Work>,
    next: AtomicUsize,
    threads: AtomicUsize,
}

impl WorkQueue {
    fn left(&self) -> usize {
        self.work.len().saturating_sub(self.next.load(Ordering::Relaxed))
    }
}

impl WorkQueues {
    /// One queue for each list, taken in this order where nothing else decides.
    pub fn new(queues: Vec<Vec<Work>>) -> Self {
        let queue =
            |work| WorkQueue { work, next: AtomicUsize::new(0), threads: AtomicUsize::new(0) };
        Self { queues: queues.into_iter().map(queue).collect() }
    }

    /// The next unit for a thread that was last with `queue`, which is set to where it is now.
    pub fn take(&self, queue: &mut Option<usize>) -> Option<&Work> {
        loop {
            let current = match *queue {
                Some(current) => current,
                None => {
                    let busy = |queue: &WorkQueue| queue.threads.load(Ordering::Relaxed);
                    let (position, chosen) = (self.queues.iter().enumerate())
                        .filter(|(_, queue)| queue.left() > 0)
                        .min_by_key(|(_, queue)| busy(queue))?;
                    chosen.threads.fetch_add(1, Ordering::Relaxed);
                    *queue.insert(position)
                }
            };
            let current = &self.queues[current];
            if let Some(work) = current.work.get(current.next.fetch_add(1, Ordering::Relaxed)) {
                return Some(work);
            }
            current.threads.fetch_sub(1, Ordering::Relaxed);
            *queue = None;
        }
    }

    /// Lets nobody take anything any more.
    pub fn stop(&self) {
        for queue in &self.queues {
            queue.next.store(queue.work.len(), Ordering::Relaxed);
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn queues(counts: &[usize]) -> WorkQueues {
        let unit = |shard| Work::CopyFromAdapter { shard, tensor: 0 };
        WorkQueues::new(counts.iter().enumerate().map(|(shard, n)| vec![unit(shard); *n]).collect())
    }

    fn shard(work: Option<&Work>) -> Option<usize> {
        work.map(|work| match work {
            Work::CopyFromAdapter { shard, .. } => *shard,
            _ => unreachable!("nothing else was queued"),
        })
    }

    #[test]
    fn threads_keep_to_different_shards_while_they_can() {
        let queues = queues(&[2, 0, 4, 1]);
        let (mut one, mut other) = (None, None);
        let mut order = Vec::new();
        while let Some(work) = shard(queues.take(&mut one)) {
            order.push((work, shard(queues.take(&mut other))));
        }
        assert_eq!(order, [(0, Some(2)), (0, Some(2)), (3, Some(2)), (2, None)]);
    }

    #[test]
    fn what_is_stopped_gives_no_more_work() {
        let queues = queues(&[3, 3]);
        let mut queue = None;
        assert_eq!(shard(queues.take(&mut queue)), Some(0));
        queues.stop();
        assert_eq!(shard(queues.take(&mut queue)), None);
        assert_eq!(shard(queues.take(&mut None)), None);
    }
}
