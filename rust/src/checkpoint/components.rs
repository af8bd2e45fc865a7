//! Components: the models that a diffusion pipeline is made of, or that one file of it holds together.
//!
//! A pipeline of diffusers has a folder for each, which `model_index.json` lists. A single file in
//! its authors' names has a prefix for each, or holds the denoiser alone. A language model has none.

use std::collections::BTreeSet;

use serde_json::{Map, Value};

use super::Checkpoint;

/// What a component does.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
pub enum ComponentKind {
    /// It takes the noise out: a UNet, a diffusion transformer, a prior.
    Denoiser,
    /// It reads the prompt. Of several they are numbered from 1 in the pipeline's order:
    /// `text_encoder` is the first, `text_encoder_2` the second.
    TextEncoder(usize),
    /// It makes latents of images, and images of latents.
    Vae,
    /// Anything else: a ControlNet, an image encoder, a safety checker, averaged weights.
    Other,
}

impl ComponentKind {
    /// The word for it.
    pub fn name(self) -> &'static str {
        match self {
            Self::Denoiser => "denoiser",
            Self::TextEncoder(_) => "text_encoder",
            Self::Vae => "vae",
            Self::Other => "other",
        }
    }
}

/// One model of a base that is made of several, or the only one of a base that is one of these.
#[derive(Debug, Clone, PartialEq)]
pub struct Component {
    /// What it does.
    pub kind: ComponentKind,
    /// What the names of its tensors begin with, the dot included: `unet.`, `model.diffusion_model.`;
    /// nothing, where it is all of the base.
    pub prefix: String,
    /// The class of diffusers or transformers, where something says so.
    pub class_name: Option<String>,
    /// Its own config, where it has one.
    pub config: Option<Map<String, Value>>,
}

impl Checkpoint {
    /// The components of a pipeline, of a component's own directory, or of a single file in its
    /// authors' names, in the order of the files; none, where the base is a language model, or nothing
    /// tells what it is.
    pub fn components(&self) -> Vec<Component> {
        if let Some(pipeline) = self.pipeline() {
            let with_weights = pipeline.parts.iter().filter(|part| part.has_tensors);
            return with_weights
                .map(|part| Component {
                    kind: kind_of(&part.folder, Some(&part.class_name)),
                    prefix: part.prefix(),
                    class_name: Some(part.class_name.clone()),
                    config: part.config.as_ref().map(|(fields, _)| fields.clone()),
                })
                .collect();
        }
        if let Some(config) = self.config() {
            return of_config(config).into_iter().collect();
        }
        by_names(self)
    }
}

/// The one component that a config of its own describes.
fn of_config(config: &Map<String, Value>) -> Option<Component> {
    let named = config.get("_class_name").and_then(Value::as_str);
    let architectures = || config.get("architectures")?.as_array()?.first()?.as_str();
    let text_model = || architectures().filter(|name| name.starts_with("CLIPTextModel"));
    let class_name = named.or_else(text_model)?;
    Some(Component {
        kind: kind_of("", Some(class_name)),
        prefix: String::new(),
        class_name: Some(class_name.to_owned()),
        config: Some(config.clone()),
    })
}

/// The kind of a component by its folder in a pipeline and by its class.
fn kind_of(folder: &str, class_name: Option<&str>) -> ComponentKind {
    let class = class_name.unwrap_or_default();
    let number = |rest: &str| match rest.strip_prefix('_') {
        None if rest.is_empty() => Some(1),
        rest => rest?.parse().ok(),
    };
    if let Some(number) = folder.strip_prefix("text_encoder").and_then(number) {
        return ComponentKind::TextEncoder(number);
    }
    let is_vae = |known: &&str| class.contains(known);
    if folder == "vae" || ["Autoencoder", "VQModel"].iter().any(is_vae) {
        return ComponentKind::Vae;
    }
    if class.contains("ControlNet") || class.contains("Adapter") || class.contains("VisionModel") {
        return ComponentKind::Other;
    }
    let folders = ["unet", "transformer", "prior"];
    let is_denoisers = |known: &&str| folder.strip_prefix(*known).and_then(number).is_some();
    if folders.iter().any(is_denoisers)
        || class.contains("UNet")
        || class.contains("Transformer") && !class.contains("TextTransformer")
    {
        return ComponentKind::Denoiser;
    }
    if class.starts_with("CLIPTextModel") {
        return ComponentKind::TextEncoder(1);
    }
    ComponentKind::Other
}

/// What stands before the names of a denoiser's tensors in a single file.
const DENOISERS: [&str; 3] = ["model.diffusion_model.", "diffusion_model.", "net."];
/// The same of what stands beside a denoiser.
const BESIDE: [(&str, ComponentKind); 4] = [
    ("first_stage_model.", ComponentKind::Vae),
    ("vae.", ComponentKind::Vae),
    ("model_ema.", ComponentKind::Other),
    ("control_model.", ComponentKind::Other),
];
/// What stands before the names of text encoders, and how many parts of the name tell one from
/// another.
const TEXT_ENCODERS: [(&str, usize); 3] =
    [("cond_stage_model.", 0), ("conditioner.embedders.", 1), ("text_encoders.", 1)];
/// The order of text encoders that are called by their names; others come after.
const ORDER: [&str; 5] = ["llama", "clip_l", "clip_h", "clip_g", "t5xxl"];
/// What stands between a text encoder's own prefix and its names: transformers' and OpenCLIP's.
const INNER: [&str; 2] = ["transformer.", "model."];

/// The beginnings of names that only denoisers have.
const BLOCKS: [&str; 9] = [
    "double_blocks.",
    "single_blocks.",
    "joint_blocks.",
    "input_blocks.",
    "down_blocks.",
    "transformer_blocks.",
    "single_transformer_blocks.",
    "noise_refiner.",
    "txtfusion.",
];
/// What stands in the names of those whose blocks are called as a language model's could be.
const IN_BLOCKS: [&str; 4] = [".cross_attn.", ".adaln_modulation", ".attn2.", ".attn.wq."];

/// Whether a name, without what stands before the denoiser's in a file, is one that only denoisers have.
pub fn is_denoisers(name: &str) -> bool {
    BLOCKS.iter().any(|blocks| name.starts_with(blocks))
        || name.starts_with("blocks.") && IN_BLOCKS.iter().any(|part| name.contains(part))
}

/// The components of a file by the names of its tensors.
fn by_names(base: &Checkpoint) -> Vec<Component> {
    let component = |kind, prefix: &str| Component {
        kind,
        prefix: prefix.to_owned(),
        class_name: None,
        config: None,
    };
    let names = || base.tensors().keys().map(String::as_str);
    let denoiser = DENOISERS.into_iter().find(|prefix| {
        let mut inner = names().filter_map(|name| name.strip_prefix(prefix));
        inner.any(is_denoisers)
    });
    let denoiser = denoiser.or_else(|| names().any(is_denoisers).then_some(""));
    let has = |name: &str| base.tensor(name).is_some();
    let Some(denoiser) = denoiser else {
        let is_vae = has("encoder.conv_in.weight") && has("decoder.conv_in.weight");
        return is_vae.then(|| component(ComponentKind::Vae, "")).into_iter().collect();
    };
    let mut found = vec![component(ComponentKind::Denoiser, denoiser)];
    if denoiser.is_empty() {
        return found;
    }
    let beside = BESIDE.iter().filter(|(prefix, _)| names().any(|name| name.starts_with(prefix)));
    found.extend(beside.map(|(prefix, kind)| component(*kind, prefix)));
    let mut encoders: Vec<_> = text_encoders(names()).into_iter().collect();
    let order = |prefix: &str| {
        let named = |name: &&str| prefix.split('.').nth(1) == Some(*name);
        ORDER.iter().position(named).unwrap_or(ORDER.len())
    };
    encoders.sort_by_key(|prefix| order(prefix));
    found.extend(encoders.iter().enumerate().map(|(position, prefix)| {
        // Embedders keep their number: SDXL's second alone is a refiner's.
        let number = prefix.strip_prefix("conditioner.embedders.");
        let number = number.and_then(|rest| rest.split('.').next()?.parse::<usize>().ok());
        let number = number.map_or(position + 1, |number| number + 1);
        component(ComponentKind::TextEncoder(number), prefix)
    }));
    found.sort_by_key(|component| {
        names().position(|name| name.starts_with(&component.prefix)).unwrap_or(usize::MAX)
    });
    found
}

/// The prefixes of text encoders among names, with what stands between them and the names of a model
/// of transformers or of OpenCLIP.
fn text_encoders<'a>(names: impl Iterator<Item = &'a str> + Clone) -> BTreeSet<String> {
    let mut outer = BTreeSet::new();
    for name in names.clone() {
        for (prefix, parts) in TEXT_ENCODERS {
            let Some(rest) = name.strip_prefix(prefix) else { continue };
            let length = match parts {
                0 => Some(0),
                _ => rest.find('.').map(|dot| dot + 1),
            };
            outer.extend(length.map(|length| &name[..prefix.len() + length]));
        }
    }
    let whole = |outer: &str| {
        let inner = INNER.iter().map(|inner| format!("{outer}{inner}"));
        let mut inner = inner.filter(|prefix| names.clone().any(|name| name.starts_with(prefix)));
        inner.next().unwrap_or_else(|| outer.to_owned())
    };
    outer.into_iter().map(whole).collect()
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;
    use crate::tensor::dtype::Dtype;
    use crate::tensor::safetensors::NamedTensor;

    fn components(config: Value, names: &[&str]) -> Vec<(ComponentKind, String)> {
        let tensor = |name: &&str| NamedTensor {
            name: (*name).to_owned(),
            dtype: Dtype::F32,
            shape: vec![1],
            bytes: None,
        };
        let tensors = names.iter().map(tensor).collect();
        let mut base =
            Checkpoint::in_memory("base", Map::new(), tensors).expect("tensors of a base");
        base.config = config.as_object().cloned().map(|config| (config, Vec::new()));
        let found = base.components();
        found.into_iter().map(|component| (component.kind, component.prefix)).collect()
    }

    fn pairs(of: &[(ComponentKind, &str)]) -> Vec<(ComponentKind, String)> {
        of.iter().map(|(kind, prefix)| (*kind, (*prefix).to_owned())).collect()
    }

    #[test]
    fn single_files_tell_their_components_by_prefixes() {
        use ComponentKind::{Denoiser, Other, TextEncoder, Vae};
        let sd1 = [
            "alphas_cumprod",
            "cond_stage_model.transformer.text_model.final_layer_norm.bias",
            "first_stage_model.decoder.conv_in.weight",
            "model.diffusion_model.input_blocks.0.0.weight",
            "model_ema.decay",
        ];
        assert_eq!(
            components(Value::Null, &sd1),
            pairs(&[
                (TextEncoder(1), "cond_stage_model.transformer."),
                (Vae, "first_stage_model."),
                (Denoiser, "model.diffusion_model."),
                (Other, "model_ema."),
            ])
        );
        let sdxl = [
            "conditioner.embedders.0.transformer.text_model.final_layer_norm.bias",
            "conditioner.embedders.1.model.ln_final.bias",
            "model.diffusion_model.input_blocks.0.0.weight",
        ];
        let expected = [
            (TextEncoder(1), "conditioner.embedders.0.transformer."),
            (TextEncoder(2), "conditioner.embedders.1.model."),
            (Denoiser, "model.diffusion_model."),
        ];
        assert_eq!(components(Value::Null, &sdxl), pairs(&expected));
        assert_eq!(components(Value::Null, &sdxl[1..]), pairs(&expected[1..]));
        let sd3 = [
            "model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight",
            "text_encoders.clip_g.transformer.text_model.final_layer_norm.bias",
            "text_encoders.clip_l.transformer.text_model.final_layer_norm.bias",
            "text_encoders.t5xxl.transformer.shared.weight",
        ];
        assert_eq!(
            components(Value::Null, &sd3),
            pairs(&[
                (Denoiser, "model.diffusion_model."),
                (TextEncoder(2), "text_encoders.clip_g.transformer."),
                (TextEncoder(1), "text_encoders.clip_l.transformer."),
                (TextEncoder(3), "text_encoders.t5xxl.transformer."),
            ])
        );
    }

    #[test]
    fn bare_denoisers_are_told_from_language_models() {
        for name in [
            "double_blocks.0.img_attn.qkv.weight",
            "joint_blocks.0.x_block.attn.qkv.weight",
            "blocks.0.cross_attn.k.weight",
            "transformer_blocks.0.attn.to_q.weight",
            "down_blocks.0.resnets.0.conv1.weight",
        ] {
            let denoiser = pairs(&[(ComponentKind::Denoiser, "")]);
            assert_eq!(components(Value::Null, &[name]), denoiser, "{name}");
        }
        for name in [
            "model.layers.0.self_attn.q_proj.weight",
            "transformer.h.0.attn.c_attn.weight",
            "blocks.0.att.key.weight",
            "transformer.blocks.0.attn.Wqkv.weight",
            "encoder.block.0.layer.0.SelfAttention.q.weight",
        ] {
            assert_eq!(components(Value::Null, &[name]), [], "{name}");
            let config = json!({"architectures": ["LlamaForCausalLM"], "model_type": "llama"});
            assert_eq!(components(config, &[name]), [], "{name}");
        }
    }

    #[test]
    fn a_component_says_by_its_config_what_it_is() {
        for (class, kind) in [
            ("UNet2DConditionModel", ComponentKind::Denoiser),
            ("FluxTransformer2DModel", ComponentKind::Denoiser),
            ("PriorTransformer", ComponentKind::Denoiser),
            ("AutoencoderKL", ComponentKind::Vae),
            ("AutoencoderKLWan", ComponentKind::Vae),
            ("ControlNetModel", ComponentKind::Other),
        ] {
            let config = json!({"_class_name": class});
            assert_eq!(components(config, &["x.weight"]), pairs(&[(kind, "")]), "{class}");
        }
        let config = json!({"architectures": ["CLIPTextModelWithProjection"]});
        let encoder = pairs(&[(ComponentKind::TextEncoder(1), "")]);
        assert_eq!(components(config, &["x.weight"]), encoder);
        for (folder, class, kind) in [
            ("transformer_2", "WanTransformer3DModel", ComponentKind::Denoiser),
            ("text_encoder_3", "T5EncoderModel", ComponentKind::TextEncoder(3)),
            ("prior", "StableCascadeUNet", ComponentKind::Denoiser),
            ("decoder", "StableCascadeUNet", ComponentKind::Denoiser),
            ("vqgan", "PaellaVQModel", ComponentKind::Vae),
            ("image_encoder", "CLIPVisionModelWithProjection", ComponentKind::Other),
            ("safety_checker", "StableDiffusionSafetyChecker", ComponentKind::Other),
        ] {
            assert_eq!(kind_of(folder, Some(class)), kind, "{folder}");
        }
    }
}
