"""Names of diffusion models: diffusers' own converters of whole models agree with every merge."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from safetensors.numpy import load_file, save_file
from support import diffusion
from support.diffusion import FAMILIES

Array = npt.NDArray[Any]
RANK = 2
pytestmark = pytest.mark.filterwarnings("ignore::FutureWarning")


def small(shapes: dict[str, tuple[int, ...]], random: np.random.Generator) -> dict[str, Array]:
    """Weights with the rows of these and few inputs, for a name decides about rows alone."""

    def weight(shape: tuple[int, ...]) -> Array:
        cut = (shape[0], min(shape[1], 3), *shape[2:]) if len(shape) > 1 else shape
        return random.normal(size=cut).astype(np.float32)

    return {name: weight(shape) for name, shape in shapes.items()}


def factors(
    weights: dict[str, Array], random: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Factors of every linear layer under kohya's keys, and the weights with the products added."""
    tensors: dict[str, Array] = {}
    merged = dict(weights)
    for name, weight in weights.items():
        if weight.ndim != 2 or not name.endswith(".weight"):
            continue
        down = random.normal(size=(RANK, weight.shape[1])).astype(np.float32)
        up = random.normal(size=(weight.shape[0], RANK)).astype(np.float32)
        flat = "lora_unet_" + name.removesuffix(".weight").replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = np.array(1.0, np.float32)
        merged[name] = (weight + up.astype(np.float64) @ down / RANK).astype(np.float32)
    return tensors, merged


def write(path: Path, tensors: dict[str, Array]) -> Path:
    save_file({name: np.ascontiguousarray(value) for name, value in tensors.items()}, path)
    return path


def merge(base: Path, adapter: Path, output: Path) -> dict[str, Array]:
    lorafast.merge(base, adapter, output)
    assert lorafast.verify(base, adapter, output).ok
    (file,) = output.glob("*.safetensors")
    return load_file(file)


def assert_equal(found: dict[str, Array], expected: dict[str, Array]) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=2e-6, err_msg=name)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_merge_and_diffusers_converter_may_change_places(
    family: str, prefix: str, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers", reason="the converters are diffusers'")
    random = np.random.default_rng(7)
    ours = small(diffusion.shapes_of(family), random)
    theirs = diffusion.in_the_authors_names(family, ours)
    assert_equal(diffusion.converted(family, theirs), ours)
    single = write(tmp_path / "single.safetensors", {prefix + k: v for k, v in theirs.items()})
    folder = write(tmp_path / "model.safetensors", ours)
    for naming, weights in (("diffusers", ours), ("original", theirs)):
        tensors, expected = factors(weights, random)
        adapter = write(tmp_path / f"{naming}.safetensors", tensors)
        if naming == "original":
            expected = diffusion.converted(family, expected)
        merged = merge(single, adapter, tmp_path / f"single_{naming}")
        merged = {name.removeprefix(prefix): value for name, value in merged.items()}
        assert_equal(diffusion.converted(family, merged), expected)
        assert_equal(merge(folder, adapter, tmp_path / f"folder_{naming}"), expected)


def unet_factors(
    weights: dict[str, Array], prefix: str, random: np.random.Generator
) -> tuple[dict[str, Array], dict[str, Array]]:
    """Factors of every second layer, and the weights with the products added.

    Factors of a 1×1 convolution stand for a linear layer as well, and the other way round.
    """
    tensors: dict[str, Array] = {}
    merged = dict(weights)
    layers = [name for name in weights if name.endswith(".weight") and weights[name].ndim > 1]
    for place, name in enumerate(layers):
        weight = weights[name]
        shape = weight.shape[1:]
        if set(shape[1:]) <= {1}:
            shape = (shape[0], 1, 1) if place % 4 < 2 else shape[:1]
        down = random.normal(size=(RANK, *shape)).astype(np.float32)
        ones = (1,) * (len(shape) - 1)
        up = random.normal(size=(weight.shape[0], RANK, *ones)).astype(np.float32)
        flat = prefix + name.removesuffix(".weight").replace(".", "_")
        tensors[f"{flat}.lora_down.weight"] = down
        tensors[f"{flat}.lora_up.weight"] = up
        tensors[f"{flat}.alpha"] = np.array(1.0, np.float32)
        product = up.reshape(-1, RANK).astype(np.float64) @ down.reshape(RANK, -1) / RANK
        merged[name] = (weight + product.reshape(weight.shape)).astype(np.float32)
    return tensors, merged


@pytest.mark.parametrize("kind", diffusion.UNETS)
def test_a_merge_and_diffusers_converter_of_unets_may_change_places(
    kind: str, tmp_path: Path
) -> None:
    pytest.importorskip("diffusers", reason="the converter is diffusers'")
    import torch
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint

    model = diffusion.unet(kind)
    ours = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    theirs = diffusion.unet_in_the_authors_names(kind, ours)

    def converted(tensors: dict[str, Array]) -> dict[str, Array]:
        prefix = "model.diffusion_model."
        given = {prefix + name: torch.from_numpy(each) for name, each in tensors.items()}
        found = convert_ldm_unet_checkpoint(given, model.config)
        return {name: value.numpy() for name, value in found.items()}

    assert_equal(converted(theirs), ours)
    prefix = "model.diffusion_model."
    single = write(tmp_path / "single.safetensors", {prefix + k: v for k, v in theirs.items()})
    folder = write(tmp_path / "model.safetensors", ours)
    random = np.random.default_rng(8)
    for naming, weights in (("diffusers", ours), ("original", theirs)):
        tensors, expected = unet_factors(weights, "lora_unet_", random)
        adapter = write(tmp_path / f"{naming}.safetensors", tensors)
        if naming == "original":
            expected = converted(expected)
        merged = merge(single, adapter, tmp_path / f"single_{naming}")
        merged = {name.removeprefix(prefix): value for name, value in merged.items()}
        assert_equal(converted(merged), expected)
        assert_equal(merge(folder, adapter, tmp_path / f"folder_{naming}"), expected)


def test_a_merge_and_diffusers_converter_of_open_clip_may_change_places(tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the converter is diffusers'")
    import torch
    from diffusers.loaders.single_file_utils import convert_open_clip_checkpoint
    from transformers import CLIPTextConfig, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=11,
        hidden_size=6,
        intermediate_size=10,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=5,
        projection_dim=6,
    )
    model = CLIPTextModelWithProjection(config)
    state = {name: value.numpy().copy() for name, value in model.state_dict().items()}
    ours = {name: value for name, value in state.items() if not name.endswith("position_ids")}
    theirs: dict[str, Array] = {}
    random = np.random.default_rng(9)
    ours = {
        name: random.normal(size=value.shape).astype(np.float32) for name, value in ours.items()
    }
    renamed = {
        "self_attn.out_proj": "attn.out_proj",
        "layer_norm1": "ln_1",
        "layer_norm2": "ln_2",
        "mlp.fc1": "mlp.c_fc",
        "mlp.fc2": "mlp.c_proj",
    }
    for name, value in ours.items():
        layer, _, rest = name.removeprefix("text_model.encoder.layers.").partition(".")
        module, _, leaf = rest.rpartition(".")
        if "encoder.layers" in name and module in renamed:
            theirs[f"transformer.resblocks.{layer}.{renamed[module]}.{leaf}"] = value
    for layer in ("0", "1"):
        for leaf in ("weight", "bias"):
            start = f"text_model.encoder.layers.{layer}.self_attn"
            parts = [ours[f"{start}.{each}_proj.{leaf}"] for each in "qkv"]
            theirs[f"transformer.resblocks.{layer}.attn.in_proj_{leaf}"] = np.concatenate(parts)
    theirs |= {
        "token_embedding.weight": ours["text_model.embeddings.token_embedding.weight"],
        "positional_embedding": ours["text_model.embeddings.position_embedding.weight"],
        "ln_final.weight": ours["text_model.final_layer_norm.weight"],
        "ln_final.bias": ours["text_model.final_layer_norm.bias"],
        "text_projection": ours["text_projection.weight"].T,
    }
    prefix = "conditioner.embedders.1.model."

    def converted(tensors: dict[str, Array]) -> dict[str, Array]:
        given = {k: torch.from_numpy(np.ascontiguousarray(v)) for k, v in tensors.items()}
        found = convert_open_clip_checkpoint(model, given, prefix=prefix)
        return {name: value.numpy() for name, value in found.items()}

    single = {prefix + name: value for name, value in theirs.items()}
    assert_equal(converted(single), ours)
    # What makes the file a model of images.
    denoiser = "model.diffusion_model.input_blocks.0.0.weight"
    single |= {denoiser: np.zeros((4, 4, 3, 3), np.float32)}
    layers = {name: value for name, value in ours.items() if "proj" in name or ".mlp." in name}
    tensors, changed = factors(layers, random)
    tensors = {name.replace("lora_unet_", "lora_te2_"): each for name, each in tensors.items()}
    adapter = write(tmp_path / "a.safetensors", tensors)
    merged = merge(write(tmp_path / "s.safetensors", single), adapter, tmp_path / "out")
    assert_equal(converted(merged), ours | changed)
