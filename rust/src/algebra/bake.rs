//! The same update in other factors: scales folded in, alphas and ranks as somebody asks for them, factors
//! of even size, plain factors of what began with a part of the base.

use std::collections::HashMap;
use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::combine::opened;
use super::dense::Dense;
use super::engine::{Compute, Done, Job, Whole, run};
use super::factored::{Factors, Gauge, Rows, decomposed, rounding_error};
use super::made::{padded, side_by_side, without_scale};
use super::on_base::{self, OnBase};
use super::options::Writing;
use super::ranks::Rule;
use super::report::{Record, Report};
use super::results::{Results, Rounded, Written, rounded};
use super::sums::{Allowed, Sum, Sums};
use super::work::{Cut, fitting, not_finite, too_large};
use super::write::Output;
use crate::adapter::format::AdapterSource;
use crate::adapter::{Adapter, Initialization};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::execute::operands::operands;
use crate::kernel::convert::widen_f64;
use crate::measure::spectrum::{Term, Update, Values, frobenius_norm};
use crate::parallel::task::Task;
use crate::plan::{self, Inputs, Plan, PlannedTensor};
use crate::tensor::dtype::Dtype;

/// What is asked of other factors.
#[derive(Debug, Clone, Default, Deserialize)]
#[serde(deny_unknown_fields, default)]
pub struct BakeOptions {
    /// `keep`, or `fold` for factors whose scale is one.
    pub scale: Option<String>,
    /// The alpha that is written for every module.
    pub alpha: Option<f64>,
    /// Whether the scale that is written is α/√r, and not α/r; as it is, if nothing is said.
    pub rslora: Option<bool>,
    /// The rank that every module is brought to by zeros.
    pub pad_to: Option<u64>,
    /// `keep`, `balanced` or `orthonormal`.
    pub gauge: Option<String>,
    /// Whether factors that began with a part of the base's weight become plain ones, and plain factors are
    /// made of what an adapter makes of whole weights.
    pub plain: bool,
    /// The rule for the ranks of the latter.
    pub rank: Value,
    /// How the result is written.
    pub write: Writing,
}

/// How the two factors of a product share what they can share.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Factoring {
    /// As they are.
    Keep,
    /// Columns of B and rows of A of one length, but for a power of two, so that nothing is rounded.
    Balanced,
    /// U·√Σ and √Σ·Vᵀ, σ descending.
    Orthonormal,
}

/// Writes an adapter's updates in other factors.
///
/// # Errors
/// [`Error::Argument`] for options that make no sense together; [`Error::Unsupported`] for what has no
/// other factors, or what the target's format cannot hold; [`Error::Output`] if something is there
/// already; those of reading the adapter. Nothing is left behind then.
pub fn bake(
    source: &AdapterSource,
    base: Option<Arc<Checkpoint>>,
    output: &Path,
    options: &BakeOptions,
    task: &Task,
) -> Result<Report> {
    let unknown = |name: &str, value: &str, known: &str| {
        Err(Error::Argument(format!("{name} is {value:?}; it is {known}")))
    };
    let folds = match options.scale.as_deref().unwrap_or("keep") {
        "keep" => false,
        "fold" => true,
        other => return unknown("scale", other, "\"keep\" or \"fold\""),
    };
    let factoring = match options.gauge.as_deref().unwrap_or("keep") {
        "keep" => Factoring::Keep,
        "balanced" => Factoring::Balanced,
        "orthonormal" => Factoring::Orthonormal,
        other => {
            return unknown("gauge", other, "\"keep\", \"balanced\" or \"orthonormal\"");
        }
    };
    if folds && options.alpha.is_some() {
        return Err(Error::Argument(
            "alpha says what scale is written, and scale=\"fold\" that it is one; give one of them"
                .to_owned(),
        ));
    }
    if options.alpha.is_some_and(|alpha| !alpha.is_finite() || alpha <= 0.0) {
        return Err(Error::Argument("alpha is a finite number above zero".to_owned()));
    }
    let rule = match &options.rank {
        Value::Null => None,
        given => Some(Rule::parse(given)?),
    };
    check_rule(rule, options.plain)?;
    let place = Output::check(output, &options.write)?;
    let adapters = opened(std::slice::from_ref(source), base.as_deref(), task)?;
    let adapter = &adapters[0];
    let begins_with_base = adapter.semantics().initialization != Initialization::Plain;
    let is_of_weights = adapter.modules().values().any(on_base::needs_base);
    let (removed, on_base) = match (options.plain && (begins_with_base || is_of_weights), &base) {
        (false, _) => (None, None),
        (true, Some(base)) => {
            let is_removed = begins_with_base.then(|| Planned::of(source, base.clone(), task));
            (is_removed.transpose()?, OnBase::of(adapter, base, false, task)?)
        }
        (true, None) if begins_with_base => {
            return Err(Error::unsupported(
                adapter.path(),
                "began with a part of the base's weight, which only the base tells; give it (base=, \
                 --base)",
            ));
        }
        (true, None) => {
            return Err(Error::unsupported(
                adapter.path(),
                "makes of the base's weights what only the base tells (DoRA or the like); give it (base=, \
                 --base)",
            ));
        }
    };
    if rule.is_some() && on_base.is_none() {
        return Err(Error::Argument(
            "rank is for what an adapter makes of the base's whole weights (DoRA and the like), and this \
             one has factors; resize cuts them"
                .to_owned(),
        ));
    }
    let allowed = Allowed { initialization: removed.is_some(), ..Allowed::OF_ONE };
    let stand_in = match &on_base {
        Some(on_base) => vec![on_base.stand_in(adapter, task)?],
        None => Vec::new(),
    };
    let summed = if on_base.is_some() { &stand_in[..] } else { &adapters[..] };
    let mut sums = Sums::of(summed, allowed, task)?;
    let of_kernels = sums.find_kernels(base.as_deref());
    if let Some(rank) = options.pad_to {
        let is_known =
            |sum: &Sum<'_>| on_base.as_ref().is_none_or(|on_base| !on_base.has(&sum.module.key));
        check_padding(&sums, rank, removed.is_some(), &is_known)?;
    }
    // Only PEFT's config can say α/√r.
    let is_peft = options.write.target()? == "peft";
    let rank_stabilized = match options.rslora {
        Some(true) if !is_peft => {
            return Err(Error::Argument(format!(
                "rslora: files in the format {} say a scale of α/r; only PEFT's can say α/√r",
                options.write.target()?
            )));
        }
        Some(wanted) => wanted,
        None => adapter.semantics().rank_stabilized && is_peft && !folds,
    };
    let mut parameters = Map::new();
    parameters.insert("scale".into(), options.scale.clone().into());
    parameters.insert("alpha".into(), options.alpha.into());
    parameters.insert("rslora".into(), options.rslora.into());
    parameters.insert("pad_to".into(), options.pad_to.into());
    parameters.insert("gauge".into(), options.gauge.clone().into());
    parameters.insert("plain".into(), options.plain.into());
    if rule.is_some() {
        parameters.insert("rank".into(), options.rank.clone());
    }
    let mut work = Work {
        folds,
        alpha: options.alpha,
        pad_to: options.pad_to,
        factoring,
        rank_stabilized,
        removed,
        cut: rule.map(|rule| Cut { rule, max_rank: None, is_kohya: false }),
        on_base: on_base.as_ref(),
    };
    let mut notes = adapter.notes().to_vec();
    notes.extend(on_base.as_ref().map(OnBase::note));
    notes.extend(of_kernels);
    let (sums, adapters) = (&sums, &adapters[..]);
    let base = base.as_deref();
    let job = Job {
        sums,
        adapters,
        base,
        verb: "bake",
        parameters,
        notes,
        rank_stabilized,
        whole: Whole::Kept,
    };
    run(job, &mut work, place, task)
}

/// Refuses a rank that some module has more than.
fn check_padding(
    sums: &Sums<'_>,
    rank: u64,
    doubles: bool,
    is_known: &dyn Fn(&Sum<'_>) -> bool,
) -> Result<()> {
    let rank_of = |sum: &Sum<'_>| sum.parts[0].rank() as u64 * if doubles { 2 } else { 1 };
    let known = sums.modules.iter().filter(|sum| is_known(sum));
    let Some(most) = known.max_by_key(|sum| rank_of(sum)) else { return Ok(()) };
    if rank_of(most) > rank {
        return Err(too_short(rank, most, rank_of(most)));
    }
    Ok(())
}

fn too_short(pad_to: u64, sum: &Sum<'_>, rank: u64) -> Error {
    Error::Argument(format!("pad_to is {pad_to}, and {} has rank {rank}; resize cuts", sum.name()))
}

/// Refuses rules that are not for what is made of whole weights.
fn check_rule(rule: Option<Rule>, is_plain: bool) -> Result<()> {
    on_base::check_rule(rule)?;
    match rule {
        Some(_) if !is_plain => Err(Error::Argument(
            "rank is for plain (plain=True, --plain), which makes factors of what has none; resize cuts \
             those that there are"
                .to_owned(),
        )),
        Some(Rule::Budget(..)) => Err(Error::Argument(
            "rank is a budget, which is for resize: bake with a number or a rule as \"error:0.01\" first"
                .to_owned(),
        )),
        Some(Rule::SvCumulative(_)) => Err(Error::Argument(
            "sv_cumulative needs every singular value, and bake computes the leading ones; energy:… says \
             nearly the same"
                .to_owned(),
        )),
        _ => Ok(()),
    }
}

/// The merge of an adapter, which tells what its initialization took out of each weight.
struct Planned {
    inputs: Inputs,
    tensors: Vec<PlannedTensor>,
    /// By the key of a module, the tensor that it changes.
    places: HashMap<String, usize>,
}

impl Planned {
    fn of(source: &AdapterSource, base: Arc<Checkpoint>, task: &Task) -> Result<Self> {
        let adapter: Adapter = source.open_for(Some(&base), task)?;
        let inputs = Inputs { base, adapters: vec![Arc::new(adapter)] };
        let plan = Plan::new_with(&inputs, plan::Options::default(), task)?;
        let mut tensors = Vec::new();
        let mut places = HashMap::new();
        for tensor in plan.shards.iter().flat_map(|shard| &shard.tensors) {
            if tensor.updates().is_empty() {
                continue;
            }
            for update in tensor.updates() {
                places.insert(update.module.clone(), tensors.len());
            }
            tensors.push(tensor.clone());
        }
        Ok(Self { inputs, tensors, places })
    }

    /// The products of a module, with what was taken out of the weight as one of them.
    fn products(&self, key: &str) -> Result<Option<Vec<(Rows, Rows, f64)>>> {
        let Some(place) = self.places.get(key) else { return Ok(None) };
        let tensor = &self.tensors[*place];
        let found = operands(&self.inputs, tensor, None)?;
        let own = tensor.updates().iter().position(|update| update.module == key);
        let found = own.and_then(|index| found.into_iter().nth(index));
        Ok(found.map(|found| {
            let products = found.products.into_iter().map(|product| {
                let pair = product.pair;
                let b = widen_f64(&pair.b_dtype, &pair.b);
                let a = widen_f64(&pair.a_dtype, &pair.a);
                let b = Rows { rows: pair.outputs, columns: pair.rank, values: b };
                let a = Rows { rows: pair.rank, columns: pair.inputs, values: a };
                (b, a, product.coefficient)
            });
            // The trained factors first.
            let mut products: Vec<_> = products.collect();
            products.reverse();
            products
        }))
    }
}

/// What is to be computed.
struct Work<'a> {
    folds: bool,
    alpha: Option<f64>,
    pad_to: Option<u64>,
    factoring: Factoring,
    rank_stabilized: bool,
    removed: Option<Planned>,
    /// The rule for what is made of whole weights.
    cut: Option<Cut>,
    on_base: Option<&'a OnBase>,
}

/// A module's update in some factors, before they are changed.
struct Unchanged {
    factors: Factors,
    /// What they are multiplied by.
    scale: f64,
    norm: f64,
    kept: f64,
    values: Vec<f64>,
    source_rank: usize,
    /// What they stand for, where they are not all of it.
    whole: Option<Dense>,
}

impl Work<'_> {
    /// The adapter on its base, where that alone tells what a module adds.
    fn whole(&self, sum: &Sum<'_>) -> Option<&OnBase> {
        self.on_base.filter(|on_base| on_base.has(&sum.module.key))
    }

    /// What is made of a whole weight.
    fn of_whole(
        &self,
        on_base: &OnBase,
        sum: &Sum<'_>,
        dtype: &Dtype,
        task: &Task,
    ) -> Result<Unchanged> {
        let dense = on_base.dense(&sum.module.key, task)?;
        let short = on_base::short(&dense, self.cut, None, dtype, &sum.name())?;
        let [rows, columns] = sum.shape;
        let none = || Factors { b: Rows::zeros(rows, 0), a: Rows::zeros(0, columns) };
        Ok(Unchanged {
            factors: short.factors.unwrap_or_else(none),
            scale: 1.0,
            norm: short.norm,
            kept: short.kept,
            values: short.values,
            source_rank: rows.min(columns),
            whole: Some(dense),
        })
    }

    /// What a module's factors make, or with what was taken out of the weight.
    fn of_factors(&self, sum: &Sum<'_>) -> Result<Unchanged> {
        let module = sum.module;
        let removed = match &self.removed {
            Some(planned) => planned.products(&module.key)?,
            None => None,
        };
        let read = sum.parts[0].read()?;
        let stored = read.update()?;
        let [rows, columns] = sum.shape;
        let terms = removed.iter().flatten().map(|(b, a, coefficient)| Term {
            left: Values::F64(&b.values),
            right: Values::F64(&a.values),
            rank: b.columns,
            scale: *coefficient,
        });
        let whole = match removed {
            Some(_) => Update::sum(rows, columns, terms.collect())?,
            None => stored,
        };
        let norm = frobenius_norm(&whole);
        if !norm.is_finite() {
            return Err(not_finite(sum));
        }
        // The scale stays outside of the factors where all of it is one number.
        let scale = match whole.terms() {
            [term] if term.scale != 0.0 => term.scale,
            _ => 1.0,
        };
        let inner = without_scale(&whole, scale);
        let source_rank = whole.rank();
        let factors = match self.factoring {
            Factoring::Orthonormal => {
                let found = decomposed(&inner).ok_or_else(|| not_finite(sum))?;
                found.truncated(found.values.len(), Gauge::Balanced)
            }
            Factoring::Keep | Factoring::Balanced => side_by_side(&inner),
        };
        let (kept, values) = (1.0, Vec::new());
        Ok(Unchanged { factors, scale, norm, kept, values, source_rank, whole: None })
    }
}

impl Compute for Work<'_> {
    fn elements(&self, sum: &Sum<'_>) -> usize {
        self.whole(sum).map_or(0, |_| sum.shape[0] * sum.shape[1])
    }

    fn module(
        &self,
        _index: usize,
        sum: &Sum<'_>,
        dtype: &Dtype,
        results: Option<&Results>,
        task: &Task,
    ) -> Result<Done> {
        let module = sum.module;
        let unchanged = match self.whole(sum) {
            Some(on_base) => self.of_whole(on_base, sum, dtype, task)?,
            None => self.of_factors(sum)?,
        };
        let Unchanged { mut factors, scale, norm, kept, values, source_rank, whole } = unchanged;
        if self.factoring == Factoring::Balanced && factors.b.columns > 0 {
            balance(&mut factors);
        }
        if let Some(rank) = self.pad_to.filter(|rank| *rank < factors.b.columns as u64) {
            return Err(too_short(rank, sum, factors.b.columns as u64));
        }
        if factors.b.columns == 0 {
            // Nothing is made of the weight.
            let (shape, rank, error, coefficients) = (sum.shape, 0, 0.0, None);
            let singular_values = values;
            let record = Record {
                shape,
                source_rank,
                rank,
                kept,
                error,
                norm,
                singular_values,
                coefficients,
                expert_ranks: None,
            };
            return Ok((record, None));
        }
        let full = self.pad_to.map_or(0, |rank| rank as usize).max(factors.b.columns);
        let factors = padded(factors, full);
        let rank = factors.b.columns as f64;
        let divisor = if self.rank_stabilized { rank.sqrt() } else { rank };
        let wanted = match (self.folds, self.alpha) {
            (true, _) => 1.0,
            (false, Some(alpha)) => alpha / divisor,
            (false, None) => scale,
        };
        let factors = match scale / wanted {
            1.0 => factors,
            ratio => Factors { b: times(factors.b, ratio), ..factors },
        };
        let factors = fitting(sum, factors);
        let too_large = || too_large(sum, dtype);
        let own = Rounded::of(&factors, dtype).ok_or_else(too_large)?;
        let written = own.factors(&factors);
        let lost = match &whole {
            Some(whole) => {
                let written = fitting(sum, written);
                whole.distance(&Factors { b: times(written.b, wanted), ..written })
            }
            None => wanted.abs() * rounding_error(&factors, &written),
        };
        let record = Record {
            shape: sum.shape,
            source_rank,
            rank: factors.a.rows,
            kept,
            error: if norm == 0.0 { 0.0 } else { lost / norm },
            norm,
            singular_values: values,
            coefficients: None,
            expert_ranks: None,
        };
        let bias = match &module.bias {
            None => None,
            Some(bias) => {
                let values = bias.read_f64()?;
                let values: Vec<f64> =
                    values.iter().map(|value| value * (module.scaling / wanted)).collect();
                let bias = Rows { rows: 1, columns: values.len(), values };
                Some(rounded(&bias, dtype).ok_or_else(too_large)?)
            }
        };
        let place = results.map(|results| results.put(&own, bias.as_deref())).transpose()?;
        Ok((record, place.map(|place| Written::of(sum, place, wanted))))
    }
}

fn times(mut matrix: Rows, factor: f64) -> Rows {
    matrix.values.iter_mut().for_each(|value| *value *= factor);
    matrix
}

/// Gives each column of B and its row of A nearly one length, by powers of two.
fn balance(factors: &mut Factors) {
    let rank = factors.b.columns;
    let mut squares = vec![0.0; rank];
    for row in factors.b.values.chunks_exact(rank) {
        squares.iter_mut().zip(row).for_each(|(square, value)| *square += value * value);
    }
    let mut powers = vec![1.0; rank];
    for (k, row) in factors.a.values.chunks_exact_mut(factors.a.columns.max(1)).enumerate() {
        let own: f64 = row.iter().map(|value| value * value).sum();
        if own == 0.0 || squares[k] == 0.0 {
            continue;
        }
        // ½·log₂ of the quotient of lengths is ¼ of that of the squares.
        let power = (0.25 * (squares[k].log2() - own.log2())).round();
        powers[k] = power.exp2();
        row.iter_mut().for_each(|value| *value *= powers[k]);
    }
    for row in factors.b.values.chunks_exact_mut(rank) {
        row.iter_mut().zip(&powers).for_each(|(value, power)| *value /= power);
    }
}
