//! Recipes: digests of all that decides the bytes of one shard, by which a later merge into the same
//! output knows what it need not write again.

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use indexmap::IndexMap;
use rayon::iter::{IntoParallelRefIterator, ParallelIterator};
use serde::{Deserialize, Serialize};

use super::rounding::RoundingSums;
use crate::error::Result;
use crate::kernel::InstructionSet;
use crate::plan::{Action, Inputs, Origin, Plan, PlannedShard, Update, UpdateKind};
use crate::storage::sink::FileMark;

/// Raised whenever the same recipe would be carried out to other bytes.
const VERSION: &str = "lorafast shard 1";

/// A shard that was written, and what it was made from. Of a report, which anybody may have changed:
/// what it says of the file is held against the file.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct WrittenRecipe {
    /// The digest of all that decides its bytes.
    pub recipe: String,
    /// What its file was when it was finished.
    pub file: FileMark,
    /// What rounding took away in it.
    pub rounding: RoundingSums,
}

/// Shards by their names.
pub type Recipes = IndexMap<String, WrittenRecipe>;

/// The recipe of each of a plan's shards.
///
/// # Errors
/// [`crate::Error::Adapter`] if an adapter changed meanwhile, [`crate::Error::Io`].
pub(super) fn of(
    inputs: &Inputs,
    plan: &Plan,
    set: InstructionSet,
    pool: &rayon::ThreadPool,
) -> Result<Vec<String>> {
    pool.install(|| plan.shards.par_iter().map(|shard| of_shard(inputs, shard, set)).collect())
}

/// Of the shards of a plan those that an output has already, and what each was: whole groups, for a
/// shard is not made without those that share a tensor with it.
pub(super) fn known<'a>(
    plan: &Plan,
    recipes: &[String],
    earlier: &'a Recipes,
) -> Vec<Option<&'a WrittenRecipe>> {
    let mut known: Vec<_> = (plan.shards.iter().zip(recipes))
        .map(|(shard, recipe)| earlier.get(&shard.name).filter(|found| found.recipe == *recipe))
        .collect();
    for group in plan.groups() {
        if group.iter().any(|shard| known[*shard].is_none()) {
            group.into_iter().for_each(|shard| known[shard] = None);
        }
    }
    known
}

struct Recipe(blake3::Hasher);

impl Recipe {
    fn add(&mut self, part: &[u8]) {
        self.0.update(&(part.len() as u64).to_le_bytes());
        self.0.update(part);
    }

    fn add_json(&mut self, value: &impl Serialize) {
        self.add(&serde_json::to_vec(value).expect("plain data"));
    }
}

fn of_shard(inputs: &Inputs, shard: &PlannedShard, set: InstructionSet) -> Result<String> {
    let mut recipe = Recipe(blake3::Hasher::new());
    recipe.add(VERSION.as_bytes());
    recipe.add(env!("CARGO_PKG_VERSION").as_bytes());
    // All others come to the same bytes.
    recipe.add(if set == InstructionSet::Amx { b"amx" } else { b"exact" });
    recipe.add(shard.name.as_bytes());
    recipe.add(&shard.header);
    for position in sources_of(inputs, shard) {
        let source = &inputs.base.shards()[position];
        recipe.add(source.name.as_bytes());
        recipe.add(source.file.header_bytes());
        recipe.add_json(&FileMark::of_source(source.file.source()));
    }
    let mut adapters = BTreeSet::new();
    for tensor in &shard.tensors {
        recipe.add(tensor.recipe().as_bytes());
        if let Origin::Adapter(adapter) = tensor.origin {
            recipe.add(&inputs.adapters[adapter].file().read(&tensor.source)?);
        }
        recipe.add_json(&tensor.updates());
        for update in tensor.updates() {
            adapters.insert(update.adapter);
            add_factors(&mut recipe, inputs, update)?;
        }
    }
    // What a method makes of factors may depend on settings that no update has.
    for position in adapters {
        let adapter = &inputs.adapters[position];
        recipe.add_json(adapter.settings());
        recipe.add(format!("{:?}", adapter.semantics()).as_bytes());
    }
    Ok(recipe.0.finalize().to_hex().to_string())
}

/// The base's shards from which one is made: its own, those of tensors that it repeats, and all of
/// them where weights are quantised, whose scales may lie anywhere.
fn sources_of(inputs: &Inputs, shard: &PlannedShard) -> BTreeSet<usize> {
    if shard.tensors.iter().any(|tensor| tensor.quantized.is_some() || rescales(&tensor.action)) {
        return (0..inputs.base.shards().len()).collect();
    }
    let of_tensors = shard.tensors.iter().filter_map(|tensor| match tensor.origin {
        Origin::Base(position) => Some(position),
        Origin::Adapter(_) => None,
    });
    of_tensors.chain([shard.source]).collect()
}

fn rescales(action: &Action) -> bool {
    matches!(action, Action::Rescale)
}

fn add_factors(recipe: &mut Recipe, inputs: &Inputs, update: &Update) -> Result<()> {
    let adapter = &inputs.adapters[update.adapter];
    let replacement = (update.kind == UpdateKind::Replace).then_some(&update.module);
    for name in replacement.into_iter().chain(&update.base_override) {
        if let Some(tensor) = adapter.tensor(name) {
            recipe.add(&tensor.read()?);
        }
    }
    let Some(module) = adapter.modules().get(&update.module) else { return Ok(()) };
    recipe.add(format!("{:?} {} {}", module.kind, module.alpha, module.scaling).as_bytes());
    for (part, tensor) in module.tensors() {
        recipe.add(format!("{part} {} {:?}", tensor.dtype, tensor.shape).as_bytes());
        recipe.add(&tensor.read()?);
    }
    Ok(())
}

/// What is to be known of finished shards: of those in a store by what it said of them, of others by their
/// files.
pub(super) fn written(
    output: &Path,
    marks: &BTreeMap<String, FileMark>,
    plan: &Plan,
    recipes: &[String],
    rounding: &[RoundingSums],
) -> Recipes {
    let mut written = Recipes::new();
    for ((shard, recipe), rounding) in plan.shards.iter().zip(recipes).zip(rounding) {
        let marked = marks.get(&shard.name).copied();
        let found = marked.or_else(|| FileMark::of_file(&output.join(&shard.name)));
        if let Some(file) = found.filter(|found| found.bytes == shard.bytes()) {
            let recipe = recipe.clone();
            let entry = WrittenRecipe { recipe, file, rounding: *rounding };
            written.insert(shard.name.clone(), entry);
        }
    }
    written
}
