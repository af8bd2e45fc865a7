//! The arithmetic of one tensor's updates, tile by tile.
//!
//! Updates that only add are one packed product. Those that take W₀'s place (DoRA, replacements)
//! are made from W₀ each on its own and added by their difference: W₀ + Σ wᵢ·(Wᵢ − W₀).

use std::ops::Range;

use crate::adapter::{Adapter, Module};
use crate::dtype::Dtype;
use crate::kernel::{self, Factors, InstructionSet, Operand, Orientation};
use crate::plan::{Inputs, Update, UpdateKind};
use crate::safetensors::TensorInfo;

/// A type in which tiles are accumulated.
pub(super) trait Real: bytemuck::Pod + Default {
    /// Its dtype.
    const DTYPE: Dtype;
    fn from_f64(value: f64) -> Self;
    fn to_f64(self) -> f64;
    /// self · factor, rounded.
    fn times(self, factor: Self) -> Self;
    /// self + other, rounded.
    fn plus(self, other: Self) -> Self;
}

macro_rules! real {
    ($type:ty, $dtype:expr) => {
        impl Real for $type {
            const DTYPE: Dtype = $dtype;

            fn from_f64(value: f64) -> Self {
                value as $type
            }

            fn to_f64(self) -> f64 {
                f64::from(self)
            }

            fn times(self, factor: Self) -> Self {
                self * factor
            }

            fn plus(self, other: Self) -> Self {
                self + other
            }
        }
    };
}

real!(f32, Dtype::F32);
real!(f64, Dtype::F64);

/// One tensor's updates, ready to be applied to any of its tiles.
#[derive(Debug)]
pub(super) struct Prepared {
    rows: usize,
    columns: usize,
    /// All products that are only added.
    sum: Option<Factors>,
    /// 1 − Σ wᵢ over the updates that take W₀'s place.
    keep: f64,
    places: Vec<Place>,
}

/// An update that takes W₀'s place.
#[derive(Debug)]
struct Place {
    weight: f64,
    value: Value,
}

#[derive(Debug)]
enum Value {
    Rescaled { factors: Factors, gains: Gains },
    Replaced { adapter: usize, tensor: TensorInfo },
}

/// DoRA's m/‖V‖.
#[derive(Debug)]
enum Gains {
    /// Magnitudes of the rows; the norms are the tile's own.
    OfRows(Vec<f64>),
    /// Finished factors of the columns, whose norms needed the whole tensor.
    OfColumns(Vec<f64>),
}

/// The operand of a module's product on its weight.
fn product<'a>(adapter: &'a Adapter, module: &'a Module, coefficient: f64) -> Operand<'a> {
    Operand {
        a: adapter.file().tensor_bytes(&module.a),
        a_dtype: &module.a.dtype,
        b: adapter.file().tensor_bytes(&module.b),
        b_dtype: &module.b.dtype,
        rank: module.rank as usize,
        coefficient,
    }
}

/// The A of a vector that is added: a vector is a product with one column.
const ONE: [u8; 4] = 1f32.to_le_bytes();

impl Prepared {
    /// Packs the updates of a tensor of `shape` that is accumulated in `dtype` (f32 or f64).
    ///
    /// `scan` streams W₀ once, in that type and in order; it is only called for norms of columns.
    pub fn new<E>(
        set: InstructionSet,
        inputs: &Inputs,
        updates: &[Update],
        dtype: &Dtype,
        shape: (usize, usize),
        mut scan: impl FnMut(&mut dyn FnMut(usize, &mut [u8])) -> Result<(), E>,
    ) -> Result<Self, E> {
        let mut keep = 1.0;
        let mut places = Vec::new();
        // Neighbours of one orientation share a packing; a tensor has one orientation.
        let mut operands = Vec::new();
        let mut orientation = Orientation::OutIn;
        for update in updates {
            let adapter = &*inputs.adapters[update.adapter];
            match update.kind {
                UpdateKind::LowRank => {
                    let module = &adapter.modules()[&update.module];
                    orientation = update.orientation();
                    operands.push(product(adapter, module, update.coefficient()));
                }
                UpdateKind::Vector => {
                    let module = &adapter.modules()[&update.module];
                    let bias = module.bias.as_ref().expect("planned from its bias");
                    operands.push(Operand {
                        a: &ONE,
                        a_dtype: &Dtype::F32,
                        b: adapter.file().tensor_bytes(bias),
                        b_dtype: &bias.dtype,
                        rank: 1,
                        coefficient: update.coefficient(),
                    });
                }
                UpdateKind::Dora => {
                    keep -= update.weight;
                    let module = &adapter.modules()[&update.module];
                    let magnitude = module.magnitude.as_ref().expect("planned from its magnitude");
                    let magnitude = adapter.read_f64(magnitude);
                    let operand = [product(adapter, module, update.scale)];
                    let factors = Factors::pack(set, dtype, shape, update.orientation(), &operand);
                    let gains = match update.orientation() {
                        Orientation::OutIn => Gains::OfRows(magnitude),
                        Orientation::InOut => {
                            let norms = column_norms(set, &factors, dtype, shape.1, &mut scan)?;
                            let pairs = magnitude.iter().zip(norms);
                            Gains::OfColumns(
                                pairs.map(|(magnitude, norm)| magnitude / norm).collect(),
                            )
                        }
                    };
                    let value = Value::Rescaled { factors, gains };
                    places.push(Place { weight: update.weight, value });
                }
                UpdateKind::Replace => {
                    keep -= update.weight;
                    let tensor = adapter.file().tensor(&update.module);
                    let tensor = tensor.expect("planned from this tensor").clone();
                    let value = Value::Replaced { adapter: update.adapter, tensor };
                    places.push(Place { weight: update.weight, value });
                }
            }
        }
        let sum = (!operands.is_empty())
            .then(|| Factors::pack(set, dtype, shape, orientation, &operands));
        Ok(Self { rows: shape.0, columns: shape.1, sum, keep, places })
    }

    /// Elements of a row.
    pub fn columns(&self) -> usize {
        self.columns
    }

    /// The packed product, if that is all there is, so that it can be added in place.
    pub fn only_sum(&self) -> Option<&Factors> {
        self.sum.as_ref().filter(|_| self.places.is_empty())
    }

    /// Applies everything to whole rows. `start` holds W₀, `result` takes the outcome, `scratch`
    /// is as long as they are.
    pub fn apply<T: Real>(
        &self,
        set: InstructionSet,
        inputs: &Inputs,
        rows: &Range<usize>,
        start: &[T],
        scratch: &mut [T],
        result: &mut [T],
    ) {
        debug_assert!(rows.end <= self.rows && start.len() == rows.len() * self.columns);
        if self.keep == 0.0 {
            // Not by a product with zero, which would make NaN of a base's infinity.
            result.fill(T::default());
        } else if self.keep == 1.0 {
            result.copy_from_slice(start);
        } else {
            let keep = T::from_f64(self.keep);
            result.iter_mut().zip(start).for_each(|(to, from)| *to = from.times(keep));
        }
        if let Some(factors) = &self.sum {
            kernel::merge_rows(
                set,
                factors,
                rows.start,
                &T::DTYPE,
                bytemuck::cast_slice_mut(result),
            );
        }
        for place in &self.places {
            match &place.value {
                Value::Rescaled { factors, gains } => {
                    scratch.copy_from_slice(start);
                    let bytes = bytemuck::cast_slice_mut(scratch);
                    kernel::merge_rows(set, factors, rows.start, &T::DTYPE, bytes);
                    add_rescaled(gains, place.weight, rows, self.columns, scratch, result);
                }
                Value::Replaced { adapter, tensor } => {
                    let bytes = inputs.adapters[*adapter].file().tensor_bytes(tensor);
                    let row = self.columns * tensor.dtype.size();
                    let bytes = &bytes[rows.start * row..rows.end * row];
                    let target = bytemuck::cast_slice_mut(scratch);
                    kernel::convert(set, &tensor.dtype, bytes, &T::DTYPE, target);
                    let weight = T::from_f64(place.weight);
                    let pairs = result.iter_mut().zip(&*scratch);
                    pairs.for_each(|(to, from)| *to = to.plus(from.times(weight)));
                }
            }
        }
    }
}

/// result += weight · gain · V.
fn add_rescaled<T: Real>(
    gains: &Gains,
    weight: f64,
    rows: &Range<usize>,
    columns: usize,
    values: &[T],
    result: &mut [T],
) {
    let lines = values.chunks_exact(columns).zip(result.chunks_exact_mut(columns));
    match gains {
        Gains::OfRows(magnitudes) => {
            for ((values, result), magnitude) in lines.zip(&magnitudes[rows.clone()]) {
                let norm = sum_of_squares(values).sqrt();
                let gain = T::from_f64(weight * (magnitude / norm));
                let pairs = result.iter_mut().zip(values);
                pairs.for_each(|(to, from)| *to = to.plus(from.times(gain)));
            }
        }
        Gains::OfColumns(gains) => {
            let gains: Vec<_> = gains.iter().map(|gain| T::from_f64(weight * gain)).collect();
            for (values, result) in lines {
                for ((to, from), gain) in result.iter_mut().zip(values).zip(&gains) {
                    *to = to.plus(from.times(*gain));
                }
            }
        }
    }
}

/// In f64, over eight sums side by side, so that the order is the same on every processor and the
/// compiler may still use vectors.
fn sum_of_squares<T: Real>(values: &[T]) -> f64 {
    let mut sums = [0.0; 8];
    let chunks = values.chunks_exact(8);
    let rest = chunks.remainder();
    for chunk in chunks {
        for (sum, value) in sums.iter_mut().zip(chunk) {
            *sum += value.to_f64() * value.to_f64();
        }
    }
    let rest: f64 = rest.iter().map(|value| value.to_f64() * value.to_f64()).sum();
    sums.iter().sum::<f64>() + rest
}

/// ‖V‖ of every column, in f64, row after row.
fn column_norms<E>(
    set: InstructionSet,
    factors: &Factors,
    dtype: &Dtype,
    columns: usize,
    scan: &mut impl FnMut(&mut dyn FnMut(usize, &mut [u8])) -> Result<(), E>,
) -> Result<Vec<f64>, E> {
    let mut sums = vec![0.0; columns];
    scan(&mut |first_row, tile| {
        kernel::merge_rows(set, factors, first_row, dtype, tile);
        kernel::convert::for_each_f64(dtype, tile, |index, value| {
            sums[index % columns] += value * value;
        });
    })?;
    sums.iter_mut().for_each(|sum| *sum = sum.sqrt());
    Ok(sums)
}
