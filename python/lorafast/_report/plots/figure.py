"""A matplotlib figure that notebooks show; imported only where matplotlib is at hand."""

from __future__ import annotations

from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure


class PlotFigure(Figure):
    """A Figure of no window, drawn by Agg.

    IPython knows how to show a figure only after pyplot was imported; the method below lets it
    show this one without.
    """

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        FigureCanvasAgg(self)

    def _repr_png_(self) -> bytes:
        from lorafast._report.plots.png import png

        return png(self)
