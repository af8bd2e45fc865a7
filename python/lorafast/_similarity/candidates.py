"""Pairs of adapters that may hold one update, as far as their signatures tell."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

#: A truncation has been through a decomposition, which turns rounding into somewhat more.
TRUNCATION_SLACK = 4.0
#: What a comparison of singular values in float64 can tell apart.
INVARIANT_FLOOR = 1e-6
#: Singular values that the core keeps of each module.
LEADING = 4
#: Pairs that are looked at together.
CHUNK = 100_000


@dataclass
class Signature:
    """The core's signature, with its place."""

    position: int
    file: str
    tensors: str
    scales: str
    is_finite: bool
    changes_nothing: bool
    norm: float
    tolerance: float
    rank: int

    @property
    def relative(self) -> float:
        return self.tolerance / self.norm if self.norm else 0.0

    @property
    def coarseness(self) -> int:
        """The decade of the relative tolerance: what is stored more precisely is kept."""
        import math

        return math.floor(math.log10(self.relative)) if self.relative > 0 else -99


def candidates(
    classes: list[int],
    signatures: Mapping[int, Signature],
    leading: Mapping[int, NDArray[numpy.float64]],
) -> dict[int, set[int]]:
    """Pairs whose leading singular values allow that they are one update, scaled or shorter.

    Args:
        classes: the adapters' positions.
        signatures: theirs, by position.
        leading: their leading singular values, by position.

    Returns:
        For each adapter the others that may be.
    """
    import numpy as np

    edges: dict[int, set[int]] = {at: set() for at in classes}
    if len(classes) < 2:
        return edges
    values = np.stack([leading[at] for at in classes])
    tolerance = np.array([signatures[at].tolerance for at in classes])
    ranks = np.array([signatures[at].rank for at in classes])
    first = values[:, ::LEADING]
    lengths = np.linalg.norm(first, axis=1)
    units = first / lengths[:, None]
    allowed = 2 * TRUNCATION_SLACK * tolerance / lengths + INVARIANT_FLOOR
    step = max(1, CHUNK // len(classes))
    for start in range(0, len(classes), step):
        block = slice(start, start + step)
        squares = np.maximum(2 - 2 * units[block] @ units.T, 0.0)
        close = np.sqrt(squares) <= allowed[block, None] + allowed[None, :]
        rows, columns = np.nonzero(close)
        keep = rows + start < columns
        rows, columns = rows[keep] + start, columns[keep]
        similar = _may_be_equal(values, tolerance, ranks, rows, columns)
        for row, column in zip(rows[similar], columns[similar], strict=True):
            edges[classes[row]].add(classes[column])
            edges[classes[column]].add(classes[row])
    return edges


def _may_be_equal(
    values: NDArray[numpy.float64],
    tolerance: NDArray[numpy.float64],
    ranks: NDArray[numpy.int64],
    rows: NDArray[numpy.int64],
    columns: NDArray[numpy.int64],
) -> NDArray[numpy.bool_]:
    """Of some pairs, whether all values that the one of lower rank has are those of the other."""
    import numpy as np

    result = np.zeros(len(rows), dtype=np.bool_)
    step = max(1, CHUNK * 10 // values.shape[1])
    for start in range(0, len(rows), step):
        chosen = slice(start, start + step)
        row, column = rows[chosen], columns[chosen]
        swap = ranks[row] < ranks[column]
        longer, shorter = np.where(swap, column, row), np.where(swap, row, column)
        x, y = values[longer].copy(), values[shorter].copy()
        firsts = np.repeat(y[:, ::LEADING], LEADING, axis=1)
        missing = y <= 1e-6 * firsts
        x[missing] = 0.0
        y[missing] = 0.0
        lengths = np.linalg.norm(x, axis=1), np.linalg.norm(y, axis=1)
        with np.errstate(divide="ignore", invalid="ignore"):
            distance = np.linalg.norm(x / lengths[0][:, None] - y / lengths[1][:, None], axis=1)
            allowed = tolerance[longer] / lengths[0] + tolerance[shorter] / lengths[1]
        result[chosen] = distance <= 2 * TRUNCATION_SLACK * allowed + INVARIANT_FLOOR
    return result
