//! What an adapter makes of the base's weights, W′ − W, where that is no product of stored factors: DoRA,
//! methods that transform the weight, factors that began with a part of it.
//!
//! Such a module is stood in for by one with the same name whose update is a whole matrix, computed row by row
//! as a merge of the adapter alone computes it, in f64.

use std::ops::Range;
use std::sync::Arc;

use indexmap::IndexMap;
use rayon::prelude::*;

use super::dense::Dense;
use super::extract::{LARGEST_RANK, Source, leading_of};
use super::made::{Short, shortened};
use super::ranks::Rule;
use super::work::Cut;
use crate::adapter::delta::{Delta, Expert};
use crate::adapter::factors::Pair;
use crate::adapter::{Adapter, Initialization, Module};
use crate::checkpoint::Checkpoint;
use crate::error::{Error, Result, agree, counted};
use crate::execute::compute::Computer;
use crate::execute::queue;
use crate::kernel::InstructionSet;
use crate::parallel::task::Task;
use crate::plan::{self, Inputs, Plan, PlannedTensor, Update, UpdateKind};
use crate::tensor::dtype::Dtype;
use crate::tensor::orientation::Orientation;
use crate::tensor::safetensors::Tensor;

/// An adapter on its base, and where those of its modules lie whose updates only the base makes.
#[derive(Debug)]
pub(crate) struct OnBase {
    inputs: Inputs,
    plan: Plan,
    layers: IndexMap<String, Layer>,
}

/// The adapters on a base, and in the place of each one with modules that stand in for those which only the base
/// tells; nothing where there are none.
pub(crate) struct Members {
    /// By adapter.
    pub on_base: Vec<Option<OnBase>>,
    /// By adapter.
    pub stand_ins: Vec<Adapter>,
}

impl Members {
    /// Of adapters that are combined. Factors that began with a part of the base are among what it tells.
    ///
    /// # Errors
    /// As [`OnBase::of`].
    pub fn of(adapters: &[Adapter], base: &Arc<Checkpoint>, task: &Task) -> Result<Option<Self>> {
        let find = |adapter: &Adapter| {
            let all = adapter.semantics().initialization != Initialization::Plain;
            OnBase::of(adapter, base, all, task)
        };
        let on_base = adapters.iter().map(find).collect::<Result<Vec<_>>>()?;
        if on_base.iter().all(Option::is_none) {
            return Ok(None);
        }
        let stand_in = |(adapter, on_base): (&Adapter, &Option<OnBase>)| match on_base {
            Some(on_base) => on_base.stand_in(adapter, task),
            None => Ok(adapter.clone()),
        };
        let stand_ins = adapters.iter().zip(&on_base).map(stand_in).collect::<Result<_>>()?;
        Ok(Some(Self { on_base, stand_ins }))
    }
}

/// Where the weight of a module lies.
#[derive(Debug)]
struct Layer {
    /// In the order of the module's outputs, or of its inputs where it is turned.
    pieces: Vec<Piece>,
    /// Whether rows of the stored matrix are inputs of the module's product.
    is_turned: bool,
    /// (outputs, inputs…) of the product.
    shape: Vec<u64>,
    /// How often the module's product is added.
    repeats: f64,
}

/// Rows of one planned tensor.
#[derive(Debug)]
struct Piece {
    place: [usize; 2],
    first_output: u64,
    rows: Range<usize>,
}

/// Whether only the base tells what a module adds.
pub(crate) fn needs_base(module: &Module) -> bool {
    module.magnitudes().is_some()
        || !module.delta.has_product()
        || module.delta.transform().is_some()
}

impl OnBase {
    /// Finds the weights of an adapter's modules that need the base, `all` of them or those that have no
    /// product of their own; `None` where there are none.
    ///
    /// # Errors
    /// Those of a merge of the adapter into the base; [`Error::Unsupported`] for weights that several modules
    /// change.
    pub fn of(
        adapter: &Adapter,
        base: &Arc<Checkpoint>,
        all: bool,
        task: &Task,
    ) -> Result<Option<Self>> {
        let is_made = |module: &&Module| all || needs_base(module);
        let wanted: Vec<&Module> = adapter.modules().values().filter(is_made).collect();
        if wanted.is_empty() {
            return Ok(None);
        }
        let inputs = Inputs { base: base.clone(), adapters: vec![Arc::new(adapter.clone())] };
        let options = plan::Options { dtype: Some(Dtype::F64), ..plan::Options::default() };
        let plan = Plan::new_with(&inputs, options, task)?;
        let mut layers = IndexMap::new();
        for module in wanted {
            if module.delta.holds_experts() {
                return Err(Error::unsupported(
                    adapter.path(),
                    format!(
                        "has the factors of several experts together ({}), which are not computed \
                         with",
                        module.title()
                    ),
                ));
            }
            if let Some(layer) = Layer::of(adapter, &plan, module)? {
                layers.insert(module.key.clone(), layer);
            }
        }
        Ok(Some(Self { inputs, plan, layers }))
    }

    /// What a user would want to know of it.
    pub fn note(&self) -> String {
        let count = self.layers.len();
        format!(
            "{}: the update of {} is what {} of the base's weight as a whole, W′ − W, in plain factors of the \
             rank that it needs or is given; the errors count what that leaves out",
            self.inputs.adapters[0].path().display(),
            counted(count, "module"),
            agree(count, "it makes", "they make"),
        )
    }

    /// Whether it tells the update of that module.
    pub fn has(&self, key: &str) -> bool {
        self.layers.contains_key(key)
    }

    /// The adapter with modules that stand in for these, each with a scale of one and no magnitudes.
    ///
    /// # Errors
    /// Those of reading the biases.
    pub fn stand_in(&self, adapter: &Adapter, task: &Task) -> Result<Adapter> {
        let mut modules = IndexMap::with_capacity(adapter.modules().len());
        for (key, module) in adapter.modules() {
            let own = match self.layers.get(key) {
                None => module.clone(),
                Some(layer) => {
                    let rank = layer.rank();
                    Module {
                        delta: Arc::new(Whole { shape: layer.shape.clone() }),
                        scale: None,
                        magnitude: None,
                        bias: self.bias(adapter, module, task)?,
                        rank,
                        alpha: rank as f64,
                        scaling: 1.0,
                        ..module.clone()
                    }
                }
            };
            modules.insert(key.clone(), own);
        }
        let (saved, rows) = (adapter.saved().to_vec(), adapter.trained_rows().to_vec());
        Ok(adapter.renamed(modules, saved, rows, adapter.grammar()))
    }

    /// What is added to the layer's bias: s·b of the second factor, and what a transform changes of it.
    fn bias(&self, adapter: &Adapter, module: &Module, task: &Task) -> Result<Option<Tensor>> {
        let mut values = match &module.bias {
            Some(bias) => {
                let mut values = bias.read_f64()?;
                values.iter_mut().for_each(|value| *value *= module.scaling);
                Some(values)
            }
            None => None,
        };
        for (_, tensor) in self.plan.tensors() {
            let changes = |update: &&Update| {
                update.module == module.key && update.kind == UpdateKind::Transform
            };
            if tensor.source.shape.len() != 1 || !tensor.updates().iter().any(|one| changes(&one)) {
                continue;
            }
            let (rows, _) = tensor.matrix();
            let change = self.rows_of(tensor, &(0..rows), task)?;
            let target = values.get_or_insert_with(|| vec![0.0; change.len()]);
            if target.len() != change.len() {
                return Err(Error::unsupported(
                    adapter.path(),
                    format!("changes the biases of several layers by {}", module.title()),
                ));
            }
            target.iter_mut().zip(change).for_each(|(sum, value)| *sum += value);
        }
        // What is zero is better left out: few readers take a bias.
        let Some(values) = values.filter(|all| all.iter().any(|value| *value != 0.0)) else {
            return Ok(None);
        };
        let bytes = bytemuck::cast_slice(&values).to_vec();
        let shape = vec![values.len() as u64];
        let name = format!("{}.bias", module.key);
        Tensor::in_memory(adapter.path(), name, Dtype::F64, shape, bytes).map(Some)
    }

    /// W′ − W of a module, (outputs, inputs).
    ///
    /// # Errors
    /// [`Error::Adapter`] or [`Error::Checkpoint`] if a file changed meanwhile, [`Error::Io`],
    /// [`Error::Cancelled`]; [`Error::Numeric`] for what is not finite.
    ///
    /// # Panics
    /// If it does not have the module.
    pub fn dense(&self, key: &str, task: &Task) -> Result<Dense> {
        let layer = &self.layers[key];
        let mut values: Vec<f32> = Vec::new();
        let mut columns = 0;
        for piece in &layer.pieces {
            let [shard, position] = piece.place;
            let tensor = &self.plan.shards[shard].tensors[position];
            (_, columns) = tensor.matrix();
            let before = values.len();
            values.resize(before + piece.rows.len() * columns, 0.0);
            let computer = self.computer(task);
            let prepared = computer.prepare_wide(tensor)?;
            let mut rest = &mut values[before..];
            let mut parts = Vec::new();
            let mut next = piece.rows.start;
            for tile in queue::tiles_covering(tensor, &piece.rows) {
                // Tiles may begin a few rows before.
                let skipped = next - tile.start;
                let own = (tile.len() - skipped) * columns;
                let (target, others) = rest.split_at_mut(own);
                rest = others;
                next = tile.end;
                parts.push((tile, skipped * columns, target));
            }
            parts.into_par_iter().try_for_each(|(tile, skipped, target)| {
                task.check()?;
                let [before, after] = computer.wide_rows(tensor, &prepared, &tile)?;
                let pairs = after[skipped..].iter().zip(&before[skipped..]);
                for (target, (after, before)) in target.iter_mut().zip(pairs) {
                    *target = ((after - before) / layer.repeats) as f32;
                }
                Ok(())
            })?;
        }
        let rows = values.len() / columns.max(1);
        let dense = Dense::new(rows, columns, values);
        if !dense.norm().is_finite() {
            self.inputs.check_unchanged()?;
            return Err(Error::Argument(format!(
                "{key} has values that are not finite (NaN or infinity), of which nothing can be computed"
            )));
        }
        Ok(if layer.is_turned { dense.transposed() } else { dense })
    }

    fn computer<'a>(&'a self, task: &'a Task) -> Computer<'a> {
        Computer { inputs: &self.inputs, set: InstructionSet::detect(), task }
    }

    /// The change of some rows of a tensor.
    fn rows_of(
        &self,
        tensor: &PlannedTensor,
        rows: &Range<usize>,
        task: &Task,
    ) -> Result<Vec<f64>> {
        let computer = self.computer(task);
        let prepared = computer.prepare_wide(tensor)?;
        let columns = prepared.columns();
        let mut change = Vec::new();
        for tile in queue::tiles_covering(tensor, rows) {
            let [before, after] = computer.wide_rows(tensor, &prepared, &tile)?;
            let skipped = (rows.start - tile.start.min(rows.start)) * columns;
            let pairs = after[skipped..].iter().zip(&before[skipped..]);
            change.extend(pairs.map(|(after, before)| after - before));
        }
        Ok(change)
    }
}

impl Layer {
    /// Where a module lies; `None` where it changes no matrix.
    fn of(adapter: &Adapter, plan: &Plan, module: &Module) -> Result<Option<Self>> {
        let unsupported = |why: &str| {
            Err(Error::unsupported(adapter.path(), format!("{why} ({})", module.title())))
        };
        let mut pieces: Vec<Piece> = Vec::new();
        let mut found: Option<(Orientation, Vec<u64>)> = None;
        for (shard, planned) in plan.shards.iter().enumerate() {
            for (position, tensor) in planned.tensors.iter().enumerate() {
                if tensor.source.shape.len() < 2 {
                    continue;
                }
                let (height, _) = tensor.matrix();
                let rows_of = |update: &Update| match &update.slice.rows {
                    Some(rows) => rows.start as usize..rows.end as usize,
                    None => 0..height,
                };
                for update in tensor.updates() {
                    if update.module != module.key {
                        continue;
                    }
                    let (rows, slice) = (rows_of(update), &update.slice);
                    if slice.expert.is_some() || slice.inputs.is_some() {
                        return unsupported("changes a part of a weight that is not computed with");
                    }
                    let is_shared = tensor.updates().iter().any(|other| {
                        let own = rows_of(other);
                        other.module != module.key && own.start < rows.end && rows.start < own.end
                    });
                    if is_shared {
                        return unsupported("changes one weight by several of its modules");
                    }
                    let first_output = slice.outputs.as_ref().map_or(0, |outputs| outputs.start);
                    found.get_or_insert((update.orientation(), tensor.source.shape.clone()));
                    // A tied weight is one weight.
                    if !pieces.iter().any(|other| other.first_output == first_output) {
                        pieces.push(Piece { place: [shard, position], first_output, rows });
                    }
                }
            }
        }
        let Some((orientation, stored)) = found else { return Ok(None) };
        pieces.sort_by_key(|piece| piece.first_output);
        let is_turned = (orientation == Orientation::InOut) != module.delta.is_by_tokens();
        if orientation == Orientation::InOut && pieces.len() > 1 {
            return unsupported("changes several weights that are stored transposed");
        }
        let rows: u64 = pieces.iter().map(|piece| piece.rows.len() as u64).sum();
        let [shard, position] = pieces[0].place;
        let columns = plan.shards[shard].tensors[position].matrix().1 as u64;
        let shape = match is_turned {
            true => vec![columns, rows],
            false if stored[1..].iter().product::<u64>() == columns => {
                [&[rows], &stored[1..]].concat()
            }
            false => vec![rows, columns],
        };
        Ok(Some(Self { pieces, is_turned, shape, repeats: module.repeats() }))
    }

    fn rank(&self) -> u64 {
        self.shape[0].min(self.shape[1..].iter().product())
    }
}

/// A whole matrix that is computed when it is asked for, by [`OnBase::dense`].
#[derive(Debug)]
struct Whole {
    shape: Vec<u64>,
}

impl Delta for Whole {
    fn tensors(&self) -> Vec<(&'static str, &Tensor)> {
        Vec::new()
    }

    fn outputs(&self) -> u64 {
        self.shape[0]
    }

    fn input_shape(&self) -> Vec<u64> {
        self.shape[1..].to_vec()
    }

    fn rank(&self) -> u64 {
        self.shape[0].min(self.shape[1..].iter().product())
    }

    fn form(&self) -> String {
        "Whole".to_owned()
    }

    fn pair(&self, _expert: Option<Expert>, _outputs: Option<&Range<u64>>) -> Result<Pair> {
        Err(Error::Argument("an update that only the base makes was taken for a product".into()))
    }

    fn is_expanded(&self) -> bool {
        true
    }

    fn algorithm(&self) -> &'static str {
        "FULL"
    }
}

/// The error that a rule allows where none is asked for: less than rounding factors to the type makes.
fn allowed(dtype: &Dtype) -> f64 {
    match dtype {
        Dtype::Bf16 => 1e-3,
        Dtype::F16 => 1e-4,
        _ => 1e-6,
    }
}

/// What a rule keeps of a matrix; without one, as much as rounding to the type would not tell from all of it.
/// `rank` is what a budget gives the module.
///
/// # Errors
/// [`Error::Argument`] where no rule is given and that would be more than [`LARGEST_RANK`].
pub(crate) fn short(
    dense: &Dense,
    cut: Option<Cut>,
    rank: Option<usize>,
    dtype: &Dtype,
    name: &str,
) -> Result<Short> {
    let norm = dense.norm();
    if norm == 0.0 {
        return Ok(Short { factors: None, kept: 1.0, tail: 0.0, norm, values: Vec::new() });
    }
    let rule = match (rank, cut) {
        (Some(rank), _) => Rule::Fixed(rank as u64),
        (None, Some(cut)) => cut.rule,
        (None, None) => Rule::Error(allowed(dtype)),
    };
    let max_rank = cut.and_then(|cut| cut.max_rank);
    let [rows, columns] = dense.shape();
    let (found, k, is_limited) = match dense.all_of_small() {
        Some(found) => {
            let k = rule.choose(&found.values, 0.0, false);
            (found, k, false)
        }
        None => leading_of(dense, rule, max_rank, norm * norm, name)?,
    };
    if cut.is_none() && (is_limited || k > LARGEST_RANK) {
        return Err(Error::Argument(format!(
            "what {name} makes of its {rows}×{columns} weight has no rank of {LARGEST_RANK} or less, and \
             factors of all of it would be as large as the weight: give a rank (rank=, --rank), a number \
             or a rule as \"error:0.1\", and the report has each module's error"
        )));
    }
    let full = cut.map_or(k, |cut| cut.full(k));
    Ok(shortened(&found, Some(norm), k, full, 1.0))
}

/// Whether the rule needs but the leading triplets.
pub(crate) fn is_quick(cut: Option<Cut>) -> bool {
    cut.is_none_or(|cut| !cut.is_kohya && !matches!(cut.rule, Rule::SvCumulative(_)))
}

/// Checks a rule for updates that are whole matrices.
///
/// # Errors
/// [`Error::Argument`] for `auto`, whose floor is one of stored factors.
pub(crate) fn check_rule(rule: Option<Rule>) -> Result<()> {
    match rule {
        Some(Rule::Auto) => Err(Error::Argument(
            "rank is \"auto\", which drops what the rounding of the stored factors explains; what an \
             adapter makes of a whole weight (DoRA and the like) is of full rank, and needs a number, or \
             a rule as \"error:0.1\""
                .to_owned(),
        )),
        _ => Ok(()),
    }
}
