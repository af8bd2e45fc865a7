"""The plots of one adapter."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafast._analysis.records import ModuleAnalysis, TensorStatistics
from lorafast._analysis.results import AdapterAnalysis
from lorafast._report.palette import COLORS
from lorafast._report.plots.draw import plot
from lorafast._report.plots.factors import draw_factors
from lorafast._report.plots.groups import group_modules
from lorafast._report.plots.style import (
    ABSENT,
    GUIDE,
    LABEL_SIZE,
    draw_empty,
    draw_grid,
    filled_histogram,
    grid_of,
    grid_size,
    is_drawable,
    is_steep,
    legend_above,
    legend_below,
    line_style,
    new_figure,
    style_axes,
    truncate,
    truncate_all,
)
from lorafast._report.text import format_number, format_percent

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

#: Up to so many modules each has its own line and its own label.
FEW = 8


@plot(
    "overview",
    caption="weights, log-scale weights, mean and standard deviation of A and B by block",
    page=True,
    file="{name}_weight_analysis.png",
)
def overview(analysis: AdapterAnalysis) -> Figure:
    """Weights, their magnitudes, and mean and standard deviation of both factors by block."""
    figure = new_figure(14, 12, f"{truncate(analysis.name)}: stored weights")
    panels = figure.subplots(3, 2, height_ratios=[1.3, 1, 1])
    # Counts are logarithmic in both panels or in none.
    histograms = analysis.weights.histogram, analysis.weights.log_histogram
    is_logarithmic = any(map(is_steep, histograms))
    _weights(panels[0, 0], analysis.weights, is_logarithmic=is_logarithmic)
    _log_weights(panels[0, 1], analysis.weights, is_logarithmic=is_logarithmic)
    draw_factors(figure, panels[1:], analysis)
    return figure


@plot("weights", caption="distribution of the stored weights")
def weights(analysis: AdapterAnalysis) -> Figure:
    """The distribution of all stored weights, with mean and percentiles."""
    figure = new_figure(10, 6, f"{truncate(analysis.name)}: stored weights")
    is_logarithmic = is_steep(analysis.weights.histogram)
    _weights(figure.subplots(), analysis.weights, is_logarithmic=is_logarithmic)
    return figure


@plot("log_weights", caption="distribution of the stored weights' magnitudes")
def log_weights(analysis: AdapterAnalysis) -> Figure:
    """The distribution of the stored weights' magnitudes."""
    figure = new_figure(10, 6, f"{truncate(analysis.name)}: magnitudes of the stored weights")
    is_logarithmic = is_steep(analysis.weights.log_histogram)
    _log_weights(figure.subplots(), analysis.weights, is_logarithmic=is_logarithmic)
    return figure


@plot("layers", caption="mean and standard deviation of A and B by block, a line for each layer")
def layers(analysis: AdapterAnalysis) -> Figure:
    """Mean and standard deviation of the stored factors by block, a line for each layer."""
    figure = new_figure(14, 9, f"{truncate(analysis.name)}: stored factors")
    draw_factors(figure, figure.subplots(2, 2), analysis)
    return figure


@plot("heatmap", caption="‖ΔW‖ by block and layer", page=True, file="{name}_weight_heatmap.png")
def heatmap(analysis: AdapterAnalysis) -> Figure:
    """‖ΔW‖ of each module, blocks from left to right."""
    from matplotlib import colormaps

    modules = list(analysis.modules.values())
    grid = grid_of(modules, [module.frobenius_norm for module in modules])
    rows, columns, values, _ = grid
    title = f"{truncate(analysis.name)}: size of the update of each module"
    figure = new_figure(*grid_size(rows, columns), title)
    axes = figure.subplots()
    if not modules:
        draw_empty(axes, "there is no module whose update is measured")
        return figure
    draw_grid(figure, axes, grid, colors=colormaps["cividis"], scale=_norm_scale(values),
              label="‖ΔW‖ (Frobenius)")  # fmt: skip
    return figure


def _norm_scale(values: NDArray[np.float64]) -> Normalize:
    """From 0 to the greatest norm; logarithmic where norms span more than three decades."""
    from matplotlib.colors import LogNorm, Normalize

    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return Normalize(0.0, 1.0)
    if positive.max() > 1000 * positive.min():
        # Zero norms have no logarithm: they are drawn as the least color.
        return LogNorm(positive.min(), positive.max(), clip=True)
    return Normalize(0.0, float(positive.max()))


@plot(
    "spectrum",
    caption="singular values of the updates, and their cumulative energy",
    page=True,
    file="{name}_spectrum.png",
)
def spectrum(analysis: AdapterAnalysis) -> Figure:
    """Singular values relative to the greatest, and the share of ‖ΔW‖² in the first k of them."""
    figure = new_figure(13, 5.8, f"{truncate(analysis.name)}: singular values of the updates")
    left, right = figure.subplots(1, 2)
    style_axes(left, "Scree", "i", "σᵢ / σ₁")
    style_axes(right, "Cumulative energy", "k", "share of ‖ΔW‖² in the first k")
    spectra = {
        path: np.asarray(module.singular_values, dtype=float)
        for path, module in analysis.modules.items()
    }
    spectra = {
        path: values
        for path, values in spectra.items()
        if values.size and np.isfinite(values).all() and values[0] > 0
    }
    if not spectra:
        for axes in (left, right):
            draw_empty(axes, "no update with a spectrum:\nall are zero or not finite")
        return figure
    groups = _spectrum_groups([analysis.modules[path] for path in spectra])
    longest = max(values.size for values in spectra.values())
    marker = "o" if longest <= 32 else None
    handles = []
    labels = list(groups)
    for i, label in enumerate(labels):
        members = [spectra[module.path] for module in groups[label]]
        relative, energy = _relative(members, longest)
        for axes, rows in ((left, relative), (right, energy)):
            x, median, _, _ = _median_band(rows)
            (line,) = axes.plot(
                x, median, marker=marker, markersize=3.5, linewidth=1.6, **line_style(i)
            )
        handles.append(line)
    if len(spectra) > FEW:
        # One band for all: one for each line would cover the others.
        for axes, rows in zip(
            (left, right), _relative(list(spectra.values()), longest), strict=True
        ):
            x, _, low, high = _median_band(rows)
            axes.fill_between(x, low, high, color=ABSENT, linewidth=0, zorder=0)
    _ratio_axis(left)
    for share in (0.9, 0.99):
        right.axhline(share, color=GUIDE, linewidth=0.8, linestyle=":")
        right.annotate(f"{share:.0%}", (1, share), xycoords=("axes fraction", "data"), fontsize=8,
                       xytext=(-2, -2), textcoords="offset points", ha="right", va="top",
                       color=GUIDE)  # fmt: skip
    right.set_ylim(0, 1.04)
    for axes in (left, right):
        axes.set_xticks(_counted(longest))
        margin = max(0.5, 0.03 * longest)
        axes.set_xlim(1 - margin, longest + margin)
    sizes = [len(groups[label]) for label in labels]
    if max(sizes) > 1:
        shown = [f"{label}  ({n})" for label, n in zip(truncate_all(labels), sizes, strict=True)]
        heading = "median of each (number of modules); grey: 10–90 % of all modules"
    else:
        shown, heading = truncate_all(labels), None
    legend_below(figure, handles, shown, heading)
    return figure


def _ratio_axis(axes: Axes) -> None:
    """A logarithmic axis of ratios up to 1, with 2 and 5 of each power where these are few."""
    from matplotlib.ticker import FuncFormatter, LogLocator, NullFormatter

    axes.set_yscale("log")
    # A single value of 1 would be shown between 0.1 and 10.
    low = min(axes.get_ylim()[0], 0.5) if axes.dataLim.ymin < 1 else 0.5
    decades = -math.log10(low)
    axes.set_ylim(low, 10 ** (0.05 * decades))
    if decades <= 3:
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.grid(True, axis="y", which="major", linewidth=0.5, alpha=0.4)


def _counted(longest: int) -> list[int]:
    """Ticks from 1 to the number of values: all of them, or round ones between."""
    step = next(
        nice for nice in (1, 2, 5, 10, 20, 50, 100, 200, 500, longest) if longest <= 16 * nice
    )
    return [1, *range(max(2, step), longest + 1, step)] if step > 1 else list(range(1, longest + 1))


def _spectrum_groups(modules: Sequence[ModuleAnalysis]) -> dict[str, list[ModuleAnalysis]]:
    """Modules that share a line: each alone, those of a layer or of similar ones, or all."""
    if len(modules) <= FEW:
        return {module.path: [module] for module in modules}
    return group_modules(modules, 2 * FEW)


def _relative(
    spectra: Sequence[NDArray[np.float64]], length: int
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """σᵢ/σ₁ and the cumulative share of energy, a row for each spectrum, NaN after its end."""
    relative = np.full((len(spectra), length), math.nan)
    for i, values in enumerate(spectra):
        relative[i, : values.size] = values / values[0]
    energy = np.cumsum(relative**2, axis=1)
    energy /= np.nanmax(energy, axis=1, keepdims=True)
    # Zero has no place on a logarithmic axis.
    relative[relative <= 0] = math.nan
    return relative, energy


def _median_band(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Position, median, 10th and 90th percentile of each column that has any value."""
    columns = np.flatnonzero(np.isfinite(rows).any(axis=0))
    low, median, high = np.nanpercentile(rows[:, columns], [10, 50, 90], axis=0)
    return (columns + 1).astype(float), median, low, high


def _weights(axes: Axes, statistics: TensorStatistics, *, is_logarithmic: bool) -> None:
    style_axes(axes, "Distribution", "weight", "count")
    if not is_drawable(statistics.histogram):
        draw_empty(axes, "no finite weights")
        return
    label = filled_histogram(axes, statistics.histogram, is_logarithmic=is_logarithmic)
    axes.set_ylabel(label, fontsize=LABEL_SIZE)
    low, high = (statistics.percentiles.get(p, math.nan) for p in (5.0, 95.0))
    axes.set_xlabel(f"weight\n{_figures(statistics)}", fontsize=LABEL_SIZE)
    style: dict[str, Any] = {"color": COLORS[3], "linewidth": 1.2}
    handles = []
    if math.isfinite(statistics.mean):
        handles.append(axes.axvline(statistics.mean, label="mean", **style))
    if math.isfinite(low) and math.isfinite(high):
        axes.axvline(low, linestyle="--", **style)
        label = "5th and 95th percentile"
        handles.append(axes.axvline(high, linestyle="--", label=label, **style))
    legend_above(axes, handles)


def _figures(statistics: TensorStatistics) -> str:
    """The figures that a reader of the histogram asks for, as one line."""
    parts = [
        f"n = {statistics.count:,}",
        f"mean = {format_number(statistics.mean, 3)}",
        f"std = {format_number(statistics.std, 3)}",
        f"from {format_number(statistics.min, 3)} to {format_number(statistics.max, 3)}",
    ]
    if statistics.non_finite:
        parts.append(f"{statistics.non_finite:,} not finite")
    return "   ".join(parts)


def _log_weights(axes: Axes, statistics: TensorStatistics, *, is_logarithmic: bool) -> None:
    style_axes(axes, "Distribution of magnitudes", "log₁₀(|w| + 1e-8)", "count")
    if not is_drawable(statistics.log_histogram):
        draw_empty(axes, "no finite weights")
        return
    label = filled_histogram(axes, statistics.log_histogram, is_logarithmic=is_logarithmic)
    axes.set_ylabel(label, fontsize=LABEL_SIZE)
    if statistics.zero_share > 0:
        zeros = format_percent(statistics.zero_share)
        axes.set_xlabel(
            f"log₁₀(|w| + 1e-8)\nat −8: exact zeros, {zeros} of all", fontsize=LABEL_SIZE
        )
