"""HTML pages on a dark screen, on paper, on a narrow screen and under the keyboard."""

from __future__ import annotations

import base64
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._report.html.dark import GROUND, INK, darken
from lorafast._report.html.elements import asset
from lorafast._report.plots.draw import draw, plots_of
from matplotlib.colors import to_hex, to_rgb
from support.browser import BROWSER, seen
from support.pages import (
    Tree,
    analysis,
    comparison,
    every_chart,
    page_of,
    write_fleet,
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> lorafast.Fleet:
    return write_fleet(tmp_path_factory.mktemp("fleet"))


def test_each_picture_is_there_for_both_themes() -> None:
    from PIL import Image

    for name in ("analysis", "comparison"):
        images = list(Tree(page_of(name)).all("img"))
        light = [one for one in images if one["class"] == "on-light"]
        dark = [one for one in images if one["class"] == "on-dark"]
        assert [one["alt"] for one in light] == [one["alt"] for one in dark]
        assert len(light) > 2
        for pair in zip(light, dark, strict=True):
            data = (base64.b64decode(one["src"].partition(",")[2]) for one in pair)
            corners = [
                Image.open(io.BytesIO(each)).convert("RGBA").getpixel((1, 1)) for each in data
            ]
            assert corners[0] == (255, 255, 255, 255)
            assert corners[1][3] == 0


def contrast(one: str, other: str) -> float:
    def luminance(color: str) -> float:
        parts = [c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for c in to_rgb(color)]
        return float(np.dot(parts, (0.2126, 0.7152, 0.0722)))

    high, low = sorted((luminance(one), luminance(other)), reverse=True)
    return (high + 0.05) / (low + 0.05)


@pytest.mark.parametrize("subject", [analysis, lambda: comparison(3)])
def test_dark_pictures_are_legible_and_show_the_same_values(subject: Callable[[], Any]) -> None:
    from matplotlib.text import Text

    result = subject()
    for kind in plots_of(result):
        figure = draw(result, kind)
        figure.draw_without_rendering()
        values = [image.get_array().copy() for axes in figure.axes for image in axes.images]
        maps = [image.get_cmap().name for axes in figure.axes for image in axes.images]
        in_cells = {text for axes in figure.axes if axes.images for text in axes.texts}
        before = {text: text.get_color() for text in in_cells}
        darken(figure)
        assert figure.patch.get_facecolor()[3] == 0
        for text in figure.findobj(Text):
            if text.get_text() and text not in in_cells:
                assert contrast(text.get_color()[:3], GROUND) > 4.5, (kind, text.get_text())
        images = [image for axes in figure.axes for image in axes.images]
        assert [image.get_cmap().name for image in images] == maps
        for image, value in zip(images, values, strict=True):
            np.testing.assert_array_equal(image.get_array(), value)
        assert all(text.get_color() == color for text, color in before.items())
        for line in (line for axes in figure.axes for line in axes.lines):
            color = line.get_color()
            assert contrast(color if isinstance(color, str) else color[:3], GROUND) > 2.9
            for marker in (line.get_markerfacecolor(), line.get_markeredgecolor()):
                if line.get_marker() != "None" and line.get_markeredgewidth():
                    assert contrast(to_hex(marker), GROUND) > 2.9, (kind, line.get_label())


def test_the_two_bars_of_a_range_differ_in_lightness_in_both_themes() -> None:
    figure = draw(comparison(3), "adapters")
    for ground in ("#ffffff", GROUND):
        if ground == GROUND:
            darken(figure)
        bars = {to_hex(bar.get_facecolor()) for bar in figure.axes[3].patches}
        assert len(bars) == 2
        assert contrast(*bars) > 1.5
        assert all(contrast(bar, ground) >= 3 for bar in bars)


def test_on_a_dark_ground_a_gap_is_no_color_of_the_map_and_its_mark_is_legible() -> None:
    from matplotlib import colormaps

    figure = draw(analysis(fill={"model.layers.1.mlp.up_proj": math.nan}), "heatmap")
    darken(figure)
    axes = figure.axes[0]
    (mark,) = (text for text in axes.texts if text.get_text() == "×")
    gap = to_hex(axes.get_facecolor())
    assert contrast(to_hex(mark.get_color()), gap) > 4.5
    colors = colormaps["cividis"](np.linspace(0, 1, 256))[:, :3]
    nearest = np.abs(colors - to_rgb(gap)).max(axis=1).min()
    assert nearest > 0.12


def test_the_dark_colors_are_those_of_the_style_sheet() -> None:
    dark = asset("style.css").split("prefers-color-scheme: dark")[1]
    assert f"--text: {INK}" in dark
    assert f"--ground: {GROUND}" in dark


def test_paper_is_white_whatever_the_screen() -> None:
    style = asset("style.css")
    schemes = re.findall(r"@media ([^{]*prefers-color-scheme[^{]*)\{", style)
    assert schemes
    assert all(query.startswith("screen and") for query in schemes)
    assert "@page" in style


# In a browser

browser = pytest.mark.skipif(BROWSER is None, reason="needs chromium")


def on_paper(page: str) -> str:
    """The page with the rules of paper on the screen."""
    start = page.index("<style>")
    style, rest = page[start:].split("</style>", 1)
    style = style.replace("@media print", "@media all").replace("@media screen", "@media not all")
    return f"{page[:start]}{style}</style>{rest}"


@browser
def test_on_paper_nothing_is_cut_off_or_left_folded(fleet: lorafast.Fleet, tmp_path: Path) -> None:
    found = seen(
        on_paper(fleet.to_html()),
        """
        dispatchEvent(new Event("beforeprint"));
        const style = (one) => getComputedStyle(document.querySelector(one));
        seen = {
          filter: style(".tools input").display, contents: style("nav").display,
          scroll: style(".scroll").overflow, first: style(".sortable td").position,
          wrap: style(".sortable td").whiteSpace,
          page: style("#adapters").page,
          footer: [style("footer").position,
            document.querySelector("footer").getBoundingClientRect().bottom
              <= document.querySelector("h1").getBoundingClientRect().bottom],
          folded: document.querySelectorAll(".findings details:not([open])").length,
          widths: Array.from(document.querySelectorAll(".chart"), (chart) => [
            chart.querySelector(".main-svg").getBoundingClientRect().width,
            chart.classList.contains("wide")]),
        };
        dispatchEvent(new Event("afterprint"));
        seen.back = document.querySelectorAll(".findings details[open]").length;
        """,
        tmp_path,
    )
    assert found["filter"] == found["contents"] == "none"
    assert found["scroll"] == "visible"
    assert found["first"] == "static"
    assert found["wrap"] == "normal"
    assert found["page"] == "landscape"
    # Below a table that fills its page the footer would be alone on the next.
    assert found["footer"] == ["absolute", True]
    assert found["folded"] == found["back"] == 0
    # The width of A4 less its margins is 703 pixels.
    assert all(width <= (660 if wide else 320) for width, wide in found["widths"])


@browser
def test_a_link_opens_what_its_row_is_in_and_marks_it(tmp_path: Path) -> None:
    found = seen(
        page_of("analysis"),
        """
        const rule = "rgba(0, 0, 0, 0)";
        const row = document.getElementById("tensor-5");
        seen = { open: row.closest("details").open,
          marked: getComputedStyle(row.cells[0]).backgroundColor,
          other: getComputedStyle(row.nextElementSibling.cells[0]).backgroundColor,
          inView: row.getBoundingClientRect().top >= 0
            && row.getBoundingClientRect().bottom <= innerHeight };
        // A row that the filter hides comes back.
        const input = document.querySelector("#modules input");
        input.value = "no such module";
        input.dispatchEvent(new Event("input"));
        seen.hidden = document.getElementById("module-3").hidden;
        location.hash = "#module-3";
        await new Promise((resolve) => setTimeout(resolve, 200));
        seen.shown = !document.getElementById("module-3").hidden;
        """,
        tmp_path,
        fragment="#tensor-5",
    )
    assert found["open"]
    assert found["inView"]
    assert found["marked"] != found["other"]
    assert found["hidden"]
    assert found["shown"]


@browser
def test_the_arrow_keys_move_among_headings_and_findings(tmp_path: Path) -> None:
    found = seen(
        page_of("analysis"),
        """
        const press = (key) => document.activeElement.dispatchEvent(
          new KeyboardEvent("keydown", { key, bubbles: true, cancelable: true }));
        const stops = (part) => Array.from(part.querySelectorAll("[tabindex='0']"),
          (one) => one.textContent);
        const head = document.querySelector("#modules thead tr");
        head.querySelector("button").focus();
        press("ArrowRight"); press("ArrowRight");
        seen = { heading: document.activeElement.textContent, stops: stops(head) };
        press("End");
        seen.end = document.activeElement.textContent;
        press("Home");
        seen.home = document.activeElement.textContent;
        const list = document.querySelector("#findings .roving");
        list.querySelector("a").focus();
        press("ArrowDown");
        seen.next = document.activeElement.textContent;
        const folded = list.querySelector("details");
        folded.open = true;
        await new Promise((resolve) => setTimeout(resolve, 100));
        press("ArrowDown"); press("ArrowDown");
        seen.inside = document.activeElement.tagName;
        folded.open = false;
        await new Promise((resolve) => setTimeout(resolve, 100));
        seen.left = Array.from(list.querySelectorAll("[tabindex='0']"))
          .filter((one) => one.getClientRects().length).length;
        """,
        tmp_path,
    )
    assert found["heading"] == "r"
    assert found["stops"] == ["r"]
    assert found["end"] == "entry mean"
    assert found["home"] == "module"
    assert found["next"] == "model.layers.0.self_attn.q_proj"
    assert found["inside"] == "A"
    assert found["left"] == 1


@browser
def test_on_a_narrow_screen_the_numbers_stay(fleet: lorafast.Fleet, tmp_path: Path) -> None:
    for number, page in enumerate((page_of("analysis"), fleet.to_html(similarity=None))):
        folder = tmp_path / str(number)
        folder.mkdir()
        found = seen(
            page,
            """
            const scroll = Array.from(document.querySelectorAll(".sortable .scroll")).at(0);
            const row = scroll.querySelector("tbody tr");
            const box = (cell) => cell.getBoundingClientRect();
            const visible = () => Array.from(row.cells).filter((cell) => box(cell).left >= 0
              && box(cell).right <= box(scroll).right + 1).length;
            seen = { first: box(row.cells[0]).width / innerWidth, at: visible(),
              hidden: Array.from(row.cells)
                .filter((cell) => getComputedStyle(cell).display === "none").length };
            scroll.scrollLeft = 1e6;
            seen.last = box(row.cells[row.cells.length - 1]).right <= box(scroll).right + 1;
            seen.stuck = Math.abs(box(row.cells[0]).left - box(scroll).left) < 3;
            seen.wider = document.documentElement.scrollWidth > innerWidth;
            """,
            folder,
            width=500,
        )
        assert found["first"] < 0.4
        assert found["at"] >= 5
        assert found["hidden"] == 0
        assert found["last"]
        assert found["stuck"]
        assert not found["wider"]


@browser
def test_on_a_narrow_screen_pictures_scroll_and_stay_legible(tmp_path: Path) -> None:
    for width in (500, 1280):
        folder = tmp_path / str(width)
        folder.mkdir()
        found = seen(
            page_of("analysis"),
            """
            await new Promise((resolve) => setTimeout(resolve, 200));
            seen = Array.from(document.querySelectorAll(".picture"), (part) => {
              const image = Array.from(part.children).find((one) => one.getClientRects().length);
              return { room: part.clientWidth, shown: image.getBoundingClientRect().width,
                own: image.naturalWidth, stop: part.tabIndex, role: part.getAttribute("role") };
            });
            seen.push(document.documentElement.scrollWidth > innerWidth);
            """,
            folder,
            width=width,
        )
        assert not found.pop()
        assert len(found) > 2
        for one in found:
            if width == 500:
                # 56rem, and no picture is made larger than it is.
                assert one["shown"] == pytest.approx(min(one["own"] + 2, 896), abs=3)
                assert (one["stop"], one["role"]) == (0, "group")
            else:
                assert one["shown"] <= one["room"] + 1
                assert (one["stop"], one["role"]) == (-1, None)


@browser
def test_charts_are_no_tab_stops(fleet: lorafast.Fleet, tmp_path: Path) -> None:
    found = seen(
        fleet.to_html(),
        """
        const ranges = Array.from(document.querySelectorAll("[id^=chart-]"),
          (one) => [one.layout.xaxis.range, one.layout.yaxis.range]);
        seen = { stops: Array.from(document.querySelectorAll(".chart *"))
          .filter((one) => one.tabIndex >= 0).length, ranges };
        """,
        tmp_path,
    )
    assert found["stops"] == 0
    given = json.dumps([[c.layout["xaxis"]["range"], c.layout["yaxis"]["range"]]
                        for c in every_chart(fleet)])  # fmt: skip
    assert len(found["ranges"]) == len(json.loads(given))
    for drawn, wanted in zip(found["ranges"], json.loads(given), strict=True):
        np.testing.assert_allclose(drawn, wanted)
