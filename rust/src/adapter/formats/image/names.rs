//! Keys of files of image models' adapters: the module that each is of, by the name that the module has
//! in its model, and the part that the tensor plays in it.

use std::borrow::Cow;

use crate::adapter::formats::parts::{self, Part, Spelling};
use crate::adapter::formats::write_parts::xlabs::STREAMS;
use crate::checkpoint::names::wrappers::{self, Wrappers};

/// What a tensor is by its key.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) enum Key {
    /// A part of a module of that name.
    Part {
        /// The module, with what stands before it in the file.
        module: String,
        /// What it is there.
        part: Part,
    },
    /// The same of the layer in which the authors of Flux fuse q, k, v and an MLP, of q, k and v alone.
    Fused {
        /// The layer.
        module: String,
        /// What it is there.
        part: Part,
    },
    /// A vector of a textual inversion.
    Embedding,
    /// Nothing that is known.
    Unknown,
}

/// What the keys of vectors of a textual inversion begin with.
const EMBEDDINGS: [&str; 5] = ["bundle_emb.", "emb_params", "string_to_param", "<", "clip_l_emb"];
/// The layers of CLIP by the names that early releases of diffusers gave them.
const CLIP: [(&str, &str); 4] =
    [("to_q", "q_proj"), ("to_k", "k_proj"), ("to_v", "v_proj"), ("to_out", "out_proj")];
/// Between a layer and the part of an alpha, where early releases of diffusers put a name of their own.
const LAYERS: [&str; 2] = [".lora", ".lora_linear_layer"];

/// What the tensor of that key is.
pub(super) fn read(key: &str, wrappers: &Wrappers<'_>) -> Key {
    if EMBEDDINGS.iter().any(|beginning| key.starts_with(beginning)) {
        return Key::Embedding;
    }
    if let Some((module, part)) = numbered(key) {
        return Key::Part { module, part };
    }
    if let Some(found) = of_xlabs(key) {
        return found;
    }
    let Some((module, part, spelling)) = parts::split(key) else { return Key::Unknown };
    Key::Part { module: module_of(module, part, spelling, wrappers), part }
}

/// A module's name without what a spelling puts into it.
fn module_of(module: &str, part: Part, spelling: Spelling, wrappers: &Wrappers<'_>) -> String {
    if !module.contains('.') {
        return wrappers::strip_flattened(module).into_owned();
    }
    let mut module = Cow::Borrowed(module);
    let mut is_processor = spelling == Spelling::AttentionProcessor;
    if part == Part::Alpha {
        if let Some(layer) = LAYERS.iter().find_map(|layer| module.strip_suffix(layer)) {
            module = Cow::Owned(layer.to_owned());
        } else if let Some(layer) = module.strip_suffix("_lora") {
            module = Cow::Owned(layer.to_owned());
            is_processor = true;
        }
    }
    if is_processor {
        module = Cow::Owned(of_processor(&module));
    }
    wrappers.strip(&module).into_owned()
}

/// The layer that an attention processor's factors belong to.
fn of_processor(module: &str) -> String {
    let inner = module.replace(".processor.", ".");
    let Some((attention, layer)) = inner.rsplit_once('.') else { return inner };
    let is_clip = attention.ends_with("self_attn");
    match CLIP.iter().find(|(own, _)| *own == layer) {
        Some((_, name)) if is_clip => format!("{attention}.{name}"),
        _ if layer == "to_out" => format!("{attention}.to_out.0"),
        _ => inner,
    }
}

/// `unet:12:down`: a layer by its number.
pub(super) fn numbered(key: &str) -> Option<(String, Part)> {
    let (module, side) = key.rsplit_once(':')?;
    let part = match side {
        "down" => Part::Down,
        "up" => Part::Up,
        _ => return None,
    };
    let (_, number) = module.rsplit_once(':')?;
    number.parse::<u32>().ok()?;
    Some((module.to_owned(), part))
}

/// `double_blocks.0.processor.qkv_lora1.down.weight`, as XLabs' trainer writes it.
pub(super) fn of_xlabs(key: &str) -> Option<Key> {
    let (block, layer) = key.split_once(".processor.")?;
    let (layer, side) = layer.split_once('.')?;
    let part = match side {
        "down.weight" => Part::Down,
        "up.weight" => Part::Up,
        _ => return None,
    };
    let (layer, stream) = layer.split_once("_lora")?;
    if !matches!(layer, "qkv" | "proj") {
        return None;
    }
    let (kind, _) = block.rsplit_once('.')?;
    let is_of =
        |kind_of_block: &str| kind == kind_of_block || kind.ends_with(&format!(".{kind_of_block}"));
    if is_of("double_blocks") {
        let (_, stream) = STREAMS.iter().find(|(number, _)| *number == stream)?;
        return Some(Key::Part { module: format!("{block}.{stream}.{layer}"), part });
    }
    if !is_of("single_blocks") || !stream.is_empty() {
        return None;
    }
    Some(match layer {
        "qkv" => Key::Fused { module: format!("{block}.linear1"), part },
        _ => Key::Part { module: format!("{block}.linear2"), part },
    })
}

/// Whether a parameter is one that is so small that some trainers save it whole: a norm's.
pub(super) fn is_of_norm(parameter: &str) -> bool {
    let Some((module, leaf)) = parameter.rsplit_once('.') else { return false };
    let layer = module.rsplit('.').next().unwrap_or(module);
    matches!(leaf, "scale" | "weight" | "bias") && layer.contains("norm")
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::adapter::formats::write_parts::xlabs::layer;

    #[test]
    fn xlabs_names_are_read_as_they_are_written() {
        for module in [
            "double_blocks.0.img_attn.qkv",
            "double_blocks.12.txt_attn.proj",
            "single_blocks.3.linear1",
            "single_blocks.3.linear2",
        ] {
            let key = format!("{}.up.weight", layer(module).expect("known"));
            match of_xlabs(&key) {
                Some(Key::Part { module: found, .. } | Key::Fused { module: found, .. }) => {
                    assert_eq!(found, module);
                }
                found => panic!("{key}: {found:?}"),
            }
        }
        for module in [
            "double_blocks.0.img_mlp.0",
            "double_blocks.0.img_attn.norm",
            "single_blocks.linear1",
            "single_blocks.0.modulation.lin",
            "img_in",
            "transformer_blocks.0.linear1",
        ] {
            assert_eq!(layer(module), None, "{module}");
        }
    }

    #[test]
    fn a_key_names_its_module_whatever_the_spelling() {
        let part = |module: &str, part| Key::Part { module: module.to_owned(), part };
        let unet = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1";
        let clip = "text_encoder.text_model.encoder.layers.0.self_attn";
        for (key, expected) in [
            (format!("{unet}.to_q.lora_A.weight"), part(&format!("{unet}.to_q"), Part::Down)),
            (format!("{unet}.to_q.lora.up.weight"), part(&format!("{unet}.to_q"), Part::Up)),
            (
                format!("{unet}.processor.to_out_lora.down.weight"),
                part(&format!("{unet}.to_out.0"), Part::Down),
            ),
            (
                format!("{unet}.processor.to_out_lora.alpha"),
                part(&format!("{unet}.to_out.0"), Part::Alpha),
            ),
            (format!("{clip}.to_out_lora.up.weight"), part(&format!("{clip}.out_proj"), Part::Up)),
            (
                format!("{clip}.q_proj.lora_linear_layer.down.weight"),
                part(&format!("{clip}.q_proj"), Part::Down),
            ),
            (
                format!("{clip}.q_proj.lora_linear_layer.alpha"),
                part(&format!("{clip}.q_proj"), Part::Alpha),
            ),
            (
                "double_blocks.3.processor.qkv_lora2.up.weight".into(),
                part("double_blocks.3.txt_attn.qkv", Part::Up),
            ),
            (
                "single_blocks.3.processor.qkv_lora.up.weight".into(),
                Key::Fused { module: "single_blocks.3.linear1".into(), part: Part::Up },
            ),
            (
                "single_blocks.3.processor.proj_lora.down.weight".into(),
                part("single_blocks.3.linear2", Part::Down),
            ),
            ("unet:12:down".into(), part("unet:12", Part::Down)),
            ("<s1>".into(), Key::Embedding),
            ("bundle_emb.x.clip_l".into(), Key::Embedding),
            ("double_blocks.3.processor.ip_adapter.weight".into(), {
                part("double_blocks.3.processor.ip_adapter", Part::Weight)
            }),
            ("a.bias".into(), Key::Unknown),
        ] {
            assert_eq!(read(&key, &Wrappers::of(None)), expected, "{key}");
        }
    }
}
