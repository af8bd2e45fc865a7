//! Names of the modules of diffusion models: those that diffusers gives them, and those of the models'
//! authors, which single files and ComfyUI have.
//!
//! Of a base at hand every parameter is known in both, so that an adapter in either is brought to the
//! base's own by looking names up, never by taking them apart: flattened names cannot be taken apart.

mod families;
pub mod family;
mod rules;
mod unet;

use std::collections::{BTreeSet, HashMap};

use families::Side;
use rules::{to_diffusers, to_original};

use super::canonical::{Canonical, Lie, SliceIndex};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::components::{Component, ComponentKind};

/// The parameters of the components of a base in every naming.
#[derive(Debug, Clone)]
pub struct DiffusionNames {
    components: Vec<ComponentNames>,
    /// By every full name of a parameter, in either naming: the author's, and which part of it.
    canonical: HashMap<String, Canonical>,
    /// By the author's full name of a parameter: diffusers' names of it, or of its parts.
    diffusers: HashMap<String, Vec<Option<String>>>,
}

/// One component's modules in every naming.
#[derive(Debug, Clone)]
pub struct ComponentNames {
    /// What it does.
    pub kind: ComponentKind,
    /// What its tensors' names begin with in the base.
    pub prefix: String,
    /// Its namings: the base's own first.
    pub schemes: Vec<Scheme>,
}

/// The modules of a component in one naming.
#[derive(Debug, Clone, Default)]
pub struct Scheme {
    /// By a module's name without the component's prefix: its full name, which may be that of the part
    /// of a module that this naming has no other name for.
    modules: HashMap<String, String>,
    /// The same by flattened names; `None` where two of them flatten alike.
    flattened: HashMap<String, Option<String>>,
    /// By a parameter's name without the prefix: its full name.
    parameters: HashMap<String, String>,
}

impl ComponentNames {
    /// Whether it is a UNet.
    pub fn is_unet(&self) -> bool {
        self.has("conv_in.weight") || self.has("input_blocks.0.0.weight")
    }

    /// Whether a UNet takes conditions beside the prompt, as Stable Diffusion XL's does.
    pub fn has_added_conditions(&self) -> bool {
        self.has("add_embedding.linear_1.weight") || self.has("label_emb.0.0.weight")
    }

    fn has(&self, name: &str) -> bool {
        self.schemes.iter().any(|scheme| scheme.parameter(name).is_some())
    }
}

impl Scheme {
    fn add(&mut self, name: &str, full: String) {
        let of = |name: &str| name.rsplit_once('.').map(|(module, _)| module.to_owned());
        if let (Some(module), Some(full)) = (of(name), of(&full)) {
            self.add_module(module, full);
        }
        self.parameters.insert(name.to_owned(), full);
    }

    fn add_module(&mut self, module: String, full: String) {
        self.flattened
            .entry(module.replace('.', "_"))
            .and_modify(|known| {
                if known.as_ref().is_some_and(|known| *known != full) {
                    *known = None;
                }
            })
            .or_insert_with(|| Some(full.clone()));
        self.modules.insert(module, full);
    }

    /// Every module's name without the component's prefix, with its full name.
    pub fn modules(&self) -> impl Iterator<Item = (&str, &str)> {
        self.modules.iter().map(|(name, full)| (name.as_str(), full.as_str()))
    }

    /// The full name of the module of that name, with dots or flattened.
    pub fn module(&self, name: &str, is_flattened: bool) -> Option<&str> {
        let find = |name: &str| match is_flattened {
            true => self.flattened.get(name)?.as_deref(),
            false => self.modules.get(name).map(String::as_str),
        };
        // transformers 5.6 took this part out of CLIPTextModel's names in memory.
        let inner = if is_flattened { "text_model_" } else { "text_model." };
        let shorter = || find(name.strip_prefix(inner)?);
        find(name).or_else(shorter).or_else(|| find(&format!("{inner}{name}")))
    }

    /// The full name of the parameter of that name.
    pub fn parameter(&self, name: &str) -> Option<&str> {
        self.parameters.get(name).map(String::as_str)
    }
}

impl DiffusionNames {
    /// Of the components of a base; `None` where it has none.
    pub fn of(base: &Checkpoint) -> Option<Self> {
        let components = base.components();
        if components.is_empty() {
            return None;
        }
        let mut names =
            Self { components: Vec::new(), canonical: HashMap::new(), diffusers: HashMap::new() };
        for component in &components {
            names.add(base, component, &components);
        }
        Some(names)
    }

    /// The components.
    pub fn components(&self) -> &[ComponentNames] {
        &self.components
    }

    /// The component that has a parameter or a module of that full name.
    pub fn component_of(&self, name: &str) -> Option<&ComponentNames> {
        let owns = |component: &&ComponentNames| name.starts_with(&component.prefix);
        self.components.iter().filter(owns).max_by_key(|component| component.prefix.len())
    }

    /// diffusers' full names of a parameter of the author's: one, or those of its parts in their order,
    /// as far as they are known. Empty where both call it the same.
    pub fn diffusers_names(&self, original: &str) -> &[Option<String>] {
        self.diffusers.get(original).map_or(&[], Vec::as_slice)
    }

    /// The canonical name of a parameter: the author's.
    pub fn canonical(&self, parameter: &str) -> Option<&Canonical> {
        self.canonical.get(parameter)
    }

    fn add(&mut self, base: &Checkpoint, component: &Component, all: &[Component]) {
        let prefix = component.prefix.as_str();
        let is_others = |name: &str| {
            let longer = all.iter().filter(|other| other.prefix.len() > prefix.len());
            longer.into_iter().any(|other| name.starts_with(&other.prefix))
        };
        let own: BTreeSet<&str> = (base.tensors().keys())
            .filter(|name| !is_others(name))
            .filter_map(|name| name.strip_prefix(prefix))
            .collect();
        let found = match component.kind {
            ComponentKind::Denoiser | ComponentKind::TextEncoder(_) => families::find(&own),
            ComponentKind::Vae | ComponentKind::Other => None,
        };
        let full = |name: &str| format!("{prefix}{name}");
        let (mut ours, mut theirs) = (Scheme::default(), Scheme::default());
        for name in &own {
            ours.add(name, full(name));
        }
        if let Some(families::Found { rules, side }) = found {
            for name in &own {
                match side {
                    Side::Diffusers => {
                        let Some((original, slot, lie)) = to_original(&rules, name) else {
                            continue;
                        };
                        let slice = slice(slot.index, slot.count);
                        theirs.add(&original, full(&original));
                        self.insert(full(&original), full(&original), None, Lie::Same);
                        self.insert(full(name), full(&original), slice, lie);
                        let parts = self.diffusers.entry(full(&original)).or_default();
                        parts.resize(slot.count, None);
                        parts[slot.index] = Some(full(name));
                        if slot.count > 1 {
                            theirs.add_part(&original, slot.index, &full(name));
                        }
                    }
                    Side::Original => {
                        let Some((parts, lie)) = to_diffusers(&rules, name) else { continue };
                        self.insert(full(name), full(name), None, Lie::Same);
                        let known = parts.iter().map(|part| Some(full(part))).collect();
                        self.diffusers.insert(full(name), known);
                        for (index, part) in parts.iter().enumerate() {
                            theirs.add(part, full(part));
                            self.insert(full(part), full(name), slice(index, parts.len()), lie);
                            if parts.len() > 1 {
                                ours.add_part(name, index, &full(part));
                            }
                        }
                    }
                }
            }
        }
        let schemes = [ours, theirs].into_iter().filter(|scheme| !scheme.parameters.is_empty());
        self.components.push(ComponentNames {
            kind: component.kind,
            prefix: prefix.to_owned(),
            schemes: schemes.collect(),
        });
    }

    /// The first meaning of a name is kept: the base's own names are in one naming alone.
    fn insert(&mut self, known_as: String, name: String, slice: Option<SliceIndex>, lie: Lie) {
        self.canonical.entry(known_as).or_insert(Canonical { name, slice, lie, obstacle: None });
    }
}

impl Scheme {
    /// OneTrainer's name of a part of a module: its number behind the name of the whole.
    fn add_part(&mut self, whole: &str, index: usize, full: &str) {
        let module = |name: &str| name.rsplit_once('.').map(|(module, _)| module.to_owned());
        if let (Some(whole), Some(full)) = (module(whole), module(full)) {
            self.add_module(format!("{whole}.{index}"), full);
        }
    }
}

/// One of the parts of a fused parameter: q, k and v, of which k and v are of one size; the same and
/// an MLP's first layer, where q has that size as well; k and v alone.
fn slice(slot: usize, slots: usize) -> Option<SliceIndex> {
    let alike = match slots {
        2 => 0..2,
        3 => 1..3,
        _ => 0..slots.min(3),
    };
    (slots > 1).then_some(SliceIndex { expert: None, slot, slots, alike })
}
