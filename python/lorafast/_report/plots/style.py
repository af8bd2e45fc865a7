"""What the plots share: colors, labels that fit, ticks that stay readable, histograms, grids."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafast._analysis.records import Histogram, ModuleAnalysis, ModuleComparison
from lorafast._report.palette import COLORS
from lorafast._report.plots import canvas
from lorafast._report.plots.fonts import drawable, shorten, width

if TYPE_CHECKING:
    from matplotlib.artist import Artist
    from matplotlib.axes import Axes
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

#: Beside the color, so that more lines than colors stay distinct.
LINES = ["-", "--", "-.", ":"]
ABSENT = "#d9d9d9"
GUIDE = "#767676"

TICK_SIZE = 8
LABEL_SIZE = 10
#: Width of a title's letter, in inches.
TITLE_LETTER = 0.115
#: Longest label of a heatmap's row, in characters.
ROW_LABEL = 70
#: Of a heatmap's cell, in inches, while the columns are few.
CELL_WIDTH = 0.42
#: From the first to the last block of a heatmap, so that those between them have columns.
MOST_BLOCKS = 256


def new_figure(width: float, height: float, title: str) -> Figure:
    """An empty figure with a title, of a size in inches; or the axes that a caller gave."""
    place = canvas.of_axes(title)
    if place is not None:
        return place
    from lorafast._report.plots.figure import PlotFigure

    title, lines = _broken(title, width)
    figure = PlotFigure(figsize=(width, height + 0.25 * (lines - 1)), layout="constrained")
    figure.suptitle(title, fontsize=13, parse_math=False)
    return figure


def _broken(title: str, inches: float) -> tuple[str, int]:
    """A title on as many lines as it needs: a long name has one of its own; how many they are."""
    if TITLE_LETTER * width(title) <= inches or "\n" in title or ": " not in title:
        return title, 1 + title.count("\n")
    name, _, what = title.rpartition(": ")
    return f"{name}:\n{what}", 2


def truncate(name: str, limit: int = 40) -> str:
    """A name as one line, at most as wide as `limit` letters, of characters that can be drawn."""
    return shorten(drawable(name), limit)


def truncate_all(names: Sequence[str], limit: int = 40) -> list[str]:
    """Names as `truncate` makes them; those that would become the same are numbered."""
    labels = [truncate(name, limit) for name in names]
    return [
        f"{label} ({labels[: i + 1].count(label)})" if labels.count(label) > 1 else label
        for i, label in enumerate(labels)
    ]


def finite(value: float | None) -> float:
    """A value as it can be drawn: NaN where there is none."""
    return float(value) if value is not None and math.isfinite(value) else math.nan


def line_style(i: int) -> dict[str, Any]:
    """Color and dashes of the i-th line."""
    return {
        "color": COLORS[i % len(COLORS)],
        "linestyle": LINES[i // len(COLORS) % len(LINES)],
    }


def style_axes(axes: Axes, title: str, x: str, y: str) -> None:
    """Title, labels and the quiet frame of every panel."""
    axes.set_title(title, fontsize=11, loc="left", parse_math=False)
    axes.set_xlabel(x, fontsize=LABEL_SIZE)
    axes.set_ylabel(y, fontsize=LABEL_SIZE)
    axes.tick_params(labelsize=TICK_SIZE)
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(True, axis="y", linewidth=0.5, alpha=0.4)
    axes.set_axisbelow(True)


def legend_above(axes: Axes, handles: Sequence[Artist], *, enlarge: float = 1.0) -> None:
    """A legend on the line of the title, where it covers nothing; its markers enlarged."""
    if handles:
        axes.legend(
            handles=handles, fontsize=8, frameon=False, ncols=len(handles), loc="lower right",
            bbox_to_anchor=(1.0, 1.0), borderaxespad=0.2, markerscale=enlarge,
        )  # fmt: skip


def legend_below(
    figure: Figure, handles: Sequence[Artist], labels: Sequence[str], heading: str | None = None
) -> None:
    """A legend below the panels, for all of them; its labels are written as they are."""
    legend = figure.legend(handles, ["" for _ in labels], loc="outside lower center", fontsize=8,
                           ncols=min(4, len(labels)), frameon=False, title=heading,
                           title_fontsize=8)  # fmt: skip
    for text, label in zip(legend.get_texts(), labels, strict=True):
        text.set_parse_math(False)
        text.set_text(label)


def draw_empty(axes: Axes, reason: str) -> None:
    """Says in an empty panel why it is empty."""
    axes.text(0.5, 0.5, reason, transform=axes.transAxes, ha="center", va="center", wrap=True)
    axes.set_xticks([])
    axes.set_yticks([])
    axes.grid(False)


def is_steep(histogram: Histogram) -> bool:
    """Whether one bin would flatten all others, as that of an untrained B's zeros does."""
    counts = np.asarray(histogram.counts, dtype=float)
    filled = counts[counts > 0]
    return bool(filled.size > 2 and filled.max() > 100 * np.median(filled))


def count_axis(axes: Axes, *, is_logarithmic: bool) -> str:
    """Writes counts as 20 k or 3 M.

    Returns:
        What to label the axis with.
    """
    from matplotlib.ticker import EngFormatter, NullFormatter

    if is_logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_minor_formatter(NullFormatter())
    axes.yaxis.set_major_formatter(EngFormatter(sep=" "))
    return "count (logarithmic)" if is_logarithmic else "count"


def is_drawable(histogram: Histogram) -> bool:
    """Whether a histogram has anything to draw: finite ascending edges and any count."""
    edges = np.asarray(histogram.edges, dtype=float)
    return bool(
        edges.size >= 2
        and len(histogram.counts) == edges.size - 1
        and np.isfinite(edges).all()
        and edges[-1] > edges[0]
        and sum(histogram.counts) > 0
    )


def filled_histogram(axes: Axes, histogram: Histogram, *, is_logarithmic: bool) -> str:
    """Draws a histogram as one filled outline; returns the label of the count axis."""
    counts = np.asarray(histogram.counts, dtype=float)
    label = count_axis(axes, is_logarithmic=is_logarithmic)
    baseline = 0.8 if axes.get_yscale() == "log" else 0.0
    # A filled area whose lower end is 0 cannot be drawn on a logarithmic axis.
    axes.stairs(np.maximum(counts, baseline), histogram.edges, baseline=baseline, fill=True,
                facecolor=COLORS[0], edgecolor=COLORS[0], linewidth=0.6)  # fmt: skip
    axes.set_ylim(bottom=baseline)
    return label


def thin_ticks(
    axes: Axes, which: str, labels: Sequence[str], most: int, rotation: float = 0.0
) -> None:
    """Puts labels at 0, 1, 2, …, every k-th of them where there are more than `most`.

    Args:
        axes: the panel.
        which: x or y.
        labels: a label for each position.
        most: how many fit.
        rotation: of labels along x, in degrees.
    """
    step = max(1, math.ceil(len(labels) / most))
    # 2, 5, 10, … are easier to count by than 3, 7, 11.
    step = next(nice for nice in (1, 2, 5, 10, 20, 50, 100, 200, 500, 10**9) if nice >= step)
    positions = list(range(0, len(labels), step))
    shown = [labels[i] for i in positions]
    axis = axes.xaxis if which == "x" else axes.yaxis
    axis.set_ticks(positions)
    axis.set_ticklabels(shown, parse_math=False)
    if rotation:
        for text in axis.get_ticklabels():
            text.set(rotation=rotation, ha="right", rotation_mode="anchor")


def grid_of(
    modules: Sequence[ModuleAnalysis | ModuleComparison],
    values: Sequence[float | None],
    labels: Sequence[str] | None = None,
) -> tuple[list[str], list[str], NDArray[np.float64], NDArray[np.bool_]]:
    """Arranges a value of each module by layer (rows) and block (columns).

    Modules outside of any block stand in a column of their own, the first.

    Args:
        modules: what stands in the grid.
        values: a value of each.
        labels: the row of each, if that is not its layer.

    Returns:
        Row labels, column labels, the values (NaN where there is none), and where a module is.
    """
    layers = [module.layer for module in modules] if labels is None else list(labels)
    rows = list(dict.fromkeys(layers))
    numbers = sorted({module.block for module in modules if module.block is not None})
    if numbers and numbers[-1] - numbers[0] < MOST_BLOCKS:
        # Blocks without a module are columns, too.
        numbers = list(range(numbers[0], numbers[-1] + 1))
    blocks: list[int | None] = [*numbers]
    if any(module.block is None for module in modules):
        blocks = [None, *blocks]
    row_of = {row: i for i, row in enumerate(rows)}
    column_of = {block: i for i, block in enumerate(blocks)}
    total = np.zeros((len(rows), len(blocks)))
    present = np.zeros(total.shape, dtype=int)
    for module, layer, value in zip(modules, layers, values, strict=True):
        cell = row_of[layer], column_of[module.block]
        total[cell] += finite(value)
        present[cell] += 1
    # Two modules fall into one cell where a model has two stacks of blocks: their mean is shown.
    means = np.divide(total, present, out=np.full(total.shape, np.nan), where=present > 0)
    return rows, ["none" if b is None else str(b) for b in blocks], means, present > 0


def grid_size(rows: Sequence[str], columns: Sequence[str]) -> tuple[float, float]:
    """Width and height in inches in which the cells and the labels of a grid fit."""
    longest = max((width(truncate(row, ROW_LABEL)) for row in rows), default=0)
    across = 2.2 + 0.075 * longest + max(2.5, min(14.0, CELL_WIDTH * len(columns)))
    height = 1.4 + min(24.0, (0.32 if len(rows) <= 12 else 0.18) * max(3, len(rows)))
    return max(7.0, across), max(3.0, height)


def draw_grid(
    figure: Figure,
    axes: Axes,
    grid: tuple[list[str], list[str], NDArray[np.float64], NDArray[np.bool_]],
    *,
    colors: Colormap,
    scale: Normalize,
    label: str,
    number: str = ".2g",
) -> None:
    """Draws what `grid_of` arranged as a heatmap: grey without a module, × without a value."""
    rows, columns, values, present = grid
    axes.set_facecolor(ABSENT)
    image = axes.imshow(np.ma.masked_invalid(values), aspect="auto", interpolation="nearest",
                        cmap=colors, norm=scale)  # fmt: skip
    axes.tick_params(labelsize=TICK_SIZE)
    thin_ticks(axes, "y", truncate_all(rows, ROW_LABEL), 130)
    thin_ticks(axes, "x", columns, 40)
    axes.set_xlabel("block", fontsize=LABEL_SIZE)
    if columns == ["none"]:
        axes.set_xticks([])
        axes.set_xlabel("")
    axes.set_xticks(np.arange(-0.5, len(columns)), minor=True)
    axes.set_yticks(np.arange(-0.5, len(rows)), minor=True)
    if max(values.shape) <= 100:
        axes.grid(which="minor", color="white", linewidth=0.8)
    axes.tick_params(which="minor", length=0)
    bar = figure.colorbar(
        image, ax=axes, pad=0.01, fraction=0.05, aspect=max(10, min(40, 2 * len(rows)))
    )
    bar.set_label(label, fontsize=LABEL_SIZE)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    draw_undefined(axes, present & ~np.isfinite(values))
    longest = max((len(f"{v:z{number}}") for v in values[np.isfinite(values)]), default=0)
    # A character of this size is 0.075 inches wide.
    room = max(2.5, CELL_WIDTH * len(columns)) / len(columns)
    if len(columns) <= 14 and len(rows) <= 40 and 0.075 * longest <= room:
        annotate(axes, values, colors, scale, size=8, number=number)


def annotate(
    axes: Axes,
    values: NDArray[np.float64],
    colors: Colormap,
    scale: Normalize,
    *,
    size: float,
    number: str,
) -> None:
    """Writes each finite value into its cell, black or white, whichever is legible there."""
    for row, column in np.argwhere(np.isfinite(values)):
        value = float(values[row, column])
        # With z, what rounds to zero has no minus.
        axes.text(column, row, f"{value:z{number}}", ha="center", va="center", fontsize=size,
                  color="black" if _is_light(colors(float(scale(value)))) else "white")  # fmt: skip


def _is_light(color: tuple[float, float, float, float]) -> bool:
    """Whether black has more contrast to a color than white has, as WCAG 2 reckons contrast."""
    red, green, blue = (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4
                        for c in color[:3])  # fmt: skip
    return 0.2126 * red + 0.7152 * green + 0.0722 * blue > 0.179


def draw_undefined(axes: Axes, where: NDArray[np.bool_]) -> None:
    """Marks the cells of a heatmap that have no value though there is something to measure."""
    for row, column in np.argwhere(where):
        axes.text(column, row, "×", ha="center", va="center", color="#B00020", fontsize=9)
