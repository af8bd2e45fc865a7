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
