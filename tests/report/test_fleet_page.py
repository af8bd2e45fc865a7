"""The page of a fleet: offline, escaped, and drawn by a real browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._report.html import fleet as fleet_page
from lorafast._report.html import fleet_charts
from lorafast._report.html.chart import logarithmic
from support.files import tensor
from support.handmade import adapter_tensors, make_adapter
from support.reference import PREFIX

BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)
ATTACK = "<img src=x onerror=alert(1)>&amp;"


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> lorafast.Fleet:
    root = tmp_path_factory.mktemp("fleet")
    for index in range(12):
        tensors = adapter_tensors(rank=4, seed=index, scale=0.1 + index / 50)
        if index == 3:
            b = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
            tensors[b] = tensor(np.full(tensors[b].shape, math.nan), "F32")
        name = f"a{index}" if index else ATTACK
        base = f"base-{index % 2}" if index != 5 else ATTACK
        make_adapter(root / name, tensors, base_model_name_or_path=base)
    make_adapter(root / "broken", peft_type="BOFT")
    return lorafast.scan(root)


def similarity(fleet: lorafast.Fleet, seed: int = 0) -> SimpleNamespace:
    """Cosines of as many random vectors around three directions."""
    random = np.random.default_rng(seed)
    centres = random.normal(size=(3, 40))
    vectors = centres[np.arange(len(fleet)) % 3] + random.normal(size=(len(fleet), 40)) / 3
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    return SimpleNamespace(names=fleet.names, matrix=vectors @ vectors.T)


def without_scripts(page: str) -> str:
    return re.sub(r"<script[^>]*>.*?</script>", "", page, flags=re.DOTALL)


def test_the_page_is_whole_and_loads_nothing(fleet: lorafast.Fleet) -> None:
    page = fleet.to_html(similarity=similarity(fleet))
    text = without_scripts(page)
    assert text.startswith("<!DOCTYPE html>")
    assert not re.search(r"https?:|@import|url\(|<link|<img", text.lower())
    assert "default-src 'none'" in html.unescape(text)
    headings = re.findall(r"<h2>(.*?)</h2>", text)
    assert headings == [
        *("Summary", "Findings", "Could not be read", "Distributions", "Similarity", "Adapters")
    ]
    assert text.index("NaN or infinity") < text.index("<h2>Distributions")
    assert "is a BOFT adapter" in text
    assert ATTACK not in page


def test_without_a_matrix_there_is_no_section_for_it(fleet: lorafast.Fleet) -> None:
    assert "<h2>Similarity</h2>" not in fleet.to_html(similarity=None)


def test_the_matrix_is_computed_unless_it_is_given(
    fleet: lorafast.Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[object] = []

    def compute(adapters: object, **options: object) -> SimpleNamespace:
        asked.append((adapters, options))
        return similarity(fleet)

    monkeypatch.setattr("lorafast._similarity.api.similarity", compute)
    assert "<h3>Similarity of each pair</h3>" in fleet.to_html()
    # Fleets of several bases are compared within each.
    assert asked == [(fleet, {"group_by_base": True})]

    def refuse(adapters: object, **options: object) -> None:
        raise lorafast.LorafastError("no two are of one shape")

    monkeypatch.setattr("lorafast._similarity.api.similarity", refuse)
    page = without_scripts(fleet.to_html())
    assert "were not compared with each other: no two are of one shape" in page
    monkeypatch.setattr(fleet_page, "COMPARED_UNASKED", 11)
    assert "More than 11 adapters are compared only when" in fleet.to_html()


@pytest.mark.parametrize("metrics", ["headers", "moments", "spectra"])
def test_every_level_has_a_page(fleet: lorafast.Fleet, metrics: Any) -> None:
    root = fleet.paths[0].parent
    page = without_scripts(lorafast.scan(root, metrics=metrics).to_html(similarity=None))
    assert "<h3>Ranks</h3>" in page
    assert ("<h3>Spectra</h3>" in page) == (metrics == "spectra")


def test_a_fleet_of_errors_has_a_page(tmp_path: Path) -> None:
    make_adapter(tmp_path / "broken", peft_type="BOFT")
    page = without_scripts(lorafast.scan(tmp_path).to_html())
    assert "is a BOFT adapter" in page


def test_plotly_is_asked_for_where_it_is_missing(
    fleet: lorafast.Fleet, monkeypatch: pytest.MonkeyPatch
) -> None:
    def absent(name: str) -> None:
        raise ModuleNotFoundError(name)

    monkeypatch.setattr(fleet_page.resources, "files", absent)
    with pytest.raises(lorafast.MissingDependencyError, match=r"lorafast\[charts\]"):
        fleet.to_html()


def test_histograms_count_every_adapter_once(fleet: lorafast.Fleet) -> None:
    charts = {chart.title: chart for chart in fleet_charts.charts(fleet)}
    finite = int(np.isfinite(fleet.adapters["frobenius_norm"]).sum())
    assert finite == len(fleet) - 1
    assert sum(charts["Norms of the updates"].traces[0]["y"]) == finite
    assert sum(len(t["x"]) for t in charts["Norm and effective rank"].traces) == finite
    assert charts["Ranks"].traces[0] | {"hovertemplate": ""} == {
        "type": "bar", "x": ["4"], "y": [12], "hovertemplate": "",
        "marker": charts["Ranks"].traces[0]["marker"],
    }  # fmt: skip


def test_spectra_and_places_are_medians_of_the_modules(fleet: lorafast.Fleet) -> None:
    charts = {chart.title: chart for chart in fleet_charts.charts(fleet)}
    values = np.stack(
        [v for v in fleet.modules["singular_values"] if np.isfinite(v).all() and v[0] > 0]
    )
    drawn = charts["Spectra"].traces[2]
    expected = np.median(values / values[:, :1], axis=0)
    np.testing.assert_allclose([drawn["y"][k - 1] for k in drawn["x"]], expected, rtol=1e-12)
    modules = fleet.to_pandas("modules")
    bases = dict(zip(fleet.names, fleet.adapters["base"].tolist(), strict=True))
    for base in ("base-0", "base-1"):
        places = charts[f"Where the fleet changes the model: {base}"].traces[0]
        own = modules[modules["adapter"].map(bases) == base]
        medians = own.groupby(["layer", "block"])["frobenius_norm"].median()
        for row, layer in zip(places["z"], places["y"], strict=True):
            assert row == pytest.approx([medians[layer, block] for block in range(2)], rel=1e-5)


def without_diagonal(matrix: Any) -> np.ndarray:
    """A matrix whose diagonal, every adapter with itself, is NaN."""
    values = np.array(matrix, dtype=float)
    np.fill_diagonal(values, math.nan)
    return values


def test_the_matrix_puts_like_beside_like(fleet: lorafast.Fleet) -> None:
    found = similarity(fleet)
    order = fleet_charts.similar_order(found.matrix)
    assert sorted(order.tolist()) == list(range(12))
    groups = [position % 3 for position in order.tolist()]
    assert sum(a != b for a, b in pairwise(groups)) == 2
    chart = fleet_charts.matrix(fleet.names, found.matrix)
    trace = chart.traces[0]
    assert trace["names"][order.tolist().index(0)] == "&lt;img src=x onerror=alert(1)&gt;&amp;amp;"
    np.testing.assert_allclose(
        without_diagonal(trace["z"]),
        without_diagonal(found.matrix[np.ix_(order, order)]),
        atol=1e-5,
    )


def test_the_order_needs_no_scipy(monkeypatch: pytest.MonkeyPatch, fleet: lorafast.Fleet) -> None:
    import builtins

    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("scipy"):
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    order = fleet_charts.similar_order(similarity(fleet).matrix)
    assert sorted(order.tolist()) == list(range(12))


@pytest.mark.parametrize("has_scipy", [True, False])
def test_those_of_one_base_stand_together(monkeypatch: pytest.MonkeyPatch, has_scipy: bool) -> None:
    import builtins

    plain = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("scipy") and not has_scipy:
            raise ImportError(name)
        return plain(name, *rest)

    monkeypatch.setattr(builtins, "__import__", without)
    random = np.random.default_rng(1)
    vectors = random.normal(size=(14, 3))
    vectors /= np.linalg.norm(vectors, axis=1, keepdims=True)
    matrix = vectors @ vectors.T
    bases = np.arange(14) % 2
    matrix[bases[:, None] != bases] = math.nan
    order = fleet_charts.similar_order(matrix)
    assert sum(a != b for a, b in pairwise(bases[order].tolist())) == 1
    chart = fleet_charts.matrix([f"a{i}" for i in range(14)], matrix)
    assert "different bases" in chart.caption
    assert chart.traces[0]["z"][0][-1] is None


def test_a_large_matrix_is_averaged(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fleet_charts, "MAX_CELLS", 4)
    random = np.random.default_rng(0)
    matrix = random.uniform(-1, 1, (11, 11))
    matrix = (matrix + matrix.T) / 2
    matrix[2, 5] = matrix[5, 2] = math.nan
    order = fleet_charts.similar_order(matrix)
    chart = fleet_charts.matrix([f"a{i}" for i in range(11)], matrix)
    ordered = without_diagonal(matrix[np.ix_(order, order)])
    assert "each cell is the mean" in chart.caption
    np.testing.assert_allclose(chart.traces[0]["z"][0][0], np.nanmean(ordered[:3, :3]), rtol=1e-4)
    assert len(chart.traces[0]["z"]) == 4
    assert chart.traces[0]["names"][0] == f"a{order[0]} … a{order[2]}"


#: Points, clicks and types as a reader would, and writes down what is to be seen.
PROBE = """
addEventListener("load", () => {
  const seen = { charts: document.querySelectorAll(".chart .main-svg").length,
    places: document.querySelectorAll(".chart").length };
  const matrix = document.querySelector(".chart.wide [id^=chart]");
  seen.matrices = Array.from(document.querySelectorAll(".chart.wide [id^=chart]"))
    .map((one) => one.data[0].z.map((row) => row.map((value) => value !== null)));
  matrix.emit("plotly_hover", { points: [{ x: 1, y: 0, z: matrix.data[0].z[0][1] }] });
  seen.pair = document.querySelector(".chart.wide output").textContent;
  const part = document.querySelector(".sortable");
  const shown = () => Array.from(part.querySelectorAll("tbody tr"))
    .filter((row) => !row.hidden).map((row) => row.cells[0].textContent);
  Array.from(part.querySelectorAll("th button"))
    .find((one) => one.textContent === "‖ΔW‖").click();
  seen.sorted = shown();
  const input = part.querySelector("input");
  input.value = "base-1 A3";
  input.dispatchEvent(new Event("input"));
  seen.filtered = shown();
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
});
"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium to run the page's script")
@pytest.mark.parametrize("is_real", [False, True])
def test_a_browser_draws_the_charts_and_works_the_table(
    fleet: lorafast.Fleet, tmp_path: Path, is_real: bool
) -> None:
    # The real one is of three bases, one of a single adapter, and one adapter holds NaN.
    found = lorafast.similarity(fleet, group_by_base=True) if is_real else similarity(fleet)
    page = fleet.to_html() if is_real else fleet.to_html(similarity=found)
    end = "</body>"
    place = page.rindex(end)
    path = tmp_path / "page.html"
    path.write_text(f"{page[:place]}<script>{PROBE}</script>{page[place:]}", encoding="utf-8")
    run = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    seen = json.loads(html.unescape(run.stdout.decode().split("SEEN")[1]))
    # No script failed, and nothing was asked for that the page's policy forbids.
    assert b"CONSOLE" not in run.stderr
    groups = [[0, 2, 4, 6, 8, 10], [1, 7, 9, 11]] if is_real else [list(range(12))]
    assert [len(matrix) for matrix in seen["matrices"]] == list(map(len, groups))
    # No cell of another base, and no cell of an adapter without a finite update.
    assert all(
        known or i == j
        for matrix in seen["matrices"]
        for i, row in enumerate(matrix)
        for j, known in enumerate(row)
    )
    assert seen["places"] == len(fleet_charts.charts(fleet)) + len(groups)
    assert seen["charts"] >= seen["places"]
    own = np.array(groups[0])
    order = own[fleet_charts.similar_order(found.matrix[np.ix_(own, own)])].tolist()
    first, second = (fleet.names[position] for position in order[:2])
    cosine = found.matrix[order[0], order[1]]
    figure = f"cosine {cosine:.4f}" if math.isfinite(cosine) else "no cosine"
    assert seen["pair"] == f"{first} and {second}: {figure}"
    norms = fleet.adapters["frobenius_norm"]
    finite = [name for name in np.array(fleet.names)[np.argsort(-norms)] if name != "a3"]
    assert seen["sorted"] == [*finite, "a3"]
    assert seen["filtered"] == ["a3"]


#: What a reader on a telephone has before him.
NARROW = """
addEventListener("load", () => {
  const matrix = document.querySelector(".chart.wide [id^=chart]");
  const seen = { width: matrix.clientWidth, height: matrix.clientHeight,
    names: matrix.querySelectorAll(".xtick text, .ytick text").length,
    beyond: Array.from(document.querySelectorAll(".chart .main-svg"))
      .filter((one) => one.getBoundingClientRect().right > innerWidth).length };
  document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
});
"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium to run the page's script")
@pytest.mark.parametrize("width", [500, 1400])
def test_names_leave_room_for_the_cells(fleet: lorafast.Fleet, tmp_path: Path, width: int) -> None:
    page = fleet.to_html(similarity=similarity(fleet))
    place = page.rindex("</body>")
    path = tmp_path / "page.html"
    path.write_text(f"{page[:place]}<script>{NARROW}</script>{page[place:]}", encoding="utf-8")
    run = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu", "--enable-logging=stderr",
         f"--window-size={width},900", f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom",
         path.as_uri()],
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    seen = json.loads(html.unescape(run.stdout.decode().split("SEEN")[1]))
    assert b"CONSOLE" not in run.stderr
    assert seen["names"] == (0 if width == 500 else 24)
    assert seen["beyond"] == 0
    if width == 500:
        assert seen["height"] <= seen["width"] < 500


def test_axes_say_whole_numbers(fleet: lorafast.Fleet) -> None:
    charts = {chart.title: chart for chart in fleet_charts.charts(fleet)}
    # Three adapters are not 0.2 of one high, a hundred have ticks of plotly's own.
    assert fleet_charts._counted(np.array([0, 3]))["dtick"] == 1
    assert "dtick" not in fleet_charts._counted(np.array([0, 100]))
    assert charts["Ranks"].layout["xaxis"]["range"] == [-2.0, 2.0]
    # Between 1 and 100, 20 is written as 20; in less than a power plotly does well.
    axis = logarithmic(0, 2)
    assert (axis["type"], axis["dtick"], axis["tickformat"]) == ("log", "D2", "~g")
    assert logarithmic(0, 6)["dtick"] == 1
    assert "dtick" not in logarithmic(0, 0.5)


def test_findings_are_words(fleet: lorafast.Fleet) -> None:
    page = without_scripts(fleet.to_html(similarity=None))
    assert "non finite" in page
    assert "non_finite" not in page
