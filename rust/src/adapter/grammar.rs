//! Flattened names of modules, brought to the base's: `a_b_c` is whichever of its modules has these
//! letters once its dots are underscores. Of a base that is a diffusion model, names of its components.

mod components;
mod numbered;

use std::collections::HashMap;

use indexmap::IndexMap;

use super::formats::image::layout::Layout;
use super::{Adapter, Grammar, Module};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::components::ComponentKind;
use crate::checkpoint::names::diffusion::DiffusionNames;
use crate::error::Result;

/// What may stand before a flattened name: the component that was trained.
const PREFIXES: [&str; 11] = [
    "lora_unet__",
    "lora_unet_",
    "lora_te_",
    "lora_te1_",
    "lora_te2_",
    "lora_te3_",
    "lora_prior_unet_",
    "lora_prior_te_",
    "lora_transformer_",
    "lycoris_",
    "lora_",
];
/// Those of a component of which a model has one.
const CONTAINERS: [&str; 4] = ["lora_unet__", "lora_unet_", "lora_transformer_", "lycoris_"];
/// How many leading parts of the base's names an adapter may leave out.
const DEPTH: usize = 3;

/// An adapter whose modules have the base's names; `None` where they are dotted as they are. What
/// the base does not have keeps its name, and then fits nothing.
///
/// # Errors
/// [`crate::Error::Adapter`] where names fit in several ways, or are one module twice.
pub fn resolve(adapter: &Adapter, base: &Checkpoint) -> Result<Option<Adapter>> {
    let names = DiffusionNames::of(base);
    if adapter.format() == Layout::CloneOfSimo.name() {
        return numbered::resolve(adapter, base, names.as_ref()).map(Some);
    }
    if let Some(names) = names {
        return components::resolve(adapter, &names, base);
    }
    if adapter.grammar() == Grammar::Dotted {
        return Ok(None);
    }
    let schemes = schemes(base);
    let flattened = adapter.modules().values().map(|module| module.path.as_str());
    let bare: Vec<_> = flattened.map(|path| (path, candidates(path))).collect();
    let explained = |scheme: &Scheme<'_>| {
        let is_known = |names: &Vec<&str>| names.iter().any(|name| scheme.contains_key(*name));
        bare.iter().filter(|(_, names)| is_known(names)).count()
    };
    // The first of those that explain most, which leaves out least.
    let mut best: Option<(usize, &Scheme<'_>)> = None;
    for scheme in schemes.values() {
        let count = explained(scheme);
        if best.is_none_or(|(most, _)| count > most) {
            best = Some((count, scheme));
        }
    }
    let path_of = |names: &[&str]| {
        let (_, scheme) = best?;
        names.iter().find_map(|name| scheme.get(*name).copied().flatten())
    };
    let mut modules = IndexMap::with_capacity(bare.len());
    for ((key, module), (path, names)) in adapter.modules().iter().zip(&bare) {
        let path = path_of(names).unwrap_or(path).to_owned();
        modules.insert(key.clone(), Module { path, ..module.clone() });
    }
    let (saved, rows) = (adapter.saved().to_vec(), adapter.trained_rows().to_vec());
    Ok(Some(adapter.renamed(modules, saved, rows, Grammar::Dotted)))
}

/// The component that a dotted name is of, as far as it tells, and what it is within that.
pub fn component_of(name: &str) -> (Option<ComponentKind>, &str) {
    components::component_of(name)
}

/// The base's modules by their flattened names; `None` where two of them flatten alike.
type Scheme<'a> = HashMap<String, Option<&'a str>>;

/// By the leading parts that are left out, the fewest first.
fn schemes(base: &Checkpoint) -> IndexMap<&str, Scheme<'_>> {
    let mut schemes = IndexMap::<&str, Scheme<'_>>::new();
    let paths = || base.tensors().keys().filter_map(|name| name.strip_suffix(".weight"));
    for depth in 0..=DEPTH {
        for path in paths() {
            let start = match depth {
                0 => 0,
                _ => match path.match_indices('.').nth(depth - 1) {
                    Some((dot, _)) => dot + 1,
                    None => continue,
                },
            };
            let names = schemes.entry(&path[..start]).or_default();
            names
                .entry(path[start..].replace('.', "_"))
                .and_modify(|other| *other = None)
                .or_insert(Some(path));
        }
    }
    schemes
}

/// A flattened name without what stands before the names of a model of which an adapter has one.
pub(super) fn without_container(key: &str) -> &str {
    CONTAINERS.iter().find_map(|prefix| key.strip_prefix(prefix)).unwrap_or(key)
}

/// A flattened name, as it stands and without what stands before it.
pub(super) fn candidates(key: &str) -> Vec<&str> {
    let bare = PREFIXES.iter().filter_map(|prefix| key.strip_prefix(prefix));
    std::iter::once(key).chain(bare).collect()
}
