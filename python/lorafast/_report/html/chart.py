"""Charts as plotly takes them: traces, and axes whose ranges are known from the data."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: Of a range, left free at an end where points would lie on the frame.
PAD = 0.04


@dataclass(frozen=True)
class Chart:
    """One chart.

    Attributes:
        title: its heading.
        caption: what is seen, in a sentence.
        traces: plotly's data.
        layout: plotly's layout beside what all charts share. Both axes have their ranges, so that
            nothing of a chart depends on when it is looked at.
        height: in pixels.
        wide: whether it takes the page's whole width.
    """

    title: str
    caption: str
    traces: list[dict[str, Any]]
    layout: dict[str, Any] = field(default_factory=dict)
    height: int = 340
    wide: bool = False


def text(value: str | None) -> str:
    """The name of an adapter, a layer or a base as plotly shows it as it is: its texts are HTML."""
    return "no base named" if value is None else html.escape(value, quote=False)


def numbers(values: NDArray[Any] | Sequence[float], digits: int = 6) -> list[float | None]:
    """Numbers in as many digits as can be seen; what is not finite is nothing."""
    return [
        float(f"{value:.{digits}g}") if math.isfinite(value) else None
        for value in np.asarray(values, dtype=np.float64).tolist()
    ]


def linear(low: float, high: float) -> list[float]:
    """The range from one value to another with some room at both ends."""
    room = PAD * (high - low) or 0.5
    return [low - room, high + room]


def from_zero(high: float) -> list[float]:
    """The range from zero to a value with some room above it."""
    return [0.0, (1 + PAD) * high if high > 0 else 1.0]


def categories(count: int, *, down: bool = False) -> list[float]:
    """The range of positions 0, 1, 2, …, or of as many categories, the first at the top if down."""
    span = [-0.5, max(1, count) - 0.5]
    return span[::-1] if down else span


def logarithmic(low: float, high: float) -> dict[str, Any]:
    """A logarithmic axis.

    Args:
        low: the power of ten that it begins with.
        high: the power of ten that it ends with.
    """
    ticks = {"dtick": "D2" if high - low < 3 else 1} if high - low > 1 else {"nticks": 6}
    # Without a format what stands between powers is one small digit: 2 for 20.
    return {"type": "log", **ticks, "tickformat": "~g", "range": linear(low, high)}


def whole(width: int) -> int:
    """The distance of ticks at whole numbers that leaves room for each of them."""
    step = math.ceil(max(1, width) / 8)
    return next(nice for nice in (1, 2, 4, 8, 16, 32) if nice >= step or nice == 32)
