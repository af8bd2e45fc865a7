//! What a merge will do, decided before anything is written: for each tensor of the output exactly
//! one action. A plan is a value: it refers to its inputs by position and name, and any executor
//! can carry it out.

use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;
use serde::Serialize;

use crate::adapter::{Adapter, Module};
use crate::checkpoint::{Checkpoint, Shard};
use crate::dtype::Dtype;
use crate::error::{Error, Result};
use crate::kernel::Orientation;
use crate::names::{self, Mapping};
use crate::orientation;
use crate::safetensors::{Header, TensorInfo};

/// The opened base and adapters of a merge.
#[derive(Debug, Clone)]
pub struct Inputs {
    /// The base.
    pub base: Arc<Checkpoint>,
    /// The adapters, in the order in which they are added.
    pub adapters: Vec<Arc<Adapter>>,
}

/// How several adapters are combined.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Strategy {
    /// Each adapter at its full scale, in order.
    Sequential,
    /// base + Σ wᵢ·(mergedᵢ − base), the weights as given.
    Weighted,
    /// Weighted with 1/N.
    Average,
}

impl Strategy {
    /// The strategy of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "sequential" => Ok(Self::Sequential),
            "weighted" => Ok(Self::Weighted),
            "average" => Ok(Self::Average),
            _ => Err(Error::Argument(format!(
                "unknown strategy {name:?}; there are sequential, weighted and average"
            ))),
        }
    }
}

/// What the caller decides about a plan.
#[derive(Debug, Clone)]
pub struct Options {
    /// How adapters are combined.
    pub strategy: Strategy,
    /// One weight an adapter, for [`Strategy::Weighted`]; missing, all are 1.
    pub weights: Option<Vec<f64>>,
    /// The type of the output's floating-point tensors; `None` keeps each as it is.
    pub dtype: Option<Dtype>,
    /// Unknown config fields that are known not to matter.
    pub allow: Vec<String>,
}

/// One low-rank update of one tensor.
#[derive(Debug, Clone, Serialize)]
pub struct Update {
    /// Which adapter, by its position.
    pub adapter: usize,
    /// The adapter's module.
    pub module: String,
    /// The kind of update; so far all are products of two factors.
    pub kind: UpdateKind,
    /// The rank.
    pub rank: u64,
    /// s of s·B·A: α/r, or α/√r for rsLoRA.
    pub scale: f64,
    /// The adapter's weight under the strategy.
    pub weight: f64,
    /// Whether the base stores the weight (in, out), so that the product is turned.
    pub transposed: bool,
}

/// What an update does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateKind {
    /// W += weight · scale · B·A.
    LowRank,
}

impl Update {
    /// The factor on B·A.
    pub fn coefficient(&self) -> f64 {
        self.scale * self.weight
    }

    /// Which way the product lies.
    pub fn orientation(&self) -> Orientation {
        if self.transposed { Orientation::InOut } else { Orientation::OutIn }
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
}

impl Action {
    /// The word for it in listings.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Cast => "cast",
            Self::Merge(_) => "merge",
        }
    }
}

/// One tensor of the output.
#[derive(Debug, Clone)]
pub struct PlannedTensor {
    /// The tensor in the base, its range counted from the beginning of the shard's data.
    pub source: TensorInfo,
    /// Its type in the output.
    pub output_dtype: Dtype,
    /// Its range in the output, counted likewise.
    pub target: Range<u64>,
    /// What happens to it.
    pub action: Action,
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

    /// Whether the file is the base's, byte for byte.
    pub fn is_untouched(&self) -> bool {
        self.tensors.iter().all(|tensor| matches!(tensor.action, Action::Copy))
    }
}

/// A merge, decided.
#[derive(Debug, Clone)]
pub struct Plan {
    /// What was asked for.
    pub options: Options,
    /// The weight of each adapter under the strategy.
    pub weights: Vec<f64>,
    /// The shards of the output.
    pub shards: Vec<PlannedShard>,
    /// What a careful person would want to know before using the result.
    pub warnings: Vec<String>,
    /// How the adapters were made to fit, where it was not plain.
    pub notes: Vec<String>,
}

impl Plan {
    /// Plans a merge.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights that do not fit the strategy, [`Error::Unsupported`] for
    /// what cannot be merged, [`Error::Plan`] with everything that does not fit together.
    pub fn new(inputs: &Inputs, options: Options) -> Result<Self> {
        let weights = weights_of(&options, inputs.adapters.len())?;
        refuse_obstacles(inputs, &options.allow)?;
        let mut planner = Planner::new(&inputs.base);
        for (position, adapter) in inputs.adapters.iter().enumerate() {
            planner.add(position, adapter, weights[position]);
        }
        if !planner.problems.is_empty() {
            return Err(Error::Plan(planner.problems));
        }
        let mut warnings = inputs.base.warnings().to_vec();
        warnings.extend(inputs.adapters.iter().filter_map(|adapter| untrained(adapter)));
        let mut updates = planner.updates;
        let shards = (inputs.base.shards().iter().enumerate())
            .map(|(source, shard)| plan_shard(source, shard, &options, &mut updates))
            .collect();
        Ok(Self { options, weights, shards, warnings, notes: planner.notes })
    }

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

    /// How many tensors meet an action of that name.
    pub fn count(&self, action: &str) -> usize {
        self.tensors().filter(|(_, tensor)| tensor.action.name() == action).count()
    }
}

fn weights_of(options: &Options, adapters: usize) -> Result<Vec<f64>> {
    if adapters == 0 {
        return Err(Error::Argument("no adapter was given; a merge needs at least one".into()));
    }
    match (options.strategy, &options.weights) {
        (Strategy::Weighted, Some(weights)) => {
            if weights.len() != adapters {
                return Err(Error::Argument(format!(
                    "{} weights were given for {adapters} adapters; give one for each",
                    weights.len()
                )));
            }
            if let Some(weight) = weights.iter().find(|weight| !weight.is_finite()) {
                return Err(Error::Argument(format!("the weight {weight} is not a finite number")));
            }
            Ok(weights.clone())
        }
        (_, Some(_)) => Err(Error::Argument(
            "weights were given, but only the strategy \"weighted\" uses them".into(),
        )),
        (Strategy::Sequential | Strategy::Weighted, None) => Ok(vec![1.0; adapters]),
        (Strategy::Average, None) => Ok(vec![1.0 / adapters as f64; adapters]),
    }
}

/// Refuses, adapter by adapter, whatever is not a plain product on a linear layer.
fn refuse_obstacles(inputs: &Inputs, allow: &[String]) -> Result<()> {
    let refused: Vec<_> = (inputs.adapters.iter())
        .map(|adapter| (adapter.path(), adapter.obstacles(allow)))
        .filter(|(_, obstacles)| !obstacles.is_empty())
        .collect();
    let [(path, obstacles), rest @ ..] = refused.as_slice() else {
        return Ok(());
    };
    let mut message = obstacles.join("; ");
    for (path, obstacles) in rest {
        message.push_str(&format!("\n{}: {}", path.display(), obstacles.join("; ")));
    }
    Err(Error::unsupported(path, message))
}

/// A warning if some of an adapter's products are zero because B never moved from its start.
fn untrained(adapter: &Adapter) -> Option<String> {
    let is_zero = |module: &&Module| adapter.file().tensor_bytes(&module.b).iter().all(|b| *b == 0);
    let mut zero = adapter.modules().values().filter(is_zero);
    let first = &zero.next()?.path;
    let count = zero.count() + 1;
    Some(format!(
        "{}: lora_B is all zero in {count} of {} modules (the first: {first}); \
         they were never trained and change nothing",
        adapter.path().display(),
        adapter.modules().len()
    ))
}

/// Collects the updates of every tensor, and what stands in their way.
struct Planner<'a> {
    base: &'a Checkpoint,
    updates: IndexMap<String, Vec<Update>>,
    problems: Vec<String>,
    notes: Vec<String>,
}

impl<'a> Planner<'a> {
    fn new(base: &'a Checkpoint) -> Self {
        Self { base, updates: IndexMap::new(), problems: Vec::new(), notes: Vec::new() }
    }

    fn add(&mut self, position: usize, adapter: &Adapter, weight: f64) {
        let label = adapter.path().display();
        let paths = adapter.modules().keys().map(String::as_str);
        let mapping = match names::find_mapping(paths, "weight", self.base) {
            Ok(mapping) => mapping,
            Err(problems) => {
                self.problems.extend(problems.iter().map(|problem| format!("{label}: {problem}")));
                return;
            }
        };
        if let Some(description) = mapping.describe() {
            self.notes.push(format!("{label}: {description}"));
        }
        let mut turned_against_flag = 0;
        for module in adapter.modules().values() {
            match self.update(position, adapter, module, &mapping, weight) {
                Ok((tensor, update)) => {
                    let flag = adapter.config().fan_in_fan_out();
                    turned_against_flag += usize::from(update.transposed != flag);
                    self.updates.entry(tensor).or_default().push(update);
                }
                Err(problem) => self.problems.push(format!("{label}: {problem}")),
            }
        }
        if turned_against_flag > 0 {
            self.notes.push(format!(
                "{label}: fan_in_fan_out in its config does not fit {turned_against_flag} of the \
                 base's weights; their shapes and architecture decided"
            ));
        }
    }

    fn update(
        &self,
        position: usize,
        adapter: &Adapter,
        module: &Module,
        mapping: &Mapping,
        weight: f64,
    ) -> Result<(String, Update), String> {
        let path = &module.path;
        let name = mapping.apply(path, "weight").expect("the mapping fits every module");
        let tensor = self.base.tensor(&name).expect("the mapping fits every module");
        if !tensor.dtype.is_mergeable() {
            return Err(format!(
                "its module {path} updates {name}, which the base stores as {}: \
                 merge into the unquantised base instead",
                tensor.dtype
            ));
        }
        let extents = (module.b.shape[0], module.a.shape[1]);
        let flag = adapter.config().fan_in_fan_out();
        let orientation = orientation::decide(self.base, path, &tensor.shape, extents, flag)?;
        let update = Update {
            adapter: position,
            module: path.clone(),
            kind: UpdateKind::LowRank,
            rank: module.rank,
            scale: module.scaling,
            weight,
            transposed: orientation == Orientation::InOut,
        };
        Ok((name, update))
    }
}

fn plan_shard(
    source: usize,
    shard: &Shard,
    options: &Options,
    updates: &mut IndexMap<String, Vec<Update>>,
) -> PlannedShard {
    let header = shard.file.header();
    let mut tensors: Vec<_> = header
        .tensors
        .iter()
        .map(|tensor| {
            let output_dtype = match &options.dtype {
                Some(dtype) if tensor.dtype.is_mergeable() => dtype.clone(),
                _ => tensor.dtype.clone(),
            };
            let action = match updates.swap_remove(&tensor.name) {
                Some(updates) if tensor.elements() > 0 => Action::Merge(updates),
                _ if output_dtype != tensor.dtype => Action::Cast,
                _ => Action::Copy,
            };
            PlannedTensor {
                source: tensor.clone(),
                output_dtype,
                target: tensor.range.clone(),
                action,
            }
        })
        .collect();
    if tensors.iter().all(|tensor| tensor.output_dtype == tensor.source.dtype) {
        let header = shard.file.header_bytes().to_vec();
        return PlannedShard { name: shard.name.clone(), source, header, tensors };
    }
    // New sizes: lay the data out anew, widest elements first, so that each tensor begins at a
    // multiple of its element's size, which loaders rely on.
    tensors.sort_by_key(|tensor| std::cmp::Reverse(tensor.output_dtype.bits().unwrap_or(64)));
    let mut position = 0;
    for tensor in &mut tensors {
        let bytes = if tensor.output_dtype == tensor.source.dtype {
            tensor.source.bytes()
        } else {
            tensor.source.elements() * tensor.output_dtype.size() as u64
        };
        tensor.target = position..position + bytes;
        position += bytes;
    }
    let entries = tensors
        .iter()
        .map(|tensor| TensorInfo {
            name: tensor.source.name.clone(),
            dtype: tensor.output_dtype.clone(),
            shape: tensor.source.shape.clone(),
            range: tensor.target.clone(),
        })
        .collect();
    let header = Header { metadata: header.metadata.clone(), tensors: entries }.encode();
    PlannedShard { name: shard.name.clone(), source, header, tensors }
}

#[cfg(test)]
mod tests;
