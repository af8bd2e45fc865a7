"""Charts of HTML pages: ranges of axes, and heatmaps of one architecture each."""

from __future__ import annotations

import math
import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._analysis.records import PAIR_MATRICES, not_compared
from lorafast._report.html import fleet_charts, fleet_groups
from support import records
from support.files import tensor
from support.handmade import make_adapter
from support.pages import (
    analysis,
    every_chart,
    of_two_architectures,
    page_of,
    write_fleet,
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> lorafast.Fleet:
    return write_fleet(tmp_path_factory.mktemp("fleet"))


def extent(trace: dict[str, Any], axis: str) -> list[float]:
    """What a trace reaches on an axis, categories by their places."""
    if trace["type"] == "heatmap":
        count = len(trace["z"]) if axis == "y" else len(trace["z"][0])
        return [-0.5, count - 0.5]
    if trace["type"] == "box":
        if axis == "y":
            return [-0.5, len(trace["y"]) - 0.5]
        return [*trace["lowerfence"], *trace["upperfence"]]
    values = [value for value in trace[axis] if value is not None]
    if isinstance(values[0], str):
        return [-0.5, len(values) - 0.5]
    if axis == "x" and trace["type"] == "bar":
        return [*values, *(np.array(values) + trace["width"]).tolist()]
    return values


@pytest.mark.parametrize("adapters", [1, 4])
def test_both_axes_of_every_chart_have_the_range_of_their_data(
    tmp_path: Path, adapters: int
) -> None:
    charts = every_chart(write_fleet(tmp_path, adapters))
    assert len(charts) > 8
    for chart in charts:
        for name in ("x", "y"):
            axis = chart.layout[f"{name}axis"]
            low, high = sorted(axis["range"])
            assert "autorange" not in axis
            assert "rangemode" not in axis
            reached = [value for trace in chart.traces for value in extent(trace, name)]
            if axis.get("type") == "log":
                reached = np.log10(reached).tolist()
            assert low <= min(reached) + 1e-6, chart.title
            assert high >= max(reached) - 1e-6, chart.title
            # And not of far more than the data.
            assert name == "x" or high - low < 2.5 * max(1e-9, max(reached) - min(0, *reached))


def test_a_long_spectrum_has_the_range_of_its_powers(tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    tensors = {
        f"base_model.model.m.lora_{side}.weight": tensor(
            random.normal(size=shape).astype("f4"), "F32"
        )
        for side, shape in (("A", (64, 80)), ("B", (80, 64)))
    }
    make_adapter(tmp_path / "a", tensors, r=64, lora_alpha=8)
    charts = {chart.title: chart for chart in fleet_charts.charts(lorafast.scan(tmp_path))}
    axis = charts["Spectra"].layout["xaxis"]
    assert axis["type"] == "log"
    assert axis["range"] == pytest.approx([0, math.log10(64)], abs=0.1)


# Architectures


def test_a_heatmap_of_modules_has_one_architecture(fleet: lorafast.Fleet) -> None:
    title = "Where the fleet changes the model"
    charts = [chart for chart in fleet_charts.charts(fleet) if chart.title.startswith(title)]
    labels = {chart.title.removeprefix(f"{title}: "): chart for chart in charts}
    assert list(labels) == ["gpt2, shapes 1", "gpt2, shapes 2", "llama"]
    gpt = {"attn.c_attn", "mlp.c_fc"}
    for label, chart in labels.items():
        layers = set(chart.traces[0]["y"])
        assert layers == (set(records.LLAMA) if label == "llama" else gpt)
        assert "4 adapters" in chart.caption
    # Each has its own scale: what is small in one is not hidden by another's.
    modules = fleet.to_pandas("modules")
    wide = modules[(modules["out_features"] == 36) & (modules["block"] == 0)]
    expected = wide.groupby("layer")["frobenius_norm"].median()
    drawn = next(
        chart for chart in charts
        if chart.traces[0]["z"][0][0] == pytest.approx(expected["attn.c_attn"], rel=1e-4)
    )  # fmt: skip
    assert drawn.title.endswith(("shapes 1", "shapes 2"))


def test_a_matrix_has_one_architecture(fleet: lorafast.Fleet) -> None:
    # As if somebody had compared all with all.
    full = np.full((len(fleet), len(fleet)), 0.5)
    charts, notes = fleet_groups.matrices(fleet, fleet.names, full)
    assert [len(chart.traces[0]["z"]) for chart in charts] == [4, 4, 4]
    bases = dict(zip(fleet.names, fleet.adapters["base"].tolist(), strict=True))
    for chart in charts:
        assert len({bases[name] for name in chart.traces[0]["names"]}) == 1
    assert not notes


def test_adapters_without_a_cosine_are_named(fleet: lorafast.Fleet) -> None:
    cosine = lorafast.similarity(fleet, group_by_base=True)
    charts, notes = fleet_groups.matrices(fleet, cosine.names, np.asarray(cosine.matrix))
    assert sorted(len(chart.traces[0]["z"]) for chart in charts) == [3, 4, 4]
    for chart in charts:
        for i, row in enumerate(chart.traces[0]["z"]):
            assert all(value is not None or i == j for j, value in enumerate(row))
    broken = next(f.adapter for f in fleet.findings if f.finding.kind == "non_finite")
    assert notes == [f"{broken} has no cosine with any other adapter. An adapter has none that is "
                     "the only one of its base, or whose update is not finite."]  # fmt: skip


def test_of_many_architectures_the_largest_are_drawn(
    fleet: lorafast.Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lorafast._report.html import fleet_places

    monkeypatch.setattr(fleet_places, "MAX_HEATMAPS", 2)
    monkeypatch.setattr(fleet_groups, "MAX_HEATMAPS", 2)
    charts = fleet_places.places(fleet)
    assert len(charts) == 2
    assert all("Of 3 architectures those of most adapters are drawn." in c.caption for c in charts)
    matrices, notes = fleet_groups.matrices(fleet, fleet.names, np.ones((12, 12)))
    assert len(matrices) == 2
    assert notes == ["1 smaller group is not drawn: 4 adapters in all."]


def test_the_names_of_another_similarity_are_taken_as_they_are(fleet: lorafast.Fleet) -> None:
    charts, _ = fleet_groups.matrices(fleet, ["x", "y", "z"], np.ones((3, 3)))
    assert [len(chart.traces[0]["z"]) for chart in charts] == [3]
    assert charts[0].title == "Similarity of each pair"


def test_a_comparison_has_a_matrix_for_each_architecture() -> None:
    text = page_of("two architectures")
    tables = re.findall(r'<table class="matrix">.*?</table>', text, flags=re.DOTALL)
    assert len(tables) == 2
    for table, own, other in zip(tables, ("llama", "gpt"), ("gpt", "llama"), strict=True):
        assert f"{own}-0 × {own}-1" in table
        assert f"{other}-" not in table
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert len([caption for caption in captions if "block and layer" in caption]) == 2
    assert len(set(captions)) == len(captions)
    assert "of different architectures are not compared" in text
    assert "of different architectures are not compared" not in page_of("comparison")


def test_adapters_of_bases_of_one_shape_are_compared_in_one_matrix() -> None:
    runs = [
        analysis(name=f"run-{i}", config={"base_model_name_or_path": f"base-{i}"}) for i in range(2)
    ]
    text = records.comparison(runs).to_html()
    assert "run-0 × run-1" in text
    assert "of different architectures are not compared" not in text


def test_of_each_architecture_only_what_was_compared_is_shown() -> None:
    whole = of_two_architectures()
    modules = {
        path: replace(module, **dict.fromkeys(PAIR_MATRICES, not_compared(len(whole.names))))
        for path, module in whole.modules.items()
    }
    text = replace(whole, modules=modules, modules_compared=False).to_html()
    assert len(re.findall('<table class="matrix">', text)) == 2
    captions = re.findall(r"<figcaption>(.*?)</figcaption>", text)
    assert captions
    assert not [caption for caption in captions if "block and layer" in caption]
    assert text.count("The updates of single modules were not compared") == 1
