//! The data model of plans: shards, their tensors, and what happens to each.

use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;
use serde::Serialize;
use serde_json::Value;

use super::options::{Options, Precision};
use super::update::Update;
use crate::adapter::{Adapter, Coverage, Directory};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::heads;
use crate::checkpoint::quantized::Quantized;
use crate::entrywise;
use crate::error::Result;
use crate::storage::local::Stamp;
use crate::storage::store::Store;
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::TensorInfo;
use crate::weights::Weight;

/// The opened base and adapters of a merge.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The base.
    pub base: Arc<Checkpoint>,
    /// The adapters, in the order in which they are added.
    pub adapters: Vec<Arc<Adapter>>,
}

impl Inputs {
    /// Looks again at every file of base and adapters: an error if one is not what was opened.
    /// What was read of it is then of no state that it ever had.
    ///
    /// # Errors
    /// [`crate::Error::Checkpoint`] or [`crate::Error::Adapter`] if one changed, [`crate::Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.base.check_unchanged()?;
        self.adapters.iter().try_for_each(|adapter| adapter.check_unchanged())
    }
}

/// What happens to one tensor.
#[derive(Debug, Clone)]
pub enum Action {
    /// Its bytes are carried over.
    Copy,
    /// It is converted to the output's type.
    Cast,
    /// Updates are added to it, all in one pass with one rounding.
    Merge(Vec<Update>),
    /// Products are merged element by element by an entry-wise method, and what that makes is added.
    MergeEntries(EntryMerge),
    /// It holds the scales of a quantised weight that is merged, and is written with that.
    Rescale,
}

impl Action {
    /// The word for it.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Cast => "cast",
            Self::Merge(_) | Self::MergeEntries(_) => "merge",
            Self::Rescale => "rescale",
        }
    }
}

/// Products that an entry-wise method merges.
#[derive(Debug, Clone)]
pub struct EntryMerge {
    /// What each adapter adds, with its weight.
    pub updates: Vec<Update>,
    /// The method with its parameters.
    pub method: entrywise::Method,
    /// What random masks depend on beside names and places.
    pub seed: u64,
    /// How many adapters are merged, those that lack the tensor among them.
    pub adapters: usize,
}

impl EntryMerge {
    /// Whether something of the whole tensor has to be known before it is merged.
    pub fn needs_passes(&self) -> bool {
        self.method.needs_passes(self.updates.iter().any(|update| update.transposed))
    }
}

/// What becomes of a tensor of the base, as plans and reports tell it.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum PlannedChange {
    /// It is the base's, byte for byte.
    Copy,
    /// It is the base's in another type.
    Cast,
    /// Adapters' updates are added to it.
    Merge,
    /// An adapter's tensor stands in its place, or one that the base does not have.
    Replace,
    /// Another tensor of the base stands in its place: a repeated layer, or a head that was tied.
    Repeat,
    /// It holds the scales of a quantised weight that changes.
    Rescale,
}

/// Where a tensor's W₀ comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Origin {
    /// From the base's shard, by its position.
    Base(usize),
    /// From an adapter's file, by the adapter's position.
    Adapter(usize),
}

/// One tensor of the output.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// Its name in the output.
    pub name: String,
    /// Where it comes from.
    pub origin: Origin,
    /// The tensor there, its range counted from the beginning of that file's data.
    pub source: TensorInfo,
    /// Its type in the output.
    pub output_dtype: Dtype,
    /// Its range in the output's data.
    pub target: Range<u64>,
    /// What happens to it.
    pub action: Action,
    /// How it is stored, where `source` is what a quantised weight means.
    pub quantized: Option<Arc<Quantized>>,
    /// Whether it is quantised again, with the same scheme.
    pub requantized: bool,
    /// How it is computed, where it is merged.
    pub precision: Precision,
}

impl PlannedTensor {
    /// The tensor as the source's file holds it.
    pub fn stored(&self) -> &TensorInfo {
        self.quantized.as_ref().map_or(&self.source, |quantized| &quantized.stored.tensor)
    }

    /// The tensor as the output's file holds it, but for its range.
    pub fn written(&self) -> TensorInfo {
        let tensor = if self.requantized { self.stored() } else { &self.source };
        TensorInfo { dtype: self.output_dtype.clone(), ..tensor.clone() }
    }

    /// The type to which sums are rounded: the output's, or what is quantised then.
    pub fn rounded_dtype(&self) -> &Dtype {
        if self.requantized { &self.source.dtype } else { &self.output_dtype }
    }

    /// Whether it has the same type and size as in the source's file.
    pub fn keeps_its_size(&self) -> bool {
        self.output_dtype == self.stored().dtype && (self.quantized.is_none() || self.requantized)
    }

    /// Rows and columns of the matrix on which updates act: the first dimension and the rest, as
    /// layers have it; or, where an update lies on some rows of a stack of matrices, all leading
    /// dimensions and the last.
    pub fn matrix(&self) -> (usize, usize) {
        let shape = &self.source.shape;
        let stacked = self.updates().iter().any(|update| update.slice.rows.is_some());
        let leading = if stacked { shape.len().saturating_sub(1).max(1) } else { 1 };
        let extent = |dimensions: &[u64]| dimensions.iter().product::<u64>() as usize;
        let split = leading.min(shape.len());
        (extent(&shape[..split]), extent(&shape[split..]))
    }

    /// Whether it is the base's tensor of the name that other classes of the output's family give it.
    fn is_renamed(&self) -> bool {
        heads::name_for_answers(&self.source.name).as_ref() == Some(&self.name)
    }

    /// What becomes of it: what is written in the place of the base's tensor of that name.
    pub fn change(&self) -> PlannedChange {
        match (&self.action, self.origin) {
            (Action::Merge(_) | Action::MergeEntries(_), _) => PlannedChange::Merge,
            (Action::Rescale, _) => PlannedChange::Rescale,
            (_, Origin::Adapter(_)) => PlannedChange::Replace,
            _ if self.name != self.source.name && !self.is_renamed() => PlannedChange::Repeat,
            (Action::Copy, _) => PlannedChange::Copy,
            (Action::Cast, _) => PlannedChange::Cast,
        }
    }

    /// Its updates, if it is merged.
    pub fn updates(&self) -> &[Update] {
        match &self.action {
            Action::Merge(updates) | Action::MergeEntries(EntryMerge { updates, .. }) => updates,
            Action::Copy | Action::Cast | Action::Rescale => &[],
        }
    }

    /// The rows of its matrix in runs that the same updates change. Tiles do not cross their ends.
    pub fn segments(&self) -> Vec<Range<usize>> {
        let (rows, _) = self.matrix();
        let mut cuts = vec![0, rows];
        for row_range in self.updates().iter().filter_map(|update| update.slice.rows.as_ref()) {
            cuts.extend([row_range.start as usize, row_range.end as usize]);
        }
        cuts.sort_unstable();
        cuts.dedup();
        cuts.windows(2).map(|pair| pair[0]..pair[1]).collect()
    }
}

/// One shard of the output, with the same name as in the base.
#[derive(Debug, Clone)]
pub struct PlannedShard {
    /// File name within the directory.
    pub name: String,
    /// Position of the base's shard.
    pub source: usize,
    /// Length prefix and header as they will be written.
    pub header: Vec<u8>,
    /// Its tensors, in the order of the output's data.
    pub tensors: Vec<PlannedTensor>,
}

impl PlannedShard {
    /// Bytes of the whole file.
    pub fn bytes(&self) -> u64 {
        let data = self.tensors.iter().map(|tensor| tensor.target.end).max().unwrap_or(0);
        self.header.len() as u64 + data
    }
}

/// The layers of a model, repeated or left out.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Replication {
    /// How many layers the base has.
    pub layers: u64,
    /// For each layer of the result, which of the base's it begins as.
    pub order: Vec<u64>,
}

/// A head of labels that an adapter brings.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct TaskHead {
    /// The class of transformers that the output is of, where that can be told.
    #[serde(rename = "architecture")]
    pub class: Option<String>,
    /// How many labels there are.
    pub labels: u64,
    /// Their names by their numbers, where something beside the adapter tells them.
    pub names: Option<IndexMap<String, Value>>,
}

/// What a merge changes in the base's config.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct ConfigChanges {
    /// The type of the weights, by torch's name, where they were converted.
    pub dtype: Option<String>,
    /// The number of tokens, where an adapter brought embeddings of another number.
    pub vocabulary: Option<u64>,
    /// The layers of the model, where an adapter repeats them.
    pub layers: Option<Replication>,
    /// Set to false where the merge makes the output head differ from the embeddings it was tied to.
    pub tied: Option<bool>,
    /// The head that makes the output a model of another class.
    pub head: Option<TaskHead>,
    /// Whether the weights are no longer quantised.
    #[serde(rename = "unquantised")]
    pub unquantized: bool,
}

impl ConfigChanges {
    /// Whether the config stays as it is.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
    }
}

/// Whose a file beside the weights is.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum FileOrigin {
    /// The base's.
    Base,
    /// That of the adapter at this position.
    Adapter(usize),
}

/// A file that lies beside the output's weights.
#[derive(Debug, Clone)]
pub struct SideFile {
    /// Its path within the output.
    pub name: String,
    /// Its path within what it comes from, where that is another.
    pub source: Option<String>,
    /// Where it comes from.
    pub origin: FileOrigin,
    /// What it was when the merge was planned.
    pub stamp: Stamp,
}

impl SideFile {
    /// Its path within what it comes from.
    pub fn source_name(&self) -> &str {
        self.source.as_ref().unwrap_or(&self.name)
    }

    /// What it comes from.
    pub fn store<'a>(&self, inputs: &'a Inputs) -> &'a dyn Store {
        match self.origin {
            FileOrigin::Base => inputs.base.store(),
            FileOrigin::Adapter(position) => inputs.adapters[position]
                .directory()
                .map(Directory::store)
                .expect("a file of its directory"),
        }
    }
}

/// The files beside the output's weights, and what of the base's is not among them.
#[derive(Debug, Clone, Default)]
pub struct SideFiles {
    /// In the order of their names.
    pub carried: Vec<SideFile>,
    /// Folders with a slash at the end.
    pub left_out: Vec<String>,
}

impl SideFiles {
    /// Where each file comes from, in words, by its name.
    pub fn origins(&self) -> IndexMap<String, String> {
        let word = |origin| match origin {
            FileOrigin::Base => "base".to_owned(),
            FileOrigin::Adapter(position) => format!("adapter {position}"),
        };
        self.carried.iter().map(|file| (file.name.clone(), word(file.origin))).collect()
    }
}

/// A merge, decided.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What was asked for.
    pub options: Options,
    /// The weight of each adapter under the strategy.
    pub weights: Vec<Weight>,
    /// The shards of the output.
    pub shards: Vec<PlannedShard>,
    /// What has to change in the config.
    pub config_changes: ConfigChanges,
    /// What lies beside the weights.
    pub side_files: SideFiles,
    /// What a careful person would want to know before using the result.
    pub warnings: Vec<String>,
    /// Those of the warnings that are of updates of nothing.
    pub zero_updates: Vec<String>,
    /// How the adapters were made to fit, where it was not plain.
    pub notes: Vec<String>,
    /// What becomes of every config field and every tensor of each adapter.
    pub coverage: Vec<Coverage>,
}

impl Plan {
    /// Every tensor of the output with the shard it lies in.
    pub fn tensors(&self) -> impl Iterator<Item = (&PlannedShard, &PlannedTensor)> {
        self.shards.iter().flat_map(|shard| shard.tensors.iter().map(move |tensor| (shard, tensor)))
    }

    /// Bytes of all shards.
    pub fn bytes(&self) -> u64 {
        self.shards.iter().map(PlannedShard::bytes).sum()
    }

    /// Bytes of all tensors, as an index counts them.
    pub fn tensor_bytes(&self) -> u64 {
        self.tensors().map(|(_, tensor)| tensor.target.end - tensor.target.start).sum()
    }

    /// Elements of all tensors.
    pub fn parameters(&self) -> u64 {
        self.tensors().map(|(_, tensor)| tensor.source.elements()).sum()
    }

    /// Of how many tensors that becomes.
    pub fn count(&self, change: PlannedChange) -> usize {
        self.tensors().filter(|(_, tensor)| tensor.change() == change).count()
    }
}
