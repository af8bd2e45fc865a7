//! The arithmetic of one tensor's updates, tile by tile.
//!
//! Updates that only add are one packed product. Overrides of W₀ (DoRA, replacements)
//! are made from W₀ each on its own and added by their difference: W₀ + Σ wᵢ·(Wᵢ − W₀). Where
//! updates lie on ranges of rows, each range with the same updates is a segment of its own.
//! In stages, each stage's W₀ is what the one before it left.

use std::ops::Range;

use super::accumulator::{Real, sum_of_squares};
use super::entries::{Entries, MergedRow, Own, Products};
use super::exact::{ExactOrigin, ExactProduct, ExactSum};
use super::queue;
use crate::adapter::Adapter;
use crate::adapter::factors::Pair;
use crate::adapter::matrix::Matrix;
use crate::entrywise::{Finder, Mask, Selection};
use crate::error::Result;
use crate::kernel::{self, Factors, InstructionSet};
use crate::plan::{Action, EntryMerge, Inputs, PlannedTensor, Precision, Update, UpdateKind};
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;
use crate::tensor::safetensors::Tensor;

/// What entry-wise methods found out of a tensor's segments, in their order.
pub(crate) type Selections = Vec<Option<Selection>>;

/// One tensor's updates, ready to be applied to any of its tiles.
#[derive(Debug)]
pub(crate) struct Prepared {
    columns: usize,
    /// In the order of the rows, without gaps.
    segments: Vec<Segment>,
}

/// Rows that the same updates change.
#[derive(Debug)]
pub(crate) struct Segment {
    rows: Range<usize>,
    columns: usize,
    /// Each made from what the one before leaves; nearly always one.
    stages: Vec<Stage>,
    /// What there is instead, where the real number is rounded once.
    exact: Option<ExactSum>,
}

/// Updates that are made from the same W₀.
#[derive(Debug)]
pub(super) struct Stage {
    /// All products that are only added, one packing for each way in which they lie.
    sums: Vec<Factors>,
    /// The factor on W₀: 1 − Σ wᵢ over the overrides.
    base_coefficient: f64,
    overrides: Vec<Override>,
    /// The products that an entry-wise method merges; there is then nothing else.
    entries: Option<Entries>,
}

/// An update that is more than W₀ with something added.
#[derive(Debug)]
struct Override {
    weight: f64,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Rescaled {
        factors: Factors,
        scales: DoraScales,
        /// The adapter's tensor that it is made from, where that is not W₀.
        base_override: Option<AdapterRows>,
    },
    Replaced(AdapterRows),
    /// Rows of a segment in the accumulator's type.
    Computed(Vec<u8>),
}

/// Rows of an adapter's own tensor, from `first` on.
#[derive(Debug)]
pub(super) struct AdapterRows {
    tensor: Tensor,
    first: usize,
}

impl AdapterRows {
    /// The type in which they are stored.
    pub fn dtype(&self) -> &Dtype {
        &self.tensor.dtype
    }

    /// Some of them as they are stored.
    pub fn bytes(&self, rows: &Range<usize>, columns: usize) -> Result<Vec<u8>> {
        let row = columns * self.tensor.dtype.size();
        let bytes = (self.first + rows.start) * row..(self.first + rows.end) * row;
        self.tensor.read_range(bytes.start as u64..bytes.end as u64)
    }

    fn read<T: Real>(
        &self,
        set: InstructionSet,
        rows: &Range<usize>,
        columns: usize,
        target: &mut [T],
    ) -> Result<()> {
        let bytes = self.bytes(rows, columns)?;
        let target = bytemuck::cast_slice_mut(target);
        kernel::convert(set, &self.tensor.dtype, &bytes, &T::DTYPE, target);
        Ok(())
    }
}

/// DoRA's scales m/‖V‖.
#[derive(Debug)]
enum DoraScales {
    /// Magnitudes of the segment's rows; the norms are the tile's own.
    OfRows(Vec<f64>),
    /// Finished factors of the columns, whose norms needed the whole tensor.
    OfColumns(Vec<f64>),
}

/// What streams W₀ once, in the accumulator's type and in order, to what it is given.
pub(crate) type Scan<'a> =
    dyn FnMut(&mut dyn FnMut(usize, &mut [u8]) -> Result<()>) -> Result<()> + 'a;

/// What packing needs to know of a tensor.
struct Packing<'a> {
    set: InstructionSet,
    inputs: &'a Inputs,
    /// The accumulator's.
    dtype: &'a Dtype,
    /// That of the stored rows, where a product alone is added to these in place.
    in_place: Option<&'a Dtype>,
    /// Those of the stored rows and of the output's, where the real number is rounded once.
    exact: Option<(&'a Dtype, &'a Dtype)>,
    columns: usize,
    /// What initialisations took out of W₀, by the adapter's position and its module.
    removed: Vec<((usize, &'a str), Pair)>,
}

impl Packing<'_> {
    /// The rows of the update's range that lie in a segment.
    fn rows_within(update: &Update, segment: &Range<usize>) -> Range<usize> {
        let first = update.slice.rows.as_ref().map_or(0, |row_range| row_range.start as usize);
        segment.start - first..segment.end - first
    }

    /// The products that an update adds to what it is made from, each with its scale.
    fn pairs(&self, update: &Update, segment: &Range<usize>) -> Result<Vec<(Pair, f64)>> {
        let rows = Self::rows_within(update, segment);
        let cut = |pair: Pair| pair.stored_rows(update.orientation(), rows.clone());
        let key = (update.adapter, update.module.as_str());
        let removed = self.removed.iter().find(|(other, _)| *other == key);
        let removed = removed
            .zip(update.residual)
            .map(|((_, pair), residual)| (cut(pair.clone()), -residual.scale(update.scale)));
        let own = update.pair(&self.inputs.adapters[update.adapter])?;
        let own = (own.stored_rows(update.orientation(), rows.clone()), update.scale);
        Ok(removed.into_iter().chain([own]).collect())
    }

    fn pack(
        &self,
        dtype: &Dtype,
        orientation: Orientation,
        rows: &Range<usize>,
        pairs: &[(Pair, f64)],
    ) -> Factors {
        let operands: Vec<_> =
            pairs.iter().map(|(pair, coefficient)| pair.operand(*coefficient)).collect();
        Factors::pack(self.set, dtype, (rows.len(), self.columns), orientation, &operands)
    }

    /// The type of the rows that sums are added to. What decides is what [`Segment::only_sum`] sees.
    fn dtype_of_sums(&self, updates: &[&Update]) -> &Dtype {
        let adds = |update: &&Update| !update.kind.is_override();
        let alike = |pair: &[&Update]| {
            pair[0].stage == pair[1].stage && pair[0].orientation() == pair[1].orientation()
        };
        let one_sum = updates.iter().all(adds) && updates.windows(2).all(alike);
        self.in_place.filter(|_| one_sum).unwrap_or(self.dtype)
    }

    fn segment(
        &self,
        rows: Range<usize>,
        updates: &[&Update],
        (entries, known): (Option<&EntryMerge>, Option<&Selection>),
        scan: &mut Scan<'_>,
    ) -> Result<Segment> {
        let mut segment = Segment { rows, columns: self.columns, stages: Vec::new(), exact: None };
        if let Some(types) = self.exact.filter(|_| !updates.is_empty()) {
            segment.exact = Some(self.exact_sum(types, &segment.rows, updates)?);
            return Ok(segment);
        }
        if let Some(merge) = entries.filter(|_| !updates.is_empty()) {
            segment.stages.push(self.entries(&segment, updates, (merge, known), scan)?);
            return Ok(segment);
        }
        let dtype = self.dtype_of_sums(updates);
        for stage in updates.chunk_by(|left, right| left.stage == right.stage) {
            let stage = self.stage(&segment, stage, dtype, scan)?;
            segment.stages.push(stage);
        }
        Ok(segment)
    }

    /// All updates of a segment as one sum of real numbers.
    fn exact_sum(
        &self,
        types: (&Dtype, &Dtype),
        rows: &Range<usize>,
        updates: &[&Update],
    ) -> Result<ExactSum> {
        let mut products: Vec<ExactProduct> = Vec::new();
        let mut origin = ExactOrigin::Weight;
        for stage in updates.chunk_by(|left, right| left.stage == right.stage) {
            let is_replacement = |update: &&&Update| update.kind == UpdateKind::Replace;
            let own = |update: &Update| self.adapter_rows(update, &update.module, rows);
            let replacements: Vec<_> = stage.iter().filter(is_replacement).copied().collect();
            match replacements.as_slice() {
                [] => {}
                [only] if only.weight == 1.0 => {
                    // Nothing is left of what the stages before made.
                    products.clear();
                    origin = ExactOrigin::Replacement(own(only));
                }
                all => {
                    let all = all.iter().map(|update| (update.weight, own(update)));
                    origin = ExactOrigin::Mixture(all.collect());
                }
            }
            for update in stage.iter().filter(|update| update.kind != UpdateKind::Replace) {
                for (pair, scale) in self.pairs(update, rows)? {
                    products.push((pair, update.orientation(), [scale, update.weight]));
                }
            }
        }
        Ok(ExactSum::new(self.set, types, (rows.len(), self.columns), &products, origin))
    }

    /// The next stage of a segment, its sums packed for rows of `dtype`.
    fn stage(
        &self,
        segment: &Segment,
        updates: &[&Update],
        dtype: &Dtype,
        scan: &mut Scan<'_>,
    ) -> Result<Stage> {
        let rows = &segment.rows;
        let mut base_coefficient = 1.0;
        let mut overrides = Vec::new();
        for update in updates {
            match update.kind {
                UpdateKind::LowRank | UpdateKind::Vector => {}
                UpdateKind::Dora => {
                    base_coefficient -= update.weight;
                    let pairs = self.pairs(update, rows)?;
                    let factors = self.pack(self.dtype, update.orientation(), rows, &pairs);
                    let magnitude = magnitude(&self.inputs.adapters[update.adapter], update)?;
                    let base_override = update
                        .base_override
                        .as_ref()
                        .map(|tensor| self.adapter_rows(update, tensor, rows));
                    let scales = match update.orientation() {
                        Orientation::OutIn => {
                            let within = Self::rows_within(update, rows);
                            DoraScales::OfRows(magnitude[within].to_vec())
                        }
                        Orientation::InOut => {
                            let norms =
                                self.column_norms(segment, &factors, base_override.as_ref(), scan)?;
                            let pairs = magnitude.iter().zip(norms);
                            DoraScales::OfColumns(
                                pairs.map(|(magnitude, norm)| magnitude / norm).collect(),
                            )
                        }
                    };
                    let value = Value::Rescaled { factors, scales, base_override };
                    overrides.push(Override { weight: update.weight, value });
                }
                UpdateKind::Transform => {
                    base_coefficient -= update.weight;
                    let value = Value::Computed(self.transformed(segment, update, scan)?);
                    overrides.push(Override { weight: update.weight, value });
                }
                UpdateKind::Replace => {
                    base_coefficient -= update.weight;
                    let value = Value::Replaced(self.adapter_rows(update, &update.module, rows));
                    overrides.push(Override { weight: update.weight, value });
                }
            }
        }
        // Neighbours of one orientation share a packing.
        let mut sums = Vec::new();
        for orientation in [Orientation::OutIn, Orientation::InOut] {
            let mut pairs = Vec::new();
            for update in updates.iter().filter(|update| !update.kind.is_override()) {
                if update.orientation() == orientation {
                    let weighted = |(pair, scale)| (pair, scale * update.weight);
                    pairs.extend(self.pairs(update, rows)?.into_iter().map(weighted));
                }
            }
            if !pairs.is_empty() {
                sums.push(self.pack(dtype, orientation, rows, &pairs));
            }
        }
        Ok(Stage { sums, base_coefficient, overrides, entries: None })
    }

    /// The only stage of a segment whose products an entry-wise method merges.
    fn entries(
        &self,
        segment: &Segment,
        updates: &[&Update],
        (merge, known): (&EntryMerge, Option<&Selection>),
        scan: &mut Scan<'_>,
    ) -> Result<Stage> {
        let rows = &segment.rows;
        let mut adapters = Vec::new();
        let (mut weights, mut masks) = (Vec::new(), Vec::new());
        for own in updates.chunk_by(|left, right| left.adapter == right.adapter) {
            adapters.push(match own.iter().any(|update| update.kind.is_override()) {
                true => {
                    let plain = |update: &&Update| Update { weight: 1.0, ..(*update).clone() };
                    let own: Vec<Update> = own.iter().map(plain).collect();
                    let own: Vec<&Update> = own.iter().collect();
                    Own::Change(Box::new(self.stage(segment, &own, self.dtype, scan)?))
                }
                false => {
                    let packed = |update: &&Update| {
                        let pairs = self.pairs(update, rows)?;
                        Ok(self.pack(self.dtype, update.orientation(), rows, &pairs))
                    };
                    Own::Products(own.iter().map(packed).collect::<Result<_>>()?)
                }
            });
            weights.push(own[0].weight);
            masks.push(self.mask(own[0], rows, merge.seed));
        }
        let is_transposed = updates.iter().any(|update| update.transposed);
        let missing = merge.adapters - adapters.len();
        let shape = [rows.len(), self.columns];
        let finder = Finder::new(merge.method, shape, weights, masks, missing);
        let finder = if is_transposed { finder.transposed() } else { finder };
        let tile_rows = queue::tile_rows(self.columns, self.dtype);
        let products = Products::new(self.set, self.columns, adapters);
        let entries = match known {
            Some(selection) => products.with(selection.clone()),
            None => products.select(finder, rows, (tile_rows, self.dtype), scan)?,
        };
        let (sums, overrides) = (Vec::new(), Vec::new());
        Ok(Stage { sums, base_coefficient: 1.0, overrides, entries: Some(entries) })
    }

    /// The random numbers of an update's elements in some rows: those that they have in the module's whole
    /// product.
    fn mask(&self, update: &Update, rows: &Range<usize>, seed: u64) -> Mask {
        let module = match (update.kind, update.slice.expert) {
            (UpdateKind::Replace, _) => {
                let mut saved = self.inputs.adapters[update.adapter].saved().iter();
                let found = saved.find(|saved| saved.tensor.name == update.module);
                let path = found.map_or(&update.module, |saved| &saved.path);
                path.strip_suffix(".weight").unwrap_or(path).to_owned()
            }
            (_, Some(expert)) => format!("{}.{}", update.module, expert.index),
            (_, None) => update.module.clone(),
        };
        let first = update.slice.outputs.as_ref().map_or(0, |outputs| outputs.start);
        let elements = match update.orientation() {
            Orientation::OutIn => {
                (first + Self::rows_within(update, rows).start as u64) * self.columns as u64
            }
            Orientation::InOut => first * rows.len() as u64,
        };
        Mask::new(seed, &module, update.adapter).after(elements)
    }

    /// The rows of an adapter's tensor that lie on a segment.
    fn adapter_rows(&self, update: &Update, tensor: &str, segment: &Range<usize>) -> AdapterRows {
        let tensor = self.inputs.adapters[update.adapter].tensor(tensor);
        let tensor = tensor.expect("planned from this tensor");
        let first = update.slice.outputs.as_ref().map_or(0, |rows| rows.start as usize);
        let first = first + Self::rows_within(update, segment).start;
        AdapterRows { tensor, first }
    }

    /// ‖V‖ of every column, in f64, row after row. V is made from what the segment's stages so far
    /// leave of W₀, or from the adapter's own tensor.
    fn column_norms(
        &self,
        segment: &Segment,
        factors: &Factors,
        base_override: Option<&AdapterRows>,
        scan: &mut Scan<'_>,
    ) -> Result<Vec<f64>> {
        let mut sums = vec![0.0; self.columns];
        scan(&mut |first_row, tile| {
            if *self.dtype == Dtype::F64 {
                self.begin::<f64>(segment, base_override, first_row, tile)?;
            } else {
                self.begin::<f32>(segment, base_override, first_row, tile)?;
            }
            kernel::merge_rows(self.set, factors, first_row, self.dtype, tile);
            kernel::convert::for_each_f64(self.dtype, tile, |index, value| {
                sums[index % self.columns] += value * value;
            });
            Ok(())
        })?;
        sums.iter_mut().for_each(|sum| *sum = sum.sqrt());
        Ok(sums)
    }

    /// What an update makes of all rows of a segment, as the stages so far leave them; in the
    /// accumulator's type.
    fn transformed(
        &self,
        segment: &Segment,
        update: &Update,
        scan: &mut Scan<'_>,
    ) -> Result<Vec<u8>> {
        let mut whole = Matrix::zeros(segment.rows.len(), self.columns);
        scan(&mut |first_row, tile| {
            if !segment.rows.contains(&first_row) {
                return Ok(());
            }
            if *self.dtype == Dtype::F64 {
                self.begin::<f64>(segment, None, first_row, tile)?;
            } else {
                self.begin::<f32>(segment, None, first_row, tile)?;
            }
            let start = (first_row - segment.rows.start) * self.columns;
            kernel::convert::for_each_f64(self.dtype, tile, |index, value| {
                whole.values[start + index] = value;
            });
            Ok(())
        })?;
        update.transform(&self.inputs.adapters[update.adapter], &mut whole)?;
        Ok(match self.dtype {
            Dtype::F64 => whole.into_bytes(),
            _ => whole.values.iter().flat_map(|value| (*value as f32).to_le_bytes()).collect(),
        })
    }

    /// Turns a tile of W₀ into what the next stage of a segment is made from.
    fn begin<T: Real>(
        &self,
        segment: &Segment,
        base_override: Option<&AdapterRows>,
        first_row: usize,
        tile: &mut [u8],
    ) -> Result<()> {
        if base_override.is_none() && segment.stages.is_empty() {
            return Ok(());
        }
        let values: &[T] = &tile
            .chunks_exact(size_of::<T>())
            .map(bytemuck::pod_read_unaligned)
            .collect::<Vec<T>>();
        let mut result = vec![T::default(); values.len()];
        let rows = first_row..first_row + values.len() / self.columns;
        match base_override {
            Some(own) => own.read(self.set, &rows, self.columns, &mut result)?,
            None => {
                let (mut start, mut scratch) = (values.to_vec(), result.clone());
                segment.apply(self.set, &rows, &mut start, &mut scratch, &mut result)?;
            }
        }
        tile.copy_from_slice(bytemuck::cast_slice(&result));
        Ok(())
    }
}

/// DoRA's magnitudes of the outputs that an update uses.
pub(super) fn magnitude(adapter: &Adapter, update: &Update) -> Result<Vec<f64>> {
    let module = &adapter.modules()[&update.module];
    let magnitude = module.magnitude.as_ref().expect("planned from its magnitude");
    let magnitude = magnitude.read_f64()?;
    Ok(match &update.slice.outputs {
        Some(outputs) => magnitude[outputs.start as usize..outputs.end as usize].to_vec(),
        None => magnitude,
    })
}

impl Prepared {
    /// Packs the updates of a tensor that is accumulated in `dtype` (f32 or f64).
    ///
    /// `scan` streams W₀ once, in that type and in order; it is only called for norms of columns.
    /// `removed` has what initialisations took out of W₀, by the adapter and its module; `known` what
    /// entry-wise methods found out of each segment, where that was done before.
    pub fn new(
        set: InstructionSet,
        inputs: &Inputs,
        tensor: &PlannedTensor,
        dtype: &Dtype,
        removed: Vec<((usize, &str), Pair)>,
        known: Option<&Selections>,
        scan: &mut Scan<'_>,
    ) -> Result<Self> {
        let (_, columns) = tensor.matrix();
        let (from, to) = (&tensor.source.dtype, tensor.rounded_dtype());
        let in_place = (from == to).then_some(from);
        let exact = (tensor.precision == Precision::Exact).then_some((from, to));
        let packing = Packing { set, inputs, dtype, in_place, exact, columns, removed };
        let entries = match &tensor.action {
            Action::MergeEntries(merge) => Some(merge),
            _ => None,
        };
        let segments = tensor.segments().into_iter().enumerate().map(|(position, rows)| {
            let known = known.and_then(|known| known.get(position)?.as_ref());
            let updates: Vec<_> = tensor
                .updates()
                .iter()
                .filter(|update| match &update.slice.rows {
                    Some(row_range) => {
                        row_range.start as usize <= rows.start && rows.end <= row_range.end as usize
                    }
                    None => true,
                })
                .collect();
            packing.segment(rows, &updates, (entries, known), scan)
        });
        Ok(Self { columns, segments: segments.collect::<Result<_>>()? })
    }

    /// What entry-wise methods found out of each segment.
    pub fn selections(&self) -> Selections {
        self.segments.iter().map(|segment| Some(segment.entries()?.selection().clone())).collect()
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The segment in which a tile lies.
    ///
    /// # Panics
    /// If it lies in none, or in more than one.
    pub fn segment(&self, tile: &Range<usize>) -> &Segment {
        let index = self.segments.partition_point(|segment| segment.rows.end <= tile.start);
        let segment = &self.segments[index];
        assert!(
            segment.rows.start <= tile.start && tile.end <= segment.rows.end,
            "a tile lies in one segment"
        );
        segment
    }
}

impl Segment {
    /// The products that an entry-wise method merges.
    fn entries(&self) -> Option<&Entries> {
        self.stages.first()?.entries.as_ref()
    }

    /// The segment's first row in the tensor.
    pub fn first_row(&self) -> usize {
        self.rows.start
    }

    /// The sum that is rounded once, where it is.
    pub fn exact(&self) -> Option<&ExactSum> {
        self.exact.as_ref()
    }

    /// The packed product, if that is all there is, so that it can be added in place.
    pub fn only_sum(&self) -> Option<&Factors> {
        match self.stages.as_slice() {
            [Stage { sums, overrides, entries: None, .. }] if overrides.is_empty() => {
                match sums.as_slice() {
                    [factors] => Some(factors),
                    _ => None,
                }
            }
            _ => None,
        }
    }

    /// What an entry-wise method makes of the products in a row of the tensor, and each adapter's own
    /// product there; `None` where there are but sums.
    ///
    /// # Errors
    /// That a file changed, or [`crate::Error::Io`].
    pub fn entries_of(
        &self,
        row: usize,
        dtype: &Dtype,
        base: &dyn Fn(usize) -> Result<Vec<f64>>,
    ) -> Result<Option<MergedRow>> {
        let Some(entries) = self.entries() else { return Ok(None) };
        let first = self.rows.start;
        entries.row(row - first, dtype, &|row| base(first + row)).map(Some)
    }

    /// Applies everything to whole rows, counted in the tensor. `start` holds W₀ and is used up,
    /// `result` takes the outcome, `scratch` is as long as they are.
    pub fn apply<T: Real>(
        &self,
        set: InstructionSet,
        rows: &Range<usize>,
        start: &mut [T],
        scratch: &mut [T],
        result: &mut [T],
    ) -> Result<()> {
        debug_assert!(start.len() == rows.len() * self.columns);
        let rows = rows.start - self.rows.start..rows.end - self.rows.start;
        result.copy_from_slice(start);
        for (position, stage) in self.stages.iter().enumerate() {
            if position > 0 {
                start.copy_from_slice(result);
            }
            stage.apply(set, &rows, self.columns, start, scratch, result)?;
        }
        Ok(())
    }
}

impl Stage {
    /// `rows` are counted in the segment; `result` holds what `start` does.
    #[allow(clippy::too_many_arguments, reason = "three buffers of one call")]
    pub fn apply<T: Real>(
        &self,
        set: InstructionSet,
        rows: &Range<usize>,
        columns: usize,
        start: &[T],
        scratch: &mut [T],
        result: &mut [T],
    ) -> Result<()> {
        if self.base_coefficient == 0.0 {
            // Not by a product with zero, which would make NaN of a base's infinity.
            result.fill(T::default());
        } else if self.base_coefficient != 1.0 {
            let base_coefficient = T::from_f64(self.base_coefficient);
            result.iter_mut().zip(start).for_each(|(to, from)| *to = from.times(base_coefficient));
        }
        if let Some(entries) = &self.entries {
            entries.apply(rows, start, result)?;
        }
        for factors in &self.sums {
            let bytes = bytemuck::cast_slice_mut(result);
            kernel::merge_rows(set, factors, rows.start, &T::DTYPE, bytes);
        }
        for each in &self.overrides {
            match &each.value {
                Value::Rescaled { factors, scales, base_override } => {
                    match base_override {
                        Some(own) => own.read(set, rows, columns, scratch)?,
                        None => scratch.copy_from_slice(start),
                    }
                    let bytes = bytemuck::cast_slice_mut(scratch);
                    kernel::merge_rows(set, factors, rows.start, &T::DTYPE, bytes);
                    add_rescaled(scales, each.weight, rows, columns, scratch, result);
                }
                Value::Replaced(own) => {
                    own.read(set, rows, columns, scratch)?;
                    add_weighted(each.weight, scratch, result);
                }
                Value::Computed(bytes) => {
                    let row = columns * size_of::<T>();
                    let bytes = &bytes[rows.start * row..rows.end * row];
                    bytemuck::cast_slice_mut::<T, u8>(scratch).copy_from_slice(bytes);
                    add_weighted(each.weight, scratch, result);
                }
            }
        }
        Ok(())
    }
}

/// result += weight · values.
fn add_weighted<T: Real>(weight: f64, values: &[T], result: &mut [T]) {
    let weight = T::from_f64(weight);
    let pairs = result.iter_mut().zip(values);
    pairs.for_each(|(to, from)| *to = to.plus(from.times(weight)));
}

/// result += weight · gain · V.
fn add_rescaled<T: Real>(
    scales: &DoraScales,
    weight: f64,
    rows: &Range<usize>,
    columns: usize,
    values: &[T],
    result: &mut [T],
) {
    let lines = values.chunks_exact(columns).zip(result.chunks_exact_mut(columns));
    match scales {
        DoraScales::OfRows(magnitudes) => {
            for ((values, result), magnitude) in lines.zip(&magnitudes[rows.clone()]) {
                let norm = sum_of_squares(values).sqrt();
                let scale = T::from_f64(weight * (magnitude / norm));
                let pairs = result.iter_mut().zip(values);
                pairs.for_each(|(to, from)| *to = to.plus(from.times(scale)));
            }
        }
        DoraScales::OfColumns(scales) => {
            let scales: Vec<_> = scales.iter().map(|scale| T::from_f64(weight * scale)).collect();
            for (values, result) in lines {
                for ((to, from), scale) in result.iter_mut().zip(values).zip(&scales) {
                    *to = to.plus(from.times(*scale));
                }
            }
        }
    }
}
