"""Heatmaps of cosines: their color map, their limits, and the matrix of each two adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import numpy as np

from lorafast._report.palette import COSINE, cosine_end
from lorafast._report.plots.style import LABEL_SIZE, TICK_SIZE, annotate, draw_undefined

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.colorbar import Colorbar
    from matplotlib.colors import Colormap, Normalize
    from matplotlib.figure import Figure
    from matplotlib.image import AxesImage
    from numpy.typing import ArrayLike

#: Up to so many adapters have their figure written into each cell.
WRITTEN = 16
#: The grey of cells that are no pair with a cosine: darker than the color of a cosine of zero.
NO_PAIR = "#a8a8a8"


def cosine_colors() -> Colormap:
    """The color map of every cosine; zero is exactly its middle."""
    from matplotlib.colors import LinearSegmentedColormap

    return LinearSegmentedColormap.from_list("cosine", COSINE, N=257)


def cosine_scale(cosine: ArrayLike) -> Normalize:
    """From −end to end, as `palette.cosine_end` finds it."""
    from matplotlib.colors import Normalize

    end = cosine_end(cosine)
    return Normalize(-end, end)


def cosine_number(scale: Normalize) -> str:
    """How a cosine is written into a cell: in as many digits as its colors tell apart."""
    return ".3f" if scale.vmax is not None and scale.vmax < 0.5 else ".2f"


def cosine_label(scale: Normalize, words: str = "cosine") -> str:
    """What a color bar says: what the colors mean, and where they end if that is not ±1."""
    end = scale.vmax
    return words if end is None or end >= 1 else f"{words} (colors end at ±{end:g})"


def draw_matrix(
    axes: Axes, cosine: ArrayLike, *, size: float, aspect: Literal["equal", "auto"]
) -> tuple[AxesImage, str]:
    """Draws the cosines of each two adapters as a heatmap.

    The diagonal, each adapter with itself, is 1 whatever the adapters: it is grey, and the limits
    of the colors follow the other cells.

    Args:
        axes: the panel.
        cosine: N×N.
        size: of the figures in the cells, in points.
        aspect: whether cells are squares or fill the panel.

    Returns:
        The image, and what its color bar says.
    """
    values = np.asarray(cosine, dtype=float)
    count = len(values)
    itself = np.eye(count, dtype=bool)
    undefined = ~np.isfinite(values) & ~itself
    colors, scale = cosine_colors(), cosine_scale(values)
    axes.set_facecolor(NO_PAIR)
    image = axes.imshow(
        np.ma.array(values, mask=itself | undefined), cmap=colors, norm=scale, aspect=aspect,
        interpolation="nearest" if count <= 400 else "auto",
    )  # fmt: skip
    axes.tick_params(labelsize=TICK_SIZE)
    words = cosine_label(scale)
    words += "\ngrey: each with itself"
    if count <= WRITTEN:
        others = np.where(itself, np.nan, values)
        annotate(axes, others, colors, scale, size=size, number=cosine_number(scale))
        draw_undefined(axes, undefined)
        if undefined.any():
            words += "; ×: no cosine"
    elif undefined.any():
        words += ", or no cosine"
    return image, words


def draw_bar(
    figure: Figure, axes: Axes, image: AxesImage, words: str, *, shrink: float, fraction: float
) -> Colorbar:
    """The color bar of a matrix of cosines."""
    bar = figure.colorbar(image, ax=axes, pad=0.02, fraction=fraction, shrink=shrink)
    bar.set_label(words, fontsize=LABEL_SIZE - 1)
    bar.ax.tick_params(labelsize=TICK_SIZE)
    return bar
