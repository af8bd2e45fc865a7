//! What the header of a written file says: what the trainer said, as far as it still holds, and what the
//! programs that read the format look for.

use std::collections::HashMap;
use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::digests::{self, Digests, is_digest};
use super::{Says, Style};
use crate::adapter::format::WriteOptions;
use crate::adapter::{Adapter, Module};
use crate::checkpoint::Checkpoint;
use crate::checkpoint::names::diffusion::family;
use crate::error::Result;
use crate::tensor::safetensors::Tensor;
use crate::tensor::safetensors::write::{Afterwards, write_with};

/// diffusers' ranks and alphas.
const CONFIGS: &str = "lora_adapter_metadata";
/// What other trainers call the alpha of all modules, or of a component's behind its name. Files that
/// are written have each module's scale in its tensors.
const ALPHAS: [&str; 3] = ["lora_alpha", "network_alpha", "alpha"];
/// What OneTrainer's own entries begin with, by which its files are known.
const OF_ONE_TRAINER: &str = "ot_";
/// What says that names are OneTrainer's, in a file that another program wrote.
pub const LAYOUT: &str = "ot_layout";

/// kohya's words for a network.
const DIM: &str = "ss_network_dim";
const ALPHA: &str = "ss_network_alpha";
const MODULE: &str = "ss_network_module";
const ARGUMENTS: &str = "ss_network_args";
/// The module of kohya's scripts that makes plain factors, and those that make others alone.
const PLAIN: &str = "networks.lora";
const OTHERS: [&str; 2] = ["networks.loha", "networks.lokr"];
/// kohya's words for the model.
const MODEL: &str = "ss_sd_model_name";
const BASE: &str = "ss_base_model_version";
const IS_V2: &str = "ss_v2";
/// Those of the specification of models' metadata.
const SPECIFICATION: (&str, &str) = ("modelspec.sai_model_spec", "1.0.0");
const ARCHITECTURE: &str = "modelspec.architecture";

/// A family of models with kohya's word for it, and the specification's as far as the family tells it.
const FAMILIES: [(&str, &str, Option<&str>); 4] = [
    ("sd1", "sd_v1", Some("stable-diffusion-v1/lora")),
    ("sd2", "sd_v2", None),
    ("sdxl", "sdxl_base_v1-0", Some("stable-diffusion-xl-v1-base/lora")),
    ("flux1", "flux1", None),
];
/// What Flux's model with guidance is called, and its layers for that in either naming.
const FLUX_DEV: &str = "flux-1-dev/lora";
const GUIDANCE: [&str; 2] = ["guidance_in.", "guidance_embedder."];

/// Writes the file.
pub(super) fn write(
    adapter: &Adapter,
    target: &Path,
    style: &Style,
    options: &WriteOptions<'_>,
    mut tensors: Vec<(String, Tensor)>,
) -> Result<()> {
    let mut metadata = kept(adapter, style.name);
    correct(&mut metadata, adapter);
    metadata.insert("format".to_owned(), "pt".to_owned());
    match style.says {
        Says::Nothing => {}
        Says::Configs => {
            let text = Value::Object(lora_config(adapter)).to_string();
            metadata.insert(CONFIGS.to_owned(), text);
        }
        Says::Network => complete(&mut metadata, adapter, options.base),
        Says::OneTrainer => {
            metadata.entry(LAYOUT.to_owned()).or_insert_with(|| "legacy".to_owned());
        }
    }
    let mut names: Vec<&str> = adapter.settings().keys().map(String::as_str).collect();
    if style.says == Says::Network {
        names.extend(digests::OF_KOHYA);
    }
    let digests = Digests::of(&names);
    metadata.extend(digests.placeholders());
    let is_digested = metadata.keys().any(|key| is_digest(key));
    if is_digested {
        digests::sort(&mut tensors);
    }
    let afterwards = is_digested.then(|| Box::new(digests) as Box<dyn Afterwards>);
    write_with(target, metadata, tensors, afterwards)
}

/// Whether a file in a format of that name has no place for an entry of another's metadata.
fn has_no_place(key: &str, format: &str) -> bool {
    let field = key.rsplit_once('.').map_or(key, |(_, field)| field);
    let is_of_one_trainer = key.starts_with(OF_ONE_TRAINER) && format != "onetrainer";
    is_of_one_trainer || ALPHAS.contains(&field) || key == CONFIGS
}

/// The entries of an adapter's metadata that a file in a format of that name does not have: by which it
/// would be taken for one in the source's format, or which tell scales that are in its tensors.
pub fn left_out<'a>(adapter: &'a Adapter, format: &'a str) -> impl Iterator<Item = &'a str> {
    let keys = adapter.settings().keys().map(String::as_str);
    // Scales are in the tensors, where they are lost to nobody.
    keys.filter(move |key| key.starts_with(OF_ONE_TRAINER) && has_no_place(key, format))
        .filter(|key| *key != LAYOUT)
}

/// The trainer's own words. Of one whose settings are a file's metadata, all are texts.
fn kept(adapter: &Adapter, format: &str) -> IndexMap<String, String> {
    let settings = adapter.settings();
    if !settings.values().all(Value::is_string) {
        return IndexMap::new();
    }
    let kept = settings.iter().filter(|(key, _)| !is_digest(key) && !has_no_place(key, format));
    kept.map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned())).collect()
}

/// Mends what kohya's scripts said of a network that is another one now: a rank that no module has any
/// more, an algorithm that became plain factors.
fn correct(metadata: &mut IndexMap<String, String>, adapter: &Adapter) {
    let is_plain = adapter.modules().values().all(|module| module.delta.plain().is_some());
    if !is_plain {
        return;
    }
    let Some((rank, alpha)) = commonest(adapter) else { return };
    let told = metadata.get(DIM).and_then(|text| text.trim().parse::<u64>().ok());
    let has = |told: u64| adapter.modules().values().any(|module| module.rank == told);
    if metadata.contains_key(DIM) && !told.is_some_and(has) {
        metadata.insert(DIM.to_owned(), rank.to_string());
        if metadata.contains_key(ALPHA) {
            metadata.insert(ALPHA.to_owned(), alpha_text(alpha));
        }
    }
    if let Some(module) = metadata.get_mut(MODULE).filter(|module| OTHERS.contains(&&***module)) {
        PLAIN.clone_into(module);
    }
    let Some(text) = metadata.get(ARGUMENTS) else { return };
    let Ok(mut arguments) = serde_json::from_str::<Map<String, Value>>(text) else { return };
    let algorithm = arguments.get("algo").and_then(Value::as_str);
    if algorithm.is_some_and(|name| !matches!(name, "lora" | "locon")) {
        arguments.insert("algo".to_owned(), "locon".into());
        metadata.insert(ARGUMENTS.to_owned(), Value::Object(arguments).to_string());
    }
}

/// What kohya's scripts say of a network and its model, and programs look for, where it is not there:
/// A1111 takes a file for one of Stable Diffusion 1 unless it says another model.
fn complete(metadata: &mut IndexMap<String, String>, adapter: &Adapter, base: Option<&Checkpoint>) {
    let mut add = |key: &str, value: String| {
        metadata.entry(key.to_owned()).or_insert(value);
    };
    if let Some((rank, alpha)) = commonest(adapter) {
        add(DIM, rank.to_string());
        add(ALPHA, alpha_text(alpha));
    }
    if let Some(base) = &adapter.semantics().base {
        // Of a path they keep the name.
        let is_path = base.starts_with(['/', '.', '~']) || base.contains('\\');
        let name = base.rsplit(['/', '\\']).find(|part| !part.is_empty()).unwrap_or(base);
        add(MODEL, if is_path { name.to_owned() } else { base.clone() });
    }
    let Some(family) = family_of(adapter, base) else { return };
    let Some((_, version, architecture)) = FAMILIES.iter().find(|(name, ..)| *name == family)
    else {
        return;
    };
    add(BASE, (*version).to_owned());
    add(IS_V2, if family == "sd2" { "True" } else { "False" }.to_owned());
    let has_guidance = || {
        let names = || base.into_iter().flat_map(|base| base.tensors().keys());
        names().any(|name| GUIDANCE.iter().any(|layer| name.contains(layer)))
    };
    let architecture = match architecture {
        None if family == "flux1" && has_guidance() => Some(FLUX_DEV),
        known => *known,
    };
    if let Some(architecture) = architecture {
        add(SPECIFICATION.0, SPECIFICATION.1.to_owned());
        add(ARCHITECTURE, architecture.to_owned());
    }
}

/// The family of models that an adapter is of: by its own modules, else by the base's.
fn family_of(adapter: &Adapter, base: Option<&Checkpoint>) -> Option<&'static str> {
    let modules = adapter.modules().values();
    let own = family::of(
        modules.map(|module| (module.key.as_str(), (module.outputs(), module.inputs()))),
    );
    let of_base = || {
        let base = base?;
        let shape = |name: &str| {
            let (outputs, inputs) = base.tensor(name)?.shape.split_first()?;
            Some((*outputs, inputs.iter().product()))
        };
        let layers = base.tensors().keys();
        family::of(layers.filter_map(|name| Some((name.strip_suffix(".weight")?, shape(name)?))))
    };
    match own {
        Some("unet") => of_base().or(own),
        own => own,
    }
}

/// The rank and the alpha that most of the plain products have.
fn commonest(adapter: &Adapter) -> Option<(u64, f64)> {
    let mut counts = HashMap::<(u64, u64), usize>::new();
    for module in adapter.modules().values().filter(|module| module.delta.plain().is_some()) {
        let alpha = module.scaling * module.rank as f64;
        *counts.entry((module.rank, alpha.to_bits())).or_default() += 1;
    }
    let most = counts.into_iter().max_by_key(|(pair, count)| (*count, *pair))?;
    Some((most.0.0, f64::from_bits(most.0.1)))
}

/// An alpha as Python writes it.
fn alpha_text(alpha: f64) -> String {
    format!("{alpha:?}")
}

/// The fields of PEFT's config of each component, each under its component's name.
fn lora_config(adapter: &Adapter) -> Map<String, Value> {
    let mut components = IndexMap::<&str, Vec<(&str, &Module)>>::new();
    for module in adapter.modules().values() {
        let (component, body) = module.key.split_once('.').unwrap_or(("", &module.key));
        components.entry(component).or_default().push((body, module));
    }
    let mut fields = Map::new();
    for (component, modules) in components {
        let ranks: Vec<u64> = modules.iter().map(|(_, module)| module.rank).collect();
        let count = |rank: &u64| ranks.iter().filter(|other| *other == rank).count();
        let rank = ranks.iter().copied().max_by_key(|rank| (count(rank), *rank)).unwrap_or(1);
        let others = || modules.iter().filter(|(_, module)| module.rank != rank);
        let pattern: Map<String, Value> =
            others().map(|(body, module)| ((*body).to_owned(), module.rank.into())).collect();
        let targets: Vec<Value> = modules.iter().map(|(body, _)| (*body).into()).collect();
        let dora = modules.iter().any(|(_, module)| module.magnitude.is_some());
        let bias = modules.iter().any(|(_, module)| module.bias.is_some());
        for (field, value) in [
            ("r", rank.into()),
            ("lora_alpha", rank.into()),
            ("rank_pattern", Value::Object(pattern.clone())),
            ("alpha_pattern", Value::Object(pattern)),
            ("target_modules", Value::Array(targets)),
            ("use_dora", dora.into()),
            ("lora_bias", bias.into()),
            ("use_rslora", false.into()),
        ] {
            fields.insert(format!("{component}.{field}"), value);
        }
    }
    fields
}
