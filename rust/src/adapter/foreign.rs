//! Factors in layouts and under names that no format here reads, told by their shapes and keys, so
//! that a refusal says what they are.

use super::expert_factors::Stack;
use crate::tensor::safetensors::TensorInfo;

/// By the last parts of a key: what the tensor is, and who writes it so.
const ENDINGS: [(&str, &str); 33] = [
    (".lora_a", "a factor as MLX writes it"),
    (".lora_b", "a factor as MLX writes it"),
    (".lora_a.weight", "a factor as torchtune writes it"),
    (".lora_b.weight", "a factor as torchtune writes it"),
    (".weight.lora_a", "a factor as GGUF files have it"),
    (".weight.lora_b", "a factor as GGUF files have it"),
    (".adapter.linear_in.weight", "a factor as Megatron and NeMo write it"),
    (".adapter.linear_out.weight", "a factor as Megatron and NeMo write it"),
    (".lora_down.weight", "a factor as kohya's scripts write it"),
    (".lora_up.weight", "a factor as kohya's scripts write it"),
    (".lora_mid.weight", "the middle factor of a Tucker decomposition (LyCORIS)"),
    (".lora.down.weight", "a factor as early releases of diffusers write it"),
    (".lora.up.weight", "a factor as early releases of diffusers write it"),
    ("_lora.down.weight", "a factor as early releases of diffusers write it"),
    ("_lora.up.weight", "a factor as early releases of diffusers write it"),
    (".lora_linear_layer.down.weight", "a factor as early releases of diffusers write it"),
    (".lora_linear_layer.up.weight", "a factor as early releases of diffusers write it"),
    (".dora_scale", "a magnitude of DoRA as LyCORIS writes it"),
    (".diff", "a full difference (LyCORIS)"),
    (".diff_b", "a full difference of a bias (LyCORIS)"),
    (".w_norm", "a difference of a norm (LyCORIS)"),
    (".b_norm", "a difference of a norm's bias (LyCORIS)"),
    (".oft_blocks", "a part of an OFT or BOFT (LyCORIS)"),
    (".oft_R.weight", "a part of an OFT"),
    (".ia3_l", "a part of an IA3"),
    (".on_input", "a part of an IA3 (LyCORIS)"),
    (".a1.weight", "a part of a GLoRA (LyCORIS)"),
    (".a2.weight", "a part of a GLoRA (LyCORIS)"),
    (".b1.weight", "a part of a GLoRA (LyCORIS)"),
    (".b2.weight", "a part of a GLoRA (LyCORIS)"),
    (".q_layer.weight", "a part of a T-LoRA"),
    (".p_layer.weight", "a part of a T-LoRA"),
    (".lambda_layer", "a part of a T-LoRA"),
];
/// The same by the beginnings of the last part.
const LAST_PARTS: [(&str, &str); 3] = [
    ("hada_", "a part of a LoHa (LyCORIS)"),
    ("lokr_", "a part of a LoKr (LyCORIS)"),
    ("lora_", "a part of a LoRA under a name that is not known"),
];

/// What a tensor of another kind or another program's adapter is, by its key.
pub fn part_by_key(key: &str) -> Option<&'static str> {
    let longest = ENDINGS.iter().filter(|(ending, _)| key.ends_with(ending));
    let longest = longest.max_by_key(|(ending, _)| ending.len());
    let known = longest.map(|(_, words)| *words);
    known.or_else(|| {
        let path = key.strip_suffix(".weight").unwrap_or(key);
        let last = path.rsplit('.').next().unwrap_or(path);
        LAST_PARTS.iter().find(|(start, _)| last.starts_with(start)).map(|(_, words)| *words)
    })
}

/// What a pair of factors holds, in words, where they are those of several experts under names that do
/// not tell the module that these belong to.
pub fn experts(a: &TensorInfo, b: &TensorInfo, rank: Option<u64>) -> Option<String> {
    let Stack { count, .. } = Stack::of(&a.shape, &b.shape, rank)?;
    Some(format!(
        "{} of shape {:?} and {} of shape {:?} are factors of {count} experts in one tensor each, \
         under a flattened name, which does not tell the parameter of the experts; save them under \
         PEFT's names",
        a.name, a.shape, b.name, b.shape
    ))
}

/// That two factors of that rank are stored the other way round, in words.
pub fn transposed(a: &TensorInfo, b: &TensorInfo, rank: u64) -> Option<String> {
    let ([inputs, first], [last, outputs]) = (a.shape.as_slice(), b.shape.as_slice()) else {
        return None;
    };
    let is_straight = (*inputs, *outputs) == (rank, rank);
    ((*first, *last) == (rank, rank) && !is_straight).then(|| {
        format!(
            "{} of shape {:?} and {} of shape {:?} are the transposes of factors of rank {rank}, \
             ([in, rank] and [rank, out]), as MLX writes them; these are not read yet: transpose both",
            a.name, a.shape, b.name, b.shape
        )
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn keys_tell_who_wrote_them() {
        for (key, words) in [
            ("layers.0.q.lora_a", "MLX"),
            ("layers.0.q.lora_a.weight", "torchtune"),
            ("blk.0.attn_q.weight.lora_b", "GGUF"),
            ("layers.0.linear_qkv.adapter.linear_in.weight", "Megatron"),
            ("x.lokr_w1", "LoKr"),
            ("x.hada_w1_a", "LoHa"),
            ("unet.to_q_lora.down.weight", "diffusers"),
            ("x.lora_C.weight", "not known"),
        ] {
            assert!(part_by_key(key).expect("known").contains(words), "{key}");
        }
        assert_eq!(part_by_key("model.norm.weight"), None);
        assert_eq!(part_by_key("model.layers.0.q.bias"), None);
    }
}
