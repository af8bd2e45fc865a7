"""Colors of all plots and charts."""

from __future__ import annotations

#: Okabe and Ito's colors, told apart with any color vision, in an order in which neighbors differ
#: in lightness; their yellow, too pale for a line on white, is left out.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#D55E00", "#56B4E9", "#CC79A7", "#000000")
#: The first of them as the ground of a band.
BAND = "rgba(0,114,178,0.18)"
#: What stands for them on a dark ground, where they would hardly be seen.
ON_DARK = {COLORS[0]: "#7ba4ff", BAND: "rgba(123,164,255,0.25)"}
