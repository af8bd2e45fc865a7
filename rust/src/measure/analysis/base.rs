//! The weights of a base that an adapter's modules change, and their norms.

use std::collections::HashMap;

use indexmap::IndexMap;

use super::BaseNorm;
use crate::adapter::{Adapter, Module, grammar};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::prefix;
use crate::checkpoint::names::renames::{Canonical, NameIndex, Renames};
use crate::checkpoint::quantized::QuantizedWeights;
use crate::error::{Error, Result};
use crate::measure::statistics::{InFile, Request, describe};
use crate::parallel::task::Task;
use crate::tensor::safetensors::TensorInfo;

/// The base's weights whose norms updates are held against.
pub(super) struct Weights<'a> {
    /// By the key of the module that changes it.
    pub by_module: HashMap<&'a str, TensorInfo>,
    /// Of which modules there is none, and why.
    pub notes: Vec<String>,
}

/// The base's weight of each module that changes one tensor, alone and as a whole.
pub(super) fn find_weights<'a>(
    adapter: &'a Adapter,
    base: &Checkpoint,
    task: &Task,
) -> Result<Weights<'a>> {
    // What is stored as codes has its name here, though no norm.
    let quantized = QuantizedWeights::of(base);
    let base = &*quantized.named(base);
    let resolved = grammar::resolve(adapter, base)?;
    let named = resolved.as_ref().unwrap_or(adapter);
    // The parameters of experts are no modules' weights.
    let of_weights = |(_, module): &(&String, &Module)| {
        module.parameters.is_empty() && module.delta.has_product()
    };
    let keys: Vec<&'a str> =
        adapter.modules().iter().filter(of_weights).map(|(key, _)| key.as_str()).collect();
    let modules: Vec<_> = keys.iter().map(|key| &named.modules()[*key]).collect();
    let mut parameters: Vec<_> =
        modules.iter().map(|module| Some(format!("{}.{}", module.path, module.leaf()))).collect();
    let all: Vec<_> = parameters.iter().flatten().cloned().collect();
    let sizes: Vec<u64> = modules.iter().map(|module| module.outputs() * module.inputs()).collect();
    let mut names = NameIndex::plain(base);
    let mut fit = prefix::find_prefix_change(&all, &sizes, &names, task)?;
    if !fit.problems.is_empty()
        && let Some(renames) = Renames::built_in(base)
    {
        let renamed = NameIndex::renamed(base, renames, task)?;
        let canonical: Vec<_> = all.iter().map(|parameter| renamed.canonical(parameter)).collect();
        let known: Vec<_> = canonical.iter().map(|one| one.name.clone()).collect();
        let other = prefix::find_prefix_change(&known, &sizes, &renamed, task)?;
        if other.problems.is_empty() {
            // A piece of a stored tensor has no norm of its own there.
            let whole = |one: Canonical| one.slice.is_none().then_some(one.name);
            parameters = canonical.into_iter().map(whole).collect();
            (names, fit) = (renamed, other);
        }
    }
    let mut problems = fit.problems;
    let mut found = Weights { by_module: HashMap::new(), notes: Vec::new() };
    let mut without = Vec::new();
    if problems.is_empty() {
        for ((key, module), parameter) in keys.iter().zip(&modules).zip(&parameters) {
            let changed = parameter.as_ref().and_then(|parameter| fit.change.apply(parameter));
            let weight = changed.and_then(|name| {
                let whole = names.whole(&name).map(str::to_owned);
                whole.or_else(|| (!names.are_renamed()).then_some(name))
            });
            match weight.map(|name| weight_of(module, &name, base)) {
                Some(Ok(Some(weight))) => drop(found.by_module.insert(key, weight)),
                Some(Err(problem)) => problems.push(problem),
                Some(Ok(None)) | None => without.push(module.path.as_str()),
            }
        }
    }
    if !problems.is_empty() {
        let path = adapter.path().display();
        let problems = problems.iter().map(|problem| format!("{path}: {problem}"));
        return Err(Error::Plan(problems.collect()));
    }
    without.extend(
        adapter.modules().values().filter(|m| !m.parameters.is_empty()).map(|m| m.path.as_str()),
    );
    if let Some(first) = without.first() {
        found.notes.push(format!(
            "{} modules (the first: {first}) have no norm of a base's weight beside them: the base \
             stores it as integers, in pieces, or as a part of another",
            without.len()
        ));
    }
    Ok(found)
}

/// ‖W‖ of the base's weight of each module, by the module's key, as far as there is one.
///
/// # Errors
/// As analysis: those of names that do not fit, and of reading.
pub(crate) fn weight_norms(
    adapter: &Adapter,
    base: &Checkpoint,
    task: &Task,
) -> Result<IndexMap<String, f64>> {
    let found = find_weights(adapter, base, task)?;
    let norm = |(key, weight): (&&str, &TensorInfo)| {
        Ok(((*key).to_owned(), base_norm(base, weight, task)?.norm))
    };
    found.by_module.iter().map(norm).collect()
}

/// The weight of that name; none, where its numbers are no norm.
fn weight_of(module: &Module, name: &str, base: &Checkpoint) -> Result<Option<TensorInfo>, String> {
    let Some(weight) = base.tensor(name) else {
        return Err(format!("its module {} has no weight in the base", module.path));
    };
    if !weight.dtype.is_mergeable() {
        return Ok(None);
    }
    let (rows, columns) = (module.outputs(), module.inputs());
    if weight.elements() != rows * columns {
        return Err(format!(
            "its module {} updates a weight of shape [{rows}, {columns}], but the base's is {:?}",
            module.path, weight.shape
        ));
    }
    Ok(Some(weight.clone()))
}

pub(super) fn base_norm(base: &Checkpoint, weight: &TensorInfo, task: &Task) -> Result<BaseNorm> {
    task.check()?;
    let shard = base.tensors()[&weight.name].shard;
    let stored = InFile::new(&base.shards()[shard].file, weight).ok_or_else(|| {
        Error::Argument(format!("there are no statistics of the type {}", weight.dtype))
    })?;
    let summary = describe(&[stored], &Request::default())?;
    task.advance(weight.bytes());
    // Statistics leave NaN and infinities out; a norm that did would mislead.
    let norm = if summary.non_finite == 0 { summary.l2_norm } else { f64::NAN };
    Ok(BaseNorm::new(weight.name.clone(), norm))
}
