//! The rules of the common families of models, for where transformers is not installed or its
//! release does not know them: what its 5.23 does as it loads them, and what older releases called
//! the same parameters.

use super::{Operation, Rule};

/// Experts on disk one by one with gate_proj, up_proj and down_proj, in memory stacked.
const GATED: [&str; 36] = [
    "afmoe",
    "axk1",
    "axk2",
    "beam",
    "cohere2_moe",
    "deepseek_v2",
    "deepseek_v3",
    "deepseek_v32",
    "dots1",
    "ernie4_5_moe",
    "exaone_moe",
    "flex_olmo",
    "flint",
    "glm4_moe",
    "glm4_moe_lite",
    "glm4v_moe",
    "glm4v_moe_text",
    "glm_moe_dsa",
    "hunyuan_v1_moe",
    "hy_v3",
    "kolibri1",
    "laguna",
    "longcat_flash",
    "mellum",
    "mimo_v2_flash",
    "olmoe",
    "qwen2_moe",
    "qwen3_5_moe",
    "qwen3_moe",
    "qwen3_next",
    "qwen3_omni_moe",
    "qwen3_omni_moe_talker_text",
    "qwen3_omni_moe_text",
    "qwen3_omni_moe_thinker",
    "sarvam_mla",
    "solar_open",
];
/// A language model, a tower for images and a projector, in which the language model lies deeper in
/// memory than on disk.
const IMAGE_AND_TEXT: [&str; 12] = [
    "aria",
    "aya_vision",
    "gemma3",
    "got_ocr2",
    "internvl",
    "llava",
    "llava_next",
    "llava_next_video",
    "llava_onevision",
    "mistral3",
    "paligemma",
    "vipllava",
];
/// The same with a tower for sounds.
const SOUND_AND_TEXT: [&str; 6] =
    ["audioflamingo3", "glmasr", "musicflamingo", "qwen2_audio", "voxtral", "voxtral_realtime"];
/// Encoders of images whose layers were renamed after those of language models.
const VISION: [&str; 7] =
    ["audio-spectrogram-transformer", "deit", "ijepa", "vit", "vit_mae", "vit_msn", "vivit"];
/// Towers whose names begin with one word more on disk.
const TOWERS: [&str; 9] = [
    "altclip_vision_model",
    "chinese_clip_vision_model",
    "clip_vision_model",
    "clipseg_vision_model",
    "metaclip_2_vision_model",
    "mlcd_vision_model",
    "siglip2_vision_model",
    "siglip_vision_model",
    "xclip_vision_model",
];

/// The rules of a model type, or `None` if the table does not know it.
pub(super) fn rules(model_type: &str) -> Option<Vec<Rule>> {
    let rules = match model_type {
        "mixtral" | "minimax" | "minimax_m2" => {
            let mut rules = vec![rename(r"\.block_sparse_moe\.", ".mlp.")];
            rules.extend(experts(r"\.experts", ["w1", "w3", "w2"]));
            rules
        }
        "phimoe" => {
            let mut rules = vec![
                rename(r"\.block_sparse_moe\.", ".mlp."),
                rename(r"\.mlp\.gate\.weight", ".mlp.router.weight"),
            ];
            rules.extend(experts(r"\.experts", ["w1", "w3", "w2"]));
            rules
        }
        "lfm2_moe" => experts(r"feed_forward\.experts", ["w1", "w3", "w2"]),
        "jamba" => experts(r"feed_forward\.experts", ["gate_proj", "up_proj", "down_proj"]),
        "nemotron_h" => vec![
            rename(r"^backbone\.", "model."),
            stack(&[r"mixer\.experts.*.up_proj\.weight"], "mixer.experts.up_proj"),
            stack(&[r"mixer\.experts.*.down_proj\.weight"], "mixer.experts.down_proj"),
        ],
        "granitemoe" | "granitemoeshared" | "granitemoehybrid" => vec![
            rename(
                r"block_sparse_moe\.input_linear\.weight",
                "block_sparse_moe.experts.gate_up_proj",
            ),
            rename(
                r"block_sparse_moe\.output_linear\.weight",
                "block_sparse_moe.experts.down_proj",
            ),
            rename(r"block_sparse_moe\.router\.layer\.weight", "block_sparse_moe.router.weight"),
        ],
        "aria_text" => vec![
            rename(r"mlp\.experts\.fc1\.weight", "mlp.experts.gate_up_proj"),
            rename(r"mlp\.experts\.fc2\.weight", "mlp.experts.down_proj"),
        ],
        "qwen2_vl" | "qwen2_5_vl" => vec![
            rename("^visual", "model.visual"),
            rename(r"^model(?!\.(?:language_model|visual))", "model.language_model"),
        ],
        "mllama" => inside(&["language_model", "vision_model", "multi_modal_projector"]),
        "fuyu" => inside(&["language_model", "vision_embed_tokens"]),
        "video_llava" => {
            inside(&["language_model", "image_tower", "video_tower", "multi_modal_projector"])
        }
        "granite_speech" | "granite_speech_plus" => {
            inside(&["language_model", "encoder", "projector"])
        }
        "gpt_neox" => vec![rename(r"^embed_out\.", "lm_head.")],
        "dinov2" | "dinov2_with_registers" => vec![
            rename(r"attention\.attention\.query", "attention.q_proj"),
            rename(r"attention\.attention\.key", "attention.k_proj"),
            rename(r"attention\.attention\.value", "attention.v_proj"),
            rename(r"attention\.output\.dense", "attention.o_proj"),
            split(r"mlp\.weights_in", &["mlp.gate_proj", "mlp.up_proj"]),
            rename(r"mlp\.weights_out", "mlp.down_proj"),
        ],
        "qwen3_5" | "qwen3_5_text" => {
            let mut rules = vec![joined_attention()];
            if model_type == "qwen3_5_text" {
                rules.push(rename(r"^model\.language_model\.", "model."));
            }
            rules
        }
        "gemma3n_text" => vec![rename(r"^model\.language_model\.", "model.")],
        "qwen3_5_moe_text" => {
            let mut rules = vec![rename(r"^model\.language_model\.", "model."), joined_attention()];
            rules.extend(experts(r"mlp\.experts", ["gate_proj", "up_proj", "down_proj"]));
            rules
        }
        "qwen3_5_moe" => {
            let mut rules = vec![joined_attention()];
            rules.extend(experts(r"mlp\.experts", ["gate_proj", "up_proj", "down_proj"]));
            rules
        }
        name if GATED.contains(&name) => {
            experts(r"mlp\.experts", ["gate_proj", "up_proj", "down_proj"])
        }
        name if IMAGE_AND_TEXT.contains(&name) => {
            inside(&["language_model", "vision_tower", "multi_modal_projector", "image_newline"])
        }
        name if SOUND_AND_TEXT.contains(&name) => {
            inside(&["language_model", "audio_tower", "multi_modal_projector"])
        }
        name if VISION.contains(&name) => vec![
            rename(r"encoder\.layer\.", "layers."),
            rename(r"attention\.query", "q_proj"),
            rename(r"attention\.key", "k_proj"),
            rename(r"attention\.value", "v_proj"),
            rename(r"attention\.output\.dense", "attention.o_proj"),
            rename(r"intermediate\.dense", "mlp.fc1"),
            rename(r"output\.dense", "mlp.fc2"),
        ],
        name if TOWERS.contains(&name) => {
            vec![
                rename(r"^(.*vision_tower\.)vision_model\.", r"\1"),
                rename(r"^vision_model\.", ""),
            ]
        }
        _ => return None,
    };
    Some(rules)
}

/// The rules of all families, those that change leading parts alone left out: which of these a name
/// had before is not to be told without its model. A name that one family's rules change first is
/// none of another's.
pub(super) fn rules_of_all() -> Vec<Rule> {
    let one_of_each_list = [GATED[0], VISION[0]];
    let families = [
        // Its routers lie in what the rules of Mixtral's rename.
        &["granitemoe", "mixtral", "phimoe", "nemotron_h", "aria_text", "lfm2_moe", "jamba"][..],
        &["dinov2", "gpt_neox"],
        &one_of_each_list,
    ];
    let mut all = Vec::<Rule>::new();
    for rule in families.concat().into_iter().flat_map(|name| rules(name).unwrap_or_default()) {
        let is_of_a_whole_name = rule.targets.iter().any(|target| target == "lm_head.");
        let is_leading = rule.sources.iter().any(|source| source.starts_with('^'));
        if (!is_leading || is_of_a_whole_name) && !all.contains(&rule) {
            all.push(rule);
        }
    }
    all.push(rename(r"^(.*vision_tower\.)vision_model\.", r"\1"));
    all
}

/// Every model type that the table knows.
#[cfg(test)]
pub(super) fn known() -> impl Iterator<Item = &'static str> {
    let others = [
        "mixtral",
        "minimax",
        "minimax_m2",
        "phimoe",
        "lfm2_moe",
        "jamba",
        "nemotron_h",
        "granitemoe",
        "granitemoeshared",
        "granitemoehybrid",
        "aria_text",
        "qwen2_vl",
        "qwen2_5_vl",
        "mllama",
        "fuyu",
        "video_llava",
        "granite_speech",
        "granite_speech_plus",
        "gpt_neox",
        "dinov2",
        "dinov2_with_registers",
        "qwen3_5_text",
        "gemma3n_text",
        "qwen3_5_moe_text",
    ];
    let lists: [&'static [&'static str]; 5] =
        [&GATED, &IMAGE_AND_TEXT, &SOUND_AND_TEXT, &VISION, &TOWERS];
    lists.into_iter().flatten().copied().chain(others)
}

/// Only the name changes.
fn rename(source: &str, target: &str) -> Rule {
    Rule {
        sources: vec![source.to_owned()],
        targets: vec![target.to_owned()],
        operations: Vec::new(),
        prefixes: Vec::new(),
        special: None,
    }
}

/// Matrices of experts become one tensor: those of one expert below one another, the experts one
/// after the other.
fn stack(sources: &[&str], target: &str) -> Rule {
    let mut operations = vec![operation("MergeModulelist", 0)];
    if sources.len() > 1 {
        operations.push(operation("Concatenate", 1));
    }
    Rule {
        sources: sources.iter().map(|source| (*source).to_owned()).collect(),
        operations,
        ..rename("", target)
    }
}

/// One matrix becomes several of one size.
fn split(source: &str, targets: &[&str]) -> Rule {
    Rule {
        targets: targets.iter().map(|target| (*target).to_owned()).collect(),
        operations: vec![operation("Chunk", 0)],
        ..rename(source, "")
    }
}

fn operation(name: &str, dimension: u64) -> Operation {
    Operation { name: name.to_owned(), dimension: Some(dimension), plain: true }
}

/// The three matrices of a linear attention, which some programs train apart, as the one that models
/// have.
fn joined_attention() -> Rule {
    let source = |name: &str| format!(r"linear_attn\.in_proj_{name}\.weight");
    Rule {
        sources: ["q", "k", "v"].map(source).into(),
        operations: vec![operation("Concatenate", 0)],
        ..rename("", "linear_attn.in_proj_qkv.weight")
    }
}

/// The usual three matrices of an expert, under whatever names.
fn experts(at: &str, [gate, up, down]: [&str; 3]) -> Vec<Rule> {
    let source = |name: &str| format!(r"{at}\.*.{name}\.weight");
    let target = |name: &str| format!("{}.{name}", at.replace('\\', ""));
    vec![
        stack(&[&source(gate), &source(up)], &target("gate_up_proj")),
        stack(&[&source(down)], &target("down_proj")),
    ]
}

/// Parts that lie inside of `model` in memory and beside it on disk, the language model without its
/// head.
fn inside(parts: &[&str]) -> Vec<Rule> {
    let mut rules = vec![rename(r"^language_model\.lm_head", "lm_head")];
    rules.extend(parts.iter().map(|part| rename(&format!("^{part}"), &format!("model.{part}"))));
    rules.push(rename(r"^model\.language_model\.model", "model.language_model"));
    rules
}
