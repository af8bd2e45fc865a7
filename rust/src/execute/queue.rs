//! A plan as units of work, in the order in which threads take them.

use std::ops::Range;

use crate::dtype::Dtype;
use crate::kernel;
use crate::plan::{Action, Inputs, Origin, PlannedShard, PlannedTensor};

/// Bytes of a tile of the widest type involved. Half of a common second-level cache, so that the
/// factors have room beside it.
pub(crate) const TILE_BYTES: usize = 512 << 10;
/// Bytes of one unit of copying: large enough to be cheap, small enough to be cancelled within
/// a fraction of a second and to be shared between threads.
const COPY_BYTES: u64 = 16 << 20;
/// Shards that are written at the same time.
const LANES: usize = 2;

/// One unit of work.
#[derive(Debug, Clone)]
pub(super) enum Work {
    /// Bytes of the shard's file that are the same in the output, at another place perhaps.
    Copy { shard: usize, source: Range<u64>, target: u64 },
    /// A tensor of an adapter, as it is.
    Place { shard: usize, tensor: usize },
    /// A run of elements to convert.
    Cast { shard: usize, tensor: usize, elements: Range<u64> },
    /// Whole rows to update.
    Merge { shard: usize, tensor: usize, rows: Range<usize>, slot: usize },
    /// The digest of an adapter's file.
    Digest { adapter: usize },
}

/// The type in which a tensor of that type is added to.
pub(crate) fn accumulator(dtype: &Dtype) -> Dtype {
    if *dtype == Dtype::F64 { Dtype::F64 } else { Dtype::F32 }
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
            Action::Copy if matches!(tensor.origin, Origin::Adapter(_)) => {
                flush(&mut run, &mut queue);
                queue.push(Work::Place { shard: position, tensor: index });
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
            Action::Merge(_) => {
                flush(&mut run, &mut queue);
                let slot = tiles.len();
                let units =
                    if tensor.requantised { encoded_units(tensor) } else { self::tiles(tensor) };
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

/// Rows of a tile: as many whole register blocks as fit, at least one. The same for every output
/// type and kind of update, so that a plan's tiles are a matter of shapes alone.
fn tile_rows(columns: usize, from: &Dtype) -> usize {
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
    let quantised = tensor.quantised.as_ref().expect("it is quantised");
    quantised.blocks.units(rows, columns, tile_rows(columns, &tensor.source.dtype))
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

/// Takes turns between the shards: writes to one file exclude each other in the kernel, so
/// neighbours in the queue, which different threads take, should be of different files.
pub(super) fn interleave(queues: Vec<Vec<Work>>) -> Vec<Work> {
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

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn neighbours_in_the_queue_are_of_different_shards() {
        let unit = |shard| Work::Place { shard, tensor: 0 };
        let queues = vec![vec![unit(0); 3], vec![unit(1)], vec![], vec![unit(3); 2]];
        let order: Vec<_> = interleave(queues)
            .iter()
            .map(|work| match work {
                Work::Place { shard, .. } => *shard,
                _ => unreachable!("nothing else was queued"),
            })
            .collect();
        assert_eq!(order, [0, 1, 0, 3, 0, 3]);
    }
}
