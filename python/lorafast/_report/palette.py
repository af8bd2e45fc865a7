"""Colors of all plots and charts, and the one color map of a cosine."""

from __future__ import annotations

# Not `typing`'s, whose import takes longer than this module's.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from typing import Any

#: Okabe and Ito's colors, told apart with any color vision, in an order in which neighbors differ
#: in lightness; their yellow, too pale for a line on white, is left out.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
#: The first of them as the ground of a band.
BAND = "rgba(0,114,178,0.18)"
#: What stands for them on a dark ground, where they would hardly be seen.
ON_DARK = {COLORS[0]: "#7ba4ff", BAND: "rgba(123,164,255,0.25)"}

#: Of a cosine, from its negative to its positive end, white at zero: ColorBrewer's RdBu, whose two
#: sides are equally light at the same distance from zero, and which any color vision tells apart.
COSINE = ("#67001f", "#b2182b", "#d6604d", "#f4a582", "#fddbc7", "#f7f7f7",
          "#d1e5f0", "#92c5de", "#4393c3", "#2166ac", "#053061")  # fmt: skip
#: The two sides where a color stands for the sign alone.
NEGATIVE, POSITIVE = COSINE[1], COSINE[-2]
#: Where the colors of a cosine may end. Below the least of them, all would be colored noise.
COSINE_ENDS = (0.1, 0.2, 0.5, 1.0)


def cosine_end(cosine: Any) -> float:
    """The magnitude at which the colors of a matrix of cosines end, the same for both signs.

    Args:
        cosine: of each two of N adapters (N×N, whose diagonal does not count), or a list of
            cosines.
    """
    import numpy as np

    values = np.asarray(cosine, dtype=float)
    if values.ndim == 2 and values.shape[0] == values.shape[1]:
        values = values[~np.eye(len(values), dtype=bool)]
    known = np.abs(values[np.isfinite(values)])
    greatest = float(known.max()) if known.size else 1.0
    return next((end for end in COSINE_ENDS if greatest <= end), 1.0)
