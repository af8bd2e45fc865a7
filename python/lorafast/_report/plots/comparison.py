"""The plots of several adapters."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafast._analysis.names import labels_of
from lorafast._analysis.records import ModuleComparison
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
from lorafast._report.plots.densities import (
    Densities,
    densities,
    log_densities,
    tensors_by_factor,
)
from lorafast._report.plots.draw import plot
from lorafast._report.plots.fonts import width
from lorafast._report.plots.style import (
    ABSENT,
    GUIDE,
    LABEL_SIZE,
    LINES,
    TICK_SIZE,
    draw_empty,
    draw_grid,
    finite,
    grid_of,
    grid_size,
    is_drawable,
    legend_above,
    legend_below,
    new_figure,
    style_axes,
    thin_ticks,
    truncate_all,
)
from lorafast._report.text import format_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

#: Up to so many adapters have a line each in one panel; more are drawn as rows.
MAX_LINES = 12
#: Where the greatest of two peaks is so many times the other, densities are logarithmic.
STEEP = 20
LOG_AXIS = "log₁₀(|w| + 1e-8)"
#: Up to so many adapters the page has a table of all cosines.
MAX_TABLE = 60
#: Of the bars behind those of the percentiles, which it differs from on a light and a dark ground.
OUTER = "#919191"
#: Up to so many adapters have bars apart: of more, a bar or a gap would be less than a pixel.
MAX_APART = 60
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
    names = truncate_all(labels_of(comparison.names), 24)
    image, words = draw_matrix(
        axes, _of_one_model(comparison), size=9 if n <= 8 else 7, aspect="equal"
    )
    thin_ticks(axes, "y", names, 50)
    thin_ticks(axes, "x", names, 50, rotation=45 if n <= 24 else 90)
    if n > 24:
        for text in axes.get_xticklabels():
            text.set(va="center")
    draw_bar(figure, axes, image, words, shrink=0.8, fraction=0.15)
    return figure


def _of_one_model(comparison: Comparison) -> Any:
    """The cosines, without those of adapters that have no module in common.

    These are 0 whatever the adapters, and no word about them.
    """
    values = np.array(comparison.cosine, dtype=float)
    if comparison.modules:
        present = np.array([module.present for module in comparison.modules.values()], dtype=int)
        values[present.T @ present == 0] = math.nan
    return values


def _has_modules(comparison: Comparison) -> bool:
    """Whether the updates of each module were compared."""
    return comparison.modules_compared


@plot("modules", caption="cosine of the updates by block and layer", page=_has_modules)
def modules(comparison: Comparison) -> Figure:
    """The cosine of the updates of each module, the mean over pairs where there are several.

    The cells of a row are means over the same pairs: a layer that some adapters lack in some blocks
    has a row of its own for the pairs that are left there, which says of which adapters they are.
    """
    several = len(comparison.names) > 2
    title = "Mean cosine of the updates of each two adapters" if several else "Cosine of updates"
    if not comparison.modules_compared:
        raise ValueError(
            "the plot 'modules' needs the modules' cosines, which were not computed; "
            "compare(…, modules=True) does"
        )
    groups: dict[tuple[int, ...], list[ModuleComparison]] = {}
    for module in comparison.modules.values():
        if sum(module.present) > 1:
            groups.setdefault(_compared(module), []).append(module)
    ordered = sorted(groups.items(), key=lambda group: -len(group[0]))
    largest = sorted(ordered, key=lambda group: -len(group[1]))[:MAX_GROUPS]
    kept = [group for group in ordered if group in largest]
    shared = [module for _, members in kept for module in members]
    labels = [
        f"{module.layer}{of}"
        for (_, members), of in zip(kept, _of_adapters(comparison, kept), strict=True)
        for module in members
    ]
    values = list(map(_mean_pair, shared))
    grid = grid_of(shared, values, labels)
    rows, columns, _, _ = grid
    figure = new_figure(*grid_size(rows, columns), f"{title}, by module")
    axes = figure.subplots()
    if not shared:
        draw_empty(axes, "no module is in two of the adapters")
        return figure
    scale = cosine_scale(values)
    draw_grid(figure, axes, grid, colors=cosine_colors(), scale=scale, label=cosine_label(scale),
              number=cosine_number(scale))  # fmt: skip
    left_out = sum(map(len, groups.values())) - len(shared)
    if left_out:
        axes.set_xlabel(
            f"block\n{left_out:,} modules that yet other adapters share are left out",
            fontsize=LABEL_SIZE,
        )
    return figure


def _compared(module: ModuleComparison) -> tuple[int, ...]:
    """The adapters whose updates of a module have cosines; those that have it, if none has any."""
    known = np.isfinite(np.asarray(module.cosine, dtype=float))
    np.fill_diagonal(known, val=False)
    some = np.flatnonzero(known.any(axis=0)) if known.any() else np.flatnonzero(module.present)
    return tuple(some.tolist())


def _of_adapters(
    comparison: Comparison, groups: Sequence[tuple[tuple[int, ...], list[ModuleComparison]]]
) -> list[str]:
    """For each group of adapters, what to write behind a layer: nothing where it is all of them."""
    names = truncate_all(labels_of(comparison.names), 16)
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
    caption="distributions of the adapters' stored weights, those of A and B apart",
    page=True,
    file="weight_distribution_comparison.png",
)
def distributions(comparison: Comparison) -> Figure:
    """The distributions of the stored weights over each other, in the same bins.

    A and B have panels of their own: both together are the distribution of neither. Densities are
    logarithmic in all panels or in none.
    """
    names = truncate_all(labels_of(comparison.names))
    groups = tensors_by_factor(comparison.analyses) or {"A": [[] for _ in names]}
    title = "Distributions of the stored weights"
    is_rows = len(names) > MAX_LINES
    if is_rows:
        title += ": density, of each adapter's own greatest (yellow)"
    figure = new_figure(13, 1.0 + (5.0 if len(groups) == 1 else 4.2) * len(groups), title)
    panels = figure.subplots(len(groups), 2, squeeze=False)
    found = [(densities(own), log_densities(own)) for own in groups.values()]
    # A wide distribution would be a flat line below a narrow one, or below many zeros.
    is_steep = any(
        len(one.peaks) > 1 and one.peaks.max() > STEEP * one.peaks.min()
        for pair in found
        for one in pair
        if one is not None
    )
    for row, (kind, pair) in enumerate(zip(groups, found, strict=True)):
        for axes, one, what, x in zip(
            panels[row], pair, ("Weights", "Magnitudes"), ("weight", LOG_AXIS), strict=True
        ):
            style_axes(axes, f"{what} of {kind}", x, "" if is_rows else "density")
            if one is None:
                draw_empty(axes, "no finite weights")
                continue
            if one.beyond:
                axes.set_xlabel(f"{x}\nup to {format_percent(one.beyond)} of an adapter's weights "
                                "lie beyond the axis", fontsize=LABEL_SIZE)  # fmt: skip
            if is_rows:
                _rows(axes, one, names if axes is panels[row, 0] else None)
            else:
                _overlay(axes, one, is_steep=is_steep)
    if not is_rows and names:
        _name_lines(figure, comparison, names)
    return figure


def _adapter_style(i: int) -> dict[str, Any]:
    """Color and dashes of an adapter's line: any two differ in both, so that one is enough."""
    return {"color": COLORS[i % len(COLORS)], "linestyle": LINES[i % len(LINES)]}


def _name_lines(figure: Figure, comparison: Comparison, names: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = [Line2D([], [], linewidth=1.6, **_adapter_style(i)) for i in range(len(names))]
    labels = [
        name if is_drawable(analysis.weights.histogram) else f"{name} (no finite weights)"
        for name, analysis in zip(names, comparison.analyses, strict=True)
    ]
    legend_below(figure, handles, labels)


def _overlay(axes: Axes, found: Densities, *, is_steep: bool) -> None:
    """An outline for each adapter; the area of the first of two is filled."""
    known = [i for i, row in enumerate(found.values) if np.isfinite(row).all()]
    if is_steep:
        axes.set_yscale("log")
        axes.tick_params(axis="y", which="both", labelsize=TICK_SIZE)
        axes.set_ylabel("density (logarithmic)", fontsize=LABEL_SIZE)
        positive = found.values[np.isfinite(found.values) & (found.values > 0)]
        top = float(positive.max())
        axes.set_ylim(max(0.5 * float(positive.min()), top * 1e-5), 2 * top)
    for i in known:
        style = _adapter_style(i)
        if len(found.values) == 2 and i == 0:
            ground = axes.get_ylim()[0] if is_steep else 0.0
            axes.stairs(found.values[i], found.edges, baseline=ground, fill=True, alpha=0.2,
                        color=style["color"], linewidth=0)  # fmt: skip
        axes.stairs(found.values[i], found.edges, baseline=None, linewidth=1.6, **style)
    if not is_steep:
        axes.set_ylim(bottom=0.0)


def _rows(axes: Axes, found: Densities, names: Sequence[str] | None) -> None:
    """A row for each adapter, its density relative to its greatest as a color."""
    axes.grid(False)
    image = found.values / found.values.max(axis=1, keepdims=True)
    axes.set_facecolor(ABSENT)
    axes.imshow(np.ma.masked_invalid(image), aspect="auto", interpolation="nearest", cmap="cividis",
                extent=(found.edges[0], found.edges[-1], len(image) - 0.5, -0.5))  # fmt: skip
    if names is None:
        axes.set_yticks([])
    else:
        thin_ticks(axes, "y", names, 24)


@plot(
    "adapters",
    caption="number of parameters, mean, standard deviation and range of each adapter",
    page=True,
    file="adapter_comparison.png",
)
def adapters(comparison: Comparison) -> Figure:
    """Number of parameters, mean, standard deviation and range of each adapter's weights."""
    from matplotlib.ticker import EngFormatter

    names = truncate_all(labels_of(comparison.names), 24)
    statistics = [analysis.weights for analysis in comparison.analyses]
    figure = new_figure(14, 10, "Adapters side by side: stored weights")
    panels = figure.subplots(2, 2)
    x = np.arange(len(names))
    thickness = 0.7 if len(names) <= MAX_APART else 1.0
    style_axes(panels[0, 0], "Parameters", "", "parameters")
    panels[0, 0].bar(x, [s.count for s in statistics], width=thickness, color=COLORS[0])
    panels[0, 0].yaxis.set_major_formatter(EngFormatter(sep=" "))
    style_axes(panels[0, 1], "Mean", "", "mean")
    panels[0, 1].bar(x, [finite(s.mean) for s in statistics], width=thickness, color=COLORS[0])
    panels[0, 1].axhline(0.0, color=GUIDE, linewidth=0.8)
    style_axes(panels[1, 0], "Standard deviation", "", "std")
    panels[1, 0].bar(x, [finite(s.std) for s in statistics], width=thickness, color=COLORS[0])
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
    thin, thick = (0.12, 0.5) if len(analyses) <= MAX_APART else (1.0, 1.0)
    for i, analysis in enumerate(analyses):
        low, high = finite(analysis.weights.min), finite(analysis.weights.max)
        axes.bar([i], [high - low], bottom=[low], width=thin, color=OUTER)
        inner = [analysis.weights.percentiles.get(p, math.nan) for p in (5.0, 95.0)]
        axes.bar([i], [inner[1] - inner[0]], bottom=[inner[0]], width=thick, color=COLORS[0])
    # The lower end of a bar is no natural end of the axis here.
    axes.use_sticky_edges = False
    axes.axhline(0.0, color=GUIDE, linewidth=0.8)
    from matplotlib.patches import Patch

    whole = Patch(color=OUTER, label="least to greatest")
    legend_above(axes, [whole, Patch(color=COLORS[0], label="5th to 95th percentile")])


def _name_ticks(axes: Axes, names: Sequence[str]) -> None:
    """An adapter's name below each position, upright where there are many."""
    crowded = len(names) * max(map(width, names), default=0) > 60
    thin_ticks(axes, "x", names, 40, rotation=0 if not crowded else 35 if len(names) <= 16 else 90)
    if crowded and len(names) > 16:
        for text in axes.get_xticklabels():
            text.set(va="center")
    axes.set_xlim(-0.6, len(names) - 0.4)
