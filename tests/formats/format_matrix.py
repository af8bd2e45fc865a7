"""The formats with the algorithms and kinds of layers that each can say: what the tests merge."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from support import format_writers as write
from support.algorithms import ALGORITHMS, Array, Parts, new_weight
from support.format_writers import Writer

KINDS = ("linear", "conv 1x1", "conv 3x3", "embedding", "norm")
WEIGHTS = KINDS[:3]


@dataclass(frozen=True)
class Feature:
    """An algorithm: its formula, and its variants, which are names in `support.algorithms`."""

    name: str
    formula: str
    variants: tuple[str, ...]
    kinds: tuple[str, ...] = WEIGHTS


FEATURES = {
    feature.name: feature
    for feature in (
        Feature(
            "LoRA",
            "W + s·B·A; of embeddings W + s·(B·A)ᵀ",
            ("lora", "lora, no alpha", "lora, of tokens"),
            (*WEIGHTS, "embedding"),
        ),
        Feature(
            "LoCon with a core", "W + s·C ×₁ B ×₂ Aᵀ (`lora_mid`)", ("locon, mid",), WEIGHTS[1:]
        ),
        Feature(
            "DoRA",
            "m·V/‖V‖, V = W + s·B·A, a norm for each output",
            ("dora", "dora, of tokens", "dora, for each token"),
            (*WEIGHTS, "embedding"),
        ),
        Feature("DoRA of inputs", "the same with a norm for each input", ("dora, inputs",)),
        Feature(
            "LoHa",
            "W + s·(B₁A₁) ∘ (B₂A₂), each side with a core where it is Tucker's",
            ("loha", "loha, high rank", "loha, kernels kept", "loha, tucker"),
        ),
        Feature(
            "LoKr",
            "W + s·(w₁ ⊗ w₂), each side whole, of two factors, or Tucker's",
            (
                "lokr, both whole",
                "lokr, alpha infinite",
                "lokr, w2 in factors",
                "lokr, both in factors",
                "lokr, w1 in factors",
                "lokr, more ranks than extents",
                "lokr, tucker",
                "lokr, w1 reaches into the kernel",
            ),
        ),
        Feature("Full difference", "W + D", ("full",), KINDS),
        Feature("Whole weight", "D", ("whole",), KINDS),
        Feature("GLoRA", "W + s·(W·A₁A₂ + B₁B₂)", ("glora",)),
        Feature(
            "IA³",
            "W + v ∘ W, a v for each output or input; in PEFT v ∘ W",
            ("ia3, outputs", "ia3, inputs"),
        ),
        Feature("Diag-OFT", "(I + Q)(I − Q)⁻¹ W in blocks", ("oft", "oft, constrained")),
        Feature("BOFT", "the same in stages of butterflies", ("boft",)),
    )
}


@dataclass(frozen=True)
class Spelling:
    """A way in which the format is written, and the features that are tried with it."""

    name: str
    write: Writer
    features: tuple[str, ...]


@dataclass(frozen=True)
class Without:
    """Why a format does not say something; what nothing writes may be read all the same."""

    reason: str
    is_refused: bool = True


@dataclass(frozen=True)
class Format:
    """A format, what it can say, and why not the rest."""

    name: str
    holds: str
    spellings: tuple[Spelling, ...]
    #: Of each feature its variants with the kinds of layers.
    says: Mapping[str, Mapping[str, tuple[str, ...]]]
    #: By feature, by kind of layer, or by both ("LoRA, conv 1x1").
    without: Mapping[str, Without]
    #: The module of each kind; of a format that counts layers, all that it counts.
    modules: Mapping[str, tuple[str, ...]]
    config: Mapping[str, Any] = field(default_factory=lambda: {"model_type": "x"})
    #: Whether alpha / r counts for a LoKr of two whole factors too, and IA³ is v ∘ W alone.
    by_rules_of_peft: bool = False


@dataclass(frozen=True)
class Entry:
    """One combination."""

    format: Format
    spelling: Spelling
    feature: Feature
    variant: str
    kind: str
    #: Whether it is the first of its feature and kind in the format.
    is_first: bool

    def merged(self, parts: Parts, weight: Array) -> Array:
        """The new weight by the formula."""
        found = new_weight(self.variant, parts, weight)
        if self.format.by_rules_of_peft and self.feature.name == "IA³":
            return found - weight
        if self.format.by_rules_of_peft and {"lokr_w1", "lokr_w2"} <= parts.keys():
            return weight + float(parts["alpha"]) / ALGORITHMS[self.variant].rank * (found - weight)
        return found

    @property
    def id(self) -> str:
        parts = (self.format.name, self.spelling.name, self.variant, self.kind)
        return "-".join(parts).replace(" ", "_")


@dataclass(frozen=True)
class Refusal:
    """A combination that the format cannot say."""

    format: Format
    feature: Feature
    variant: str
    kind: str

    @property
    def id(self) -> str:
        return f"{self.format.name}-{self.variant}-{self.kind}".replace(" ", "_")


Says = dict[str, dict[str, tuple[str, ...]]]


def variants(feature: Feature, *, leave_out: tuple[str, ...] = ()) -> dict[str, tuple[str, ...]]:
    """The variants of a feature in the weight's own layout, with the kinds of layers."""
    return {
        name: tuple(kind for kind in KINDS if kind in ALGORITHMS[name].kinds)
        for name in feature.variants
        if "token" not in name and name not in leave_out
    }


def parts_of_a_file(**left_out: tuple[str, ...]) -> Says:
    """What a file of one tensor a part can say."""
    leave_out = left_out.get("leave_out", ())
    found = {name: variants(one, leave_out=leave_out) for name, one in FEATURES.items()}
    del found["Whole weight"]
    return found


def only(says: Mapping[str, Mapping[str, str]]) -> Says:
    """Variants with the kinds of layers as one text."""
    return {
        feature: {name: tuple(kinds.split(", ")) for name, kinds in own.items()}
        for feature, own in says.items()
    }


EVERY = tuple(FEATURES)
FACTORS = ("LoRA",)
NO_FACTORS_OF_EMBEDDINGS = Without("no trainer of image models trains it by factors", False)
NO_WHOLE = Without("a parameter in the base's place is no part of such a file")
OF_AN_IMAGE = {
    "LoRA, embedding": NO_FACTORS_OF_EMBEDDINGS,
    "DoRA, embedding": NO_FACTORS_OF_EMBEDDINGS,
}
FULL = "linear, conv 1x1, conv 3x3, embedding, norm"
CONVOLUTIONS_TOO = "linear, conv 1x1, conv 3x3"


def under(stem: str) -> dict[str, tuple[str, ...]]:
    return {kind: (f"{stem}.{name}",) for kind, name in NAMES.items()}


NAMES = {
    "linear": "attn.to_q",
    "conv 1x1": "proj_in",
    "conv 3x3": "conv1",
    "embedding": "embeddings",
    "norm": "norm1",
}
UNET = "down_blocks.0.attentions.0"
FLUX = "double_blocks.0"
LLAMA = {
    "linear": ("model.layers.0.mlp.up_proj",),
    "conv 1x1": ("model.layers.0.conv.in_proj",),
    "conv 3x3": ("model.layers.0.conv.out_proj",),
    "embedding": ("model.embed_tokens",),
    "norm": ("model.norm",),
}
#: The layers of a block of attention, which cloneofsimo's files count.
COUNTED = tuple(
    f"{UNET}.transformer_blocks.0.{attention}.{name}"
    for attention in ("attn1", "attn2")
    for name in ("to_q", "to_k", "to_v", "to_out.0")
)

FORMATS = (
    Format(
        "peft",
        "a directory with `adapter_config.json`",
        (
            Spelling("as it is saved", write.peft(), EVERY),
            Spelling("rsLoRA", write.peft(rslora=True), ("LoRA", "DoRA")),
            Spelling("patterns", write.peft(patterns=True, scale="lora_alpha"), ("LoRA", "DoRA")),
            Spelling("alpha_pattern", write.peft(patterns=True), ("LoHa", "LoKr")),
            Spelling("shards", write.peft(shards=True), FACTORS),
        ),
        only(
            {
                "LoRA": {"lora": CONVOLUTIONS_TOO, "lora, of tokens": "embedding"},
                "DoRA": {"dora": CONVOLUTIONS_TOO, "dora, of tokens": "embedding"},
                "Whole weight": {"whole": FULL},
            }
        )
        | {
            "LoHa": variants(FEATURES["LoHa"]),
            # Both of its factors have one rank there, and infinity is no value of a config.
            "LoKr": variants(
                FEATURES["LoKr"],
                leave_out=("lokr, alpha infinite", "lokr, both in factors"),
            ),
            "IA³": variants(FEATURES["IA³"]),
        },
        {
            "LoCon with a core": Without("PEFT's LoRA has two factors"),
            "DoRA of inputs": Without("PEFT's magnitudes are the outputs'"),
            "Full difference": Without("PEFT saves whole weights (`modules_to_save`)"),
            "GLoRA": Without("PEFT has no GLoRA of LyCORIS's layout"),
            "Diag-OFT": Without("PEFT's OFT is of another layout, and is refused by its name"),
            "BOFT": Without("PEFT's BOFT is of another layout, and is refused by its name"),
        },
        under("model.layers.0"),
        by_rules_of_peft=True,
    ),
    Format(
        "kohya",
        "one file, `lora_unet_…`, `lora_te_…`",
        (
            Spelling("lora_unet_", write.flattened("lora_unet_"), EVERY),
            Spelling("lora_te_", write.flattened("lora_te_"), FACTORS),
        ),
        parts_of_a_file(),
        {"Whole weight": NO_WHOLE} | OF_AN_IMAGE,
        under(UNET),
    ),
    Format(
        "lycoris",
        "one file, `lycoris_…`",
        (Spelling("lycoris_", write.flattened("lycoris_"), EVERY),),
        parts_of_a_file(),
        {"Whole weight": NO_WHOLE} | OF_AN_IMAGE,
        under(UNET),
    ),
    Format(
        "diffusers",
        "one file, `unet.…`, `transformer.…`, `text_encoder.…`",
        (
            Spelling("lora_A", write.dotted("unet.", write.LORA_A), EVERY),
            Spelling("lora.down", write.dotted("unet.", write.LORA_DOWN), FACTORS),
            Spelling("lora_linear_layer", write.dotted("unet.", write.LINEAR_LAYER), FACTORS),
            Spelling("processor", write.attention_processor("unet."), ("LoRA",)),
            Spelling("metadata", write.with_metadata("unet.", "unet"), ("LoRA", "DoRA")),
            Spelling("rsLoRA", write.with_metadata("unet.", "unet", rslora=True), FACTORS),
        ),
        parts_of_a_file(leave_out=("dora, inputs",)),
        {
            "Whole weight": NO_WHOLE,
            "DoRA of inputs": Without("diffusers' magnitudes are PEFT's, the outputs'"),
        }
        | OF_AN_IMAGE,
        under(UNET),
    ),
    Format(
        "comfyui",
        "one file, `diffusion_model.…`, `text_encoders.…`",
        (
            Spelling("lora_down", write.dotted("diffusion_model."), EVERY),
            Spelling("lora_A", write.dotted("diffusion_model.", write.LORA_A), ("LoRA", "DoRA")),
        ),
        parts_of_a_file(),
        {"Whole weight": NO_WHOLE} | OF_AN_IMAGE,
        under(UNET),
    ),
    Format(
        "onetrainer",
        "one file, `lora_transformer_…`, or by its metadata",
        (
            Spelling("flattened", write.flattened("lora_transformer_"), EVERY),
            Spelling(
                "metadata", write.dotted("unet.", metadata={"ot_branch": "x"}), ("LoRA", "DoRA")
            ),
        ),
        parts_of_a_file(),
        {"Whole weight": NO_WHOLE} | OF_AN_IMAGE,
        under(UNET),
    ),
    Format(
        "xlabs",
        "one file, `double_blocks.0.processor.proj_lora1.…`",
        (Spelling("processor", write.xlabs, EVERY),),
        only({"LoRA": {"lora, no alpha": "linear"}}),
        {
            "LoRA, conv 1x1": Without("attention of Flux has no convolutions", False),
            "LoRA, conv 3x3": Without("attention of Flux has no convolutions", False),
            "embedding": Without("attention of Flux has no embeddings"),
            "norm": Without("the files hold factors alone"),
            **dict.fromkeys(EVERY[1:], Without("the files hold plain factors alone")),
        },
        dict.fromkeys(KINDS, (f"{FLUX}.img_attn.proj",)),
    ),
    Format(
        "bfl",
        "one file, Flux's own names",
        (
            Spelling("bare", write.dotted("", write.LORA_A), EVERY),
            Spelling("PEFT's prefix", write.dotted("base_model.model.", write.LORA_A), FACTORS),
        ),
        # Factors with alphas beside such names are OneTrainer's.
        parts_of_a_file(leave_out=("lora", "locon, mid", "dora", "dora, inputs")),
        {
            "Whole weight": Without("only norms are replaced (`….scale`)"),
            "LoCon with a core": Without(
                "factors with alphas beside such names are OneTrainer's", False
            ),
            "DoRA": Without("factors with alphas beside such names are OneTrainer's", False),
            "DoRA of inputs": Without(
                "factors with alphas beside such names are OneTrainer's", False
            ),
        }
        | OF_AN_IMAGE,
        under(FLUX),
    ),
    Format(
        "cloneofsimo",
        "one file with layers by number, `unet:0:up`",
        (
            Spelling("unet:0:up", write.numbered, EVERY),
            Spelling("a list in .pt", write.listed_pairs, FACTORS),
        ),
        only({"LoRA": {"lora, no alpha": "linear"}}),
        {
            "LoRA, conv 1x1": Without("the layers that it counts are attention's", False),
            "LoRA, conv 3x3": Without("the layers that it counts are attention's", False),
            "embedding": Without("the layers that it counts are attention's"),
            "norm": Without("the files hold factors alone"),
            **dict.fromkeys(EVERY[1:], Without("the files hold plain factors alone")),
        },
        dict.fromkeys(KINDS, COUNTED),
        {"_class_name": "UNet2DConditionModel"},
    ),
    Format(
        "mlx",
        "a directory with MLX's `adapter_config.json`",
        (
            Spelling("safetensors", write.mlx(), EVERY),
            Spelling("mlx-vlm", write.mlx(vlm=True), FACTORS),
            Spelling("npz", write.mlx(archive=True), ("LoRA", "DoRA")),
        ),
        only(
            {
                "LoRA": {"lora": "linear", "lora, of tokens": "embedding"},
                "DoRA": {"dora": "linear", "dora, for each token": "embedding"},
                "Whole weight": {"whole": FULL},
            }
        ),
        {
            "conv 1x1": Without("MLX has no LoRA of convolutions"),
            "conv 3x3": Without("MLX has no LoRA of convolutions"),
            **dict.fromkeys(
                (name for name in EVERY if name not in {"LoRA", "DoRA", "Whole weight"}),
                Without("mlx-lm trains LoRA, DoRA and whole weights"),
            ),
            "DoRA of inputs": Without("MLX's magnitudes are the outputs'"),
        },
        LLAMA,
    ),
    Format(
        "gguf",
        "one file of llama.cpp's",
        (Spelling("as it is converted", write.gguf, EVERY),),
        only({"LoRA": {"lora": "linear", "lora, of tokens": "embedding"}}),
        {
            "conv 1x1": Without("llama.cpp takes factors of matrices"),
            "conv 3x3": Without("llama.cpp takes factors of matrices"),
            **dict.fromkeys(EVERY[1:], Without("llama.cpp takes plain factors alone")),
        },
        LLAMA,
    ),
    Format(
        "torchtune",
        "a directory with torchtune's own names",
        (
            Spelling("safetensors", write.torchtune(), EVERY),
            Spelling("pt", write.torchtune(pickled=True), ("LoRA", "DoRA")),
        ),
        only({"LoRA": {"lora": "linear"}, "DoRA": {"dora": "linear"}}),
        {
            "embedding": Without("torchtune trains linear layers"),
            "conv 1x1": Without("torchtune trains linear layers"),
            "conv 3x3": Without("torchtune trains linear layers"),
            **dict.fromkeys(
                (name for name in EVERY if name not in {"LoRA", "DoRA"}),
                Without("torchtune trains LoRA and DoRA"),
            ),
        },
        LLAMA,
        {"model_type": "llama", "num_attention_heads": 4, "num_key_value_heads": 2},
    ),
    Format(
        "tinker",
        "PEFT's files with tinker's names",
        (Spelling("as it is saved", write.tinker, EVERY),),
        only({"LoRA": {"lora": "linear"}}),
        {
            "embedding": Without("tinker trains linear layers", False),
            "conv 1x1": Without("tinker trains linear layers", False),
            "conv 3x3": Without("tinker trains linear layers", False),
            **dict.fromkeys(EVERY[1:], Without("tinker trains plain factors alone")),
        },
        dict.fromkeys(KINDS, ("lm_head",)),
    ),
)


def without(one: Format, feature: str, kind: str) -> Without:
    """Why a format does not say it."""
    for key in (f"{feature}, {kind}", feature, kind):
        if key in one.without:
            return one.without[key]
    raise KeyError(f"{one.name} says nothing of {feature} of {kind}")


def kinds_of(one: Format, feature: str) -> set[str]:
    return {kind for kinds in one.says.get(feature, {}).values() for kind in kinds}


def entries() -> Iterator[Entry]:
    """Every combination that is merged."""
    for one in FORMATS:
        for feature, own in one.says.items():
            seen: set[str] = set()
            for spelling in one.spellings:
                if feature not in spelling.features:
                    continue
                for variant, kinds in own.items():
                    for kind in kinds:
                        if not sayable(spelling, variant, kind):
                            continue
                        is_first = kind not in seen
                        seen.add(kind)
                        yield Entry(one, spelling, FEATURES[feature], variant, kind, is_first)


def sayable(spelling: Spelling, variant: str, kind: str) -> bool:
    """Whether a spelling has the variant: its scale, or its kind of layer."""
    if spelling.name == "processor":
        return kind == "linear"
    if spelling.name in {"metadata", "rsLoRA"}:
        return variant != "lora, no alpha"
    return True


def refusals() -> Iterator[Refusal]:
    """Every combination that is refused, with its feature's first variant that has the kind."""
    for one in FORMATS:
        for feature in FEATURES.values():
            for kind in feature.kinds:
                if kind in kinds_of(one, feature.name) or feature.name == "Whole weight":
                    # Whole weights under a model's names are a model.
                    continue
                if not without(one, feature.name, kind).is_refused:
                    continue
                for variant in feature.variants:
                    if kind in ALGORITHMS[variant].kinds:
                        yield Refusal(one, feature, variant, kind)
                        break
