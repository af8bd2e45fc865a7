"""The merges whose bytes test_digests.py holds against a table."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from support.fixed_inputs import (
    Adapter,
    Base,
    Settings,
    Shapes,
    convolution,
    embedding,
    experts,
    linear,
    turned,
)
from support.quantised import SCHEMES


@dataclass(frozen=True)
class Case:
    """A merge.

    Attributes:
        base: what is merged into.
        adapters: what is merged, in order.
        options: of `lorafast.merge`.
        subtract: the adapters are taken out of the merged model again, with these options of
            `lorafast.subtract`; "original" stands for the base.
    """

    base: Base
    adapters: Sequence[Adapter]
    options: Settings = field(default_factory=dict)
    subtract: Settings | None = None


# Sizes that no vector or block divides.
Q, UP, DOWN = "self_attn.q_proj", "mlp.up_proj", "mlp.down_proj"
LAYER = {f"{Q}.weight": (41, 83), f"{UP}.weight": (150, 83), f"{DOWN}.weight": (83, 150)}
LLAMA = {
    "model.embed_tokens.weight": (61, 83),
    **{f"model.layers.{n}.{name}": shape for n in (0, 1) for name, shape in LAYER.items()},
    f"model.layers.1.{UP}.bias": (150,),
    "model.norm.weight": (83,),
    "lm_head.weight": (61, 83),
}
EMBEDDING, HEAD = "model.embed_tokens", "lm_head"
Q0, UP0, DOWN0, Q1, UP1 = (
    f"model.layers.{name}" for name in (f"0.{Q}", f"0.{UP}", f"0.{DOWN}", f"1.{Q}", f"1.{UP}")
)
MODULES = (Q0, UP0, DOWN0, Q1)
DORA = {"use_dora": True}
FLOATS = ("F32", "F16", "BF16")


def llama(dtype: str = "BF16", **settings: Any) -> Base:
    return Base(LLAMA, dtype, **settings)


def lora(*modules: str, rank: int = 4, dtype: str = "F32", seed: int = 1, **settings: Any) -> Any:
    """An adapter on linear layers of the Llama."""
    dora, bias = settings.get("use_dora", False), settings.get("lora_bias", False)
    shapes = linear(*(modules or MODULES), of=LLAMA, rank=rank, dora=dora, bias=bias)
    return Adapter(shapes, {"r": rank} | settings, dtype, seed)


CASES: dict[str, Case] = {}

# One adapter: every rank, and every dtype of the base with every one of the adapter.
for rank in (1, 4, 16, 64):
    for number, dtype in enumerate(FLOATS):
        other = FLOATS[(number + rank) % 3]
        CASES[f"rank {rank}, {other} into {dtype}"] = Case(
            llama(dtype), [lora(rank=rank, dtype=other)]
        )
for dtype in FLOATS:
    for other in FLOATS:
        CASES.setdefault(f"rank 4, {other} into {dtype}", Case(llama(dtype), [lora(dtype=other)]))
CASES["rank 16, F64 into F64"] = Case(llama("F64"), [lora(rank=16, dtype="F64")])
for dtype, output in (("F32", "bf16"), ("F32", "fp16"), ("BF16", "float32"), ("F16", "bfloat16")):
    CASES[f"{dtype} written as {output}"] = Case(llama(dtype), [lora()], {"dtype": output})

# Several adapters.
EIGHT = [
    lora(rank=rank, dtype=FLOATS[seed % 3], seed=seed, lora_alpha=1 + seed / 4)
    for seed, rank in enumerate((1, 4, 16, 64, 3, 8, 2, 5))
]
HALVES = [0.75, -0.5, 1.25, 0.1, -0.2, 0.3, 2.0, 0.0]
for count in (2, 8):
    for dtype in ("F32", "BF16"):
        for strategy in ("sequential", "weighted", "average"):
            weights = {"weights": HALVES[:count]} if strategy == "weighted" else {}
            CASES[f"{count} adapters, {strategy}, {dtype}"] = Case(
                llama(dtype), EIGHT[:count], {"strategy": strategy} | weights
            )

# Scales and shards.
PATTERNS = {"rank_pattern": {UP: 3}, "alpha_pattern": {r"layers\.0\..*q_proj": 2.5, UP: 11}}
PATTERNED = Adapter(
    linear(Q0, Q1, of=LLAMA) | linear(UP0, UP1, of=LLAMA, rank=3), {"r": 4} | PATTERNS
)
CASES |= {
    "rsLoRA": Case(llama(), [lora(rank=5, use_rslora=True)]),
    "patterns": Case(llama(), [PATTERNED]),
    "three shards": Case(llama(shards=3), EIGHT[:2]),
    "three shards written as F32": Case(llama(shards=3), [lora()], {"dtype": "float32"}),
    "pickle": Case(llama(), [Adapter(lora().shapes, {"r": 4}, seed=9, pickled=True)]),
}

# Every kind of layer.
LAYERS = {
    "emb.weight": (101, 43),
    "conv1d.weight": (43, 77),
    "conv1d.bias": (77,),
    "lin0.weight": (90, 43),
    "lin0.bias": (90,),
    "convolution1.weight": (21, 13, 5),
    "convolution2.weight": (19, 11, 3, 2),
    "pointwise.weight": (29, 23, 1, 1),
    "convolution3.weight": (9, 7, 2, 3, 2),
    "mha.in_proj_weight": (72, 24),
    "mha.in_proj_bias": (72,),
    "mha.out_proj.weight": (24, 24),
    "mha.out_proj.bias": (24,),
    "norm.weight": (37,),
}
FORMS = {
    "linear": linear("lin0", of=LAYERS),
    "linear, DoRA": linear("lin0", of=LAYERS, dora=True),
    "transposed": turned("conv1d", of=LAYERS),
    "transposed, DoRA": turned("conv1d", of=LAYERS, dora=True),
    "embedding": embedding("emb", LAYERS),
    "embedding, DoRA": embedding("emb", LAYERS, dora=True),
} | {
    f"{name}{', DoRA' if dora else ''}": convolution(name, LAYERS, dora=dora)
    for name in ("convolution1", "convolution2", "pointwise", "convolution3")
    for dora in (False, True)
}
ATTENTION = {
    "mha.lora_A.weight": (4, 24),
    "mha.lora_B.weight": (72, 4),
    "mha.base_layer.out_proj.lora_A.weight": (4, 24),
    "mha.base_layer.out_proj.lora_B.weight": (24, 4),
}
for dtype in ("F32", "BF16"):
    for name, shapes in FORMS.items():
        settings = {"r": 4, "use_dora": "DoRA" in name}
        CASES[f"{name}, {dtype}"] = Case(Base(LAYERS, dtype), [Adapter(shapes, settings)])
CASES |= {
    "attention of torch": Case(Base(LAYERS), [Adapter(ATTENTION, {"r": 4})]),
    "DoRA, F16": Case(llama("F16"), [lora(rank=16, dtype="F16", **DORA)]),
    "DoRA, rsLoRA and patterns": Case(
        llama(),
        [
            Adapter(
                linear(Q0, of=LLAMA, dora=True) | linear(UP0, of=LLAMA, rank=3, dora=True),
                {"r": 4, "use_rslora": True} | DORA | PATTERNS,
            )
        ],
    ),
    "DoRA, half": Case(llama(), [lora(**DORA)], {"strategy": "weighted", "weights": [0.5]}),
    "DoRA written as F32": Case(llama(), [lora(**DORA)], {"dtype": "float32"}),
}
for dtype in ("F32", "BF16"):
    many = [lora(**DORA), lora(Q0, UP0, rank=7, seed=2, **DORA), lora(seed=3)]
    for strategy in ("weighted", "average"):
        weights = {"weights": HALVES[:3]} if strategy == "weighted" else {}
        CASES[f"two DoRA and one plain, {strategy}, {dtype}"] = Case(
            llama(dtype), many, {"strategy": strategy} | weights
        )
    CASES[f"two DoRA on embeddings and convolutions, {dtype}"] = Case(
        Base(LAYERS, dtype),
        [
            Adapter(
                embedding("emb", LAYERS, dora=True)
                | convolution("convolution2", LAYERS, dora=True)
                | turned("conv1d", of=LAYERS, dora=True),
                {"r": 4} | DORA,
                seed=seed,
            )
            for seed in (1, 2)
        ],
        {"strategy": "weighted", "weights": [0.7, 0.6]},
    )

# Biases, modules that are saved whole, trained tokens.
NORM = {"model.norm.weight": (83,)}
ROWS = f"{EMBEDDING}.token_adapter.trainable_tokens_delta"


def beside(shapes: Shapes, dtype: str = "F32", seed: int = 1, **settings: Any) -> Adapter:
    """Factors on one layer, and these tensors."""
    return Adapter(linear(Q0, of=LLAMA) | dict(shapes), {"r": 4} | settings, dtype, seed)


def rows(*tokens: int, seed: int = 1) -> Adapter:
    trained = {"trainable_token_indices": {"embed_tokens": list(tokens)}}
    return beside({ROWS: (len(tokens), 83)}, seed=seed, **trained)


TIED = {"tie_word_embeddings": True, "architectures": ["LlamaForCausalLM"], "vocab_size": 61}
UNTIED = TIED | {"tie_word_embeddings": False}
SHARED = {name: shape for name, shape in LLAMA.items() if name != "lm_head.weight"}
GROWN = {f"{EMBEDDING}.weight": (70, 83), "lm_head.weight": (70, 83)}
ON_EMBEDDING = embedding(EMBEDDING, LLAMA)
FROM_FILE = {f"{EMBEDDING}.base_layer.weight": (61, 83), **ON_EMBEDDING}
AS_ONE = {"ensure_weight_tying": True}
CASES |= {
    "lora_bias": Case(llama(), [lora(UP1, lora_bias=True)]),
    "lora_bias, three": Case(
        llama("F32"), [lora(UP1, seed=seed, lora_bias=True) for seed in (1, 2, 3)]
    ),
    "biases saved": Case(llama(), [beside({f"{UP1}.bias": (150,)}, bias="all")]),
    "norm saved": Case(llama(), [beside(NORM, modules_to_save=["norm"])]),
    "norm saved, BF16 into F32": Case(
        llama("F32"), [beside(NORM, "BF16", modules_to_save=["norm"])]
    ),
    "norm saved twice, weighted": Case(
        llama(),
        [beside(NORM, seed=seed, modules_to_save=["norm"]) for seed in (1, 2)],
        {"strategy": "weighted", "weights": [0.5, 0.25]},
    ),
    "head saved that the base has not": Case(
        llama(), [beside({"score.weight": (3, 83)}, modules_to_save=["score"])]
    ),
    "embedding from the file": Case(
        llama(config=UNTIED), [Adapter(FROM_FILE, {"r": 4, "target_modules": ["embed_tokens"]})]
    ),
    "vocabulary grown": Case(
        llama(config=UNTIED), [beside(GROWN, modules_to_save=["embed_tokens", "lm_head"])]
    ),
    "vocabulary grown, tied": Case(
        Base(SHARED, config=TIED, shards=2),
        [
            Adapter(
                linear(Q0, of=LLAMA) | {f"{EMBEDDING}.weight": (70, 83)},
                {"r": 4, "modules_to_save": ["embed_tokens", "lm_head"]} | AS_ONE,
                equal={"lm_head.weight": f"{EMBEDDING}.weight"},
            )
        ],
    ),
    "tokens, one run": Case(llama(config=UNTIED), [rows(4, 5, 6)]),
    "tokens, several runs": Case(llama(config=UNTIED), [rows(9, 0, 1, 60)]),
    "tokens of two, weighted": Case(
        llama("F32", config=UNTIED),
        [rows(9, 0, 1, 60), rows(2, 1, seed=2)],
        {"strategy": "weighted", "weights": [0.5, 0.25]},
    ),
    "tied, on the embeddings": Case(
        Base(SHARED, config=TIED),
        [Adapter(ON_EMBEDDING, {"r": 4, "target_modules": ["embed_tokens"]})],
    ),
    "tied, on the head": Case(
        Base(SHARED, config=TIED), [Adapter(linear(HEAD, of=LLAMA), {"r": 4})]
    ),
    "tied, on both as one": Case(
        Base(SHARED, config=TIED),
        [
            Adapter(
                ON_EMBEDDING,
                {"r": 4, "target_modules": ["embed_tokens", "lm_head"]} | AS_ONE,
                transposes={
                    "lm_head.lora_A.weight": f"{EMBEDDING}.lora_embedding_B",
                    "lm_head.lora_B.weight": f"{EMBEDDING}.lora_embedding_A",
                },
            )
        ],
    ),
    "tied, stored twice": Case(
        Base(SHARED, config=TIED, equal={"lm_head.weight": f"{EMBEDDING}.weight"}),
        [Adapter(ON_EMBEDDING, {"r": 4, "target_modules": ["embed_tokens"]})],
    ),
    'tied, compat="peft"': Case(
        Base(SHARED, config=TIED),
        [Adapter(ON_EMBEDDING, {"r": 4, "target_modules": ["embed_tokens"]})],
        {"compat": "peft"},
    ),
}

# Experts, parts of fused weights, blocks, repeated layers.
EXPERTS = "model.layers.0.mlp.experts"
STACKED = {
    f"{EXPERTS}.gate_up_proj": (3, 34, 21),
    f"{EXPERTS}.down_proj": (3, 21, 17),
    "model.layers.0.mlp.square.proj": (2, 19, 19),
    "model.norm.weight": (21,),
}
STACKED_IN_OUT = {
    name: (*shape[:1], *shape[:0:-1]) if len(shape) == 3 else shape
    for name, shape in STACKED.items()
}
TWO = experts(f"{EXPERTS}.base_layer", 3, 34, 21) | experts(EXPERTS, 3, 21, 17)
PARAMETERS = {
    "r": 4,
    "target_parameters": ["experts.gate_up_proj", "experts.down_proj"],
    "peft_version": "0.21.2",
}
SQUARE = Adapter(
    experts("model.layers.0.mlp.square", 2, 19, 19),
    {"r": 4, "target_parameters": ["square.proj"], "use_rslora": True},
)
GPT_OSS = {"model_type": "gpt_oss"}
FUSED = {"transformer.h.0.attn.c_attn.weight": (36, 18)}
MERGED_LINEAR = {
    "transformer.h.0.attn.c_attn.lora_A.weight": (8, 18),
    "transformer.h.0.attn.c_attn.lora_B.weight": (24, 4, 1),
}
ENABLED = {"r": 4, "enable_lora": [True, False, True], "merge_weights": False}
TURNED = {"transformer.h.0.attn.c_attn.weight": (18, 36)}
BLOCKED = {"lin0.weight": (90, 42), "lin1.weight": (60, 90)}
BLOCKS = {
    "lin0.lora_A.weight": (6, 42),
    "lin0.lora_B.weight": (90, 3),
    "lin1.lora_A.weight": (6, 45),
    "lin1.lora_B.weight": (60, 6),
}
BDLORA = {
    "r": 6,
    "use_bdlora": {
        "target_modules_bd_a": ["lin1"],
        "target_modules_bd_b": ["lin0"],
        "nblocks": 2,
    },
}
REPLICATED = Adapter(
    {
        key: shape
        for layer in range(4)
        for key, shape in linear(
            f"model.layers.{layer}.{Q}",
            of={f"model.layers.{layer}.{Q}.weight": (41, 83)},
        ).items()
    },
    {"r": 4, "layer_replication": [[0, 2], [0, 2]]},
)
LAYERED = llama(config={"num_hidden_layers": 2})
CASES |= {
    "experts, straight": Case(Base(STACKED), [Adapter(TWO, PARAMETERS)]),
    "experts, straight, F32": Case(Base(STACKED, "F32"), [Adapter(TWO, PARAMETERS)]),
    "experts, transposed": Case(Base(STACKED_IN_OUT, config=GPT_OSS), [Adapter(TWO, PARAMETERS)]),
    "experts, square, straight": Case(Base(STACKED), [SQUARE], {"expert_layout": "straight"}),
    "experts, square, transposed": Case(Base(STACKED), [SQUARE], {"expert_layout": "transposed"}),
    "MergedLinear": Case(Base(FUSED), [Adapter(MERGED_LINEAR, ENABLED)]),
    "MergedLinear, transposed": Case(
        Base(TURNED, config={"model_type": "gpt2"}),
        [Adapter(MERGED_LINEAR, ENABLED | {"fan_in_fan_out": True})],
    ),
    "BD-LoRA": Case(Base(BLOCKED), [Adapter(BLOCKS, BDLORA)]),
    "layers repeated": Case(LAYERED, [REPLICATED]),
    'layers repeated, compat="peft"': Case(LAYERED, [REPLICATED], {"compat": "peft"}),
}

# Models whose names and pieces on disk are not those in memory.
MIXTRAL = {
    f"model.layers.0.block_sparse_moe.experts.{expert}.{name}.weight": shape
    for expert in range(3)
    for name, shape in {"w1": (34, 21), "w3": (34, 21), "w2": (21, 34)}.items()
} | {f"model.layers.0.{Q}.weight": (41, 21), "model.layers.0.block_sparse_moe.gate.weight": (3, 21)}
DEEPSEEK = {
    f"{EXPERTS}.{expert}.{name}.weight": shape
    for expert in range(3)
    for name, shape in {
        "gate_proj": (34, 21),
        "up_proj": (34, 21),
        "down_proj": (21, 34),
    }.items()
} | {f"model.layers.0.{Q}.weight": (41, 21)}
JOINED = experts(f"{EXPERTS}.base_layer", 3, 68, 21) | experts(EXPERTS, 3, 21, 34)
DINO = {
    "encoder.layer.0.attention.attention.query.weight": (24, 24),
    "encoder.layer.0.mlp.weights_in.weight": (68, 24),
    "encoder.layer.0.mlp.weights_out.weight": (24, 34),
}
DINO_IN_MEMORY = {
    "encoder.layer.0.attention.q_proj.weight": (24, 24),
    "encoder.layer.0.mlp.gate_proj.weight": (34, 24),
    "encoder.layer.0.mlp.up_proj.weight": (34, 24),
}
DINO_MODULES = tuple(name.removesuffix(".weight") for name in DINO_IN_MEMORY)
LLAVA = {
    "language_model.model.layers.0.self_attn.q_proj.weight": (41, 21),
    "vision_tower.layers.0.fc1.weight": (36, 24),
    "multi_modal_projector.linear_1.weight": (21, 24),
    "language_model.lm_head.weight": (61, 21),
}
LLAVA_IN_MEMORY = {
    "model.language_model.layers.0.self_attn.q_proj.weight": (41, 21),
    "model.vision_tower.layers.0.fc1.weight": (36, 24),
}
LLAVA_MODULES = tuple(name.removesuffix(".weight") for name in LLAVA_IN_MEMORY)
for family, shapes in (("mixtral", MIXTRAL), ("deepseek_v3", DEEPSEEK)):
    CASES[f"{family}, experts"] = Case(
        Base(shapes, shards=2, config={"model_type": family}),
        [Adapter(JOINED | linear(Q0, of=shapes), PARAMETERS)],
    )
for name, settings in (("plain", {}), ("DoRA", DORA)):
    CASES[f"dinov2, {name}"] = Case(
        Base(DINO, config={"model_type": "dinov2"}),
        [
            Adapter(
                linear(*DINO_MODULES, of=DINO_IN_MEMORY, dora=bool(settings)), {"r": 4} | settings
            )
        ],
    )
CASES["llava"] = Case(
    Base(LLAVA, config={"model_type": "llava"}),
    [Adapter(linear(*LLAVA_MODULES, of=LLAVA_IN_MEMORY), {"r": 4})],
)

# Bases that are quantised: again with their scheme, and written out.
WIDE = {f"{Q0}.weight": (150, 260), f"{UP0}.weight": (51, 37), f"{Q1}.weight": (130, 64)}
for scheme in SCHEMES:
    quantized = Base(WIDE | NORM, scheme=scheme)
    on_both = Adapter(linear(Q0, UP0, of=WIDE), {"r": 4})
    CASES[f"{scheme.name}, kept"] = Case(quantized, [on_both])
    CASES[f"{scheme.name}, written out"] = Case(quantized, [on_both], {"dtype": "bfloat16"})

# More than one tile a tensor.
LARGE = {f"{Q0}.weight": (1203, 701), f"{UP0}.weight": (701, 1203)}
for name, settings in (("plain", {}), ("DoRA", DORA)):
    shapes = linear(Q0, UP0, of=LARGE, rank=16, dora=bool(settings))
    CASES[f"several tiles, {name}"] = Case(
        Base(LARGE, "BF16"), [Adapter(shapes, {"r": 16} | settings)]
    )
LARGE_TURNED = {name.replace(Q, "attn.c_attn"): shape for name, shape in LARGE.items()}
C_ATTN = "model.layers.0.attn.c_attn"
CASES["several tiles, transposed, DoRA"] = Case(
    Base(LARGE_TURNED, "F32", config={"model_type": "gpt2"}),
    [Adapter(turned(C_ATTN, of=LARGE_TURNED, dora=True), {"r": 4, "fan_in_fan_out": True} | DORA)],
)

# Adapters taken out again.
for dtype in FLOATS:
    CASES[f"subtracted, {dtype}"] = Case(llama(dtype, shards=2), EIGHT[:2], subtract={})
CASES["subtracted, weighted"] = Case(
    llama(),
    EIGHT[:3],
    {"strategy": "weighted", "weights": HALVES[:3]},
    {"strategy": "weighted", "weights": HALVES[:3]},
)
CASES["subtracted, DoRA, from the original"] = Case(
    llama(), [lora(**DORA)], subtract={"original": True}
)
