"""Plots of an analysis and of a comparison.

Everything is drawn from the histograms and tables that were computed, never from the weights
themselves, so that a plot costs the same for any adapter. matplotlib is imported when a figure is
asked for, through its object-oriented interface: no window, no backend, no global state.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._errors import MissingDependencyError
from lorafast._records import AdapterAnalysis, Comparison

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

#: Dots per inch of a saved picture: 13 inches are 1560 pixels.
DOTS_PER_INCH = 120


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
    from lorafast._plots import _analysis, _comparison

    if isinstance(subject, Comparison):
        return _comparison.DRAW[kind](subject)
    return _analysis.DRAW[kind](subject)


def save(figure: Figure, path: str | os.PathLike[str]) -> Path:
    """Writes a figure as PNG.

    Args:
        figure: what `figure` returned.
        path: where to, whole or not at all; the directory must exist.

    Returns:
        The path.
    """
    from lorafast._io import atomic

    return atomic.write(path, png(figure))


def png(figure: Figure) -> bytes:
    """The bytes that `save` writes."""
    import io

    buffer = io.BytesIO()
    # Without matplotlib's version in it the same figure gives the same bytes.
    figure.savefig(buffer, format="png", dpi=DOTS_PER_INCH, metadata={"Software": None})
    return buffer.getvalue()
