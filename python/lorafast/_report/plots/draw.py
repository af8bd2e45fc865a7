"""Plots of results: the list of those there are, and how one is drawn.

A plot is a function of a result with the decorator `plot`, in any module of this package:

```python
@plot("heatmap", caption="‖ΔW‖ by block and layer", page=True, file="{name}_heatmap.png")
def heatmap(analysis: AdapterAnalysis) -> Figure: ...
```

Everything is drawn from the histograms and tables that were computed, never from the weights
themselves, so that a plot costs the same for any adapter. matplotlib is imported when a figure is
asked for, through its object-oriented interface: no window, no backend, no global state. The
modules of plots import it inside their functions, so that the list is known without it.
"""

from __future__ import annotations

import inspect
import pkgutil
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from lorafast._errors import MissingDependencyError
from lorafast._report import plots
from lorafast._report.plots.canvas import drawn

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lorafast._algebra.report import AlgebraReport
    from lorafast._analysis.results import AdapterAnalysis, Comparison

    Draw = TypeVar("Draw", bound=Callable[[Any], Figure])

#: What results with plots are called in messages.
NOUNS = {
    "AdapterAnalysis": "an analysis",
    "Comparison": "a comparison",
    "AlgebraReport": "a computed adapter",
}


@dataclass(frozen=True)
class Plot:
    """A plot of one class of results.

    Attributes:
        kind: its name.
        caption: what it shows.
        draw: the function that draws it.
        page: whether it stands on the HTML page of a result.
        file: the picture's file among a command's output, `{name}` in the place of the adapter's
            name; `None` for none.
    """

    kind: str
    caption: str
    draw: Callable[[Any], Figure]
    page: Callable[[Any], bool]
    file: str | None


#: For the name of a result's class its plots by their kinds, in the order of their files.
_PLOTS: dict[str, dict[str, Plot]] = {noun: {} for noun in NOUNS}


def plot(
    kind: str,
    *,
    caption: str,
    page: bool | Callable[[Any], bool] = False,
    file: str | None = None,
) -> Callable[[Draw], Draw]:
    """Makes a function a plot of the result that it takes: the one its parameter is annotated with.

    Args:
        kind: the plot's name, as `result.plot` takes it.
        caption: what it shows, in a few words.
        page: whether it stands on the HTML page; a function decides it for each result.
        file: the picture's file that a command writes, `{name}` in the place of the adapter's
            name; `None` for none.
    """

    def register(draw: Draw) -> Draw:
        first, *_ = inspect.signature(draw).parameters.values()
        subject = str(first.annotation).rpartition(".")[2]
        if subject not in _PLOTS:
            known = ", ".join(_PLOTS)
            raise TypeError(f"the plot {kind!r} is of {subject!r}; plots are of: {known}")
        shown = page if callable(page) else lambda _: bool(page)
        _PLOTS[subject][kind] = Plot(kind, caption, draw, shown, file)
        return draw

    return register


@cache
def _load() -> None:
    """Imports every module of this package, so that their plots are in the list."""
    for module in pkgutil.iter_modules(plots.__path__):
        # matplotlib's own class, and what this module is.
        if module.name not in {"figure", "draw"}:
            import_module(f"{plots.__name__}.{module.name}")


def plots_of(result: str | AdapterAnalysis | AlgebraReport | Comparison) -> dict[str, Plot]:
    """The plots of a result, or of those of a class by its name, by their kinds."""
    _load()
    if isinstance(result, str):
        return dict(_PLOTS[result])
    names = (each.__name__ for each in type(result).__mro__)
    return dict(next(_PLOTS[name] for name in names if name in _PLOTS))


def draw(
    result: AdapterAnalysis | AlgebraReport | Comparison, kind: str, ax: Axes | None = None
) -> Figure:
    """Draws one plot of a result.

    Args:
        result: what to draw.
        kind: the name of one of its plots.
        ax: the axes to draw into; a new figure is made if `None`.

    Returns:
        A matplotlib Figure that belongs to no window, or the one of `ax`; a notebook shows it.

    Raises:
        ValueError: there is no such plot, or it does not fit into `ax`.
        MissingDependencyError: matplotlib is not installed.
    """
    known = plots_of(result)
    if kind not in known:
        noun = next(NOUNS[each.__name__] for each in type(result).__mro__ if each.__name__ in NOUNS)
        raise ValueError(f"no plot {kind!r} of {noun}; there are: {', '.join(known)}")
    try:
        import matplotlib  # noqa: F401  # asked for here so that its absence has one message
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is needed to draw plots; install it with: pip install matplotlib"
        ) from error
    from lorafast._report.plots.fonts import use_fonts

    figure = drawn(lambda: known[kind].draw(result), ax)
    use_fonts(figure)
    return figure
