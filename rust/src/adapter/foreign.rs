//! Factors in layouts and under names that no format here reads, told by their shapes and keys, so
//! that a refusal says what they are.

use crate::tensor::safetensors::TensorInfo;

/// By the last parts of a key: what the tensor is, and who writes it so.
const ENDINGS: [(&str, &str); 32] = [
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

/// What a pair of factors holds that is no pair of matrices and no convolution's, in words: those of
/// several experts, one expert's below the other's. The rank is that of one product, where it is
/// known.
pub fn experts(a: &TensorInfo, b: &TensorInfo, rank: Option<u64>) -> Option<String> {
    let (count, layout) = expert_layout(&a.shape, &b.shape, rank)?;
    Some(format!(
        "{} of shape {:?} and {} of shape {:?} are factors of {count} experts in one tensor each \
         ({layout}), as {} write them; these are not read yet: export a pair for each expert, or \
         one for all as PEFT's target_parameters has it",
        a.name,
        a.shape,
        b.name,
        b.shape,
        match layout {
            STACKED => "tinker, MLX and GGUF files",
            SHARED => "tinker's files",
            OLD_MLX => "early releases of MLX",
            _ => "some trainers of mixtures of experts",
        }
    ))
}

const STACKED: &str = "[experts, rank, in] and [experts, out, rank]";
const SHARED: &str = "[experts, rank, in] and [experts, out, rank], one of them shared by all";
const TRANSPOSED: &str = "[experts, in, rank] and [experts, rank, out]";
const OLD_MLX: &str = "[experts · rank, in] and [experts, out, rank]";
const FLAT_B: &str = "[experts, rank, in] and [out, experts · rank]";

/// How many experts two shapes hold factors of, and the layout.
fn expert_layout(a: &[u64], b: &[u64], rank: Option<u64>) -> Option<(u64, &'static str)> {
    let is_rank = |extent: u64| rank.is_none_or(|rank| rank == extent);
    match (a, b) {
        ([inputs_or_rank, _, _], [_, rank, 1]) if inputs_or_rank == rank && is_rank(*rank) => {
            // A convolution's.
            None
        }
        ([count, first, _], [other, _, last]) if first == last && count == other => {
            Some((*count, STACKED))
        }
        ([count, first, _], [1, _, last]) | ([1, first, _], [count, _, last]) if first == last => {
            Some((*count, SHARED))
        }
        ([count, _, last], [other, first, _]) if last == first && count == other => {
            Some((*count, TRANSPOSED))
        }
        ([rows, _], [count, _, last]) if count.checked_mul(*last) == Some(*rows) => {
            Some((*count, OLD_MLX))
        }
        ([count, first, _], [_, columns]) if count.checked_mul(*first) == Some(*columns) => {
            Some((*count, FLAT_B))
        }
        _ => None,
    }
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
    fn shapes_tell_experts_from_convolutions() {
        let layout = |a: &[u64], b: &[u64], rank| expert_layout(a, b, rank);
        assert_eq!(layout(&[8, 4, 20], &[8, 50, 4], Some(4)), Some((8, STACKED)));
        assert_eq!(layout(&[1, 4, 20], &[8, 50, 4], Some(4)), Some((8, SHARED)));
        assert_eq!(layout(&[8, 4, 20], &[1, 50, 4], None), Some((8, SHARED)));
        assert_eq!(layout(&[8, 20, 4], &[8, 4, 50], Some(4)), Some((8, TRANSPOSED)));
        assert_eq!(layout(&[32, 20], &[8, 50, 4], None), Some((8, OLD_MLX)));
        assert_eq!(layout(&[8, 4, 20], &[50, 32], None), Some((8, FLAT_B)));
        // A kernel of three, of every rank and width.
        for (rank, inputs, outputs) in [(4, 20, 50), (4, 1, 4), (1, 1, 1), (4, 4, 4), (4, 1, 50)] {
            assert_eq!(layout(&[rank, inputs, 3], &[outputs, rank, 1], Some(rank)), None);
            assert_eq!(layout(&[rank, inputs, 3], &[outputs, rank, 1], None), None);
        }
        // Four experts of rank 1 with four outputs: only the rank tells.
        assert_eq!(layout(&[4, 1, 20], &[4, 4, 1], Some(1)), Some((4, STACKED)));
        assert_eq!(layout(&[4, 20], &[50, 4], None), None);
        assert_eq!(layout(&[4, 20, 3, 3], &[50, 4, 1, 1], None), None);
        assert_eq!(layout(&[5, 4, 20], &[8, 50, 4], None), None);
        assert_eq!(layout(&[u64::MAX, 4, 2], &[5, 4], None), None);
    }

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
