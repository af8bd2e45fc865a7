//! What a merge will do, decided before anything is written: for each tensor of the output exactly
//! one action. A plan is a value: it refers to its inputs by position and name, and any executor
//! can carry it out.

mod accounts;
mod layout;
mod naming;
mod pieces;
mod planner;
mod quantised;
mod replication;
mod rescaling;
mod restoring;
mod saved;
mod targets;
mod ties;
mod tokens;

use std::ops::{ControlFlow, Range};
use std::sync::Arc;

use serde::Serialize;

use crate::adapter::{Accounts, Adapter, Module};
use crate::checkpoint::Checkpoint;
use crate::dtype::Dtype;
use crate::error::{Error, Result, shorten_all};
use crate::kernel::Orientation;
use crate::quantised::Quantised;
use crate::renames::Renames;
use crate::safetensors::TensorInfo;
use crate::task::Task;

use planner::Planner;
pub(crate) use quantised::means;
pub use replication::Replication;
pub use targets::ExpertLayout;

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
    /// [`Error::Checkpoint`] or [`Error::Adapter`] if one changed, [`Error::Io`].
    pub fn check_unchanged(&self) -> Result<()> {
        self.base.check_unchanged()?;
        self.adapters.iter().try_for_each(|adapter| adapter.check_unchanged())
    }
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
    /// Whose result is wanted where PEFT's own merge is not what was trained.
    pub compat: Option<Compat>,
    /// The base is a merged checkpoint, out of which the adapters are to be taken.
    pub subtract: bool,
    /// How experts' factors lie where neither shapes nor versions tell.
    pub expert_layout: Option<ExpertLayout>,
    /// The rules by which transformers renames the base's tensors as it loads them; `None` for the
    /// built-in ones.
    pub renames: Option<Renames>,
}

/// Another tool whose results are reproduced where they differ from the right ones.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Compat {
    /// `merge_and_unload` of PEFT 0.21.
    Peft,
}

impl Compat {
    /// The one of that name.
    ///
    /// # Errors
    /// [`Error::Argument`] if there is none.
    pub fn from_name(name: &str) -> Result<Self> {
        match name {
            "peft" => Ok(Self::Peft),
            _ => Err(Error::Argument(format!("unknown compat {name:?}; there is peft"))),
        }
    }
}

/// One low-rank update of one tensor.
#[derive(Debug, Clone, Serialize)]
pub struct Update {
    /// Which adapter, by its position.
    pub adapter: usize,
    /// The adapter's module, or for a replacement the tensor in its file.
    pub module: String,
    /// What the update does.
    pub kind: UpdateKind,
    /// The rank; 1 for a vector, 0 for a replacement.
    pub rank: u64,
    /// s of s·B·A: α/r, or α/√r for rsLoRA; 1 for a replacement.
    pub scale: f64,
    /// The adapter's weight under the strategy.
    pub weight: f64,
    /// Whether the base stores the weight (in, out), so that the product is turned.
    pub transposed: bool,
    /// Which part of the module's product it is, and where it lies.
    #[serde(skip_serializing_if = "Part::is_whole")]
    pub part: Part,
    /// The adapter's tensor that it is made from, where that replaces W₀.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub on: Option<String>,
    /// What the adapter's initialisation took out of W₀, which it was trained without.
    #[serde(skip_serializing_if = "Option::is_none")]
    pub residual: Option<Residual>,
    /// Updates are made from what those of all lower stages leave. There is one stage but where
    /// PEFT's order is followed.
    #[serde(skip_serializing_if = "is_zero")]
    pub stage: usize,
}

fn is_zero(stage: &usize) -> bool {
    *stage == 0
}

/// Which part of a module's product an update takes, and on which rows of the stored tensor it
/// lies: experts that are stored as one tensor, modules that are stored fused or split. The default
/// is the whole product on the whole tensor.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize)]
pub struct Part {
    /// The expert, where the module's factors hold those of all experts.
    pub expert: Option<Expert>,
    /// The outputs of the product that are used: rows of B, or rows of a replacement.
    pub outputs: Option<Range<u64>>,
    /// The inputs of the product that are used: columns of A.
    pub inputs: Option<Range<u64>>,
    /// The rows of the stored tensor that are changed, its leading dimensions taken as one.
    pub rows: Option<Range<u64>>,
}

impl Part {
    /// Whether it is the whole product on the whole tensor.
    pub fn is_whole(&self) -> bool {
        *self == Self::default()
    }
}

/// One of the experts whose factors a module holds together, as PEFT's `target_parameters` do:
/// of A (count·r, in) the rows e·r to (e+1)·r, of B (out, r·count) the columns k·count + e.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
pub struct Expert {
    /// Which one.
    pub index: u64,
    /// Of how many.
    pub count: u64,
}

/// What an initialisation took out of W₀; the rank is the update's.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum Residual {
    /// The largest singular components (PiSSA; Meng et al. 2024, arXiv:2404.02948).
    Largest,
    /// The smallest singular components (KaSA; Wang et al. 2024, arXiv:2412.06071).
    Smallest,
    /// s·Q·R of the first columns' QR decomposition (OLoRA; Büyükakyüz 2024, arXiv:2406.01775).
    Leading,
}

impl Residual {
    /// The factor on the product that was taken out, of an update with the scale s.
    pub fn scale(self, scale: f64) -> f64 {
        match self {
            Self::Largest | Self::Smallest => 1.0,
            Self::Leading => scale,
        }
    }
}

/// What an update does to W₀, the base's weight. With several updates of one tensor the result is
/// W₀ + Σ wᵢ·(Wᵢ − W₀), each Wᵢ made from W₀ alone.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "snake_case")]
pub enum UpdateKind {
    /// W₀ + s·B·A.
    LowRank,
    /// m/‖V‖ ⊙ V with V = W₀ + s·B·A, a norm for each output (Liu et al. 2024, arXiv:2402.09353).
    Dora,
    /// b₀ + s·b, with the bias of B.
    Vector,
    /// The adapter's own tensor.
    Replace,
}

impl UpdateKind {
    /// Whether Wᵢ is more than W₀ with something added.
    pub fn takes_the_place(self) -> bool {
        matches!(self, Self::Dora | Self::Replace)
    }
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
    /// It holds the scales of a quantised weight that is merged, and is written with that.
    Rescale,
}

impl Action {
    /// The word for it in listings.
    pub fn name(&self) -> &'static str {
        match self {
            Self::Copy => "copy",
            Self::Cast => "cast",
            Self::Merge(_) => "merge",
            Self::Rescale => "rescale",
        }
    }
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
    pub quantised: Option<Arc<Quantised>>,
    /// Whether it is quantised again, with the same scheme.
    pub requantised: bool,
}

impl PlannedTensor {
    /// The tensor as the source's file holds it.
    pub fn stored(&self) -> &TensorInfo {
        self.quantised.as_ref().map_or(&self.source, |quantised| &quantised.stored.tensor)
    }

    /// The tensor as the output's file holds it, but for its range.
    pub fn written(&self) -> TensorInfo {
        let tensor = if self.requantised { self.stored() } else { &self.source };
        TensorInfo { dtype: self.output_dtype.clone(), ..tensor.clone() }
    }

    /// The type to which sums are rounded: the output's, or what is quantised then.
    pub fn rounded_dtype(&self) -> &Dtype {
        if self.requantised { &self.source.dtype } else { &self.output_dtype }
    }

    /// Whether it has the same type and size as in the source's file.
    pub fn keeps_its_size(&self) -> bool {
        self.output_dtype == self.stored().dtype && (self.quantised.is_none() || self.requantised)
    }

    /// Rows and columns of the matrix on which updates act: the first dimension and the rest, as
    /// layers have it; or, where an update lies on a band of a stack of matrices, all leading
    /// dimensions and the last.
    pub fn matrix(&self) -> (usize, usize) {
        let shape = &self.source.shape;
        let stacked = self.updates().iter().any(|update| update.part.rows.is_some());
        let leading = if stacked { shape.len().saturating_sub(1).max(1) } else { 1 };
        let extent = |dimensions: &[u64]| dimensions.iter().product::<u64>() as usize;
        let split = leading.min(shape.len());
        (extent(&shape[..split]), extent(&shape[split..]))
    }

    /// Its updates, if it is merged.
    pub fn updates(&self) -> &[Update] {
        match &self.action {
            Action::Merge(updates) => updates,
            Action::Copy | Action::Cast | Action::Rescale => &[],
        }
    }

    /// The rows of its matrix in runs that the same updates change. Tiles do not cross their ends.
    pub fn segments(&self) -> Vec<Range<usize>> {
        let (rows, _) = self.matrix();
        let mut cuts = vec![0, rows];
        for band in self.updates().iter().filter_map(|update| update.part.rows.as_ref()) {
            cuts.extend([band.start as usize, band.end as usize]);
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
    /// Whether the weights are no longer quantised.
    pub unquantised: bool,
}

impl ConfigChanges {
    /// Whether the config stays as it is.
    pub fn is_empty(&self) -> bool {
        *self == Self::default()
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
    /// What has to change in the config.
    pub config_changes: ConfigChanges,
    /// What a careful person would want to know before using the result.
    pub warnings: Vec<String>,
    /// How the adapters were made to fit, where it was not plain.
    pub notes: Vec<String>,
    /// What becomes of every config field and every tensor of each adapter.
    pub accounts: Vec<Accounts>,
}

/// Whether every parameter of the adapters has its tensor in the base, by the names as they stand
/// or the built-in rules for renamed ones.
///
/// # Errors
/// [`Error::Cancelled`], [`Error::Adapter`] for patterns of a config that take too many steps, that
/// a file changed meanwhile, or [`Error::Io`].
pub fn names_fit(inputs: &Inputs, task: &Task) -> Result<bool> {
    let options = Options {
        strategy: Strategy::Sequential,
        weights: None,
        dtype: None,
        allow: Vec::new(),
        compat: None,
        subtract: false,
        expert_layout: None,
        renames: None,
    };
    let planner = Planner::new(inputs, &options, task)?;
    for adapter in &inputs.adapters {
        if !planner.name(adapter)?.fits() {
            return Ok(false);
        }
    }
    Ok(true)
}

impl Plan {
    /// Plans a merge.
    ///
    /// # Errors
    /// [`Error::Argument`] for weights that do not fit the strategy, [`Error::Unsupported`] for
    /// what cannot be merged, [`Error::Plan`] with everything that does not fit together,
    /// [`Error::Checkpoint`] or [`Error::Adapter`] if a file changed meanwhile, [`Error::Io`].
    pub fn new(inputs: &Inputs, options: Options) -> Result<Self> {
        Self::new_with(inputs, options, &Task::new())
    }

    /// The same, as a part of a task that can be cancelled.
    ///
    /// # Errors
    /// Those of [`Plan::new`], and [`Error::Cancelled`].
    pub fn new_with(inputs: &Inputs, options: Options, task: &Task) -> Result<Self> {
        let mut weights = weights_of(&options, inputs.adapters.len())?;
        if options.subtract {
            weights.iter_mut().for_each(|weight| *weight = -*weight);
        }
        refuse_obstacles(inputs, &options.allow)?;
        let repeats =
            |adapter: &Arc<Adapter>| adapter.config().features().layer_replication.is_some();
        if options.subtract
            && options.compat == Some(Compat::Peft)
            && inputs.adapters.iter().any(repeats)
        {
            return Err(Error::Plan(vec![format!(
                "PEFT adds the updates of repeated layers (layer_replication) to all of them, and \
                 the merged checkpoint does not tell which those were; {}",
                restoring::GIVE_THE_BASE
            )]));
        }
        // A merged checkpoint has the repeated layers written out.
        let replicated = match options.subtract {
            true => None,
            false => replication::apply(inputs).map_err(|problem| Error::Plan(vec![problem]))?,
        };
        let inputs = replicated.as_ref().map_or(inputs, |(inputs, _)| inputs);
        task.check()?;
        let mut planner = Planner::new(inputs, &options, task)?;
        for (position, weight) in weights.iter().enumerate() {
            planner.add(position, *weight)?;
        }
        let mut decided = planner.finish()?;
        if let Some((_, replication)) = &replicated {
            decided.notes.push(format!(
                "the base's {} layers become {}, each written out with its own updates",
                replication.layers,
                replication.order.len()
            ));
            decided.config_changes.layers = Some(replication.clone());
        }
        let mut warnings = inputs.base.warnings().to_vec();
        for adapter in &inputs.adapters {
            warnings.extend(untrained(adapter)?);
        }
        warnings.extend_from_slice(&decided.warnings);
        let (config_changes, mut notes) = (decided.config_changes.clone(), decided.notes.clone());
        shorten_all(warnings.iter_mut().chain(&mut notes));
        let waived = std::mem::take(&mut decided.waived);
        task.check()?;
        let shards = layout::plan_shards(inputs, &options, decided);
        task.check()?;
        let accounts = accounts::settle(inputs, &options.allow, &shards, &waived);
        Ok(Self { options, weights, shards, config_changes, warnings, notes, accounts })
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

/// Refuses, adapter by adapter, whatever cannot be merged.
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
fn untrained(adapter: &Adapter) -> Result<Option<String>> {
    let (mut first, mut count) = (None, 0);
    for module in adapter.modules().values() {
        if changes_nothing(adapter, module)? {
            first.get_or_insert(&module.path);
            count += 1;
        }
    }
    Ok(first.map(|first| {
        format!(
            "{}: lora_B is all zero in {count} of {} modules (the first: {first}); \
             they were never trained and change nothing",
            adapter.path().display(),
            adapter.modules().len()
        )
    }))
}

/// Whether a module's product is zero because its B is.
fn changes_nothing(adapter: &Adapter, module: &Module) -> Result<bool> {
    // DoRA's magnitude can have been trained beside a B that stayed zero.
    if module.magnitude.is_some() {
        return Ok(false);
    }
    let size = module.b.dtype.size();
    // Zero but for the sign, which is the highest bit of the last byte.
    let is_zero = |element: &[u8]| {
        element[size - 1] & 0x7f == 0 && element[..size - 1].iter().all(|byte| *byte == 0)
    };
    // One of the first elements nearly always tells.
    let mut beginning = [0; 64];
    let beginning = &mut beginning[..module.b.bytes().min(64) as usize];
    adapter.file().read_into(&module.b, 0, beginning)?;
    let mut all_zero = beginning.chunks_exact(size).all(is_zero);
    if all_zero {
        adapter.file().for_each_chunk(&module.b, &mut |_, bytes| {
            all_zero = bytes.chunks_exact(size).all(is_zero);
            if all_zero { ControlFlow::Continue(()) } else { ControlFlow::Break(()) }
        })?;
    }
    Ok(all_zero)
}

#[cfg(test)]
mod tests;
