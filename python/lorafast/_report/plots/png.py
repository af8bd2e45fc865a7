"""Figures as PNG."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.figure import Figure

#: Dots per inch of a saved picture: 13 inches are 1560 pixels.
DOTS_PER_INCH = 120


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
