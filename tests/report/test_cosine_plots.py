"""Pictures of cosines: one color map, both signs alike, limits that the diagonal does not set."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._analysis.results import Comparison
from lorafast._report import palette
from lorafast._report.html import fleet_charts
from lorafast._report.text import format_cosine, format_number
from support import records
from support.analysis import random_factors, write_factors

SHAPES = {f"layers.{block}.{layer}": (24, 20, 2) for block in range(2) for layer in "qv"}


def matrix_of(count: int, greatest: float, seed: int = 0) -> np.ndarray:
    """Cosines of a magnitude up to `greatest`, which both signs reach."""
    half = np.triu(np.random.default_rng(seed).uniform(-greatest, greatest, (count, count)), 1)
    half[0, 1], half[0, 2] = greatest, -greatest
    return half + half.T + np.eye(count)


def compared(cosine: np.ndarray) -> Comparison:
    adapters = [records.analysis(name=f"run-{i}", seed=i) for i in range(len(cosine))]
    made = records.comparison(adapters)
    modules = {path: replace(module, cosine=cosine) for path, module in made.modules.items()}
    return replace(made, cosine=cosine, modules=modules)


def similar(folder: Path, greatest: float) -> lorafast.Similarity:
    """A similarity of three adapters with the cosines of `matrix_of`."""
    for name in "abc":
        write_factors(folder / name, random_factors(SHAPES, 0))
    found = lorafast.similarity(folder)
    return replace(found, matrix=matrix_of(3, greatest))


def pictures(folder: Path, greatest: float) -> dict[str, Any]:
    """The axes of the three pictures of cosines."""
    comparison = compared(matrix_of(3, greatest))
    figures = {
        "cosine": comparison.plot("cosine"),
        "modules": compared(matrix_of(3, greatest)[:2, :2]).plot("modules"),
        "similarity": similar(folder, greatest).plot(),
    }
    return {
        kind: next(axes for axes in figure.axes if axes.images) for kind, figure in figures.items()
    }


def texts_of(figure: Any) -> list[str]:
    from matplotlib.text import Text

    figure.canvas.draw()
    return [text.get_text() for text in figure.findobj(Text)]


def lightness(color: Any) -> float:
    """CIE L* of a color."""
    from matplotlib.colors import to_rgb

    linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
    luminance = float(np.dot((0.2126, 0.7152, 0.0722), linear))
    return 116 * luminance ** (1 / 3) - 16 if luminance > 0.008856 else 903.3 * luminance


@pytest.mark.parametrize(
    ("greatest", "end"), [(0.04, 0.1), (0.1, 0.1), (0.13, 0.2), (0.4, 0.5), (0.51, 1.0), (1.0, 1.0)]
)
def test_the_limits_are_symmetric_and_follow_what_lies_off_the_diagonal(
    tmp_path: Path, greatest: float, end: float
) -> None:
    for kind, axes in pictures(tmp_path, greatest).items():
        assert axes.images[0].get_clim() == (-end, end), kind


def test_a_cosine_has_the_same_color_in_every_picture_and_on_the_page(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb

    values = np.linspace(-1, 1, 11)
    chart = fleet_charts.matrix(list("abc"), matrix_of(3, 0.9)).traces[0]
    assert [color for _, color in chart["colorscale"]] == list(palette.COSINE)
    np.testing.assert_allclose([place for place, _ in chart["colorscale"]], (values + 1) / 2)
    for axes in pictures(tmp_path, 0.9).values():
        image = axes.images[0]
        drawn = [image.cmap(image.norm(value))[:3] for value in values]
        np.testing.assert_allclose(drawn, [to_rgb(color) for color in palette.COSINE], atol=0.02)


def test_both_signs_are_equally_light() -> None:
    for below, above in zip(palette.COSINE[:5], palette.COSINE[:5:-1], strict=True):
        assert abs(lightness(below) - lightness(above)) < 5


def test_the_diagonal_has_no_color_and_the_bar_says_so(tmp_path: Path) -> None:
    for kind in ("cosine", "similarity"):
        axes = pictures(tmp_path / kind, 0.04)[kind]
        mask = np.ma.getmaskarray(axes.images[0].get_array())
        np.testing.assert_array_equal(mask, np.eye(3, dtype=bool))
        assert len(axes.texts) == 6
        label = axes.images[0].colorbar.ax.get_ylabel()
        assert "grey: each with itself" in label
        assert "±0.1" in label
    chart = fleet_charts.matrix(list("abc"), matrix_of(3, 0.04))
    assert [row[i] for i, row in enumerate(chart.traces[0]["z"])] == [None] * 3
    assert (chart.traces[0]["zmin"], chart.traces[0]["zmax"]) == (-0.1, 0.1)


def test_nothing_is_written_as_minus_zero(tmp_path: Path) -> None:
    cosine = np.eye(4)
    cosine[0, 1] = cosine[1, 0] = -1e-9
    cosine[2, 3] = cosine[3, 2] = -0.9
    comparison = compared(cosine)
    found = replace(similar(tmp_path, 0.5), matrix=cosine[:3, :3])
    for figure in (comparison.plot("cosine"), comparison.plot("modules"), found.plot()):
        for text in texts_of(figure):
            assert text.strip("-−0.") or not text.startswith(("-", "−")), text
    assert ">-0.000<" not in comparison.to_html()
    assert format_cosine(-1e-9) == "0.0000"
    assert format_number(-0.0) == "0"


def test_small_cosines_are_written_in_digits_that_tell_them_apart() -> None:
    cosine = np.eye(3)
    cosine[0, 1] = cosine[1, 0] = -0.003
    cosine[0, 2] = cosine[2, 0] = 0.002
    assert {"-0.003", "0.002", "0.000"} <= set(texts_of(compared(cosine).plot("cosine")))


def test_a_pair_without_a_cosine_is_marked_and_is_no_diagonal() -> None:
    cosine = matrix_of(4, 0.8)
    cosine[3], cosine[:, 3] = math.nan, math.nan
    axes = compared(cosine).plot("cosine").axes[0]
    crosses = [text.get_position() for text in axes.texts if text.get_text() == "×"]
    assert sorted(crosses) == [(0, 3), (1, 3), (2, 3), (3, 0), (3, 1), (3, 2)]
    assert "×: no cosine" in axes.images[0].colorbar.ax.get_ylabel()  # type: ignore[union-attr]  # a heatmap with its bar


def test_one_adapter_has_no_cosine_to_draw() -> None:
    axes = compared(np.eye(1)).plot("cosine").axes[0]
    assert not axes.images
    assert axes.texts[0].get_text() == "there are no two adapters to compare"


def test_figures_are_black_or_white_whichever_has_more_contrast(tmp_path: Path) -> None:
    from matplotlib.colors import to_rgb

    def luminance(color: Any) -> float:
        linear = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in color]
        return float(np.dot((0.2126, 0.7152, 0.0722), linear))

    axes = compared(matrix_of(12, 1.0)).plot("cosine").axes[0]
    image = axes.images[0]
    assert len(axes.texts) == 132
    for text in axes.texts:
        column, row = text.get_position()
        ground = luminance(image.cmap(image.norm(image.get_array()[int(row), int(column)]))[:3])
        ink = luminance(to_rgb(text.get_color()))
        light, dark = max(ground, ink), min(ground, ink)
        assert (light + 0.05) / (dark + 0.05) >= 4.5


@pytest.mark.parametrize(("sign", "color"), [(1, palette.POSITIVE), (-1, palette.NEGATIVE)])
def test_the_table_of_cosines_has_the_colors_of_the_map(sign: int, color: str) -> None:
    cosine = np.eye(2)
    cosine[0, 1] = cosine[1, 0] = 0.1 * sign
    page = compared(cosine).to_html()
    red, green, blue = bytes.fromhex(color[1:])
    # The full color is that of the greatest cosine, whatever the diagonal is.
    assert page.count(f"background:rgba({red},{green},{blue},0.62)") == 2
    assert page.count("background:rgba(") == 2


def test_the_means_of_a_row_are_over_the_same_pairs() -> None:
    full = records.places(3, records.LLAMA[:2])
    first, second = records.LLAMA[:2]
    lacking = {path: place for path, place in full.items() if place != (1, first)}
    comparison = records.comparison([
        records.analysis(full, name="full"),
        records.analysis(full, name="other", seed=1),
        records.analysis(lacking, name="lacking", seed=2),
    ])  # fmt: skip
    axes = comparison.plot("modules").axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == [first, second, f"{first} (all but lacking)"]
    shown = np.ma.filled(axes.images[0].get_array(), math.nan)
    pairs = np.triu_indices(3, 1)
    for path, (block, layer) in full.items():
        known = comparison.modules[path].cosine[pairs]
        row = rows.index(layer) if np.isfinite(known).all() else 2
        assert shown[row, block] == pytest.approx(np.nanmean(known))
    assert np.isfinite(shown).sum() == 6
    assert math.isnan(shown[0, 1])


def test_groups_of_adapters_beyond_a_few_are_counted() -> None:
    layers = [f"mlp.part_{i}" for i in range(9)]
    full = records.places(2, layers)
    adapters = [records.analysis(full, name="full"), records.analysis(full, name="other", seed=9)]
    for i, layer in enumerate(layers):
        kept = {path: place for path, place in full.items() if place[1] != layer}
        adapters.append(records.analysis(kept, name=f"run-{i}", seed=i))
    axes = records.comparison(adapters).plot("modules").axes[0]
    rows = [label.get_text() for label in axes.get_yticklabels()]
    assert rows == [f"mlp.part_{i} (all but run-{i})" for i in range(6)]
    assert "6 modules that yet other adapters share are left out" in axes.get_xlabel()
