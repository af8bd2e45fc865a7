"""Methods that make one update of several, on dense matrices in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.analysis import Array, write_factors
from support.reference import read_updates

#: One module of toy adapters, (B, A), without equal magnitudes.
TOYS: dict[str, tuple[list[list[int]], list[list[int]]]] = {
    "P": ([[-3, 2], [-2, -4], [-3, 1], [4, 4]], [[4, 3, -1], [-1, 4, 3]]),
    "Q": ([[-4, 2], [4, 2], [1, -4], [3, 2]], [[3, -3, -3], [4, -1, -3]]),
    "S": (
        [[1, 0], [2, 1], [0, -1], [1, 1], [-2, 0], [0, 3]],
        [[2, 1, 0, -1, 0], [0, 1, 1, 2, -1]],
    ),
    "T": (
        [[0, 1], [1, -1], [3, 0], [0, 2], [1, 1], [-1, 0]],
        [[1, 0, -2, 1, 1], [1, 2, 0, 0, -1]],
    ),
    "X": ([[1, 2], [0, 1], [2, 0], [1, -1]], [[1, 0, 2], [0, 1, 1]]),
    "Y": ([[1, 0], [1, 1], [0, 2], [-1, 1]], [[2, 1, 0], [1, -1, 1]]),
}
SCALES = {"X": 2.0}
MODULE = "model.layers.0.self_attn.q_proj"
MASK = (1 << 64) - 1
GAMMA = 0x9E3779B97F4A7C15


def toys(directory: Path, names: str, **settings: Any) -> list[Path]:
    """Adapters of one module, a toy each."""
    paths = []
    for name in names:
        b, a = (np.array(side, dtype=float) for side in TOYS[name])
        alpha = 2 * SCALES.get(name, 1.0)
        path = directory / f"{name}{len(paths)}"
        paths.append(write_factors(path, {MODULE: (b, a)}, alpha=alpha, **settings))
    return paths


def toy(name: str) -> Array:
    b, a = (np.array(side, dtype=float) for side in TOYS[name])
    return SCALES.get(name, 1.0) * b @ a


def written(path: Path) -> dict[str, Array]:
    """ΔW of each module of a written adapter."""
    return {
        name.removesuffix(".weight"): update.delta() for name, update in read_updates(path).items()
    }


def truncated(matrix: Array, rank: int) -> Array:
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


def rank_of(values: Array, shape: tuple[int, ...]) -> int:
    return int((values > max(shape) * np.finfo(float).eps * values[0]).sum())


def fixed_signs(u: Array) -> Array:
    """Columns whose entry of largest size is positive."""
    largest = np.argmax(np.abs(u) > np.abs(u).max(axis=0) * (1 - 1e-9), axis=0)
    return u * np.sign(u[largest, np.arange(u.shape[1])])


Merge = Callable[[Sequence[Array]], Array]


def knots(deltas: Sequence[Array], merge: Merge) -> Array:
    stacked = np.concatenate(deltas, axis=1)
    u, s, _ = np.linalg.svd(stacked, full_matrices=False)
    u = fixed_signs(u[:, : rank_of(s, stacked.shape)])
    return u @ merge([u.T @ delta for delta in deltas])


def core_space(factors: Sequence[tuple[Array, Array]], merge: Merge) -> Array:
    def basis(stacked: Array) -> Array:
        u, s, _ = np.linalg.svd(stacked, full_matrices=False)
        return fixed_signs(u[:, : rank_of(s, stacked.shape)])

    left = basis(np.concatenate([b for b, _ in factors], axis=1))
    right = basis(np.concatenate([a for _, a in factors]).T)
    return left @ merge([left.T @ b @ a @ right for b, a in factors]) @ right.T


def polar(matrix: Array) -> Array:
    u, _, vh = np.linalg.svd(matrix, full_matrices=False)
    return u @ vh


def tsv_m(deltas: Sequence[Array], weights: Sequence[float], k: int | None = None) -> Array:
    left, values, right = [], [], []
    for delta, weight in zip(deltas, weights, strict=True):
        u, s, vh = np.linalg.svd(delta, full_matrices=False)
        rank = min(rank_of(s, delta.shape), k or len(s))
        left.append(u[:, :rank])
        values.append(weight * s[:rank])
        right.append(vh[:rank].T)
    u, v = (polar(np.concatenate(side, axis=1)) for side in (left, right))
    return (u * np.concatenate(values)) @ v.T


def iso_c(total: Array) -> Array:
    u, s, vh = np.linalg.svd(total, full_matrices=False)
    rank = rank_of(s, total.shape)
    return float(s[:rank].mean()) * u[:, :rank] @ vh[:rank]


def largest(matrix: Array, count: int) -> Array:
    """The largest elements in size, of equal ones those of lower index; others zero."""
    narrow = np.abs(matrix.astype(np.float32)).ravel()
    kept = np.zeros(matrix.size)
    kept[np.argsort(-narrow, kind="stable")[:count]] = 1
    return matrix * kept.reshape(matrix.shape)


def elected(kept: Sequence[Array], weights: Sequence[float], normalize: bool = True) -> Array:
    weighted = np.array([w * x for w, x in zip(weights, kept, strict=True)])
    sign = np.where(weighted.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(weighted) == sign
    total = (weighted * agrees).sum(axis=0)
    if not normalize:
        return total
    share = (np.abs(weights)[:, None, None] * agrees).sum(axis=0)
    return np.where(share > 0, total / np.where(share > 0, share, 1), 0)


def ties(
    deltas: Sequence[Array], weights: Sequence[float], density: float, normalize: bool = True
) -> Array:
    kept = [largest(delta, int(density * delta.size)) for delta in deltas]
    return elected(kept, weights, normalize)


def breadcrumbs(delta: Array, density: float, gamma: float) -> Array:
    k = int(density * delta.size)
    top = min(int(gamma * delta.size), delta.size - k)
    return largest(delta, top + k) - largest(delta, top)


def sce(deltas: Sequence[Array], share: float) -> Array:
    stacked = np.array(deltas)
    spread = stacked.std(axis=0)
    count = int(share * np.count_nonzero(spread)) if share < 1 else spread.size
    mask = largest(spread + 0, count) != 0 if share < 1 else np.ones(spread.shape, bool)
    kept = stacked * mask
    weights = (kept**2).sum(axis=(1, 2))
    weights = weights / weights.sum()
    sign = np.where(kept.sum(axis=0) >= 0, 1, -1)
    agrees = np.sign(kept) == sign
    total = (weights[:, None, None] * kept * agrees).sum(axis=0)
    below = (weights[:, None, None] * agrees).sum(axis=0)
    return np.where(below > 0, total / np.where(below > 0, below, 1), 0)


def mix(state: int) -> int:
    """What SplitMix64 makes of its state."""
    state = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 & MASK
    state = (state ^ (state >> 27)) * 0x94D049BB133111EB & MASK
    return state ^ (state >> 31)


def uniform(seed: int, module: str, ordinal: int, shape: tuple[int, ...]) -> Array:
    """The numbers of masks, of each element in row-major order."""
    name = 0xCBF29CE484222325
    for byte in f"{module}#{ordinal}".encode():
        name = (name ^ byte) * 0x100000001B3 & MASK
    key = mix((seed + GAMMA) & MASK) ^ name
    count = int(np.prod(shape))
    numbers = [mix((key + (i + 1) * GAMMA) & MASK) >> 11 for i in range(count)]
    return np.array(numbers, dtype=float).reshape(shape) * 2.0**-53


def dare(delta: Array, density: float, numbers: Array) -> Array:
    return np.where(numbers < density, delta / density, 0)


def della(delta: Array, density: float, epsilon: float, numbers: Array) -> Array:
    order = np.argsort(np.argsort(np.abs(delta), axis=1), axis=1)
    keep = density - epsilon + 2 * epsilon * order / (delta.shape[1] - 1)
    return np.where(numbers < keep, delta / keep, 0)
