"""Plots of an analysis and of a comparison.

Everything is drawn from the histograms and tables that were computed, never from the weights
themselves, so that a plot costs the same for any adapter. matplotlib is imported when a figure is
asked for, through its object-oriented interface: no window, no backend, no global state.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from lorafast._errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from lorafast._analysis.results import AdapterAnalysis, Comparison

#: The plots of one adapter, and what each shows.
ANALYSIS_KINDS = {
    "overview": "weights, log-scale weights, mean and standard deviation by layer",
    "weights": "distribution of the stored weights",
    "log_weights": "distribution of the stored weights' magnitudes",
    "layers": "mean and standard deviation of the stored factors by layer",
    "heatmap": "‖ΔW‖ by block and module",
    "spectrum": "singular values of the updates, and their cumulative energy",
}
#: The plots of several adapters, and what each shows.
COMPARISON_KINDS = {
    "adapters": "number of parameters, mean, standard deviation and range of each adapter",
    "distributions": "distributions of the adapters' stored weights",
    "cosine": "cosine of the updates of each two adapters",
    "modules": "cosine of the updates by block and module",
}


def analysis_figure(analysis: AdapterAnalysis, kind: str) -> Figure:
    """Draws one plot of an analysis.

    Args:
        analysis: what to draw.
        kind: one of `ANALYSIS_KINDS`.

    Returns:
        A matplotlib Figure that belongs to no window; a notebook shows it.

    Raises:
        ValueError: there is no such plot.
        MissingDependencyError: matplotlib is not installed.
    """
    _check(kind, ANALYSIS_KINDS, "an analysis")
    from lorafast._report.plots.analysis import DRAW

    return DRAW[kind](analysis)


def comparison_figure(comparison: Comparison, kind: str) -> Figure:
    """As `analysis_figure`, of a comparison and one of `COMPARISON_KINDS`."""
    _check(kind, COMPARISON_KINDS, "a comparison")
    from lorafast._report.plots.comparison import DRAW

    return DRAW[kind](comparison)


def _check(kind: str, known: Mapping[str, str], noun: str) -> None:
    if kind not in known:
        raise ValueError(f"no plot {kind!r} of {noun}; there are: {', '.join(known)}")
    try:
        import matplotlib  # noqa: F401  # asked for here so that its absence has one message
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is needed to draw plots; install it with: pip install matplotlib"
        ) from error
