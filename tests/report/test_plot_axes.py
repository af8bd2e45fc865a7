"""What a reader takes from the axes of plots: their ends, ticks, titles and bars."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from lorafast._report.plots.draw import draw
from support import records
from support.pages import GPT


def texts(axes: Any) -> list[str]:
    return [text.get_text() for text in axes.texts]


def ticks(axis: Any) -> list[float]:
    """The ticks of an axis that are seen."""
    low, high = sorted(axis.get_view_interval())
    return [tick for tick in axis.get_majorticklocs() if low <= tick <= high]


def test_ratios_end_at_one_and_have_plain_labels() -> None:
    for rank in (1, 8):
        figure = draw(records.analysis(records.places(2), rank=rank), "spectrum")
        figure.canvas.draw()
        scree = figure.axes[0]
        low, high = scree.get_ylim()
        assert 1 < high < 1.5
        assert low <= 0.5
        labels = [
            label.get_text()
            for tick, label in zip(
                scree.yaxis.get_majorticklocs(), scree.get_yticklabels(), strict=True
            )
            if low <= tick <= high
        ]
        assert labels[-1] == "1"
        assert len(labels) > 1
        assert not any("10" in label for label in labels)
        assert not any(label.get_text() for label in scree.get_yticklabels(minor=True))


def test_nothing_of_a_long_spectrum_is_cut_off() -> None:
    figure = draw(records.analysis(records.places(1), rank=64, size=80), "spectrum")
    figure.canvas.draw()
    scree = figure.axes[0]
    least = min(line.get_ydata().min() for line in scree.lines)
    assert scree.get_ylim()[0] <= least
    for axes in figure.axes:
        # There is neither a value of number 0 nor one beyond the rank.
        assert ticks(axes.xaxis)[0] == 1
        assert ticks(axes.xaxis)[-1] <= 64
        assert len(ticks(axes.xaxis)) <= 17


@pytest.mark.parametrize("longest", [1, 2, 16, 17, 160, 161, 8000, 8001])
def test_values_are_counted_from_one(longest: int) -> None:
    from lorafast._report.plots.analysis import _counted

    counted = _counted(longest)
    assert counted[0] == 1
    assert counted[-1] <= longest
    assert len(counted) <= 17
    assert len(set(counted)) == len(counted)


def test_each_empty_panel_says_why() -> None:
    figure = draw(records.analysis(records.places(1), fill=0.0), "spectrum")
    assert len(figure.axes) == 2
    for axes in figure.axes:
        assert "all are zero" in " ".join(texts(axes))


@pytest.mark.parametrize(
    "name",
    [
        "a",
        "meta-llama-3.1-70b-instruct-lora-of-dataset-7",
        "中文對話模型第三版超長名稱測試用的名稱" * 2,
    ],
)
def test_a_title_is_within_its_figure(name: str) -> None:
    for kind in ("heatmap", "spectrum", "weights"):
        figure = draw(records.analysis(records.places(1), name=name), kind)
        figure.canvas.draw()
        title = figure._suptitle
        box = title.get_window_extent()
        assert box.x0 >= 0
        assert box.x1 <= figure.bbox.width
        assert box.y1 <= figure.bbox.height
        # A short one has one line.
        assert ("\n" in title.get_text()) == (kind == "heatmap" and len(name) > 9)


def test_adapters_without_a_module_in_common_have_no_cosine() -> None:
    llama = [records.analysis(records.places(2), name=f"l-{i}", seed=i) for i in range(2)]
    gpt = [records.analysis(GPT, name=f"g-{i}", seed=i) for i in range(2)]
    comparison = records.comparison([*llama, *gpt])
    comparison.cosine[:2, 2:] = comparison.cosine[2:, :2] = 0.0
    kept = comparison.cosine.copy()
    axes = draw(comparison, "cosine").axes[0]
    shown = np.ma.getmaskarray(axes.images[0].get_array())
    assert shown[:2, 2:].all()
    assert shown[2:, :2].all()
    assert not shown[0, 1]
    assert texts(axes).count("×") == 8
    np.testing.assert_array_equal(comparison.cosine, kept)
    # A cosine of 0 of adapters of one model is one.
    same = records.comparison(llama)
    same.cosine[0, 1] = same.cosine[1, 0] = 0.0
    assert texts(draw(same, "cosine").axes[0]).count("0.000") == 2


def test_each_of_many_adapters_has_its_range() -> None:
    for count in (3, 200):
        where = dict(list(records.places(1).items())[:1])
        adapters = [
            records.analysis(where, name=f"run-{i}", seed=i, size=8, rank=2) for i in range(count)
        ]
        figure = draw(records.comparison(adapters), "adapters")
        figure.canvas.draw()
        for axes in figure.axes:
            widths = [bar.get_window_extent().width for bar in axes.patches]
            assert len(widths) >= count
            # Bars of less than a pixel are drawn or left out as they happen to lie.
            assert min(widths) > 1
        picture = np.asarray(figure.canvas.buffer_rgba())[:, :, :3]  # type: ignore[attr-defined]
        axes = figure.axes[3]
        for i, adapter in enumerate(adapters):
            inner = adapter.weights.percentiles[95.0]
            between = (inner + adapter.weights.max) / 2
            x, y = axes.transData.transform((i, between))
            column = picture[picture.shape[0] - 1 - int(y), int(x)]
            if adapter.weights.max - inner > 0.01:
                assert not (column > 240).all(), adapter.name


def test_markers_of_many_blocks_do_not_cover_the_lines() -> None:
    sizes = {}
    for blocks in (32, 126):
        figure = draw(records.analysis(records.places(blocks), size=8, rank=2), "layers")
        sizes[blocks] = {
            line.get_markersize() for line in figure.axes[0].lines if line.get_marker() != "None"
        }
    assert max(sizes[126]) < min(sizes[32])
    # A block between two gaps is a marker alone.
    assert min(sizes[126]) > 0
    assert math.isfinite(max(sizes[126]))
