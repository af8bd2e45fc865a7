//! Views: a merge that writes nothing. The bytes of a tensor of the output, or of a part of it, are
//! computed when somebody asks for them, as a file merge computes them.

mod difference;
mod digests;
mod selection;
mod stream;

use std::collections::{HashMap, HashSet};
use std::ops::Range;
use std::sync::atomic::{AtomicUsize, Ordering};
use std::sync::{Arc, Mutex};

use indexmap::IndexMap;
use serde::Deserialize;

use super::compute::{Buffers, Computer, Prepared, lock};
use super::queue::{self, TILE_BYTES};
use super::requantize::{Finished, Requantizing};
use super::rewrite;
use super::session::TensorId;
use crate::error::{Error, Result};
use crate::kernel::InstructionSet;
use crate::kernel::large_pages::zeros;
use crate::parallel::task::{self, Task};
use crate::plan::{Action, Inputs, Origin, Plan, PlannedTensor};

pub use difference::Difference;
pub use selection::Selection;
pub use stream::{Item, Next, Stream};

/// Bytes that are copied at once.
const COPY_BYTES: usize = 1 << 20;
/// From so many bytes on, several threads share a piece of work.
const SHARED_BYTES: usize = 1 << 20;
/// Bytes of scales that are kept until somebody asks for them.
const KEPT_BYTES: usize = 64 << 20;

/// The output of a plan, of which nothing is there until it is asked for.
#[derive(Debug)]
pub struct View {
    inputs: Inputs,
    plan: Arc<Plan>,
    set: InstructionSet,
    threads: usize,
    places: HashMap<String, TensorId>,
    /// All tensors, by the shards' names and their places in these.
    order: Vec<TensorId>,
    /// Of each tensor of scales that is written anew the weight that it belongs to.
    owners: HashMap<TensorId, TensorId>,
    /// Scales that were found with a weight's codes, or with other scales of the weight.
    scales: Mutex<IndexMap<TensorId, Vec<u8>>>,
}

/// A tensor of a view, with what its parts have in common: that is found out once.
#[derive(Debug)]
pub struct Part {
    id: TensorId,
    /// Whether the whole tensor is computed once, so that its scales are known in the end.
    once: bool,
    ready: Mutex<Option<Arc<Ready>>>,
}

/// What has to be known of a tensor before any row of it can be computed.
#[derive(Debug)]
struct Ready {
    prepared: Prepared,
    requantizing: Option<Requantizing>,
}

/// A unit of work: bytes of a tensor that are computed together.
#[derive(Debug)]
struct Piece {
    what: What,
    /// Where they lie in the tensor.
    bytes: Range<usize>,
    /// Where those that are selected lie among all that are.
    target: Range<usize>,
}

#[derive(Debug)]
enum What {
    /// They are the source's.
    Copied,
    /// They are these elements of the source, converted.
    Cast(Range<u64>),
    /// They are these rows, merged.
    Merged(Range<usize>),
    /// They are the codes of these rows, which are whole blocks.
    Encoded(Range<usize>),
    /// They are scales.
    Scales,
}

impl View {
    /// A view of what a plan would write, computed by so many threads (`None`: one per core).
    ///
    /// # Errors
    /// [`Error::Argument`] for a number of threads that cannot be.
    pub fn new(inputs: Inputs, plan: Arc<Plan>, threads: Option<usize>) -> Result<Self> {
        let mut places = HashMap::new();
        let mut order = Vec::new();
        let mut scaled = Vec::new();
        for (shard, planned) in plan.shards.iter().enumerate() {
            for (position, tensor) in planned.tensors.iter().enumerate() {
                places.insert(tensor.name.clone(), (shard, position));
                order.push((shard, position));
                if tensor.requantized {
                    scaled.push((shard, position));
                }
            }
        }
        order.sort_by_key(|(shard, position)| {
            let shard = &plan.shards[*shard];
            let target = &shard.tensors[*position].target;
            (&shard.name, target.start, target.end)
        });
        let mut owners = HashMap::new();
        for id in scaled {
            let tensor = &plan.shards[id.0].tensors[id.1];
            let quantized =
                tensor.quantized.as_ref().expect("what is quantised again is quantised");
            for stored in quantized.scales.tensors() {
                if let Some(scales) = places.get(&stored.tensor.name) {
                    owners.insert(*scales, id);
                }
            }
        }
        Ok(Self {
            inputs,
            plan,
            set: InstructionSet::detect(),
            threads: task::thread_count(threads)?,
            places,
            order,
            owners,
            scales: Mutex::default(),
        })
    }

    /// The names of all tensors, by the shards' names and their places in these.
    pub fn names(&self) -> impl Iterator<Item = &str> {
        self.order.iter().map(|id| self.tensor(*id).name.as_str())
    }

    /// All tensors in that order.
    pub fn tensors(&self) -> &[TensorId] {
        &self.order
    }

    /// The tensor of that name.
    pub fn find(&self, name: &str) -> Option<TensorId> {
        self.places.get(name).copied()
    }

    /// A tensor as it is planned.
    pub fn tensor(&self, (shard, tensor): TensorId) -> &PlannedTensor {
        &self.plan.shards[shard].tensors[tensor]
    }

    /// Bytes of a tensor.
    pub fn bytes(&self, id: TensorId) -> usize {
        let target = &self.tensor(id).target;
        (target.end - target.start) as usize
    }

    /// The metadata of the headers that the shards would have, all together; `None` where they have
    /// none.
    pub fn metadata(&self) -> Option<IndexMap<String, String>> {
        #[derive(Deserialize)]
        struct Header {
            #[serde(rename = "__metadata__")]
            metadata: Option<IndexMap<String, String>>,
        }
        let mut all: Option<IndexMap<String, String>> = None;
        for shard in &self.plan.shards {
            // Behind the length.
            let header = shard.header.get(8..).map(serde_json::from_slice::<Header>);
            if let Some(Ok(Header { metadata: Some(metadata) })) = header {
                let all = all.get_or_insert_default();
                for (name, text) in metadata {
                    all.entry(name).or_insert(text);
                }
            }
        }
        all
    }

    /// The configs of the output under their names in it.
    pub fn configs(&self) -> IndexMap<String, Vec<u8>> {
        rewrite::config_contents(&self.inputs, &self.plan)
    }

    /// A tensor of which parts will be asked for.
    pub fn part(&self, id: TensorId) -> Part {
        Part { id, once: false, ready: Mutex::default() }
    }

    /// Part of a tensor, as bytes.
    ///
    /// # Errors
    /// That a file changed meanwhile, [`Error::Numeric`] if a finite weight became NaN or infinite,
    /// [`Error::Io`], [`Error::Cancelled`].
    pub fn read(&self, part: &Part, selection: &Selection, task: &Task) -> Result<Vec<u8>> {
        let read = self.fill(&[(part, selection)], task);
        if read.is_err() {
            lock(&part.ready).take();
        }
        Ok(read?.pop().expect("one for each part"))
    }

    /// A whole tensor, as bytes.
    ///
    /// # Errors
    /// As [`View::read`].
    pub fn read_whole(&self, id: TensorId, task: &Task) -> Result<Vec<u8>> {
        let mut read = self.read_all(&[id], task)?;
        Ok(read.pop().expect("one for each tensor"))
    }

    /// Several whole tensors, as bytes.
    ///
    /// # Errors
    /// As [`View::read`].
    fn read_all(&self, ids: &[TensorId], task: &Task) -> Result<Vec<Vec<u8>>> {
        let parts: Vec<_> = ids.iter().map(|id| Part { once: true, ..self.part(*id) }).collect();
        let selections: Vec<_> = ids.iter().map(|id| Selection::whole(self.bytes(*id))).collect();
        self.fill(&parts.iter().zip(&selections).collect::<Vec<_>>(), task)
    }

    /// Computes parts of tensors, whose work threads share out between them.
    fn fill(&self, wanted: &[(&Part, &Selection)], task: &Task) -> Result<Vec<Vec<u8>>> {
        let mut results: Vec<_> =
            wanted.iter().map(|(_, selection)| zeros(selection.bytes())).collect();
        let mut work = Vec::new();
        for ((part, selection), result) in wanted.iter().zip(&mut results) {
            let mut rest: &mut [u8] = result;
            for piece in self.pieces(part.id, selection) {
                let (target, after) = rest.split_at_mut(piece.target.len());
                rest = after;
                work.push((*part, *selection, piece, Mutex::new(Some(target))));
            }
        }
        let (next_part, next) = (AtomicUsize::new(0), AtomicUsize::new(0));
        let failure = Mutex::new(None);
        let fail = |error| {
            next_part.store(wanted.len(), Ordering::Relaxed);
            next.store(work.len(), Ordering::Relaxed);
            let mut failure = lock(&failure);
            // A thread that another one's error stopped only says that it was.
            if matches!(*failure, None | Some(Error::Cancelled)) {
                *failure = Some(error);
            }
        };
        let run = || {
            let computer = Computer { inputs: &self.inputs, set: self.set, task };
            let mut buffers = Buffers::default();
            // The pieces of a tensor wait for each other in this; so whole tensors are shared out first.
            while let Some((part, _)) = wanted.get(next_part.fetch_add(1, Ordering::Relaxed)) {
                let looks_at_all = match &self.tensor(part.id).action {
                    Action::MergeEntries(merge) => merge.needs_passes(),
                    _ => false,
                };
                if looks_at_all && let Err(error) = self.ready(part, &computer) {
                    fail(error);
                }
            }
            while let Some((part, selection, piece, target)) =
                work.get(next.fetch_add(1, Ordering::Relaxed))
            {
                let target = lock(target).take().expect("each piece is taken once");
                let done = task.check().and_then(|()| {
                    self.carry_out(part, selection, piece, &computer, &mut buffers, target)
                });
                if let Err(error) = done {
                    fail(error);
                }
            }
        };
        let bytes: usize = work.iter().map(|(_, _, piece, _)| piece.bytes.len()).sum();
        let threads = if bytes < SHARED_BYTES { 1 } else { self.threads.min(work.len()) };
        std::thread::scope(|scope| {
            for _ in 1..threads {
                // With one thread less it takes longer.
                let _ = std::thread::Builder::new().spawn_scoped(scope, run);
            }
            run();
        });
        drop(work);
        if let Some(error) = failure.into_inner().unwrap_or_else(std::sync::PoisonError::into_inner)
        {
            return Err(error);
        }
        self.check_unchanged(wanted.iter().map(|(part, _)| part.id))?;
        Ok(results)
    }

    /// The work that a part of a tensor is.
    fn pieces(&self, id: TensorId, selection: &Selection) -> Vec<Piece> {
        let tensor = self.tensor(id);
        let span = selection.span();
        let piece = |what, bytes: Range<usize>| {
            let target = selection.target_of(&bytes);
            Piece { what, bytes, target }
        };
        let mut pieces = Vec::new();
        if span.is_empty() {
            return pieces;
        }
        match &tensor.action {
            Action::Copy => {
                let unit = if selection.is_run() { COPY_BYTES } else { TILE_BYTES };
                for start in span.clone().step_by(unit) {
                    pieces.push(piece(What::Copied, start..span.end.min(start + unit)));
                }
            }
            Action::Cast => {
                let size = tensor.output_dtype.size();
                let unit = TILE_BYTES / size.max(tensor.source.dtype.size());
                let elements = span.start / size..span.end.div_ceil(size);
                for start in elements.clone().step_by(unit) {
                    let elements = start..elements.end.min(start + unit);
                    let bytes = elements.start * size..elements.end * size;
                    let elements = elements.start as u64..elements.end as u64;
                    pieces.push(piece(What::Cast(elements), bytes));
                }
            }
            Action::Rescale => pieces.push(piece(What::Scales, 0..self.bytes(id))),
            Action::Merge(_) | Action::MergeEntries(_) if tensor.requantized => {
                let scheme = tensor.quantized.as_ref().expect("it is quantised");
                let columns = tensor.matrix().1;
                for rows in queue::encoded_units(tensor) {
                    let first = scheme.byte_at(rows.start * columns);
                    let bytes = first..scheme.bytes_of(rows.end * columns);
                    pieces.push(piece(What::Encoded(rows), bytes));
                }
            }
            Action::Merge(_) | Action::MergeEntries(_) => {
                let row = tensor.matrix().1 * tensor.output_dtype.size();
                let rows = span.start / row..span.end.div_ceil(row);
                for rows in queue::tiles_covering(tensor, &rows) {
                    let bytes = rows.start * row..rows.end * row;
                    pieces.push(piece(What::Merged(rows), bytes));
                }
            }
        }
        pieces.retain(|piece| !piece.target.is_empty());
        pieces
    }

    /// What has to be known of a whole tensor, found out now if nobody has yet.
    fn ready(&self, part: &Part, computer: &Computer<'_>) -> Result<Arc<Ready>> {
        let mut ready = lock(&part.ready);
        if let Some(ready) = &*ready {
            return Ok(ready.clone());
        }
        let tensor = self.tensor(part.id);
        let prepared = computer.prepare(tensor)?;
        let requantizing = tensor.requantized.then(|| Requantizing::new(tensor, Vec::new()));
        Ok(ready.insert(Arc::new(Ready { prepared, requantizing })).clone())
    }

    fn carry_out(
        &self,
        part: &Part,
        selection: &Selection,
        piece: &Piece,
        computer: &Computer<'_>,
        buffers: &mut Buffers,
        target: &mut [u8],
    ) -> Result<()> {
        let tensor = self.tensor(part.id);
        let first = piece.bytes.start;
        match &piece.what {
            What::Copied if target.len() == piece.bytes.len() => {
                return computer.read(tensor, target, first);
            }
            What::Copied => {
                let buffer = buffers.stored(piece.bytes.len());
                computer.read(tensor, buffer, first)?;
                selection.copy(first, buffer, target);
            }
            What::Cast(elements) => {
                selection.copy(first, computer.cast(tensor, elements, buffers)?, target);
            }
            What::Merged(rows) => {
                let ready = self.ready(part, computer)?;
                let merged = computer.merge(tensor, &ready.prepared, rows, buffers)?;
                selection.copy(first, merged, target);
            }
            What::Encoded(rows) => {
                let ready = self.ready(part, computer)?;
                let Ready { prepared, requantizing } = &*ready;
                let requantizing = requantizing.as_ref().expect("it is quantised again");
                if part.once {
                    let unit = requantizing.encode(computer, tensor, prepared, rows, buffers)?;
                    selection.copy(first, &unit.codes, target);
                    if let Some(scales) = unit.scales {
                        self.keep(part.id, scales);
                    }
                } else {
                    let codes = requantizing.codes(computer, tensor, prepared, rows, buffers)?;
                    selection.copy(first, &codes, target);
                }
            }
            What::Scales => selection.copy(0, &self.scales(part.id, computer, buffers)?, target),
        }
        Ok(())
    }

    /// The scales that a weight has when it is quantised again; all of it is computed for them, where
    /// that was not done just before.
    fn scales(
        &self,
        id: TensorId,
        computer: &Computer<'_>,
        buffers: &mut Buffers,
    ) -> Result<Vec<u8>> {
        if let Some(scales) = lock(&self.scales).shift_remove(&id) {
            return Ok(scales);
        }
        let owner = self.owners[&id];
        let tensor = self.tensor(owner);
        let prepared = computer.prepare(tensor)?;
        let requantizing = Requantizing::new(tensor, Vec::new());
        for rows in queue::encoded_units(tensor) {
            computer.task.check()?;
            let unit = requantizing.encode(computer, tensor, &prepared, &rows, buffers)?;
            if let Some(scales) = unit.scales {
                self.keep(owner, scales);
            }
        }
        let scales = lock(&self.scales).shift_remove(&id);
        // Another thread may have taken them.
        scales.map_or_else(|| self.scales(id, computer, buffers), Ok)
    }

    /// Keeps a weight's scales until they are asked for, or until there are too many.
    fn keep(&self, owner: TensorId, found: Finished) {
        let mut scales = lock(&self.scales);
        let quantized = self.tensor(owner).quantized.as_ref().expect("it is quantised");
        for (stored, bytes) in quantized.scales.tensors().into_iter().zip(found.tensors) {
            if let Some(id) = self.find(&stored.tensor.name) {
                scales.insert(id, bytes);
            }
        }
        let mut kept: usize = scales.values().map(Vec::len).sum();
        while kept > KEPT_BYTES && scales.len() > 3 {
            kept -= scales.shift_remove_index(0).map_or(0, |(_, bytes)| bytes.len());
        }
    }

    /// Looks again at the files that some tensors were made from.
    fn check_unchanged(&self, ids: impl Iterator<Item = TensorId>) -> Result<()> {
        let (mut shards, mut adapters) = (HashSet::new(), HashSet::new());
        for id in ids {
            let tensor = self.tensor(id);
            let weight = self.owners.get(&id).map_or(tensor, |owner| self.tensor(*owner));
            match tensor.origin {
                Origin::Base(shard) => shards.insert(shard),
                Origin::Adapter(adapter) => adapters.insert(adapter),
            };
            adapters.extend(weight.updates().iter().map(|update| update.adapter));
            if let Some(quantized) = &weight.quantized {
                shards.insert(quantized.stored.shard);
                shards.extend(quantized.scales.tensors().iter().map(|stored| stored.shard));
            }
        }
        for shard in shards {
            self.inputs.base.shards()[shard].file.check_unchanged()?;
        }
        adapters.into_iter().try_for_each(|adapter| self.inputs.adapters[adapter].check_unchanged())
    }
}
