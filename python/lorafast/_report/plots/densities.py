"""Densities of several adapters' stored weights over the same bins, A and B apart."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from lorafast._analysis.records import Histogram, TensorStatistics
from lorafast._report.plots.style import is_drawable

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from lorafast._analysis.results import AdapterAnalysis

    Values = NDArray[np.float64]

#: Bins of a panel.
FEWEST, MOST = 50, 240
#: Where the whole range is so many times as wide as what lies between the outermost percentiles of
#: the tensors, the bins end a little beyond those.
FAR = 3.0
#: A bin with a greater share of the values tells too little of where in it they lie.
COARSE = 0.1
#: log₁₀(|0| + 1e-8).
LOG_OF_ZERO = -8.0


@dataclass(frozen=True)
class Densities:
    """Densities of adapters over shared bins.

    Attributes:
        edges: of the bins, ascending and of one width.
        values: a row for each adapter; NaN of one that has no finite weights.
        beyond: the greatest share of an adapter's weights that lies outside of the bins.
    """

    edges: Values
    values: Values
    beyond: float

    @property
    def peaks(self) -> Values:
        """The greatest density of each adapter that has any."""
        known = np.isfinite(self.values).all(axis=1)
        return np.asarray(self.values[known].max(axis=1))


@dataclass(frozen=True)
class _Tensor:
    """How many values of a tensor lie below each of some points.

    Attributes:
        points: ascending; between two of them the distribution is taken as smooth.
        below: how many values, exact zeros left out, lie below each point.
        zeros: how many are exactly zero.
        zero: where zeros lie.
        low: the least value.
        high: the greatest.
        core: between which values all but outliers lie.
        width: of the bins in which the tensor was counted; 0 of equal values.
    """

    points: Values
    below: Values
    zeros: int
    zero: float
    low: float
    high: float
    core: tuple[float, float]
    width: float

    @property
    def count(self) -> float:
        return float(self.below[-1]) + self.zeros

    def counts(self, edges: Values) -> Values:
        """How many values lie in each bin between edges; the last contains its upper edge."""
        if self.low == self.high:
            # Equal values, zeros or not.
            below = np.where(edges > self.low, self.count, 0.0)
            below[-1] = self.count if edges[-1] >= self.low else 0.0
            return np.diff(below)
        counts = np.diff(_monotone(edges, self.points, self.below))
        if self.zeros and edges[0] <= self.zero <= edges[-1]:
            at = np.searchsorted(edges, self.zero, side="right") - 1
            counts[min(int(at), counts.size - 1)] += self.zeros
        return np.asarray(counts)


def _monotone(at: Values, x: Values, y: Values) -> Values:
    """Ascending values between points by Fritsch and Butland's monotone cubic pieces.

    Straight pieces would make steps of a smooth density: of each bin that was counted, and wide
    ones between two percentiles.
    """
    if x.size < 3:
        return np.asarray(np.interp(at, x, y))
    step = np.diff(x)
    slope = np.diff(y) / step
    # At a point the harmonic mean of the slopes beside it, 0 beside a flat piece; at the ends that
    # of the first and of the last piece.
    before, after = slope[:-1], slope[1:]
    first, second = 2 * step[1:] + step[:-1], step[1:] + 2 * step[:-1]
    with np.errstate(divide="ignore"):
        inner = (first + second) / (first / before + second / after)
    tangent = np.concatenate([slope[:1], inner, slope[-1:]])
    piece = np.clip(np.searchsorted(x, at, side="right") - 1, 0, x.size - 2)
    width = step[piece]
    t = np.clip((at - x[piece]) / width, 0.0, 1.0)
    low, high = y[piece], y[piece + 1]
    return np.asarray(
        low
        + (high - low) * t * t * (3 - 2 * t)
        + width * t * (1 - t) * (tangent[piece] * (1 - t) - tangent[piece + 1] * t)
    )


def _linear(statistics: TensorStatistics) -> _Tensor | None:
    return _tensor(statistics, statistics.histogram, 0.0, statistics.percentiles)


def _logarithmic(statistics: TensorStatistics) -> _Tensor | None:
    return _tensor(statistics, statistics.log_histogram, LOG_OF_ZERO, {})


def _tensor(
    statistics: TensorStatistics,
    histogram: Histogram,
    zero: float,
    percentiles: dict[float, float],
) -> _Tensor | None:
    """What a tensor's histogram, zeros and percentiles tell; `None` without finite values."""
    if not is_drawable(histogram):
        return None
    edges = np.asarray(histogram.edges, dtype=float)
    below = np.concatenate([[0.0], np.cumsum(histogram.counts)])
    zeros = statistics.zeros
    low, high = float(edges[0]), float(edges[-1])
    if statistics.min == statistics.max:
        # Equal values are counted in bins around them, as NumPy does.
        low = high = statistics.min if zero == 0.0 else math.log10(abs(statistics.min) + 1e-8)
    after = edges > zero
    after[-1] |= edges[-1] == zero
    below = below - zeros * after
    known = {p: v for p, v in percentiles.items() if math.isfinite(v)}
    inner, ranks = _inside_bins(known, edges, below, zeros, zero)
    points, unique = np.unique(np.concatenate([edges, inner]), return_index=True)
    values = np.maximum.accumulate(np.concatenate([below, ranks])[unique])
    outer = (min(known, default=50.0), max(known, default=50.0))
    core = (known[outer[0]], known[outer[1]]) if outer[0] <= 1 and outer[1] >= 99 else (low, high)
    return _Tensor(
        points=points,
        below=values,
        zeros=zeros,
        zero=zero,
        low=low,
        high=high,
        core=core,
        width=0.0 if low == high else float(edges[1] - edges[0]),
    )


def _inside_bins(
    percentiles: dict[float, float], edges: Values, below: Values, zeros: int, zero: float
) -> tuple[Values, Values]:
    """Percentiles that tell more of a bin than its edges do, and how many values lie below them.

    Where a few values lie far out, most are in few bins. Of other bins, and close to an edge, a
    percentile is the edge's neighbor, and the few values between the two are no density.
    """
    finite = float(below[-1]) + zeros
    values, ranks = [], []
    for percentile, value in percentiles.items():
        at = int(np.clip(np.searchsorted(edges, value, side="right") - 1, 0, edges.size - 2))
        place = (value - edges[at]) / (edges[at + 1] - edges[at])
        if value != zero and below[at + 1] - below[at] > COARSE * finite and 0.1 < place < 0.9:
            rank = percentile / 100 * (finite - 1) + 0.5 - zeros * (value > zero)
            values.append(value)
            ranks.append(float(np.clip(rank, below[at], below[at + 1])))
    return np.array(values), np.array(ranks)


def tensors_by_factor(
    analyses: Sequence[AdapterAnalysis],
) -> dict[str, list[list[TensorStatistics]]]:
    """The tensors of each adapter by what they are: those of A, of B, and all others.

    All of an adapter's are taken together where there are no single ones of it, as in the JSON of a
    comparison.
    """
    if any(analysis.weights.count and not analysis.tensors for analysis in analyses):
        return {"A and B": [[analysis.weights] for analysis in analyses]}
    found: dict[str, list[list[TensorStatistics]]] = {
        kind: [[] for _ in analyses] for kind in ("A", "B", "other tensors")
    }
    for i, analysis in enumerate(analyses):
        kinds = {module.a_name: "A" for module in analysis.modules.values()}
        kinds |= {module.b_name: "B" for module in analysis.modules.values()}
        for name, statistics in analysis.tensors.items():
            found[kinds.get(name, "other tensors")][i].append(statistics)
    return {kind: members for kind, members in found.items() if any(members)}


def densities(tensors: Sequence[Sequence[TensorStatistics]]) -> Densities | None:
    """Densities of the values of each adapter's tensors; `None` where no value is finite."""
    return _densities([[_linear(one) for one in own] for own in tensors], is_centered=True)


def log_densities(tensors: Sequence[Sequence[TensorStatistics]]) -> Densities | None:
    """Densities of log₁₀(|w| + 1e-8); `None` where no value is finite."""
    return _densities([[_logarithmic(one) for one in own] for own in tensors], is_centered=False)


def _densities(
    tensors: Sequence[Sequence[_Tensor | None]], *, is_centered: bool
) -> Densities | None:
    known = [[tensor for tensor in own if tensor is not None] for own in tensors]
    if not any(known):
        return None
    edges = _edges([own for own in known if own], is_centered=is_centered)
    values = np.full((len(known), edges.size - 1), math.nan)
    beyond = 0.0
    for i, own in enumerate(known):
        if own:
            counts = np.sum([tensor.counts(edges) for tensor in own], axis=0)
            total = sum(tensor.count for tensor in own)
            values[i] = counts / (total * np.diff(edges))
            beyond = max(beyond, 1.0 - float(counts.sum()) / total)
    return Densities(edges, values, beyond if beyond > 1e-9 else 0.0)


def _edges(adapters: Sequence[Sequence[_Tensor]], *, is_centered: bool) -> Values:
    """Edges for the tensors of all adapters, of which each has at least one.

    The bins are as wide as those in which nine tenths of an adapter's values were counted, of the
    adapter for which these are narrowest: in wider ones its peak would look flatter than it is.
    """
    tensors = [tensor for own in adapters for tensor in own]
    low, high = min(t.low for t in tensors), max(t.high for t in tensors)
    inner = min(t.core[0] for t in tensors), max(t.core[1] for t in tensors)
    if 0 < inner[1] - inner[0] < (high - low) / FAR:
        margin = 0.25 * (inner[1] - inner[0])
        low, high = max(low, inner[0] - margin), min(high, inner[1] + margin)
    if low == high:
        return np.array([low - 0.5, low + 0.5])
    widths = [width for own in adapters if (width := _typical_width(own))]
    width = min(widths, default=(high - low) / FEWEST)
    width = min(max(width, (high - low) / MOST), (high - low) / FEWEST)
    if is_centered and low <= 0 <= high:
        # Zero is the middle of a bin, so that what is symmetric looks it.
        first, last = math.floor(low / width + 0.5), math.ceil(high / width - 0.5)
        return np.asarray((np.arange(first, last + 2) - 0.5) * width)
    count = math.ceil((high - low) / width - 1e-9)
    return np.linspace(low, high, count + 1)


def _typical_width(tensors: Sequence[_Tensor]) -> float:
    """The width that nine tenths of the values' bins do not exceed; 0 of equal values alone."""
    counted = sorted((t.width, t.count) for t in tensors if t.width)
    if not counted:
        return 0.0
    shares = np.cumsum([count for _, count in counted])
    return counted[int(np.searchsorted(shares, 0.9 * shares[-1]))][0]
