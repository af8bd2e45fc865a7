//! Adapters of several adapters, and shorter adapters: what may be asked for.

use std::path::Path;
use std::sync::Arc;

use serde::Deserialize;
use serde_json::{Map, Value};

use super::engine::{Job, Whole, run};
use super::methods::{Compat, Family, Inputs, Method};
use super::on_base::{self, Members, OnBase};
use super::options::Writing;
use super::ranks::Rule;
use super::report::Report;
use super::sums::{Allowed, Sum, Sums};
use super::whole::Parameters;
use super::work::{Cut, Work};
use super::write::Output;
use crate::adapter::format::AdapterSource;
use crate::adapter::{Adapter, LayerKind};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result};
use crate::methods::MethodOptions;
use crate::parallel::task::{Task, build_pool};
use crate::storage::scratch::ScratchFile;
use crate::weights::Weight;

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
    /// Of the random masks of some methods.
    pub seed: u64,
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
    let compat = Compat::parse(options.compat.as_deref())?;
    let inputs = Inputs { count, has_weights: options.weights.is_some(), compat };
    let method = Method::parse(&options.method, &options.options, inputs)?;
    let rule = options.rank.as_ref().filter(|rank| !rank.is_null()).map(Rule::parse).transpose()?;
    method.check_rule(&options.method, rule)?;
    let method = method.under(rule);
    let is_kohya = compat == Compat::Kohya;
    let cut = rule.map(|rule| Cut { rule, max_rank: None, is_kohya });
    let place = Output::check(output, &options.write)?;
    let adapters = opened(sources, base, task)?;
    let shared = base.map(|base| Arc::new(base.clone()));
    let members = match &shared {
        Some(base) => Members::of(&adapters, base, task)?,
        None => None,
    };
    if members.is_some() {
        on_base::check_rule(rule)?;
    }
    let parameters = match &shared {
        Some(base) => Parameters::of(&adapters, base, task)?,
        None => None,
    };
    if let Some(parameters) = &parameters {
        parameters.check_method(&method, &options.method)?;
    }
    let whole = parameters.as_ref().filter(|parameters| !parameters.is_empty());
    let allowed = Allowed {
        initialization: members.is_some(),
        saved: parameters.is_some(),
        ..Allowed::NOTHING
    };
    let summed = members.as_ref().map_or(&adapters[..], |members| &members.stand_ins);
    let mut sums = Sums::of(summed, allowed, task)?;
    let of_kernels = sums.find_kernels(base);
    let weights = options.weights.clone().unwrap_or_else(|| vec![Weight::All(1.0); count]);
    let mut names: Vec<String> = sums.modules.iter().map(Sum::name).collect();
    names.extend(whole.iter().flat_map(|whole| whole.names()));
    for weight in &weights {
        weight.check_numbers()?;
        weight.check_patterns(names.iter().map(String::as_str))?;
    }
    method.check_weights(&weights, &names)?;
    let mut notes = missing(&adapters, &sums);
    notes.extend(of_kernels);
    notes.extend(adapters.iter().flat_map(|adapter| adapter.notes().iter().cloned()));
    notes.extend(whole.map(Parameters::note));
    notes.extend(members.iter().flat_map(|members| &members.on_base).flatten().map(OnBase::note));
    let modules = || adapters.iter().flat_map(|adapter| adapter.modules().values());
    if !matches!(method.family, Family::Sum(_)) && modules().any(|module| module.bias.is_some()) {
        notes.push(format!(
            "the biases of the second factors are no matrices: they are summed with the weights, and \
             the method {} is for the updates",
            options.method
        ));
    }
    if !sums.vectors.is_empty() {
        notes.push(format!(
            "{} updates of norms and biases are vectors, which are summed and have no rank",
            sums.vectors.len()
        ));
    }
    let lacks_bias = |sum: &Sum<'_>| {
        let is_layer = sum.layer.kind != LayerKind::Embedding && sum.expert.is_none();
        is_layer && sum.parts.iter().all(|part| part.module().bias.is_none())
    };
    let fills_biases =
        options.write.target()? == "peft" && modules().any(|module| module.bias.is_some());
    let filled = sums.modules.iter().filter(|sum| fills_biases && lacks_bias(sum)).count();
    if filled > 0 {
        notes.push(format!(
            "{filled} modules get a bias of zeros: PEFT's lora_bias is that of all modules, and some have \
             one"
        ));
    }
    let seed = options.seed;
    let mut work = Work {
        sums: &sums,
        method: &method,
        weights: &weights,
        seed,
        cut,
        norms: None,
        keeps: false,
        spent: None,
        on_base: members.as_ref().map_or(&[], |members| &members.on_base),
        fills_biases,
    };
    let mut said = Map::new();
    said.insert("method".into(), options.method.clone().into());
    said.insert("weights".into(), plain(options.weights.as_ref()));
    said.insert("rank".into(), options.rank.clone().unwrap_or(Value::Null));
    said.insert("options".into(), options.options.plain());
    if method.is_random() {
        said.insert("seed".into(), seed.into());
    }
    if options.compat.is_some() {
        said.insert("compat".into(), plain(options.compat.as_ref()));
    }
    let combined = match whole {
        Some(whole) if !options.write.dry_run => {
            let file = ScratchFile::create(place.directory()?.join("parameters.partial"))?;
            let dtype = options.write.dtype()?;
            let pool = build_pool(options.write.threads)?;
            let how = (&method, &weights[..], seed);
            Some(pool.install(|| whole.combined(how, dtype.as_ref(), file, task))?)
        }
        _ => None,
    };
    let (sums, adapters, verb) = (&sums, &adapters[..], "combine");
    let whole = Whole::Replaced { count: whole.map_or(0, |whole| whole.names().len()), combined };
    let parameters = said;
    let job = Job { sums, adapters, base, verb, parameters, notes, rank_stabilized: false, whole };
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
    let is_kohya = match Compat::parse(options.compat.as_deref())? {
        Compat::Own => false,
        Compat::Kohya => true,
        Compat::Peft => {
            return Err(Error::Argument(
                "compat=\"peft\" is for combining adapters; PEFT has no rules for ranks".to_owned(),
            ));
        }
    };
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
    let mut sums = Sums::of(&adapters, Allowed::OF_ONE, task)?;
    let of_kernels = sums.find_kernels(base);
    let weights = [Weight::All(1.0)];
    let cut = Some(Cut { rule, max_rank: options.max_rank, is_kohya });
    // One scale for all is kept where all ranks are the same after it.
    let scales: Vec<f64> = adapters[0].modules().values().map(|module| module.scaling).collect();
    let keeps = matches!(rule, Rule::Fixed(_)) && scales.windows(2).all(|pair| pair[0] == pair[1]);
    let mut work = Work {
        sums: &sums,
        method: &Method::LINEAR,
        weights: &weights,
        seed: 0,
        cut,
        norms,
        keeps,
        spent: None,
        on_base: &[],
        fills_biases: false,
    };
    let mut parameters = Map::new();
    parameters.insert("rank".into(), options.rank.clone());
    parameters.insert("max_rank".into(), options.max_rank.into());
    parameters.insert("relative_to".into(), plain(options.relative_to.as_ref()));
    let notes = adapters[0].notes().iter().cloned().chain(of_kernels).collect();
    let (sums, adapters, verb) = (&sums, &adapters[..], "resize");
    let whole = Whole::Kept;
    let job = Job { sums, adapters, base, verb, parameters, notes, rank_stabilized: false, whole };
    run(job, &mut work, place, task)
}

fn plain(value: impl serde::Serialize) -> Value {
    serde_json::to_value(value).expect("plain data")
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
        let adapter = resolved.transpose()?.flatten().unwrap_or(adapter);
        Ok(crate::convert::of_parameters(&adapter).unwrap_or(adapter))
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
