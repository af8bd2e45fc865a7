"""Adapters of random factors for models of diffusers', and what its loaders make of the models."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from support.image_formats import Tensors

#: Down and up of modules, by the modules' names.
Factors = dict[str, tuple[Any, Any]]


def numpy(model: Any) -> Tensors:
    return {name: value.detach().numpy().copy() for name, value in model.state_dict().items()}


def factors_of(weights: Mapping[str, Any], wanted: Callable[[str], bool], rank: int = 2) -> Factors:
    """Down and up of the wanted modules, by the modules' names."""
    random = np.random.default_rng(11)
    found = {}
    for name, weight in weights.items():
        module = name.removesuffix(".weight")
        if not name.endswith(".weight") or weight.ndim < 2 or not wanted(module):
            continue
        outputs, *inputs = weight.shape
        down = random.normal(scale=0.3, size=(rank, *inputs)).astype(np.float32)
        up = random.normal(scale=0.3, size=(outputs, rank, *(1 for _ in inputs[1:])))
        found[module] = (down, up.astype(np.float32))
    assert found
    return found


def written(
    factors: Factors,
    key: Callable[[str], str],
    down: str,
    up: str,
    alphas: Mapping[str, float] | None = None,
) -> Tensors:
    tensors = {}
    for module, (a, b) in factors.items():
        tensors[key(module) + down] = a
        tensors[key(module) + up] = b
        if alphas is not None:
            tensors[f"{key(module)}.alpha"] = np.array(alphas[module], np.float32)
    return tensors


def fused(model: Any, load: Callable[[Any], None]) -> Tensors:
    """The model's weights after diffusers has loaded an adapter into it and fused it."""
    before = numpy(model)
    load(model)
    model.fuse_lora()
    model.unload_lora()
    after = numpy(model)
    assert before.keys() == after.keys()
    return after


def assert_same_weights(found: Tensors, expected: Tensors, before: Tensors, count: int) -> None:
    """The same weights, of which this many changed."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=4e-6, err_msg=name)
    changed = [name for name in before if not np.array_equal(before[name], expected[name])]
    assert len(changed) == count


def saved(model: Any, path: Path) -> Path:
    model.save_pretrained(path)
    return path
