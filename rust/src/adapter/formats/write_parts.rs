//! The writer of files of one tensor a part, in the spelling of the programs that read them.

mod digests;
mod metadata;
pub mod xlabs;

use std::path::Path;

use super::parts::{self, Part, Spelling};
use crate::adapter::factors::times;
use crate::adapter::format::WriteOptions;
use crate::adapter::{Adapter, LayerKind, Module, computed};
use crate::error::{Error, Result};
use crate::tensor::dtype::Dtype;
use crate::tensor::safetensors::Tensor;
pub use digests::is_digest;
pub use metadata::{LAYOUT, left_out as metadata_left_out};

/// Where a scale goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum ScaleGoes {
    /// Beside the factors, as an alpha.
    ToAlpha,
    /// Into the second factor, for programs that read no alpha.
    IntoFactor,
}

/// How a program names a module beside the endings of its parts.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Modules {
    /// By its key.
    ByKey,
    /// As XLabs' trainer does: by the processor of the attention that it is of.
    ByProcessor,
}

/// What a program writes into the header of its files beside what the trainer wrote.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Says {
    /// Nothing.
    Nothing,
    /// diffusers' ranks and alphas by component.
    Configs,
    /// What kohya's scripts say of a network and the model that it is of, and digests of the file.
    Network,
    /// That the names are OneTrainer's.
    OneTrainer,
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
    /// How modules are named.
    pub modules: Modules,
    /// What the header says.
    pub says: Says,
}

/// kohya's scripts, and LyCORIS within them.
pub const KOHYA: Style = Style {
    name: "kohya",
    spelling: Spelling::Kohya,
    magnitude: ".dora_scale",
    scale: ScaleGoes::ToAlpha,
    modules: Modules::ByKey,
    says: Says::Network,
};
/// ComfyUI.
pub const COMFYUI: Style = Style {
    name: "comfyui",
    spelling: Spelling::Peft,
    magnitude: ".dora_scale",
    scale: ScaleGoes::ToAlpha,
    modules: Modules::ByKey,
    says: Says::Nothing,
};
/// diffusers.
pub const DIFFUSERS: Style = Style {
    name: "diffusers",
    spelling: Spelling::Peft,
    magnitude: ".lora_magnitude_vector",
    scale: ScaleGoes::IntoFactor,
    modules: Modules::ByKey,
    says: Says::Configs,
};
/// LyCORIS by itself.
pub const LYCORIS: Style = Style { name: "lycoris", says: Says::Nothing, ..KOHYA };
/// OneTrainer, in the layout that all of its releases load.
pub const ONE_TRAINER: Style = Style { name: "onetrainer", says: Says::OneTrainer, ..KOHYA };
/// XLabs' trainer.
pub const XLABS: Style = Style {
    name: "xlabs",
    spelling: Spelling::AttentionProcessor,
    modules: Modules::ByProcessor,
    says: Says::Nothing,
    ..DIFFUSERS
};
/// Black Forest Labs.
pub const BFL: Style = Style { name: "bfl", says: Says::Nothing, ..DIFFUSERS };

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
            tensors.push((name_of(adapter, module, ending, style)?, tensor));
        }
    }
    for saved in adapter.saved() {
        tensors.push((saved.tensor.name.clone(), options.cast(&saved.tensor)?));
    }
    metadata::write(adapter, target, style, options, tensors)
}

/// The name of a module's part.
fn name_of(adapter: &Adapter, module: &Module, ending: &str, style: &Style) -> Result<String> {
    let key = key_of(module);
    if style.modules == Modules::ByKey {
        return Ok(format!("{key}{ending}"));
    }
    let layer = xlabs::layer(key).ok_or_else(|| {
        Error::unsupported(
            adapter.path(),
            format!("changes {key}, which the format {} has no name for", style.name),
        )
    })?;
    let ending = ending.strip_prefix("_lora").unwrap_or(ending);
    Ok(format!("{layer}{ending}"))
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

/// Whether OneTrainer reads such parts: of LoHa and LoKr without Tucker's form, and of DoRA.
pub fn is_of_one_trainer(module: &Module) -> bool {
    module.delta.tensors().iter().all(|(_, tensor)| {
        use super::parts::{Hadamard, Kronecker};
        let part = parts::split(&tensor.name).map(|(_, part, _)| part);
        match part {
            Some(Part::Hadamard(part)) => !matches!(part, Hadamard::T1 | Hadamard::T2),
            Some(Part::Kronecker(part)) => part != Kronecker::T2,
            Some(part) => matches!(part, Part::Down | Part::Up | Part::Magnitude),
            None => false,
        }
    })
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
    Ok(computed::reshaped(magnitude, shape))
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
