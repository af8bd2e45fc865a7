"""What the suite tries: every feature with its formula, and the configs that show it.

`python tests/conformance/table.py` writes this as docs/conformance.md.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

Settings = Mapping[str, Any]

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
CONVOLUTIONS = ["convolution1", "convolution2", "pointwise", "convolution3"]


@dataclass(frozen=True)
class Entry:
    """One base with the LoraConfigs of one to three adapters on it."""

    name: str
    configs: tuple[Settings, ...]
    base: str = "layers"


@dataclass(frozen=True)
class Feature:
    """What PEFT can do, what it means for the weights, and what a merge makes of it.

    Attributes:
        name: as the table calls it.
        formula: in the table's notation.
        entries: that show it.
        roundings: how often PEFT rounds each weight to a 16-bit type; lorafast rounds once.
        peft_fails: PEFT's merge raises; the float64 reference alone is compared against.
        few: not every pair of dtypes is tried.
        decomposed: PEFT decomposes the weight in float32, which is off by some units of the
            largest element's rounding, not of each element's own.
    """

    name: str
    formula: str
    entries: tuple[Entry, ...]
    roundings: int = 1
    peft_fails: bool = False
    few: bool = False
    decomposed: bool = False


@dataclass(frozen=True)
class Refusal:
    """What PEFT can write and a merge does not take.

    Attributes:
        name: as the table calls it.
        config: a LoraConfig that has it.
        says: what the message names.
        base: the base to adapt.
        by_hand: fields written into the config because making them needs data.
    """

    name: str
    config: Settings
    says: str
    base: str = "layers"
    by_hand: Settings = field(default_factory=dict)


def lora(*targets: str, r: int = 6, lora_alpha: float = 15, **settings: Any) -> dict[str, Any]:
    """A config whose scale is no power of two and not 1."""
    return {"target_modules": list(targets), "r": r, "lora_alpha": lora_alpha} | settings


def parameters(*targets: str, **settings: Any) -> dict[str, Any]:
    """A config that targets parameters by their names."""
    return lora(target_parameters=list(targets), **({"r": 4} | settings))


def one(name: str, *targets: str, base: str = "layers", **settings: Any) -> Entry:
    return Entry(name, (lora(*targets, **settings),), base)


FEATURES = (
    Feature(
        "Linear",
        "W + s·BA, s = α/r",
        (
            one("lin0", "lin0"),
            one("lin0 by an expression", "lin0", target_modules=".*lin0"),
            one("lin0 lin1 nobias", "lin0", "lin1", "nobias"),
            one("dropout", "lin0", lora_dropout=0.1),
            one("rank 1", "lin0", r=1),
            one("rank above the width", "nobias", r=65, lora_alpha=31),
            one("all-linear", base="llama", target_modules="all-linear"),
            one("BERT", "query", "dense", base="bert-classifier"),
        ),
    ),
    Feature(
        "`use_rslora`",
        "s = α/√r",
        (
            one("linear", "lin0", "lin1", use_rslora=True),
            one("each kind", "conv1d", "lin0", "convolution2", "convolution3", use_rslora=True),
        ),
    ),
    Feature(
        "`rank_pattern`, `alpha_pattern`",
        "r and α by the first expression that matches the module's path",
        (
            one(
                "linear",
                "lin0",
                "lin1",
                "nobias",
                # PEFT writes the patterns in alphabetical order, so they must not depend on it.
                rank_pattern={"lin1": 3, "no.*": 9},
                alpha_pattern={"nobias": 4, "lin0": 2.5},
            ),
            one(
                "convolutions and rsLoRA",
                "convolution1",
                "convolution2",
                "lin0",
                use_rslora=True,
                rank_pattern={"convolution1": 2},
                alpha_pattern={"convolution.": 7},
            ),
            one(
                "layers",
                *ALL_LINEAR,
                base="llama",
                rank_pattern={r"layers\.[01]\.self_attn\..*": 2, "q_proj": 5},
                alpha_pattern={"model.layers.2.mlp.down_proj": 9.5},
            ),
        ),
    ),
    Feature(
        "`exclude_modules`, `layers_to_transform`, `layers_pattern`",
        "the file holds the modules that are left",
        (
            one("excluded", *ALL_LINEAR, base="llama", exclude_modules=r".*layers\.1\..*"),
            one("excluded list", "lin0", "lin1", exclude_modules=["lin1"]),
            one(
                "layers",
                "q_proj",
                "down_proj",
                base="llama",
                layers_to_transform=[0, 2],
                layers_pattern="layers",
            ),
        ),
    ),
    Feature(
        "`init_lora_weights` that leaves the base alone",
        "as Linear",
        (
            one("gaussian", "lin0", "lin1", init_lora_weights="gaussian"),
            one("orthogonal", "lin0", "lin1", init_lora_weights="orthogonal"),
            one("eva", "lin0", "lin1", init_lora_weights="eva"),
            one("false", "lin0", init_lora_weights=False),
        ),
    ),
    Feature(
        "MiCA",
        "as Linear; PEFT rounds the frozen B to the base's type first",
        (one("mica", "lin0", "lin1", init_lora_weights="mica"),),
        roundings=2,
    ),
    Feature(
        "Conv1D of GPT-2 (`fan_in_fan_out`)",
        "W + s·(BA)ᵀ, W stored (in, out)",
        (
            one("conv1d", "conv1d", fan_in_fan_out=True),
            one("flag not set", "conv1d"),
            one("square", "c_attn", "c_proj", "c_fc", base="gpt2", fan_in_fan_out=True),
        ),
    ),
    Feature(
        "Embedding",
        "W + s·(BA)ᵀ",
        (
            one("embedding", "emb"),
            one("embedding and Conv1D", "emb", "conv1d"),
            one(
                "rsLoRA and patterns",
                "emb",
                use_rslora=True,
                rank_pattern={"emb": 3},
                alpha_pattern={"emb": 11},
            ),
            one("position embeddings", "wpe", base="gpt2"),
            one("token types", "token_type_embeddings", base="bert-classifier"),
        ),
        roundings=2,
    ),
    Feature(
        "Targeted embedding, saved with its base weight",
        "W' + s·(BA)ᵀ, W' from the file",
        (
            one("Llama", "embed_tokens", "q_proj", base="llama"),
            one("Llama with its head", "embed_tokens", "lm_head", base="llama"),
        ),
        roundings=2,
    ),
    Feature(
        "Conv1d, Conv2d, Conv3d",
        "W + s·reshape(B·A)",
        (
            *(one(name, name) for name in CONVOLUTIONS),
            one("Conv2d and Linear", "convolution2", "lin0"),
            one("Conv3d and Linear", "convolution3", "lin0"),
            one("patches of ViT", "projection", base="vit-classifier"),
        ),
    ),
    Feature(
        "`lora_bias`",
        "b + s·b_B",
        (
            one("Linear", "lin0", "lin1", lora_bias=True),
            one("Conv1D", "conv1d", lora_bias=True),
            one("Conv1d", "convolution1", lora_bias=True),
            one("Conv2d", "convolution2", lora_bias=True),
            one("Conv3d", "convolution3", lora_bias=True),
            one("rsLoRA", "lin0", lora_bias=True, use_rslora=True),
        ),
    ),
    Feature(
        "`bias='all'`, `'lora_only'`",
        "the saved biases stand in for the base's",
        (
            one("all", "lin0", "lin1", bias="all"),
            one("lora_only", "lin0", "convolution2", bias="lora_only"),
            one("all on BERT", "query", base="bert-classifier", bias="all"),
            one("all on GPT-2", "c_attn", base="gpt2", bias="all"),
        ),
    ),
    Feature(
        "`modules_to_save`",
        "the saved module stands in for the base's",
        (
            one("Linear", "lin0", modules_to_save=["lin1"]),
            one("norm and convolution", "lin0", modules_to_save=["norm", "convolution2"]),
            one(
                "classifier of BERT",
                "query",
                base="bert-classifier",
                task_type="SEQ_CLS",
            ),
            one(
                "classifier of ViT",
                "projection",
                base="vit-classifier",
                modules_to_save=["classifier"],
            ),
            one("head of Llama", "q_proj", base="llama", modules_to_save=["lm_head"]),
            one(
                "head and embedding of Llama",
                "q_proj",
                base="llama",
                modules_to_save=["lm_head", "embed_tokens"],
            ),
        ),
    ),
    Feature(
        "DoRA on Linear",
        "m·V/‖V‖, V = W + s·BA, a norm for each output",
        (
            one("lin0", "lin0", use_dora=True),
            one("lin0 lin1 nobias", "lin0", "lin1", "nobias", use_dora=True),
            one(
                "rsLoRA and patterns",
                "lin0",
                "lin1",
                use_dora=True,
                use_rslora=True,
                rank_pattern={"lin1": 3},
                alpha_pattern={"lin0": 40},
            ),
            one(
                "biases and a saved module",
                "lin0",
                use_dora=True,
                bias="all",
                modules_to_save=["lin1"],
            ),
            one("Llama", *ALL_LINEAR, base="llama", use_dora=True),
        ),
    ),
    Feature(
        "DoRA on Conv1D of GPT-2",
        "m·V/‖V‖, a norm for each column",
        (
            one("conv1d", "conv1d", use_dora=True),
            one("square", "c_attn", "c_proj", "c_fc", base="gpt2", use_dora=True),
        ),
    ),
    Feature(
        "DoRA on embeddings",
        "m·V/‖V‖, a norm for each column",
        (
            one("embedding", "emb", use_dora=True),
            one("embedding and Conv1D", "emb", "conv1d", use_dora=True),
        ),
    ),
    Feature(
        "DoRA on Conv1d, Conv2d, Conv3d",
        "m·V/‖V‖, a norm for each output channel",
        (
            *(one(name, name, use_dora=True) for name in CONVOLUTIONS),
            one("Conv2d and Linear", "convolution2", "lin0", use_dora=True),
            one("patches of ViT", "projection", base="vit-classifier", use_dora=True),
        ),
    ),
    Feature(
        "Conv3d with a kernel of 1",
        "W + s·reshape(B·A); DoRA on it",
        (one("LoRA", "pointwise3"), one("DoRA", "pointwise3", use_dora=True)),
        peft_fails=True,
    ),
    Feature(
        "VeLoRA, MonteCLoRA",
        "as Linear; what only training used is left out",
        (
            one("VeLoRA", "lin0", "lin1", velora_config={"num_groups": 1}),
            one("MonteCLoRA", "lin0", monteclora_config={"num_samples": 2}),
        ),
    ),
    Feature(
        "`target_parameters`",
        "each expert: W_e + s·B_e·A_e, or + s·(B_e·A_e)ᵀ on experts stored (in, out)",
        (
            Entry("one", (parameters("experts.gate_up_proj"),), "experts"),
            Entry("two on one module", (parameters(*EXPERTS),), "experts"),
            Entry("square", (parameters("square.proj", use_rslora=True),), "experts"),
            Entry("one expert", (parameters("single.proj"),), "experts"),
            Entry(
                "patterns, beside a layer",
                (
                    parameters(
                        *EXPERTS,
                        target_modules=["router"],
                        rank_pattern={"experts.down_proj": 3, "mlp.router": 2},
                        alpha_pattern={"gate_up_proj": 5},
                    ),
                ),
                "experts",
            ),
            Entry("two on one module", (parameters(*EXPERTS),), "transposed-experts"),
            Entry("square", (parameters("square.proj"),), "transposed-experts"),
            Entry("of a layer", (parameters("lin0.weight", "nobias.weight"),)),
            Entry("beside a layer", (lora("lin0", target_parameters=["lin1.weight"]),)),
            Entry("two on one", (parameters("lin0.weight"), parameters("lin0.weight", r=3))),
            Entry("two on two", (parameters("lin0.weight"), parameters("lin1.weight", r=3))),
            Entry("of Conv1D", (parameters("c_fc.weight", "c_attn.weight"),), "gpt2"),
        ),
        roundings=2,
    ),
    Feature(
        "`trainable_token_indices`",
        "rows of W are the file's",
        (
            one("by name", "conv1d", trainable_token_indices={"emb": [0, 10, 11]}),
            Entry(
                "two of other rows",
                (
                    lora("conv1d", trainable_token_indices={"emb": [0, 10, 11]}),
                    lora("lin0", r=3, trainable_token_indices={"emb": [1, 12]}),
                ),
            ),
            one("input embedding", "q_proj", base="llama", trainable_token_indices=[3, 2, 330]),
            one(
                "input embedding and head",
                "q_proj",
                base="llama",
                trainable_token_indices={"embed_tokens": [7, 1], "lm_head": [2]},
            ),
            one("tied", "q_proj", base="tied-llama", trainable_token_indices=[5, 6, 300]),
        ),
    ),
    Feature(
        "`nn.MultiheadAttention`",
        "W_in + s·BA; W_out + 2s·BA, as PEFT trains it",
        (
            one("mha", "mha"),
            one("mha and Linear", "mha", "lin0", use_rslora=True),
            one("biases", "mha", bias="all"),
            Entry("two", (lora("mha"), lora("mha", r=3))),
            one("output alone", "mha.out_proj"),
        ),
        # In bf16 and f16 the product itself is rounded, then each of two sums.
        roundings=4,
    ),
    Feature(
        "PiSSA",
        "W - U_r·S_r·V_rᵀ + s·B·A: the r largest singular components are taken out",
        (
            one("pissa", "lin0", "lin1", init_lora_weights="pissa"),
            one("rsLoRA", "nobias", init_lora_weights="pissa", use_rslora=True, r=3),
            one("Conv1D", "c_attn", "c_fc", base="gpt2", init_lora_weights="pissa"),
            one("with DoRA", "lin0", init_lora_weights="pissa", use_dora=True),
        ),
        roundings=2,
        decomposed=True,
    ),
    Feature(
        "OLoRA",
        "W - s·Q_r·R_r + s·B·A: the first r of a QR decomposition are taken out",
        (
            one("olora", "lin0", "lin1", init_lora_weights="olora"),
            one("patterns", "lin0", "nobias", init_lora_weights="olora", rank_pattern={"n0": 3}),
        ),
        roundings=2,
        decomposed=True,
    ),
    Feature(
        "KaSA",
        "W - U_k·S_k·V_kᵀ + s·B·diag(d)·A: the r smallest singular components are taken out",
        (
            one("kasa", "lin0", "lin1", kasa_config={}),
            one("rsLoRA", "nobias", kasa_config={}, use_rslora=True, r=3),
            one("r = 4", "lin0", kasa_config={}, r=4, lora_alpha=4),
        ),
        roundings=3,
        decomposed=True,
    ),
    Feature(
        "BD-LoRA",
        "as Linear, with the blocks of A or B on a diagonal",
        (
            one("A", "lin1", use_bdlora={"target_modules_bd_a": ["lin1"], "nblocks": 3}),
            one("B", "lin0", use_bdlora={"target_modules_bd_b": ["lin0"], "nblocks": 2}),
            one(
                "A, B and neither",
                "lin0",
                "lin1",
                "nobias",
                use_bdlora={
                    "target_modules_bd_a": ["lin1"],
                    "target_modules_bd_b": ["n0"],
                    "nblocks": 3,
                    "match_strict": False,
                },
            ),
        ),
        roundings=2,
    ),
    Feature(
        "Two and three adapters",
        "W + Σ sᵢ·BᵢAᵢ",
        (
            Entry("two", (lora("lin0", "lin1"), lora("lin1", "nobias", r=3, lora_alpha=-4))),
            Entry(
                "three of all kinds",
                (
                    lora("lin0", "emb", "conv1d"),
                    lora("lin0", "convolution2", "emb", use_rslora=True),
                    lora("conv1d", "convolution2", "convolution1", "lin0", r=3),
                ),
            ),
            Entry(
                "biases",
                (lora("lin0", lora_bias=True), lora("lin0", "convolution1", lora_bias=True, r=3)),
            ),
            Entry(
                "the later saved module counts",
                (
                    lora("lin0", "lin1", bias="lora_only"),
                    lora("lin0", modules_to_save=["lin1", "norm"]),
                    lora("lin0", modules_to_save=["norm"]),
                ),
            ),
        ),
        roundings=4,
    ),
    Feature(
        "Several DoRA adapters",
        "one after the other: Wᵢ = m·V/‖V‖, V = Wᵢ₋₁ + s·BA",
        (
            Entry("two", (lora("lin0", use_dora=True), lora("lin0", "lin1", use_dora=True, r=3))),
            Entry("with a plain one", (lora("lin0"), lora("lin0", use_dora=True, r=3))),
            Entry(
                "three of all kinds",
                (
                    lora("lin0", "emb", "conv1d", "convolution2", use_dora=True),
                    lora("lin0", "emb", "conv1d", r=3),
                    lora("lin0", "conv1d", "convolution2", use_dora=True, use_rslora=True, r=5),
                ),
            ),
        ),
        roundings=3,
    ),
)

REFUSALS = (
    Refusal("Convolutions in groups", lora("grouped", r=8), "grouped"),
    Refusal("LoftQ", lora("lin0"), "loftq", by_hand={"init_lora_weights": "loftq"}),
    Refusal("CorDA", lora("lin0"), "corda", by_hand={"init_lora_weights": "corda"}),
    Refusal("LoRA-GA", lora("lin0"), "lora_ga", by_hand={"init_lora_weights": "lora_ga"}),
    Refusal(
        "aLoRA",
        lora("q_proj", alora_invocation_tokens=[5, 6], task_type="CAUSAL_LM"),
        "alora_invocation_tokens",
        base="llama",
    ),
    Refusal("QALoRA", lora("lin0"), "use_qalora", by_hand={"use_qalora": True}),
    Refusal("Arrow", lora("lin0"), "arrow_config", by_hand={"arrow_config": {"top_k": 2}}),
    Refusal(
        "Megatron, one of several parts",
        lora("lin0"),
        "megatron_config",
        by_hand={"megatron_config": {"tensor_model_parallel_size": 2}},
    ),
    Refusal(
        "Types other than LoRA, LoHa, LoKr, IA3, OFT",
        lora("lin0"),
        "BOFT",
        by_hand={"peft_type": "BOFT"},
    ),
)
