"""The singular values of an adapter that was computed, with the cut drawn in."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from lorafast._algebra.report import AlgebraReport
from lorafast._report.palette import COLORS
from lorafast._report.plots.draw import plot
from lorafast._report.plots.style import (
    GUIDE,
    draw_empty,
    legend_above,
    new_figure,
    style_axes,
)

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Smaller shares of the first value are drawn at the bottom: rounding would take all the height.
LEAST = 1e-8
#: From so many modules on, their lines are paler.
CROWDED = 40


@plot("scree", caption="singular values of ΔW by module, and where they are cut")
def scree(report: AlgebraReport) -> Figure:
    """Draws σ/σ₁ of every module, what is kept before a point at the last value that is."""
    from matplotlib.collections import LineCollection
    from matplotlib.lines import Line2D

    figure = new_figure(7.2, 4.4, "Singular values")
    axes = figure.subplots()
    style_axes(axes, "Singular values of ΔW and the cut", "number of the value", "σ / σ₁")
    kept, cut, ends = [], [], []
    for module in report.modules.values():
        values = np.asarray(module.singular_values, dtype=float)
        if values.size == 0 or not values[0] > 0:
            continue
        curve = np.column_stack(
            [np.arange(1, values.size + 1), np.maximum(values / values[0], LEAST)]
        )
        last = min(module.rank, values.size)
        kept.append(curve[:last])
        cut.append(curve[max(last - 1, 0) :])
        if last:
            ends.append(curve[last - 1])
    if not kept:
        draw_empty(axes, "no singular values were asked for: nothing is cut")
        return figure
    alpha = 0.25 if len(kept) >= CROWDED else 0.7
    axes.add_collection(LineCollection(cut, colors=GUIDE, linewidths=0.8, alpha=alpha))
    axes.add_collection(LineCollection(kept, colors=COLORS[0], linewidths=0.9, alpha=alpha))
    points = np.array(ends).reshape(-1, 2)
    axes.plot(points[:, 0], points[:, 1], "o", color=COLORS[1], markersize=4, zorder=3)
    axes.set_yscale("log")
    axes.autoscale_view()
    longest = max(len(one) for one in cut + kept)
    axes.set_xlim(0.5, max(longest, float(max(one[-1, 0] for one in cut))) + 0.5)
    handles = [
        Line2D([], [], color=COLORS[0], label="kept"),
        Line2D([], [], color=GUIDE, label="cut off"),
        Line2D([], [], color=COLORS[1], marker="o", linestyle="", label="last that is kept"),
    ]
    legend_above(axes, handles)
    return figure
