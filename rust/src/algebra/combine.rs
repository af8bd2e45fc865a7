//! Sums of adapters and shorter adapters: each module's updates times coefficients, put side by side or
//! decomposed and cut to a rank.

use std::path::Path;

use indexmap::IndexMap;
use rayon::prelude::*;
use serde::Deserialize;
use serde_json::{Map, Value};

use super::engine::{Compute, Done, Job, run};
use super::factored::{Factors, Gauge, Rows, decomposed, inner_products, rounding_error, sides};
use super::options::{Method, MethodOptions, Writing};
use super::ranks::{Candidate, Measure, Rule, Spent, within};
use super::report::{BudgetReport, Record, Report};
use super::results::{Results, Rounded, rounded};
use super::rounding;
use super::sums::{Allowed, ReadPart, Sum, Sums};
use super::weights::Weight;
use super::write::Output;
use crate::adapter::Adapter;
use crate::adapter::format::AdapterSource;
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::measure::spectrum::{Term, Update, values_of};
use crate::parallel::task::Task;
use crate::tensor::dtype::Dtype;

/// What is asked of a sum.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct CombineOptions {
    /// The name of the method.
    pub method: String,
    /// The weight of each adapter; 1 for all if there are none.
    pub weights: Option<Vec<Weight>>,
    /// The rule for ranks; without one nothing is cut.
    pub rank: Option<Value>,
    /// The method's own options.
    pub options: MethodOptions,
    /// `peft` for the results of PEFT's functions, `kohya` for those of its older scripts.
    pub compat: Option<String>,
    /// How the result is written.
    pub write: Writing,
}

/// What is asked of a shorter adapter.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct ResizeOptions {
    /// The rule for ranks.
    pub rank: Value,
    /// No module has more than this.
    pub max_rank: Option<u64>,
    /// `absolute`, or `base` for budgets of errors relative to the base's weights.
    pub relative_to: Option<String>,
    /// `kohya` for the older rules of its script.
    pub compat: Option<String>,
    /// How the result is written.
    pub write: Writing,
}

/// How the ranks are chosen.
#[derive(Debug, Clone, Copy)]
struct Cut {
    rule: Rule,
    max_rank: Option<u64>,
    is_kohya: bool,
}

/// Combines adapters.
///
/// # Errors
/// [`Error::Argument`] for options that make no sense; [`Error::Unsupported`] for adapters that cannot be
/// summed, or what the target's format cannot hold; [`Error::Output`] if something is there already; those
/// of reading the adapters. Nothing is left behind then.
pub fn combine(
    sources: &[AdapterSource],
    base: Option<&Checkpoint>,
    output: &Path,
    options: &CombineOptions,
    task: &Task,
) -> Result<Report> {
    if sources.is_empty() {
        return Err(Error::Argument("there are no adapters to combine".to_owned()));
    }
    let count = sources.len();
    if let Some(weights) = &options.weights
        && weights.len() != count
    {
        return Err(Error::Argument(format!(
            "there are {} weights for {count} adapters; give one for each",
            weights.len()
        )));
    }
    let method = options.options.gram(&options.method, count, options.weights.is_some())?;
    let is_kohya = compat(options.compat.as_deref())?;
    let rule = options.rank.as_ref().filter(|rank| !rank.is_null()).map(Rule::parse).transpose()?;
    let cut = rule.map(|rule| Cut { rule, max_rank: None, is_kohya });
    let place = Output::check(output, &options.write)?;
    let adapters = opened(sources, base, task)?;
    let sums = Sums::of(&adapters, Allowed::NOTHING, task)?;
    let weights = options.weights.clone().unwrap_or_else(|| vec![Weight::All(1.0); count]);
    let names: Vec<String> = sums.modules.iter().map(Sum::name).collect();
    for weight in &weights {
        weight.check(names.iter().map(String::as_str))?;
    }
    method.check_weights(&weights, &names)?;
    let mut notes = missing(&adapters, &sums);
    notes.extend(adapters.iter().flat_map(|adapter| adapter.notes().iter().cloned()));
    let mut work = Work {
        sums: &sums,
        adapters: count,
        method: &method,
        weights: &weights,
        cut,
        norms: None,
        keeps: false,
        spent: None,
    };
    let mut parameters = Map::new();
    parameters.insert("method".into(), options.method.clone().into());
    parameters.insert("weights".into(), plain(options.weights.as_ref()));
    parameters.insert("rank".into(), options.rank.clone().unwrap_or(Value::Null));
    parameters.insert("options".into(), options.options.plain());
    let (sums, adapters) = (&sums, &adapters[..]);
    let verb = "combine";
    let job = Job { sums, adapters, base, verb, parameters, notes, rank_stabilized: false };
    run(job, &mut work, place, task)
}

/// Cuts an adapter to smaller ranks, or pads it to larger ones.
///
/// # Errors
/// As [`combine`].
pub fn resize(
    source: &AdapterSource,
    base: Option<&Checkpoint>,
    output: &Path,
    options: &ResizeOptions,
    task: &Task,
) -> Result<Report> {
    let is_kohya = compat(options.compat.as_deref())?;
    let rule = Rule::parse(&options.rank)?;
    if options.max_rank == Some(0) {
        return Err(Error::Argument("max_rank is 0, which would leave nothing".to_owned()));
    }
    let is_relative = match options.relative_to.as_deref() {
        None | Some("absolute") => false,
        Some("base") => true,
        Some(other) => {
            return Err(Error::Argument(format!(
                "relative_to is {other:?}; it is \"absolute\" or \"base\""
            )));
        }
    };
    if is_relative && !matches!(rule, Rule::Budget(..)) {
        return Err(Error::Argument(
            "relative_to=\"base\" weighs modules against each other, which only a budget does"
                .to_owned(),
        ));
    }
    let place = Output::check(output, &options.write)?;
    let adapters = opened(std::slice::from_ref(source), base, task)?;
    let norms = match (is_relative, base) {
        (false, _) => None,
        (true, Some(base)) => {
            Some(crate::measure::analysis::weight_norms(&adapters[0], base, task)?)
        }
        (true, None) => {
            return Err(Error::Argument(
                "relative_to=\"base\" needs the base (base=, --base)".to_owned(),
            ));
        }
    };
    let sums = Sums::of(&adapters, Allowed::OF_ONE, task)?;
    let weights = [Weight::All(1.0)];
    let cut = Some(Cut { rule, max_rank: options.max_rank, is_kohya });
    // One scale for all is kept where all ranks are the same after it.
    let scales: Vec<f64> = adapters[0].modules().values().map(|module| module.scaling).collect();
    let keeps = matches!(rule, Rule::Fixed(_)) && scales.windows(2).all(|pair| pair[0] == pair[1]);
    let mut work = Work {
        sums: &sums,
        adapters: 1,
        method: &Method::LINEAR,
        weights: &weights,
        cut,
        norms,
        keeps,
        spent: None,
    };
    let mut parameters = Map::new();
    parameters.insert("rank".into(), options.rank.clone());
    parameters.insert("max_rank".into(), options.max_rank.into());
    parameters.insert("relative_to".into(), plain(options.relative_to.as_ref()));
    let notes = adapters[0].notes().to_vec();
    let (sums, adapters) = (&sums, &adapters[..]);
    let verb = "resize";
    let job = Job { sums, adapters, base, verb, parameters, notes, rank_stabilized: false };
    run(job, &mut work, place, task)
}

fn plain(value: impl serde::Serialize) -> Value {
    serde_json::to_value(value).expect("plain data")
}

/// Whether kohya's older rules are asked for.
fn compat(name: Option<&str>) -> Result<bool> {
    match name {
        None => Ok(false),
        Some("kohya") => Ok(true),
        Some(other) => Err(Error::Argument(format!(
            "compat is {other:?}; there is \"kohya\", for the ranks of its older resize_lora.py"
        ))),
    }
}

/// The adapters, with the names of the base where there is one.
pub(super) fn opened(
    sources: &[AdapterSource],
    base: Option<&Checkpoint>,
    task: &Task,
) -> Result<Vec<Adapter>> {
    let open = |source: &AdapterSource| {
        let adapter = source.open_for(base, task)?;
        let resolved = base.map(|base| crate::adapter::grammar::resolve(&adapter, base));
        Ok(resolved.transpose()?.flatten().unwrap_or(adapter))
    };
    sources.iter().map(open).collect()
}

/// Modules that only some adapters have, in words.
fn missing(adapters: &[Adapter], sums: &Sums<'_>) -> Vec<String> {
    let mut notes = Vec::new();
    for (index, adapter) in adapters.iter().enumerate() {
        let lacks: Vec<&Sum<'_>> =
            sums.modules.iter().filter(|sum| sum.part_of(index).is_none()).collect();
        if let Some(first) = lacks.first() {
            notes.push(format!(
                "{} does not change {} of {} modules (the first: {}); it counts as zero there",
                adapter.path().display(),
                lacks.len(),
                sums.modules.len(),
                first.name()
            ));
        }
    }
    notes
}

/// What is to be computed.
struct Work<'a> {
    sums: &'a Sums<'a>,
    /// The number of adapters.
    adapters: usize,
    method: &'a Method,
    weights: &'a [Weight],
    cut: Option<Cut>,
    /// Norms of the base's weights by the keys of modules, for budgets relative to them.
    norms: Option<IndexMap<String, f64>>,
    /// Whether the modules keep their scale.
    keeps: bool,
    /// The ranks that a budget gave.
    spent: Option<Spent>,
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

    fn module(
        &self,
        index: usize,
        sum: &Sum<'_>,
        dtype: &Dtype,
        results: Option<&Results>,
        _task: &Task,
    ) -> Result<Done> {
        let rank = self.spent.as_ref().map(|spent| spent.ranks[index]);
        self.computed(sum, rank, dtype, results)
    }
}

impl Work<'_> {
    /// The ranks that a budget gives, where one is asked for.
    fn spend(&self, dtype: &Dtype, task: &Task) -> Result<Option<(Spent, BudgetReport)>> {
        let Some(Cut { rule: Rule::Budget(measure, amount), max_rank, .. }) = self.cut else {
            return Ok(None);
        };
        let candidates: Vec<Candidate> = (self.sums.modules.par_iter())
            .map(|sum| {
                task.check()?;
                let read = self.read(sum)?;
                let updates = updates(&read)?;
                let (total, _) = self.total(sum, &updates)?;
                let mut values = values_of(&total);
                task.advance(sum.bytes());
                if values.iter().any(|value| !value.is_finite()) {
                    return Err(not_finite(sum));
                }
                if let Some(max) = max_rank {
                    values.truncate(max as usize);
                }
                let norm = match &self.norms {
                    None => 1.0,
                    Some(norms) => *norms.get(&sum.module.key).ok_or_else(|| {
                        Error::Argument(format!(
                            "relative_to=\"base\": the base tells no norm for {}",
                            sum.name()
                        ))
                    })?,
                };
                let worth = values.iter().map(|value| (value / norm).powi(2)).collect();
                let elements = (sum.shape[0] + sum.shape[1]) as u64;
                let cost = match measure {
                    Measure::Ranks => 1,
                    Measure::Parameters => elements,
                    Measure::Bytes => elements * dtype.size() as u64,
                };
                Ok(Candidate { worth, cost })
            })
            .collect::<Result<_>>()?;
        let spent = within(&candidates, amount);
        if spent.cost == 0 {
            return Err(Error::Argument(format!(
                "a budget of {amount} {} leaves room for nothing: one rank of the smallest module takes \
                 {}",
                measure.name(),
                candidates.iter().map(|one| one.cost).min().unwrap_or(0)
            )));
        }
        let report =
            BudgetReport { measure: measure.name(), amount, spent: spent.cost, gap: spent.gap };
        Ok(Some((spent, report)))
    }

    /// The factors of all that is added to a module, by adapter.
    fn read(&self, sum: &Sum<'_>) -> Result<Vec<Option<ReadPart>>> {
        let part = |adapter| sum.part_of(adapter).map(|part| part.read()).transpose();
        (0..self.weights.len()).map(part).collect()
    }

    /// Σ cᵢΔᵢ, and the coefficients.
    fn total<'u>(
        &self,
        sum: &Sum<'_>,
        updates: &[Option<Update<'u>>],
    ) -> Result<(Update<'u>, Vec<f64>)> {
        let name = sum.name();
        let weights: Vec<f64> = self.weights.iter().map(|weight| weight.of(&name)).collect();
        let products = || inner_products(&updates.iter().map(Option::as_ref).collect::<Vec<_>>());
        let coefficients = self.method.coefficients(products, &weights);
        let [rows, columns] = sum.shape;
        let mut total = Update::sum(rows, columns, Vec::new())?;
        for (update, coefficient) in updates.iter().zip(&coefficients) {
            if let Some(update) = update.as_ref().filter(|_| *coefficient != 0.0) {
                total = total.plus(&update.scaled(*coefficient))?;
            }
        }
        Ok((total, coefficients))
    }

    fn computed(
        &self,
        sum: &Sum<'_>,
        rank: Option<usize>,
        dtype: &Dtype,
        results: Option<&Results>,
    ) -> Result<Done> {
        let read = self.read(sum)?;
        let updates = updates(&read)?;
        let (total, coefficients) = self.total(sum, &updates)?;
        let bias = self.bias(sum, &coefficients)?;
        // Of one adapter's modules with one scale, the factors are those without it.
        let scaling = if self.keeps { sum.module.scaling } else { 1.0 };
        let scale_out = if scaling == 0.0 { 1.0 } else { scaling };
        let inner = without_scale(&total, scale_out)?;
        let source_rank = total.rank();
        let mut record = Record {
            shape: sum.shape,
            source_rank,
            rank: 0,
            kept: 1.0,
            error: 0.0,
            norm: 0.0,
            singular_values: Vec::new(),
            coefficients: (self.adapters > 1).then_some(coefficients),
        };
        let (factors, tail, norm) = match self.cut {
            None => {
                // Of no adapter with a weight, nothing is added.
                let factors = match source_rank {
                    0 => None,
                    _ => Some(side_by_side(&inner)),
                };
                let norm = match factors.as_ref().map_or(Some(0.0), Factors::norm) {
                    Some(norm) => norm * scale_out.abs(),
                    None => crate::measure::spectrum::frobenius_norm(&total),
                };
                (factors.filter(|_| norm != 0.0), 0.0, norm)
            }
            Some(cut) => {
                let Some(found) = decomposed(&total) else { return Err(not_finite(sum)) };
                let floor = match cut.rule {
                    Rule::Auto => rounding::floor(&total),
                    _ => 0.0,
                };
                let wanted =
                    rank.unwrap_or_else(|| cut.rule.choose(&found.values, floor, cut.is_kohya));
                let most = cut.max_rank.map_or(usize::MAX, |max| max as usize);
                let k = wanted.min(most);
                let square = |values: &[f64]| values.iter().map(|value| value * value).sum::<f64>();
                let (all, tail) = (square(&found.values), square(&found.values[k..]));
                record.kept = if all == 0.0 { 1.0 } else { square(&found.values[..k]) / all };
                let full = match cut.rule {
                    Rule::Fixed(rank) => (rank as usize).min(most),
                    _ => k,
                };
                let factors = if all == 0.0 || k == 0 {
                    None
                } else if full >= source_rank && inner.terms().len() == 1 {
                    // Nothing is cut: the stored factors as they stand.
                    Some(padded(side_by_side(&inner), full))
                } else {
                    let weight = 1.0 / scale_out.abs().sqrt();
                    let scales: Vec<f64> =
                        found.values[..k].iter().map(|value| value.sqrt() * weight).collect();
                    let left: Vec<f64> =
                        scales.iter().map(|value| value * scale_out.signum()).collect();
                    let factors = match scale_out {
                        1.0 => found.truncated(k, Gauge::Balanced),
                        _ => found.with_scales(&left, &scales),
                    };
                    Some(padded(factors, full))
                };
                record.singular_values.clone_from(&found.values);
                (factors, tail.sqrt(), all.sqrt())
            }
        };
        if !norm.is_finite() {
            return Err(not_finite(sum));
        }
        record.norm = norm;
        let Some(factors) = factors else {
            record.error = if norm == 0.0 { 0.0 } else { 1.0 };
            record.kept = if norm == 0.0 { 1.0 } else { 0.0 };
            return Ok((record, None));
        };
        record.rank = factors.a.rows;
        let too_large = || too_large(sum, dtype);
        let factors = fitting(sum, factors);
        let own = Rounded::of(&factors, dtype).ok_or_else(too_large)?;
        let lost = scale_out.abs() * rounding_error(&factors, &own.factors(&factors));
        // To first order, rounding is orthogonal to what was cut off: ⟨U₂Σ₂V₂ᵀ, E_B·A + B·E_A⟩ = 0.
        record.error = if norm == 0.0 { 0.0 } else { tail.hypot(lost) / norm };
        let bias = bias.map(|values| Rows { rows: 1, columns: values.len(), values });
        let bias = bias.map(|bias| rounded(&bias, dtype).ok_or_else(too_large)).transpose()?;
        // One adapter's magnitudes stay what they are.
        let module = sum.module.clone();
        let place = results.map(|results| results.put(&own, bias.as_deref())).transpose()?;
        Ok((record, place.map(|place| (module, place, scale_out))))
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
        Ok(total)
    }
}

/// The updates of what was read.
fn updates(read: &[Option<ReadPart>]) -> Result<Vec<Option<Update<'_>>>> {
    read.iter().map(|part| part.as_ref().map(ReadPart::update).transpose()).collect()
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

/// The factors as plain ones of the module's layer: an embedding's product is the transpose of its weight,
/// but of formats that have it by tokens.
pub(super) fn fitting(sum: &Sum<'_>, factors: Factors) -> Factors {
    match sum.module.delta.is_by_tokens() {
        true => Factors { b: factors.a.transposed(), a: factors.b.transposed() },
        false => factors,
    }
}

/// The factors of a sum next to one another, each product's scale on its smaller side; a power of two is
/// exact on either.
pub(super) fn side_by_side(total: &Update<'_>) -> Factors {
    let (mut b, mut a) = sides(total);
    let scales = total.scales();
    if total.rows() <= total.columns() {
        for row in b.values.chunks_exact_mut(scales.len()) {
            row.iter_mut().zip(&scales).for_each(|(value, scale)| *value *= scale);
        }
    } else {
        for (row, scale) in a.values.chunks_exact_mut(total.columns()).zip(&scales) {
            row.iter_mut().for_each(|value| *value *= scale);
        }
    }
    Factors { b, a }
}

/// An update over a number, with the quotients of scales that are that number exactly one.
pub(super) fn without_scale<'u>(update: &Update<'u>, scale: f64) -> Result<Update<'u>> {
    let divided = |term: &Term<'u>| Term { scale: term.scale / scale, ..*term };
    let terms = update.terms().iter().map(divided).collect();
    Update::sum(update.rows(), update.columns(), terms)
}

/// The same with zeros up to that rank.
pub(super) fn padded(factors: Factors, rank: usize) -> Factors {
    let Factors { b, mut a } = factors;
    if b.columns >= rank {
        return Factors { b, a };
    }
    let mut wide = Rows::zeros(b.rows, rank);
    for (target, source) in
        wide.values.chunks_exact_mut(rank).zip(b.values.chunks_exact(b.columns.max(1)))
    {
        target[..b.columns].copy_from_slice(source);
    }
    a.values.resize(rank * a.columns, 0.0);
    a.rows = rank;
    Factors { b: wide, a }
}

impl Measure {
    fn name(self) -> &'static str {
        match self {
            Self::Ranks => "ranks",
            Self::Parameters => "parameters",
            Self::Bytes => "bytes",
        }
    }
}
