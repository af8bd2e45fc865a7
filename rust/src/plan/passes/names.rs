//! The pass that maps an adapter's names to the base's.

use std::collections::HashSet;

use indexmap::IndexMap;

use super::targets::{self, FoundTargets, Target};
use crate::adapter::Adapter;
use crate::checkpoint::names::prefix;
use crate::checkpoint::names::renames::{NameIndex, Renames};
use crate::error::Result;
use crate::plan::context::Context;
use crate::plan::name_map::NameMap;

/// An adapter's targets under its names in the base, and what matches nothing.
pub(in crate::plan) struct MappedTargets<'a> {
    pub names: NameMap<'a>,
    pub targets: IndexMap<String, Target>,
    pub problems: Vec<String>,
    /// Saved parameters that the base does not have, which is not wrong in itself.
    unmatched_saved: usize,
    /// Modules of which the base has nothing by their names.
    unmatched_modules: usize,
}

impl MappedTargets<'_> {
    /// How much does not fit; of two that are equal in that, the one that knows the names can say
    /// more.
    fn unmatched(&self) -> (usize, usize) {
        (self.problems.len() + self.unmatched_saved, self.unmatched_modules)
    }

    pub fn fits(&self) -> bool {
        self.problems.len() + self.unmatched_saved == 0
    }
}

/// Finds how an adapter's names fit the base: as they stand, but for a leading part, or else by
/// the rules for the base's model type.
///
/// # Errors
/// [`crate::Error::Cancelled`], and [`crate::Error::Adapter`] for patterns of the config that
/// take too many steps.
pub(in crate::plan) fn map<'a>(
    context: &Context<'a>,
    adapter: &Adapter,
) -> Result<MappedTargets<'a>> {
    let plain = NameIndex::plain(context.base).with_quantized(context.quantized);
    let plain = map_by(context, adapter, plain)?;
    if plain.fits() {
        return Ok(plain);
    }
    let Some(renamed) = renamed(context)? else { return Ok(plain) };
    let renamed = map_by(context, adapter, renamed)?;
    Ok(if renamed.unmatched() < plain.unmatched() { renamed } else { plain })
}

/// The base's names under the rules that were given, or are built in for its model type.
fn renamed<'a>(context: &Context<'a>) -> Result<Option<NameIndex<'a>>> {
    let given = context.options.renames.clone();
    let Some(renames) = given.or_else(|| Renames::built_in(context.base)) else { return Ok(None) };
    let names = NameIndex::renamed(context.base, renames, context.task)?;
    Ok(Some(names.with_quantized(context.quantized)))
}

/// The tensors of the base that go by a parameter's name, in any way in which names are compared and
/// whatever their shapes: what an adapter that does not fit may have meant.
///
/// # Errors
/// [`crate::Error::Cancelled`].
pub(in crate::plan) fn meant(context: &Context<'_>, parameters: &[String]) -> Result<Vec<String>> {
    let plain = NameIndex::plain(context.base);
    let mut found = Vec::new();
    for names in [Some(plain), renamed(context)?].iter().flatten() {
        for parameter in parameters {
            context.task.check()?;
            let canonical = names.canonical(parameter).name;
            let known = if names.has(&canonical) {
                Some(canonical.as_str())
            } else {
                names.with_other_prefix(&canonical)
            };
            found.extend(known.into_iter().flat_map(|known| names.tensors_of(known)));
        }
    }
    Ok(found)
}

fn map_by<'a>(
    context: &Context<'a>,
    adapter: &Adapter,
    names: NameIndex<'a>,
) -> Result<MappedTargets<'a>> {
    let layout = context.options.expert_layout;
    let FoundTargets { targets, mut problems } =
        targets::find(adapter, &names, layout, context.task)?;
    // A head that shares the embeddings' tensor has none of its own to be found by.
    let known = |parameter: &String| context.name_in_tie(parameter).is_none();
    let canonical = |parameter: String| names.canonical(&parameter).name;
    let whole_paths: HashSet<_> = adapter.saved().iter().map(|saved| saved.path.as_str()).collect();
    let whole = adapter.saved().iter().map(|saved| saved.path.clone());
    let rows = adapter.trained_rows().iter().map(|rows| format!("{}.weight", rows.path));
    let saved: Vec<String> = whole.chain(rows).collect();
    // A weight that the adapter saves whole need not be in the base, whatever else is on it.
    let is_saved = |parameter: &String| whole_paths.contains(parameter.as_str());
    let prefix = if targets.is_empty() {
        // Saved parameters need not be in the base; each is asked for below.
        let parameters: Vec<_> = saved.iter().cloned().map(canonical).collect();
        prefix::find_prefix_change(&parameters, &[], &names, context.task)?.change
    } else {
        let size = |key: &String| {
            let module = &adapter.modules()[key];
            module.outputs() * module.inputs()
        };
        let parameters = targets.iter().map(|(key, target)| (target.parameter.clone(), size(key)));
        let parameters =
            parameters.filter(|(parameter, _)| known(parameter) && !is_saved(parameter));
        let (parameters, sizes): (Vec<_>, Vec<_>) =
            parameters.map(|(parameter, size)| (canonical(parameter), size)).unzip();
        let found = prefix::find_prefix_change(&parameters, &sizes, &names, context.task)?;
        problems.extend(found.problems);
        found.change
    };
    let names = NameMap::new(names, prefix);
    let brought = targets.values().map(|target| &target.parameter);
    let brought = brought.filter(|path| is_saved(path) && known(path) && !names.has(path));
    problems.extend(brought.map(|parameter| {
        let module = parameter.strip_suffix(".weight").unwrap_or(parameter);
        format!(
            "its module {module} is saved whole and has a LoRA as well, and the {} has no \
             {parameter}: an update of what the adapter itself brings cannot be merged; merge the LoRA \
             into that module before it is saved, or keep the module out of target_modules",
            context.base.noun()
        )
    }));
    let unmatched_saved = saved.iter().filter(|path| known(path) && !names.has(path)).count();
    let unmatched_modules = (adapter.modules().values())
        .filter(|module| {
            let own = module.parameters.iter().map(|parameter| parameter.name.as_str());
            let own = own.chain([module.leaf()]);
            !own.map(|leaf| format!("{}.{leaf}", module.path)).any(|path| names.has(&path))
        })
        .count();
    Ok(MappedTargets { names, targets, problems, unmatched_saved, unmatched_modules })
}
