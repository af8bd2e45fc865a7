//! What each field of a config means for a merge.

use serde_json::Value;

use super::{Method, PeftConfig};
use crate::adapter::coverage::{
    PartUse,
    Usage::{self, NotNeeded, Refused, Used},
};
use crate::adapter::semantics::Initialization;

/// Whether a value leaves a field unset.
fn is_unset(value: &Value) -> bool {
    match value {
        Value::Null | Value::Bool(false) => true,
        Value::Array(items) => items.is_empty(),
        Value::Object(fields) => fields.is_empty(),
        Value::Bool(true) | Value::Number(_) | Value::String(_) => false,
    }
}

/// Every field that a PEFT LoRA config of the releases up to 0.21 can hold, where its value does
/// not matter here.
fn meaning(field: &str) -> Option<(Usage, &'static str)> {
    Some(match field {
        "peft_type" => (Used, "says what kind of adapter this is"),
        "feedforward_modules" => (Used, "says of which modules the inputs are scaled"),
        "rank_dropout" | "rank_dropout_scale" | "module_dropout" | "init_weights"
        | "init_ia3_weights" => (NotNeeded, "mattered in training only"),
        "use_effective_conv2d" | "decompose_both" | "decompose_factor" => {
            (NotNeeded, "the tensors in the file say the same")
        }
        "oft_block_size" => (NotNeeded, "the tensors in the file say the same"),
        "coft" | "eps" | "block_share" | "use_cayley_neumann" | "num_cayley_neumann_terms" => {
            (Used, "says how rotations are made of the blocks")
        }
        "r" | "rank_pattern" => (Used, "gives the modules' ranks"),
        "lora_alpha" | "alpha_pattern" => (Used, "gives the modules' scales"),
        "use_rslora" => (Used, "makes the scale α/√r"),
        "use_dora" => (Used, "rescales each output by a trained magnitude"),
        "fan_in_fan_out" => (Used, "a hint at how weights are stored"),
        "target_parameters" => (Used, "says which parameters the factors belong to"),
        "trainable_token_indices" => (Used, "says which rows of an embedding are replaced"),
        "use_bdlora" => (Used, "says which factors are block-diagonal"),
        "kasa_config" => (Used, "takes the smallest singular components out of the base"),
        "enable_lora" => (Used, "says which parts of a fused weight have factors"),
        "modules_to_save" => (Used, "says which modules are replaced whole"),
        "ensure_weight_tying" => (Used, "says whether tied modules were trained as one"),
        "peft_version" => (Used, "tells how experts' factors lie where shapes do not"),
        "task_type"
        | "auto_mapping"
        | "revision"
        | "base_model_name_or_path"
        | "inference_mode" => (NotNeeded, "says what the base is, which is given"),
        "target_modules"
        | "exclude_modules"
        | "layers_to_transform"
        | "layers_pattern"
        | "bias"
        | "lora_bias" => (NotNeeded, "the tensors in the file say the same"),
        "lora_dropout" | "runtime_config" | "merge_weights" | "megatron_core"
        | "qalora_group_size" => (NotNeeded, "mattered in training only"),
        "loftq_config" | "eva_config" | "corda_config" | "lora_ga_config" => (
            NotNeeded,
            "says how the factors began; init_lora_weights, whether that changed the base",
        ),
        "velora_config" | "monteclora_config" => {
            (NotNeeded, "its tensors were used in training only")
        }
        "layer_replication" => (Used, "says which layers of the base are repeated"),
        "alora_invocation_tokens" => (
            Refused,
            "is an activated LoRA (alora_invocation_tokens), which acts only after its invocation \
             and so cannot be merged; serve it beside its base",
        ),
        "use_qalora" => (
            Refused,
            "is a QALoRA (use_qalora), which acts on groups of quantised inputs and cannot be \
             merged; serve it beside its base",
        ),
        "arrow_config" => (
            Refused,
            "is routed by Arrow (arrow_config), which chooses an adapter for each token and cannot \
             be merged; merge one of its adapters",
        ),
        _ => return None,
    })
}

impl PeftConfig {
    /// What becomes of each field. What cannot be merged is refused, in half a sentence that names
    /// the field.
    pub fn uses(&self) -> Vec<PartUse> {
        let part = |(field, value): (&String, &Value)| {
            PartUse::new(field.as_str(), self.usage_of(field, value))
        };
        let mut uses: Vec<_> = self.raw.iter().map(part).collect();
        if self.is_missing() {
            let reason = format!("has no {}, which tells its scale and its kind", super::FILE_NAME);
            uses.push(PartUse::new(super::FILE_NAME, (Refused, reason)));
        }
        uses
    }

    fn usage_of(&self, field: &str, value: &Value) -> (Usage, String) {
        match (field, meaning(field)) {
            ("init_lora_weights", _) => self.usage_of_initialization(value),
            ("alpha", _) if self.method == Method::Lora => self.usage_of_alpha(value),
            ("alpha", _) => (Used, "gives the modules' scales".into()),
            _ if is_unset(value) && field != "fan_in_fan_out" => (NotNeeded, "is not set".into()),
            ("megatron_config", _) => usage_of_megatron(value),
            (_, Some((usage, reason))) => (usage, reason.to_owned()),
            (_, None) => (
                Refused,
                format!(
                    "has the unknown config field {field} = {value}, which could change the \
                     result; allow it by name if it does not"
                ),
            ),
        }
    }

    /// A stray copy of `lora_alpha` that some tools write.
    fn usage_of_alpha(&self, value: &Value) -> (Usage, String) {
        match value {
            Value::Null => (NotNeeded, "is not set".into()),
            _ if value.as_f64() == Some(self.alpha) => (NotNeeded, "repeats lora_alpha".into()),
            _ => (
                Refused,
                format!(
                    "has the field alpha = {value} beside lora_alpha = {}; remove the wrong one",
                    self.alpha
                ),
            ),
        }
    }

    fn usage_of_initialization(&self, value: &Value) -> (Usage, String) {
        let kind = value.as_str().unwrap_or_default().to_lowercase();
        match self.features.init_lora_weights {
            Initialization::Plain | Initialization::Smallest => {
                (NotNeeded, "left the base as it is".into())
            }
            Initialization::Largest { .. } => {
                (Used, "took the largest singular components out of the base".into())
            }
            Initialization::Leading => {
                (Used, "took the first components of a QR decomposition out of the base".into())
            }
            Initialization::Unknown if ["loftq", "lora_ga", "corda"].contains(&kind.as_str()) => (
                Refused,
                format!(
                    "was initialised with {value} (init_lora_weights), which changed the base in \
                     a way that its files do not tell: convert it in training \
                     (save_pretrained(…, path_initial_model_for_weight_conversion=…)), or give the \
                     changed base and allow init_lora_weights"
                ),
            ),
            Initialization::Unknown => (
                Refused,
                format!(
                    "was initialised with {value} (init_lora_weights), which is unknown and could \
                     have changed the base; allow init_lora_weights if it did not"
                ),
            ),
        }
    }
}

/// Megatron's layers hold plain LoRA, but where tensors are split between processes each saves its
/// own part.
fn usage_of_megatron(value: &Value) -> (Usage, String) {
    match value.get("tensor_model_parallel_size").and_then(Value::as_u64) {
        Some(parts) if parts > 1 => (
            Refused,
            format!(
                "holds one of {parts} parts of Megatron's tensor-parallel layers \
                 (megatron_config); gather them into one adapter first"
            ),
        ),
        _ => (NotNeeded, "Megatron's layers hold plain LoRA".into()),
    }
}
