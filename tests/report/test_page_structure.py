"""HTML pages: links from findings to rows, tab stops, and blanks for what was not measured."""

from __future__ import annotations

import math
import re
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._report.html.elements import element, roving
from support.files import tensor
from support.handmade import make_adapter
from support.pages import (
    ATTACK,
    PAGES,
    Tree,
    analysis,
    comparison,
    page_of,
    write_fleet,
)


@pytest.fixture(scope="module")
def fleet(tmp_path_factory: pytest.TempPathFactory) -> lorafast.Fleet:
    return write_fleet(tmp_path_factory.mktemp("fleet"))


@pytest.fixture(params=[*PAGES, "fleet"])
def page(request: pytest.FixtureRequest, fleet: lorafast.Fleet) -> str:
    return fleet.to_html() if request.param == "fleet" else page_of(request.param)


# Links


def test_links_lead_to_elements_of_which_there_is_one(page: str) -> None:
    tree = Tree(page)
    ids = [one["id"] for one in tree.elements if "id" in one]
    assert len(ids) == len(set(ids))
    links = [one["href"] for one in tree.all("a")]
    assert links, "a page has at least its table of contents"
    for link in links:
        assert link.startswith("#")
        assert link[1:] in ids


def test_the_table_of_contents_has_every_section(page: str) -> None:
    tree = Tree(page)
    headings = [one["text"] for one in tree.all("h2")]
    assert [one["text"] for one in tree.all("a") if "nav" in one["inside"]] == headings


def rows_of(tree: Tree, text: str) -> set[str]:
    """The ids of the rows whose text begins so."""
    return {one["id"] for one in tree.all("tr") if "id" in one and one["text"].startswith(text)}


def targets_of(tree: Tree, text: str) -> set[str]:
    return {one["href"][1:] for one in tree.all("a") if one["text"] == text}


def test_findings_of_an_adapter_link_to_the_rows_they_are_about() -> None:
    tree = Tree(page_of("analysis"))
    tensor_name = "base_model.model.model.layers.0.self_attn.q_proj.lora_B.weight"
    for name in ("model.layers.1.mlp.up_proj", tensor_name):
        assert targets_of(tree, name) == rows_of(tree, name)
        assert len(rows_of(tree, name)) == 1
    assert not targets_of(tree, "of.no.table")


def test_findings_of_a_comparison_link_to_adapters_modules_and_cosines() -> None:
    tree = Tree(page_of("comparison"))
    assert targets_of(tree, "run-1") == rows_of(tree, "run-1")
    path = "model.layers.0.self_attn.q_proj"
    # A tensor has no row of its own there, its module has.
    found = targets_of(tree, f"base_model.model.{path}.lora_B.weight")
    assert found == targets_of(tree, path) == rows_of(tree, path)
    assert targets_of(tree, "to the cosines") == {"cosine-of-the-updates"}
    assert targets_of(tree, "to the modules") == {"modules-not-in-all-adapters"}


def test_findings_of_a_fleet_link_to_its_adapters(fleet: lorafast.Fleet) -> None:
    tree = Tree(fleet.to_html(similarity=None))
    broken = next(f.adapter for f in fleet.findings if f.finding.kind == "non_finite")
    assert broken is not None
    assert targets_of(tree, broken) == rows_of(tree, broken)
    assert len(rows_of(tree, broken)) == 1


# Tab stops


@pytest.mark.parametrize("kind", ["analysis", "comparison", "fleet"])
def test_more_rows_are_no_more_tab_stops(kind: str, tmp_path: Path) -> None:
    few, many = {
        "analysis": lambda: (analysis(1), analysis(30)),
        "comparison": lambda: (comparison(3, 1), comparison(16, 4)),
        "fleet": lambda: (write_fleet(tmp_path / "few", 2), write_fleet(tmp_path / "many", 9, 6)),
    }[kind]()
    stops = [len(Tree(one.to_html()).tab_stops()) for one in (few, many)]
    assert stops[0] == stops[1] <= 25


def test_what_moves_with_the_arrow_keys_has_one_tab_stop() -> None:
    links = (element("a", "<a>", href="#x", title="<a>") for _ in range(3))
    made = Tree(roving("div", '<button tabindex="-1">', *links, element("summary", "s")))
    assert [one.get("tabindex") for one in made.elements] == [None, "0", "-1", "-1", "-1"]
    # What a file's name holds is text.
    assert ATTACK not in page_of("hostile")
    assert made.elements[0]["text"].startswith('<button tabindex="-1">')


# Blanks


@pytest.mark.parametrize("name", ["broken", "empty", "comparison", "two architectures"])
def test_what_is_not_measured_is_blank(name: str) -> None:
    tree = Tree(page_of(name))
    for one in tree.all("td", "dd"):
        assert not re.search(r"\bNaN\b|\bnan\b|None|^–$", one["text"].replace("NaN and", ""))
    if name == "broken":
        numbers = [one for one in tree.all("td") if one.get("data-value") == "" and one["text"]]
        assert not numbers


def test_a_module_without_finite_values_has_no_metrics() -> None:
    path = "model.layers.0.self_attn.q_proj"
    page = analysis(fill={path: math.nan}).to_html()
    row = re.search(rf'<tr id="module-\d+"><td class="text">{"<wbr>".join(split(path))}.*', page)
    assert row is not None
    cells = re.findall(r"<td[^>]*>(.*?)</td>", row[0])
    assert cells[1:5] == ["16×16", "4", "8", "2"]
    assert set(cells[5:]) == {""}


def split(path: str) -> list[str]:
    return re.split(r"(?<=[._])", path)


def test_a_fleets_table_has_no_minus_one(tmp_path: Path) -> None:
    make_adapter(tmp_path / "bias", {"base_model.model.a.bias": tensor(np.ones(3, "f4"), "F32")},
                 bias="all")  # fmt: skip
    fleet = lorafast.scan(tmp_path)
    assert fleet.adapters["rank"].tolist() == [-1], "stands for no rank"
    cells = [one["text"] for one in Tree(fleet.to_html()).all("td")]
    assert cells[:5] == ["bias", "base", "", "", ""]
    assert not {"-1", "NaN", "–"} & set(cells)
