"""The error of a conversion where only the base's weight makes the update: DoRA's W′ - W."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
import pytest
from support.files import read_safetensors, tensor, write_safetensors
from support.handmade import make_adapter
from support.reference import PREFIX

Array = npt.NDArray[np.float64]

#: Modules with the shapes of their weights: two linear layers and a convolution.
SHAPES = {
    "down_blocks.0.attentions.0.to_q": (24, 20),
    "down_blocks.0.attentions.0.to_k": (16, 24),
    "down_blocks.0.resnets.0.conv1": (12, 8, 3, 3),
}
RANK = 4


def changed(weight: Array, down: Array, up: Array, scale: float, magnitude: Array) -> Array:
    """W′ of DoRA: of the outputs where there is a magnitude for each, else of the inputs."""
    product = (up.reshape(len(up), -1) @ down.reshape(len(down), -1)).reshape(weight.shape)
    sum_ = weight + scale * product
    outputs = magnitude.size == len(weight) and magnitude.shape[0] == len(weight)
    axes = tuple(axis for axis in range(sum_.ndim) if axis != (0 if outputs else 1))
    norm = np.sqrt((sum_**2).sum(axis=axes, keepdims=True))
    shape = [1] * weight.ndim
    shape[0 if outputs else 1] = -1
    return magnitude.reshape(shape) / norm * sum_


def weights(seed: int) -> dict[str, Array]:
    random = np.random.default_rng(seed)
    shapes = SHAPES.items()
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in shapes}  # type: ignore[misc]


def kohya(path: Path, axis: int, alpha: float) -> dict[str, tuple[Array, Array, float, Array]]:
    """A file of kohya's with magnitudes along an axis; what it holds, in float64."""
    random = np.random.default_rng(4)
    tensors, parts = {}, {}
    for name, shape in SHAPES.items():
        ones = tuple(1 for _ in shape[2:])
        down = random.normal(size=(RANK, *shape[1:]))
        up = random.normal(size=(shape[0], RANK, *ones))
        extents = [1] * len(shape)
        extents[axis] = shape[axis]
        magnitude = 1 + random.random(extents)
        flat = "lora_unet_" + name.replace(".", "_")
        stored = [tensor(value.astype(np.float32)) for value in (down, up, magnitude)]
        tensors[f"{flat}.lora_down.weight"] = stored[0]
        tensors[f"{flat}.lora_up.weight"] = stored[1]
        tensors[f"{flat}.dora_scale"] = stored[2]
        tensors[f"{flat}.alpha"] = tensor(np.array(alpha, np.float32))
        wide = [value.float64() for value in stored]
        parts[name] = (wide[0], wide[1], alpha / RANK, wide[2])
    write_safetensors(path, tensors)
    return parts


def base_of(path: Path, dtype: str) -> dict[str, Array]:
    stored = {f"{name}.weight": tensor(value, dtype) for name, value in weights(1).items()}
    write_safetensors(path, stored)
    return {name.removesuffix(".weight"): value.float64() for name, value in stored.items()}


def read_kohya(path: Path) -> dict[str, tuple[Array, Array, float, Array]]:
    tensors = read_safetensors(path)
    parts = {}
    for name in SHAPES:
        flat = "lora_unet_" + name.replace(".", "_")
        down, up, magnitude, alpha = (
            tensors[f"{flat}.{part}"].float64()
            for part in ("lora_down.weight", "lora_up.weight", "dora_scale", "alpha")
        )
        parts[name] = (down, up, float(alpha) / RANK, magnitude)
    return parts


def worst(base: dict[str, Array], own: Any, back: Any) -> float:
    errors = []
    for name, weight in base.items():
        ours, theirs = changed(weight, *own[name]), changed(weight, *back[name])
        errors.append(np.linalg.norm(ours - theirs) / np.linalg.norm(ours - weight))
    return float(max(errors))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("stored", ["F32", "BF16"])
@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
def test_the_error_is_that_of_the_changed_weight(
    axis: int, stored: str, dtype: Any, tmp_path: Path
) -> None:
    base = base_of(tmp_path / "base.safetensors", stored)
    own = kohya(tmp_path / "x.safetensors", axis, 2.0)
    output = tmp_path / "out.safetensors"
    report = lorafast.convert(
        tmp_path / "x.safetensors",
        output,
        to="kohya",
        base=tmp_path / "base.safetensors",
        dtype=dtype,
    )
    expected = worst(base, own, read_kohya(output))
    assert expected > 1e-5
    assert report.max_error == pytest.approx(expected, rel=1e-6)
    assert not any("apart" in note for note in report.notes)


@pytest.mark.parametrize("axis", [0, 1], ids=["outputs", "inputs"])
def test_without_a_base_the_report_says_what_was_measured(axis: int, tmp_path: Path) -> None:
    own = kohya(tmp_path / "x.safetensors", axis, 2.0)
    output = tmp_path / "out.safetensors"
    report = lorafast.convert(tmp_path / "x.safetensors", output, to="kohya", dtype="bfloat16")
    back = read_kohya(output)
    errors = []
    for name, (down, up, _, magnitude) in own.items():
        other = back[name]
        product, read = (
            b.reshape(len(b), -1) @ a.reshape(RANK, -1)
            for a, b in ((down, up), (other[0], other[1]))
        )
        errors.append(np.linalg.norm(product - read) / np.linalg.norm(product))
        errors.append(np.linalg.norm(magnitude - other[3]) / np.linalg.norm(magnitude))
    assert report.max_error == pytest.approx(max(errors), rel=1e-6)
    (note,) = (note for note in report.notes if "apart" in note)
    assert "--base" in note
    # What is copied has no error, whatever it would be made of.
    copied = lorafast.convert(tmp_path / "x.safetensors", tmp_path / "same.safetensors", to="kohya")
    assert copied.max_error == 0.0
    assert not any("apart" in note for note in copied.notes)


def test_magnitudes_that_are_left_out_count_where_the_base_is_known(tmp_path: Path) -> None:
    shape = (24, 20)
    random = np.random.default_rng(2)
    base = tmp_path / "base"
    base.mkdir()
    weight = tensor(random.normal(size=shape).astype(np.float32))
    name = "model.layers.0.self_attn.q_proj"
    write_safetensors(base / "model.safetensors", {f"{name}.weight": weight})
    config = {"model_type": "llama", "num_attention_heads": 2, "num_key_value_heads": 2}
    (base / "config.json").write_text(json.dumps(config))
    down, up = random.normal(size=(RANK, 20)), random.normal(size=(24, RANK))
    parts = [tensor(part.astype(np.float32)) for part in (down, up, 1 + random.random(24))]
    endings = ("lora_A.weight", "lora_B.weight", "lora_magnitude_vector")
    tensors = {
        f"{PREFIX}{name}.{ending}": part for ending, part in zip(endings, parts, strict=True)
    }
    adapter = make_adapter(tmp_path / "dora", tensors, r=RANK, lora_alpha=RANK, use_dora=True)
    report = lorafast.convert(adapter, tmp_path / "x.gguf", to="gguf", base=base, lossy=True)
    wide = [part.float64() for part in parts]
    ours = changed(weight.float64(), wide[0], wide[1], 1.0, wide[2])
    theirs = weight.float64() + wide[1] @ wide[0]
    expected = np.linalg.norm(ours - theirs) / np.linalg.norm(ours - weight.float64())
    assert report.max_error == pytest.approx(expected, rel=1e-6)
    assert report.lost
