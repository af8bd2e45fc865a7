"""The architectures of the suite at toy size, as transformers saves them, and what is adapted."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matrix import lora, parameters

VOCABULARY = 101


def text(**settings: Any) -> dict[str, Any]:
    """The settings that most language models have."""
    return {
        "hidden_size": 32,
        "intermediate_size": 44,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 64,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "tie_word_embeddings": False,
    } | settings


def mixtral() -> Any:
    from transformers import MixtralConfig, MixtralForCausalLM

    return MixtralForCausalLM(MixtralConfig(**text(num_local_experts=3)))


def qwen_moe() -> Any:
    from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

    settings = text(num_experts=3, num_experts_per_tok=2, moe_intermediate_size=28, head_dim=8)
    return Qwen3MoeForCausalLM(Qwen3MoeConfig(**settings))


def gpt_oss() -> Any:
    from transformers import GptOssConfig, GptOssForCausalLM

    settings = text(num_local_experts=3, num_experts_per_tok=2, head_dim=8)
    return GptOssForCausalLM(GptOssConfig(**settings))


def llama4() -> Any:
    from transformers import Llama4ForCausalLM, Llama4TextConfig

    settings = text(
        num_local_experts=3, num_experts_per_tok=1, head_dim=8, intermediate_size_mlp=52
    )
    return Llama4ForCausalLM(Llama4TextConfig(**settings))


def llava() -> Any:
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
    )

    vision = CLIPVisionConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        projection_dim=24,
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=LlamaConfig(**text()),
        image_token_index=VOCABULARY - 1,
        tie_word_embeddings=False,
    )
    return LlavaForConditionalGeneration(config)


def t5() -> Any:
    from transformers import T5Config, T5ForConditionalGeneration

    config = T5Config(
        d_model=40,
        d_kv=12,
        d_ff=88,
        num_layers=2,
        num_heads=4,
        vocab_size=VOCABULARY,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def whisper() -> Any:
    from transformers import WhisperConfig, WhisperForConditionalGeneration

    config = WhisperConfig(
        vocab_size=VOCABULARY,
        d_model=32,
        encoder_layers=2,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=44,
        decoder_ffn_dim=44,
        num_mel_bins=10,
        max_source_positions=12,
        max_target_positions=16,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        decoder_start_token_id=3,
    )
    return WhisperForConditionalGeneration(config)


def bert() -> Any:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
        num_labels=3,
    )
    return BertForSequenceClassification(config)


def vit() -> Any:
    from transformers import ViTConfig, ViTForImageClassification

    config = ViTConfig(
        hidden_size=24,
        intermediate_size=36,
        num_hidden_layers=2,
        num_attention_heads=2,
        image_size=16,
        patch_size=8,
        num_labels=5,
    )
    return ViTForImageClassification(config)


def gpt2() -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    config = GPT2Config(
        n_embd=32,
        n_layer=2,
        n_head=4,
        vocab_size=VOCABULARY,
        n_positions=64,
        bos_token_id=0,
        eos_token_id=0,
    )
    return GPT2LMHeadModel(config)


def falcon_h1() -> Any:
    from transformers import FalconH1Config, FalconH1ForCausalLM

    settings = text(
        head_dim=8,
        mamba_d_ssm=32,
        mamba_n_heads=4,
        mamba_d_head=8,
        mamba_n_groups=1,
        mamba_d_state=8,
        mamba_chunk_size=8,
    )
    return FalconH1ForCausalLM(FalconH1Config(**settings))


def small(name: str, **settings: Any) -> Callable[[], Any]:
    """Makes a language model of that name with these settings of its config."""

    def make() -> Any:
        import transformers

        config = getattr(transformers, f"{name}Config")(**text(**settings))
        return getattr(transformers, f"{name}ForCausalLM")(config)

    return make


def qwen2_vl() -> Any:
    from transformers import Qwen2VLConfig, Qwen2VLForConditionalGeneration

    config = Qwen2VLConfig(
        text_config=text(rope_parameters={"rope_type": "default", "mrope_section": [1, 1, 2]}),
        vision_config={"embed_dim": 24, "hidden_size": 32, "num_heads": 2, "depth": 2},
        tie_word_embeddings=False,
    )
    return Qwen2VLForConditionalGeneration(config)


def nomic_bert() -> Any:
    from transformers import NomicBertConfig, NomicBertModel

    config = NomicBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return NomicBertModel(config)


MAKERS: dict[str, Callable[[], Any]] = {
    maker.__name__: maker
    for maker in (
        mixtral,
        qwen_moe,
        gpt_oss,
        llama4,
        llava,
        t5,
        whisper,
        bert,
        vit,
        gpt2,
        falcon_h1,
    )
}


def gte() -> Any:
    from transformers import GteConfig, GteModel

    config = GteConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=44,
        num_hidden_layers=2,
        num_attention_heads=4,
        max_position_embeddings=64,
    )
    return GteModel(config)


def qwen3_vl_moe() -> Any:
    from transformers import Qwen3VLMoeConfig, Qwen3VLMoeForConditionalGeneration

    rope = {"rope_type": "default", "mrope_section": [2, 1, 1], "mrope_interleaved": True}
    config = Qwen3VLMoeConfig(
        text_config=text(rope_parameters=rope, head_dim=8, **EXPERTS),
        vision_config={
            "depth": 2,
            "hidden_size": 24,
            "out_hidden_size": 32,
            "intermediate_size": 36,
            "num_heads": 2,
            "num_position_embeddings": 16,
            "deepstack_visual_indexes": [0],
        },
        tie_word_embeddings=False,
    )
    return Qwen3VLMoeForConditionalGeneration(config)


EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 28}
# Others whose names or pieces on disk are not those in memory.
RENAMED: dict[str, Callable[[], Any]] = {
    "phimoe": small("Phimoe", num_local_experts=3),
    "olmoe": small("Olmoe", num_experts=3, num_experts_per_tok=2),
    "jamba": small(
        "Jamba",
        num_experts=3,
        attn_layer_period=2,
        attn_layer_offset=1,
        expert_layer_period=1,
        expert_layer_offset=0,
        use_mamba_kernels=False,
    ),
    "granitemoe": small("GraniteMoe", num_local_experts=3),
    "lfm2_moe": small("Lfm2Moe", num_dense_layers=0, layer_types=["full_attention"] * 2, **EXPERTS),
    "deepseek_v3": small(
        "DeepseekV3",
        n_routed_experts=4,
        n_group=2,
        topk_group=1,
        first_k_dense_replace=1,
        q_lora_rank=8,
        kv_lora_rank=8,
        qk_rope_head_dim=4,
        qk_nope_head_dim=4,
        v_head_dim=8,
        num_key_value_heads=4,
        **EXPERTS,
    ),
    "minimax": small(
        "MiniMax", num_local_experts=3, head_dim=8, layer_types=["full_attention"] * 2
    ),
    "gpt_neox": small("GPTNeoX"),
    "qwen2_vl": qwen2_vl,
    "nomic_bert": nomic_bert,
    "gte": gte,
    "qwen3_vl_moe": qwen3_vl_moe,
    "hrm_text": small("HrmText", head_dim=8),
}

PARAMETERS = ("experts.gate_up_proj", "experts.down_proj")
# Modules of transformers' current releases, by PEFT's settings.
CASES: dict[str, dict[str, dict[str, Any]]] = {
    "mixtral": {
        "attention": lora("q_proj", "v_proj"),
        "experts": parameters(*PARAMETERS),
        "all": parameters(
            "experts.gate_up_proj",
            "experts.down_proj",
            "gate.weight",
            target_modules=["k_proj", "o_proj"],
        ),
        "one parameter": parameters("experts.down_proj"),
        "router and head saved": lora("q_proj", modules_to_save=["gate", "lm_head"]),
        "DoRA": lora("q_proj", "o_proj", use_dora=True),
    },
    "qwen_moe": {
        "attention": lora("q_proj", "v_proj"),
        "experts": parameters(*PARAMETERS),
        "ranks": parameters(
            "experts.gate_up_proj",
            "experts.down_proj",
            rank_pattern={"experts.gate_up_proj": 3},
            alpha_pattern={"experts.down_proj": 5},
        ),
    },
    "gpt_oss": {
        "attention": lora("q_proj", "v_proj"),
        "experts": parameters(*PARAMETERS),
    },
    "llama4": {
        "attention": lora("q_proj", "o_proj"),
        "experts": parameters(*PARAMETERS),
        "shared expert and router": lora("shared_expert.up_proj", "router"),
    },
    "llava": {
        "language": lora("language_model.layers.0.self_attn.q_proj", "down_proj", "lm_head"),
        "vision tower": lora("fc1", "patch_embedding", "linear_1"),
        "both": lora("q_proj", "v_proj", use_dora=True),
        "projector saved": lora("q_proj", modules_to_save=["linear_2", "embed_tokens"]),
    },
    "t5": {"attention": lora("q", "v"), "all": lora("q", "k", "v", "o", "wi", "wo")},
    "whisper": {
        "attention": lora("q_proj", "v_proj"),
        "stem": lora("conv1", "conv2", "fc1"),
    },
    "bert": {
        "attention": lora("query", "value", modules_to_save=["classifier"]),
        "all": lora("query", "dense", "word_embeddings"),
    },
    "vit": {
        "attention": lora("q_proj", "v_proj", modules_to_save=["classifier"]),
        "all": lora("q_proj", "o_proj", "fc1", "fc2", "projection"),
        "biases": lora("q_proj", "fc1", lora_bias=True),
        "biases saved": lora("q_proj", bias="lora_only"),
    },
    "gpt2": {"attention": lora("c_attn"), "all": lora("c_attn", "c_proj", "c_fc")},
    "falcon_h1": {"attention": lora("q_proj", "v_proj"), "mamba": lora("in_proj", "gate_proj")},
}
ATTENTION_AND_EXPERTS = parameters(*PARAMETERS, target_modules=["q_proj", "o_proj"])
MORE_CASES: dict[str, dict[str, dict[str, Any]]] = {
    "phimoe": {"all": parameters(*PARAMETERS, "router.weight", target_modules=["q_proj"])},
    "olmoe": {"all": ATTENTION_AND_EXPERTS},
    "jamba": {"all": ATTENTION_AND_EXPERTS},
    "granitemoe": {"all": ATTENTION_AND_EXPERTS},
    "lfm2_moe": {"all": parameters(*PARAMETERS, target_modules=["q_proj"])},
    "deepseek_v3": {"all": parameters(*PARAMETERS, target_modules=["q_b_proj", "kv_b_proj"])},
    "minimax": {"all": ATTENTION_AND_EXPERTS},
    "gpt_neox": {"head": lora("lm_head", "query_key_value")},
    "qwen2_vl": {"all": lora("q_proj", "qkv", "fc1", "down_proj", "patch_embed.proj")},
    "qwen3_vl_moe": {"all": parameters(*PARAMETERS, target_modules=["q_proj", "qkv"])},
    # In these, attention is one matrix on disk and several in memory.
    "gte": {
        "split": lora("q_proj", "k_proj", "up_proj"),
        "biases added": lora("q_proj", "v_proj", lora_bias=True),
        "biases saved": lora("q_proj", "o_proj", bias="lora_only"),
    },
    "hrm_text": {"all": lora("gate_proj", "v_proj", "up_proj", "o_proj")},
    "nomic_bert": {
        "split": lora("q_proj", "v_proj", "up_proj"),
        "split with DoRA": lora("q_proj", "k_proj", use_dora=True),
    },
}
