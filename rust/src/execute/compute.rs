//! The bytes of the output's tensors, a tile at a time, wherever they go then.

use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};

use super::accumulator::Real;
use super::exact::{ExactSum, ExactTile};
use super::queue;
use super::rounding::RoundingSums;
pub(crate) use super::tile::Prepared;
use super::tile::{Segment, Selections};
use crate::adapter::factors::Pair;
use crate::error::{Error, Result};
use crate::execute::residual::Weight;
use crate::kernel::{self, InstructionSet, Recomputed};
use crate::parallel::task::Task;
use crate::plan::{Action, Inputs, Origin, PlannedTensor, Precision};
use crate::tensor::dtype::Dtype;

/// A lock whose holder panicked protects nothing that could be half-made here.
pub(crate) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// The prepared updates of one tensor: made by the first thread that needs them, dropped by the
/// last.
#[derive(Debug)]
pub(crate) struct Slot {
    prepared: Mutex<Option<Arc<Prepared>>>,
    remaining: AtomicUsize,
}

impl Slot {
    /// For a tensor that comes in that many tiles.
    pub fn new(tiles: usize) -> Self {
        Self { prepared: Mutex::new(None), remaining: AtomicUsize::new(tiles) }
    }

    /// What is prepared, made now if nobody has yet; whoever else asks waits for it.
    pub fn prepared(&self, make: impl FnOnce() -> Result<Prepared>) -> Result<Arc<Prepared>> {
        let mut prepared = lock(&self.prepared);
        match &*prepared {
            Some(prepared) => Ok(prepared.clone()),
            None => Ok(prepared.insert(Arc::new(make()?)).clone()),
        }
    }

    /// Says that one more tile is done.
    pub fn release(&self) {
        if self.remaining.fetch_sub(1, Ordering::AcqRel) == 1 {
            lock(&self.prepared).take();
        }
    }
}

/// A thread's memory, grown to what its work needs and kept.
#[derive(Default)]
pub(crate) struct Buffers {
    /// Rows as they are stored; the result too, where products are added in place.
    stored: Vec<u8>,
    /// Rows as the output stores them.
    result: Vec<u8>,
    /// W₀, scratch and sum in the accumulator's type.
    single: [Vec<f32>; 3],
    double: [Vec<f64>; 3],
    /// What its exact sums had to compute again.
    pub recomputed: Recomputed,
}

/// Bytes of a cache line, and of the widest vector.
const LINE: usize = 64;

/// Room that begins with a cache line: vectors that cross its end cost twice.
fn reserve(buffer: &mut Vec<u8>, bytes: usize) -> &mut [u8] {
    if buffer.len() < bytes + LINE {
        buffer.resize(bytes + LINE, 0);
    }
    let begin = buffer.as_ptr().addr().wrapping_neg() % LINE;
    &mut buffer[begin..begin + bytes]
}

impl Buffers {
    /// Room for that many bytes.
    pub fn stored(&mut self, bytes: usize) -> &mut [u8] {
        reserve(&mut self.stored, bytes)
    }
}

/// What every computation needs.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Computer<'a> {
    pub inputs: &'a Inputs,
    pub set: InstructionSet,
    pub task: &'a Task,
}

impl Computer<'_> {
    /// Reads a tensor's bytes from `offset` on, wherever it comes from.
    ///
    /// # Errors
    /// That the file changed, or [`Error::Io`].
    pub fn read(&self, tensor: &PlannedTensor, buffer: &mut [u8], offset: usize) -> Result<()> {
        if let Some(quantized) = &tensor.quantized {
            return quantized.read(&self.inputs.base, buffer, offset, tensor.requantized);
        }
        match tensor.origin {
            Origin::Base(shard) => {
                let file = &self.inputs.base.shards()[shard].file;
                file.read_into(&tensor.source, offset as u64, buffer)
            }
            Origin::Adapter(adapter) => {
                let file = self.inputs.adapters[adapter].file();
                file.read_into(&tensor.source, offset as u64, buffer)
            }
        }
    }

    /// Converts a run of elements; the bytes are in `buffers` until they are used again.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Numeric`] if a finite element became infinite.
    pub fn cast<'b>(
        &self,
        tensor: &PlannedTensor,
        elements: &Range<u64>,
        buffers: &'b mut Buffers,
    ) -> Result<&'b [u8]> {
        let (from, to) = (&tensor.source.dtype, &tensor.output_dtype);
        let first = elements.start as usize;
        let count = elements.end as usize - first;
        let stored = reserve(&mut buffers.stored, count * from.size());
        let result = reserve(&mut buffers.result, count * to.size());
        self.read(tensor, stored, first * from.size())?;
        if !kernel::convert(self.set, from, stored, to, result) {
            self.find_overflow(tensor, result, first)?;
        }
        Ok(result)
    }

    /// Computes whole rows; the bytes are in `buffers` until they are used again.
    ///
    /// # Errors
    /// [`Error::Io`], or [`Error::Numeric`] if a finite weight became NaN or infinite.
    pub fn merge<'b>(
        &self,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
        buffers: &'b mut Buffers,
    ) -> Result<&'b [u8]> {
        self.merge_measured(tensor, prepared, rows, buffers, None)
    }

    /// The same, and adds what rounding does to the first of the rows to some sums.
    ///
    /// # Errors
    /// As [`Computer::merge`].
    pub fn merge_measured<'b>(
        &self,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
        buffers: &'b mut Buffers,
        sums: Option<&mut RoundingSums>,
    ) -> Result<&'b [u8]> {
        self.merge_read(tensor, prepared, rows, buffers, (None, sums))
    }

    /// The same of rows of W₀ that somebody has read, where they are given.
    ///
    /// # Errors
    /// As [`Computer::merge`].
    pub fn merge_read<'b>(
        &self,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
        buffers: &'b mut Buffers,
        (read, sums): (Option<&[u8]>, Option<&mut RoundingSums>),
    ) -> Result<&'b [u8]> {
        let (from, to) = (&tensor.source.dtype, tensor.rounded_dtype());
        let first = rows.start * prepared.columns();
        let count = rows.len() * prepared.columns();
        let segment = prepared.segment(rows);
        if let Some(exact) = segment.exact() {
            let place = (rows, segment.first_row(), prepared.columns());
            return self.merge_exactly(tensor, exact, place, buffers, (read, sums));
        }
        let Buffers { stored, result, single, double, .. } = buffers;
        let stored = reserve(stored, count * from.size());
        match read {
            Some(read) => stored.copy_from_slice(read),
            None => self.read(tensor, stored, first * from.size())?,
        }
        let columns = prepared.columns();
        let row = rows.start..rows.start + 1;
        let before =
            sums.is_some().then(|| widened(self.set, from, &stored[..columns * from.size()]));
        // What is to be added, or what the sum is, as far as f32 tells.
        let mut exact = Vec::new();
        let in_place = from == to && segment.only_sum().is_some();
        if let (Some(before), false) = (&before, in_place) {
            let stored = &stored[..columns * from.size()];
            exact.resize(before.len(), 0f32);
            let wide = (&Dtype::F32, bytemuck::cast_slice_mut(&mut exact));
            if queue::accumulator(from) == Dtype::F64 {
                self.apply(segment, &row, (from, stored), double, wide)?;
            } else {
                self.apply(segment, &row, (from, stored), single, wide)?;
            }
        }
        let (finite, result) = match segment.only_sum() {
            Some(factors) if from == to => {
                let first = rows.start - segment.first_row();
                if before.is_some() {
                    // The product alone, added to zeros. Its own rounding is a small share of it.
                    let mut product = vec![0; columns * from.size()];
                    kernel::merge_rows(self.set, factors, first, from, &mut product);
                    exact = widened(self.set, from, &product);
                }
                (kernel::merge_rows(self.set, factors, first, from, stored), stored)
            }
            // Through the accumulator's type, so that the only rounding is the last one.
            _ => {
                let result = reserve(result, count * to.size());
                let finite = if queue::accumulator(from) == Dtype::F64 {
                    self.apply(segment, rows, (from, stored), double, (to, result))?
                } else {
                    self.apply(segment, rows, (from, stored), single, (to, result))?
                };
                (finite, result)
            }
        };
        if !finite {
            self.find_overflow(tensor, result, first)?;
        }
        if let (Some(sums), Some(before)) = (sums, before) {
            let written = widened(self.set, to, &result[..columns * to.size()]);
            if in_place {
                sums.add_changes(&before, &exact, &written);
            } else {
                sums.add_results(&before, &exact, &written);
            }
        }
        Ok(result)
    }

    /// The same where the real number is rounded once.
    fn merge_exactly<'b>(
        &self,
        tensor: &PlannedTensor,
        exact: &ExactSum,
        (rows, first_row, columns): (&Range<usize>, usize, usize),
        buffers: &'b mut Buffers,
        (read, sums): (Option<&[u8]>, Option<&mut RoundingSums>),
    ) -> Result<&'b [u8]> {
        let (from, to) = (&tensor.source.dtype, tensor.rounded_dtype());
        let (first, count) = (rows.start * columns, rows.len() * columns);
        let Buffers { stored, result, recomputed, .. } = buffers;
        let stored = reserve(stored, count * from.size());
        let result = reserve(result, count * to.size());
        match read {
            Some(read) => stored.copy_from_slice(read),
            None => self.read(tensor, stored, first * from.size())?,
        }
        let within = rows.start - first_row..rows.end - first_row;
        let tile = ExactTile { rows: &within, dtype: from, stored };
        if !exact.merge_rows(self.set, tile, (to, result), recomputed)? {
            self.find_overflow(tensor, result, first)?;
        }
        if let Some(sums) = sums {
            let before = widened(self.set, from, &stored[..columns * from.size()]);
            let changes = exact.changes(within.start, &before)?;
            sums.add_changes(
                &before,
                &changes,
                &widened(self.set, to, &result[..columns * to.size()]),
            );
        }
        Ok(result)
    }

    /// Applies updates to a tile in the accumulator's type and rounds once; whether all is finite.
    fn apply<T: Real>(
        &self,
        segment: &Segment,
        rows: &Range<usize>,
        (from, stored): (&Dtype, &[u8]),
        wide: &mut [Vec<T>; 3],
        (to, result): (&Dtype, &mut [u8]),
    ) -> Result<bool> {
        let count = stored.len() / from.size();
        for buffer in wide.iter_mut().filter(|buffer| buffer.len() < count) {
            buffer.resize(count, T::default());
        }
        let [start, scratch, sum] = wide;
        let (start, sum) = (&mut start[..count], &mut sum[..count]);
        kernel::convert(self.set, from, stored, &T::DTYPE, bytemuck::cast_slice_mut(start));
        segment.apply(self.set, rows, start, &mut scratch[..count], sum)?;
        Ok(kernel::convert(self.set, &T::DTYPE, bytemuck::cast_slice(sum), to, result))
    }

    /// The updates of a merged tensor, packed.
    ///
    /// # Errors
    /// That a file changed, or [`Error::Io`].
    pub fn prepare(&self, tensor: &PlannedTensor) -> Result<Prepared> {
        self.prepare_with(tensor, None)
    }

    /// The same with what entry-wise methods found out before.
    ///
    /// # Errors
    /// As [`Computer::prepare`].
    pub fn prepare_with(
        &self,
        tensor: &PlannedTensor,
        known: Option<&Selections>,
    ) -> Result<Prepared> {
        let wide = queue::accumulator(&tensor.source.dtype);
        let removed = self.removed(tensor)?;
        let mut scan =
            |each: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>| self.scan(tensor, &wide, each);
        Prepared::new(self.set, self.inputs, tensor, &wide, removed, known, &mut scan)
    }

    /// The same for [`Computer::wide_rows`], of a tensor that is written in f64.
    ///
    /// # Errors
    /// As [`Computer::prepare`].
    pub fn prepare_wide(&self, tensor: &PlannedTensor) -> Result<Prepared> {
        let removed = self.removed(tensor)?;
        let mut scan = |each: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>| {
            self.scan(tensor, &Dtype::F64, each)
        };
        let tensor = &PlannedTensor { precision: Precision::Default, ..tensor.clone() };
        Prepared::new(self.set, self.inputs, tensor, &Dtype::F64, removed, None, &mut scan)
    }

    /// Whole rows in f64, as they are and as the updates make them, computed in f64 whatever the
    /// weight's type.
    ///
    /// # Errors
    /// [`Error::Io`], or that a file changed.
    pub fn wide_rows(
        &self,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
    ) -> Result<[Vec<f64>; 2]> {
        let from = &tensor.source.dtype;
        let (first, count) = (rows.start * prepared.columns(), rows.len() * prepared.columns());
        let mut stored = vec![0; count * from.size()];
        self.read(tensor, &mut stored, first * from.size())?;
        let before = kernel::convert::widen_f64(from, &stored);
        let mut start = before.clone();
        let (mut scratch, mut after) = (vec![0.0; count], vec![0.0; count]);
        let segment = prepared.segment(rows);
        segment.apply(self.set, rows, &mut start, &mut scratch, &mut after)?;
        Ok([before, after])
    }

    /// A whole tensor in f64.
    ///
    /// # Errors
    /// [`Error::Io`].
    pub fn weight(&self, tensor: &PlannedTensor) -> Result<Weight> {
        let (rows, columns) = tensor.matrix();
        let mut values = Vec::with_capacity(rows * columns);
        self.scan(tensor, &Dtype::F64, &mut |_, tile| {
            let wide = tile.chunks_exact(size_of::<f64>());
            values.extend(wide.map(bytemuck::pod_read_unaligned::<f64>));
            Ok(())
        })?;
        Ok(Weight { rows, columns, values })
    }

    /// What the initialisations of a tensor's updates took out of it, by the adapter's position and
    /// its module.
    ///
    /// # Errors
    /// [`Error::Io`] if the tensor cannot be read, [`Error::Numeric`] if it cannot be decomposed.
    pub fn removed<'t>(&self, tensor: &'t PlannedTensor) -> Result<Vec<((usize, &'t str), Pair)>> {
        let mut removed = Vec::new();
        let mut weight = None;
        for update in tensor.updates() {
            let Some(what) = update.residual else { continue };
            let weight = match &weight {
                Some(weight) => weight,
                None => &*weight.insert(self.weight(tensor)?),
            };
            let pair = weight
                .removed(what, update.rank as usize, update.orientation())
                .map_err(|message| Error::Numeric { tensor: tensor.name.clone(), message })?;
            removed.push(((update.adapter, update.module.as_str()), pair));
        }
        Ok(removed)
    }

    /// Reads a tensor tile by tile in the accumulator's type.
    fn scan(
        &self,
        tensor: &PlannedTensor,
        wide: &Dtype,
        each: &mut dyn FnMut(usize, &mut [u8]) -> Result<()>,
    ) -> Result<()> {
        let from = &tensor.source.dtype;
        let (_, columns) = tensor.matrix();
        let (mut stored, mut widened) = (Vec::new(), Vec::new());
        for tile in queue::tiles(tensor) {
            self.task.check()?;
            let count = tile.len() * columns;
            let stored = reserve(&mut stored, count * from.size());
            let widened = reserve(&mut widened, count * wide.size());
            self.read(tensor, stored, tile.start * columns * from.size())?;
            kernel::convert(self.set, from, stored, wide, widened);
            each(tile.start, widened)?;
        }
        Ok(())
    }

    /// Something in the result is not finite: an error unless it came so from its source.
    pub(super) fn find_overflow(
        &self,
        tensor: &PlannedTensor,
        result: &[u8],
        first: usize,
    ) -> Result<()> {
        let dtype = &tensor.source.dtype;
        let mut stored = vec![0; result.len() / tensor.rounded_dtype().size() * dtype.size()];
        self.read(tensor, &mut stored, first * dtype.size())?;
        let before = kernel::convert::widen_f64(dtype, &stored);
        let after = kernel::convert::widen_f64(tensor.rounded_dtype(), result);
        let is_made = |(before, after): (&f64, &f64)| before.is_finite() && !after.is_finite();
        match before.iter().zip(&after).position(is_made) {
            Some(index) => {
                // What is half of one state and half of another can be anything.
                self.inputs.check_unchanged()?;
                Err(overflow(tensor, first + index, &self.culprit(tensor)))
            }
            None => Ok(()),
        }
    }

    /// Names an adapter whose tensors are not finite themselves, or else the operation.
    pub(super) fn culprit(&self, tensor: &PlannedTensor) -> String {
        if !matches!(tensor.action, Action::Merge(_) | Action::MergeEntries(_)) {
            return "the conversion".into();
        }
        for update in tensor.updates() {
            let adapter = &self.inputs.adapters[update.adapter];
            let module = adapter.modules().get(&update.module);
            for (_, part) in module.into_iter().flat_map(|module| module.tensors()) {
                let is_odd = |values: Vec<f32>| values.iter().any(|value| !value.is_finite());
                if part.dtype.is_mergeable() && part.read_f32().is_ok_and(is_odd) {
                    let path = adapter.path().display();
                    return format!("the NaN or infinity in {} of {path}", part.name);
                }
            }
        }
        "the merge".into()
    }
}

/// Computes the elements of whole rows of an exact sum again that are not finite; whether all are then.
pub(super) fn decide(
    prepared: &Prepared,
    rows: &Range<usize>,
    (from, stored): (&Dtype, &[u8]),
    target: (&Dtype, &mut [u8]),
    recomputed: &mut Recomputed,
) -> bool {
    let segment = prepared.segment(rows);
    let first = segment.first_row();
    let within = rows.start - first..rows.end - first;
    let tile = ExactTile { rows: &within, dtype: from, stored };
    // Rows that nothing changes were only converted.
    segment.exact().is_none_or(|exact| exact.decide(tile, target, recomputed))
}

/// Stored elements in f32.
pub(super) fn widened(set: InstructionSet, dtype: &Dtype, stored: &[u8]) -> Vec<f32> {
    let mut values = vec![0f32; stored.len() / dtype.size()];
    kernel::convert(set, dtype, stored, &Dtype::F32, bytemuck::cast_slice_mut(&mut values));
    values
}

pub(super) fn overflow(tensor: &PlannedTensor, index: usize, culprit: &str) -> Error {
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
