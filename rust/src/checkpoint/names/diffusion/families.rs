//! The families of diffusion models whose authors' names are not diffusers', and what each is known by.

use std::collections::BTreeSet;
use std::sync::LazyLock;

use indexmap::IndexMap;

use super::rules::Rule;
use super::unet;
use crate::checkpoint::names::canonical::Lie;

/// Which of the two namings names are in.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Side {
    Diffusers,
    Original,
}

/// The rules of a family, and the naming that the names at hand are in.
pub(super) struct Found {
    pub rules: Vec<Rule>,
    pub side: Side,
}

/// A family by the beginnings of names, all of which a model has, in each of the two namings.
struct Family {
    name: &'static str,
    diffusers: &'static [&'static str],
    original: &'static [&'static str],
}

/// The UNets, whose rules follow from their structure.
const UNET: &str = "unet";

/// The families, those first whose names another's include.
const FAMILIES: [Family; 15] = [
    Family {
        name: "flux2",
        diffusers: &["double_stream_modulation_img.linear."],
        original: &["double_stream_modulation_img.lin."],
    },
    Family {
        name: "chroma",
        diffusers: &["distilled_guidance_layer.", "transformer_blocks."],
        original: &["distilled_guidance_layer.", "double_blocks."],
    },
    Family {
        name: "hunyuan_video",
        diffusers: &["context_embedder.token_refiner."],
        original: &["double_blocks.0.img_attn_qkv."],
    },
    Family {
        name: "flux1",
        diffusers: &["single_transformer_blocks.0.proj_mlp."],
        original: &["double_blocks.0.img_attn.qkv."],
    },
    Family {
        name: "sd3",
        diffusers: &["pos_embed.proj.", "transformer_blocks.0.attn.add_q_proj."],
        original: &["joint_blocks."],
    },
    Family {
        name: "wan",
        diffusers: &["condition_embedder.", "blocks.0.attn1."],
        original: &["blocks.0.self_attn.q.", "blocks.0.cross_attn.q."],
    },
    Family { name: "krea2", diffusers: &["text_fusion."], original: &["txtfusion."] },
    Family {
        name: "cosmos2",
        diffusers: &["patch_embed.proj.", "transformer_blocks.0.norm1.linear_1."],
        original: &["blocks.0.adaln_modulation_self_attn."],
    },
    Family {
        name: "ltx2",
        diffusers: &["audio_proj_in.", "transformer_blocks."],
        original: &["audio_patchify_proj."],
    },
    Family {
        name: "ltx",
        diffusers: &[
            "proj_in.",
            "time_embed.",
            "caption_projection.",
            "transformer_blocks.0.attn1.",
        ],
        original: &["patchify_proj."],
    },
    Family {
        name: "lumina2",
        diffusers: &["context_refiner.", "layers.0.attn.to_q."],
        original: &["context_refiner.", "layers.0.attention.qkv.", "layers.0.adaLN_modulation.1."],
    },
    Family {
        name: "z_image",
        diffusers: &["context_refiner.", "layers.0.attention.to_q."],
        original: &["context_refiner.", "layers.0.attention.qkv."],
    },
    Family {
        name: "sana",
        diffusers: &["transformer_blocks.0.ff.conv_inverted."],
        original: &["blocks.0.mlp.inverted_conv."],
    },
    Family { name: UNET, diffusers: &["down_blocks.", "conv_in."], original: &["input_blocks."] },
    Family {
        name: "open_clip",
        diffusers: &["text_model.encoder.layers.0.self_attn.q_proj."],
        original: &["transformer.resblocks.0."],
    },
];

/// The rules of each family as `[diffusers' template, the author's, how the rows lie]`: those that
/// diffusers' converters of whole models follow (`loaders/single_file_utils.py`).
static RULES: LazyLock<IndexMap<String, Vec<Vec<String>>>> = LazyLock::new(|| {
    serde_json::from_str(include_str!("families.json")).expect("the rules are sound JSON")
});

/// The family that a component's parameters are of; `None` where there is none, or where its two
/// namings are the same.
pub(super) fn find(names: &BTreeSet<&str>) -> Option<Found> {
    let all = |beginnings: &[&str]| beginnings.iter().all(|start| begins(names, start));
    FAMILIES.iter().find_map(|family| {
        let side = match (all(family.diffusers), all(family.original)) {
            (true, _) => Side::Diffusers,
            (_, true) => Side::Original,
            _ => return None,
        };
        let rules = match family.name {
            UNET => unet::rules(names),
            name => listed(name, names),
        };
        Some(Found { rules, side })
    })
}

fn begins(names: &BTreeSet<&str>, start: &str) -> bool {
    names.range(start..).next().is_some_and(|name| name.starts_with(start))
}

/// A family's rules, with the number of the last block in the place of `{last}`.
fn listed(family: &str, names: &BTreeSet<&str>) -> Vec<Rule> {
    let blocks = ["transformer_blocks.", "joint_blocks."];
    let numbers = names.iter().filter_map(|name| {
        let rest = blocks.iter().find_map(|block| name.strip_prefix(block))?;
        rest.split('.').next()?.parse::<u64>().ok()
    });
    let last = numbers.max().unwrap_or_default().to_string();
    let rules = RULES.get(family).into_iter().flatten();
    let rule = |parts: &Vec<String>| {
        let text = |index: usize| parts.get(index).map_or("", String::as_str);
        let lie = match text(2) {
            "swap" => Lie::HalvesSwapped,
            "transpose" => Lie::Transposed,
            _ => Lie::Same,
        };
        Rule::new(&text(0).replace("{last}", &last), &text(1).replace("{last}", &last), lie)
    };
    rules.map(rule).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_family_has_rules_and_every_rule_a_family() {
        for family in FAMILIES.iter().filter(|family| family.name != UNET) {
            assert!(RULES.contains_key(family.name), "{}", family.name);
        }
        for (name, rules) in RULES.iter() {
            assert!(FAMILIES.iter().any(|family| family.name == name), "{name}");
            for rule in rules {
                assert!(matches!(rule.len(), 2 | 3), "{rule:?}");
                let known = ["swap", "transpose"];
                assert!(rule.get(2).is_none_or(|lie| known.contains(&lie.as_str())), "{rule:?}");
            }
        }
    }
}
