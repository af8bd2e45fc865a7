//! Plans, checkpoints and adapters as plain data for a person or another program.

use indexmap::IndexMap;
use serde::Serialize;
use serde_json::{Map, Value};

use crate::adapter::about::About;
use crate::adapter::coverage::PartUse;
use crate::adapter::formats::unread::Unread;
use crate::adapter::{Adapter, Coverage, Usage};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::components::Component;
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::Result;
use crate::execute::queue;
use crate::plan::{
    ConfigChanges, Inputs, MethodOptions, Origin, Plan, PlannedChange, Precision, Strategy, Update,
    Weight,
};
use crate::storage::source::Requests;
use crate::tensor::safetensors::{TensorFile, TensorInfo};

/// An adapter within a plan.
#[derive(Debug, Serialize)]
pub struct PlannedAdapter<'a> {
    path: String,
    name: String,
    format: &'static str,
    /// What it calls the model that it was trained on.
    base_model: Option<&'a str>,
    tensors: usize,
    modules: usize,
    bytes: u64,
    coverage: &'a Coverage,
}

/// A tensor within a plan.
#[derive(Debug, Serialize)]
pub struct TensorDescription<'a> {
    name: &'a str,
    shape: &'a [u64],
    dtype: &'a str,
    output_dtype: &'a str,
    shard: &'a str,
    action: PlannedChange,
    /// The position of the adapter whose tensor it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    adapter: Option<usize>,
    /// The name of what stands in its place, where that is another.
    #[serde(skip_serializing_if = "Option::is_none")]
    origin: Option<&'a str>,
    updates: &'a [Update],
    /// How it is stored, where it is quantised and does not stay as it is.
    #[serde(skip_serializing_if = "Option::is_none")]
    #[serde(rename = "quantised")]
    quantized: Option<&'a str>,
}

/// A component of a base within a plan.
#[derive(Debug, Serialize)]
pub struct PlannedComponent {
    name: String,
    kind: &'static str,
    class_name: Option<String>,
    /// How many of its tensors change.
    tensors_changed: usize,
}

/// A plan in full.
#[derive(Debug, Serialize)]
pub struct PlanDescription<'a> {
    base: String,
    /// What the base is made of, where it is a model of diffusion.
    components: Vec<PlannedComponent>,
    adapters: Vec<PlannedAdapter<'a>>,
    strategy: Strategy,
    #[serde(skip_serializing_if = "Option::is_none")]
    strategy_options: Option<&'a MethodOptions>,
    #[serde(skip_serializing_if = "Option::is_none")]
    seed: Option<u64>,
    weights: Option<&'a [Weight]>,
    #[serde(skip_serializing_if = "Option::is_none")]
    precision: Option<Precision>,
    dtype: &'a str,
    tensors: Vec<TensorDescription<'a>>,
    tensors_merged: usize,
    tensors_replaced: usize,
    tensors_repeated: usize,
    tensors_copied: usize,
    tensors_cast: usize,
    total_parameters: u64,
    bytes_to_write: u64,
    /// What is asked of stores beside the headers, where anything lies in one.
    #[serde(skip_serializing_if = "Option::is_none")]
    reads: Option<Requests>,
    config_changes: &'a ConfigChanges,
    warnings: &'a [String],
    notes: &'a [String],
    side_files: Vec<&'a str>,
    file_origins: IndexMap<String, String>,
    left_out: &'a [String],
}

fn last_part(path: &std::path::Path) -> String {
    path.file_name().unwrap_or(path.as_os_str()).to_string_lossy().into_owned()
}

/// Describes a plan.
pub fn plan<'a>(inputs: &'a Inputs, plan: &'a Plan) -> PlanDescription<'a> {
    let adapters =
        inputs.adapters.iter().zip(&plan.coverage).map(|(adapter, coverage)| PlannedAdapter {
            path: adapter.path().display().to_string(),
            name: last_part(adapter.path()),
            format: adapter.format(),
            base_model: adapter.semantics().base.as_deref(),
            tensors: adapter.file().header().tensors.len(),
            modules: adapter.modules().len(),
            bytes: adapter.file().size(),
            coverage,
        });
    let tensors = plan.tensors().map(|(shard, tensor)| TensorDescription {
        name: &tensor.name,
        shape: &tensor.source.shape,
        dtype: tensor.stored().dtype.name(),
        output_dtype: tensor.output_dtype.name(),
        shard: &shard.name,
        action: tensor.change(),
        adapter: match tensor.origin {
            Origin::Adapter(position) => Some(position),
            Origin::Base(_) => None,
        },
        origin: (tensor.name != tensor.source.name).then_some(tensor.source.name.as_str()),
        updates: tensor.updates(),
        quantized: tensor.quantized.as_ref().map(|quantized| quantized.scheme.as_str()),
    });
    let changed: Vec<_> = (plan.tensors().map(|(_, tensor)| tensor))
        .filter(|tensor| !matches!(tensor.change(), PlannedChange::Copy | PlannedChange::Cast))
        .collect();
    let components = inputs.base.components().into_iter().map(|component| {
        let own = changed.iter().filter(|tensor| tensor.name.starts_with(&component.prefix));
        PlannedComponent {
            name: name_of(&component),
            kind: component.kind.name(),
            tensors_changed: own.count(),
            class_name: component.class_name,
        }
    });
    PlanDescription {
        components: components.collect(),
        base: inputs.base.path().display().to_string(),
        adapters: adapters.collect(),
        strategy: plan.options.strategy,
        strategy_options: (plan.options.strategy_options != MethodOptions::default())
            .then_some(&plan.options.strategy_options),
        seed: plan.options.uses_seed().then_some(plan.options.seed),
        weights: (plan.options.strategy != Strategy::Sequential).then_some(plan.weights.as_slice()),
        precision: (plan.options.precision != Precision::Default).then_some(plan.options.precision),
        dtype: plan.options.dtype.as_ref().and_then(|dtype| dtype.torch_name()).unwrap_or("auto"),
        tensors: tensors.collect(),
        tensors_merged: plan.count(PlannedChange::Merge),
        tensors_replaced: plan.count(PlannedChange::Replace),
        tensors_repeated: plan.count(PlannedChange::Repeat),
        tensors_copied: plan.count(PlannedChange::Copy),
        tensors_cast: plan.count(PlannedChange::Cast),
        total_parameters: plan.parameters(),
        bytes_to_write: plan.bytes(),
        reads: requests_of(inputs, plan),
        config_changes: &plan.config_changes,
        warnings: &plan.warnings,
        notes: &plan.notes,
        side_files: plan.side_files.carried.iter().map(|file| file.name.as_str()).collect(),
        file_origins: plan.side_files.origins(),
        left_out: &plan.side_files.left_out,
    }
}

/// What a merge asks of stores: the planned ranges of the base, and all of each adapter.
fn requests_of(inputs: &Inputs, plan: &Plan) -> Option<Requests> {
    let is_local = inputs.base.shards().iter().all(|shard| shard.file.source().is_local());
    if is_local && inputs.adapters.iter().all(|adapter| adapter.is_local()) {
        return None;
    }
    let base = if is_local { Requests::default() } else { queue::requests(inputs, plan) };
    let adapters = inputs.adapters.iter().map(|adapter| {
        let file = adapter.file();
        file.source().requests(std::slice::from_ref(&(0..file.size())))
    });
    Some(adapters.fold(base, |all, own| Requests {
        requests: all.requests + own.requests,
        bytes: all.bytes + own.bytes,
    }))
}

/// What a component is called: its folder in a pipeline, its prefix in a file.
fn name_of(component: &Component) -> String {
    component.prefix.trim_end_matches('.').to_owned()
}

/// A component within a listing.
#[derive(Debug, Serialize)]
struct ListedComponent {
    name: String,
    kind: &'static str,
    class_name: Option<String>,
    tensors: usize,
    parameters: u64,
    bytes: u64,
    /// How many tensors have each type.
    dtypes: IndexMap<String, usize>,
}

/// A file within a listing.
#[derive(Debug, Serialize)]
struct FileDescription {
    name: String,
    bytes: u64,
    tensors: usize,
}

/// A tensor within a listing.
#[derive(Debug, Serialize)]
struct ListedTensor {
    name: String,
    dtype: String,
    shape: Vec<u64>,
    bytes: u64,
    file: String,
}

/// A module within an adapter's listing.
#[derive(Debug, Serialize)]
struct ListedModule {
    name: String,
    kind: &'static str,
    rank: u64,
    /// `None` where nothing tells it.
    alpha: Option<f64>,
    /// Likewise.
    scaling: Option<f64>,
    shape: [u64; 2],
}

/// What a checkpoint or an adapter holds, from its headers.
#[derive(Debug, Serialize)]
pub struct Listing {
    kind: &'static str,
    /// The name of an adapter's format; `None` where it cannot be read.
    format: Option<&'static str>,
    path: String,
    files: Vec<FileDescription>,
    metadata: Value,
    tensors: Vec<ListedTensor>,
    /// What a model of diffusion is made of.
    components: Vec<ListedComponent>,
    total_parameters: u64,
    total_bytes: u64,
    config: Option<Map<String, Value>>,
    adapter: Option<Map<String, Value>>,
    /// How weights are quantised, in words, and how many are so.
    #[serde(rename = "quantised")]
    quantized: IndexMap<String, usize>,
    warnings: Vec<String>,
}

impl Listing {
    fn new<'a>(
        kind: &'static str,
        path: &std::path::Path,
        files: impl Iterator<Item = (&'a str, &'a TensorFile)>,
    ) -> Self {
        let mut listing = Self {
            kind,
            format: None,
            path: path.display().to_string(),
            files: Vec::new(),
            metadata: Value::Object(Map::new()),
            tensors: Vec::new(),
            components: Vec::new(),
            total_parameters: 0,
            total_bytes: 0,
            config: None,
            adapter: None,
            quantized: IndexMap::new(),
            warnings: Vec::new(),
        };
        for (name, file) in files {
            let header = file.header();
            listing.files.push(FileDescription {
                name: name.to_owned(),
                bytes: file.size(),
                tensors: header.tensors.len(),
            });
            if let Value::Object(metadata) = &mut listing.metadata {
                let entries = header.metadata.iter();
                metadata
                    .extend(entries.map(|(key, value)| (key.clone(), Value::from(value.as_str()))));
            }
            for tensor in &header.tensors {
                listing.total_parameters += tensor.elements();
                listing.total_bytes += tensor.bytes();
                listing.tensors.push(ListedTensor {
                    name: tensor.name.clone(),
                    dtype: tensor.dtype.name().to_owned(),
                    shape: tensor.shape.clone(),
                    bytes: tensor.bytes(),
                    file: name.to_owned(),
                });
            }
        }
        listing
    }
}

/// Lists a checkpoint.
pub fn checkpoint(checkpoint: &Checkpoint) -> Listing {
    let files = checkpoint.shards().iter().map(|shard| (shard.name.as_str(), &shard.file));
    let pipeline = checkpoint.pipeline();
    let kind = if pipeline.is_some() { "pipeline" } else { "checkpoint" };
    let mut listing = Listing::new(kind, checkpoint.path(), files);
    listing.config =
        pipeline.map(|pipeline| &pipeline.content).or_else(|| checkpoint.config()).cloned();
    let components = checkpoint.components().into_iter();
    listing.components = components.map(|component| listed(checkpoint, component)).collect();
    listing.warnings = checkpoint.warnings().to_vec();
    let quantized = QuantizedWeights::of(checkpoint);
    let schemes = quantized.schemes().into_iter();
    listing.quantized = schemes.map(|(scheme, count)| (scheme.to_owned(), count)).collect();
    if let Some(unsupported) = quantized.unsupported() {
        let words = format!("{} (nothing can be merged into them)", unsupported.format);
        listing.quantized.insert(words, unsupported.count());
    }
    listing
}

fn listed(checkpoint: &Checkpoint, component: Component) -> ListedComponent {
    let mut listed = ListedComponent {
        name: name_of(&component),
        kind: component.kind.name(),
        class_name: component.class_name,
        tensors: 0,
        parameters: 0,
        bytes: 0,
        dtypes: IndexMap::new(),
    };
    for (name, location) in checkpoint.tensors() {
        if name.starts_with(&component.prefix) {
            let tensor = checkpoint.at(*location);
            listed.tensors += 1;
            listed.parameters += tensor.elements();
            listed.bytes += tensor.bytes();
            *listed.dtypes.entry(tensor.dtype.name().to_owned()).or_default() += 1;
        }
    }
    listed
}

/// Lists an adapter.
///
/// # Errors
/// [`crate::Error::Io`] if its directory cannot be listed.
pub fn adapter(adapter: &Adapter) -> Result<Listing> {
    let name = last_part(adapter.file().path());
    let mut listing = Listing::new(
        "adapter",
        adapter.path(),
        std::iter::once((name.as_str(), adapter.file().as_ref())),
    );
    let modules: Vec<_> = adapter
        .modules()
        .values()
        .map(|module| ListedModule {
            name: module.title().into_owned(),
            kind: module.kind.name(),
            rank: module.rank,
            alpha: Some(module.alpha).filter(|alpha| !alpha.is_nan()),
            scaling: Some(module.scaling).filter(|scaling| !scaling.is_nan()),
            shape: [module.outputs(), module.inputs()],
        })
        .collect();
    let mut summary: Map<String, Value> =
        (adapter.summary().iter()).map(|(key, value)| ((*key).to_owned(), value.clone())).collect();
    summary.insert("modules".into(), serde_json::to_value(modules).unwrap_or(Value::Null));
    let mut features = adapter.obstacles(&[]);
    features.extend(adapter.files_left_out(&[])?);
    summary.insert("features".into(), Value::from(features));
    summary.insert("notes".into(), Value::from(adapter.notes()));
    let coverage = serde_json::to_value(adapter.coverage(&[])?).unwrap_or(Value::Null);
    summary.insert("coverage".into(), coverage);
    let About { algorithm, trainer, family, components, scale, needs } = About::of(adapter);
    summary.insert("algorithm".into(), algorithm.into());
    summary.insert("trainer".into(), trainer.into());
    summary.insert("family".into(), family.into());
    summary.insert("components".into(), components.into());
    summary.insert("scale".into(), scale.into());
    summary.insert("needs".into(), needs.into());
    listing.format = Some(adapter.format());
    listing.config = Some(adapter.settings().clone());
    listing.adapter = Some(summary);
    Ok(listing)
}

/// Lists an adapter of a format that cannot be read: its tensors, and what it is.
pub fn unread_adapter(unread: &Unread) -> Listing {
    let file = &unread.file;
    let name = last_part(file.path());
    let files = std::iter::once((name.as_str(), file.as_ref()));
    let mut listing = Listing::new("adapter", &unread.path, files);
    let refused = |tensor: &TensorInfo| {
        let reason = "is of a format that cannot be read";
        PartUse::new(tensor.name.as_str(), (Usage::Refused, reason))
    };
    let tensors = file.header().tensors.iter().map(refused).collect();
    let coverage = Coverage { tensors, fields: Vec::new(), files: Vec::new() };
    let mut summary: Map<String, Value> =
        unread.summary().into_iter().map(|(key, value)| (key.to_owned(), value)).collect();
    summary.insert("modules".into(), Value::Array(Vec::new()));
    summary.insert("notes".into(), Value::Array(Vec::new()));
    for unknown in ["algorithm", "trainer", "family", "scale"] {
        summary.insert(unknown.into(), Value::Null);
    }
    summary.insert("components".into(), Value::Array(Vec::new()));
    summary.insert("needs".into(), Value::Array(Vec::new()));
    summary.insert("features".into(), Value::from(vec![unread.identity.sentence()]));
    summary.insert("coverage".into(), serde_json::to_value(coverage).unwrap_or(Value::Null));
    listing.adapter = Some(summary);
    listing
}
