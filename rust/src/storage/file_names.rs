//! The names of files in models' directories: weights and their shards, what only a model has, reports,
//! and an adapter's files.

/// The config that makes a directory an adapter.
pub const ADAPTER_CONFIG: &str = "adapter_config.json";

/// The files that make a directory an adapter's.
pub const ADAPTER_FILES: [&str; 3] =
    ["adapter_model.safetensors", "adapter_model.bin", ADAPTER_CONFIG];
/// Endings of files that hold weights in whatever format.
const WEIGHTS: [&str; 13] = [
    ".safetensors",
    ".bin",
    ".pt",
    ".pth",
    ".ckpt",
    ".msgpack",
    ".h5",
    ".ot",
    ".gguf",
    ".onnx",
    ".onnx_data",
    ".npz",
    ".tflite",
];
/// What merges and analyses say of the directory that they lie in.
pub const REPORTS: [&str; 5] = [
    "merge_info.json",
    "merge_report.json",
    "merge_report.md",
    "subtract_report.json",
    "subtract_report.md",
];
/// Names that only a model's files have: what a new model does not replace of them would belong to
/// none.
pub const OF_A_MODEL: [&str; 28] = [
    "config.json",
    "model.safetensors",
    "pytorch_model.bin",
    "diffusion_pytorch_model.safetensors",
    "diffusion_pytorch_model.bin",
    "model_index.json",
    "scheduler_config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "tokenizer.model",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece.bpe.model",
    "source.spm",
    "target.spm",
    "tekken.json",
    "chat_template.jinja",
    "chat_template.json",
    "preprocessor_config.json",
    "processor_config.json",
    "video_preprocessor_config.json",
    "image_processor_config.json",
    "hf_quant_config.json",
];
/// How the shards of a model are named: this, `-00001-of-00002`, `.safetensors`.
const SHARD_STEMS: [&str; 2] = ["model", "diffusion_pytorch_model"];

/// Whether a name is that of a file with weights, in whatever format.
pub fn holds_weights(name: &str) -> bool {
    let lower = name.to_lowercase();
    WEIGHTS.iter().any(|ending| lower.ends_with(ending))
}

/// Whether a name in an output says that the file belongs to the model there, or reports on it.
pub fn is_of_a_model(name: &str) -> bool {
    let is_shard = || shard_of(name).is_some_and(|(stem, ..)| SHARD_STEMS.contains(&stem));
    OF_A_MODEL.contains(&name) || is_report(name) || is_shard() || is_variant(name)
}

/// Whether a name is that of a variant of a model's weights: `model.fp16.safetensors`, and its shards.
fn is_variant(name: &str) -> bool {
    let rests = SHARD_STEMS.iter().filter_map(|stem| name.strip_prefix(stem));
    let mut rests = rests.filter(|rest| rest.starts_with('.') || rest.starts_with('-'));
    name.ends_with(".safetensors")
        && rests.any(|rest| rest.starts_with('.') || rest.contains("-of-"))
}

/// The last part of a name that can lie in a folder.
pub fn last_part(name: &str) -> &str {
    name.rsplit('/').next().unwrap_or(name)
}

/// Whether a name in an output is that of a report on the model there, or of what a report leaves
/// whose writing was cut off.
pub fn is_report(name: &str) -> bool {
    REPORTS.contains(&name) || name.starts_with(".lorafast-") && name.ends_with(".part")
}

/// Stem, number and count of a shard by its name: `model-00001-of-00003.safetensors`.
pub fn shard_of(name: &str) -> Option<(&str, u64, u64)> {
    let digits = |text: &str| {
        let plain = text.len() >= 5 && text.bytes().all(|byte| byte.is_ascii_digit());
        plain.then(|| text.parse().ok()).flatten()
    };
    let (rest, count) = name.strip_suffix(".safetensors")?.rsplit_once("-of-")?;
    let (stem, number) = rest.rsplit_once('-')?;
    Some((stem, digits(number)?, digits(count)?))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_shard_is_told_by_its_name() {
        assert_eq!(shard_of("model-00002-of-00003.safetensors"), Some(("model", 2, 3)));
        assert_eq!(shard_of("a-b-00001-of-00001.safetensors"), Some(("a-b", 1, 1)));
        assert_eq!(shard_of("model-2-of-3.safetensors"), None);
        assert_eq!(shard_of("model.safetensors"), None);
    }

    #[test]
    fn variants_belong_to_models() {
        for name in [
            "model.fp16.safetensors",
            "diffusion_pytorch_model.non_ema.safetensors",
            "diffusion_pytorch_model.fp16-00001-of-00002.safetensors",
            "diffusion_pytorch_model-00001-of-00002.fp16.safetensors",
            "model_index.json",
        ] {
            assert!(is_of_a_model(name), "{name}");
        }
        for name in ["model-mine.safetensors", "modelled.safetensors", "model.fp16.txt"] {
            assert!(!is_of_a_model(name), "{name}");
        }
    }
}
