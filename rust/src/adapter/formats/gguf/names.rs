//! How llama.cpp names the tensors of modules, group by group: those of gguf-py's tensor map
//! (`gguf-py/gguf/tensor_mapping.py`), against which the tests hold them.

/// A tensor's name without its `.weight`, and that of the module in transformers. `{}` stands for the
/// number of a block, `{e}` for that of an expert.
pub type Name = (&'static str, &'static str);

/// Names that stand in blocks of one name.
pub struct Group {
    /// What comes before those of transformers.
    pub module: &'static str,
    /// What comes before llama.cpp's.
    pub tensor: &'static str,
    /// The names, of tensors and of modules.
    pub names: &'static [Name],
}

const fn in_blocks(module: &'static str, names: &'static [Name]) -> Group {
    Group { module, tensor: "blk.{}.", names }
}

pub static TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "model.embed_tokens"), ("output", "lm_head")],
};
pub static ATTENTION: Group = in_blocks(
    "model.layers.{}.self_attn.",
    &[("attn_q", "q_proj"), ("attn_k", "k_proj"), ("attn_v", "v_proj"), ("attn_output", "o_proj")],
);
pub static GATED: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[("ffn_gate", "gate_proj"), ("ffn_up", "up_proj"), ("ffn_down", "down_proj")],
);
pub static UP_DOWN: Group =
    in_blocks("model.layers.{}.mlp.", &[("ffn_up", "up_proj"), ("ffn_down", "down_proj")]);
pub static FUSED_GATE_UP: Group =
    in_blocks("model.layers.{}.mlp.", &[("ffn_up", "gate_up_proj"), ("ffn_down", "down_proj")]);
pub static FUSED_ATTENTION: Group =
    in_blocks("model.layers.{}.self_attn.", &[("attn_qkv", "qkv_proj"), ("attn_output", "o_proj")]);
pub static MIXTRAL: Group = in_blocks(
    "model.layers.{}.block_sparse_moe.",
    &[
        ("ffn_gate_inp", "gate"),
        ("ffn_gate_exps", "experts.{e}.w1"),
        ("ffn_up_exps", "experts.{e}.w3"),
        ("ffn_down_exps", "experts.{e}.w2"),
    ],
);
pub static EXPERTS: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[
        ("ffn_gate_inp", "gate"),
        ("ffn_gate_exps", "experts.{e}.gate_proj"),
        ("ffn_up_exps", "experts.{e}.up_proj"),
        ("ffn_down_exps", "experts.{e}.down_proj"),
    ],
);
pub static SHARED_EXPERT: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[
        ("ffn_gate_inp_shexp", "shared_expert_gate"),
        ("ffn_gate_shexp", "shared_expert.gate_proj"),
        ("ffn_up_shexp", "shared_expert.up_proj"),
        ("ffn_down_shexp", "shared_expert.down_proj"),
    ],
);
pub static SHARED_EXPERTS: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[
        ("ffn_gate_shexp", "shared_experts.gate_proj"),
        ("ffn_up_shexp", "shared_experts.up_proj"),
        ("ffn_down_shexp", "shared_experts.down_proj"),
    ],
);
/// Of multi-head latent attention; `kv_b_proj` is stored in two pieces, which have no names here.
pub static LATENT: Group = in_blocks(
    "model.layers.{}.self_attn.",
    &[
        ("attn_q", "q_proj"),
        ("attn_q_a", "q_a_proj"),
        ("attn_q_b", "q_b_proj"),
        ("attn_kv_a_mqa", "kv_a_proj_with_mqa"),
        ("attn_output", "o_proj"),
    ],
);
pub static PHI2: Group = in_blocks(
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
pub static STARCODER2: Group =
    in_blocks("model.layers.{}.mlp.", &[("ffn_up", "c_fc"), ("ffn_down", "c_proj")]);
pub static GPT2_TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "transformer.wte"), ("output", "lm_head")],
};
pub static GPT2: Group = in_blocks(
    "transformer.h.{}.",
    &[
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_up", "mlp.c_fc"),
        ("ffn_down", "mlp.c_proj"),
    ],
);
pub static BLOOM_TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "transformer.word_embeddings"), ("output", "lm_head")],
};
pub static BLOOM: Group = in_blocks(
    "transformer.h.{}.",
    &[
        ("attn_qkv", "self_attention.query_key_value"),
        ("attn_output", "self_attention.dense"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
);
pub static NEOX_TOP: Group = Group {
    module: "",
    tensor: "",
    names: &[("token_embd", "gpt_neox.embed_in"), ("output", "embed_out")],
};
pub static NEOX: Group = in_blocks(
    "gpt_neox.layers.{}.",
    &[
        ("attn_qkv", "attention.query_key_value"),
        ("attn_output", "attention.dense"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
);
pub static LLAMA4: Group = in_blocks(
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
pub static EXAONE: Group = in_blocks(
    "transformer.h.{}.",
    &[
        ("attn_q", "attn.attention.q_proj"),
        ("attn_k", "attn.attention.k_proj"),
        ("attn_v", "attn.attention.v_proj"),
        ("attn_output", "attn.attention.out_proj"),
        ("ffn_gate", "mlp.c_fc_0"),
        ("ffn_up", "mlp.c_fc_1"),
        ("ffn_down", "mlp.c_proj"),
    ],
);
pub static QWEN: Group = in_blocks(
    "transformer.h.{}.",
    &[
        ("attn_qkv", "attn.c_attn"),
        ("attn_output", "attn.c_proj"),
        ("ffn_gate", "mlp.w2"),
        ("ffn_up", "mlp.w1"),
        ("ffn_down", "mlp.c_proj"),
    ],
);
pub static MPT: Group = in_blocks(
    "transformer.blocks.{}.",
    &[
        ("attn_qkv", "attn.Wqkv"),
        ("attn_output", "attn.out_proj"),
        ("ffn_up", "ffn.up_proj"),
        ("ffn_down", "ffn.down_proj"),
    ],
);
pub static CHATGLM_TOP: Group = Group {
    module: "transformer.",
    tensor: "",
    names: &[("token_embd", "embedding.word_embeddings"), ("output", "output_layer")],
};
pub static CHATGLM: Group = in_blocks(
    "transformer.encoder.layers.{}.",
    &[
        ("attn_qkv", "self_attention.query_key_value"),
        ("attn_output", "self_attention.dense"),
        ("ffn_up", "mlp.dense_h_to_4h"),
        ("ffn_down", "mlp.dense_4h_to_h"),
    ],
);
pub static LFM2: Group = in_blocks(
    "model.layers.{}.",
    &[
        ("attn_q", "self_attn.q_proj"),
        ("attn_k", "self_attn.k_proj"),
        ("attn_v", "self_attn.v_proj"),
        ("attn_output", "self_attn.out_proj"),
        ("shortconv.in_proj", "conv.in_proj"),
        ("shortconv.out_proj", "conv.out_proj"),
        ("ffn_gate", "feed_forward.w1"),
        ("ffn_up", "feed_forward.w3"),
        ("ffn_down", "feed_forward.w2"),
    ],
);
pub static HUNYUAN_MOE: Group = in_blocks(
    "model.layers.{}.mlp.",
    &[
        ("ffn_gate_inp", "gate.wg"),
        ("ffn_gate_exps", "experts.{e}.gate_proj"),
        ("ffn_up_exps", "experts.{e}.up_proj"),
        ("ffn_down_exps", "experts.{e}.down_proj"),
        ("ffn_gate_shexp", "shared_mlp.gate_proj"),
        ("ffn_up_shexp", "shared_mlp.up_proj"),
        ("ffn_down_shexp", "shared_mlp.down_proj"),
    ],
);
/// The attention of linear layers, stored as they stand where there are as many heads of keys as of
/// values.
pub static LINEAR_ATTENTION: Group = in_blocks(
    "model.layers.{}.linear_attn.",
    &[
        ("attn_qkv", "in_proj_qkv"),
        ("attn_gate", "in_proj_z"),
        ("ssm_alpha", "in_proj_a"),
        ("ssm_beta", "in_proj_b"),
        ("ssm_out", "out_proj"),
    ],
);
