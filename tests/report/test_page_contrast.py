"""Contrast of every text of the HTML pages to what lies behind it, in both themes."""

from __future__ import annotations

import re

import numpy as np
import pytest
from lorafast._report.html.comparison import MAX_OPACITY
from lorafast._report.html.elements import asset
from lorafast._report.palette import NEGATIVE, POSITIVE
from support import records
from support.pages import page_of

#: WCAG 2.1, 1.4.3, of text that is not large.
LEAST = 4.5
#: What is written upon what: the style sheet's variables.
PAIRS = [
    *((ink, ground) for ink in ("text", "quiet") for ground in ("ground", "card")),
    *(("text", ground) for ground in ("hover", "target")),
    *((ink, ground) for ink in ("note", "critical", "warning") for ground in ("ground", "card")),
]
Color = tuple[float, ...]


def themes() -> dict[str, dict[str, Color]]:
    """The variables of the style sheet in each theme."""
    light, dark = asset("style.css").split("prefers-color-scheme: dark")[:2]
    return {
        name: {
            variable: tuple(byte / 255 for byte in bytes.fromhex(color))
            for variable, color in re.findall(r"--(\w+): #([0-9a-f]{6})", part)
        }
        for name, part in (("light", light), ("dark", dark.split("\n}")[0]))
    }


def contrast(one: Color, other: Color) -> float:
    def luminance(color: Color) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


def over(color: Color, opacity: float, ground: Color) -> Color:
    """A color that lets something of its ground through."""
    return tuple(opacity * a + (1 - opacity) * b for a, b in zip(color, ground, strict=True))


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_each_text_stands_out_from_what_it_is_written_on(theme: str) -> None:
    colors = themes()[theme]
    for ink, ground in PAIRS:
        assert contrast(colors[ink], colors[ground]) >= LEAST, (ink, ground)


def test_the_words_in_an_empty_field_are_no_browsers_grey() -> None:
    rule = re.search(r"::placeholder \{([^}]*)\}", asset("style.css"))
    assert rule is not None
    assert "color: var(--quiet)" in rule[1]
    # Firefox makes them half transparent.
    assert "opacity: 1" in rule[1]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("color", [NEGATIVE, POSITIVE])
def test_a_cosine_is_legible_whatever_its_color(theme: str, color: str) -> None:
    colors = themes()[theme]
    full = tuple(byte / 255 for byte in bytes.fromhex(color.removeprefix("#")))
    for opacity in np.linspace(0, MAX_OPACITY, 63):
        behind = over(full, float(opacity), colors["ground"])
        assert contrast(colors["text"], behind) >= LEAST, opacity


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_the_cells_of_a_page_are_legible(theme: str) -> None:
    colors = themes()[theme]
    comparison = records.comparison(
        [records.analysis(records.places(1), name=f"run-{i}", seed=i) for i in range(3)]
    )
    comparison.cosine[:] = [[1, -1, 0.5], [-1, 1, -0.02], [0.5, -0.02, 1]]
    pages = [comparison.to_html(), page_of("comparison")]
    found = [
        match
        for page in pages
        for match in re.findall(r"background:rgba\((\d+),(\d+),(\d+),([\d.]+)\)", page)
    ]
    assert {opacity for *_, opacity in found} >= {f"{MAX_OPACITY:.2f}"}
    for red, green, blue, opacity in found:
        color = (int(red) / 255, int(green) / 255, int(blue) / 255)
        behind = over(color, float(opacity), colors["ground"])
        assert contrast(colors["text"], behind) >= LEAST
    # No other color is written into a page.
    for page in pages:
        markup = re.sub(r"<(style|script)>.*?</\1>", "", page, flags=re.DOTALL)
        assert not re.search(r'style="(?!background:rgba)', markup)
