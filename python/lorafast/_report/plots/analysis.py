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
from lorafast._report.plots.style import (
    ABSENT,
    GUIDE,
    LABEL_SIZE,
    TICK_SIZE,
    draw_empty,
    draw_grid,
    filled_histogram,
    finite,
    grid_of,
    grid_size,
    is_drawable,
    legend_above,
    line_style,
    new_figure,
    style_axes,
    thin_ticks,
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
    caption="weights, log-scale weights, mean and standard deviation by layer",
    page=True,
    file="{name}_weight_analysis.png",
)
def overview(analysis: AdapterAnalysis) -> Figure:
    """Weights, their magnitudes, and mean and standard deviation by layer."""
    figure = new_figure(14, 10, f"{truncate(analysis.name)}: stored weights")
    panels = figure.subplots(2, 2)
    _weights(panels[0, 0], analysis.weights)
    _log_weights(panels[0, 1], analysis.weights)
    _by_layer(panels[1, 0], analysis, "mean")
    _by_layer(panels[1, 1], analysis, "std")
    return figure


@plot("weights", caption="distribution of the stored weights")
def weights(analysis: AdapterAnalysis) -> Figure:
    """The distribution of all stored weights, with mean and percentiles."""
    figure = new_figure(10, 6, f"{truncate(analysis.name)}: stored weights")
    _weights(figure.subplots(), analysis.weights)
    return figure


@plot("log_weights", caption="distribution of the stored weights' magnitudes")
def log_weights(analysis: AdapterAnalysis) -> Figure:
    """The distribution of the stored weights' magnitudes."""
    figure = new_figure(10, 6, f"{truncate(analysis.name)}: magnitudes of the stored weights")
    _log_weights(figure.subplots(), analysis.weights)
    return figure


@plot("layers", caption="mean and standard deviation of the stored factors by layer")
def layers(analysis: AdapterAnalysis) -> Figure:
    """Mean and standard deviation of the stored factors of each layer."""
    figure = new_figure(13, 9, f"{truncate(analysis.name)}: stored factors by layer")
    upper, lower = figure.subplots(2, 1)
    _by_layer(upper, analysis, "mean")
    _by_layer(lower, analysis, "std")
    return figure


@plot("heatmap", caption="‖ΔW‖ by block and module", page=True, file="{name}_weight_heatmap.png")
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
        draw_empty(axes, "the adapter updates no module")
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
    from matplotlib.ticker import MaxNLocator

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
        draw_empty(left, "no update with a spectrum:\nall are zero or not finite")
        draw_empty(right, "")
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
    left.set_yscale("log")
    left.grid(True, axis="y", which="major", linewidth=0.5, alpha=0.4)
    for share in (0.9, 0.99):
        right.axhline(share, color=GUIDE, linewidth=0.8, linestyle=":")
        right.annotate(f"{share:.0%}", (1, share), xycoords=("axes fraction", "data"), fontsize=8,
                       xytext=(-2, -2), textcoords="offset points", ha="right", va="top",
                       color=GUIDE)  # fmt: skip
    right.set_ylim(0, 1.04)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(16, integer=True, min_n_ticks=1))
        margin = max(0.5, 0.03 * longest)
        axes.set_xlim(1 - margin, longest + margin)
    sizes = [len(groups[label]) for label in labels]
    if max(sizes) > 1:
        shown = [f"{label}  ({n})" for label, n in zip(truncate_all(labels), sizes, strict=True)]
        heading = "median of each (number of modules); grey: 10–90 % of all modules"
    else:
        shown, heading = truncate_all(labels), None
    legend = figure.legend(handles, ["" for _ in shown], loc="outside lower center", fontsize=8,
                           ncols=min(4, len(shown)), frameon=False, title=heading,
                           title_fontsize=8)  # fmt: skip
    for text, label in zip(legend.get_texts(), shown, strict=True):
        text.set_parse_math(False)
        text.set_text(label)
    return figure


def _spectrum_groups(modules: Sequence[ModuleAnalysis]) -> dict[str, list[ModuleAnalysis]]:
    """Modules that share a line: each alone, those of one place in the block, or all."""
    if len(modules) <= FEW:
        return {module.path: [module] for module in modules}
    for names in (
        [module.layer for module in modules],
        [module.layer.rpartition(".")[2] for module in modules],
    ):
        groups: dict[str, list[ModuleAnalysis]] = {}
        for name, module in zip(names, modules, strict=True):
            groups.setdefault(name, []).append(module)
        if len(groups) <= 2 * FEW:
            return groups
    return {"all modules": list(modules)}


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


def _weights(axes: Axes, statistics: TensorStatistics) -> None:
    style_axes(axes, "Distribution", "weight", "count")
    if not is_drawable(statistics.histogram):
        draw_empty(axes, "no finite weights")
        return
    axes.set_ylabel(filled_histogram(axes, statistics.histogram), fontsize=LABEL_SIZE)
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


def _log_weights(axes: Axes, statistics: TensorStatistics) -> None:
    style_axes(axes, "Distribution of magnitudes", "log₁₀(|w| + 1e-8)", "count")
    if not is_drawable(statistics.log_histogram):
        draw_empty(axes, "no finite weights")
        return
    axes.set_ylabel(filled_histogram(axes, statistics.log_histogram), fontsize=LABEL_SIZE)
    if statistics.zero_share > 0:
        zeros = format_percent(statistics.zero_share)
        axes.set_xlabel(
            f"log₁₀(|w| + 1e-8)\nat −8: exact zeros, {zeros} of all", fontsize=LABEL_SIZE
        )


def _by_layer(axes: Axes, analysis: AdapterAnalysis, figure: str) -> None:
    """A point for A and a point for B of every module, in the order of the blocks."""
    title = {"mean": "Mean by layer", "std": "Standard deviation by layer"}[figure]
    modules = sorted(
        analysis.modules.values(),
        key=lambda module: -1 if module.block is None else module.block,
    )
    style_axes(axes, title, "", figure)
    if not modules:
        draw_empty(axes, "the adapter updates no module")
        return
    factors = (("A", "a_name", COLORS[0], "o"), ("B", "b_name", COLORS[1], "^"))
    x = np.arange(len(modules))
    size = 5.0 if len(modules) <= 40 else 3.0 if len(modules) <= 250 else 2.0
    width = 1.0 if len(modules) <= 250 else 0.0
    drawn = False
    for label, name, color, marker in factors:
        tensors = [analysis.tensors.get(getattr(module, name)) for module in modules]
        y = [math.nan if t is None else finite(getattr(t, figure)) for t in tensors]
        drawn = drawn or not all(math.isnan(value) for value in y)
        axes.plot(x, y, marker=marker, markersize=size, linewidth=width, alpha=0.9,
                  color=color, label=label, markeredgewidth=0)  # fmt: skip
    if not drawn:
        draw_empty(axes, "no finite statistics")
        return
    axes.set_xlim(-0.5 - 0.01 * len(modules), len(modules) - 0.5 + 0.01 * len(modules))
    if figure == "mean":
        axes.axhline(0.0, color=GUIDE, linewidth=0.8, zorder=0)
    else:
        axes.set_ylim(0.0, 1.06 * axes.dataLim.ymax or 1.0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(TICK_SIZE)
    _layer_ticks(axes, modules)
    legend_above(axes, axes.get_lines()[:2], enlarge=max(1.0, 5.0 / size))


def _layer_ticks(axes: Axes, modules: Sequence[ModuleAnalysis]) -> None:
    """Names where they fit; else the number of a block where it begins."""
    if len(modules) <= 16:
        names = [m.layer if m.block is None else f"{m.block}.{m.layer}" for m in modules]
        if all(len(name) <= 3 for name in names):
            thin_ticks(axes, "x", truncate_all(names), 16)
        else:
            thin_ticks(axes, "x", truncate_all(names, 26), 16, rotation=35)
        return
    starts: dict[str, int] = {}
    for position, module in enumerate(modules):
        starts.setdefault("none" if module.block is None else str(module.block), position)
    axes.set_xlabel("block", fontsize=LABEL_SIZE)
    if len(starts) == 1:
        thin_ticks(axes, "x", [str(i) for i in range(len(modules))], 12)
        axes.set_xlabel("module, in the order of the file", fontsize=LABEL_SIZE)
        return
    step = next(n for n in (1, 2, 4, 5, 10, 20, 50, 100, 10**9) if len(starts) / n <= 20)
    numbered = [(label, at) for label, at in starts.items() if label != "none"]
    kept = [(label, at) for label, at in numbered if int(label) % step == 0] or numbered[:1]
    axes.set_xticks([at for _, at in kept], [label for label, _ in kept])
