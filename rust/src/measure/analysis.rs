//! What an adapter holds: the statistics of every tensor, and the spectrum of every update.
//!
//! All figures have the same bits whatever the number of threads. Progress is counted in bytes
//! read.

mod base;
mod change;
mod compare;
pub mod stored;

#[cfg(test)]
mod tests;

use rayon::prelude::*;
use serde::Serialize;
use serde_json::{Map, Value};

pub(crate) use base::weight_norms;
use base::{Weights, base_norm, find_weights};
use change::Change;
pub use compare::{Comparison, ModuleComparison, PairComparison, compare};

use crate::adapter::{Adapter, Initialization, Module, about};
use crate::checkpoint::Checkpoint;
use crate::error::{Result, agree, counted};
use crate::measure::entries::{EntryStatistics, scan_entries};
use crate::measure::metrics::{self, Shape};
use crate::measure::places::places;
use crate::measure::products::{Product, products_of};
use crate::measure::spectrum::{Spectrum, Update};
use crate::measure::statistics::{Bins, InFile, Request, Summary, describe_each, with_room};
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
    /// ‖W′ − W₀‖_F, where the module makes more of W₀ than a sum with its product.
    pub change: Option<f64>,
}

impl BaseNorm {
    fn new(tensor: String, norm: f64) -> Self {
        Self { tensor, norm, change: None }
    }
}

/// One module's update ΔW = s·B·A; of what has no such product W′ − W₀.
#[derive(Debug, Clone, Serialize)]
pub struct ModuleAnalysis {
    /// The module's path in the model; of a parameter that holds experts, with the expert's index.
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
    /// Why a merge of it changes nothing, in words; `None` where it changes something.
    pub zero_cause: Option<String>,
    /// Whether a magnitude rescales the whole weight beside the product (DoRA).
    pub rescaled: bool,
    /// Whether the figures are of W′ − W₀, as there is no product.
    pub made_of_weight: bool,
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
    /// The base that was trained, by the name that the adapter gives it.
    pub base: Option<String>,
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

pub(crate) fn without_statistics(tensor: &TensorInfo) -> String {
    format!(
        "tensor {} has the type {}, of which there are no statistics",
        tensor.name, tensor.dtype
    )
}

/// Measures an adapter, on the given threads.
///
/// # Errors
/// [`crate::Error::Argument`] for unusable bins or percentiles, [`crate::Error::Plan`] where the base has nothing
/// for a module, [`crate::Error::Adapter`] or [`crate::Error::Checkpoint`] if a file changed meanwhile,
/// [`crate::Error::Io`], [`crate::Error::Cancelled`].
pub fn analyze(
    adapter: &Adapter,
    base: Option<&Checkpoint>,
    options: &Options,
    pool: &rayon::ThreadPool,
    task: &Task,
) -> Result<Analysis> {
    let weights = base.map(|base| find_weights(adapter, base, task)).transpose()?;
    task.expect(work(adapter, weights.as_ref(), options));
    pool.install(|| {
        let mut notes = Vec::new();
        let changes = match base {
            Some(base) => change::find(adapter, base, task, &mut notes)?,
            None => None,
        };
        let (tensors, all) = tensors(adapter, options, task, &mut notes)?;
        let measured: Vec<Option<(ModuleAnalysis, bool)>> = measurable(adapter)
            .par_iter()
            .map(|product| {
                task.check()?;
                let Product { module, expert } = *product;
                let weights = weights.as_ref().map(|found| &found.by_module);
                let weight = weights.and_then(|found| found.get(module.key.as_str()));
                let change = changes.as_ref().map(|changes| changes.of(module, expert, task));
                let change = change.transpose()?.flatten();
                if !module.delta.has_product() {
                    let found = change.map(|change| measure_change(*product, change, options));
                    return found.transpose();
                }
                let mut found = with_room(|room| {
                    let factors = product.read(room)?;
                    let base = base.zip(weight);
                    measure(adapter, *product, &factors.update()?, base, options, task)
                })?;
                if let Some(change) = change {
                    let size = change.norm();
                    found.base.get_or_insert(change.base).change = Some(size);
                }
                Ok(Some((found, false)))
            })
            .collect::<Result<_>>()?;
        let measured: Vec<_> = measured.into_iter().flatten().collect();
        let large = measured.iter().filter(|(_, is_large)| *is_large).count();
        if large > 0 {
            notes.push(format!(
                "{} of large {} norms alone (σ₁ from below, by power iteration)",
                counted(large, "change"),
                agree(large, "weights has", "weights have"),
            ));
        }
        let mut modules: Vec<_> = measured.into_iter().map(|(found, _)| found).collect();
        adapter.check_unchanged()?;
        base.map_or(Ok(()), Checkpoint::check_unchanged)?;
        notes.extend(weights.into_iter().flat_map(|found| found.notes));
        let paths: Vec<_> = modules.iter().map(|module| module.path.clone()).collect();
        for (module, place) in modules.iter_mut().zip(places(&paths)) {
            (module.block, module.layer) = (place.block, place.layer);
        }
        Ok(Analysis {
            path: adapter.path().display().to_string(),
            config: adapter.settings().clone(),
            base: adapter.semantics().base.clone(),
            total_bytes: adapter.file().size(),
            weights: all,
            tensors,
            summary: summary_of(&modules),
            features: features(adapter, modules.iter().any(|module| module.made_of_weight)),
            modules,
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
pub(crate) fn features(adapter: &Adapter, has_changes: bool) -> Vec<String> {
    let mut features = adapter.obstacles(&[]);
    features.extend(about::split_scales(adapter).map(|words| format!("it {words}")));
    if adapter.semantics().initialization != Initialization::Plain {
        features.push(
            "the factors began with components taken out of the base's weights, which a merge \
             takes out as well; figures are of s·B·A alone"
                .to_owned(),
        );
    }
    let modules = || adapter.modules().values();
    if modules().any(|module| module.scaling.is_nan()) {
        features.push(
            "its scale is not known, so that norms, singular values and whatever else depends on it \
             are blank; give its alpha or its scale (--alpha, --scale)"
                .to_owned(),
        );
    }
    let magnitudes = modules().filter(|module| module.magnitudes().is_some()).count();
    if magnitudes > 0 {
        features.push(format!(
            "{} {} a DoRA magnitude, which rescales the whole weight; figures are of s·B·A alone",
            counted(magnitudes, "module"),
            agree(magnitudes, "has", "have"),
        ));
    }
    let without = modules().filter(|module| !module.delta.has_product()).count();
    if without > 0 {
        let figures = match has_changes {
            true => "whose figures are of W′ − W₀".to_owned(),
            false => format!("so that there are no figures of {}", agree(without, "it", "them")),
        };
        features.push(format!(
            "{} {} the base's whole weight (GLoRA, IA3 or orthogonal blocks), {figures}",
            counted(without, "module"),
            agree(without, "changes", "change"),
        ));
    }
    let biases = modules().filter(|module| module.bias.is_some()).count();
    if biases > 0 {
        features.push(format!(
            "{} {} a bias of lora_B beside s·B·A",
            counted(biases, "module"),
            agree(biases, "has", "have"),
        ));
    }
    if let Some(first) = adapter.trained_rows().first() {
        let rows: usize = adapter.trained_rows().iter().map(|rows| rows.rows.len()).sum();
        features.push(format!(
            "{} of embeddings {} trained whole (the first: of {}); {} in the tensors' \
             statistics, not among the modules",
            counted(rows, "row"),
            agree(rows, "was", "were"),
            first.path,
            agree(rows, "it is", "they are"),
        ));
    }
    let saved = adapter.saved().len();
    if let Some(first) = adapter.saved().first() {
        features.push(format!(
            "{} {} trained whole (the first: {}); {} in the tensors' statistics, not among the \
             modules",
            counted(saved, "parameter"),
            agree(saved, "was", "were"),
            first.path,
            agree(saved, "it is", "they are"),
        ));
    }
    features
}

/// What can have figures: all products, and modules of which only the base makes an update.
fn measurable(adapter: &Adapter) -> Vec<Product<'_>> {
    let of_module = |module| {
        let products = Module::products(module).map(move |expert| Product { module, expert });
        let alone = (!module.delta.has_product()).then_some(Product { module, expert: None });
        products.chain(alone)
    };
    adapter.modules().values().flat_map(of_module).collect()
}

/// What is made of a whole weight: W′ − W₀, and whether there are norms alone.
fn measure_change(
    product: Product<'_>,
    change: Change,
    options: &Options,
) -> Result<(ModuleAnalysis, bool)> {
    let module = product.module;
    let (spectrum, is_large) = change.spectrum(&change.base.tensor)?;
    let entries = if options.entries {
        let typical = spectrum.frobenius_norm / (change.values().len() as f64).sqrt();
        let threshold = if typical.is_finite() { SMALL_ENTRY * typical } else { 0.0 };
        let statistics = change.entries(&Bins::Automatic(options.bins), threshold)?;
        Some(EntryAnalysis { threshold, statistics })
    } else {
        None
    };
    let size = change.norm();
    let shape = change.shape();
    let tensors = module.delta.tensors();
    let found = ModuleAnalysis {
        path: product.name(),
        kind: module.kind.name(),
        block: None,
        layer: String::new(),
        shape,
        rank: module.rank,
        alpha: module.alpha,
        scaling: module.scaling,
        zero_cause: (size == 0.0).then(|| "what it makes of the weight is the weight".to_owned()),
        rescaled: false,
        made_of_weight: true,
        a_name: tensors[0].1.name.clone(),
        b_name: tensors.get(1).unwrap_or(&tensors[0]).1.name.clone(),
        spectrum,
        base: Some(BaseNorm { change: Some(size), ..change.base }),
        entries,
    };
    Ok((found, is_large))
}

/// The bytes that an analysis reads.
fn work(adapter: &Adapter, weights: Option<&Weights<'_>>, options: &Options) -> u64 {
    let own = adapter.file().header().data_bytes();
    let base: u64 = weights.map_or(0, |found| found.by_module.values().map(|w| w.bytes()).sum());
    let products = products_of(adapter);
    let entries: u64 =
        if options.entries { products.iter().copied().map(entry_work).sum() } else { 0 };
    own + products.iter().map(|product| product.bytes()).sum::<u64>() + base + entries
}

/// What streaming over a ΔW counts as, in bytes: it is never read, but takes its time.
fn entry_work(product: Product<'_>) -> u64 {
    let (rows, columns, _) = product.extents();
    (rows * columns) as u64 * 4
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
    adapter: &Adapter,
    product: Product<'_>,
    update: &Update<'_>,
    base: Option<(&Checkpoint, &TensorInfo)>,
    options: &Options,
    task: &Task,
) -> Result<ModuleAnalysis> {
    let module = product.module;
    let spectrum = product.spectrum(update)?;
    let zero_cause = product.zero_cause(adapter, spectrum.spectral_norm)?;
    task.advance(product.bytes());
    let base = base.map(|(base, weight)| base_norm(base, weight, task)).transpose()?;
    let entries = if options.entries {
        task.check()?;
        let count = update.rows() as f64 * update.columns() as f64;
        let typical = spectrum.frobenius_norm / count.sqrt();
        // Of an update that is not finite nothing is small.
        let threshold = if typical.is_finite() { SMALL_ENTRY * typical } else { 0.0 };
        // What rounding leaves of a product that is zero is none of its entries.
        let is_zero = spectrum.spectral_norm == 0.0;
        let update = if is_zero { &update.scaled(0.0) } else { update };
        let statistics = scan_entries(update, &Bins::Automatic(options.bins), threshold)?;
        task.advance(entry_work(product));
        Some(EntryAnalysis { threshold, statistics })
    } else {
        None
    };
    let (mut spectrum, mut entries) = (spectrum, entries);
    if module.scaling.is_nan() {
        spectrum.blank_what_is_scaled();
        entries = None;
    }
    let tensors = module.delta.tensors();
    Ok(ModuleAnalysis {
        path: product.name(),
        kind: module.kind.name(),
        // Its place shows beside the others' alone.
        block: None,
        layer: String::new(),
        shape: [update.rows(), update.columns()],
        rank: product.stored_rank() as u64,
        alpha: module.alpha,
        scaling: module.scaling,
        zero_cause,
        rescaled: module.magnitudes().is_some(),
        made_of_weight: false,
        a_name: tensors[0].1.name.clone(),
        b_name: tensors.get(1).unwrap_or(&tensors[0]).1.name.clone(),
        spectrum,
        base,
        entries,
    })
}
