"""Heatmaps of a fleet's modules by layer and block, one for each architecture."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np

from lorafast._analysis.architectures import Architecture, architectures
from lorafast._fleet.table import Table
from lorafast._report.html.chart import Chart, categories, numbers, text, whole

if TYPE_CHECKING:
    from typing import Any

    from numpy.typing import NDArray

    from lorafast._fleet.fleet import Fleet

#: Rows or columns of a chart by layer or block that stay readable.
MAX_LAYERS = 24
MAX_BLOCKS = 128
#: Architectures that have a heatmap of their own.
MAX_HEATMAPS = 6


def layers_of(
    modules: Table, is_own: NDArray[np.bool_] | None = None
) -> list[tuple[str, NDArray[Any]]]:
    """The rows of each of the most frequent layers, in the order in which these come.

    Args:
        modules: a row for each module.
        is_own: which of them count; without it all.
    """
    codes, texts = modules.coded("layer")
    own = np.ones(len(codes), dtype=np.bool_) if is_own is None else is_own
    counts = np.bincount(codes[own], minlength=len(texts))
    kept = sorted(np.argsort(-counts, kind="stable")[:MAX_LAYERS].tolist())
    return [(texts[code], np.flatnonzero((codes == code) & own)) for code in kept if counts[code]]


def architectures_of(fleet: Fleet, *, by_base: bool = False) -> list[Architecture]:
    """The architectures of a fleet's adapters, by the shapes of what they update."""
    modules = fleet.modules
    layers, _ = modules.coded("layer")
    rows = np.stack(
        [layers, modules["block"], modules["out_features"], modules["in_features"]], axis=1
    ).astype(np.int64)
    ends = np.cumsum(fleet.adapters["modules"])
    # Adapters of one run have the same modules: their shapes are taken apart once.
    known: dict[bytes, dict[Hashable, Hashable]] = {}
    shapes = []
    for own in np.split(rows, ends[:-1]) if len(ends) else []:
        key = own.tobytes()
        if key not in known:
            known[key] = {(layer, block): (m, n) for layer, block, m, n in own.tolist()}
        shapes.append(known[key])
    return architectures(fleet.adapters["base"].tolist(), shapes, by_base=by_base)


def places(fleet: Fleet) -> list[Chart]:
    """For each architecture the norms of its adapters by layer and block."""
    found = architectures_of(fleet, by_base=True)
    member_of = np.repeat(np.arange(len(fleet)), fleet.adapters["modules"])
    made: list[Chart] = []
    for architecture in found:
        chart = _places_of(fleet.modules, np.isin(member_of, architecture.members))
        if chart is None or len(found) < 2:
            made += [] if chart is None else [chart]
            continue
        title = f"{chart.title}: {architecture.label}"
        made.append(replace(chart, title=title, caption=_caption(len(architecture.members))))
        if len(made) == MAX_HEATMAPS:
            break
    if len(found) <= MAX_HEATMAPS:
        return made
    more = f" Of {len(found):,} architectures those of most adapters are drawn."
    return [replace(chart, caption=chart.caption + more) for chart in made]


def _caption(count: int) -> str:
    if count == 1:
        return "‖ΔW‖ of its only adapter."
    return f"The median of ‖ΔW‖ over those of its {count:,} adapters that have the module."


def _places_of(modules: Table, is_own: NDArray[np.bool_]) -> Chart | None:
    blocks, norms = modules["block"], modules["frobenius_norm"]
    inside = is_own & (blocks >= 0) & (blocks < MAX_BLOCKS) & np.isfinite(norms)
    if not inside.any():
        return None
    width = int(blocks[inside].max()) + 1
    groups = [(layer, here[inside[here]]) for layer, here in layers_of(modules, is_own)]
    groups = [(layer, here) for layer, here in groups if len(here)]
    grid = np.full((len(groups), width), np.nan)
    for row, (_, here) in enumerate(groups):
        order = here[np.argsort(blocks[here], kind="stable")]
        edges = np.flatnonzero(np.diff(blocks[order])) + 1
        for part in np.split(order, edges):
            grid[row, int(blocks[part[0]])] = np.median(norms[part])
    trace = {
        "type": "heatmap",
        "z": [numbers(row) for row in grid],
        "x": list(range(width)),
        "y": [text(layer) for layer, _ in groups],
        "colorscale": "Viridis",
        "colorbar": {"title": {"text": "‖ΔW‖"}, "thickness": 12},
        "hovertemplate": "block %{x}<br>%{y}<br>median ‖ΔW‖ %{z:.4g}<extra></extra>",
        "xgap": 1,
        "ygap": 1,
    }
    layout = {
        "xaxis": {
            "title": {"text": "block"},
            "constrain": "domain",
            "range": categories(width),
            "dtick": whole(width),
        },
        "yaxis": {
            "automargin": True,
            "range": categories(len(groups), down=True),
            "type": "category",
        },
    }
    return Chart(
        "Where the fleet changes the model",
        "The median of ‖ΔW‖ over all adapters that have the module.",
        [trace],
        layout,
        height=max(340, 110 + 24 * len(groups)),
    )
