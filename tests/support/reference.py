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
    trained rows         stand in for those of W
    target_parameters    V_e = W_e + s B_e A_e        A_e rows e r..(e+1) r of A, B_e each E-th
                                                      column of B from e on; or (B_e A_e)^T
    BD-LoRA              A or B with its blocks on a diagonal
    KaSA                 V = W - U_k S_k V_k^T + s B diag(d) A    the r smallest components
    PiSSA                V = W - U_r S_r V_r^T + s B A            the r largest components
    OLoRA                V = W - s Q_r R_r + s B A                of a QR decomposition
    MultiheadAttention   in_proj_weight + s B A, out_proj.weight + 2 s B A
    MergedLinear         each enabled part of the outputs: V_p = W_p + s B_p A_p
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

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
    diagonal: NDArray[np.float64] | None = None
    rank: int = 0
    """As the config gives it."""
    initialisation: str = ""
    parameters: Mapping[str, tuple[int, float]] = field(default_factory=dict)
    """The names of which it can be, with the rank and the scale that it then has."""

    def resolved(self, module: str, base: Mapping[str, Tensor]) -> tuple[str, Update]:
        """The name of the tensor that it changes, and the update with that one's rank."""
        if f"{module}.in_proj_weight" in base:
            return f"{module}.in_proj_weight", self
        if not self.parameters:
            return f"{module}.weight", self
        extents = {len(self.b), self.a.shape[1]}
        (found,) = [
            (name, replace(self, rank=rank, scale=scale))
            for name, (rank, scale) in self.parameters.items()
            if name in base and set(base[name].shape[-2:]) == extents
        ]
        return found

    def delta(self) -> NDArray[np.float64]:
        middle = np.ones(len(self.a)) if self.diagonal is None else self.diagonal
        return (
            self.scale
            * (self.b.reshape(len(self.b), -1) * middle)
            @ self.a.reshape(len(self.a), -1)
        )

    def experts(self, start: Merged, *, transposed: bool) -> Merged:
        """Of factors that hold all experts: start is (experts, ...)."""
        count = len(start.value)
        value, magnitude = start.value.copy(), start.magnitude.copy()
        for e in range(count):
            one = Update(
                self.a[e * self.rank : (e + 1) * self.rank], self.b[:, e::count], self.scale
            )
            merged = one.apply(Merged(value[e], magnitude[e]), transposed=transposed)
            value[e], magnitude[e] = merged.value, merged.magnitude
        return Merged(value, magnitude)

    def removed(self, weight: NDArray[np.float64]) -> list[NDArray[np.float64]]:
        """Two factors of what the initialisation took out of the weight."""
        if self.initialisation == "olora":
            q, r = np.linalg.qr(weight)
            return [self.scale * q[:, : self.rank], r[: self.rank]]
        u, s, v = np.linalg.svd(weight, full_matrices=False)
        part = slice(-self.rank, None) if self.initialisation == "kasa" else slice(self.rank)
        return [u[:, part] * s[part], v[part]]

    def apply(self, start: Merged, *, transposed: bool) -> Merged:
        """The module's weight; `transposed` where it is stored (in, out)."""
        if start.value.ndim == 3 and self.a.ndim == 2:
            return self.experts(start, transposed=transposed)
        if self.initialisation:
            left, right = self.removed(start.value.T if transposed else start.value)
            gone, size = left @ right, np.abs(left) @ np.abs(right)
            if transposed:
                gone, size = gone.T, size.T
            rest = Merged(start.value - gone, start.magnitude + size)
            return replace(self, initialisation="").apply(rest, transposed=transposed)
        matrix_b = self.b.reshape(len(self.b), -1)
        matrix_a = self.a.reshape(len(self.a), -1)
        delta = self.delta()
        if self.diagonal is not None:
            matrix_b = matrix_b * self.diagonal
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


def rank_and_scale(config: Mapping[str, Any], path: str) -> tuple[int, float]:
    rank = int(lookup(config.get("rank_pattern") or {}, path, config["r"]))
    alpha = lookup(config.get("alpha_pattern") or {}, path, config["lora_alpha"])
    return rank, alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def block_diagonal(blocks: NDArray[np.float64], count: int) -> NDArray[np.float64]:
    rows, width = blocks.shape
    result = np.zeros((rows, width * count))
    for n in range(count):
        part = slice(n * rows // count, (n + 1) * rows // count)
        result[part, n * width : (n + 1) * width] = blocks[part]
    return result


def parts(
    a: NDArray[np.float64], b: NDArray[np.float64], enabled: Sequence[bool]
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """MergedLinear's factors as plain ones: what its convolution in groups adds, part by part."""
    groups, height = len(a) // b.shape[1], len(b) // sum(enabled)
    per_group = len(b) // groups
    whole = np.zeros((height * len(enabled), len(a)))
    rows = np.flatnonzero(np.repeat(enabled, height))
    for row, values in zip(rows, range(len(b)), strict=True):
        group = values // per_group
        whole[row, group * b.shape[1] : (group + 1) * b.shape[1]] = b[values, :, 0]
    return a, whole


def initialisation(config: Mapping[str, Any]) -> str:
    if config.get("kasa_config") is not None:
        return "kasa"
    kind = config.get("init_lora_weights")
    known = isinstance(kind, str) and kind.startswith(("pissa", "olora"))
    return str(kind)[:5] if known else ""


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
        path = module.replace(".base_layer", "")
        targets = [t.rpartition(".") for t in config.get("target_parameters") or []]
        names = [f"{path}.{p}" for m, _, p in targets if f".{path}".endswith(f".{m}")]
        parameters = {name: rank_and_scale(config, name) for name in names}
        rank, scale = rank_and_scale(config, path)
        enabled = config.get("enable_lora")
        count = value.shape[0] / rank
        assert count == (sum(enabled) if enabled else 1) or parameters, f"{name}: {value.shape}"
        a, b = value.float64(), tensors[stem + FACTORS[ending]].float64()
        blocks = config.get("use_bdlora") or {}
        if any(part in path for part in blocks.get("target_modules_bd_a") or []):
            a = block_diagonal(a, blocks["nblocks"])
        if any(part in path for part in blocks.get("target_modules_bd_b") or []):
            b = block_diagonal(b, blocks["nblocks"])
        if enabled:
            a, b = parts(a, b, enabled)
        embedding = ending == ".lora_embedding_A"
        # PEFT adds this one twice, in training too.
        scale *= 2 if module.endswith(".base_layer.out_proj") else 1
        optional = {
            "magnitude": tensors.get(f"{stem}.lora_magnitude_vector"),
            "bias": tensors.get(f"{stem}.lora_B.bias"),
            "diagonal": tensors.get(f"{stem}.lora_diag"),
        }
        updates[module] = Update(
            a,
            b,
            scale,
            embedding=embedding,
            rank=rank,
            initialisation="" if embedding else initialisation(config),
            parameters=parameters,
            **{kind: part.float64().ravel() for kind, part in optional.items() if part},
        )
    return updates


def read_saved(adapter: Path) -> dict[str, NDArray[np.float64]]:
    """The parameters that an adapter saved whole, by their names in the model."""
    tensors = read_safetensors(adapter / "adapter_model.safetensors")
    # PEFT's wrappers are no part of the model's own names.
    wrappers = re.compile(r"\.(base_layer|modules_to_save|token_adapter)(?=\.)")
    return {
        wrappers.sub("", name.removeprefix(PREFIX)): value.float64()
        for name, value in tensors.items()
        if not any(part in name for part in (".lora_", ".original_module.", "trainable_tokens"))
    }


def read_rows(adapter: Path) -> dict[str, tuple[list[int], NDArray[np.float64]]]:
    """The rows of embeddings that an adapter trained, and their values, by the weights' names."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    indices = config.get("trainable_token_indices")
    ending = ".token_adapter.trainable_tokens_delta"
    result = {}
    for name, value in read_safetensors(adapter / "adapter_model.safetensors").items():
        if name.endswith(ending):
            module = name.removeprefix(PREFIX).removesuffix(ending)
            if isinstance(indices, dict):
                (rows,) = [rows for key, rows in indices.items() if module.endswith(key)]
            else:
                rows = indices
            result[f"{module}.weight"] = (rows, value.float64())
    return result


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
        if strategy == "sequential":
            # Into what those before it left.
            starts = dict(merged)
        for name, value in read_saved(adapter).items():
            assert strategy == "sequential"
            starts[name] = merged[name] = Merged(value, np.abs(value))
        for name, (rows, values) in read_rows(adapter).items():
            first = start(name)
            alone, magnitude = first.value.copy(), first.magnitude.copy()
            alone[rows], magnitude[rows] = values, magnitude[rows] + np.abs(values)
            add(name, weight, Merged(alone, magnitude))
        for key, update in read_updates(adapter).items():
            module = key.replace(".base_layer", "")
            name, resolved = update.resolved(module, base)
            alone = resolved.apply(start(name), transposed=transposed(module))
            if resolved.initialisation and resolved.magnitude is None:
                # What was taken out when it began is the base's own, whatever was merged before.
                own = Merged(base[name].float64(), np.abs(base[name].float64()))
                done, first = resolved.apply(own, transposed=transposed(module)), start(name)
                alone = Merged(
                    first.value + done.value - own.value,
                    first.magnitude + done.magnitude - own.magnitude,
                )
            add(name, weight, alone)
            if update.bias is not None:
                name = f"{module}.bias"
                addend = update.scale * update.bias
                first = start(name)
                sum_ = Merged(first.value + addend, first.magnitude + np.abs(addend))
                add(name, weight, sum_)
    return merged
