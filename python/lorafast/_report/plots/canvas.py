"""Axes of a caller's figure in the place of a new figure."""

from __future__ import annotations

from collections.abc import Callable
from contextvars import ContextVar
from typing import TYPE_CHECKING, Any, cast

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure, SubFigure

# Plots ask `style.new_figure` for what they draw into, and most callers want a new figure: the axes
# of the others do not pass through every plot.
_GIVEN: ContextVar[Axes | None] = ContextVar("axes", default=None)


def drawn(draw: Callable[[], Figure], ax: Axes | None) -> Figure:
    """What a function draws, into a figure of its own or into a caller's axes.

    Args:
        draw: makes the plot, in what `style.new_figure` gives it.
        ax: the axes; a new figure is made if `None`.

    Returns:
        The figure, which is the one of `ax` where that is given.

    Raises:
        ValueError: the plot has several panels, and the axes are no cell of a grid.
        TypeError: `ax` is something else than axes.
    """
    if ax is None:
        return draw()
    if not hasattr(ax, "get_subplotspec"):
        raise TypeError(f"ax must be matplotlib's axes, not {type(ax).__name__}")
    token = _GIVEN.set(ax)
    figure: Any = ax.figure
    try:
        draw()
    finally:
        _GIVEN.reset(token)
    # The figure of a subfigure is the whole one.
    return cast("Figure", figure.figure or figure)


def of_axes(title: str) -> Figure | None:
    """What stands for a figure that is drawn into a caller's axes; `None` without such axes."""
    ax = _GIVEN.get()
    return None if ax is None else cast("Figure", _Canvas(ax, title))


class _Canvas:
    """What plots use of a figure, in the place of some axes."""

    def __init__(self, ax: Axes, title: str) -> None:
        self._ax = ax
        self._title = title
        self._inner: SubFigure | None = None

    def subplots(self, *grid: Any, **options: Any) -> Any:
        """The axes themselves for a plot of one panel, and else panels in their place."""
        if not grid and not options:
            # On the left, where a panel with a title of its own has that.
            self._ax.set_title(self._title, loc="left", parse_math=False)
            return self._ax
        place = self._ax.get_subplotspec()
        if place is None:
            raise ValueError(
                "this plot has several panels, and ax is no cell of a grid; take axes of "
                "plt.subplots(), or leave ax out"
            )
        whole: Any = self._ax.figure
        self._ax.remove()
        inner: SubFigure = whole.add_subfigure(place)
        inner.suptitle(self._title, parse_math=False)
        self._inner = inner
        return inner.subplots(*grid, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ax.figure if self._inner is None else self._inner, name)
