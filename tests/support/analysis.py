"""Adapters with chosen factors, and what NumPy and SciPy say of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.files import Tensor, tensor, write_safetensors
from support.handmade import adapter_config
from support.reference import PREFIX

Array = NDArray[np.float64]
Factors = Mapping[str, tuple[Array, Array]]


def write_factors(
    path: Path,
    factors: Factors,
    *,
    dtype: str = "F64",
    alpha: float | None = None,
    others: Mapping[str, Tensor] | None = None,
    **settings: Any,
) -> Path:
    """An adapter of these (B, A), each module with a rank of its own; a scale of 1 by default."""
    path.mkdir(parents=True)
    tensors: dict[str, Tensor] = {}
    ranks, alphas = {}, {}
    for module, (b, a) in factors.items():
        tensors[f"{PREFIX}{module}.lora_A.weight"] = tensor(a, dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = tensor(b, dtype)
        # Keys of patterns are regular expressions.
        ranks[re.escape(module)] = a.shape[0]
        alphas[re.escape(module)] = a.shape[0] if alpha is None else alpha
    patterns: dict[str, Any] = {"r": 1, "lora_alpha": 1.0}
    patterns |= {"rank_pattern": ranks, "alpha_pattern": alphas}
    if len(set(ranks.values())) == 1:
        # Thousands of patterns would each be tried on thousands of modules.
        patterns = {"r": ranks.popitem()[1], "lora_alpha": alphas.popitem()[1]}
    config = adapter_config(**(patterns | settings))
    (path / "adapter_config.json").write_text(json.dumps(config))
    write_safetensors(path / "adapter_model.safetensors", tensors | dict(others or {}))
    return path


def random_factors(
    shapes: Mapping[str, tuple[int, int, int]], seed: int = 0
) -> dict[str, tuple[Array, Array]]:
    """Normal (B, A) for modules of shape (out, in, rank)."""
    random = np.random.default_rng(seed)
    return {
        module: (random.normal(size=(out, rank)), random.normal(size=(rank, inner)))
        for module, (out, inner, rank) in shapes.items()
    }


def graded_factors(rows: int, columns: int, sigma: Array, seed: int = 0) -> tuple[Array, Array]:
    """(B, A) whose product has these singular values, half of each in either factor."""
    random = np.random.default_rng(seed)
    left = np.linalg.qr(random.normal(size=(rows, len(sigma))))[0]
    right = np.linalg.qr(random.normal(size=(columns, len(sigma))))[0]
    return left * np.sqrt(sigma), (right * np.sqrt(sigma)).T


def numpy_statistics(values: Array, bins: int) -> dict[str, Any]:
    """The statistics of finite float64 values, by NumPy."""
    mean = values.mean()
    central = values - mean
    second = np.mean(central**2)
    logarithms = np.log10(np.abs(values) + 1e-8)
    return {
        "count": values.size,
        "mean": mean,
        "std": values.std(),
        "min": values.min(),
        "max": values.max(),
        "l1_norm": np.abs(values).sum(),
        "l2_norm": np.linalg.norm(values.ravel()),
        "max_norm": np.abs(values).max(),
        "zeros": int(np.count_nonzero(values == 0)),
        "skewness": np.mean(central**3) / second**1.5 if second else np.nan,
        "kurtosis": np.mean(central**4) / second**2 - 3 if second else np.nan,
        "histogram": np.histogram(values, bins),
        "log_histogram": np.histogram(logarithms, bins),
    }


def spectrum_figures(sigma: Array) -> dict[str, float]:
    """Every figure of a spectrum as `metrics` define them, from σ."""
    energy = np.sum(sigma**2)

    def perplexity(weights: Array) -> float:
        share = weights / weights.sum()
        share = share[share > 0]
        return float(np.exp(-np.sum(share * np.log(share))))

    cumulative = np.cumsum(sigma**2) / energy

    def leading(share: float) -> int:
        return int(np.searchsorted(cumulative, share * (1 - 1e-9)) + 1)

    return {
        "frobenius_norm": float(np.sqrt(energy)),
        "spectral_norm": float(sigma[0]),
        "stable_rank": float(energy / sigma[0] ** 2),
        "effective_rank": perplexity(sigma),
        "energy_effective_rank": perplexity(sigma**2),
        "participation_ratio": float(energy**2 / np.sum(sigma**4)),
        "condition": float(sigma[0] / sigma[-1]),
        "k90": leading(0.90),
        "k95": leading(0.95),
        "k99": leading(0.99),
    }
