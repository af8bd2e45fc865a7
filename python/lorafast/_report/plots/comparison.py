"""The plots of several adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorafast._analysis.records import Histogram, ModuleAnalysis, ModuleComparison
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._report.palette import COLORS
from lorafast._report.plots.cosines import (
    cosine_colors,
    cosine_label,
    cosine_number,
    cosine_scale,
    draw_bar,
    draw_matrix,
)
from lorafast._report.plots.draw import plot
from lorafast._report.plots.fonts import width
from lorafast._report.plots.style import (
    ABSENT,
    GUIDE,
    LABEL_SIZE,
    TICK_SIZE,
    draw_empty,
    draw_grid,
    finite,
    grid_of,
    grid_size,
    is_drawable,
    legend_above,
    line_style,
    new_figure,
    style_axes,
    thin_ticks,
    truncate_all,
)

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

#: Up to so many adapters have a line each in one panel; more are drawn as rows.
MAX_LINES = 12
#: Up to so many adapters the page has a table of all cosines.
MAX_TABLE = 60
#: Up to so many groups of adapters that share a module have rows of their own.
MAX_GROUPS = 6


def _has_many_adapters(comparison: Comparison) -> bool:
    """Whether the page has no table of all cosines."""
    return len(comparison.names) > MAX_TABLE


@plot(
    "cosine",
    caption="cosine of the updates of each two adapters",
    page=_has_many_adapters,
    file="adapter_cosine.png",
)
def cosine(comparison: Comparison) -> Figure:
    """The cosine of the whole updates of each two adapters."""
    n = len(comparison.names)
    side = min(14.0, max(6.0, 3.5 + 0.45 * n))
    figure = new_figure(side + 1.0, side, "Cosine of the adapters' updates")
    axes = figure.subplots()
    if n < 2:
        draw_empty(axes, "there are no two adapters to compare")
        return figure
    names = truncate_all(comparison.names, 24)
    image, words = draw_matrix(axes, comparison.cosine, size=9 if n <= 8 else 7, aspect="equal")
    thin_ticks(axes, "y", names, 50)
    thin_ticks(axes, "x", names, 50, rotation=45 if n <= 24 else 90)
    if n > 24:
        for text in axes.get_xticklabels():
            text.set(va="center")
    draw_bar(figure, axes, image, words, shrink=0.8, fraction=0.15)
    return figure


@plot("modules", caption="cosine of the updates by block and layer", page=True)
def modules(comparison: Comparison) -> Figure:
    """The cosine of the updates of each module, the mean over pairs where there are several.

    The cells of a row are means over the same pairs: a layer that some adapters lack in some blocks
    has a row of its own for the pairs that are left there, which says of which adapters they are.
    """
    several = len(comparison.names) > 2
    title = "Mean cosine of the updates of each two adapters" if several else "Cosine of updates"
    places = _places(comparison)
    groups: dict[tuple[int, ...], list[str]] = {}
    for path, module in comparison.modules.items():
        if path in places and sum(module.present) > 1:
            groups.setdefault(_compared(module), []).append(path)
    ordered = sorted(groups.items(), key=lambda group: -len(group[0]))
    largest = sorted(ordered, key=lambda group: -len(group[1]))[:MAX_GROUPS]
    kept = [group for group in ordered if group in largest]
    paths = [path for _, members in kept for path in members]
    labels = [
        f"{places[path].layer}{of}"
        for (_, members), of in zip(kept, _of_adapters(comparison, kept), strict=True)
        for path in members
    ]
    values = [_mean_pair(comparison.modules[path]) for path in paths]
    grid = grid_of([places[path] for path in paths], values, labels)
    rows, columns, _, _ = grid
    figure = new_figure(*grid_size(rows, columns), f"{title}, by module")
    axes = figure.subplots()
    if not paths:
        draw_empty(axes, "no module is in two of the adapters")
        return figure
    scale = cosine_scale(values)
    draw_grid(figure, axes, grid, colors=cosine_colors(), scale=scale, label=cosine_label(scale),
              number=cosine_number(scale))  # fmt: skip
    left_out = sum(map(len, groups.values())) - len(paths)
    if left_out:
        axes.set_xlabel(
            f"block\n{left_out:,} modules that yet other adapters share are left out",
            fontsize=LABEL_SIZE,
        )
    return figure


def _places(comparison: Comparison) -> dict[str, ModuleAnalysis]:
    """A module of each path, for its block and layer: of the adapter that has the most modules.

    Layers are named so that those of one adapter are told apart (an encoder's from a decoder's).
    """
    places: dict[str, ModuleAnalysis] = {}
    for analysis in sorted(comparison.analyses, key=lambda one: len(one.modules)):
        places.update(analysis.modules)
    return places


def _compared(module: ModuleComparison) -> tuple[int, ...]:
    """The adapters whose updates of a module have cosines; those that have it, if none has any."""
    known = np.isfinite(np.asarray(module.cosine, dtype=float))
    np.fill_diagonal(known, val=False)
    some = np.flatnonzero(known.any(axis=0)) if known.any() else np.flatnonzero(module.present)
    return tuple(some.tolist())


def _of_adapters(
    comparison: Comparison, groups: Sequence[tuple[tuple[int, ...], list[str]]]
) -> list[str]:
    """For each group of adapters, what to write behind a layer: nothing where it is all of them."""
    names = truncate_all(comparison.names, 16)
    texts = []
    for members, _ in groups:
        lacking = [name for i, name in enumerate(names) if i not in members]
        if not lacking:
            texts.append("")
        elif len(lacking) <= min(2, len(members)):
            texts.append(f" (all but {' and '.join(lacking)})")
        elif len(members) <= 3:
            texts.append(f" ({', '.join(names[i] for i in members)})")
        else:
            texts.append(f" ({len(members)} of {len(names)} adapters)")
    return [
        f"{text[:-1]}, group {texts[: i + 1].count(text)})" if texts.count(text) > 1 else text
        for i, text in enumerate(texts)
    ]


def _mean_pair(module: ModuleComparison) -> float:
    """The mean cosine over the pairs that have one."""
    values = np.asarray(module.cosine, dtype=float)
    pairs = values[np.triu_indices_from(values, 1)]
    pairs = pairs[np.isfinite(pairs)]
    return float(pairs.mean()) if pairs.size else math.nan


@plot(
    "distributions",
    caption="distributions of the adapters' stored weights",
    page=True,
    file="weight_distribution_comparison.png",
)
def distributions(comparison: Comparison) -> Figure:
    """The distributions of the stored weights over each other, from their histograms."""
    figure = new_figure(13, 6.5, "Distributions of the stored weights")
    left, right = figure.subplots(1, 2)
    weights = [analysis.weights.histogram for analysis in comparison.analyses]
    logs = [analysis.weights.log_histogram for analysis in comparison.analyses]
    names = truncate_all(comparison.names)
    if len(names) > MAX_LINES:
        figure.suptitle(
            "Distributions of the stored weights: density, of each adapter's own greatest (yellow)",
            fontsize=13,
        )
        _rows(left, weights, names, "Distribution", "weight")
        _rows(right, logs, None, "Distribution of magnitudes", "log₁₀(|w| + 1e-8)")
        return figure
    style_axes(left, "Distribution", "weight", "density")
    style_axes(right, "Distribution of magnitudes", "log₁₀(|w| + 1e-8)", "density")
    for axes, histograms in ((left, weights), (right, logs)):
        _overlay(axes, histograms)
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=1.6, **line_style(i)) for i in range(len(names))]
    legend = figure.legend(handles, ["" for _ in names], loc="outside lower center", fontsize=9,
                           ncols=min(4, len(names)), frameon=False)  # fmt: skip
    for text, name, histogram in zip(legend.get_texts(), names, weights, strict=True):
        text.set_parse_math(False)
        text.set_text(name if is_drawable(histogram) else f"{name} (no finite weights)")
    return figure


def _density(histogram: Histogram) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Edges, and counts over all counts and the width of the bin."""
    edges = np.asarray(histogram.edges, dtype=float)
    counts = np.asarray(histogram.counts, dtype=float)
    return edges, counts / (counts.sum() * np.diff(edges))


def _overlay(axes: Axes, histograms: Sequence[Histogram]) -> None:
    drawn = [(i, *_density(h)) for i, h in enumerate(histograms) if is_drawable(h)]
    if not drawn:
        draw_empty(axes, "no finite weights")
        return
    peaks = [density.max() for _, _, density in drawn]
    # A wide distribution would be a flat line below a narrow one.
    if max(peaks) > 20 * min(peaks):
        axes.set_yscale("log")
        axes.set_ylabel("density (logarithmic)", fontsize=LABEL_SIZE)
    for i, edges, density in drawn:
        axes.stairs(density, edges, baseline=None, linewidth=1.6, **line_style(i))
    if axes.get_yscale() == "linear":
        axes.set_ylim(bottom=0.0)


def _rows(
    axes: Axes, histograms: Sequence[Histogram], names: Sequence[str] | None, title: str, x: str
) -> None:
    """A row for each adapter, its density relative to its greatest as a color."""
    style_axes(axes, title, x, "")
    axes.grid(False)
    drawn = [h for h in histograms if is_drawable(h)]
    if not drawn:
        draw_empty(axes, "no finite weights")
        return
    low = min(h.edges[0] for h in drawn)
    high = max(h.edges[-1] for h in drawn)
    grid = np.linspace(low, high, 241)
    image = np.full((len(histograms), grid.size - 1), np.nan)
    for i, histogram in enumerate(histograms):
        if is_drawable(histogram):
            edges, density = _density(histogram)
            below = np.concatenate([[0.0], np.cumsum(density * np.diff(edges))])
            share = np.diff(np.interp(grid, edges, below))
            image[i] = share / share.max()
    axes.set_facecolor(ABSENT)
    axes.imshow(np.ma.masked_invalid(image), aspect="auto", interpolation="nearest",
                cmap="cividis", extent=(low, high, len(histograms) - 0.5, -0.5))  # fmt: skip
    if names is None:
        axes.set_yticks([])
    else:
        thin_ticks(axes, "y", names, 40)


@plot(
    "adapters",
    caption="number of parameters, mean, standard deviation and range of each adapter",
    page=True,
    file="adapter_comparison.png",
)
def adapters(comparison: Comparison) -> Figure:
    """Number of parameters, mean, standard deviation and range of each adapter's weights."""
    from matplotlib.ticker import EngFormatter

    names = truncate_all(comparison.names, 24)
    statistics = [analysis.weights for analysis in comparison.analyses]
    figure = new_figure(14, 10, "Adapters side by side: stored weights")
    panels = figure.subplots(2, 2)
    x = np.arange(len(names))
    style_axes(panels[0, 0], "Parameters", "", "parameters")
    panels[0, 0].bar(x, [s.count for s in statistics], width=0.7, color=COLORS[0])
    panels[0, 0].yaxis.set_major_formatter(EngFormatter(sep=" "))
    style_axes(panels[0, 1], "Mean", "", "mean")
    panels[0, 1].bar(x, [finite(s.mean) for s in statistics], width=0.7, color=COLORS[0])
    panels[0, 1].axhline(0.0, color=GUIDE, linewidth=0.8)
    style_axes(panels[1, 0], "Standard deviation", "", "std")
    panels[1, 0].bar(x, [finite(s.std) for s in statistics], width=0.7, color=COLORS[0])
    style_axes(panels[1, 1], "Range", "", "weight")
    _ranges(panels[1, 1], comparison.analyses)
    for axes in panels.flat:
        _name_ticks(axes, names)
        if axes is not panels[0, 0]:
            axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
            axes.yaxis.get_offset_text().set_fontsize(TICK_SIZE)
    return figure


def _ranges(axes: Axes, analyses: Sequence[AdapterAnalysis]) -> None:
    """A bar from the least to the greatest weight, a thicker one between two percentiles."""
    for i, analysis in enumerate(analyses):
        low, high = finite(analysis.weights.min), finite(analysis.weights.max)
        axes.bar([i], [high - low], bottom=[low], width=0.12, color=COLORS[4])
        inner = [analysis.weights.percentiles.get(p, math.nan) for p in (5.0, 95.0)]
        axes.bar([i], [inner[1] - inner[0]], bottom=[inner[0]], width=0.5, color=COLORS[0])
    # The lower end of a bar is no natural end of the axis here.
    axes.use_sticky_edges = False
    axes.axhline(0.0, color=GUIDE, linewidth=0.8)
    from matplotlib.patches import Patch

    whole = Patch(color=COLORS[4], label="least to greatest")
    legend_above(axes, [whole, Patch(color=COLORS[0], label="5th to 95th percentile")])


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """An adapter's name below each position, upright where there are many."""
    crowded = len(names) * max(map(width, names), default=0) > 60
    thin_ticks(axes, "x", names, 40, rotation=0 if not crowded else 35 if len(names) <= 16 else 90)
    if crowded and len(names) > 16:
        for text in axes.get_xticklabels():
            text.set(va="center")
    axes.set_xlim(-0.6, len(names) - 0.4)
