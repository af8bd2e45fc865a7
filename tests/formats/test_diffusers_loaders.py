"""Merges held against what diffusers' own loaders make of the same files: loaded, then fused."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support import diffusion
from support.diffusers_loaders import (
    Factors,
    assert_same_weights,
    factors_of,
    fused,
    numpy,
    saved,
    written,
)
from support.image_formats import merge, save

diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra test")
torch = pytest.importorskip("torch")

from diffusers import loaders  # noqa: E402

UNETS = {
    "sd1": loaders.StableDiffusionLoraLoaderMixin,
    "sd2": loaders.StableDiffusionLoraLoaderMixin,
    "sdxl": loaders.StableDiffusionXLLoraLoaderMixin,
}


def unet_of(kind: str) -> Any:
    torch.manual_seed(3)
    return diffusion.unet(kind)


def check_unet(kind: str, file: Path, count: int, root: Path) -> None:
    model = unet_of(kind)
    before = numpy(model)
    found = merge(saved(model, root / "base"), file, root / "out")

    def load(model: Any) -> None:
        state, alphas, metadata = UNETS[kind].lora_state_dict(
            file, unet_config=model.config, return_lora_metadata=True
        )
        UNETS[kind].load_lora_into_unet(state, alphas, model, metadata=metadata)

    assert_same_weights(found, fused(model, load), before, count)


def is_attention(module: str) -> bool:
    return ".attn" in module


def is_linear_of_attention(module: str) -> bool:
    return ".attentions." in module


SPELLINGS = {
    "lora_A": (".lora_A.weight", ".lora_B.weight"),
    "lora.down": (".lora.down.weight", ".lora.up.weight"),
    "processor": ("_lora.down.weight", "_lora.up.weight"),
}


def processor(module: str) -> str:
    attention, _, name = module.removesuffix(".0").rpartition(".")
    return f"{attention}.processor.{name}"


@pytest.mark.parametrize("kind", UNETS)
@pytest.mark.parametrize("spelling", SPELLINGS)
def test_spellings_of_diffusers_in_a_unet(kind: str, spelling: str, tmp_path: Path) -> None:
    is_processor = spelling == "processor"
    wanted = is_attention if is_processor else is_linear_of_attention
    factors = factors_of(numpy(unet_of(kind)), wanted)
    name = processor if is_processor else str
    tensors = written(factors, lambda module: f"unet.{name(module)}", *SPELLINGS[spelling])
    file = save(tmp_path / "a.safetensors", tensors)
    check_unet(kind, file, len(factors), tmp_path)


@pytest.mark.parametrize(
    "config",
    [
        {"lora_alpha": 3},
        {"lora_alpha": 4, "use_rslora": True},
        {"lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 1, "ff.net.0.proj": 6}},
    ],
    ids=["alpha", "rsLoRA", "pattern"],
)
def test_scales_in_the_metadata(config: dict[str, Any], tmp_path: Path) -> None:
    factors = factors_of(numpy(unet_of("sd1")), is_linear_of_attention)
    fields = {"r": 2, "target_modules": sorted(factors), "peft_type": "LORA", **config}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps({f"unet.{k}": v for k, v in fields.items()}),
    }
    tensors = written(factors, lambda module: f"unet.{module}", *SPELLINGS["lora_A"])
    file = save(tmp_path / "a.safetensors", tensors, metadata)
    check_unet("sd1", file, len(factors), tmp_path)


def alphas_of(factors: Factors, *values: float, attention: float) -> dict[str, float]:
    """Alphas in turn, and one of all layers of attention.

    diffusers looks the alphas of layers of attention up under names that nothing has then, and
    takes the one that is most frequent for them.
    """
    return {
        module: attention if is_attention(module) else values[number % len(values)]
        for number, module in enumerate(factors)
    }


@pytest.mark.parametrize(
    ("kind", "alphas"), [("sd1", (1.0, 3.0, 0.5)), ("sd2", (3.0,)), ("sdxl", (1.0, 3.0, 0.5))]
)
def test_kohya_s_names_of_a_unet(kind: str, alphas: tuple[float, ...], tmp_path: Path) -> None:
    model = unet_of(kind)
    factors = factors_of(numpy(model), lambda module: "norm" not in module)
    # sd-scripts trains SDXL in its authors' names.
    names = {module: module for module in factors}
    if kind == "sdxl":
        places = {f"{module}.weight": np.array(n) for n, module in enumerate(factors)}
        order = list(factors)
        authors = diffusion.unet_in_the_authors_names(kind, places)
        names = {order[int(n)]: name.removesuffix(".weight") for name, n in authors.items()}
    tensors = written(
        factors,
        lambda module: "lora_unet_" + names[module].replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
        alphas_of(factors, *alphas, attention=3.0),
    )
    file = save(tmp_path / "a.safetensors", tensors)
    check_unet(kind, file, len(factors), tmp_path)


def clip() -> Any:
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(4)
    return transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            hidden_size=8,
            intermediate_size=12,
            num_hidden_layers=2,
            num_attention_heads=2,
            vocab_size=16,
            max_position_embeddings=8,
        )
    )


EARLY = {"q_proj": "to_q", "k_proj": "to_k", "v_proj": "to_v", "out_proj": "to_out"}
TEXT: dict[str, tuple[str, str, str]] = {
    "lora_A": ("text_encoder.", ".lora_A.weight", ".lora_B.weight"),
    "lora_linear_layer": (
        "text_encoder.",
        ".lora_linear_layer.down.weight",
        ".lora_linear_layer.up.weight",
    ),
    "to_q_lora": ("text_encoder.", "_lora.down.weight", "_lora.up.weight"),
    "kohya": ("lora_te_", ".lora_down.weight", ".lora_up.weight"),
}


@pytest.mark.parametrize("spelling", TEXT)
def test_spellings_of_a_text_encoder(spelling: str, tmp_path: Path) -> None:
    model = clip()
    before = numpy(model)
    start = "" if any(name.startswith("text_model.") for name in before) else "text_model."
    is_early = spelling == "to_q_lora"
    factors = factors_of(
        before,
        lambda module: ".self_attn." in module or (".mlp." in module and not is_early),
    )
    prefix, down, up = TEXT[spelling]

    def key(module: str) -> str:
        if spelling == "kohya":
            return prefix + (start + module).replace(".", "_")
        head, _, name = module.rpartition(".")
        return f"{prefix}{start}{head}.{EARLY[name] if is_early else name}"

    alphas = dict.fromkeys(factors, 3.0) if spelling == "kohya" else None
    file = save(tmp_path / "a.safetensors", written(factors, key, down, up, alphas))
    found = merge(saved(model, tmp_path / "base"), file, tmp_path / "out")
    mixin = loaders.StableDiffusionLoraLoaderMixin
    state, network_alphas = mixin.lora_state_dict(file)
    mixin.load_lora_into_text_encoder(state, network_alphas, model)
    for layer in list(model.modules()):
        if hasattr(layer, "merge") and hasattr(layer, "base_layer"):
            layer.merge()
    expected = {
        name.replace(".base_layer", ""): value
        for name, value in numpy(model).items()
        if ".lora_" not in name
    }
    saved_names = {name.removeprefix("text_model."): value for name, value in found.items()}
    expected = {name.removeprefix("text_model."): value for name, value in expected.items()}
    expected = {name: value for name, value in expected.items() if name in saved_names}
    original = {name.removeprefix("text_model."): value for name, value in before.items()}
    original = {name: value for name, value in original.items() if name in saved_names}
    assert_same_weights(saved_names, expected, original, len(factors))
