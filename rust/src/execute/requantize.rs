//! Merged weights that are quantised again: rows in f32, encoded in whole blocks, and the scales of
//! all blocks once the last of them is known.

use std::collections::HashMap;
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex, PoisonError};

use super::compute::{Buffers, Computer, lock};
use super::queue;
use super::rounding::RoundingSums;
use super::tile::Prepared;
use crate::checkpoint::quantized::{Encoded, Extent, Failure, Known, Quantized, Scales};
use crate::error::{Error, Result};
use crate::plan::{Plan, PlannedTensor};

/// One tensor while it is quantised again.
#[derive(Debug)]
pub(crate) struct Requantizing {
    /// The shard of each tensor of scales, and where it lies in its file.
    pub scales: Vec<(usize, u64)>,
    state: Mutex<State>,
    survey: Survey,
}

#[derive(Debug)]
struct State {
    /// Of all blocks, from the first unit to the last.
    scales: Vec<f32>,
    changed: bool,
    /// Units that are not encoded yet.
    remaining: usize,
}

/// The search for scales that have to be known before anything is encoded, in which all threads
/// that wait for it take part.
#[derive(Debug)]
struct Survey {
    units: Vec<Range<usize>>,
    next: AtomicUsize,
    found: Mutex<Found>,
    changed: Condvar,
}

#[derive(Debug, Default)]
struct Found {
    extents: Vec<Extent>,
    known: Option<Arc<Known>>,
    /// Whether a thread left early.
    failed: bool,
}

/// Wakes whoever waits for a survey that a thread has left early, by an error or a panic.
struct Alarm<'a>(&'a Survey);

impl Drop for Alarm<'_> {
    fn drop(&mut self) {
        lock(&self.0.found).failed = true;
        self.0.changed.notify_all();
    }
}

/// One unit, encoded.
#[derive(Debug)]
pub(crate) struct Unit {
    /// Where its bytes lie in the tensor.
    pub first: u64,
    /// Those bytes.
    pub codes: Vec<u8>,
    /// What rounding did to it.
    pub rounding: RoundingSums,
    /// If it was the last one.
    pub scales: Option<Finished>,
}

/// The scales of a whole tensor.
#[derive(Debug)]
pub(crate) struct Finished {
    /// The bytes of every tensor of scales.
    pub tensors: Vec<Vec<u8>>,
    /// The scale of each block, before a nested scheme quantises it.
    pub values: Vec<f32>,
}

/// Every tensor of a plan that is quantised again, by its shard and position.
pub(crate) fn all(plan: &Plan) -> HashMap<(usize, usize), Requantizing> {
    let places: HashMap<&str, (usize, u64)> = (plan.shards.iter().enumerate())
        .flat_map(|(position, shard)| {
            let start = shard.header.len() as u64;
            let place = move |tensor: &PlannedTensor| (position, start + tensor.target.start);
            shard.tensors.iter().map(move |tensor| (tensor.name.as_str(), place(tensor)))
        })
        .collect();
    let mut all = HashMap::new();
    for (position, shard) in plan.shards.iter().enumerate() {
        for (index, tensor) in shard.tensors.iter().enumerate().filter(|(_, t)| t.requantized) {
            let stored = quantized(tensor).scales.tensors();
            let scales = stored.iter().map(|stored| places[stored.tensor.name.as_str()]).collect();
            all.insert((position, index), Requantizing::new(tensor, scales));
        }
    }
    all
}

fn quantized(tensor: &PlannedTensor) -> &Quantized {
    tensor.quantized.as_ref().expect("what is quantised again is quantised")
}

impl Requantizing {
    pub fn new(tensor: &PlannedTensor, scales: Vec<(usize, u64)>) -> Self {
        let units = queue::encoded_units(tensor);
        let state = State { scales: Vec::new(), changed: false, remaining: units.len() };
        let survey = Survey {
            units,
            next: AtomicUsize::new(0),
            found: Mutex::new(Found::default()),
            changed: Condvar::new(),
        };
        Self { scales, state: Mutex::new(state), survey }
    }

    /// Computes and encodes one unit of rows.
    ///
    /// # Errors
    /// [`Error::Io`], [`Error::Cancelled`], or [`Error::Numeric`] if a weight became NaN or infinite
    /// or is beyond what codes without scales can hold.
    pub fn encode(
        &self,
        computer: &Computer<'_>,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
        buffers: &mut Buffers,
    ) -> Result<Unit> {
        let scheme = quantized(tensor);
        let (encoded, rounding) = self.encode_rows(computer, tensor, prepared, rows, buffers)?;
        let Encoded { codes, blocks, scales, changed, .. } = encoded;
        let first = scheme.byte_at(rows.start * prepared.columns()) as u64;
        let mut state = lock(&self.state);
        if state.scales.is_empty() {
            state.scales.resize(scheme.blocks.count(), 0.0);
        }
        state.scales[blocks].copy_from_slice(&scales);
        state.changed |= changed;
        state.remaining -= 1;
        if state.remaining > 0 {
            return Ok(Unit { first, codes, rounding, scales: None });
        }
        let values = std::mem::take(&mut state.scales);
        let tensors = scheme.write_scales(&computer.inputs.base, &values, state.changed)?;
        Ok(Unit { first, codes, rounding, scales: Some(Finished { tensors, values }) })
    }

    /// The codes of one unit of rows, as often as they are asked for; the scales are not kept.
    ///
    /// # Errors
    /// As [`Requantizing::encode`].
    pub fn codes(
        &self,
        computer: &Computer<'_>,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
        buffers: &mut Buffers,
    ) -> Result<Vec<u8>> {
        let (encoded, _) = self.encode_rows(computer, tensor, prepared, rows, buffers)?;
        Ok(encoded.codes)
    }

    fn encode_rows(
        &self,
        computer: &Computer<'_>,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
        buffers: &mut Buffers,
    ) -> Result<(Encoded, RoundingSums)> {
        let scheme = quantized(tensor);
        let known = if scheme.blocks.are_tall() {
            Some(self.survey.known(computer, tensor, prepared, buffers)?)
        } else {
            None
        };
        let (values, before) = computer.merged_rows(tensor, prepared, rows, buffers)?;
        let columns = prepared.columns();
        let elements = rows.start * columns..rows.end * columns;
        let base = &computer.inputs.base;
        let encoded = scheme.encode(base, &elements, &values, &before, known.as_deref());
        let encoded = encoded.map_err(|failure| match failure {
            Failure::Other(error) => error,
            Failure::Beyond(element) => beyond(tensor, element, values[element - elements.start]),
        })?;
        let mut rounding = RoundingSums::default();
        rounding.add_results(&before, &values, &encoded.stored);
        Ok((encoded, rounding))
    }
}

impl Survey {
    /// The scales of all blocks, once every unit has been looked at.
    fn known(
        &self,
        computer: &Computer<'_>,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        buffers: &mut Buffers,
    ) -> Result<Arc<Known>> {
        let alarm = Alarm(self);
        self.look(computer, tensor, prepared, buffers)?;
        std::mem::forget(alarm);
        let mut found = lock(&self.found);
        loop {
            if let Some(known) = &found.known {
                return Ok(known.clone());
            }
            if found.failed {
                // The other thread's error counts for more than this one.
                return Err(Error::Cancelled);
            }
            found = self.changed.wait(found).unwrap_or_else(PoisonError::into_inner);
        }
    }

    /// Looks at units until none is left.
    fn look(
        &self,
        computer: &Computer<'_>,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        buffers: &mut Buffers,
    ) -> Result<()> {
        let scheme = quantized(tensor);
        while let Some(rows) = self.units.get(self.next.fetch_add(1, Ordering::Relaxed)) {
            computer.task.check()?;
            let (values, before) = computer.merged_rows(tensor, prepared, rows, buffers)?;
            let columns = prepared.columns();
            let elements = rows.start * columns..rows.end * columns;
            let extent = scheme.extent(&elements, &values, &before);
            let mut found = lock(&self.found);
            found.extents.push(extent);
            if found.extents.len() == self.units.len() {
                let extents = std::mem::take(&mut found.extents);
                found.known = Some(Arc::new(scheme.known(&computer.inputs.base, &extents)?));
                self.changed.notify_all();
            }
        }
        Ok(())
    }
}

fn beyond(tensor: &PlannedTensor, element: usize, value: f32) -> Error {
    let scheme = quantized(tensor);
    let columns = scheme.coded().shape.last().map_or(1, |columns| *columns as usize).max(1);
    let (row, column) = (element / columns, element % columns);
    let holder = match &scheme.scales {
        Scales::None => format!("{} holds without a scale", tensor.output_dtype),
        _ => "its largest scale holds under the number for the whole tensor".to_owned(),
    };
    Error::Numeric {
        tensor: tensor.name.clone(),
        message: format!(
            "the merge makes the weight at row {row}, column {column} {value}, which is beyond what \
             {holder}; nothing was written; write the model in another dtype (dtype=\"bfloat16\", \
             --dtype bfloat16)"
        ),
    }
}

impl Computer<'_> {
    /// Rows of a merged tensor in f32, and what the base has there.
    fn merged_rows(
        &self,
        tensor: &PlannedTensor,
        prepared: &Prepared,
        rows: &Range<usize>,
        buffers: &mut Buffers,
    ) -> Result<(Vec<f32>, Vec<f32>)> {
        let columns = prepared.columns();
        let mut values = Vec::with_capacity(rows.len() * columns);
        for tile in queue::tiles_covering(tensor, rows) {
            self.task.check()?;
            let merged = self.merge(tensor, prepared, &tile, buffers)?;
            // A tile can begin before the rows that are asked for.
            let skipped = rows.start.saturating_sub(tile.start) * columns * 4;
            let merged = &merged[skipped..];
            let filled = values.len();
            values.resize(filled + merged.len() / 4, 0.0);
            bytemuck::cast_slice_mut(&mut values[filled..]).copy_from_slice(merged);
        }
        let elements = rows.start * columns..rows.end * columns;
        let before = quantized(tensor).decode(&self.inputs.base, &elements)?;
        Ok((values, before))
    }
}
