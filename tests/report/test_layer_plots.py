"""Pictures of layers: a line for each layer over the blocks, and gaps where there is no module."""

from __future__ import annotations

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from lorafast._analysis.results import AdapterAnalysis
from lorafast._report.plots.draw import plots_of
from lorafast._report.plots.groups import group_modules
from support import records

Where = Mapping[str, tuple[int | None, str]]

#: (title, name of the statistic, field of the factor's tensor) of each panel.
PANELS = (
    ("Mean of A by block", "mean", "a_name"),
    ("Standard deviation of A by block", "std", "a_name"),
    ("Mean of B by block", "mean", "b_name"),
    ("Standard deviation of B by block", "std", "b_name"),
)


def panels(analysis: AdapterAnalysis, kind: str = "layers") -> dict[str, Any]:
    return {axes.get_title(loc="left"): axes for axes in analysis.plot(kind).axes}


def points(line: Any) -> dict[float, float]:
    """What a line shows: its finite values by their positions."""
    pairs = zip(line.get_xdata(), line.get_ydata(), strict=True)
    return {float(x): float(y) for x, y in pairs if math.isfinite(y)}


def legend(figure: Any) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]


@pytest.mark.parametrize("kind", ["layers", "overview"])
def test_each_layer_has_a_line_over_the_blocks(kind: str) -> None:
    analysis = records.analysis(records.places(32))
    drawn = panels(analysis, kind)
    for title, statistic, field in PANELS:
        lines = drawn[title].get_lines()[: len(records.LLAMA)]
        for layer, line in zip(records.LLAMA, lines, strict=True):
            assert points(line) == {
                module.block: getattr(analysis.tensors[getattr(module, field)], statistic)
                for module in analysis.modules.values()
                if module.layer == layer
            }
            assert line.get_linestyle() != "None"
    assert legend(analysis.plot(kind)) == list(records.LLAMA)


def test_what_an_adapter_lacks_is_a_gap_that_no_line_bridges() -> None:
    layer = "mlp.up_proj"
    lacking = {4, 9, 10}
    where = {
        path: (block, name)
        for path, (block, name) in records.places(16).items()
        if name != layer or block not in lacking
    }
    analysis = records.analysis(where)
    line = panels(analysis)["Standard deviation of B by block"].get_lines()[5]
    assert points(line).keys() == set(range(16)) - lacking
    at = list(line.get_xdata())
    for block in lacking:
        assert math.isnan(line.get_ydata()[at.index(block)])


def test_blocks_that_an_adapter_leaves_out_keep_their_place() -> None:
    where = {path: place for path, place in records.places(32).items() if place[0] in (0, 5, 31)}
    axes = panels(records.analysis(where))["Mean of A by block"]
    for line in axes.get_lines()[:7]:
        assert points(line).keys() == {0, 5, 31}
        # Between two blocks that are no neighbors lies at least one missing value.
        y = np.asarray(line.get_ydata(), dtype=float)
        assert not any(math.isfinite(a) and math.isfinite(b) for a, b in pairwise(y))


def test_the_heatmap_has_a_column_for_a_block_that_the_adapter_leaves_out() -> None:
    where = {path: place for path, place in records.places(9).items() if place[0] in (2, 3, 6, 8)}
    axes = records.analysis(where).plot("heatmap").axes[0]
    assert [label.get_text() for label in axes.get_xticklabels()] == list("2345678")
    shown = np.ma.filled(axes.get_images()[0].get_array(), math.nan)
    assert np.isfinite(shown).all(axis=0).tolist() == [True, True, False, False, True, False, True]
    assert np.isnan(shown[:, [2, 3, 5]]).all()
    assert not [text for text in axes.texts if text.get_text() == "×"]


def test_modules_outside_of_blocks_stand_apart() -> None:
    analysis = records.analysis({**records.places(3), "lm_head": (None, "lm_head")})
    axes = panels(analysis)["Mean of B by block"]
    (place,) = points(axes.get_lines()[7])
    assert place < -1
    labels = dict(zip(axes.get_xticks(), axes.get_xticklabels(), strict=True))
    assert labels[place].get_text() == "none"
    low, high = axes.get_xlim()
    assert low < place < 2 < high
    assert legend(analysis.plot("layers"))[-1] == "lm_head"


def test_experts_share_the_points_of_their_layer_and_no_line() -> None:
    where: Where = {
        f"model.layers.{block}.mlp.experts.{expert}.{name}": (block, f"mlp.experts.{expert}.{name}")
        for block in range(4)
        for expert in range(8)
        for name in ("up_proj", "down_proj")
    }
    analysis = records.analysis(where, rank=2, size=6)
    lines = panels(analysis)["Mean of A by block"].get_lines()[:2]
    for line in lines:
        assert line.get_linestyle() == "None"
        assert len(line.get_xdata()) == 32
    assert legend(analysis.plot("layers")) == [
        "mlp.experts.*.up_proj  (32)",
        "mlp.experts.*.down_proj  (32)",
    ]


def test_modules_without_blocks_are_points_in_the_order_of_the_file() -> None:
    where: Where = {
        f"unet.{i}.to_{'qk'[i % 2]}": (None, f"unet.{i}.to_{'qk'[i % 2]}") for i in range(40)
    }
    analysis = records.analysis(where, rank=2, size=6)
    figure = analysis.plot("layers")
    axes = figure.axes[0]
    assert axes.get_title(loc="left") == "Mean of A"
    assert axes.get_xlabel() == "module, in the order of the file"
    assert [points(line).keys() for line in axes.get_lines()[:2]] == [
        set(range(0, 40, 2)),
        set(range(1, 40, 2)),
    ]
    assert all(line.get_linestyle() == "None" for line in axes.get_lines()[:2])


def test_the_only_modules_of_their_layers_have_their_names_below() -> None:
    analysis = records.analysis(records.places(1))
    figure = analysis.plot("layers")
    labels = [label.get_text() for label in figure.axes[0].get_xticklabels()]
    assert labels == [f"0.{layer}" for layer in records.LLAMA]
    assert figure.axes[0].get_lines()[0].get_linestyle() == "None"
    assert not figure.legends


@pytest.mark.parametrize("fill", [math.nan, 0.0, None])
def test_no_point_of_a_factor_lies_outside_of_its_panel(fill: float | None) -> None:
    for blocks in (1, 32):
        analysis = records.analysis(records.places(blocks), fill=fill)
        for axes in analysis.plot("layers").axes:
            (left, right), (low, high) = axes.get_xlim(), axes.get_ylim()
            for line in axes.get_lines()[:7]:
                for x, y in points(line).items():
                    assert low <= y <= high
                    assert left < x < right or x in (0, 1)


def test_up_to_fourteen_lines_differ_without_color() -> None:
    layers = [f"part_{i}" for i in range(14)]
    analysis = records.analysis(records.places(3, layers), rank=2, size=6)
    lines = analysis.plot("layers").axes[0].get_lines()[:14]
    assert len({(line.get_marker(), line.get_linestyle()) for line in lines}) == 14
    assert len({(line.get_color(), line.get_linestyle()) for line in lines}) == 14


def test_groups_are_of_layers_then_of_numbered_ones_then_of_last_parts() -> None:
    where: Where = {
        f"layers.{i}.mlp{j}.experts.{j}.up": (i, f"mlp{j}.experts.{j}.up")
        for i in range(2)
        for j in range(6)
    }
    modules = list(records.analysis(where, rank=2, size=6).modules.values())
    assert len(group_modules(modules, 6)) == 6
    # The number within a name is a part of the name.
    assert list(group_modules(modules, 5)) == ["up"]
    assert list(group_modules(modules, 0)) == ["all modules"]


def test_a_block_is_a_number_and_a_layer_what_lies_in_it() -> None:
    """In no caption, title or label does `layer` stand for the number of a block."""
    figures = [records.analysis(records.places(20)).plot(kind) for kind in ("layers", "overview")]
    for figure in figures:
        for axes in figure.axes:
            assert "layer" not in axes.get_title(loc="left")
            assert "layer" not in axes.get_xlabel()
        assert figure.legends[0].get_title().get_text() == "layer"
    for noun in ("AdapterAnalysis", "Comparison"):
        for plot in plots_of(noun).values():
            assert "by layer" not in plot.caption
