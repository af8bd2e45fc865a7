"""The HTML report: whole, escaped, loading nothing, and saying what was computed."""

from __future__ import annotations

import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from functools import cache
from html.parser import HTMLParser
from pathlib import Path

import pytest
from lorafast._analysis.records import Finding
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._report.html.elements import Html, element, natural
from lorafast._report.text import format_value
from support import records

VOID = {"meta", "img", "input", "polyline", "wbr"}
ATTACK = '</td></script><script>alert("x")</script><img src=x onerror=alert(1)>&amp;\' "'

FINDINGS = [
    Finding("critical", "non_finite", "model.layers.1.mlp.up_proj", 3.0, "B holds NaN."),
    Finding("warning", "dead_module", None, None, "Nothing was trained."),
]


def hostile() -> AdapterAnalysis:
    return records.analysis(
        {f"{ATTACK}{i}": (None, f"{ATTACK}{i}") for i in range(2)},
        name=ATTACK,
        findings=[Finding("critical", ATTACK, ATTACK, math.inf, ATTACK)],
        config={"task_type": ATTACK, ATTACK: [ATTACK]},
    )


def several(n: int) -> Comparison:
    return records.comparison(
        [
            records.analysis(records.places(1 + i % 2), name=f"run-{i}", seed=i, findings=FINDINGS)
            for i in range(n)
        ]
    )


SUBJECTS: dict[str, Callable[[], AdapterAnalysis | Comparison]] = {
    "analysis": lambda: records.analysis(findings=FINDINGS),
    "224 modules": lambda: records.analysis(records.places(32), size=8, rank=2),
    "zero": lambda: records.analysis(fill=0.0),
    "nan": lambda: records.analysis(fill=math.nan),
    "empty": lambda: records.analysis({}),
    "hostile": hostile,
    "comparison of one": lambda: several(1),
    "comparison of two": lambda: several(2),
    "comparison of three": lambda: several(3),
    "comparison of seventy": lambda: several(70),
    "hostile comparison": lambda: records.comparison([hostile(), hostile()]),
    "comparison of nothing": lambda: records.comparison([]),
}


@cache
def subject_of(name: str) -> AdapterAnalysis | Comparison:
    return SUBJECTS[name]()


@cache
def page_of(name: str) -> str:
    return subject_of(name).to_html()


class Reader(HTMLParser):
    """Checks that every element ends where it should, and collects what is in them."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.tables: list[list[list[str]]] = []
        self.headings: list[str] = []
        self.cells: list[str] | None = None
        self.feed(text)
        self.close()
        assert self.open == [], "elements that do not end"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)
        if tag == "table":
            self.tables.append([])
        if tag == "tr":
            self.tables[-1].append([])
        if tag in {"td", "th"}:
            self.tables[-1][-1].append("")
        if tag in {"h1", "h2"}:
            self.headings.append("")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag, "an element ends inside of another"

    def handle_data(self, data: str) -> None:
        if {"td", "th"} & set(self.open):
            self.tables[-1][-1][-1] += data
        if {"h1", "h2"} & set(self.open):
            self.headings[-1] += data


@pytest.mark.parametrize("name", SUBJECTS)
def test_the_page_is_well_formed_and_loads_nothing(name: str) -> None:
    text = page_of(name)
    assert text.startswith("<!DOCTYPE html>\n")
    reader = Reader(text)
    assert not re.search(r"https?:|@import|url\(", text.lower())
    for tag, attributes in reader.tags:
        assert tag not in {"link", "iframe", "object", "embed", "base", "form"}
        assert tag != "a" or (attributes["href"] or "").startswith("#")
        source = attributes.get("src")
        assert source is None or (tag == "img" and source.startswith("data:image/png;base64,"))
        assert not any(key.startswith("on") for key in attributes)
    policies = [a["content"] for t, a in reader.tags if a.get("http-equiv")]
    assert len(policies) == 1
    assert (policies[0] or "").startswith("default-src 'none';")
    assert "comparison" in name or reader.headings[1] == "Findings"


@pytest.mark.parametrize("name", ["hostile", "hostile comparison"])
def test_names_from_a_file_are_text_and_never_markup(name: str) -> None:
    reader = Reader(page_of(name))
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert all("onerror" not in attributes for _, attributes in reader.tags)
    cells = [cell for table in reader.tables for row in table for cell in row]
    assert f"{ATTACK}0" in cells
    assert any(
        ATTACK in (attributes.get("title") or "") for _, attributes in reader.tags
    ) == name.endswith("comparison")


def test_strings_are_escaped_and_html_is_not() -> None:
    inner = element("b", "1 < 2 & 3", title="\"'<>")
    assert inner == '<b title="&quot;&#x27;&lt;&gt;">1 &lt; 2 &amp; 3</b>'
    assert isinstance(inner, Html)
    assert element("p", inner, "<i>", class_="x", hidden=None) == (
        f'<p class="x">{inner}&lt;i&gt;</p>'
    )


def test_findings_stand_first_and_say_module_figure_and_reason() -> None:
    text = page_of("analysis")
    assert text.index("B holds NaN.") < text.index("<h2>Summary</h2>") < text.index("<h2>Modules")
    first = text[text.index('<li class="critical">') :].partition("</li>")[0]
    for part in ("critical", "model.layers.1.mlp.up_proj", "B holds NaN.", "non finite", "3"):
        assert part in first
    assert "Nothing out of the ordinary" in page_of("zero")
    assert "<b>run-1</b>" in page_of("comparison of two")


def test_many_findings_of_a_kind_are_folded_away_but_all_there() -> None:
    many = [Finding("note", "dead_module", f"m.{i}", 0.0, "Dead.") for i in range(100)]
    many.append(Finding("critical", "non_finite", None, 1.0, "NaN."))
    text = records.analysis(findings=many).to_html()
    assert text.count("<code>m.") == 100
    assert ">99 more of this kind</summary>" in text
    assert text.index("NaN.") < text.index("Dead."), "the critical first"


def test_the_modules_table_holds_the_figures_in_the_order_of_the_blocks() -> None:
    analysis = subject_of("224 modules")
    assert isinstance(analysis, AdapterAnalysis)
    head, *rows = Reader(page_of("224 modules")).tables[0]
    assert [row[0] for row in rows] == sorted(analysis.modules, key=natural)
    assert rows[7][0].startswith("model.layers.1.")
    for row in rows:
        module = analysis.modules[row[0]]
        assert row[head.index("r")] == str(module.rank)
        assert row[head.index("‖ΔW‖")] == f"{module.frobenius_norm:.4g}"
        assert row[head.index("effective rank")] == f"{module.effective_rank:.4g}"
        assert row[head.index("energy effective rank")] == f"{module.energy_effective_rank:.4g}"
        assert row[head.index("k₉₉")] == str(module.k99)
    assert "‖ΔW‖/‖W₀‖" not in head


def test_every_column_has_its_formula_on_hover() -> None:
    for name in ("analysis", "comparison of two", "comparison of three", "comparison of seventy"):
        tags = Reader(page_of(name)).tags
        headings = [attributes for tag, attributes in tags if tag == "th"]
        sortable = [a for a in headings if a.get("aria-sort")]
        assert len(sortable) > 10
        assert all(len(a.get("title") or "") >= len("Σw/n.") for a in sortable)
    titles = {a.get("title") for _, a in Reader(page_of("analysis")).tags}
    assert "Roy and Vetterli: exp H(σ/Σσ), H the entropy." in titles
    assert "Σσ²/σ₁²." in titles


def test_the_cosine_matrix_names_both_adapters_on_hover() -> None:
    comparison = subject_of("comparison of three")
    assert isinstance(comparison, Comparison)
    reader = Reader(page_of("comparison of three"))
    hovers = {a.get("title"): a for tag, a in reader.tags if tag == "td"}
    for i, one in enumerate(comparison.names):
        for j, other in enumerate(comparison.names):
            assert f"{one} × {other}: cosine {comparison.cosine[i, j]:.9g}" in hovers


def test_modules_that_only_some_adapters_have_are_named() -> None:
    text = page_of("comparison of two")
    assert "run-1: 7 not in every adapter" in text
    assert "<code>model.layers.1.mlp.up_proj</code></li>" in text
    assert "Every adapter updates the same modules." in page_of("comparison of one")


def test_without_matplotlib_the_page_says_why_there_are_no_plots(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    for name in ("analysis", "comparison of two"):
        text = subject_of(name).to_html()
        Reader(text)
        assert "<img" not in text
        assert "pip install matplotlib" in text
        assert "<h2>Modules</h2>" in text


def test_the_same_analysis_gives_the_same_page() -> None:
    assert subject_of("analysis").to_html() == page_of("analysis")


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (None, "–"),
        (12345, "12,345"),
        (0.123456, "0.1235"),
        (math.nan, "NaN"),
        (math.inf, "∞"),
        (-math.inf, "−∞"),
    ],
)
def test_numbers_are_written_for_reading(value: float | None, text: str) -> None:
    assert format_value(value) == text


BROWSER = next(filter(None, map(shutil.which, ("chromium", "chromium-browser"))), None)

#: Clicks and types as a reader would, and writes down what is to be seen.
PROBE = """
const part = document.querySelector(".sortable");
const button = (title) => Array.from(part.querySelectorAll("th button"))
  .find((one) => one.textContent === title);
const column = (i) => Array.from(part.querySelectorAll("tbody tr"))
  .filter((row) => !row.hidden).map((row) => row.cells[i].textContent);
const seen = {};
button("‖ΔW‖").click();
seen.descending = column(0);
seen.sorted = button("‖ΔW‖").parentElement.getAttribute("aria-sort");
button("‖ΔW‖").click();
seen.ascending = column(0);
button("module").click();
seen.names = column(0);
const input = part.querySelector("input");
input.value = "LAYERS.1. up";
input.dispatchEvent(new Event("input"));
seen.filtered = column(0);
seen.count = part.querySelector("output").textContent;
document.body.textContent = "SEEN" + JSON.stringify(seen) + "SEEN";
"""


@pytest.mark.skipif(BROWSER is None, reason="needs chromium to run the page's script")
def test_the_table_is_sorted_and_filtered_in_a_browser(tmp_path: Path) -> None:
    broken = "model.layers.0.self_attn.v_proj"
    analysis = records.analysis(records.places(12, records.LLAMA), fill={broken: math.nan}, size=8)
    path = tmp_path / "page.html"
    end = "</script></body>"
    text = analysis.to_html()
    assert text.count(end) == 1
    path.write_text(text.replace(end, PROBE + end), encoding="utf-8")
    run = subprocess.run(
        [str(BROWSER), "--headless", "--no-sandbox", "--disable-gpu",
         f"--user-data-dir={tmp_path / 'profile'}", "--dump-dom", path.as_uri()],
        capture_output=True, check=True, timeout=120,
    )  # fmt: skip
    seen = json.loads(run.stdout.decode().split("SEEN")[1])
    norms = {path: module.frobenius_norm for path, module in analysis.modules.items()}
    finite = sorted((p for p in norms if p != broken), key=lambda p: norms[p])
    assert seen["sorted"] == "descending"
    assert seen["descending"] == [*reversed(finite), broken]
    assert seen["ascending"] == [*finite, broken]
    assert seen["names"] == sorted(norms, key=natural)
    assert seen["filtered"] == ["model.layers.1.mlp.up_proj"]
    assert seen["count"] == "1 of 84 modules"
