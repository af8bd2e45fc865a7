"""A matplotlib figure that notebooks show; imported only where matplotlib is at hand."""

from __future__ import annotations

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class PlotFigure(Figure):
    """A Figure of no window, drawn by Agg.

    IPython knows how to show a figure only after pyplot was imported; the method below lets it
    show this one without.
    """

    def _repr_png_(self) -> bytes:
        from lorafast._report.plots.png import png

        return png(self)


def new_figure(width: float, height: float, title: str) -> PlotFigure:
    """An empty figure with a title, of a size in inches."""
    figure = PlotFigure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    figure.suptitle(title, fontsize=13, parse_math=False)
    return figure
