"""Small adapters with known updates, and updates read back in float64, for the algebra's tests."""

from __future__ import annotations

import json
from collections.abc import Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from support.reference import PREFIX

Array = npt.NDArray[Any]
Factors = tuple[Array, Array]

#: The toys of four and six rows: B, A and s of each.
TOYS: dict[str, tuple[list[list[int]], list[list[int]], float]] = {
    "X": ([[1, 2], [0, 1], [2, 0], [1, -1]], [[1, 0, 2], [0, 1, 1]], 2.0),
    "Y": ([[1, 0], [1, 1], [0, 2], [-1, 1]], [[2, 1, 0], [1, -1, 1]], 1.0),
    "Z": ([[1], [2], [0], [1]], [[1, 1, -1]], 3.0),
    "P": ([[-3, 2], [-2, -4], [-3, 1], [4, 4]], [[4, 3, -1], [-1, 4, 3]], 1.0),
    "Q": ([[-4, 2], [4, 2], [1, -4], [3, 2]], [[3, -3, -3], [4, -1, -3]], 1.0),
    "S": (
        [[1, 0], [2, 1], [0, -1], [1, 1], [-2, 0], [0, 3]],
        [[2, 1, 0, -1, 0], [0, 1, 1, 2, -1]],
        1.0,
    ),
    "T": (
        [[0, 1], [1, -1], [3, 0], [0, 2], [1, 1], [-1, 0]],
        [[1, 0, -2, 1, 1], [1, 2, 0, 0, -1]],
        1.0,
    ),
}
#: The module that a toy changes.
MODULE = "model.layers.0.self_attn.q_proj"


def exact(name: str) -> list[list[Fraction]]:
    """ΔW of a toy in exact fractions."""
    b, a, scale = TOYS[name]
    return [
        [
            Fraction(scale) * sum(Fraction(x) * row[column] for x, row in zip(line, a, strict=True))
            for column in range(len(a[0]))
        ]
        for line in b
    ]


def write_toy(directory: Path, name: str) -> Path:
    """A toy as an adapter of one module."""
    b, a, scale = TOYS[name]
    factors = {MODULE: (np.array(b, np.float32), np.array(a, np.float32))}
    return write_lora(directory / name, factors, alpha=scale * len(a))


def write_lora(
    directory: Path,
    modules: Mapping[str, Factors],
    *,
    alpha: float,
    **settings: Any,
) -> Path:
    """An adapter as PEFT saves it, of factors B (out, r) and A (r, in) by module.

    Ranks that differ from the most frequent one, and the alphas that belong to them, stand in the
    patterns with `alpha` as the alpha of every module.
    """
    directory.mkdir(parents=True, exist_ok=True)
    tensors = {}
    ranks = [len(a) for _, a in modules.values()]
    rank = max(set(ranks), key=ranks.count)
    pattern = {}
    for name, (b, a) in modules.items():
        tensors[f"{PREFIX}{name}.lora_A.weight"] = np.ascontiguousarray(a)
        tensors[f"{PREFIX}{name}.lora_B.weight"] = np.ascontiguousarray(b)
        if len(a) != rank:
            pattern[name] = len(a)
    save_file(tensors, directory / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": alpha,
        "target_modules": list(modules),
        "rank_pattern": pattern,
        **settings,
    }
    (directory / "adapter_config.json").write_text(json.dumps(config))
    return directory


def updates_of(adapter: Path) -> dict[str, Array]:
    """ΔW of every module of a PEFT adapter, in float64, by PEFT's own formula."""
    config = json.loads((adapter / "adapter_config.json").read_text())
    tensors = load_file(adapter / "adapter_model.safetensors")
    updates = {}
    for name, a in tensors.items():
        if not name.endswith(".lora_A.weight"):
            continue
        module = name.removeprefix(PREFIX).removesuffix(".lora_A.weight")
        rank = len(a)
        alpha = config["lora_alpha"]
        for pattern, value in config.get("alpha_pattern", {}).items():
            if pattern.strip("^$").replace("\\", "") == module:
                alpha = value
        b = tensors[name.replace("lora_A", "lora_B")].astype(np.float64)
        scale = alpha / (np.sqrt(rank) if config.get("use_rslora") else rank)
        updates[module] = scale * (b.reshape(len(b), -1) @ a.reshape(rank, -1).astype(np.float64))
    return updates


def distance(found: Mapping[str, Array], wanted: Mapping[str, Array]) -> float:
    """‖wanted - found‖/‖wanted‖ over all modules; what is not there is zero."""
    assert found.keys() <= wanted.keys()
    error = sum(np.sum((update - found.get(name, 0.0)) ** 2) for name, update in wanted.items())
    norm = sum(np.sum(update**2) for update in wanted.values())
    return float(np.sqrt(error / norm))


def random_modules(
    seed: int,
    shapes: Mapping[str, tuple[int, int]],
    rank: int | Mapping[str, int],
    dtype: npt.DTypeLike = np.float32,
    decay: float = 1.0,
) -> dict[str, Factors]:
    """Random factors; with a decay below one, singular values fall by it."""
    random = np.random.default_rng(seed)
    modules = {}
    for name, (out, inputs) in shapes.items():
        r = rank if isinstance(rank, int) else rank[name]
        b = random.standard_normal((out, r)) * decay ** np.arange(r)
        a = random.standard_normal((r, inputs))
        modules[name] = (b.astype(dtype), a.astype(dtype))
    return modules
