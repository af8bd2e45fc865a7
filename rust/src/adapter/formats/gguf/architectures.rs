//! llama.cpp's architectures: which models of transformers each stands for, how it names their
//! tensors, and in which order it stores the rows of their attention.
//!
//! Names are those of gguf-py's tensor map (`gguf-py/gguf/tensor_mapping.py`), against which
//! `tests/formats/test_gguf.py` holds them; orders those of llama.cpp's converters (`conversion/`).

use super::rows::Rows;

/// A tensor's name without its `.weight`, and that of the module in transformers. `{}` stands for the
/// number of a block, `{e}` for that of an expert.
type Name = (&'static str, &'static str);

/// Names that stand in blocks of one name.
struct Group {
    /// What comes before those of transformers.
    module: &'static str,
    /// What comes before llama.cpp's.
    tensor: &'static str,
    names: &'static [Name],
}

/// One of llama.cpp's architectures.
pub struct Architecture {
    /// Its name in GGUF files.
    pub name: &'static str,
    /// The `model_type`s of transformers that it stands for.
    pub model_types: &'static [&'static str],
    /// The order of rows.
    pub rows: Rows,
    groups: &'static [&'static Group],
}

/// A module that a tensor belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Target {
    /// Its path in transformers; of experts, with `{e}` in the place of the number.
    pub module: String,
    /// The tensor's name within its block.
    pub tensor: &'static str,
}

impl Target {
    /// Whether the module is one of several experts.
    pub fn is_of_experts(&self) -> bool {
        self.module.contains(EXPERT)
    }
}

/// What stands for an expert's number.
pub const EXPERT: &str = "{e}";
const BLOCK: &str = "{}";

const fn in_blocks(module: &'static str, names: &'static [Name]) -> Group {
    Group { module, tensor: "blk.{}.", names }
}

static TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "model.embed_tokens"), ("output", "lm_head")],
};
static ATTENTION: Group = in_blocks(
    "model.layers.{}.self_attn.",
    &[("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj")],
);
static GATED: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")],
);
static UP_DOWN: Group =
    in_blocks("model.layers.{}.mlp.", &[("ffn_up", "up_proj"), ("ffn_down", "down_proj")]);
static FUSED_GATE_UP: Group =
    in_blocks("model.layers.{}.mlp.", &[("ffn_up", "gate_up_proj"), ("ffn_down", "down_proj")]);
static FUSED_ATTENTION: Group =
    in_blocks("model.layers.{}.self_attn.", &[("attn_qkv", "qkv_proj"), ("attn_output", "o_proj")]);
static MIXTRAL: Group = in_blocks(
    "model.layers.{}.block_sparse_moe.",
    &[
        ("ffn_gate_inp", "gate"),
        ("ffn_gate_exps", "experts.{e}.w1"),
        ("ffn_up_exps", "experts.{e}.w3"),
        ("ffn_down_exps", "experts.{e}.w2"),
    ],
);
static EXPERTS: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[
        ("ffn_gate_inp", "gate"),
        ("ffn_gate_exps", "experts.{e}.gate_proj"),
        ("ffn_up_exps", "experts.{e}.up_proj"),
        ("ffn_down_exps", "experts.{e}.down_proj"),
    ],
);
static SHARED_EXPERT: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[
        ("ffn_gate_inp_shexp", "shared_expert_gate"),
        ("ffn_gate_shexp", "shared_expert.gate_proj"),
        ("ffn_up_shexp", "shared_expert.up_proj"),
        ("ffn_down_shexp", "shared_expert.down_proj"),
    ],
);
static SHARED_EXPERTS: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[
        ("ffn_gate_shexp", "shared_experts.gate_proj"),
        ("ffn_up_shexp", "shared_experts.up_proj"),
        ("ffn_down_shexp", "shared_experts.down_proj"),
    ],
);
/// Of multi-head latent attention; `kv_b_proj` is stored in two pieces, which have no names here.
static LATENT: Group = in_blocks(
    "model.layers.{}.self_attn.",
    &[
        ("attn_q", "q_proj"),
        ("attn_q_a", "q_a_proj"),
        ("attn_q_b", "q_b_proj"),
        ("attn_kv_a_mqa", "kv_a_proj_with_mqa"),
        ("attn_output", "o_proj"),
    ],
);
static PHI2: Group = in_blocks(
    "model.layers.{}.",
    &[
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.dense"),
        ("ffn_up", "mlp.fc1"),
        ("ffn_down", "mlp.fc2"),
    ],
);
static STARCODER2: Group =
    in_blocks("model.layers.{}.mlp.", &[("ffn_up", "c_fc"), ("ffn_down", "c_proj")]);
static GPT2_TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "transformer.wte"), ("output", "lm_head")],
};
static GPT2: Group = in_blocks(
    "transformer.h.{}.",
    &[
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
);
static BLOOM_TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "transformer.word_embeddings"), ("output", "lm_head")],
};
static BLOOM: Group = in_blocks(
    "transformer.h.{}.",
    &[
        ("attn_qkv", "self_attention.query_key_value"),
        ("attn_output", "self_attention.dense"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
);
static NEOX_TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "gpt_neox.embed_in"), ("output", "embed_out")],
};
static NEOX: Group = in_blocks(
    "gpt_neox.layers.{}.",
    &[
        ("attn_qkv", "attention.query_key_value"),
        ("attn_output", "attention.dense"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
);
static LLAMA4: Group = in_blocks(
    "model.layers.{}.feed_forward.",
    &[
        ("ffn_gate", "gate_proj"),
        ("ffn_up", "up_proj"),
        ("ffn_down", "down_proj"),
        ("ffn_gate_inp", "router"),
        ("ffn_gate_shexp", "shared_expert.gate_proj"),
        ("ffn_up_shexp", "shared_expert.up_proj"),
        ("ffn_down_shexp", "shared_expert.down_proj"),
    ],
);
/// The attention of linear layers, stored as they stand where there are as many heads of keys as of
/// values.
static LINEAR_ATTENTION: Group = in_blocks(
    "model.layers.{}.linear_attn.",
    &[
        ("attn_qkv", "in_proj_qkv"),
        ("attn_gate", "in_proj_z"),
        ("ssm_alpha", "in_proj_a"),
        ("ssm_beta", "in_proj_b"),
        ("ssm_out", "out_proj"),
    ],
);

const DENSE: &[&Group] = &[&TOP, &ATTENTION, &GATED];

const fn of(
    name: &'static str,
    model_types: &'static [&'static str],
    rows: Rows,
    groups: &'static [&'static Group],
) -> Architecture {
    Architecture { name, model_types, rows, groups }
}

/// Every architecture that is known.
pub static ARCHITECTURES: [Architecture; 53] = [
    of(
        "llama",
        &["llama", "mistral", "mixtral", "internlm3"],
        Rows::Rotary,
        &[&TOP, &ATTENTION, &GATED, &MIXTRAL],
    ),
    of("llama4", &["llama4"], Rows::AsStored, &[&TOP, &ATTENTION, &LLAMA4]),
    of("mistral3", &["ministral3", "mistral3"], Rows::Rotary, DENSE),
    of("smollm3", &["smollm3"], Rows::Rotary, DENSE),
    of("arcee", &["arcee"], Rows::Rotary, &[&TOP, &ATTENTION, &UP_DOWN]),
    of("granite", &["granite"], Rows::Rotary, DENSE),
    of("granitemoe", &["granitemoe"], Rows::Rotary, &[&TOP, &ATTENTION]),
    of("granitehybrid", &["granitemoehybrid"], Rows::Rotary, &[&TOP, &ATTENTION]),
    of("minicpm", &["minicpm"], Rows::Rotary, DENSE),
    of("olmo", &["olmo"], Rows::Rotary, DENSE),
    of(
        "deepseek",
        &["deepseek"],
        Rows::Rotary,
        &[&TOP, &ATTENTION, &GATED, &EXPERTS, &SHARED_EXPERTS],
    ),
    of("xverse", &["xverse"], Rows::Rotary, DENSE),
    of(
        "deepseek2",
        &["deepseek_v2", "deepseek_v3", "kimi_k2"],
        Rows::AsStored,
        &[&TOP, &LATENT, &GATED, &EXPERTS, &SHARED_EXPERTS],
    ),
    of("qwen2", &["qwen2"], Rows::AsStored, DENSE),
    of("dream", &["Dream", "dream"], Rows::AsStored, DENSE),
    of("qwen2vl", &["qwen2_vl", "qwen2_5_vl"], Rows::AsStored, DENSE),
    of("qwen3", &["qwen3"], Rows::AsStored, DENSE),
    of("qwen3vl", &["qwen3_vl"], Rows::AsStored, DENSE),
    of(
        "qwen2moe",
        &["qwen2_moe"],
        Rows::AsStored,
        &[&TOP, &ATTENTION, &GATED, &EXPERTS, &SHARED_EXPERT],
    ),
    of("qwen3moe", &["qwen3_moe"], Rows::AsStored, &[&TOP, &ATTENTION, &GATED, &EXPERTS]),
    of("qwen3vlmoe", &["qwen3_vl_moe"], Rows::AsStored, &[&TOP, &ATTENTION, &GATED, &EXPERTS]),
    of(
        "qwen35",
        &["qwen3_5"],
        Rows::LinearAttention,
        &[&TOP, &ATTENTION, &GATED, &LINEAR_ATTENTION],
    ),
    of(
        "qwen35moe",
        &["qwen3_5_moe"],
        Rows::LinearAttention,
        &[&TOP, &ATTENTION, &LINEAR_ATTENTION, &EXPERTS, &SHARED_EXPERT],
    ),
    of(
        "qwen3next",
        &["qwen3_next"],
        Rows::AsStored,
        &[&TOP, &ATTENTION, &GATED, &EXPERTS, &SHARED_EXPERT],
    ),
    of("gemma", &["gemma"], Rows::AsStored, DENSE),
    of("gemma2", &["gemma2"], Rows::AsStored, DENSE),
    of("gemma3", &["gemma3"], Rows::AsStored, DENSE),
    of("gemma3n", &["gemma3n"], Rows::AsStored, DENSE),
    of("phi2", &["phi"], Rows::AsStored, &[&TOP, &PHI2]),
    of("phi3", &["phi3"], Rows::AsStored, &[&TOP, &FUSED_ATTENTION, &FUSED_GATE_UP]),
    of("phimoe", &["phimoe"], Rows::AsStored, &[&TOP, &ATTENTION, &MIXTRAL]),
    of("stablelm", &["stablelm"], Rows::AsStored, DENSE),
    of("starcoder2", &["starcoder2"], Rows::AsStored, &[&TOP, &ATTENTION, &STARCODER2]),
    of("command-r", &["cohere"], Rows::AsStored, DENSE),
    of("cohere2", &["cohere2"], Rows::AsStored, DENSE),
    of("olmo2", &["olmo2", "olmo3"], Rows::AsStored, DENSE),
    of("olmoe", &["olmoe"], Rows::AsStored, &[&TOP, &ATTENTION, &EXPERTS]),
    of("orion", &["orion"], Rows::AsStored, DENSE),
    of("nemotron", &["nemotron"], Rows::AsStored, &[&TOP, &ATTENTION, &UP_DOWN]),
    of("apertus", &["apertus"], Rows::AsStored, &[&TOP, &ATTENTION, &UP_DOWN]),
    of("exaone4", &["exaone4"], Rows::AsStored, DENSE),
    of("seed_oss", &["seed_oss"], Rows::AsStored, DENSE),
    of("ernie4_5", &["ernie4_5"], Rows::AsStored, DENSE),
    of("hunyuan-dense", &["hunyuan_v1_dense"], Rows::AsStored, DENSE),
    of("glm4", &["glm4"], Rows::AsStored, &[&TOP, &ATTENTION, &FUSED_GATE_UP]),
    of(
        "glm4moe",
        &["glm4_moe"],
        Rows::AsStored,
        &[&TOP, &ATTENTION, &GATED, &EXPERTS, &SHARED_EXPERTS],
    ),
    of("dots1", &["dots1"], Rows::AsStored, &[&TOP, &ATTENTION, &GATED, &EXPERTS, &SHARED_EXPERTS]),
    of("gpt-oss", &["gpt_oss"], Rows::AsStored, &[&TOP, &ATTENTION]),
    of("gpt2", &["gpt2"], Rows::AsStored, &[&GPT2_TOP, &GPT2]),
    of("starcoder", &["gpt_bigcode"], Rows::AsStored, &[&GPT2_TOP, &GPT2]),
    of("bloom", &["bloom"], Rows::FusedByHead, &[&BLOOM_TOP, &BLOOM]),
    of("gptneox", &["gpt_neox"], Rows::FusedByHead, &[&NEOX_TOP, &NEOX]),
    of(
        "falcon",
        &["falcon", "RefinedWeb", "RefinedWebModel"],
        Rows::FusedByHead,
        &[&BLOOM_TOP, &BLOOM],
    ),
];

/// The architecture of that name in GGUF files.
pub fn named(name: &str) -> Option<&'static Architecture> {
    ARCHITECTURES.iter().find(|one| one.name == name)
}

/// The architecture that a model of transformers becomes, by its `model_type`.
pub fn of_model_type(model_type: &str) -> Option<&'static Architecture> {
    // The language model within a model of several has a type of its own.
    let whole = model_type.strip_suffix("_text").unwrap_or(model_type);
    ARCHITECTURES.iter().find(|one| one.model_types.contains(&whole))
}

impl Architecture {
    fn names(&self) -> impl Iterator<Item = (&'static Group, &'static Name)> {
        self.groups.iter().flat_map(|group| group.names.iter().map(move |name| (*group, name)))
    }

    /// The module of a tensor, by the tensor's name without `.weight`.
    pub fn module_of(&self, tensor: &str) -> Option<Target> {
        let (block, own) = match tensor.strip_prefix("blk.") {
            Some(rest) => {
                let (block, own) = rest.split_once('.')?;
                (Some(block).filter(|block| is_number(block))?, own)
            }
            None => ("", tensor),
        };
        let is_in_block = tensor.starts_with("blk.");
        self.names().find_map(|(group, (name, module))| {
            let fits = *name == own && group.tensor.is_empty() != is_in_block;
            fits.then(|| Target {
                module: format!("{}{module}", group.module.replace(BLOCK, block)),
                tensor: name,
            })
        })
    }

    /// The tensor of a module, without `.weight`, the tensor's name within its block, and which
    /// expert it is. What holds the language model may stand before the module's path, or be left
    /// out of it.
    pub fn tensor_of(&self, path: &str) -> Option<(String, &'static str, Option<u64>)> {
        self.names().find_map(|(group, (name, module))| {
            let pattern = format!("{}{module}", group.module);
            let (block, expert) = match_path(&pattern, path)?;
            let block = block.unwrap_or_default();
            Some((format!("{}{name}", group.tensor.replace(BLOCK, block)), *name, expert))
        })
    }

    /// Every pair of names, with the given block's and expert's numbers.
    #[cfg(test)]
    pub fn all(&self) -> Vec<(String, String)> {
        let pairs = self.names().map(|(group, (name, module))| {
            let tensor = format!("{}{name}", group.tensor).replace(BLOCK, "0");
            (tensor, format!("{}{module}", group.module).replace(BLOCK, "0"))
        });
        pairs.collect()
    }
}

/// What may stand before the names of a language model.
const LEADING: [&str; 7] = [
    "",
    "language_model.",
    "model.language_model.",
    "language_model.model.",
    "model.language_model.model.",
    "model.text_model.",
    "thinker.model.",
];

/// The block's number and the expert's of a path that has that form.
fn match_path<'a>(pattern: &str, path: &'a str) -> Option<(Option<&'a str>, Option<u64>)> {
    let forms = |lead: &'static str| {
        // Of models that lie in another one, `model.` is left out as well.
        let whole = ["model.", "transformer.", "gpt_neox."];
        let bare = whole.into_iter().find_map(|whole| pattern.strip_prefix(whole));
        let rest = path.strip_prefix(lead);
        [Some(pattern), bare].into_iter().flatten().filter_map(move |form| Some((form, rest?)))
    };
    LEADING.into_iter().flat_map(forms).find_map(|(form, rest)| {
        let (mut block, mut expert) = (None, None);
        let mut parts = rest.split('.');
        for wanted in form.split('.') {
            let part = parts.next()?;
            match wanted {
                BLOCK => block = Some(part).filter(|part| is_number(part)).map(Some)?,
                EXPERT => {
                    expert =
                        Some(part).filter(|part| is_number(part)).map(|part| part.parse().ok())?;
                }
                _ if part == wanted => {}
                _ => return None,
            }
        }
        parts.next().is_none().then_some((block, expert))
    })
}

fn is_number(part: &str) -> bool {
    !part.is_empty() && part.len() <= 9 && part.bytes().all(|byte| byte.is_ascii_digit())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_go_both_ways() {
        for architecture in &ARCHITECTURES {
            let mut tensors = std::collections::HashSet::new();
            for (tensor, module) in architecture.all() {
                assert!(tensors.insert(tensor.clone()), "{}: {tensor} twice", architecture.name);
                let target = architecture.module_of(&tensor).expect("known");
                assert_eq!(target.module, module, "{}", architecture.name);
                let path = module.replace(EXPERT, "7");
                let (back, own, expert) = architecture.tensor_of(&path).expect("known");
                assert_eq!((back.as_str(), own), (tensor.as_str(), target.tensor));
                assert_eq!(expert, target.is_of_experts().then_some(7));
            }
        }
    }

    #[test]
    fn a_language_model_within_another_has_the_same_tensors() {
        let llama = named("llama").expect("known");
        let tensor = |path| llama.tensor_of(path).map(|(name, ..)| name);
        for path in [
            "model.layers.3.self_attn.q_proj",
            "layers.3.self_attn.q_proj",
            "language_model.model.layers.3.self_attn.q_proj",
            "model.language_model.layers.3.self_attn.q_proj",
        ] {
            assert_eq!(tensor(path).as_deref(), Some("blk.3.attn_q"), "{path}");
        }
        for path in [
            "vision_tower.layers.3.self_attn.q_proj",
            "model.layers.x.self_attn.q_proj",
            "model.layers.3.self_attn.q_proj.inner",
            "model.layers.3.self_attn",
        ] {
            assert_eq!(tensor(path), None, "{path}");
        }
        assert_eq!(llama.module_of("blk.x.attn_q"), None);
        assert_eq!(llama.module_of("attn_q"), None);
        assert_eq!(llama.module_of("blk.0.output"), None);
    }
}
