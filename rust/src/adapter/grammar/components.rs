//! Names of modules of diffusion models, brought to those of the component of the base that was
//! trained.

use std::collections::HashMap;

use indexmap::IndexMap;

use crate::adapter::{Adapter, Grammar, Module, Saved, TrainedRows};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::components::ComponentKind;
use crate::checkpoint::names::diffusion::{ComponentNames, DiffusionNames, Scheme};
use crate::error::{Error, Result};

/// The component that a name is of, by what it begins with.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
enum Hint {
    /// Nothing tells.
    Any,
    Denoiser,
    /// A text encoder, with its number where that is told.
    Text(Option<usize>),
}

/// What trainers put before flattened names.
const FLATTENED: [(&str, Hint); 11] = [
    ("lora_unet__", Hint::Denoiser),
    ("lora_unet_", Hint::Denoiser),
    ("lora_transformer_", Hint::Denoiser),
    ("lora_prior_unet_", Hint::Denoiser),
    ("lora_te_", Hint::Text(Some(1))),
    ("lora_te1_", Hint::Text(Some(1))),
    ("lora_te2_", Hint::Text(Some(2))),
    ("lora_te3_", Hint::Text(Some(3))),
    ("lora_prior_te_", Hint::Text(Some(1))),
    ("lycoris_", Hint::Any),
    ("lora_", Hint::Any),
];
/// The same of names with dots.
const DOTTED: [(&str, Hint); 16] = [
    ("base_model.model.", Hint::Any),
    ("model.diffusion_model.", Hint::Denoiser),
    ("diffusion_model.", Hint::Denoiser),
    ("unet.", Hint::Denoiser),
    ("transformer.", Hint::Denoiser),
    ("prior.", Hint::Denoiser),
    ("net.", Hint::Denoiser),
    ("text_encoder.", Hint::Text(Some(1))),
    ("text_encoder_2.", Hint::Text(Some(2))),
    ("text_encoder_3.", Hint::Text(Some(3))),
    ("text_encoders.clip_l.transformer.", Hint::Text(Some(1))),
    ("text_encoders.clip_h.transformer.", Hint::Text(Some(1))),
    ("text_encoders.clip_g.transformer.", Hint::Text(Some(2))),
    ("clip_l.", Hint::Text(Some(1))),
    ("clip_g.", Hint::Text(Some(2))),
    ("t5.", Hint::Text(None)),
];
/// The text encoders of ComfyUI of which it does not count which one they are.
const TEXT_ENCODERS: &str = "text_encoders.";
/// How many leading parts are taken off one after the other.
const PARTS: usize = 3;

/// A name as it may be meant: of which component, and what it is within that.
type Reading<'a> = (Hint, &'a str);

/// Whether a name's dots are underscores. One file may have names of both kinds.
fn is_flattened(name: &str) -> bool {
    !name.contains('.')
}

/// Every way in which a name can be read, that as it stands first.
fn readings(name: &str) -> Vec<Reading<'_>> {
    let mut readings = vec![(Hint::Any, name)];
    if is_flattened(name) {
        let begins =
            |(prefix, hint): &(&'static str, Hint)| Some((*hint, name.strip_prefix(prefix)?));
        readings.extend(FLATTENED.iter().filter_map(begins));
        return readings;
    }
    let (mut hint, mut rest) = readings[0];
    for _ in 0..PARTS {
        let known = DOTTED.iter().find_map(|(prefix, of)| Some((*of, rest.strip_prefix(prefix)?)));
        let other = || {
            let (_, rest) = rest.strip_prefix(TEXT_ENCODERS)?.split_once('.')?;
            Some((Hint::Text(None), rest.strip_prefix("transformer.").unwrap_or(rest)))
        };
        let Some((of, shorter)) = known.or_else(other) else { break };
        // The first that tells the component decides.
        hint = if hint == Hint::Any { of } else { hint };
        rest = shorter;
        readings.push((hint, rest));
    }
    readings
}

/// The component that a dotted name tells, and what it is within that.
pub(super) fn component_of(name: &str) -> (Option<ComponentKind>, &str) {
    let readings = readings(name);
    let (hint, rest) = readings[readings.len() - 1];
    match hint {
        Hint::Any => (None, rest),
        Hint::Denoiser => (Some(ComponentKind::Denoiser), rest),
        Hint::Text(number) => (Some(ComponentKind::TextEncoder(number.unwrap_or(2))), rest),
    }
}

/// Whether a component may be the one that is meant.
fn may_be(hint: Hint, component: &ComponentNames) -> bool {
    match hint {
        Hint::Any => true,
        Hint::Denoiser => component.kind == ComponentKind::Denoiser,
        Hint::Text(_) => matches!(component.kind, ComponentKind::TextEncoder(_)),
    }
}

/// A component of the base, in one of its namings.
#[derive(Clone, Copy)]
struct Candidate<'a> {
    component: &'a ComponentNames,
    scheme: &'a Scheme,
}

impl<'a> Candidate<'a> {
    /// The full name of a module that is read so.
    fn module(&self, readings: &[Reading<'_>]) -> Option<&'a str> {
        let is_flattened = readings.first().is_some_and(|(_, name)| is_flattened(name));
        let own = self.own(readings);
        let readings = readings.iter().filter(|(hint, _)| may_be(*hint, self.component));
        let bodies = own.into_iter().chain(readings.map(|(_, body)| *body));
        bodies.into_iter().find_map(|body| self.scheme.module(body, is_flattened))
    }

    fn parameter(&self, readings: &[Reading<'_>]) -> Option<&'a str> {
        let own = self.own(readings);
        let readings = readings.iter().filter(|(hint, _)| may_be(*hint, self.component));
        let bodies = own.into_iter().chain(readings.map(|(_, body)| *body));
        bodies.into_iter().find_map(|body| self.scheme.parameter(body))
    }

    /// What follows the component's own prefix in the base.
    fn own<'b>(&self, readings: &[Reading<'b>]) -> Option<&'b str> {
        let prefix = self.component.prefix.as_str();
        let (_, name) = readings.first()?;
        (!prefix.is_empty()).then(|| name.strip_prefix(prefix)).flatten()
    }
}

/// An adapter whose modules have the base's names; `None` where they have them already. What the base
/// does not have keeps its name, and then fits nothing.
///
/// # Errors
/// [`Error::Adapter`] where nothing tells which of the base's components is meant, or where two names
/// are one module.
pub(super) fn resolve(
    adapter: &Adapter,
    names: &DiffusionNames,
    base: &Checkpoint,
) -> Result<Option<Adapter>> {
    let mut groups = IndexMap::<Hint, Vec<&Module>>::new();
    for module in adapter.modules().values() {
        groups.entry(hint_of(&module.path)).or_default().push(module);
    }
    let mut found = HashMap::<&str, &str>::new();
    let mut chosen = Vec::new();
    for (hint, modules) in &groups {
        let Some(candidate) = choose(adapter, *hint, modules, names, base)? else {
            continue;
        };
        for module in modules {
            let readings = readings(&module.path);
            if let Some(full) = candidate.module(&readings) {
                found.insert(&module.key, full);
            }
        }
        chosen.push(candidate);
    }
    let mut modules = IndexMap::with_capacity(adapter.modules().len());
    for (key, module) in adapter.modules() {
        let path = found.get(key.as_str()).map_or(&*module.path, |full| full).to_owned();
        modules.insert(key.clone(), Module { path, ..module.clone() });
    }
    check_distinct(adapter, &modules, names)?;
    let all: Vec<_> = candidates(names).collect();
    let parameter = |path: &str| {
        let readings = readings(path);
        chosen.iter().chain(&all).find_map(|candidate| candidate.parameter(&readings))
    };
    let saved = adapter.saved().iter().map(|saved| {
        let path = parameter(&saved.path).unwrap_or(&saved.path).to_owned();
        Saved { path, ..saved.clone() }
    });
    let rows = adapter.trained_rows().iter().map(|rows| {
        let full = parameter(&format!("{}.weight", rows.path));
        let path = full.and_then(|full| full.strip_suffix(".weight")).unwrap_or(&rows.path);
        TrainedRows { path: path.to_owned(), ..rows.clone() }
    });
    Ok(Some(adapter.renamed(modules, saved.collect(), rows.collect(), Grammar::Dotted)))
}

/// The component that a name tells most precisely.
fn hint_of(name: &str) -> Hint {
    let mut told = readings(name).into_iter().map(|(hint, _)| hint);
    told.rfind(|hint| *hint != Hint::Any).unwrap_or(Hint::Any)
}

fn candidates(names: &DiffusionNames) -> impl Iterator<Item = Candidate<'_>> {
    names.components().iter().flat_map(|component| {
        component.schemes.iter().map(move |scheme| Candidate { component, scheme })
    })
}

/// The component and the naming that explain most of some names; `None` where none explains any.
fn choose<'a>(
    adapter: &Adapter,
    hint: Hint,
    modules: &[&Module],
    names: &'a DiffusionNames,
    base: &Checkpoint,
) -> Result<Option<Candidate<'a>>> {
    let read: Vec<_> = modules.iter().map(|module| readings(&module.path)).collect();
    let mut best = Vec::<(usize, usize, Candidate<'a>)>::new();
    for candidate in candidates(names) {
        if !may_be(hint, candidate.component) {
            continue;
        }
        let is_explained = |readings: &&Vec<Reading<'_>>| candidate.module(readings).is_some();
        let explained = read.iter().filter(is_explained).count();
        let is_own = |readings: &&Vec<Reading<'_>>| candidate.own(readings).is_some();
        let own = read.iter().filter(is_own).count();
        if explained > 0 {
            best.push((explained, own, candidate));
        }
    }
    let Some(most) = best.iter().map(|(explained, ..)| *explained).max() else { return Ok(None) };
    best.retain(|(explained, ..)| *explained == most);
    // Of several that explain as much, the one that the names name; then the one of that number.
    let own = best.iter().map(|(_, own, _)| *own).max().unwrap_or_default();
    best.retain(|(_, other, _)| *other == own);
    if let Hint::Text(Some(number)) = hint {
        let is_numbered = |candidate: &Candidate<'_>| {
            candidate.component.kind == ComponentKind::TextEncoder(number)
        };
        if best.iter().any(|(.., candidate)| is_numbered(candidate)) {
            best.retain(|(.., candidate)| is_numbered(candidate));
        }
    }
    let fits = |candidate: &Candidate<'_>| {
        let fits = |(module, readings): (&&Module, &Vec<Reading<'_>>)| {
            let parameter = candidate.module(readings).map(|full| format!("{full}.weight"));
            let stored = parameter.and_then(|parameter| base.tensor(&parameter));
            stored.is_none_or(|stored| stored.shape.first() == Some(&module.outputs()))
        };
        modules.iter().zip(&read).filter(|pair| fits(*pair)).count()
    };
    let most = best.iter().map(|(.., candidate)| fits(candidate)).max().unwrap_or_default();
    best.retain(|(.., candidate)| fits(candidate) == most);
    let (.., first) = best[0];
    let other = best.iter().find(|(.., other)| other.component.prefix != first.component.prefix);
    // What has names with dots that differ from the base's by a leading part alone, the map of names
    // tells apart, or says why it cannot.
    if other.is_some() && !modules.iter().any(|module| is_flattened(&module.path)) {
        return Ok(None);
    }
    if let Some((.., other)) = other {
        return Err(Error::adapter(
            adapter.path(),
            format!(
                "its {} ({} and others) fit{} {:?} and {:?} of the base alike, and nothing tells which was \
                 trained; give the directory of the one that was meant as the base",
                if modules.len() == 1 { "module" } else { "modules" },
                modules[0].path,
                if modules.len() == 1 { "s" } else { "" },
                first.component.prefix.trim_end_matches('.'),
                other.component.prefix.trim_end_matches('.'),
            ),
        ));
    }
    Ok(Some(first))
}

/// Refuses two names of one module, and a fused module beside its parts.
fn check_distinct(
    adapter: &Adapter,
    modules: &IndexMap<String, Module>,
    names: &DiffusionNames,
) -> Result<()> {
    let mut known = HashMap::<(String, Option<usize>), &str>::new();
    for (key, module) in modules.iter().filter(|(_, module)| module.parameters.is_empty()) {
        let parameter = format!("{}.{}", module.path, module.leaf());
        let (name, slot) = match names.canonical(&parameter) {
            Some(found) => (found.name.clone(), found.slice.as_ref().map(|slice| slice.slot)),
            None => (parameter, None),
        };
        let whole = (name.clone(), None);
        let before = match slot {
            Some(_) => known.get(&(name.clone(), slot)).or_else(|| known.get(&whole)),
            None => (known.iter().find(|((other, _), _)| *other == name)).map(|(_, key)| key),
        };
        if let Some(other) = before {
            return Err(Error::adapter(
                adapter.path(),
                format!(
                    "has both {other} and {key}, which are one module of the base, or one a part of the \
                     other; keep the one that was meant"
                ),
            ));
        }
        known.insert((name, slot), key);
    }
    Ok(())
}
