//! The family of image and video models that the modules of an adapter are of, told from their names alone.

use std::collections::BTreeSet;

/// A family and what is in the names of its modules, with underscores in the place of dots: one of each
/// group, and nothing of the last.
struct Marks {
    family: &'static str,
    all: &'static [&'static [&'static str]],
    none: &'static [&'static str],
}

/// The families, those first that have more than others have.
const FAMILIES: [Marks; 19] = [
    Marks {
        family: "flux2",
        all: &[&["double_stream_modulation", "single_stream_modulation"]],
        none: &[],
    },
    Marks { family: "flux2", all: &[&["attn_to_qkv_mlp_proj"]], none: &[] },
    Marks { family: "chroma", all: &[&["distilled_guidance_layer"]], none: &[] },
    Marks {
        family: "hunyuan_video",
        all: &[
            &["double_blocks_", "single_transformer_blocks_"],
            &[
                "img_mlp_fc",
                "txt_mlp_fc",
                "individual_token_refiner",
                "token_refiner_refiner_blocks",
                "mod_linear",
            ],
        ],
        none: &[],
    },
    Marks { family: "ltx2", all: &[&["transformer_blocks_"], &["audio_"]], none: &[] },
    Marks {
        family: "krea2",
        all: &[
            &["txtfusion", "text_fusion", "blocks_"],
            &["txtfusion", "text_fusion", "attn_wq", "attn_gate"],
        ],
        none: &[],
    },
    Marks {
        family: "qwen_image",
        all: &[&["transformer_blocks_"], &["img_mlp", "txt_mlp", "img_mod", "txt_mod"]],
        none: &["double_blocks_"],
    },
    Marks { family: "sana", all: &[&["conv_inverted", "inverted_conv"]], none: &[] },
    Marks {
        family: "cosmos",
        all: &[&["adaln_modulation", "self_attn_output_proj", "cross_attn_output_proj"]],
        none: &[],
    },
    Marks {
        family: "cosmos",
        all: &[&["cross_attn_q_proj", "cross_attn_k_proj", "cross_attn_v_proj"]],
        none: &["layers_"],
    },
    Marks {
        family: "wan",
        all: &[&[
            "self_attn_q",
            "self_attn_k",
            "self_attn_v",
            "self_attn_o",
            "cross_attn_q",
            "cross_attn_k",
        ]],
        none: &["self_attn_q_proj", "encoder_layers", "layers_"],
    },
    Marks {
        family: "wan",
        all: &[&["blocks_"], &["attn1_to_"], &["ffn_net", "attn2_to_"]],
        none: &["transformer_blocks", "down_blocks", "mid_block", "up_blocks"],
    },
    Marks {
        family: "unet",
        all: &[&[
            "input_blocks_",
            "down_blocks_",
            "middle_block_",
            "mid_block_",
            "output_blocks_",
            "up_blocks_",
        ]],
        none: &[],
    },
    Marks {
        family: "flux1",
        all: &[&["double_blocks_", "single_blocks_", "single_transformer_blocks_"]],
        none: &[],
    },
    Marks { family: "sd3", all: &[&["joint_blocks_"]], none: &[] },
    Marks {
        family: "lumina2",
        all: &[&["noise_refiner", "context_refiner"], &["_attn_to_", "adaLN_modulation_1"]],
        none: &["attention_to_"],
    },
    Marks {
        family: "z_image",
        all: &[&[
            "noise_refiner",
            "context_refiner",
            "attention_to_q",
            "attention_to_k",
            "attention_to_v",
            "attention_to_out",
        ]],
        none: &[],
    },
    Marks {
        family: "ltx",
        all: &[&["patchify_proj", "adaln_single", "caption_projection"]],
        none: &[],
    },
    Marks {
        family: "sd3",
        all: &[&["transformer_blocks_"], &["attn_add_q_proj", "attn_to_add_out", "attn2_to_q"]],
        none: &["img_mlp", "txt_mlp"],
    },
];

/// What the names of text encoders' modules begin with, which are alike in many families.
const TEXT_ENCODERS: [&str; 5] = ["lora_te", "lora_prior_te", "text_encoder", "clip_", "t5"];
/// The widths of the text that a UNet's cross-attention takes, and the models that have it.
const UNETS: [(u64, &str); 4] =
    [(768, "sd1"), (1024, "sd2"), (1280, "sdxl_refiner"), (2048, "sdxl")];

/// The family of modules of these names with their outputs and inputs; `None` where they tell none.
pub fn of<'a>(
    modules: impl Iterator<Item = (&'a str, (u64, u64))> + Clone,
) -> Option<&'static str> {
    let is_of_text = |name: &str| TEXT_ENCODERS.iter().any(|start| name.starts_with(start));
    let has_second = modules.clone().any(|(name, _)| name.starts_with("lora_te2_"));
    let modules = modules.filter(|(name, _)| !is_of_text(name));
    let names: Vec<String> = modules.clone().map(|(name, _)| name.replace('.', "_")).collect();
    let has = |mark: &str| names.iter().any(|name| name.contains(mark));
    let is_of = |marks: &&Marks| {
        let all = marks.all.iter().all(|group| group.iter().any(|mark| has(mark)));
        all && !marks.none.iter().any(|mark| has(mark))
    };
    let found = FAMILIES.iter().find(is_of)?.family;
    if found != "unet" {
        return Some(found);
    }
    let text = ["attn2_to_k", "attn2_to_v"];
    let is_of_text = |name: &str| {
        let flat = name.replace('.', "_");
        text.iter().any(|layer| flat.ends_with(layer))
    };
    let widths =
        modules.clone().filter(|(name, _)| is_of_text(name)).map(|(_, (_, inputs))| inputs);
    let widths: BTreeSet<u64> = widths.collect();
    let told = UNETS.iter().find(|(width, _)| widths.contains(width)).map(|(_, family)| *family);
    told.or_else(|| has_second.then_some("sdxl")).or(Some("unet"))
}

/// The family of a UNet whose layers are numbered (`unet:0`), by the width of the text that some take:
/// one that no layer of the families' own has.
pub fn of_numbered<'a>(
    modules: impl Iterator<Item = (&'a str, (u64, u64))>,
) -> Option<&'static str> {
    let mut is_unet = false;
    let mut told = None;
    for (_, (_, inputs)) in modules.filter(|(name, _)| name.starts_with("unet:")) {
        is_unet = true;
        // 1280 is a width of all of them.
        let of_width = UNETS.iter().find(|(width, _)| *width == inputs && *width != 1280);
        told = told.or(of_width.map(|(_, family)| *family));
    }
    told.or(is_unet.then_some("unet"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_tell_the_family() {
        for (names, family) in [
            (
                &[("lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn2_to_k", 768)][..],
                "sd1",
            ),
            (&[("unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k", 1024)], "sd2"),
            (&[("lora_unet_input_blocks_4_1_transformer_blocks_0_attn2_to_v", 2048)], "sdxl"),
            (
                &[
                    ("lora_unet_double_blocks_0_img_attn_qkv", 8),
                    ("lora_unet_double_blocks_0_img_mlp_0", 8),
                ],
                "flux1",
            ),
            (&[("transformer.single_transformer_blocks.0.attn.to_q", 8)], "flux1"),
            (
                &[
                    ("diffusion_model.double_blocks.0.img_attn_qkv", 8),
                    ("diffusion_model.double_blocks.0.img_mlp.fc1", 8),
                ],
                "hunyuan_video",
            ),
            (
                &[
                    ("diffusion_model.blocks.0.self_attn.q", 8),
                    ("diffusion_model.blocks.0.ffn.0", 8),
                ],
                "wan",
            ),
            (&[("blocks.0.attn1.to_q", 8), ("blocks.0.ffn.net.2", 8)], "wan"),
            (
                &[
                    ("lora_unet_blocks_0_cross_attn_k_proj", 8),
                    ("lora_unet_blocks_0_self_attn_q_proj", 8),
                ],
                "cosmos",
            ),
            (
                &[("transformer_blocks.0.attn.to_q", 8), ("transformer_blocks.0.img_mlp.net.2", 8)],
                "qwen_image",
            ),
            (&[("lora_unet_joint_blocks_0_x_block_attn_qkv", 8)], "sd3"),
            (&[("transformer.transformer_blocks.0.attn.add_q_proj", 8)], "sd3"),
            (&[("diffusion_model.layers.0.attention.to_q", 8)], "z_image"),
            (&[("lora_unet_blocks_0_attn_wq", 8)], "krea2"),
        ] {
            assert_eq!(
                of(names.iter().map(|(name, inputs)| (*name, (8, *inputs)))),
                Some(family),
                "{names:?}"
            );
        }
        let language =
            [("model.layers.0.self_attn.q_proj", (8, 8)), ("model.layers.0.mlp.up_proj", (8, 8))];
        assert_eq!(of(language.into_iter()), None);
    }
}
