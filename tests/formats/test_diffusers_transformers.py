"""Files in the names of transformers' authors: merges, and what diffusers' loaders make of them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors.numpy import load_file
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
from support.image_formats import Tensors, merge, save
from support.shared_data import shapes_of, sparse

diffusers = pytest.importorskip("diffusers", reason="diffusers is in the extra test")
torch = pytest.importorskip("torch")

from diffusers.loaders import lora_pipeline  # noqa: E402


@dataclass(frozen=True)
class Family:
    """A family's class with arguments that make it small, and its loader."""

    class_name: str
    loader: str
    arguments: Mapping[str, Any]


FLUX = {
    "in_channels": 4,
    "num_layers": 2,
    "num_single_layers": 1,
    "attention_head_dim": 8,
    "num_attention_heads": 2,
    "joint_attention_dim": 12,
    "pooled_projection_dim": 10,
    "guidance_embeds": True,
    "axes_dims_rope": (2, 2, 4),
}
FAMILIES = {
    "flux1": Family("FluxTransformer2DModel", "FluxLoraLoaderMixin", FLUX),
    "flux2": Family(
        "Flux2Transformer2DModel",
        "Flux2LoraLoaderMixin",
        {
            "in_channels": 4,
            "num_layers": 2,
            "num_single_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "timestep_guidance_channels": 16,
            "axes_dims_rope": (2, 2, 2, 2),
        },
    ),
    "wan": Family(
        "WanTransformer3DModel",
        "WanLoraLoaderMixin",
        {
            "num_layers": 2,
            "num_attention_heads": 2,
            "attention_head_dim": 12,
            "in_channels": 4,
            "out_channels": 4,
            "text_dim": 16,
            "freq_dim": 16,
            "ffn_dim": 32,
        },
    ),
    "ltx": Family(
        "LTXVideoTransformer3DModel",
        "LTXVideoLoraLoaderMixin",
        {
            "num_layers": 2,
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 8,
            "cross_attention_dim": 16,
            "caption_channels": 12,
        },
    ),
    "qwen_image": Family(
        "QwenImageTransformer2DModel",
        "QwenImageLoraLoaderMixin",
        {
            "num_layers": 2,
            "in_channels": 16,
            "out_channels": 4,
            "attention_head_dim": 16,
            "num_attention_heads": 2,
            "joint_attention_dim": 12,
            "axes_dims_rope": (4, 6, 6),
        },
    ),
    "z_image": Family(
        "ZImageTransformer2DModel",
        "ZImageLoraLoaderMixin",
        {
            "dim": 32,
            "n_layers": 2,
            "n_refiner_layers": 1,
            "n_heads": 2,
            "n_kv_heads": 2,
            "cap_feat_dim": 12,
            "axes_dims": [4, 6, 6],
            "axes_lens": [8, 8, 8],
        },
    ),
    "krea2": Family(
        "Krea2Transformer2DModel",
        "Krea2LoraLoaderMixin",
        {
            "in_channels": 8,
            "num_layers": 2,
            "attention_head_dim": 8,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "intermediate_size": 40,
            "timestep_embed_dim": 16,
            "text_hidden_dim": 24,
            "num_text_layers": 3,
            "text_num_attention_heads": 3,
            "text_num_key_value_heads": 3,
            "text_intermediate_size": 28,
            "num_layerwise_text_blocks": 1,
            "num_refiner_text_blocks": 1,
            "axes_dims_rope": (2, 2, 4),
        },
    ),
    "cosmos2": Family(
        "CosmosTransformer3DModel",
        "AnimaLoraLoaderMixin",
        {
            "in_channels": 4,
            "out_channels": 4,
            "num_attention_heads": 2,
            "attention_head_dim": 16,
            "num_layers": 2,
            "mlp_ratio": 2.0,
            "text_embed_dim": 24,
            "adaln_lora_dim": 4,
            "max_size": (4, 8, 8),
        },
    ),
}


def model_of(family: str) -> Any:
    one = FAMILIES[family]
    torch.manual_seed(5)
    return getattr(diffusers, one.class_name)(**one.arguments)


def in_the_authors_names(family: str, weights: Tensors) -> Tensors:
    return diffusion.in_the_authors_names(family, weights) if family in diffusion.RULES else weights


def check(family: str, file: Path, root: Path) -> None:
    model = model_of(family)
    before = numpy(model)
    loader = getattr(lora_pipeline, FAMILIES[family].loader)
    found = merge(saved(model, root / "base"), file, root / "out")

    def load(model: Any) -> None:
        result = loader.lora_state_dict(file)
        state = result[0] if isinstance(result, tuple) else result
        alphas = {"network_alphas": None} if family == "flux1" else {}
        loader.load_lora_into_transformer(state, transformer=model, **alphas)

    expected = fused(model, load)
    changed = [name for name in before if not np.array_equal(before[name], found[name])]
    assert changed
    assert_same_weights(found, expected, before, len(changed))


DOTTED = (".lora_A.weight", ".lora_B.weight")
FLAT = (".lora_down.weight", ".lora_up.weight")
#: The modules that diffusers converts of files in each naming; in the others it knows all blocks.
BLOCKS = {
    # It cuts `linear1` at the widths of the published model.
    ("flux1", "lora_unet_"): r"_blocks\.\d+\.(?!linear1)",
}


def factors_in(family: str, prefix: str) -> Factors:
    """Factors of a model's modules in its author's names."""
    weights = in_the_authors_names(family, numpy(model_of(family)))
    pattern = BLOCKS.get((family, prefix), r"\.\d+\.")
    return factors_of(weights, lambda module: bool(re.search(pattern, module)))


# Of Z-Image it takes apart flattened names alone.
@pytest.mark.parametrize("family", [name for name in FAMILIES if name not in {"flux1", "z_image"}])
def test_dotted_names(family: str, tmp_path: Path) -> None:
    prefix = "diffusion_model."
    factors = factors_in(family, prefix)
    tensors = written(factors, lambda module: prefix + module, *DOTTED)
    check(family, save(tmp_path / "a.safetensors", tensors), tmp_path)


@pytest.mark.parametrize("family", ["flux1", "flux2", "wan", "qwen_image", "z_image"])
def test_kohya_s_names(family: str, tmp_path: Path) -> None:
    factors = factors_in(family, "lora_unet_")
    alphas = {module: (1.0, 3.0, 0.5)[number % 3] for number, module in enumerate(factors)}
    tensors = written(
        factors, lambda module: "lora_unet_" + module.replace(".", "_"), *FLAT, alphas
    )
    check(family, save(tmp_path / "a.safetensors", tensors), tmp_path)


def test_xlabs_processors(tmp_path: Path) -> None:
    weights = in_the_authors_names("flux1", numpy(model_of("flux1")))
    names = {
        f"{block}.{layer}.{part}": f"{block}.processor.{part}_lora{side}"
        for block in ("double_blocks.0", "double_blocks.1")
        for side, layer in ((1, "img_attn"), (2, "txt_attn"))
        for part in ("qkv", "proj")
    }
    factors = factors_of(weights, names.__contains__)
    assert len(factors) == 8
    tensors = written(factors, names.__getitem__, ".down.weight", ".up.weight")
    check("flux1", save(tmp_path / "a.safetensors", tensors), tmp_path)


def test_alphas_beside_diffusers_names(tmp_path: Path) -> None:
    weights = numpy(model_of("flux1"))
    factors = factors_of(weights, lambda module: "transformer_blocks." in module)
    alphas = {module: (1.0, 3.0, 0.5)[number % 3] for number, module in enumerate(factors)}
    tensors = written(factors, lambda module: f"transformer.{module}", *DOTTED, alphas)
    file = save(tmp_path / "a.safetensors", tensors)
    model = model_of("flux1")
    before = numpy(model)
    found = merge(saved(model, tmp_path / "base"), file, tmp_path / "out")
    loader = lora_pipeline.FluxLoraLoaderMixin

    def load(model: Any) -> None:
        state, network_alphas = loader.lora_state_dict(file, return_alphas=True)
        loader.load_lora_into_transformer(state, network_alphas, model)

    assert_same_weights(found, fused(model, load), before, len(factors))


BLOCKS_OF_FLUX = r"^(double|single)_blocks\."
#: What diffusers cuts at the widths of the published models.
FIXED_WIDTHS = {
    "kohya's Flux": ("flux1", "FluxLoraLoaderMixin", "lora_unet_", BLOCKS_OF_FLUX),
    # Looked for in as many blocks as the published model has.
    "Kontext": ("flux1", "FluxLoraLoaderMixin", "base_model.model.", BLOCKS_OF_FLUX),
    "Lumina 2": (
        "lumina2",
        "Lumina2LoraLoaderMixin",
        "diffusion_model.",
        r"^(layers|\w+_refiner)\.\d+\.",
    ),
    "HunyuanVideo": (
        "hunyuan_video",
        "HunyuanVideoLoraLoaderMixin",
        "diffusion_model.",
        BLOCKS_OF_FLUX,
    ),
}


def shapes_in_the_authors_names(
    family: str, shapes: Mapping[str, tuple[int, ...]]
) -> dict[str, tuple[int, int]]:
    """Of the matrices alone, without their content: each row holds the number of its inputs."""
    rows = {
        name: np.full((shape[0], 1), shape[1], np.int32)
        for name, shape in shapes.items()
        if name.endswith(".weight") and len(shape) == 2
    }
    return {
        name.removesuffix(".weight"): (len(value), int(value[0, 0]))
        for name, value in diffusion.in_the_authors_names(family, rows).items()
    }


@pytest.mark.parametrize(
    "name",
    [
        # It takes ten seconds.
        pytest.param(name, marks=[pytest.mark.exhaustive] if name == "Kontext" else [])
        for name in FIXED_WIDTHS
    ],
)
def test_conversions_at_the_published_widths(name: str, tmp_path: Path) -> None:
    """Without a merge: what each makes of the factors of every module, on some of the rows."""
    family, loader, prefix, pattern = FIXED_WIDTHS[name]
    ours = shapes_of(family) if name == "Kontext" else diffusion.shapes_of(family)
    weights = {
        f"{module}.weight": np.broadcast_to(np.float32(0), shape)
        for module, shape in shapes_in_the_authors_names(family, ours).items()
        if re.search(pattern, module)
    }
    factors = factors_of(weights, lambda _: True)
    if prefix == "lora_unet_":
        alphas = {module: (1.0, 3.0, 0.5)[number % 3] for number, module in enumerate(factors)}
        tensors = written(factors, lambda name: prefix + name.replace(".", "_"), *FLAT, alphas)
    else:
        tensors = written(factors, lambda name: prefix + name, *DOTTED)
        if name == "Kontext":
            # Diffusers asks for the last layer as well.
            last = factors_of({"final_layer.linear.weight": np.zeros((64, 3072))}, lambda _: True)
            tensors |= written(last, lambda name: prefix + name, *DOTTED)
    file = save(tmp_path / "a.safetensors", tensors)
    base = sparse(tmp_path / "base.safetensors", ours)
    own = tmp_path / "converted.safetensors"
    lorafast.convert(file, own, to="diffusers", base=base)
    theirs = getattr(lora_pipeline, loader).lora_state_dict(file)
    theirs = theirs[0] if isinstance(theirs, tuple) else theirs
    assert_same_products(load_file(own), {name: v.numpy() for name, v in theirs.items()})


def assert_same_products(found: Tensors, expected: Tensors) -> None:
    modules = {name.split(".lora_A.")[0] for name in expected if ".lora_A." in name}
    assert modules == {name.split(".lora_A.")[0] for name in found if ".lora_A." in name}
    for module in modules:
        products = [
            each[f"{module}.lora_B.weight"][::97].astype(np.float64)
            @ each[f"{module}.lora_A.weight"].astype(np.float64)
            for each in (found, expected)
        ]
        np.testing.assert_allclose(*products, rtol=0, atol=4e-6, err_msg=module)
