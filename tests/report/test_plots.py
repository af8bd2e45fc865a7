"""Plots: what is drawn is what was computed, and nothing that a file can hold breaks a picture."""

from __future__ import annotations

import inspect
import io
import math
import pickle
import struct
import subprocess
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any, get_args

import lorafast
import numpy as np
import pytest
from lorafast._analysis.records import Histogram
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._report import plots
from lorafast._report.directory import write_plots
from lorafast._report.plots import draw, style
from lorafast._report.plots.draw import plots_of
from lorafast._report.plots.png import DOTS_PER_INCH, png, save
from lorafast._types import AnalysisPlot, ComparisonPlot
from support import records

# Made when a test asks for them: to collect the tests takes none.
ANALYSES: dict[str, Callable[[], AdapterAnalysis]] = {
    "small": lambda: records.analysis(records.places(2, records.LLAMA[:2]), rank=4),
    "one module": lambda: records.analysis(records.places(1, records.LLAMA[:1]), rank=1),
    "224 modules": lambda: records.analysis(
        records.places(32),
        fill={"model.layers.3.mlp.up_proj": 0.0, "model.layers.9.mlp.up_proj": math.nan},
    ),
    "560 modules": lambda: records.analysis(records.places(80), rank=2, size=6),
    "without blocks": lambda: records.analysis(
        {f"unet.{i}.attention.to_q": (None, f"unet.{i}.attention.to_q") for i in range(150)}, size=8
    ),
    "some without a block": lambda: records.analysis(
        {**records.places(3), "lm_head": (None, "lm_head"), "embed": (None, "embed")}
    ),
    "zero": lambda: records.analysis(fill=0.0),
    "constant": lambda: records.analysis(fill=0.25),
    "nan": lambda: records.analysis(fill=math.nan),
    "infinite": lambda: records.analysis(fill=math.inf),
    "empty": lambda: records.analysis({}),
    "names": lambda: records.analysis(
        {f"$x_{{$<b>\n漢字 😀 \x07{'y' * 90}{i}": (None, f"$x_{{${'y' * 90}{i}") for i in range(3)},
        name="_$\\frac{ 漢字",
    ),
}


def several(n: int, blocks: int = 2) -> Comparison:
    return records.comparison(
        [
            records.analysis(
                records.places(blocks + i % 2), name=f"checkpoint-{500 * i}", seed=i, gain=1 + i
            )
            for i in range(n)
        ]
    )


COMPARISONS: dict[str, Callable[[], Comparison]] = {
    "one adapter": lambda: several(1),
    "two of 32 blocks": lambda: several(2, 32),
    "three": lambda: several(3),
    "thirteen": lambda: several(13, 1),
    "sixty": lambda: several(60, 1),
    "degenerate": lambda: records.comparison(
        [
            records.analysis(name="_zero$", fill=0.0),
            records.analysis(name="nan", fill=math.nan),
            records.analysis(name="huge", gain=1e6),
            records.analysis({}, name="empty"),
        ]
    ),
    "nothing shared": lambda: records.comparison(
        [
            records.analysis({"a": (None, "a")}, name="a"),
            records.analysis({"b": (None, "b")}, name="b"),
        ]
    ),
    "of nothing": lambda: records.comparison([]),
}


@cache
def subject_of(name: str) -> Any:
    return (ANALYSES.get(name) or COMPARISONS[name])()


EVERY = [(name, kind) for name in ANALYSES for kind in plots_of("AdapterAnalysis")]
EVERY += [(name, kind) for name in COMPARISONS for kind in plots_of("Comparison")]


@pytest.mark.parametrize(("name", "kind"), EVERY)
def test_every_plot_is_drawn_without_a_warning_and_fits(name: str, kind: str) -> None:
    figure = subject_of(name).plot(kind)
    width, height = figure.get_size_inches() * DOTS_PER_INCH
    assert 700 <= width <= 2600
    assert 350 <= height <= 3300
    figure.canvas.draw()
    for axes in figure.axes:
        for which in (axes.xaxis, axes.yaxis):
            low, high = sorted(which.get_view_interval())
            boxes = [
                tick.label1.get_window_extent()
                for tick in which.get_major_ticks()
                if tick.label1.get_text() and tick.label1.get_visible()
                if not tick.label1.get_rotation() and low <= tick.get_loc() <= high
            ]
            for i, box in enumerate(boxes):
                assert box.x0 >= -1, "a label is cut off at the left"
                assert box.y0 >= -1, "a label is cut off below"
                assert not any(box.overlaps(other) for other in boxes[i + 1 :])


def test_a_saved_plot_is_a_png_of_its_size(tmp_path: Path) -> None:
    figure = subject_of("small").plot("weights")
    data = save(figure, tmp_path / "plot.png").read_bytes()
    assert data.startswith(b"\x89PNG")
    assert struct.unpack(">II", data[16:24]) == (1200, 720)


def test_the_same_figure_gives_the_same_bytes() -> None:
    first, second = (png(subject_of("small").plot("overview")) for _ in range(2))
    assert first == second


def test_an_unknown_kind_is_answered_with_the_kinds_there_are() -> None:
    with pytest.raises(ValueError, match=r"'pie' of an analysis.*overview, weights, log_weights"):
        subject_of("small").plot("pie")
    with pytest.raises(ValueError, match=r"'weights' of a comparison.*distributions, adapters"):
        subject_of("three").plot("weights")


def test_without_matplotlib_the_error_says_how_to_install_it(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(lorafast.MissingDependencyError, match="pip install matplotlib"):
        subject_of("small").plot("overview")


@pytest.mark.parametrize(
    ("subject", "kinds"), [("AdapterAnalysis", AnalysisPlot), ("Comparison", ComparisonPlot)]
)
def test_kinds_are_a_literal_with_a_default_and_documented(subject: str, kinds: Any) -> None:
    known = plots_of(subject)
    assert get_args(kinds) == tuple(known)
    plot = getattr(lorafast, subject).plot
    default = inspect.signature(plot).parameters["kind"].default
    assert default in known
    for kind in known:
        assert f'- "{kind}": ' in plot.__doc__
    name = "small" if subject == "AdapterAnalysis" else "three"
    assert png(subject_of(name).plot()) == png(subject_of(name).plot(default))


AXES_OF = [("small", kind) for kind in plots_of("AdapterAnalysis")]
AXES_OF += [(name, kind) for name in ("three", "thirteen") for kind in plots_of("Comparison")]


@pytest.mark.parametrize(("name", "kind"), AXES_OF)
def test_a_plot_is_drawn_into_axes_that_are_given(name: str, kind: str) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(16, 9), layout="constrained")
    left, right = figure.subplots(1, 2)
    left.plot([1, 2], [3, 4])
    alone = subject_of(name).plot(kind)
    assert subject_of(name).plot(kind, ax=right) is figure
    # The canvas of a bare figure draws nothing, and so lays nothing out.
    figure.draw_without_rendering()
    # As many axes as the plot has for itself, beside those that it was not given.
    assert len(figure.axes) == 1 + len(alone.axes)
    assert figure.axes[0] is left
    assert len(left.lines) == 1
    drawn = [box for axes in figure.axes[1:] if (box := axes.get_tightbbox()) is not None]
    # The layout gives long names their room, and what stands beside them less.
    beside = left.get_tightbbox()
    assert beside is not None
    assert all(box.x0 > beside.x1 for box in drawn), "it runs into what stands beside it"
    assert all(box.x1 <= figure.bbox.x1 for box in drawn), "it is cut off"
    if len([axes for axes in alone.axes if axes.get_label() != "<colorbar>"]) == 1:
        assert right in figure.axes, "the axes are the caller's own"
    for one, other in zip(alone.axes, figure.axes[1:], strict=True):
        assert len(one.lines) == len(other.lines)
        assert len(one.images) == len(other.images)


def test_what_does_not_fit_into_axes_is_an_error() -> None:
    from matplotlib.figure import Figure

    axes = Figure().add_axes((0.1, 0.1, 0.8, 0.8))
    subject_of("small").plot("weights", ax=axes)
    with pytest.raises(ValueError, match=r"several panels.*plt\.subplots"):
        subject_of("small").plot("overview", ax=axes)
    with pytest.raises(TypeError, match="matplotlib's axes, not int"):
        subject_of("small").plot("weights", ax=3)
    with pytest.raises(TypeError, match="matplotlib's axes, not ndarray"):
        subject_of("small").plot("weights", ax=Figure().subplots(1, 2))
    # An error leaves no axes behind for the next plot.
    assert subject_of("small").plot("weights") is not axes.figure


def test_pyplot_and_global_settings_are_left_alone() -> None:
    program = """
import sys
from lorafast._report.plots import draw
from lorafast._report.plots.png import png
assert "matplotlib" not in sys.modules, "imported before it was needed"
from support import records
import matplotlib
raw = lambda: dict(dict.items(matplotlib.rcParams))  # to ask for the backend would import pyplot
before = raw()
for kind in draw.plots_of("AdapterAnalysis"):
    png(records.analysis().plot(kind))
for kind in draw.plots_of("Comparison"):
    png(records.comparison([records.analysis()] * 2).plot(kind))
assert "matplotlib.pyplot" not in sys.modules
assert raw() == before
"""
    subprocess.run(
        [sys.executable, "-c", program], check=True, cwd=Path(__file__).parents[1], timeout=120
    )


def test_a_notebook_can_show_a_figure_and_a_figure_can_be_pickled() -> None:
    figure = subject_of("small").plot("weights")
    assert figure._repr_png_().startswith(b"\x89PNG")  # type: ignore[attr-defined]  # a PlotFigure
    again = pickle.loads(pickle.dumps(figure))
    buffer = io.BytesIO()
    again.savefig(buffer)
    assert buffer.getvalue()


def test_the_histogram_is_drawn_as_it_was_computed() -> None:
    analysis = subject_of("small")
    figure = analysis.plot("weights")
    (patch,) = figure.axes[0].patches
    values, edges, _ = patch.get_data()  # type: ignore[attr-defined]  # a StepPatch
    assert values.tolist() == analysis.weights.histogram.counts
    assert list(edges) == analysis.weights.histogram.edges


def test_the_heatmap_puts_every_norm_at_its_block_and_place() -> None:
    analysis = subject_of("some without a block")
    modules = list(analysis.modules.values())
    rows, columns, values, present = style.grid_of(modules, [m.frobenius_norm for m in modules])
    assert columns == ["none", "0", "1", "2"]
    assert rows == [*records.LLAMA, "lm_head", "embed"]
    for module in modules:
        column = columns.index("none" if module.block is None else str(module.block))
        assert values[rows.index(module.layer), column] == module.frobenius_norm
    assert present.sum() == len(modules)
    (image,) = analysis.plot("heatmap").axes[0].get_images()
    np.testing.assert_array_equal(np.ma.filled(image.get_array(), np.nan), values)


def test_a_norm_that_is_not_finite_is_marked_and_no_colour() -> None:
    axes = subject_of("224 modules").plot("heatmap").axes[0]
    crosses = [text.get_position() for text in axes.texts if text.get_text() == "×"]
    assert crosses == [(9, records.LLAMA.index("mlp.up_proj"))]


def test_a_spectrum_of_one_value_has_one_tick() -> None:
    figure = subject_of("one module").plot("spectrum")
    figure.canvas.draw()
    for axes in figure.axes:
        low, high = axes.get_xlim()
        assert [tick for tick in axes.get_xticks() if low <= tick <= high] == [1]


def test_the_spectrum_is_relative_and_its_energy_ends_at_one() -> None:
    analysis = subject_of("small")
    left, right = analysis.plot("spectrum").axes
    for line, module in zip(left.get_lines(), analysis.modules.values(), strict=True):
        sigma = np.asarray(module.singular_values)
        np.testing.assert_allclose(line.get_ydata(), sigma / sigma[0])
    for line, module in zip(right.get_lines(), analysis.modules.values(), strict=False):
        energy = np.asarray(line.get_ydata(), dtype=float)
        assert energy[-1] == pytest.approx(1)
        assert energy[module.k90 - 1] >= 0.9
        assert module.k90 == 1 or energy[module.k90 - 2] < 0.9


def test_the_cosine_plot_shows_the_matrix() -> None:
    comparison = subject_of("three")
    axes = comparison.plot("cosine").axes[0]
    off = ~np.eye(3, dtype=bool)
    np.testing.assert_array_equal(axes.get_images()[0].get_array()[off], comparison.cosine[off])
    assert len(axes.texts) == 6
    assert not subject_of("sixty").plot("cosine").axes[0].texts


def test_long_names_keep_both_ends_and_stay_distinct() -> None:
    labels = style.truncate_all([f"base.{'x' * 80}.q_proj", f"base.{'x' * 81}.q_proj"], 30)
    assert labels[0].startswith("base.")
    assert labels[0].endswith("q_proj (1)")
    assert labels[1].endswith("q_proj (2)")


@pytest.mark.parametrize(
    ("edges", "counts"),
    [([], []), ([0.0, 1.0], [0]), ([0.0, math.nan], [1]), ([1.0, 1.0], [3]), ([0.0, 1.0], [1, 2])],
)
def test_a_histogram_of_nothing_is_not_drawn(edges: list[float], counts: list[int]) -> None:
    assert not style.is_drawable(Histogram(edges, counts))


#: A plot as somebody would add one: a module of the package, and nothing else.
OWN = """
from __future__ import annotations

from lorafast._analysis.results import AdapterAnalysis
from lorafast._report.plots.draw import plot
from lorafast._report.plots.style import new_figure


@plot("ranks", caption="ranks of the modules", page=True, file="{name}_ranks.png")
def ranks(analysis: AdapterAnalysis):
    figure = new_figure(5, 4, "Ranks")
    figure.subplots().bar(range(len(analysis.modules)), [m.rank for m in analysis.modules.values()])
    return figure
"""


@pytest.fixture
def own_plot(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    (tmp_path / "own_ranks.py").write_text(OWN)
    monkeypatch.setattr(plots, "__path__", [*plots.__path__, str(tmp_path)])
    before = {name: dict(known) for name, known in draw._PLOTS.items()}
    draw._load.cache_clear()
    yield
    draw._PLOTS.clear()
    draw._PLOTS.update(before)
    sys.modules.pop("lorafast._report.plots.own_ranks", None)
    draw._load.cache_clear()


@pytest.mark.usefixtures("own_plot")
def test_a_plot_is_added_by_one_file(tmp_path: Path) -> None:
    analysis = subject_of("small")
    (axes,) = analysis.plot("ranks").axes
    assert [bar.get_height() for bar in axes.patches] == [4, 4, 4, 4]
    assert "<figcaption>Ranks of the modules</figcaption>" in analysis.to_html()
    assert tmp_path / "own_ranks.png" in write_plots(tmp_path, analysis, "own")
    with pytest.raises(ValueError, match=r"no plot 'ranks' of a comparison"):
        subject_of("three").plot("ranks")


def test_a_plot_says_by_its_parameter_what_it_is_of() -> None:
    def of_a_number(number: float) -> None: ...

    with pytest.raises(TypeError, match=r"'odd' is of 'float'; plots are of: AdapterAnalysis"):
        draw.plot("odd", caption="nothing")(of_a_number)  # type: ignore[type-var]  # wrong on purpose


def test_the_list_of_plots_is_known_without_matplotlib() -> None:
    program = """
import sys
from lorafast._report.plots.draw import plots_of
assert list(plots_of("AdapterAnalysis"))[0] == "overview"
assert not any(name.split(".")[0] == "matplotlib" for name in sys.modules)
"""
    subprocess.run([sys.executable, "-c", program], check=True)
