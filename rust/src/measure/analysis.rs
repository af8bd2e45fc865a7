//! What an adapter holds: the statistics of every tensor, and the spectrum of every update.
//!
//! All figures have the same bits whatever the number of threads. Progress is counted in bytes
//! read.

mod compare;
pub mod stored;

#[cfg(test)]
mod tests;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value};

pub use compare::{Comparison, ModuleComparison, PairComparison, compare};

use crate::adapter::{Adapter, Module, grammar};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::prefix;
use crate::checkpoint::names::renames::{NameIndex, Renames};
use crate::error::{Error, Result};
use crate::measure::entries::{EntryStatistics, scan_entries};
use crate::measure::metrics::{self, Shape};
use crate::measure::places::places;
use crate::measure::spectrum::{Spectrum, Update, Values};
use crate::measure::statistics::{
    Bins, ElementType, InFile, Request, Summary, Tensor, describe, describe_each, with_room,
};
use crate::measure::summary::{ShapeSummary, UpdateSummary};
use crate::parallel::task::Task;
use crate::tensor::safetensors::TensorInfo;

/// Entries of ΔW smaller than this share of their root mean square count as small.
const SMALL_ENTRY: f64 = 0.01;

/// What to find beside moments and spectra.
#[derive(Debug, Clone)]
pub struct Options {
    /// Percentiles of the tensors' values, each from 0 to 100.
    pub percentiles: Vec<f64>,
    /// Bins of every histogram.
    pub bins: usize,
    /// Whether to stream over the entries of each ΔW.
    pub entries: bool,
}

/// A tensor of an adapter and its statistics.
#[derive(Debug, Clone, Serialize)]
pub struct TensorAnalysis {
    /// Its name in the file.
    pub name: String,
    /// Its type, as safetensors writes it.
    pub dtype: String,
    /// Its shape.
    pub shape: Vec<u64>,
    /// Its statistics.
    #[serde(flatten)]
    pub statistics: Summary,
}

/// The entries of an update.
#[derive(Debug, Clone, Serialize)]
pub struct EntryAnalysis {
    /// The magnitude below which entries were counted: 1 % of their root mean square.
    pub threshold: f64,
    /// What the entries are like.
    #[serde(flatten)]
    pub statistics: EntryStatistics,
}

/// A module's update in relation to the weight that it changes.
#[derive(Debug, Clone, Serialize)]
pub struct BaseNorm {
    /// The base's tensor.
    pub tensor: String,
    /// ‖W₀‖_F.
    pub norm: f64,
}

/// One module's update ΔW = s·B·A.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleAnalysis {
    /// The module's path in the model.
    pub path: String,
    /// linear, embedding or convolution.
    pub kind: &'static str,
    /// The index of the block it lies in; `None` outside of blocks.
    pub block: Option<i64>,
    /// Its path within the block.
    pub layer: String,
    /// (out, in) of ΔW; the in-channels and the kernel of a convolution are taken together.
    pub shape: [usize; 2],
    /// r.
    pub rank: u64,
    /// The alpha that the config gives the module.
    pub alpha: f64,
    /// s.
    pub scaling: f64,
    /// The tensor of A.
    pub a_name: String,
    /// The tensor of B.
    pub b_name: String,
    /// The singular values and the figures made of them.
    #[serde(flatten, serialize_with = "metrics::serialize_spectrum")]
    pub spectrum: Spectrum,
    /// The weight that the module changes, where a base was given.
    pub base: Option<BaseNorm>,
    /// The entries of ΔW, where they were asked for.
    pub entries: Option<EntryAnalysis>,
}

/// What one adapter holds.
#[derive(Debug, Clone, Serialize)]
pub struct Analysis {
    /// The path that was opened.
    pub path: String,
    /// `adapter_config.json` as it stands.
    pub config: Map<String, Value>,
    /// Bytes of the weights file.
    pub total_bytes: u64,
    /// All values of all tensors taken together.
    pub weights: Summary,
    /// Each tensor, in the order of the file.
    pub tensors: Vec<TensorAnalysis>,
    /// Each update, in the order of the file.
    pub modules: Vec<ModuleAnalysis>,
    /// The modules taken together.
    pub summary: AdapterSummary,
    /// What there is beside plain low-rank products, in words.
    pub features: Vec<String>,
    /// What could not be measured, and why.
    pub notes: Vec<String>,
}

/// The modules of an adapter taken together.
#[derive(Debug, Clone, Serialize)]
pub struct AdapterSummary {
    /// Their shapes and scales.
    #[serde(flatten)]
    pub shapes: ShapeSummary,
    /// Their updates.
    #[serde(flatten)]
    pub updates: UpdateSummary,
}

/// The extents (m, n, r) of a module's ΔW = B·A, both factors flattened to matrices; `None` if
/// the factors are not shaped as those of a LoRA.
pub(crate) fn extents(module: &Module) -> Option<(usize, usize, usize)> {
    let (a, b) = module.delta.plain()?;
    let (rows, rank) = (b.shape[0], module.rank);
    // A grouped or depthwise kernel in B would not be a plain product.
    let is_plain = b.elements() == rows * rank;
    is_plain.then_some((rows as usize, (a.elements() / rank) as usize, rank as usize))
}

/// A module's factors as they lie in the file, read.
struct Factors<'b> {
    extents: (usize, usize, usize),
    scaling: f64,
    elements: [ElementType; 2],
    b: &'b [u8],
    a: &'b [u8],
}

impl<'b> Factors<'b> {
    /// Of a module that can be measured, in a buffer that grows as needed.
    fn read(module: &Module, room: &'b mut Vec<u8>) -> Result<Option<Self>> {
        let (Some(extents), Some((stored_a, stored_b))) = (extents(module), module.delta.plain())
        else {
            return Ok(None);
        };
        let element = |tensor: &TensorInfo| ElementType::from_dtype(&tensor.dtype);
        let (Some(left), Some(right)) = (element(stored_b), element(stored_a)) else {
            return Ok(None);
        };
        let (first, all) = (stored_b.bytes() as usize, factor_bytes(module) as usize);
        if room.len() < all {
            room.resize(all, 0);
        }
        let (b, a) = room[..all].split_at_mut(first);
        stored_b.read_into(0, b)?;
        stored_a.read_into(0, a)?;
        // Of an update whose scale nothing tells, what does not depend on it.
        let scaling = if module.scaling.is_nan() { 1.0 } else { module.scaling };
        let elements = [left, right];
        Ok(Some(Self { extents, scaling, elements, b, a }))
    }

    /// The update that they make.
    fn update(&self) -> Result<Update<'b>> {
        let (rows, columns, rank) = self.extents;
        let left = Values::Stored(Tensor::new(self.b, self.elements[0])?);
        let right = Values::Stored(Tensor::new(self.a, self.elements[1])?);
        Update::new(rows, columns, rank, left, right, self.scaling)
    }
}

pub(crate) fn unmeasured(module: &Module) -> String {
    let tensors = module.delta.tensors();
    let factors: Vec<_> = (tensors.iter().take(2).rev())
        .map(|(_, tensor)| format!("{} of shape {:?}", tensor.name, tensor.shape))
        .collect();
    format!(
        "module {} is not measured: its factors {} are no plain product of matrices",
        module.path,
        factors.join(" and ")
    )
}

pub(crate) fn without_statistics(tensor: &TensorInfo) -> String {
    format!(
        "tensor {} has the type {}, of which there are no statistics",
        tensor.name, tensor.dtype
    )
}

/// Measures an adapter, on the given threads.
///
/// # Errors
/// [`Error::Argument`] for unusable bins or percentiles, [`Error::Plan`] where the base has no
/// weight for a module, [`Error::Adapter`] or [`Error::Checkpoint`] if a file changed meanwhile,
/// [`Error::Io`], [`Error::Cancelled`].
pub fn analyze(
    adapter: &Adapter,
    base: Option<&Checkpoint>,
    options: &Options,
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<Analysis> {
    let weights = base.map(|base| find_weights(adapter, base, task)).transpose()?;
    task.expect(work(adapter, weights.as_deref(), options));
    pool.install(|| {
        let mut notes = Vec::new();
        let (tensors, all) = tensors(adapter, options, task, &mut notes)?;
        let modules: Vec<_> = adapter.modules().values().enumerate().collect();
        let measured: Vec<Option<ModuleAnalysis>> = modules
            .par_iter()
            .map(|(position, module)| {
                task.check()?;
                let weight = weights.as_ref().map(|weights| &weights[*position]);
                with_room(|room| {
                    let Some(factors) = Factors::read(module, room)? else {
                        return Ok(None);
                    };
                    measure(module, &factors.update()?, base.zip(weight), options, task).map(Some)
                })
            })
            .collect::<Result<_>>()?;
        adapter.check_unchanged()?;
        base.map_or(Ok(()), Checkpoint::check_unchanged)?;
        for ((_, module), measured) in modules.iter().zip(&measured) {
            if measured.is_none() {
                notes.push(unmeasured(module));
            }
        }
        let mut modules: Vec<_> = measured.into_iter().flatten().collect();
        let paths: Vec<_> = modules.iter().map(|module| module.path.clone()).collect();
        for (module, place) in modules.iter_mut().zip(places(&paths)) {
            (module.block, module.layer) = (place.block, place.layer);
        }
        Ok(Analysis {
            path: adapter.path().display().to_string(),
            config: adapter.settings().clone(),
            total_bytes: adapter.file().size(),
            weights: all,
            tensors,
            summary: summary_of(&modules),
            modules,
            features: features(adapter),
            notes,
        })
    })
}

fn summary_of(modules: &[ModuleAnalysis]) -> AdapterSummary {
    let shapes: Vec<_> = modules
        .iter()
        .map(|module| Shape {
            rows: module.shape[0],
            columns: module.shape[1],
            rank: module.rank as usize,
            alpha: module.alpha,
            scaling: module.scaling,
        })
        .collect();
    AdapterSummary {
        shapes: ShapeSummary::of(&shapes),
        updates: UpdateSummary::of(modules.iter().map(|module| &module.spectrum)),
    }
}

/// What the figures of s·B·A do not tell of an adapter.
pub(crate) fn features(adapter: &Adapter) -> Vec<String> {
    let mut features = adapter.obstacles(&[]);
    let modules = || adapter.modules().values();
    if modules().any(|module| module.scaling.is_nan()) {
        features.push(
            "its scale is not known, so that norms, singular values and whatever else depends on it \
             are blank; give its alpha or its scale (--alpha, --scale)"
                .to_owned(),
        );
    }
    let magnitudes = modules().filter(|module| module.magnitude.is_some()).count();
    if magnitudes > 0 {
        features.push(format!(
            "{magnitudes} modules have a DoRA magnitude, which rescales the whole weight; \
             figures are of s·B·A alone"
        ));
    }
    let biases = modules().filter(|module| module.bias.is_some()).count();
    if biases > 0 {
        features.push(format!("{biases} modules have a bias of lora_B beside s·B·A"));
    }
    if let Some(first) = adapter.trained_rows().first() {
        let rows: usize = adapter.trained_rows().iter().map(|rows| rows.rows.len()).sum();
        features.push(format!(
            "{rows} rows of embeddings were trained whole (the first: of {}); they are in the \
             tensors' statistics, not among the modules",
            first.path
        ));
    }
    if let Some(first) = adapter.saved().first() {
        features.push(format!(
            "{} parameters were trained whole (the first: {}); they are in the tensors' \
             statistics, not among the modules",
            adapter.saved().len(),
            first.path
        ));
    }
    features
}

/// The bytes that an analysis reads.
fn work(adapter: &Adapter, weights: Option<&[TensorInfo]>, options: &Options) -> u64 {
    let own = adapter.file().header().data_bytes();
    let base: u64 = weights.into_iter().flatten().map(TensorInfo::bytes).sum();
    let entries: u64 =
        if options.entries { adapter.modules().values().map(entry_work).sum() } else { 0 };
    own + adapter.modules().values().map(factor_bytes).sum::<u64>() + base + entries
}

fn factor_bytes(module: &Module) -> u64 {
    module.delta.plain().map_or(0, |(a, b)| a.bytes() + b.bytes())
}

/// What streaming over a ΔW counts as, in bytes: it is never read, but takes its time.
fn entry_work(module: &Module) -> u64 {
    extents(module).map_or(0, |(rows, columns, _)| (rows * columns) as u64 * 4)
}

fn tensors(
    adapter: &Adapter,
    options: &Options,
    task: &Task,
    notes: &mut Vec<String>,
) -> Result<(Vec<TensorAnalysis>, Summary)> {
    let mut infos = Vec::new();
    let mut values = Vec::new();
    for tensor in &adapter.file().header().tensors {
        match InFile::new(adapter.file(), tensor) {
            Some(stored) => {
                infos.push(tensor);
                values.push(stored);
            }
            None => notes.push(without_statistics(tensor)),
        }
    }
    let bins = Some(Bins::Automatic(options.bins));
    let request = Request {
        percentiles: options.percentiles.clone(),
        histogram: bins.clone(),
        log_histogram: bins,
    };
    let (each, all) = describe_each(&values, &request, task)?;
    let tensors = infos.into_iter().zip(each).map(|(tensor, statistics)| TensorAnalysis {
        name: tensor.name.clone(),
        dtype: tensor.dtype.name().to_owned(),
        shape: tensor.shape.clone(),
        statistics,
    });
    Ok((tensors.collect(), all))
}

fn measure(
    module: &Module,
    update: &Update<'_>,
    base: Option<(&Checkpoint, &TensorInfo)>,
    options: &Options,
    task: &Task,
) -> Result<ModuleAnalysis> {
    let spectrum = Spectrum::of(update);
    task.advance(factor_bytes(module));
    let base = base.map(|(base, weight)| base_norm(base, weight, task)).transpose()?;
    let entries = if options.entries {
        task.check()?;
        let count = update.rows() as f64 * update.columns() as f64;
        let typical = spectrum.frobenius_norm / count.sqrt();
        // Of an update that is not finite nothing is small.
        let threshold = if typical.is_finite() { SMALL_ENTRY * typical } else { 0.0 };
        let statistics = scan_entries(update, &Bins::Automatic(options.bins), threshold)?;
        task.advance(entry_work(module));
        Some(EntryAnalysis { threshold, statistics })
    } else {
        None
    };
    let (a, b) = module.delta.plain().expect("its extents are those of two factors");
    let (mut spectrum, mut entries) = (spectrum, entries);
    if module.scaling.is_nan() {
        spectrum.blank_what_is_scaled();
        entries = None;
    }
    Ok(ModuleAnalysis {
        path: module.path.clone(),
        kind: module.kind.name(),
        // Its place shows beside the others' alone.
        block: None,
        layer: String::new(),
        shape: [update.rows(), update.columns()],
        rank: module.rank,
        alpha: module.alpha,
        scaling: module.scaling,
        a_name: a.name.clone(),
        b_name: b.name.clone(),
        spectrum,
        base,
        entries,
    })
}

/// The base's weight of each module.
fn find_weights(adapter: &Adapter, base: &Checkpoint, task: &Task) -> Result<Vec<TensorInfo>> {
    let named = grammar::resolve(adapter, base);
    let adapter = named.as_ref().unwrap_or(adapter);
    let mut parameters: Vec<_> =
        adapter.modules().values().map(|module| format!("{}.weight", module.path)).collect();
    let mut names = NameIndex::plain(base);
    let mut fit = prefix::find_prefix_change(&parameters, &names, task)?;
    if !fit.problems.is_empty()
        && let Some(renames) = Renames::built_in(base)
    {
        let renamed = NameIndex::renamed(base, renames, task)?;
        // A piece of a stored tensor has no norm of its own there.
        let canonical = parameters.iter().map(|parameter| renamed.canonical(parameter));
        let whole = canonical.filter(|one| one.slice.is_none()).map(|one| one.name);
        let whole: Vec<_> = whole.collect();
        let other = prefix::find_prefix_change(&whole, &renamed, task)?;
        if whole.len() == parameters.len() && other.problems.is_empty() {
            (names, fit, parameters) = (renamed, other, whole);
        }
    }
    let mut problems = fit.problems;
    let mut weights = Vec::new();
    if problems.is_empty() {
        for (module, parameter) in adapter.modules().values().zip(&parameters) {
            let name = fit.change.apply(parameter).unwrap_or_default();
            let name = names.whole(&name).unwrap_or(&name);
            match weight_of(module, name, base) {
                Ok(weight) => weights.push(weight),
                Err(problem) => problems.push(problem),
            }
        }
    }
    if problems.is_empty() {
        return Ok(weights);
    }
    let path = adapter.path().display();
    Err(Error::Plan(problems.iter().map(|problem| format!("{path}: {problem}")).collect()))
}

fn weight_of(module: &Module, name: &str, base: &Checkpoint) -> Result<TensorInfo, String> {
    let Some(weight) = base.tensor(name) else {
        return Err(format!("its module {} has no weight in the base", module.path));
    };
    if !weight.dtype.is_mergeable() {
        return Err(format!(
            "its module {} changes {name}, which the base stores as {}; \
             a norm can only be compared with a floating-point weight's",
            module.path, weight.dtype
        ));
    }
    match extents(module) {
        Some((rows, columns, _)) if weight.elements() != rows as u64 * columns as u64 => {
            Err(format!(
                "its module {} updates a weight of shape [{rows}, {columns}], \
                 but the base's is {:?}",
                module.path, weight.shape
            ))
        }
        _ => Ok(weight.clone()),
    }
}

fn base_norm(base: &Checkpoint, weight: &TensorInfo, task: &Task) -> Result<BaseNorm> {
    task.check()?;
    let shard = base.tensors()[&weight.name].shard;
    let stored = InFile::new(&base.shards()[shard].file, weight).ok_or_else(|| {
        Error::Argument(format!("there are no statistics of the type {}", weight.dtype))
    })?;
    let summary = describe(&[stored], &Request::default())?;
    task.advance(weight.bytes());
    // Statistics leave NaN and infinities out; a norm that did would mislead.
    let norm = if summary.non_finite == 0 { summary.l2_norm } else { f64::NAN };
    Ok(BaseNorm { tensor: weight.name.clone(), norm })
}
