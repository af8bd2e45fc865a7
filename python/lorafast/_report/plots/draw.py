"""Plots of an analysis and of a comparison.

Everything is drawn from the histograms and tables that were computed, never from the weights
themselves, so that a plot costs the same for any adapter. matplotlib is imported when a figure is
asked for, through its object-oriented interface: no window, no backend, no global state.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._analysis.records import AdapterAnalysis, Comparison
from lorafast._errors import MissingDependencyError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

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


def kinds(subject: AdapterAnalysis | Comparison) -> dict[str, str]:
    """The kinds of plot there are of an analysis or a comparison, each with what it shows."""
    return dict(COMPARISON_KINDS if isinstance(subject, Comparison) else ANALYSIS_KINDS)


def figure(subject: AdapterAnalysis | Comparison, kind: str) -> Figure:
    """Draws one plot.

    Args:
        subject: an analysis or a comparison.
        kind: one of `kinds(subject)`.

    Returns:
        A matplotlib Figure that belongs to no window; a notebook shows it.

    Raises:
        ValueError: there is no such plot of the subject.
        MissingDependencyError: matplotlib is not installed.
    """
    known = kinds(subject)
    if kind not in known:
        noun = "a comparison" if isinstance(subject, Comparison) else "an analysis"
        raise ValueError(f"no plot {kind!r} of {noun}; there are: {', '.join(known)}")
    try:
        import matplotlib  # noqa: F401  # asked for here so that its absence has one message
    except ImportError as error:
        raise MissingDependencyError(
            "matplotlib is needed to draw plots; install it with: pip install matplotlib"
        ) from error
    from lorafast._report.plots import analysis, comparison

    if isinstance(subject, Comparison):
        return comparison.DRAW[kind](subject)
    return analysis.DRAW[kind](subject)
