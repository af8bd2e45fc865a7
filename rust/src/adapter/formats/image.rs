//! Lone files of image and video models' adapters in the names of other trainers than kohya's: diffusers,
//! ComfyUI, LyCORIS, OneTrainer, XLabs, Black Forest Labs, cloneofsimo.
//!
//! They differ in what they call modules and where they keep scales; what a module's tensors are is the
//! same in all ([`super::parts`]). Names are brought to a base's by `adapter/grammar`.

pub mod layout;
mod names;
mod scales;

use std::cell::OnceCell;
use std::path::Path;
use std::sync::Arc;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::parts::{DefaultScale, ModuleParts, Part};
use super::{recognize, write_parts};
use crate::adapter::coverage::{PartUse, Usage};
use crate::adapter::deltas::Rows;
use crate::adapter::format::{Format, GivenScale, Place, WriteOptions};
use crate::adapter::{Adapter, Contents, Directory, Grammar, Module, Role, Saved, Semantics};
use crate::checkpoint::names::wrappers::Wrappers;
use crate::error::{Error, Result};
use crate::parallel::task::Task;
use crate::storage::file_names;
use crate::tensor::safetensors::{Tensor, TensorFile};
use layout::{Layout, Recognized};
use names::Key;
use scales::Scales;

/// The file that diffusers' training scripts write.
const WEIGHTS: &str = "pytorch_lora_weights.safetensors";
/// Why cloneofsimo's files are not written.
pub const NUMBERED: &str = "cannot be written in the format cloneofsimo, whose layers have a number and no name: \
     the order in which they are counted is another in each release of diffusers, and no file says which";
/// Keys that a message lists.
const LISTED: usize = 4;

/// One of these formats.
#[derive(Debug)]
pub struct ImageFormat(Layout);

/// diffusers'.
pub const DIFFUSERS: ImageFormat = ImageFormat(Layout::Diffusers);
/// ComfyUI's.
pub const COMFY_UI: ImageFormat = ImageFormat(Layout::ComfyUi);
/// LyCORIS's.
pub const LYCORIS: ImageFormat = ImageFormat(Layout::Lycoris);
/// OneTrainer's.
pub const ONE_TRAINER: ImageFormat = ImageFormat(Layout::OneTrainer);
/// XLabs'.
pub const XLABS: ImageFormat = ImageFormat(Layout::XLabs);
/// Black Forest Labs'.
pub const BFL: ImageFormat = ImageFormat(Layout::Bfl);
/// cloneofsimo's.
pub const CLONE_OF_SIMO: ImageFormat = ImageFormat(Layout::CloneOfSimo);

/// The one file of a place, looked at once for all formats.
#[derive(Debug, Default)]
pub struct LoneFile(OnceCell<Option<(Arc<TensorFile>, Recognized)>>);

impl LoneFile {
    fn of<'a>(place: &'a Place<'_>) -> Option<&'a (Arc<TensorFile>, Recognized)> {
        let look = || {
            // What cannot be read is no file of these formats; whoever reads it says what it is.
            let file = open(place).ok()?;
            let header = file.header();
            let names = header.tensors.iter().map(|tensor| tensor.name.as_str());
            let found = layout::recognize(names, header.metadata.keys().map(String::as_str));
            Some((file, found))
        };
        place.lone_file.0.get_or_init(look).as_ref()
    }
}

/// Why nothing tells the format of what lies at a place, if that is so, in words.
pub fn ambiguity(place: &Place<'_>) -> Option<String> {
    let (_, Recognized::Ambiguous(told)) = LoneFile::of(place)? else { return None };
    let each = told.iter().map(|(layout, key)| format!("{} ({key})", layout.name()));
    Some(format!(
        "has keys in the names of several formats: {}; say which one it is (format=, --format), or take \
         apart what was put together",
        each.collect::<Vec<_>>().join(", ")
    ))
}

/// The weights of a place.
fn open(place: &Place<'_>) -> Result<Arc<TensorFile>> {
    if place.source.pickle.is_some() {
        return place.pickled();
    }
    let name = weights(place);
    if !name.ends_with(".safetensors") || !place.store.is_file(&name) {
        return Err(Error::adapter(place.path(), "holds no one file of weights"));
    }
    place.open(&name)
}

/// The file that was asked for, or the one that the directory has.
fn weights(place: &Place<'_>) -> String {
    if let Some(file) = &place.file {
        return file.clone();
    }
    let found = place.store.list().unwrap_or_default();
    if found.iter().any(|name| name == WEIGHTS) {
        return WEIGHTS.to_owned();
    }
    let [config, ..] = file_names::OF_A_MODEL;
    if found.iter().any(|name| name == config) {
        return String::new();
    }
    let mut weights = found.into_iter().filter(|name| name.ends_with(".safetensors"));
    match (weights.next(), weights.next()) {
        (Some(only), None) => only,
        _ => String::new(),
    }
}

impl Format for ImageFormat {
    fn name(&self) -> &'static str {
        self.0.name()
    }

    fn detect(&self, place: &Place<'_>) -> Result<bool> {
        if let Some(problem) = ambiguity(place) {
            return Err(Error::adapter(place.path(), problem));
        }
        let found = LoneFile::of(place).map(|(_, found)| found);
        Ok(found == Some(&Recognized::As(self.0)))
    }

    fn weights(&self, place: &Place<'_>) -> String {
        weights(place)
    }

    fn write(&self, adapter: &Adapter, target: &Path, options: &WriteOptions<'_>) -> Result<()> {
        let style = match self.0 {
            Layout::Diffusers => &write_parts::DIFFUSERS,
            Layout::ComfyUi => &write_parts::COMFYUI,
            Layout::Lycoris => &write_parts::LYCORIS,
            Layout::OneTrainer => &write_parts::ONE_TRAINER,
            Layout::XLabs => &write_parts::XLABS,
            Layout::Bfl => &write_parts::BFL,
            Layout::Kohya => &write_parts::KOHYA,
            Layout::CloneOfSimo => {
                return Err(Error::unsupported(adapter.path(), NUMBERED));
            }
        };
        write_parts::write_parts(adapter, target, style, options)
    }

    fn read(&self, place: &Place<'_>, task: &Task) -> Result<Adapter> {
        let file = match LoneFile::of(place) {
            Some((file, _)) => file.clone(),
            None => open(place)?,
        };
        recognize::check_gathered(&file)?;
        let scales = Scales::read(file.path(), &file.header().metadata)?;
        let sorted = sort(&file, place, task)?;
        let has_alphas = sorted.groups.values().any(|group| group.parts.get(Part::Alpha).is_some());
        let fallback = match place.source.scale {
            GivenScale::Alpha(alpha) => DefaultScale::Alpha(alpha),
            GivenScale::Factor(scaling) => DefaultScale::Factor { scaling, alpha: f64::NAN },
            GivenScale::Refused | GivenScale::Unknown => DefaultScale::One,
        };
        let is_given = fallback != DefaultScale::One && scales.is_empty() && !has_alphas;
        let fallback = if is_given { fallback } else { DefaultScale::One };
        let mut others = sorted.others;
        let mut modules = IndexMap::with_capacity(sorted.groups.len());
        for (name, group) in sorted.groups {
            task.check()?;
            others.extend(group.parts.unused().map(|one| (one.name.clone(), Role::Unused)));
            let rule = scales.rule(&name, &group.parts, fallback)?;
            for module in group.parts.module(&name, &name, &rule)? {
                for module in parted(module, group.is_fused, &file)? {
                    modules.insert(module.key.clone(), module);
                }
            }
        }
        let mut fields = scales.fields();
        if others.iter().any(|(_, role)| *role == Role::Embedding) {
            let reason = "holds embeddings of a textual inversion (bundle_emb), which a merge leaves out; \
                          allow bundle_emb to merge the rest";
            fields.push(PartUse::new("bundle_emb", (Usage::Refused, reason)));
        }
        let is_dotted = modules.values().any(|module| module.path.contains('.'));
        let metadata = &file.header().metadata;
        let named = |key: &str| metadata.get(key).filter(|value| *value != "None").cloned();
        let of_trainer = || named("ss_sd_model_name").or_else(|| named("ss_base_model_version"));
        let mut semantics = Semantics { scale_is_given: is_given, ..scales.semantics() };
        semantics.base = semantics.base.or_else(of_trainer);
        let settings: Map<String, Value> =
            metadata.iter().map(|(key, value)| (key.clone(), value.as_str().into())).collect();
        let mut notes = Vec::new();
        if scales.is_empty() && !has_alphas && !is_given {
            notes.push(
                "no scale is stored, so that it is 1, as programs that load it take it".into(),
            );
        }
        Ok(Adapter::new(Contents {
            path: place.path().to_path_buf(),
            format: self.name(),
            summary: summary(&modules, &semantics),
            modules,
            saved: sorted.saved,
            rows: Vec::new(),
            others,
            notes,
            semantics,
            grammar: if is_dotted { Grammar::Dotted } else { Grammar::Flattened },
            fields,
            settings,
            read_from: Vec::new(),
            // A file that was asked for may lie among others.
            directory: match place.file {
                None => Some(Directory::new(place.store.clone(), None, weights(place))),
                Some(_) => None,
            },
            file,
        }))
    }
}

/// The tensors of one module.
#[derive(Default)]
struct Group {
    parts: ModuleParts,
    /// Whether it is of q, k and v alone in a layer that has more.
    is_fused: bool,
}

/// A file's tensors by what they are.
#[derive(Default)]
struct Sorted {
    groups: IndexMap<String, Group>,
    saved: Vec<Saved>,
    others: Vec<(String, Role)>,
}

fn sort(file: &Arc<TensorFile>, place: &Place<'_>, task: &Task) -> Result<Sorted> {
    let wrappers = Wrappers::of(place.base);
    let mut sorted = Sorted::default();
    let mut unknown = Vec::new();
    for tensor in &file.header().tensors {
        task.check()?;
        let one = || Tensor::new(file.clone(), tensor.clone());
        let (module, part, is_fused) = match names::read(&tensor.name, &wrappers) {
            Key::Part { module, part } => (module, part, false),
            Key::Fused { module, part } => (module, part, true),
            Key::Embedding => {
                sorted.others.push((tensor.name.clone(), Role::Embedding));
                continue;
            }
            Key::Unknown => {
                match names::is_of_norm(&tensor.name) {
                    true => sorted.saved.push(saved(one())),
                    false => unknown.push(tensor.name.as_str()),
                }
                continue;
            }
        };
        let group = sorted.groups.entry(module).or_default();
        group.is_fused |= is_fused;
        group.parts.add(part, one())?;
    }
    // A norm's parameter under its own name replaces the base's.
    let is_whole = |group: &Group| {
        let mut parts = group.parts.tensors().iter();
        parts.all(|(part, _)| matches!(part, Part::Weight | Part::Scale))
    };
    let mut groups = IndexMap::with_capacity(sorted.groups.len());
    for (name, group) in std::mem::take(&mut sorted.groups) {
        if !is_whole(&group) {
            groups.insert(name, group);
            continue;
        }
        for (_, tensor) in group.parts.tensors() {
            match names::is_of_norm(&tensor.name) {
                true => sorted.saved.push(saved(tensor.clone())),
                false => unknown.push(&file.header().tensors[position(file, &tensor.name)].name),
            }
        }
    }
    sorted.groups = groups;
    if unknown.is_empty() && !sorted.groups.is_empty() {
        return Ok(sorted);
    }
    if unknown.is_empty() {
        return Err(Error::adapter(file.path(), "holds nothing that is added to a model"));
    }
    let more = if unknown.len() > LISTED { ", …" } else { "" };
    let listed = unknown[..unknown.len().min(LISTED)].join(", ");
    let problem = format!(
        "holds {} of {} tensors that are no part of an update that is known: {listed}{more}",
        unknown.len(),
        file.header().tensors.len()
    );
    Err(Error::unsupported(file.path(), problem))
}

fn position(file: &TensorFile, name: &str) -> usize {
    let tensors = &file.header().tensors;
    tensors.iter().position(|tensor| tensor.name == name).expect("one of the file's")
}

fn saved(tensor: Tensor) -> Saved {
    Saved { path: tensor.name.clone(), tensor, trained_apart: false }
}

/// The modules of a layer in which q, k, v and an MLP are fused, where only the first three have
/// factors: each has all of A, and its rows of B.
fn parted(module: Module, is_fused: bool, file: &TensorFile) -> Result<Vec<Module>> {
    const PARTS: u64 = 3;
    if !is_fused {
        return Ok(vec![module]);
    }
    let outputs = module.outputs();
    if !outputs.is_multiple_of(PARTS) {
        let problem =
            format!("{} has {outputs} outputs, which are no q, k and v of one size", module.key);
        return Err(Error::adapter(file.path(), problem));
    }
    let size = outputs / PARTS;
    let part = |number: u64| {
        let whole = module.delta.clone();
        let delta = Rows { whole, outputs: number * size..(number + 1) * size };
        let name = |whole: &str| format!("{whole}.{number}");
        Module {
            key: name(&module.key),
            path: name(&module.path),
            delta: Arc::new(delta),
            ..module.clone()
        }
    };
    Ok((0..PARTS).map(part).collect())
}

/// What describes the adapter to a person: the rank and the alpha where all modules have the same.
fn summary(
    modules: &IndexMap<String, Module>,
    semantics: &Semantics,
) -> IndexMap<&'static str, Value> {
    let first = modules.values().next();
    let common = |of: fn(&Module) -> Value| {
        let value = first.map_or(Value::Null, of);
        if modules.values().all(|module| of(module) == value) { value } else { Value::Null }
    };
    IndexMap::from([
        ("type", Value::from("LORA")),
        ("base", semantics.base.as_deref().map_or(Value::Null, Value::from)),
        ("r", common(|module| module.rank.into())),
        ("alpha", common(|module| module.alpha.into())),
        ("rslora", semantics.rank_stabilized.into()),
        ("peft_version", Value::Null),
    ])
}
