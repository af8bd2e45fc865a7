"""The plots of one adapter."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorafast._plots import _figure
from lorafast._plots._style import (
    COLOURS,
    GUIDE,
    LABEL_SIZE,
    TICK_SIZE,
    draw_grid,
    dress,
    filled_histogram,
    finite,
    fit,
    fit_all,
    grid_of,
    line_style,
    nothing,
    short,
    thin_ticks,
    usable,
)
from lorafast._records import AdapterAnalysis, ModuleAnalysis, TensorStatistics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colors import Normalize
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

#: Up to so many modules each has its own line and its own label.
FEW = 8


def weights(analysis: AdapterAnalysis) -> Figure:
    """The distribution of all stored weights, with mean and percentiles."""
    figure = _figure.new(10, 6, f"{fit(analysis.name)}: stored weights")
    _weights(figure.subplots(), analysis.weights)
    return figure


def log_weights(analysis: AdapterAnalysis) -> Figure:
    """The distribution of the stored weights' magnitudes."""
    figure = _figure.new(10, 6, f"{fit(analysis.name)}: magnitudes of the stored weights")
    _log_weights(figure.subplots(), analysis.weights)
    return figure


def layers(analysis: AdapterAnalysis) -> Figure:
    """Mean and standard deviation of the stored factors of each layer."""
    figure = _figure.new(13, 9, f"{fit(analysis.name)}: stored factors by layer")
    upper, lower = figure.subplots(2, 1)
    _by_layer(upper, analysis, "mean")
    _by_layer(lower, analysis, "std")
    return figure


def overview(analysis: AdapterAnalysis) -> Figure:
    """Weights, their magnitudes, and mean and standard deviation by layer."""
    figure = _figure.new(14, 10, f"{fit(analysis.name)}: stored weights")
    panels = figure.subplots(2, 2)
    _weights(panels[0, 0], analysis.weights)
    _log_weights(panels[0, 1], analysis.weights)
    _by_layer(panels[1, 0], analysis, "mean")
    _by_layer(panels[1, 1], analysis, "std")
    return figure


def heatmap(analysis: AdapterAnalysis) -> Figure:
    """‖ΔW‖ of each module, blocks from left to right."""
    from matplotlib import colormaps

    modules = list(analysis.modules.values())
    grid = grid_of(modules, [module.frobenius_norm for module in modules])
    rows, columns, values, _ = grid
    width = min(16.0, max(7.0, 4.5 + 0.32 * len(columns)))
    height = min(16.0, max(3.0, 1.8 + 0.3 * len(rows)))
    figure = _figure.new(width, height, f"{fit(analysis.name)}: size of the update of each module")
    axes = figure.subplots()
    if not modules:
        nothing(axes, "the adapter updates no module")
        return figure
    draw_grid(figure, axes, grid, colours=colormaps["cividis"], scale=_norm_scale(values),
              label="‖ΔW‖ (Frobenius)")  # fmt: skip
    return figure


def _norm_scale(values: NDArray[np.float64]) -> Normalize:
    """From 0 to the greatest norm; logarithmic where norms span more than three decades."""
    from matplotlib.colors import LogNorm, Normalize

    positive = values[np.isfinite(values) & (values > 0)]
    if not positive.size:
        return Normalize(0.0, 1.0)
    if positive.max() > 1000 * positive.min():
        # Zero norms have no logarithm: they are drawn as the least colour.
        return LogNorm(positive.min(), positive.max(), clip=True)
    return Normalize(0.0, float(positive.max()))


def spectrum(analysis: AdapterAnalysis) -> Figure:
    """Singular values relative to the greatest, and the share of ‖ΔW‖² in the first k of them."""
    from matplotlib.ticker import MaxNLocator

    figure = _figure.new(13, 5.8, f"{fit(analysis.name)}: singular values of the updates")
    left, right = figure.subplots(1, 2)
    dress(left, "Scree", "i", "σᵢ / σ₁")
    dress(right, "Cumulative energy", "k", "share of ‖ΔW‖² in the first k")
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
        nothing(left, "no update with a spectrum:\nall are zero or not finite")
        nothing(right, "")
        return figure
    groups = _spectrum_groups([analysis.modules[path] for path in spectra])
    longest = max(values.size for values in spectra.values())
    marker = "o" if longest <= 32 else None
    handles = []
    labels = list(groups)
    for i, label in enumerate(labels):
        members = [spectra[module.path] for module in groups[label]]
        relative = _stack([values / values[0] for values in members], longest, math.nan)
        energy = _stack(
            [np.cumsum((values / values[0]) ** 2) for values in members], longest, math.nan
        )
        energy = energy / np.nanmax(energy, axis=1, keepdims=True)
        for axes, rows in ((left, relative), (right, energy)):
            if axes is left:
                rows[rows <= 0] = math.nan
            x, median, low, high = _median_band(rows)
            style = line_style(i)
            (line,) = axes.plot(x, median, marker=marker, markersize=3.5, linewidth=1.6, **style)
            if len(members) > 1:
                axes.fill_between(x, low, high, color=style["color"], alpha=0.13, linewidth=0)
        handles.append(line)
    left.set_yscale("log")
    left.grid(True, axis="y", which="major", linewidth=0.5, alpha=0.4)
    for share in (0.9, 0.99):
        right.axhline(share, color=GUIDE, linewidth=0.8, linestyle=":")
        right.annotate(f"{share:.0%}", (1, share), xycoords=("axes fraction", "data"), fontsize=8,
                       xytext=(-2, -2), textcoords="offset points", ha="right", va="top",
                       color=GUIDE)  # fmt: skip
    right.set_ylim(0, 1.04)
    for axes in (left, right):
        axes.xaxis.set_major_locator(MaxNLocator(integer=True))
        axes.set_xlim(1 - 0.03 * longest, longest + 0.03 * longest)
    sizes = [len(groups[label]) for label in labels]
    if max(sizes) > 1:
        shown = [f"{label}  ({n})" for label, n in zip(fit_all(labels), sizes, strict=True)]
        heading = "median and 10–90 % of"
    else:
        shown, heading = fit_all(labels), None
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
    for key in (lambda m: m.layer, lambda m: m.layer.rpartition(".")[2]):
        groups: dict[str, list[ModuleAnalysis]] = {}
        for module in modules:
            groups.setdefault(key(module), []).append(module)
        if len(groups) <= 2 * FEW:
            return groups
    return {"all modules": list(modules)}


def _stack(rows: Sequence[NDArray[np.float64]], length: int, fill: float) -> NDArray[np.float64]:
    """Rows of different lengths as one matrix."""
    matrix = np.full((len(rows), length), fill)
    for i, row in enumerate(rows):
        matrix[i, : row.size] = row
    return matrix


def _median_band(rows: NDArray[np.float64]) -> tuple[NDArray[np.float64], ...]:
    """Position, median, 10th and 90th percentile of each column that has any value."""
    columns = np.flatnonzero(np.isfinite(rows).any(axis=0))
    low, median, high = np.nanpercentile(rows[:, columns], [10, 50, 90], axis=0)
    return (columns + 1).astype(float), median, low, high


def _weights(axes: Axes, statistics: TensorStatistics) -> None:
    dress(axes, "Distribution", "weight", "count")
    if not usable(statistics.histogram):
        nothing(axes, "no finite weights")
        return
    axes.set_ylabel(filled_histogram(axes, statistics.histogram), fontsize=LABEL_SIZE)
    low, high = (statistics.percentiles.get(p, math.nan) for p in (5.0, 95.0))
    marks = [(statistics.mean, "mean", "-", COLOURS[3])]
    if math.isfinite(low) and math.isfinite(high):
        marks += [
            (low, "5th and 95th percentile", "--", COLOURS[3]),
            (high, None, "--", COLOURS[3]),
        ]
    for value, label, dashes, colour in marks:
        if math.isfinite(value):
            axes.axvline(value, color=colour, linestyle=dashes, linewidth=1.2, label=label)
    _note(axes, statistics)
    if math.isfinite(statistics.mean):
        axes.legend(fontsize=8, frameon=False, loc="upper right")


def _note(axes: Axes, statistics: TensorStatistics) -> None:
    """The figures a reader of the histogram asks for, in a corner above it."""
    lines = [f"n = {statistics.count:,}"]
    lines += [f"mean = {short(statistics.mean)}", f"std = {short(statistics.std)}"]
    lines += [f"[{short(statistics.min)}, {short(statistics.max)}]"]
    if statistics.non_finite:
        lines.append(f"not finite: {statistics.non_finite:,}")
    axes.margins(y=0.05)
    axes.text(0.015, 0.985, "\n".join(lines), transform=axes.transAxes, ha="left", va="top",
              fontsize=8, linespacing=1.35, parse_math=False)  # fmt: skip


def _log_weights(axes: Axes, statistics: TensorStatistics) -> None:
    dress(axes, "Distribution of magnitudes", "log₁₀(|w| + 1e-8)", "count")
    if not usable(statistics.log_histogram):
        nothing(axes, "no finite weights")
        return
    axes.set_ylabel(filled_histogram(axes, statistics.log_histogram), fontsize=LABEL_SIZE)
    if statistics.zero_share > 0:
        share = statistics.zero_share
        text = f"{share:.2g}" if share < 1e-4 else f"{share:.3%}".rstrip("0%").rstrip(".") + " %"
        axes.text(0.015, 0.985, f"at −8: exact zeros, {text} of all",
                  transform=axes.transAxes, ha="left", va="top", fontsize=8)  # fmt: skip


def _by_layer(axes: Axes, analysis: AdapterAnalysis, figure: str) -> None:
    """A point for A and a point for B of every module, in the order of the blocks."""
    title = {"mean": "Mean by layer", "std": "Standard deviation by layer"}[figure]
    modules = sorted(
        analysis.modules.values(),
        key=lambda module: -1 if module.block is None else module.block,
    )
    dress(axes, title, "", figure)
    if not modules:
        nothing(axes, "the adapter updates no module")
        return
    factors = (("A", "a_name", COLOURS[0], "o"), ("B", "b_name", COLOURS[1], "^"))
    x = np.arange(len(modules))
    size = 5.0 if len(modules) <= 40 else 3.0 if len(modules) <= 250 else 2.0
    width = 1.0 if len(modules) <= 250 else 0.0
    drawn = False
    for label, name, colour, marker in factors:
        tensors = [analysis.tensors.get(getattr(module, name)) for module in modules]
        y = [math.nan if t is None else finite(getattr(t, figure)) for t in tensors]
        drawn = drawn or not all(math.isnan(value) for value in y)
        axes.plot(x, y, marker=marker, markersize=size, linewidth=width, alpha=0.9,
                  color=colour, label=label, markeredgewidth=0)  # fmt: skip
    if not drawn:
        nothing(axes, "no finite statistics")
        return
    axes.set_xlim(-0.5 - 0.01 * len(modules), len(modules) - 0.5 + 0.01 * len(modules))
    if figure == "mean":
        axes.axhline(0.0, color=GUIDE, linewidth=0.8, zorder=0)
    else:
        axes.set_ylim(bottom=0.0)
    axes.ticklabel_format(axis="y", scilimits=(-3, 4), useMathText=True)
    axes.yaxis.get_offset_text().set_fontsize(TICK_SIZE)
    _layer_ticks(axes, modules)
    axes.legend(fontsize=8, frameon=False, ncols=2, loc="lower right", bbox_to_anchor=(1.0, 1.0),
                borderaxespad=0.2)  # fmt: skip


def _layer_ticks(axes: Axes, modules: Sequence[ModuleAnalysis]) -> None:
    """Names where they fit; else the number of a block where it begins."""
    if len(modules) <= 16:
        names = [m.layer if m.block is None else f"{m.block}.{m.layer}" for m in modules]
        if all(len(name) <= 3 for name in names):
            thin_ticks(axes, "x", fit_all(names), 16)
        else:
            thin_ticks(axes, "x", fit_all(names, 26), 16, rotation=35)
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


DRAW: dict[str, Callable[[AdapterAnalysis], Figure]] = {
    "overview": overview,
    "weights": weights,
    "log_weights": log_weights,
    "layers": layers,
    "heatmap": heatmap,
    "spectrum": spectrum,
}
