//! What a weights file is by the names of its tensors: adapters in formats that are not read, which
//! messages name, and files that lack what goes with them.

use crate::error::{Error, Result};
use crate::storage::identify::Identity;
use crate::tensor::safetensors::TensorFile;

/// What PEFT puts before the names of a model.
const PEFT: &str = "base_model.";
const READ_LATER: &str = "which cannot be read yet";
/// What of the table below is read where it lies by itself.
const READ: [&str; 7] = [
    "a LoRA of cloneofsimo's",
    "a LoRA in XLabs' names",
    "a LoRA of diffusers' attention processors",
    "a LoRA in diffusers' older names",
    "a LoRA in the names of ComfyUI",
    "a LoRA in diffusers' names",
    "a LoRA in kohya's names",
];
const CONVERT: &str = "convert it to PEFT's or to kohya's plain LoRA";

const CONTROL_LORA: &str = "a Control-LoRA";
const T_LORA: &str = "a T-LoRA";
const MEGATRON: &str = "a LoRA of Megatron's or NeMo's";
const MLX: &str = "a LoRA of MLX's";
const TORCHTUNE: &str = "a LoRA of torchtune's";
/// What to do with those of which more can be said.
const ADVICE: [(&str, &str); 5] = [
    (
        CONTROL_LORA,
        "it makes a ControlNet of its own, and is no update of the model that it controls: load it as \
         a ControlNet",
    ),
    (
        T_LORA,
        "its update is a difference from its start, which an SVD of the base gave and no file holds: \
         save it as a plain LoRA with the program that trained it",
    ),
    (
        MEGATRON,
        "its factors are of fused layers, cut for each process: export it under PEFT's names with \
         Megatron-Bridge",
    ),
    (
        MLX,
        "only its own config tells its scale (lora_parameters.scale): put that beside it, and call the \
         weights adapters.safetensors",
    ),
    (TORCHTUNE, "give it with the config that was saved with it, under the name that it had"),
];

/// A kind of adapter.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Kind {
    /// PEFT's LoRA, which only lacks its config.
    PeftLora,
    /// Of another format, or another method.
    Other(Identity),
    /// What only a config could tell: PEFT's names without factors, or names that are not known.
    Unsure(Identity),
}

impl Kind {
    /// What it is, in words.
    pub fn what(&self) -> &str {
        match self {
            Self::PeftLora => "a LoRA in PEFT's names",
            Self::Other(identity) | Self::Unsure(identity) => &identity.what,
        }
    }
}

/// How a format's keys are known, and its name.
struct Mark {
    /// What one of the keys holds.
    key: fn(&str) -> bool,
    what: &'static str,
}

/// The formats by their keys, the more particular first. The table of suffixes is that of the
/// programs that write them: cloneofsimo/lora, diffusers, LyCORIS, XLabs, mlx-lm, torchtune, llama.cpp,
/// Megatron-Bridge, Sam_LoRA, PEFT.
const MARKS: [Mark; 26] = [
    Mark { key: |key| key == "lora_controlnet", what: CONTROL_LORA },
    Mark {
        key: |key| ends(key, &[".q_layer.weight", ".p_layer.weight", ".lambda_layer"]),
        what: T_LORA,
    },
    Mark { key: is_numbered_pair, what: "a LoRA of cloneofsimo's lora (numbered layers)" },
    Mark { key: |key| has(key, &[".hada_w1", ".hada_w2"]), what: "a LoHa of LyCORIS's" },
    Mark { key: |key| has(key, &[".lokr_w1", ".lokr_w2"]), what: "a LoKr of LyCORIS's" },
    Mark {
        key: |key| has(key, &[".oft_blocks", ".oft_diag"]),
        what: "an OFT adapter of LyCORIS's",
    },
    Mark { key: |key| ends(key, &[".on_input"]), what: "an IA3 adapter of LyCORIS's" },
    Mark {
        key: |key| ends(key, &[".lora_mid.weight"]),
        what: "a LoCon of LyCORIS's (Tucker form)",
    },
    Mark {
        key: |key| key.contains(".processor.") && has(key, &["_lora1.", "_lora2."]),
        what: "a LoRA in XLabs' names",
    },
    Mark {
        key: |key| key.contains(".processor.") && key.contains("_lora."),
        what: "a LoRA of diffusers' attention processors, an older format",
    },
    Mark {
        key: |key| has(key, &[".lora.down.", ".lora.up.", ".lora_linear_layer."]),
        what: "a LoRA in diffusers' older names",
    },
    Mark { key: |key| ends(key, &[".adapter.linear_in.weight"]), what: MEGATRON },
    Mark { key: |key| ends(key, &[".weight.lora_a"]), what: "a LoRA in GGUF's names" },
    Mark { key: |key| ends(key, &[".lora_a"]), what: MLX },
    Mark { key: |key| ends(key, &[".lora_a.weight"]), what: TORCHTUNE },
    Mark { key: is_of_sam_lora, what: "a LoRA of Sam_LoRA's (numbered layers)" },
    Mark {
        key: |key| key.contains("dora_scale"),
        what: "a DoRA in kohya's, OneTrainer's or diffusers' names",
    },
    Mark { key: is_of_comfy, what: "a LoRA in the names of ComfyUI and ai-toolkit" },
    Mark { key: is_of_diffusers, what: "a LoRA in diffusers' names" },
    Mark { key: |key| ends(key, &[".lora_down.weight"]), what: "a LoRA in kohya's names" },
    Mark { key: |key| has(key, &[".ia3_l"]), what: "PEFT's IA3 without its config" },
    Mark { key: |key| has(key, &[".oft_r", ".oft_R"]), what: "PEFT's OFT without its config" },
    Mark { key: |key| has(key, &[".vera_lambda"]), what: "PEFT's VeRA without its config" },
    Mark {
        key: |key| key == "prompt_embeddings",
        what: "PEFT's prompt or prefix tuning without its config",
    },
    Mark { key: |key| ends(key, &[".diff", ".w_norm"]), what: "full differences of LyCORIS's" },
    Mark {
        key: |key| has(key, &["string_to_param", "emb_params"]),
        what: "embeddings of a textual inversion",
    },
];

/// What kind of adapter a file is, if it is one; `None` for the weights of a model.
pub fn kind_of(file: &TensorFile) -> Option<Kind> {
    let keys = || file.header().tensors.iter().map(|tensor| tensor.name.as_str());
    let of_peft = || keys().next().is_some() && keys().all(|key| key.starts_with(PEFT));
    for mark in &MARKS {
        if keys().any(mark.key) {
            if let Some((what, advice)) = ADVICE.iter().find(|(what, _)| *what == mark.what) {
                return Some(Kind::Other(Identity::new(*what, *advice)));
            }
            if !of_peft() && READ.iter().any(|read| mark.what.starts_with(read)) {
                return Some(Kind::Other(Identity::new(mark.what, "give that file by itself")));
            }
            // LyCORIS's methods are PEFT's as well.
            let what = match of_peft() {
                true => format!("an adapter in PEFT's names ({}), {READ_LATER}", mark.what),
                false => format!("{}, {READ_LATER}", mark.what),
            };
            return Some(Kind::Other(Identity::new(what, CONVERT)));
        }
    }
    if has_factors_of_peft(file) {
        return Some(Kind::PeftLora);
    }
    if of_peft() {
        return Some(Kind::Unsure(Identity::new(
            "an adapter of PEFT's other than a plain LoRA, without its config",
            "give the directory that has its config",
        )));
    }
    let key = keys().find(|key| key.to_lowercase().contains("lora"))?;
    let what = format!("an adapter in names that are not known (such as {key})");
    Some(Kind::Unsure(Identity::new(what, CONVERT)))
}

/// Whether any key is of a factor as PEFT names it.
pub fn has_factors_of_peft(file: &TensorFile) -> bool {
    let mut keys = file.header().tensors.iter().map(|tensor| tensor.name.as_str());
    keys.any(|key| has(key, &[".lora_A.", ".lora_B.", ".lora_embedding_"]))
}

/// Refuses weights that DeepSpeed's ZeRO-3 left empty.
///
/// # Errors
/// [`Error::Adapter`].
pub fn check_gathered(file: &TensorFile) -> Result<()> {
    match file.header().left_empty() {
        Some(message) => Err(Error::adapter(file.path(), message)),
        None => Ok(()),
    }
}

fn has(key: &str, parts: &[&str]) -> bool {
    parts.iter().any(|part| key.contains(part))
}

fn ends(key: &str, endings: &[&str]) -> bool {
    endings.iter().any(|ending| key.ends_with(ending))
}

/// `unet:0:down`, `text_encoder:11:up`.
fn is_numbered_pair(key: &str) -> bool {
    let mut parts = key.rsplit(':');
    let side = parts.next().is_some_and(|part| part == "up" || part == "down");
    side && parts.next().is_some_and(|number| number.parse::<u32>().is_ok())
}

/// `w_a_000`, `w_b_023`.
fn is_of_sam_lora(key: &str) -> bool {
    let number = key.strip_prefix("w_a_").or_else(|| key.strip_prefix("w_b_"));
    number.is_some_and(|number| number.len() == 3 && number.parse::<u32>().is_ok())
}

fn is_of_comfy(key: &str) -> bool {
    has(key, &[".lora_A.", ".lora_down."]) && key.starts_with("diffusion_model.")
}

/// A component's name before PEFT's keys. Models of transformers have a `transformer.` of their own.
fn is_of_diffusers(key: &str) -> bool {
    let of_component = ["unet.", "text_encoder.", "text_encoder_2.", "text_encoder_3."];
    let block = |key: &str| key.split('.').nth(1).is_some_and(|part| part.ends_with("blocks"));
    key.contains(".lora_A.")
        && (of_component.iter().any(|component| key.starts_with(component))
            || key.starts_with("transformer.") && block(key))
}

#[cfg(test)]
mod tests {
    use std::path::Path;

    use super::*;
    use crate::error::Owner;
    use crate::tensor::dtype::Dtype;
    use crate::tensor::safetensors::NamedTensor;

    fn kind(keys: &[&str]) -> Option<Kind> {
        let tensor = |key: &&str| NamedTensor {
            name: (*key).to_owned(),
            dtype: Dtype::F32,
            shape: vec![1],
            bytes: None,
        };
        let tensors = keys.iter().map(tensor).collect();
        let file = TensorFile::in_memory(Path::new("x"), Owner::Adapter, tensors, None);
        kind_of(&file.expect("sound"))
    }

    fn what(key: &str) -> String {
        match kind(&[key]) {
            Some(Kind::Other(identity) | Kind::Unsure(identity)) => identity.what,
            other => format!("{other:?}"),
        }
    }

    #[test]
    fn a_format_is_known_by_its_keys() {
        for (key, name) in [
            ("unet:9:up", "cloneofsimo"),
            ("lora_te_x.lokr_w1_a", "LoKr of LyCORIS"),
            ("lora_unet_x.hada_w1_a", "LoHa of LyCORIS"),
            ("double_blocks.0.processor.qkv_lora1.down.weight", "XLabs"),
            ("down_blocks.0.attn1.processor.to_q_lora.down.weight", "attention processors"),
            ("unet.x.lora.down.weight", "diffusers' older names"),
            ("unet.x.to_k.lora_A.weight", "LoRA in diffusers' names"),
            ("transformer.single_transformer_blocks.0.lora_A.weight", "LoRA in diffusers' names"),
            ("diffusion_model.x.lora_A.weight", "ComfyUI"),
            ("model.layers.0.q_proj.lora_a", "MLX"),
            ("blk.0.attn_q.weight.lora_a", "GGUF"),
            ("layers.0.attn.q_proj.lora_a.weight", "torchtune"),
            ("lora_unet_x.q_layer.weight", "T-LoRA"),
            ("lora_controlnet", "Control-LoRA"),
            ("w_a_000", "Sam_LoRA"),
            ("base_model.unilora_theta_d", "an adapter of PEFT's other than"),
            ("x.lora_V", "names that are not known (such as x.lora_V)"),
        ] {
            assert!(what(key).contains(name), "{key}: {}", what(key));
        }
        assert!(what("base_model.model.x.lokr_w1").contains("PEFT's names"));
        for key in ["base_model.model.x.lora_A.weight", "transformer.h.0.c_attn.lora_A.weight"] {
            assert_eq!(kind(&[key]), Some(Kind::PeftLora), "{key}");
        }
        assert_eq!(kind(&["model.layers.0.mlp.up_proj.weight"]), None);
    }
}
