"""Page of one adapter."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence

from lorafast._analysis.records import METRICS, ModuleAnalysis, TensorStatistics
from lorafast._analysis.results import AdapterAnalysis
from lorafast._report.html.elements import (
    Column,
    Html,
    definitions,
    document,
    element,
    folded,
    natural,
    row_ids,
    section,
    shown,
    table,
)
from lorafast._report.html.findings import Found, Targets, findings
from lorafast._report.html.pictures import plots
from lorafast._words import plural

#: Points of a spectrum in a table's row.
SPARK_POINTS = 32
#: Keys of the summary that say more in other words.
SUMMARY_WORDS = {
    "total_parameters": "stored values",
    "total_bytes": "bytes",
    "frobenius_norm": "Frobenius norm of all updates",
    "max_spectral_norm": "greatest spectral norm",
    "median_spectral_norm": "median spectral norm",
    "mean_effective_rank": "mean effective rank (Roy–Vetterli)",
}


def spark(module: ModuleAnalysis) -> Html:
    """The spectrum as a line of the size of a word."""
    values = module.singular_values
    if not values or not all(map(math.isfinite, values)) or values[0] <= 0:
        return Html("")
    width, height = 84, 20
    step = max(1, math.ceil(len(values) / SPARK_POINTS))
    kept = values[::step]
    across = width / max(1, len(kept) - 1)
    # A spectrum of one value is a level line, not a point that nobody sees.
    heights = [value / values[0] for value in kept] * (2 if len(kept) == 1 else 1)
    across = width if len(kept) == 1 else across
    points = " ".join(
        f"{i * across:.1f},{1 + (height - 2) * (1 - value):.1f}" for i, value in enumerate(heights)
    )
    return element(
        "svg",
        element("polyline", points=points),
        class_="spark",
        width=width,
        height=height,
        viewBox=f"0 0 {width} {height}",
        aria_hidden="true",
    )


def _metric(name: str) -> Callable[[ModuleAnalysis], float | None]:
    """A metric of a module, of which there are none where the update is not finite."""

    def value(module: ModuleAnalysis) -> float | None:
        found: float | None = getattr(module, name)
        return None if math.isnan(module.frobenius_norm) else found

    return value


#: A column for each metric of the core.
METRIC_COLUMNS: list[Column[ModuleAnalysis]] = [
    Column(metric["symbol"], f"{metric['doc'][:1].upper()}{metric['doc'][1:]}.", _metric(name))
    for name, metric in METRICS.items()
]
MODULE_COLUMNS: list[Column[ModuleAnalysis]] = [
    Column("module", "Path of the module that the update belongs to.", lambda m: m.path),
    Column("shape", "Rows × columns of ΔW = s·B·A.", lambda m: f"{m.shape[0]}×{m.shape[1]}"),
    Column("r", "Rank: the common extent of B and A.", lambda m: m.rank),
    Column("α", "alpha, as the config gives it.", lambda m: m.alpha),
    Column("s", "Scaling: α/r, or α/√r for rsLoRA. Every figure includes it.", lambda m: m.scaling),
    *METRIC_COLUMNS[:1],
    Column("‖ΔW‖/‖W₀‖", "Frobenius norm of the update over the one of the base's weight.",
           lambda m: m.relative_norm),
    *METRIC_COLUMNS[1:2],
    Column("spectrum", "σᵢ/σ₁ from the first to the last, from 0 to 1.", spark,
           sortable=False),
    *METRIC_COLUMNS[2:],
]  # fmt: skip
ENTRY_COLUMNS: list[Column[ModuleAnalysis]] = [
    Column("max|ΔW|", "The greatest magnitude of an entry of ΔW.",
           lambda m: None if m.entries is None else m.entries.max_abs),
    Column("small share", "Share of ΔW's entries with a magnitude below the threshold.",
           lambda m: None if m.entries is None else m.entries.below_share),
]  # fmt: skip

TENSOR_COLUMNS: list[Column[tuple[str, TensorStatistics]]] = [
    Column("tensor", "Name of the tensor in the file.", lambda t: t[0]),
    Column("shape", "Extents, as stored.", lambda t: "×".join(map(str, t[1].shape or ()))),
    Column("dtype", "As safetensors writes it.", lambda t: t[1].dtype or ""),
    Column("mean", "Σw/n.", lambda t: t[1].mean),
    Column("std", "√(Σ(w − mean)²/n).", lambda t: t[1].std),
    Column("min", "The least value.", lambda t: t[1].min),
    Column("median", "50th percentile, by linear interpolation.",
           lambda t: t[1].percentiles.get(50.0)),
    Column("max", "The greatest value.", lambda t: t[1].max),
    Column("‖w‖", "√Σw².", lambda t: t[1].l2_norm),
    Column("zeros", "Share of the finite values that are zero.", lambda t: t[1].zero_share),
    Column("not finite", "Number of NaN and infinities; they are left out of all other figures.",
           lambda t: t[1].non_finite),
    Column("skewness", "m₃/m₂^1.5, m the central moments.", lambda t: t[1].skewness),
    Column("kurtosis", "m₄/m₂² − 3, m the central moments.", lambda t: t[1].kurtosis),
]  # fmt: skip


def page(analysis: AdapterAnalysis) -> str:
    """The report of one adapter."""
    modules = sorted(analysis.modules.values(), key=lambda module: natural(module.path))
    tensors = sorted(analysis.tensors.items(), key=lambda item: natural(item[0]))
    module_ids = row_ids("module", len(modules))
    tensor_ids = row_ids("tensor", len(tensors))
    rows = {name: row for (name, _), row in zip(tensors, tensor_ids, strict=True)}
    rows |= {module.path: row for module, row in zip(modules, module_ids, strict=True)}
    return document(
        f"Adapter {analysis.name}",
        element("p", element("code", str(analysis.path)), class_="quiet"),
        findings([Found(None, finding) for finding in analysis.findings], Targets(modules=rows)),
        section("Summary", summary(analysis)),
        plots(analysis),
        section("Modules", modules_table(modules, module_ids)),
        section(
            "Stored tensors",
            folded(
                f"Statistics of {plural(len(analysis.tensors), 'tensor')}",
                table(tensors, TENSOR_COLUMNS, "tensors", tensor_ids),
            ),
        ),
        section("Configuration", folded("adapter_config.json", element("pre", _json(analysis)))),
    )


def summary(analysis: AdapterAnalysis) -> Html:
    """The figures of the whole adapter, and of all its stored weights."""
    weights = analysis.weights
    ends = (weights.min, weights.max)
    zeros = shown(100 * weights.zero_share)
    items = [
        (SUMMARY_WORDS.get(key, key.replace("_", " ")), shown(value))
        for key, value in analysis.summary.items()
    ]
    items += [
        ("mean of the weights", shown(weights.mean)),
        ("standard deviation", shown(weights.std)),
        ("least and greatest weight", " to ".join(filter(None, map(shown, ends)))),
        ("zeros", f"{zeros} %" if zeros else ""),
        ("not finite", shown(weights.non_finite)),
    ]
    items += [
        (f"percentile {shown(percent)}", shown(value))
        for percent, value in weights.percentiles.items()
    ]
    return definitions(items)


def modules_table(modules: Sequence[ModuleAnalysis], ids: Sequence[str]) -> Html:
    """A row a module; columns that hold nothing are left out."""
    columns = [
        column
        for column in MODULE_COLUMNS
        if column.title != "‖ΔW‖/‖W₀‖" or any(m.relative_norm is not None for m in modules)
    ]
    if any(module.entries is not None for module in modules):
        columns += ENTRY_COLUMNS
    return table(modules, columns, "modules", ids)


def _json(analysis: AdapterAnalysis) -> str:
    return json.dumps(analysis.config, indent=2, ensure_ascii=False, default=str)
