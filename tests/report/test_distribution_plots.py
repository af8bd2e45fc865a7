"""Pictures of distributions: densities in shared bins, true to the weights, A and B apart."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._analysis.results import Comparison
from support import records
from support.analysis import Array, write_factors
from support.files import tensor
from support.reference import PREFIX

PATHS = [f"model.layers.{block}.self_attn.{name}" for block in range(3) for name in ("q", "v")]
LOG = "log₁₀(|w| + 1e-8)"

#: (B, A) of one module; both are drawn from the generator.
Make = Callable[[np.random.Generator], tuple[Array, Array]]


def normal(scale: float) -> Make:
    return lambda random: (random.normal(0, scale, (512, 8)), random.uniform(-0.1, 0.1, (8, 512)))


def make_adapter(folder: Path, make: Make, seed: int, **others: Any) -> dict[str, Array]:
    """Writes an adapter; returns all values of its A and of its B."""
    random = np.random.default_rng(seed)
    factors = {path: make(random) for path in PATHS}
    write_factors(folder, factors, **others)
    return {
        "A": np.concatenate([a.ravel() for _, a in factors.values()]),
        "B": np.concatenate([b.ravel() for b, _ in factors.values()]),
    }


def panels(comparison: Comparison) -> dict[str, Any]:
    figure = comparison.plot("distributions")
    figure.canvas.draw()
    return {axes.get_title(loc="left"): axes for axes in figure.axes}


def outlines(axes: Any) -> list[Any]:
    """The lines of a panel, without filled areas."""
    return [patch for patch in axes.patches if not patch.get_fill()]


def assert_is_true(patch: Any, values: Array, error: float) -> None:
    """A line is the density of these values, with an error relative to its peak."""
    drawn, edges, _ = patch.get_data()
    counts, _ = np.histogram(values, edges)
    expected = counts / (values.size * np.diff(edges))
    assert np.abs(drawn - expected).max() <= error * expected.max()


def test_all_adapters_are_counted_in_the_same_bins(tmp_path: Path) -> None:
    values = [make_adapter(tmp_path / str(i), normal(0.01 * (1 + i)), i) for i in range(3)]
    drawn = panels(lorafast.compare([tmp_path / str(i) for i in range(3)]))
    assert list(drawn) == ["Weights of A", "Magnitudes of A", "Weights of B", "Magnitudes of B"]
    for title, axes in drawn.items():
        lines = outlines(axes)
        assert len(lines) == 3
        for line, own in zip(lines, values, strict=True):
            np.testing.assert_array_equal(line.get_data().edges, lines[0].get_data().edges)
            shown = own[title[-1]]
            is_log = title.startswith("Magnitudes")
            assert_is_true(line, np.log10(np.abs(shown) + 1e-8) if is_log else shown, 0.1)
            assert np.sum(line.get_data().values * np.diff(line.get_data().edges)) == (
                pytest.approx(1)
            )


def test_peaks_differ_as_the_weights_do(tmp_path: Path) -> None:
    def with_outliers(random: np.random.Generator) -> tuple[Array, Array]:
        b, a = normal(0.013)(random)
        # Its own bins are ten times as wide as the other adapter's.
        b[0, 0], b[1, 1] = 0.5, -0.5
        return b, a

    values = [
        make_adapter(tmp_path / "narrow", normal(0.01), 0),
        make_adapter(tmp_path / "outliers", with_outliers, 1),
    ]
    axes = panels(lorafast.compare([tmp_path / "narrow", tmp_path / "outliers"]))["Weights of B"]
    lines = outlines(axes)
    peaks = [line.get_data().values.max() for line in lines]
    assert peaks[0] / peaks[1] == pytest.approx(1.3, rel=0.08)
    for line, own in zip(lines, values, strict=True):
        assert_is_true(line, own["B"], 0.15)
    # The outliers lie beyond the axis, which says how many.
    assert axes.get_xlim()[1] < 0.3
    assert "up to 0.0488 % of an adapter's weights lie beyond the axis" in axes.get_xlabel()


def test_exact_zeros_are_all_in_their_bin(tmp_path: Path) -> None:
    def half_zero(random: np.random.Generator) -> tuple[Array, Array]:
        b, a = normal(0.01)(random)
        b[::2] = 0.0
        return b, a

    make_adapter(tmp_path / "full", normal(0.05), 0)
    values = make_adapter(tmp_path / "half", half_zero, 1)["B"]
    drawn = panels(lorafast.compare([tmp_path / "full", tmp_path / "half"]))
    line = outlines(drawn["Weights of B"])[1]
    assert_is_true(line, values, 0.01)
    density, edges, _ = line.get_data()
    at = int(np.searchsorted(edges, 0.0)) - 1
    assert edges[at] == pytest.approx(-edges[at + 1])
    assert density[at] * (edges[at + 1] - edges[at]) >= 0.5
    magnitudes = outlines(drawn["Magnitudes of B"])[1].get_data()
    assert magnitudes.edges[0] == -8
    assert magnitudes.values[0] * np.diff(magnitudes.edges)[0] == pytest.approx(0.5)


@pytest.mark.parametrize("constant", [0.0, 0.02, -0.02])
def test_an_untrained_or_constant_factor_is_one_bin(tmp_path: Path, constant: float) -> None:
    make_adapter(tmp_path / "trained", normal(0.01), 0)
    make_adapter(
        tmp_path / "constant", lambda r: (np.full((512, 8), constant), r.normal(size=(8, 512))), 1
    )
    for title in ("Weights of B", "Magnitudes of B"):
        axes = panels(lorafast.compare([tmp_path / "trained", tmp_path / "constant"]))[title]
        density, edges, _ = outlines(axes)[1].get_data()
        (at,) = np.flatnonzero(density)
        value = constant if title.startswith("W") else math.log10(abs(constant) + 1e-8)
        assert edges[at] <= value <= edges[at + 1]
        assert edges[-1] - edges[0] < (0.2 if title.startswith("W") else 12)


def test_densities_are_logarithmic_in_all_panels_or_in_none(tmp_path: Path) -> None:
    for i, scale in enumerate((0.01, 0.012, 1.0)):
        make_adapter(tmp_path / str(i), normal(scale), i)
    for adapters, scale in (("01", "linear"), ("02", "log")):
        drawn = panels(lorafast.compare([tmp_path / name for name in adapters]))
        assert {axes.get_yscale() for axes in drawn.values()} == {scale}
        words = "density (logarithmic)" if scale == "log" else "density"
        assert {axes.get_ylabel() for axes in drawn.values()} == {words}


@pytest.mark.parametrize(("fill", "scale"), [(None, "linear"), (0.0, "log")])
def test_both_histograms_of_an_adapter_have_one_kind_of_axis(
    fill: float | None, scale: str
) -> None:
    analysis = records.analysis(fill=fill)
    upper = analysis.plot("overview").axes[:2]
    assert {axes.get_yscale() for axes in upper} == {scale}
    assert len({axes.get_ylabel() for axes in upper}) == 1


@pytest.mark.parametrize("count", [2, 3, 12])
def test_any_two_adapters_differ_in_color_and_in_dashes_or_in_both(count: int) -> None:
    comparison = records.comparison(
        [records.analysis(name=f"run-{i}", seed=i) for i in range(count)]
    )
    figure = comparison.plot("distributions")
    for axes in figure.axes:
        lines = outlines(axes)
        styles = [(line.get_edgecolor(), line.get_linestyle()) for line in lines]
        assert len({str(style) for style in styles}) == count
        assert all(one[0] != other[0] and one[1] != other[1] for one, other in pairwise(styles))
        # The area of the first of two is filled, so that they are told apart without color.
        assert len(axes.patches) - len(lines) == (count == 2)
    assert [text.get_text() for text in figure.legends[0].get_texts()] == comparison.names


def test_other_tensors_have_panels_of_their_own(tmp_path: Path) -> None:
    head = np.random.default_rng(3).normal(5.0, 1.0, (40, 40))
    make_adapter(tmp_path / "plain", normal(0.01), 0)
    make_adapter(
        tmp_path / "head", normal(0.01), 1, modules_to_save=["lm_head"],
        others={f"{PREFIX}lm_head.weight": tensor(head, "F32")},
    )  # fmt: skip
    drawn = panels(lorafast.compare([tmp_path / "plain", tmp_path / "head"]))
    (line,) = outlines(drawn["Weights of other tensors"])
    assert_is_true(line, head.ravel(), 0.06)
    assert line.get_linestyle() == outlines(drawn["Weights of A"])[1].get_linestyle()
    assert drawn["Weights of B"].get_xlim()[1] < 0.2


def test_an_adapter_without_finite_weights_has_no_line() -> None:
    comparison = records.comparison([
        records.analysis(name="good"),
        records.analysis({}, name="empty"),
    ])  # fmt: skip
    figure = comparison.plot("distributions")
    assert all(len(outlines(axes)) == 1 for axes in figure.axes)
    legend = [text.get_text() for text in figure.legends[0].get_texts()]
    assert legend == ["good", "empty (no finite weights)"]


def test_many_adapters_are_rows_of_their_densities(tmp_path: Path) -> None:
    values = [make_adapter(tmp_path / f"{i:02}", normal(0.01 * (1 + i)), i) for i in range(13)]
    drawn = panels(lorafast.compare([tmp_path / f"{i:02}" for i in range(13)]))
    axes = drawn["Weights of B"]
    image = axes.images[0]
    left, right, bottom, top = image.get_extent()
    assert (bottom, top) == (12.5, -0.5)
    for row, own in zip(image.get_array(), values, strict=True):
        counts, _ = np.histogram(own["B"], np.linspace(left, right, row.size + 1))
        assert row.max() == 1
        np.testing.assert_allclose(
            np.cumsum(row) / row.sum(), np.cumsum(counts) / counts.sum(), atol=0.01
        )
    labels = [label.get_text() for label in drawn["Weights of A"].get_yticklabels()]
    assert labels == [f"{i:02}" for i in range(13)]
