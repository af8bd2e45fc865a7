//! The writer of files of one tensor a part, in the spelling of the programs that read them.

use std::path::Path;

use indexmap::IndexMap;
use serde_json::{Map, Value};

use super::parts::{self, Part, Spelling};
use crate::adapter::factors::times;
use crate::adapter::format::WriteOptions;
use crate::adapter::{Adapter, LayerKind, Module};
use crate::error::{Error, Result};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::{Tensor, write};

/// Where a scale goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleGoes {
    /// Beside the factors, as an alpha.
    ToAlpha,
    /// Into the second factor, for programs that read no alpha.
    IntoFactor,
}

/// How a program spells the parts of a module.
#[derive(Debug, Clone, Copy)]
pub struct Style {
    /// The name of the format, for messages.
    pub name: &'static str,
    /// The spelling of a plain LoRA's parts.
    pub spelling: Spelling,
    /// What DoRA's magnitudes are called.
    pub magnitude: &'static str,
    /// Where a module's scale goes.
    pub scale: ScaleGoes,
}

/// kohya's scripts, and LyCORIS within them.
pub const KOHYA: Style = Style {
    name: "kohya",
    spelling: Spelling::Kohya,
    magnitude: ".dora_scale",
    scale: ScaleGoes::ToAlpha,
};
/// ComfyUI.
pub const COMFYUI: Style = Style {
    name: "comfyui",
    spelling: Spelling::Peft,
    magnitude: ".dora_scale",
    scale: ScaleGoes::ToAlpha,
};
/// diffusers.
pub const DIFFUSERS: Style = Style {
    name: "diffusers",
    spelling: Spelling::Peft,
    magnitude: ".lora_magnitude_vector",
    scale: ScaleGoes::IntoFactor,
};

/// Metadata that holds digests of the file that it was in.
const DIGESTS: [&str; 3] = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"];
/// Whether an entry of a file's metadata is a digest of the file.
pub fn is_digest(key: &str) -> bool {
    DIGESTS.contains(&key)
}

/// diffusers' metadata.
const DIFFUSERS_METADATA: &str = "lora_adapter_metadata";

/// Writes the modules of an adapter, each under its key.
///
/// # Errors
/// [`Error::Unsupported`] with what cannot be said in that style, [`Error::Io`].
pub fn write_parts(
    adapter: &Adapter,
    target: &Path,
    style: &Style,
    options: &WriteOptions<'_>,
) -> Result<()> {
    let mut tensors = Vec::new();
    for module in adapter.modules().values() {
        for (ending, tensor) in parts_of(adapter, module, style, options)? {
            let name = format!("{}{ending}", key_of(module));
            tensors.push((name, tensor));
        }
    }
    write::write(target, metadata(adapter, style), tensors)
}

/// Whether a module's tensors are parts that these files have, beyond a plain product's: those of
/// LoHa, LoKr, Tucker's form, and of what is no product.
pub fn has_own_parts(module: &Module) -> bool {
    let tensors = module.delta.tensors();
    let part = |(_, tensor): &(&str, &Tensor)| parts::split(&tensor.name).map(|(_, part, _)| part);
    let parts: Option<Vec<Part>> = tensors.iter().map(part).collect();
    let is_plain = |part: &Part| matches!(part, Part::Down | Part::Up | Part::UpBias);
    parts.is_some_and(|parts| !parts.iter().all(is_plain))
}

/// A module's key; a bias is a part of its layer.
fn key_of(module: &Module) -> &str {
    match module.kind {
        LayerKind::Bias => module.key.strip_suffix(".bias").unwrap_or(&module.key),
        _ => &module.key,
    }
}

/// A module's tensors with the endings of their names.
fn parts_of(
    adapter: &Adapter,
    module: &Module,
    style: &Style,
    options: &WriteOptions<'_>,
) -> Result<Vec<(&'static str, Tensor)>> {
    let refused = |what: &str| {
        Error::unsupported(
            adapter.path(),
            format!("{what} {}, which the format {} has no name for", module.path, style.name),
        )
    };
    let ending = |part| parts::ending(part, style.spelling).ok_or_else(|| refused("changes"));
    let mut found = Vec::new();
    if let Some((down, up)) = module.delta.plain() {
        let folds = style.scale == ScaleGoes::IntoFactor;
        let up = if folds { times(up, module.scaling)? } else { up.clone() };
        found.push((ending(Part::Down)?, options.cast(down)?));
        found.push((ending(Part::Up)?, options.cast(&up)?));
        if !folds {
            found.push((ending(Part::Alpha)?, alpha_of(module)?));
        }
    } else {
        if style.scale == ScaleGoes::IntoFactor || !has_own_parts(module) {
            return Err(refused("adds no plain product to"));
        }
        for (_, tensor) in module.delta.tensors() {
            let (_, part, _) =
                parts::split(&tensor.name).ok_or_else(|| refused("has factors of its own for"))?;
            found.push((ending(part)?, options.cast(tensor)?));
        }
        if module.scale.is_some() || module.scaling != 1.0 {
            found.push((ending(Part::Alpha)?, alpha_of(module)?));
        }
    }
    if let Some(magnitude) = &module.magnitude {
        found.push((style.magnitude, options.cast(&shaped(magnitude, module, style)?)?));
    }
    if let Some(bias) = &module.bias {
        let own = parts::ending(Part::UpBias, style.spelling);
        let own = own.ok_or_else(|| refused("has a bias on the second factor of"))?;
        let folds = style.scale == ScaleGoes::IntoFactor;
        let bias = if folds { times(bias, module.scaling)? } else { bias.clone() };
        found.push((own, options.cast(&bias)?));
    }
    Ok(found)
}

/// Magnitudes of outputs in the shape that the style has: (out) for diffusers; (out, 1…) for LyCORIS,
/// whose readers tell outputs from inputs by it.
fn shaped(magnitude: &Tensor, module: &Module, style: &Style) -> Result<Tensor> {
    let outputs = module.outputs();
    if magnitude.elements() != outputs {
        return Ok(magnitude.clone());
    }
    let ones = module.delta.input_shape().len();
    let shape = match (style.scale, ones) {
        (ScaleGoes::IntoFactor, 1) => vec![outputs],
        (ScaleGoes::IntoFactor, ones) => {
            [1, outputs].into_iter().chain(std::iter::repeat_n(1, ones - 1)).collect()
        }
        (ScaleGoes::ToAlpha, ones) => {
            std::iter::once(outputs).chain(std::iter::repeat_n(1, ones)).collect()
        }
    };
    let (name, dtype) = (magnitude.name.clone(), magnitude.dtype.clone());
    Tensor::in_memory(magnitude.file().path(), name, dtype, shape, magnitude.read()?)
}

/// The alpha that gives a module's scale, α/r, in the narrowest type that holds it.
pub(super) fn alpha_of(module: &Module) -> Result<Tensor> {
    if let Some(stored) = module.scale.as_ref().filter(|stored| is_alpha(stored)) {
        return Ok(stored.clone());
    }
    let alpha = module.scaling * module.rank as f64;
    let narrow = alpha as f32;
    let (dtype, bytes) = if f64::from(narrow) == alpha {
        (Dtype::F32, narrow.to_le_bytes().to_vec())
    } else {
        (Dtype::F64, alpha.to_le_bytes().to_vec())
    };
    Tensor::in_memory(Path::new("alpha"), "alpha", dtype, Vec::new(), bytes)
}

/// Whether a tensor is an alpha, and no scale.
fn is_alpha(tensor: &Tensor) -> bool {
    matches!(parts::split(&tensor.name), Some((_, Part::Alpha, _)))
}

/// What the file's header says of it: the trainer's own words without digests, and for diffusers the
/// ranks, by component, with alphas that make every scale one.
fn metadata(adapter: &Adapter, style: &Style) -> IndexMap<String, String> {
    let mut metadata = IndexMap::new();
    // Of a trainer whose settings are a file's metadata, all are texts.
    let settings = adapter.settings();
    if settings.values().all(Value::is_string) {
        let kept = settings.iter().filter(|(key, _)| {
            !DIGESTS.contains(&key.as_str()) && *key != DIFFUSERS_METADATA && *key != "format"
        });
        metadata.extend(
            kept.map(|(key, value)| (key.clone(), value.as_str().unwrap_or_default().to_owned())),
        );
    }
    metadata.insert("format".to_owned(), "pt".to_owned());
    if style.scale == ScaleGoes::IntoFactor {
        let text = Value::Object(lora_config(adapter)).to_string();
        metadata.insert(DIFFUSERS_METADATA.to_owned(), text);
    }
    metadata
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
