"""Adapters to be compared, and the products of their dense updates."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support.analysis import Array, Factors, random_factors, write_factors
from support.files import read_safetensors
from support.reference import PREFIX

SHAPES = {"layers.0.q": (40, 30, 4), "layers.1.q": (26, 50, 3), "layers.1.up": (17, 9, 5)}


def dense_matrix(updates: list[dict[str, Array]]) -> Array:
    """⟨X, Y⟩ of dense updates; what only one has is zero in the other."""
    return np.array(
        [
            [sum(float(np.sum(x[p] * y[p])) for p in x.keys() & y.keys()) for y in updates]
            for x in updates
        ]
    )


def to_cosines(products: Array) -> Array:
    norms = np.sqrt(products.diagonal())
    return products / np.outer(norms, norms)


def fleet(folder: Path, count: int = 9) -> list[dict[str, Array]]:
    """Adapters of mixed ranks, alphas, dtypes and modules; returns the dense updates."""
    updates = []
    for seed in range(count):
        shapes = {p: (m, n, r + seed % 3) for p, (m, n, r) in SHAPES.items()}
        if seed % 4 == 1:
            del shapes["layers.0.q"]
        factors = random_factors(shapes, seed)
        if seed % 3 == 2:
            # Something in common with the first, so that not all are unrelated.
            common = random_factors(SHAPES, 0)
            for path, (b, a) in factors.items():
                b[:, 0], a[0] = 3 * common[path][0][:, 1], common[path][1][1]
        dtype = ["F64", "F32", "F16", "BF16"][seed % 4]
        alpha = 2.0 + seed
        path = write_factors(folder / f"a{seed}", factors, dtype=dtype, alpha=alpha)
        stored = read_factors(path)
        updates.append({p: alpha / a.shape[0] * (b @ a) for p, (b, a) in stored.items()})
    return updates


def read_factors(path: Path) -> Factors:
    tensors = read_safetensors(path / "adapter_model.safetensors")
    names = {name.removeprefix(PREFIX).rpartition(".lora_")[0] for name in tensors}
    return {
        name: (
            tensors[f"{PREFIX}{name}.lora_B.weight"].float64(),
            tensors[f"{PREFIX}{name}.lora_A.weight"].float64(),
        )
        for name in names
    }
