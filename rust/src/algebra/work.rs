//! The modules of a combination, or of one adapter alone: the updates are combined, cut to a rank, rounded,
//! and held against what they stand for.

use std::sync::Arc;

use indexmap::IndexMap;

use super::dense::Dense;
use super::engine::{Compute, Done, each};
use super::factored::{Factors, Rows, rounding_error, sides};
use super::made::{Made, Short};
use super::merge::Updates;
use super::methods::{Family, Method};
use super::on_base::{self, OnBase};
use super::ranks::{Candidate, Measure, Rule, Spent, within};
use super::report::{BudgetReport, Record};
use super::results::{Place, Results, Rounded, Written, rounded};
use super::stacks;
use super::streamed::Layout;
use super::sums::{Part, ReadPart, Sum, Sums};
use crate::adapter::deltas::Difference;
use crate::adapter::{LayerKind, Module};
use crate::coefficients::Gram;
use crate::error::{Error, Result};
use crate::measure::spectrum::Update;
use crate::parallel::task::Task;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;
use crate::weights::Weight;

/// Where rounding loses less than this share of what was cut off, a bound on it stands for it: the error is
/// the same to ten digits.
const NEGLIGIBLE: f64 = 1e-5;

/// How the ranks are chosen.
#[derive(Debug, Clone, Copy)]
pub(crate) struct Cut {
    pub rule: Rule,
    pub max_rank: Option<u64>,
    pub is_kohya: bool,
}

/// What is to be computed.
pub(crate) struct Work<'a> {
    pub sums: &'a Sums<'a>,
    pub method: &'a Method,
    pub weights: &'a [Weight],
    /// Of random masks.
    pub seed: u64,
    pub cut: Option<Cut>,
    /// Norms of the base's weights by the keys of modules, for budgets relative to them.
    pub norms: Option<IndexMap<String, f64>>,
    /// Whether the modules keep their scale.
    pub keeps: bool,
    /// The ranks that a budget gave.
    pub spent: Option<Spent>,
    /// By adapter, what it makes of the base's weights as a whole; or empty.
    pub on_base: &'a [Option<OnBase>],
    /// Whether every layer has a bias where one has, as PEFT's config says of all of them together.
    pub fills_biases: bool,
}

impl Compute for Work<'_> {
    fn passes(&self) -> u64 {
        if matches!(self.cut, Some(Cut { rule: Rule::Budget(..), .. })) { 2 } else { 1 }
    }

    fn prepare(&mut self, dtype: &Dtype, task: &Task) -> Result<Option<BudgetReport>> {
        let Some((spent, report)) = self.spend(dtype, task)? else { return Ok(None) };
        self.spent = Some(spent);
        Ok(Some(report))
    }

    fn elements(&self, sum: &Sum<'_>) -> usize {
        let whole = sum.parts.iter().filter(|part| self.whole(part).is_some()).count();
        let matrices = match self.method.family {
            Family::Entries(_) => whole + 1,
            _ if whole > 0 => whole + 1,
            _ => 0,
        };
        matrices * sum.shape[0] * sum.shape[1]
    }

    fn vectors(&self, dtype: &Dtype, task: &Task) -> Result<Vec<Module>> {
        self.sums
            .vectors
            .iter()
            .filter_map(|sum| self.vector(sum, dtype, task).transpose())
            .collect()
    }

    fn module(
        &self,
        index: usize,
        sum: &Sum<'_>,
        dtype: &Dtype,
        results: Option<&Results>,
        task: &Task,
    ) -> Result<Done> {
        let rank = self.spent.as_ref().map(|spent| spent.ranks[index]);
        self.computed(sum, rank, dtype, results, task)
    }
}

impl Work<'_> {
    /// The ranks that a budget gives, where one is asked for.
    fn spend(&self, dtype: &Dtype, task: &Task) -> Result<Option<(Spent, BudgetReport)>> {
        let Some(Cut { rule: Rule::Budget(measure, amount), max_rank, .. }) = self.cut else {
            return Ok(None);
        };
        let elements = |sum: &Sum<'_>| self.elements(sum);
        let values: Vec<Vec<f64>> = each(&self.sums.modules, &elements, |index| {
            task.check()?;
            let sum = &self.sums.modules[index];
            let mut values = self.with_updates(sum, task, |of| {
                let made = Made::of(self.method, of)?.ok_or_else(|| not_finite(sum))?;
                made.values().ok_or_else(|| not_finite(sum))
            })?;
            task.advance(sum.bytes());
            if values.iter().any(|value| !value.is_finite()) {
                return Err(not_finite(sum));
            }
            if let Some(max) = max_rank {
                values.truncate(max as usize);
            }
            Ok(values)
        })?;
        let parameters = stacks::parameters(&self.sums.modules);
        let candidate = |places: &Vec<usize>| -> Result<Candidate> {
            let sum = &self.sums.modules[places[0]];
            let norm = match &self.norms {
                None => 1.0,
                Some(norms) => *norms.get(&sum.module.key).ok_or_else(|| {
                    Error::Argument(format!(
                        "relative_to=\"base\": the base tells no norm for {}",
                        sum.name()
                    ))
                })?,
            };
            // Experts of one parameter have one rank.
            let own = || places.iter().map(|place| &values[*place]);
            let longest = own().map(Vec::len).max().unwrap_or(0);
            let square = |values: &Vec<f64>, k: usize| {
                values.get(k).map_or(0.0, |value| (value / norm).powi(2))
            };
            let worth = (0..longest).map(|k| own().map(|values| square(values, k)).sum()).collect();
            let elements = ((sum.shape[0] + sum.shape[1]) * places.len()) as u64;
            let cost = match measure {
                Measure::Ranks => 1,
                Measure::Parameters => elements,
                Measure::Bytes => elements * dtype.size() as u64,
            };
            Ok(Candidate { worth, cost })
        };
        let candidates = parameters.iter().map(candidate).collect::<Result<Vec<_>>>()?;
        let mut spent = within(&candidates, amount);
        // Where all is zero, no budget is what leaves nothing.
        let is_some =
            candidates.iter().any(|candidate| candidate.worth.iter().any(|worth| *worth > 0.0));
        if spent.cost == 0 && is_some {
            return Err(Error::Argument(format!(
                "a budget of {amount} {} leaves room for nothing: one rank of the smallest module takes \
                 {}",
                measure.name(),
                candidates.iter().map(|one| one.cost).min().unwrap_or(0)
            )));
        }
        let report =
            BudgetReport { measure: measure.name(), amount, spent: spent.cost, gap: spent.gap };
        let mut ranks = vec![0; self.sums.modules.len()];
        for (places, rank) in parameters.iter().zip(&spent.ranks) {
            for place in places {
                ranks[*place] = values[*place].len().min(*rank);
            }
        }
        spent.ranks = ranks;
        Ok(Some((spent, report)))
    }

    /// The adapter on its base, where that alone tells what is added.
    fn whole(&self, part: &Part<'_>) -> Option<&OnBase> {
        let on_base = self.on_base.get(part.adapter)?.as_ref()?;
        on_base.has(&part.module().key).then_some(on_base)
    }

    /// The factors of all that is added to a module, by adapter.
    fn read(&self, sum: &Sum<'_>) -> Result<Vec<Option<ReadPart>>> {
        let factored = |part: &&Part<'_>| self.whole(part).is_none();
        let part =
            |adapter| sum.part_of(adapter).filter(factored).map(|part| part.read()).transpose();
        (0..self.weights.len()).map(part).collect()
    }

    /// What a function makes of a module's updates.
    fn with_updates<R>(
        &self,
        sum: &Sum<'_>,
        task: &Task,
        function: impl FnOnce(&Updates<'_, '_>) -> Result<R>,
    ) -> Result<R> {
        let read = self.read(sum)?;
        let updates: Vec<Option<Update<'_>>> = (read.iter())
            .map(|part| part.as_ref().map(ReadPart::update).transpose())
            .collect::<Result<_>>()?;
        let whole = |adapter| -> Result<Option<Dense>> {
            let Some(part) = sum.part_of(adapter) else { return Ok(None) };
            let Some(on_base) = self.whole(part) else { return Ok(None) };
            Ok(Some(part.of_whole(on_base.dense(&part.module().key, task)?)))
        };
        let dense: Vec<Option<Dense>> =
            (0..self.on_base.len()).map(whole).collect::<Result<_>>()?;
        let name = sum.name();
        let weights: Vec<f64> = self.weights.iter().map(|weight| weight.of(&name)).collect();
        let (shape, seed, mask) = (sum.shape, self.seed, &sum.mask_name());
        let (updates, dense) = (&updates[..], &dense[..]);
        function(&Updates { name: &name, mask, updates, dense, weights: &weights, shape, seed })
    }

    /// Σ cᵢvᵢ of what is added to a norm or a bias; `None` where that is zero. The coefficients are those of
    /// methods that make sums, and of others the weights.
    fn vector(&self, sum: &Sum<'_>, dtype: &Dtype, task: &Task) -> Result<Option<Module>> {
        let values = self.with_updates(sum, task, |of| {
            let family = match &self.method.family {
                Family::Sum(gram) => Family::Sum(gram.clone()),
                _ => Family::Sum(Gram::Linear),
            };
            let method = Method { family, ..self.method.clone() };
            let Some(Made::Sum(total, ..)) = Made::of(&method, of)? else {
                return Err(not_finite(sum));
            };
            let (left, right) = sides(&total);
            let scales = total.scales();
            let row = |row: &[f64]| {
                let terms = row.iter().zip(&right.values).zip(&scales);
                terms.map(|((left, right), scale)| left * right * scale).sum()
            };
            let values: Vec<f64> = match scales.len() {
                0 => vec![0.0; sum.shape[0]],
                rank => left.values.chunks_exact(rank).map(row).collect(),
            };
            match values.iter().all(|value| value.is_finite()) {
                true => Ok(values),
                false => Err(not_finite(sum)),
            }
        })?;
        if values.iter().all(|value| *value == 0.0) {
            return Ok(None);
        }
        let shape = vec![values.len() as u64];
        let rows = Rows { rows: 1, columns: values.len(), values };
        let bytes = rounded(&rows, dtype).ok_or_else(|| too_large(sum, dtype))?;
        let (_, like) = sum.module.delta.tensors()[0];
        let path = like.file().path();
        let tensor = Tensor::in_memory(path, like.name.clone(), dtype.clone(), shape, bytes)?;
        let delta = Arc::new(Difference { tensor });
        let (scale, scaling, rank, alpha) = (None, 1.0, 1, 1.0);
        Ok(Some(Module { delta, scale, scaling, rank, alpha, ..sum.module.clone() }))
    }

    fn computed(
        &self,
        sum: &Sum<'_>,
        rank: Option<usize>,
        dtype: &Dtype,
        results: Option<&Results>,
        task: &Task,
    ) -> Result<Done> {
        self.with_updates(sum, task, |of| {
            let made = Made::of(self.method, of)?.ok_or_else(|| not_finite(sum))?;
            // Of one adapter's modules with one scale, the factors are those without it.
            let scaling = if self.keeps { sum.module.scaling } else { 1.0 };
            let scale_out = if scaling == 0.0 { 1.0 } else { scaling };
            let layout = match (&made, self.cut.is_some() || self.method.shortens) {
                (Made::Sum(total, _, grams), false) if !sum.layer.turns => {
                    Layout::of(total, grams.as_ref(), scale_out, dtype)
                }
                _ => None,
            };
            let least = sum.shape[0].min(sum.shape[1]);
            let of_whole = || of.dense.iter().flatten().map(move |_| least);
            let ranks = || of.updates.iter().flatten().map(Update::rank).chain(of_whole());
            let largest = || Rule::Fixed(ranks().max().unwrap_or(1).max(1) as u64);
            let shortest = || Cut { rule: largest(), max_rank: None, is_kohya: false };
            let cut = self.cut.or_else(|| self.method.shortens.then(shortest));
            let short = match &made {
                _ if layout.is_some() => Short::nothing(),
                Made::Dense(dense, Some(_)) if on_base::is_quick(cut) => {
                    on_base::short(dense, cut, rank, dtype, of.name)?
                }
                _ => made.short(cut, rank, scale_out).ok_or_else(|| not_finite(sum))?,
            };
            let scaled = || of.weights.iter().map(|weight| weight * self.method.lambda).collect();
            let coefficients = made.coefficients().map_or_else(scaled, <[f64]>::to_vec);
            let bias = self.bias(sum, &coefficients)?;
            let mut record = Record {
                shape: sum.shape,
                source_rank: ranks().sum(),
                rank: 0,
                kept: short.kept,
                error: 0.0,
                norm: short.norm,
                singular_values: Vec::new(),
                coefficients: (made.coefficients().is_some() && self.weights.len() > 1)
                    .then_some(coefficients),
                expert_ranks: None,
            };
            let write = match &layout {
                Some(layout) => self.write_layout(sum, layout, bias, &mut record, results),
                None => {
                    self.write(sum, &made, short, bias, &mut record, (dtype, scale_out), results)
                }
            };
            write.map(|place| (record, place.map(|place| Written::of(sum, place, scale_out))))
        })
    }

    /// Writes all of a sum as its factors are laid out.
    fn write_layout(
        &self,
        sum: &Sum<'_>,
        layout: &Layout<'_>,
        bias: Option<Vec<f64>>,
        record: &mut Record,
        results: Option<&Results>,
    ) -> Result<Option<Place>> {
        let too_large = || too_large(sum, layout.dtype());
        let bias = bias.map(|values| Rows { rows: 1, columns: values.len(), values });
        let bias = bias.map(|bias| rounded(&bias, layout.dtype()).ok_or_else(too_large));
        let bias = bias.transpose()?;
        let (place, lost) = match results {
            Some(results) => {
                let put = results.put_layout(layout, bias.as_deref())?;
                put.map(|(place, lost)| (Some(place), lost)).ok_or_else(too_large)?
            }
            None => (None, layout.write(&mut |_| Ok(()))?.ok_or_else(too_large)?),
        };
        record.rank = layout.rank();
        record.norm = layout.norm;
        record.error = lost / layout.norm;
        Ok(place)
    }

    /// Rounds what is kept of a module, and measures it.
    #[expect(
        clippy::too_many_arguments,
        reason = "a module, what was made of it, and where it goes"
    )]
    fn write(
        &self,
        sum: &Sum<'_>,
        made: &Made<'_>,
        short: Short,
        bias: Option<Vec<f64>>,
        record: &mut Record,
        (dtype, scale_out): (&Dtype, f64),
        results: Option<&Results>,
    ) -> Result<Option<Place>> {
        let Short { factors, tail, norm, values, .. } = short;
        record.singular_values = values;
        let is_biased = bias.as_ref().is_some_and(|bias| bias.iter().any(|value| *value != 0.0));
        let Some(factors) = factors.or_else(|| is_biased.then(|| nothing(sum.shape))) else {
            record.error = if norm == 0.0 { 0.0 } else { 1.0 };
            record.kept = if norm == 0.0 { 1.0 } else { 0.0 };
            return Ok(None);
        };
        record.rank = factors.a.rows;
        let too_large = || too_large(sum, dtype);
        let factors = fitting(sum, factors);
        let own = Rounded::of(&factors, dtype).ok_or_else(too_large)?;
        record.error = match made {
            _ if norm == 0.0 => 0.0,
            Made::Dense(dense, _) => dense.distance(&fitting(sum, own.factors(&factors))) / norm,
            _ => {
                let bound = own.rounding_bound(&factors);
                let lost = scale_out.abs()
                    * match scale_out.abs() * bound < NEGLIGIBLE * tail {
                        true => bound,
                        false => rounding_error(&factors, &own.factors(&factors)),
                    };
                // To first order, rounding is orthogonal to what was cut off:
                // ⟨U₂Σ₂V₂ᵀ, E_B·A + B·E_A⟩ = 0.
                tail.hypot(lost) / norm
            }
        };
        let bias = bias.map(|values| Rows { rows: 1, columns: values.len(), values });
        let bias = bias.map(|bias| rounded(&bias, dtype).ok_or_else(too_large)).transpose()?;
        results.map(|results| results.put(&own, bias.as_deref())).transpose()
    }

    /// Σ cᵢsᵢbᵢ of the second factors' biases, where there are any, for a result with a scale of one.
    fn bias(&self, sum: &Sum<'_>, coefficients: &[f64]) -> Result<Option<Vec<f64>>> {
        let mut total: Option<Vec<f64>> = None;
        for part in &sum.parts {
            let module = part.module();
            let Some(bias) = &module.bias else { continue };
            let own = if self.keeps { 1.0 } else { module.scaling };
            let factor = coefficients[part.adapter] * own;
            let values = bias.read_f64()?;
            let target = total.get_or_insert_with(|| vec![0.0; values.len()]);
            for (target, value) in target.iter_mut().zip(values) {
                *target += factor * value;
            }
        }
        let has_none = total.is_none() && self.fills_biases && sum.expert.is_none();
        if has_none && sum.layer.kind != LayerKind::Embedding {
            total = Some(vec![0.0; sum.shape[0]]);
        }
        Ok(total)
    }
}

/// Factors of zero, for a module of which nothing but a bias is left.
fn nothing([rows, columns]: [usize; 2]) -> Factors {
    Factors { b: Rows::zeros(rows, 1), a: Rows::zeros(1, columns) }
}

pub(super) fn not_finite(sum: &Sum<'_>) -> Error {
    Error::Argument(format!(
        "{} has values that are not finite (NaN or infinity), of which nothing can be computed",
        sum.name()
    ))
}

pub(super) fn too_large(sum: &Sum<'_>, dtype: &Dtype) -> Error {
    Error::Argument(format!(
        "{} has values too large for {dtype}; write it in a wider type",
        sum.name()
    ))
}

/// The factors as plain ones of the module's layer, and back: an embedding's product is the transpose of
/// its weight, but of formats that have it by tokens.
pub(super) fn fitting(sum: &Sum<'_>, factors: Factors) -> Factors {
    match sum.layer.turns {
        true => Factors { b: factors.a.transposed(), a: factors.b.transposed() },
        false => factors,
    }
}
