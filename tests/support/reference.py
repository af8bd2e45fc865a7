"""The merge in float64 with dense updates: plain NumPy, straight from the files.

For each weight W and adapters i with coefficient w_i:

    W + sum_i w_i (W_i - W)

where W_i is what adapter i alone makes of W. With the scale s (alpha / r, or alpha / sqrt(r) for
rsLoRA) and the factors A (r, in) and B (out, r):

    Linear               V = W + s B A
    Conv1D, embedding    V = W + s (B A)^T            stored (in, out); (tokens, width)
    convolution          V = W + s B A                A (r, in, kernel...) and W seen as matrices
    lora_bias            b + s b_B
    DoRA                 V m / |V|                    a norm for each output
    saved parameters     stand in for W before anything else
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
    embedding: bool = False
    magnitude: NDArray[np.float64] | None = None
    bias: NDArray[np.float64] | None = None

    def apply(self, start: Merged, *, transposed: bool) -> Merged:
        """The module's weight; `transposed` where it is stored (in, out)."""
        matrix_b = self.b.reshape(len(self.b), -1)
        matrix_a = self.a.reshape(len(self.a), -1)
        delta = self.scale * (matrix_b @ matrix_a)
        size = abs(self.scale) * (np.abs(matrix_b) @ np.abs(matrix_a))
        shape = start.value.shape
        if transposed or self.embedding:
            delta, size = delta.T, size.T
        value = start.value + delta.reshape(shape)
        magnitude = start.magnitude + size.reshape(shape)
        if self.magnitude is None:
            return Merged(value, magnitude)
        outputs = len(shape) - 1 if transposed or self.embedding else 0
        others = tuple(axis for axis in range(len(shape)) if axis != outputs)
        gain = self.magnitude.reshape([-1 if axis == outputs else 1 for axis in range(len(shape))])
        gain = gain / np.sqrt(np.square(value).sum(axis=others, keepdims=True))
        return Merged(value * gain, magnitude * np.abs(gain))


def lookup(patterns: Mapping[str, float], module: str, default: float) -> float:
    """PEFT's rule: the first key, in the order of the file, that ends the module's path."""
    for pattern, value in patterns.items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default


FACTORS = {".lora_A.weight": ".lora_B.weight", ".lora_embedding_A": ".lora_embedding_B"}


def read_updates(adapter: Path) -> dict[str, Update]:
    """The updates of an adapter directory by module path."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    updates: dict[str, Update] = {}
    for name, value in tensors.items():
        ending = next((ending for ending in FACTORS if name.endswith(ending)), None)
        if ending is None:
            continue
        stem = name.removesuffix(ending)
        module = stem.removeprefix(PREFIX)
        rank = lookup(config.get("rank_pattern") or {}, module, config["r"])
        alpha = lookup(config.get("alpha_pattern") or {}, module, config["lora_alpha"])
        assert value.shape[0] == rank, f"{name}: {value.shape} but rank {rank}"
        optional = {
            "magnitude": tensors.get(f"{stem}.lora_magnitude_vector"),
            "bias": tensors.get(f"{stem}.lora_B.bias"),
        }
        updates[module] = Update(
            value.float64(),
            tensors[stem + FACTORS[ending]].float64(),
            alpha / math.sqrt(rank) if config.get("use_rslora") else alpha / rank,
            embedding=ending == ".lora_embedding_A",
            **{kind: part.float64().ravel() for kind, part in optional.items() if part},
        )
    return updates


def read_saved(adapter: Path) -> dict[str, NDArray[np.float64]]:
    """The parameters that an adapter saved whole, by their names in the model."""
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    # PEFT's wrappers are no part of the model's own names.
    wrappers = re.compile(r"\.(base_layer|modules_to_save)\.")
    return {
        wrappers.sub(".", name.removeprefix(PREFIX)): value.float64()
        for name, value in tensors.items()
        if ".lora_" not in name and ".original_module." not in name
    }


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
    """The tensors that the adapters change or add, by their names in the base.

    Args:
        base: the base's tensors.
        adapters: directories in PEFT's format. Parameters that they saved are known under
            sequential alone, where the last adapter's counts.
        strategy: sequential, weighted or average.
        weights: one a adapter, for weighted.
        transposed: says of a module's path whether its weight is stored (in, out).
    """
    starts: dict[str, Merged] = {}
    merged: dict[str, Merged] = {}

    def start(name: str) -> Merged:
        if name not in starts:
            value = base[name].float64()
            starts[name] = merged[name] = Merged(value, np.abs(value))
        return starts[name]

    def add(name: str, weight: float, alone: Merged) -> None:
        first = start(name)
        before = merged[name]
        # W + s B A - W leaves the size of s B A; W_i of DoRA and W are terms of their own.
        added = alone.magnitude - first.magnitude
        size = added if (added >= 0).all() else alone.magnitude + first.magnitude
        merged[name] = Merged(
            before.value + weight * (alone.value - first.value),
            before.magnitude + abs(weight) * size,
        )

    for adapter, weight in zip(
        adapters, coefficients(strategy, weights, len(adapters)), strict=True
    ):
        for name, value in read_saved(adapter).items():
            assert strategy == "sequential"
            starts[name] = merged[name] = Merged(value, np.abs(value))
        for module, update in read_updates(adapter).items():
            name = f"{module}.weight"
            add(name, weight, update.apply(start(name), transposed=transposed(module)))
            if update.bias is not None:
                name = f"{module}.bias"
                addend = update.scale * update.bias
                first = start(name)
                sum_ = Merged(first.value + addend, first.magnitude + np.abs(addend))
                add(name, weight, sum_)
    return merged
