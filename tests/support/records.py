"""Analyses and comparisons made by hand from small random factors, for plots and reports."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lorafast._analysis.records import (
    Finding,
    Histogram,
    ModuleAnalysis,
    ModuleComparison,
    TensorStatistics,
)
from lorafast._analysis.results import AdapterAnalysis, Comparison, places_of

#: The seven projections of a block of a Llama.
LLAMA = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
PERCENTILES = (1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0)


def histogram(values: np.ndarray, bins: int = 50) -> Histogram:
    """As numpy draws it; without a bin where there are no values."""
    if not values.size:
        return Histogram([], [])
    counts, edges = np.histogram(values, bins)
    return Histogram(edges.tolist(), counts.tolist())


def statistics(values: np.ndarray, *, whole: bool = False) -> TensorStatistics:
    """The statistics of an array."""
    kept = values[np.isfinite(values)].astype(float)
    mean, std = (kept.mean(), kept.std()) if kept.size else (math.nan, math.nan)
    central = kept - mean
    return TensorStatistics(
        shape=None if whole else values.shape,
        dtype=None if whole else "F32",
        count=values.size,
        non_finite=values.size - kept.size,
        mean=float(mean),
        std=float(std),
        min=float(kept.min()) if kept.size else math.nan,
        max=float(kept.max()) if kept.size else math.nan,
        l1_norm=float(np.abs(kept).sum()),
        l2_norm=float(np.sqrt((kept**2).sum())),
        max_norm=float(np.abs(kept).max()) if kept.size else math.nan,
        zeros=int((kept == 0).sum()),
        zero_share=float((kept == 0).mean()) if kept.size else math.nan,
        skewness=float((central**3).mean() / std**3) if std > 0 else math.nan,
        kurtosis=float((central**4).mean() / std**4 - 3) if std > 0 else math.nan,
        percentiles={
            p: float(np.percentile(kept, p)) if kept.size else math.nan for p in PERCENTILES
        },
        histogram=histogram(kept),
        log_histogram=histogram(np.log10(np.abs(kept) + 1e-8)),
    )


def _entropy_rank(weights: np.ndarray) -> float:
    share = weights / weights.sum()
    share = share[share > 0]
    return float(np.exp(-(share * np.log(share)).sum()))


def module(
    path: str, a: np.ndarray, b: np.ndarray, *, block: int | None, layer: str, scaling: float = 2.0
) -> ModuleAnalysis:
    """The analysis of s·B·A."""
    rank = a.shape[0]
    with np.errstate(invalid="ignore"):
        update = scaling * b.astype(float) @ a.astype(float)
    broken = not np.isfinite(update).all()
    sigma = np.full(rank, math.nan) if broken else np.linalg.svd(update, compute_uv=False)[:rank]
    energy = sigma**2
    alive = not broken and bool(sigma[0] > 0)
    # NaN of a broken update, zero of a zero one.
    dead = math.nan if broken else 0.0
    shares = np.cumsum(energy) / energy.sum() if alive else np.zeros(rank)
    k90, k95, k99 = (
        int(np.searchsorted(shares, share - 1e-12) + 1) if alive else 0
        for share in (0.9, 0.95, 0.99)
    )
    with np.errstate(divide="ignore"):
        condition = float(sigma[0] / sigma[-1]) if alive else math.nan if broken else math.inf
    return ModuleAnalysis(
        path=path,
        kind="linear",
        block=block,
        layer=layer,
        shape=(b.shape[0], a.shape[1]),
        rank=rank,
        alpha=scaling * rank,
        scaling=scaling,
        a_name=f"base_model.model.{path}.lora_A.weight",
        b_name=f"base_model.model.{path}.lora_B.weight",
        frobenius_norm=float(np.sqrt(energy.sum())),
        spectral_norm=float(sigma[0]),
        singular_values=sigma.tolist(),
        stable_rank=float(energy.sum() / energy[0]) if alive else dead,
        effective_rank=_entropy_rank(sigma) if alive else dead,
        energy_effective_rank=_entropy_rank(energy) if alive else dead,
        participation_ratio=float(energy.sum() ** 2 / (energy**2).sum()) if alive else dead,
        k90=k90,
        k95=k95,
        k99=k99,
        numerical_rank=int((sigma > 1e-10 * sigma[0]).sum()) if alive else 0,
        condition=condition,
        entry_mean=float(update.mean()),
    )


def places(blocks: int, layers: Sequence[str] = LLAMA) -> dict[str, tuple[int | None, str]]:
    """Module path to block and place within it."""
    return {
        f"model.layers.{block}.{layer}": (block, layer)
        for block in range(blocks)
        for layer in layers
    }


def analysis(
    where: Mapping[str, tuple[int | None, str]] | None = None,
    *,
    name: str = "adapter",
    rank: int = 8,
    size: int = 24,
    seed: int = 0,
    gain: float = 1.0,
    fill: Mapping[str, float] | float | None = None,
    findings: Sequence[Finding] = (),
    config: Mapping[str, Any] | None = None,
) -> AdapterAnalysis:
    """An adapter of random factors whose spectra fall off.

    Args:
        where: module path to block and place, as `places` makes it.
        name: the adapter's name.
        rank: of each module.
        size: rows and columns of each update.
        seed: of the factors.
        gain: a factor of every B.
        fill: a constant in the place of B: of every module, or of those named.
        findings: as they stand in the analysis.
        config: beside rank and alpha.
    """
    random = np.random.default_rng(seed)
    where = places(2) if where is None else where
    tensors: dict[str, TensorStatistics] = {}
    modules: dict[str, ModuleAnalysis] = {}
    every = []
    for i, (path, (block, layer)) in enumerate(where.items()):
        a = random.uniform(-0.1, 0.1, (rank, size)).astype(np.float32)
        fall = 0.8 ** np.arange(rank) * (0.02 + 0.05 * i / len(where)) * gain
        b = (random.normal(size=(size, rank)) * fall).astype(np.float32)
        constant = fill.get(path) if isinstance(fill, Mapping) else fill
        if constant is not None:
            b[:] = constant
        record = module(path, a, b, block=block, layer=layer)
        modules[path] = record
        for tensor_name, values in ((record.a_name, a), (record.b_name, b)):
            tensors[tensor_name] = statistics(values)
            every.append(values.ravel())
    whole = np.concatenate(every) if every else np.zeros(0, np.float32)
    norms = [record.frobenius_norm for record in modules.values()]
    return AdapterAnalysis(
        name=name,
        path=f"/adapters/{name}",
        config={"r": rank, "lora_alpha": 2 * rank, "peft_type": "LORA", **(config or {})},
        summary={
            "modules": len(modules),
            "tensors": len(tensors),
            "total_parameters": int(whole.size),
            "total_bytes": int(whole.nbytes),
            "ranks": {str(rank): len(modules)},
            "alphas": {str(2.0 * rank): len(modules)},
            "scalings": {"2.0": len(modules)},
            "frobenius_norm": math.sqrt(sum(n * n for n in norms)),
            "max_spectral_norm": max((m.spectral_norm for m in modules.values()), default=math.nan),
            "median_spectral_norm": 0.5,
            "mean_effective_rank": 6.5,
            "dtypes": ["F32"],
            "features": [],
            "base": None,
        },
        findings=list(findings),
        weights=statistics(whole, whole=True),
        tensors=tensors,
        modules=modules,
    )


def comparison(analyses: Sequence[AdapterAnalysis], seed: int = 0) -> Comparison:
    """A comparison with cosines of plausible sizes: symmetric, 1 on the diagonal."""
    random = np.random.default_rng(seed)
    n = len(analyses)

    def cosines(present: Sequence[bool]) -> np.ndarray:
        half = np.triu(random.uniform(-0.4, 0.9, (n, n)), 1)
        matrix = half + half.T + np.eye(n)
        absent = ~np.asarray(present, dtype=bool)
        matrix[absent] = math.nan
        matrix[:, absent] = math.nan
        return matrix

    paths = list(dict.fromkeys(path for one in analyses for path in one.modules))
    modules = {}
    found = places_of(analyses)
    for path in paths:
        records = [one.modules.get(path) for one in analyses]
        present = [record is not None for record in records]
        matrix = cosines(present)
        modules[path] = ModuleComparison(
            path=path,
            shape=next(record.shape for record in records if record is not None),
            present=present,
            norms=[None if record is None else record.frobenius_norm for record in records],
            ranks=[None if record is None else record.rank for record in records],
            cosine=matrix,
            sign_agreement=(1 + matrix) / 2,
            subspace=np.abs(matrix),
            subspace_expected=np.full((n, n), 0.33),
            pairs=[],
            block=found[path].block,
            layer=found[path].layer,
        )
    names = [one.name for one in analyses]
    return Comparison(
        names=names,
        analyses=list(analyses),
        cosine=cosines([True] * n),
        modules=modules,
        only_in={
            one.name: [p for p in one.modules if not all(modules[p].present)] for one in analyses
        },
    )
