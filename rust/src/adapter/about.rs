//! What a listing says of an adapter beside its tensors: what wrote it, what it is made of, which model it
//! fits, and what a merge needs.

use std::collections::BTreeSet;

use indexmap::IndexMap;

use super::formats::parts::{self, Part};
use super::formats::write_parts;
use super::{Adapter, Module};
use crate::checkpoint::names::diffusion::family;
use crate::error::counted;

/// What is known of an adapter by its keys and its metadata.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct About {
    /// What its modules add: `lora`, `locon`, `loha`, …; `mixed` where they are not of one kind.
    pub algorithm: &'static str,
    /// The program that trained it, where its metadata says so.
    pub trainer: Option<String>,
    /// The family of models that it is of, where its modules' names tell.
    pub family: Option<&'static str>,
    /// The components that it changes: `denoiser`, `text_encoder`, ….
    pub components: Vec<String>,
    /// Where its scales come from, in words.
    pub scale: &'static str,
    /// What a merge needs, each in words.
    pub needs: Vec<&'static str>,
}

impl About {
    /// Of an opened adapter.
    pub fn of(adapter: &Adapter) -> Self {
        let metadata = &adapter.file().header().metadata;
        let modules = || {
            let modules = adapter.modules().values();
            modules.map(|module| (module.path.as_str(), (module.outputs(), module.inputs())))
        };
        let family = match adapter.format() {
            "cloneofsimo" => family::of_numbered(modules()),
            _ => family::of(modules()),
        };
        let algorithm = algorithm(adapter);
        Self {
            algorithm,
            trainer: trainer(metadata),
            family,
            components: components(
                adapter,
                family.is_some() || IMAGE_FORMATS.contains(&adapter.format()),
            ),
            scale: scale(adapter),
            needs: needs(adapter, family),
        }
    }
}

/// The algorithm of all modules by the parts that they have.
fn algorithm(adapter: &Adapter) -> &'static str {
    let mut found = BTreeSet::new();
    let mut has_kernel = false;
    for tensor in &adapter.file().header().tensors {
        let Some((_, part, _)) = parts::split(&tensor.name) else { continue };
        has_kernel |= matches!(part, Part::Down | Part::Mid) && tensor.shape.len() > 2;
        found.extend(match part {
            Part::Down | Part::Up | Part::Mid => Some("lora"),
            Part::Hadamard(_) => Some("loha"),
            Part::Kronecker(_) => Some("lokr"),
            Part::Difference | Part::BiasDifference => Some("full"),
            Part::NormDifference | Part::NormBiasDifference => Some("norm"),
            Part::GLora(_) => Some("glora"),
            Part::Ia3 | Part::OnInput => Some("ia3"),
            Part::OrthogonalElements | Part::EmbeddingElements => Some("oft"),
            Part::OrthogonalBlocks => Some(if tensor.shape.len() == 4 { "boft" } else { "oft" }),
            _ => None,
        });
    }
    // Norms and biases come beside whatever else was trained.
    let main = found.iter().copied().filter(|one| !matches!(*one, "norm" | "full"));
    let main: Vec<&'static str> = main.collect();
    match (main.as_slice(), found.len()) {
        (["lora"], _) if has_kernel && adapter.format() != "peft" => "locon",
        ([only], _) => only,
        ([], 1) => found.first().copied().unwrap_or("lora"),
        ([], 0) => "lora",
        _ => "mixed",
    }
}

/// That the scales are smaller than those that were trained, in words, where sd-scripts cut the factors
/// of fused layers apart and kept their alphas (`split_qkv`): the rank that is stored is then 3 or 4
/// times the one that the scale was made with.
pub fn split_scales(adapter: &Adapter) -> Option<String> {
    let arguments = adapter.file().header().metadata.get("ss_network_args")?;
    let arguments: serde_json::Value = serde_json::from_str(arguments).ok()?;
    let is_split = match arguments.get("split_qkv")? {
        serde_json::Value::Bool(flag) => *flag,
        serde_json::Value::String(text) => text.eq_ignore_ascii_case("true"),
        _ => false,
    };
    let found: Vec<_> = adapter.modules().values().filter_map(split_times).collect();
    let (first, times, scaling) = *found.first().filter(|_| is_split)?;
    Some(format!(
        "was trained with split_qkv (ss_network_args), where sd-scripts saves {} of fused layers with the \
         parts' ranks added up and the alphas as they were; by alpha/rank the scale of these is 3 times \
         (qkv) or 4 times (linear1) smaller than the one that was trained (the first: {first}, \
         {scaling}, trained with {}); if it looks too weak, multiply the alphas of these modules",
        counted(found.len(), "module"),
        scaling * times
    ))
}

/// A module of a fused layer with an alpha of its own: its path, how many parts the layer has, and its
/// scale.
fn split_times(module: &Module) -> Option<(&str, f64, f64)> {
    let path = module.path.as_str();
    let ends = |endings: [&str; 2]| endings.iter().any(|ending| path.ends_with(ending));
    let times = match (ends(["_attn_qkv", "_attn.qkv"]), ends(["_linear1", ".linear1"])) {
        (true, _) => 3.0,
        (_, true) => 4.0,
        _ => return None,
    };
    module.scale.as_ref().map(|_| (path, times, module.scaling))
}

/// The program that trained an adapter, by its metadata.
fn trainer(metadata: &IndexMap<String, String>) -> Option<String> {
    let value =
        |key: &str| metadata.get(key).filter(|value| !matches!(value.as_str(), "" | "None"));
    if metadata.keys().any(|key| key.starts_with("ot_") && key != write_parts::LAYOUT) {
        return Some("OneTrainer".to_owned());
    }
    if let Some(software) = value("software") {
        // ai-toolkit writes {"name": "ai-toolkit", …}.
        let name = serde_json::from_str::<serde_json::Value>(software).ok();
        let name = name.and_then(|name| Some(name.get("name")?.as_str()?.to_owned()));
        return Some(name.unwrap_or_else(|| software.clone()));
    }
    if let Some(module) = value("ss_network_module") {
        let of_musubi = value("modelspec.implementation").is_some_and(|by| by.contains("musubi"))
            || module.contains("lora_wan")
            || module.contains("lora_framepack")
            || module.contains("lora_qwen_image");
        let name = if of_musubi { "musubi-tuner" } else { "sd-scripts" };
        return Some(format!("{name} ({module})"));
    }
    if value("lora_adapter_metadata").is_some() {
        return Some("diffusers".to_owned());
    }
    value("modelspec.implementation").cloned()
}

/// Formats of image and video models alone, whose names without a component are a denoiser's.
const IMAGE_FORMATS: [&str; 6] = ["diffusers", "comfyui", "lycoris", "onetrainer", "xlabs", "bfl"];
/// What the names of modules begin with, and the component that it tells.
const COMPONENTS: [(&str, &str); 29] = [
    ("lora_unet_", "denoiser"),
    ("lora_transformer_", "denoiser"),
    ("lora_prior_unet_", "denoiser"),
    ("lora_te_", "text_encoder"),
    ("lora_te1_", "text_encoder"),
    ("lora_te2_", "text_encoder_2"),
    ("lora_te3_", "text_encoder_3"),
    ("lora_prior_te_", "text_encoder"),
    ("model.diffusion_model.", "denoiser"),
    ("diffusion_model.", "denoiser"),
    ("unet.", "denoiser"),
    ("unet:", "denoiser"),
    ("transformer.", "denoiser"),
    ("transformer_2.", "denoiser_2"),
    ("prior.", "denoiser"),
    ("net.", "denoiser"),
    ("text_encoder.", "text_encoder"),
    ("text_encoder:", "text_encoder"),
    ("text_encoder_2.", "text_encoder_2"),
    ("text_encoder_3.", "text_encoder_3"),
    ("text_encoders.clip_l.", "text_encoder"),
    ("text_encoders.clip_h.", "text_encoder"),
    ("text_encoders.clip_g.", "text_encoder_2"),
    ("text_encoders.t5xxl.", "text_encoder_t5"),
    ("text_encoders.", "text_encoder"),
    ("clip_l.", "text_encoder"),
    ("clip_g.", "text_encoder_2"),
    ("t5xxl.", "text_encoder_t5"),
    ("t5.", "text_encoder_t5"),
];

/// The components that an adapter of an image model changes, in order.
fn components(adapter: &Adapter, is_image_model: bool) -> Vec<String> {
    if adapter.format() == "peft" {
        return Vec::new();
    }
    let of = |module: &Module| {
        let path = module.path.as_str();
        let told = COMPONENTS.iter().find(|(beginning, _)| path.starts_with(beginning));
        told.map(|(_, component)| *component).or(is_image_model.then_some("denoiser"))
    };
    let found: BTreeSet<&str> = adapter.modules().values().filter_map(of).collect();
    found.into_iter().map(str::to_owned).collect()
}

/// Where scales come from.
fn scale(adapter: &Adapter) -> &'static str {
    if adapter.semantics().rank_stabilized {
        return "alpha / √rank, by the config";
    }
    let has_alphas = adapter.modules().values().any(|module| module.scale.is_some());
    let metadata = &adapter.file().header().metadata;
    match adapter.format() {
        _ if has_alphas => "alpha / rank, an alpha beside each module",
        "peft" => "alpha / rank, by the config",
        _ if metadata.contains_key("lora_adapter_metadata") => "alpha / rank, by the metadata",
        _ if adapter.modules().values().all(|module| module.scaling == 1.0) => {
            "1, as none is stored"
        }
        _ => "alpha / rank, by the metadata",
    }
}

/// What a merge needs.
fn needs(adapter: &Adapter, family: Option<&str>) -> Vec<&'static str> {
    let mut needs = Vec::new();
    needs.push(match (adapter.format(), family) {
        ("cloneofsimo", _) => {
            "a base in diffusers' or its authors' names, whose layers are counted to find its modules"
        }
        ("peft", _) => "the base that it was trained on",
        (_, Some(_)) => {
            "a base of that family: a directory of diffusers', or one file in its authors' names"
        }
        (_, None) => "a base whose modules have these names",
    });
    if !adapter.obstacles(&[]).is_empty() {
        needs.push("that what cannot be merged is allowed by name (--allow)");
    }
    needs
}
