"""Mean and standard deviation of the factors A and B by block, a line for each layer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorafast._analysis.records import ModuleAnalysis
from lorafast._report.plots.groups import group_modules
from lorafast._report.plots.style import (
    GUIDE,
    LABEL_SIZE,
    TICK_SIZE,
    draw_empty,
    finite,
    legend_below,
    line_style,
    style_axes,
    thin_ticks,
    truncate_all,
)

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lorafast._analysis.results import AdapterAnalysis

#: Up to so many lines are told apart in a panel.
MOST_LINES = 14
#: Blocks whose markers do not cover the lines.
MOST_MARKED = 64
#: Up to so many modules, each the only one of its layer, have their names below the panel.
MOST_NAMES = 16
MARKERS = "os^DvPX"

FACTORS = (("A", "a_name"), ("B", "b_name"))
STATISTICS = (("mean", "Mean"), ("std", "Standard deviation"))


def draw_factors(figure: Figure, panels: NDArray[np.object_], analysis: AdapterAnalysis) -> None:
    """Draws a panel for each factor and statistic.

    Where the adapter has no module of a layer in a block, the layer's line has a gap.

    Args:
        figure: gets the legend.
        panels: 2×2: A above B, means left of standard deviations.
        analysis: whose tensors are drawn.
    """
    modules = list(analysis.modules.values())
    groups = group_modules(modules, MOST_LINES)
    is_single = len(modules) <= MOST_NAMES and len({m.layer for m in modules}) == len(modules)
    if is_single:
        groups = {"": sorted(modules, key=_block_first)}
    by = "" if is_single or all(module.block is None for module in modules) else " by block"
    handles: list[Artist] = []
    for row, (factor, field) in enumerate(FACTORS):
        for column, (statistic, words) in enumerate(STATISTICS):
            axes = panels[row, column]
            style_axes(axes, f"{words} of {factor}{by}", "", statistic)
            known = {
                module.path: finite(getattr(tensor, statistic))
                for module in modules
                if (tensor := analysis.tensors.get(getattr(module, field))) is not None
            }
            if not modules:
                draw_empty(axes, "there is no module whose update is measured")
            elif all(map(math.isnan, known.values())):
                draw_empty(axes, "no finite statistics")
            elif is_single:
                _draw_named(axes, groups[""], known)
                _limit(axes, statistic)
            else:
                handles = _draw_lines(axes, modules, groups, known)
                _limit(axes, statistic)
    if handles:
        crowded = any(len({m.block for m in group}) < len(group) for group in groups.values())
        heading = "layer (number of modules)" if crowded else "layer"
        labels = truncate_all(list(groups))
        if crowded:
            sizes = map(len, groups.values())
            labels = [f"{label}  ({size})" for label, size in zip(labels, sizes, strict=True)]
        legend_below(figure, handles, labels, heading)


def _block_first(module: ModuleAnalysis) -> int:
    return -1 if module.block is None else module.block


def _limit(axes: Axes, statistic: str) -> None:
    if statistic == "mean":
        axes.axhline(0.0, color=GUIDE, linewidth=0.8, zorder=0)
    else:
        axes.set_ylim(0.0, 1.06 * axes.dataLim.ymax or 1.0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(TICK_SIZE)


def _draw_named(axes: Axes, modules: Sequence[ModuleAnalysis], known: dict[str, float]) -> None:
    """A point for each module, its name below it."""
    axes.plot(
        range(len(modules)), [known.get(module.path, math.nan) for module in modules],
        marker="o", markersize=5, linestyle="none", color=line_style(0)["color"],
    )  # fmt: skip
    axes.set_xlim(-0.6, len(modules) - 0.4)
    names = [m.layer if m.block is None else f"{m.block}.{m.layer}" for m in modules]
    is_short = all(len(name) <= 3 for name in names)
    thin_ticks(axes, "x", truncate_all(names, 26), MOST_NAMES, rotation=0 if is_short else 35)


def _draw_lines(
    axes: Axes,
    modules: Sequence[ModuleAnalysis],
    groups: dict[str, list[ModuleAnalysis]],
    known: dict[str, float],
) -> list[Artist]:
    """A line for each group over the blocks, or points where a block has several of the group."""
    blocks = [module.block for module in modules if module.block is not None]
    handles: list[Artist] = []
    order = {module.path: i for i, module in enumerate(modules)}
    first, last = (min(blocks), max(blocks)) if blocks else (0, 0)
    # Where modules outside of any block stand, apart from the first block.
    outside = first - max(1.5, 0.07 * (last - first))
    # A point between two gaps is seen by its marker alone.
    size = 5.0 if len(modules) <= 40 else 3.5 if last - first < MOST_MARKED else 2.0
    for i, group in enumerate(groups.values()):
        values = [known.get(module.path, math.nan) for module in group]
        is_line = bool(blocks) and len({module.block for module in group}) == len(group)
        if is_line:
            x = np.array([outside, first - 0.5, *range(first, last + 1)])
            y = np.full(x.size, math.nan)
            for module, value in zip(group, values, strict=True):
                y[0 if module.block is None else 2 + module.block - first] = value
        else:
            x = np.array(
                [
                    order[m.path] if not blocks else outside if m.block is None else m.block
                    for m in group
                ]
            )
            y = np.array(values)
        style = line_style(i) if is_line else {**line_style(i), "linestyle": "none"}
        handles += axes.plot(
            x, y, marker=MARKERS[i % len(MARKERS)], markersize=size, linewidth=min(1.2, size / 2.5),
            markeredgewidth=0, alpha=0.9, **style,
        )  # fmt: skip
    if blocks:
        is_outside = len(blocks) < len(modules)
        margin = 0.5 + 0.01 * (last - first)
        axes.set_xlim((outside if is_outside else first) - margin, last + margin)
        _block_ticks(axes, first, last, outside if is_outside else None)
    else:
        axes.set_xlabel("module, in the order of the file", fontsize=LABEL_SIZE)
    return handles


def _block_ticks(axes: Axes, first: int, last: int, outside: float | None) -> None:
    """Numbers of blocks, and `none` where modules outside of any block stand."""
    step = next(n for n in (1, 2, 4, 5, 10, 20, 50, 100, 10**9) if (last - first + 1) / n <= 20)
    numbers = [block for block in range(first, last + 1) if block % step == 0] or [first]
    ticks: list[float] = [*([] if outside is None else [outside]), *numbers]
    axes.set_xticks(ticks, [*([] if outside is None else ["none"]), *map(str, numbers)])
    axes.set_xlabel("block", fontsize=LABEL_SIZE)
