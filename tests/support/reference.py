"""The merge in float64 with dense updates: plain NumPy, straight from the files.

For each Linear or Conv1D weight W and adapters i with coefficient w_i, scale s_i (alpha / r, or
alpha / sqrt(r) for rsLoRA), factors A_i (r, in) and B_i (out, r):

    W + sum_i w_i s_i B_i A_i      (transposed update where the weight is stored (in, out))
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from support.files import Tensor, read_safetensors

PREFIX = "base_model.model."


@dataclass(frozen=True)
class Merged:
    """One merged weight in float64, and the sum of the absolute values of all its terms.

    No float32 sum can be nearer to `value` than some units of float32 rounding of `magnitude`,
    however small `value` comes out where the terms cancel.
    """

    value: NDArray[np.float64]
    magnitude: NDArray[np.float64]


@dataclass(frozen=True)
class Update:
    """What one adapter does to one module."""

    a: NDArray[np.float64]
    b: NDArray[np.float64]
    scale: float


def lookup(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key, in the order of the file, that ends the module's path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


def read_updates(adapter: Path) -> dict[str, Update]:
    """The updates of an adapter directory by module path."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    updates: dict[str, Update] = {}
    for name, value in tensors.items():
        if not name.endswith(".lora_A.weight"):
            assert name.endswith(".lora_B.weight"), name
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = lookup(config.get("rank_pattern") or {}, module, config["r"])
        alpha = lookup(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        assert value.shape[0] == rank, f"{name}: {value.shape} but rank {rank}"
        scale = alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank
        other = tensors[name.replace(".lora_A.", ".lora_B.")]
        updates[module] = Update(value.float64(), other.float64(), scale)
    return updates


def coefficients(strategy: str, weights: Sequence[float] | None, count: int) -> list[float]:
    if strategy == "sequential":
        return [1.0] * count
    if strategy == "average":
        return [1.0 / count] * count
    assert strategy == "weighted", strategy
    return [1.0] * count if weights is None else list(weights)


def merge_float64(
    base: Mapping[str, Tensor],
    adapters: Sequence[Path],
    strategy: str = "sequential",
    weights: Sequence[float] | None = None,
    *,
    transposed: Callable[[str], bool] = lambda module: False,
) -> dict[str, Merged]:
    """The weights that the adapters change, by their names in the base.

    Args:
        base: the base's tensors.
        adapters: directories in PEFT's format.
        strategy: sequential, weighted or average.
        weights: one a adapter, for weighted.
        transposed: says of a module's path whether its weight is stored (in, out).
    """
    merged: dict[str, Merged] = {}
    for adapter, weight in zip(
        adapters, coefficients(strategy, weights, len(adapters)), strict=True
    ):
        for module, update in read_updates(adapter).items():
            name = f"{module}.weight"
            if name not in merged:
                value = base[name].float64()
                merged[name] = Merged(value, np.abs(value))
            factor = weight * update.scale
            delta = factor * (update.b @ update.a)
            size = abs(factor) * (np.abs(update.b) @ np.abs(update.a))
            if transposed(module):
                delta, size = delta.T, size.T
            before = merged[name]
            merged[name] = Merged(before.value + delta, before.magnitude + size)
    return merged
