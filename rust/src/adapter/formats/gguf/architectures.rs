//! llama.cpp's architectures: which models of transformers each stands for, how it names their
//! tensors, and in which order it stores the rows of their attention.
//!
//! Orders are those of llama.cpp's converters (`conversion/`).

use super::names::{
    ATTENTION, BLOOM, BLOOM_TOP, CHATGLM, CHATGLM_TOP, EXAONE, EXPERTS, FUSED_ATTENTION,
    FUSED_GATE_UP, GATED, GPT2, GPT2_TOP, Group, HUNYUAN_MOE, LATENT, LFM2, LINEAR_ATTENTION,
    LLAMA4, MIXTRAL, MPT, NEOX, NEOX_TOP, Name, PHI2, QWEN, SHARED_EXPERT, SHARED_EXPERTS,
    STARCODER2, TOP, UP_DOWN,
};
use super::rows::Rows;

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
pub static ARCHITECTURES: [Architecture; 61] = [
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
    of("qwen", &["qwen"], Rows::AsStored, &[&GPT2_TOP, &QWEN]),
    of("exaone", &["exaone"], Rows::AsStored, &[&GPT2_TOP, &EXAONE]),
    of("mpt", &["mpt"], Rows::AsStored, &[&GPT2_TOP, &MPT]),
    of("chatglm", &["chatglm"], Rows::AsStored, &[&CHATGLM_TOP, &CHATGLM]),
    of("lfm2", &["lfm2"], Rows::AsStored, &[&TOP, &LFM2]),
    of("hunyuan-moe", &["hunyuan_v1_moe"], Rows::AsStored, &[&TOP, &ATTENTION, &HUNYUAN_MOE]),
    of(
        "ernie4_5-moe",
        &["ernie4_5_moe"],
        Rows::AsStored,
        &[&TOP, &ATTENTION, &GATED, &EXPERTS, &SHARED_EXPERTS],
    ),
    of("minimax-m2", &["minimax_m2"], Rows::AsStored, &[&TOP, &ATTENTION, &MIXTRAL]),
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
