"""What every result can be turned into, and the names that results had before."""

from __future__ import annotations

import json
import math
import pickle
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._analysis.records import Finding
from lorafast._report.serialize import from_plain
from lorafast._results import SCHEMA_VERSION, Result
from support import records
from support.fleets import make_fleet
from support.handmade import make_base

#: Of each class of results one, from the folder that `inputs` makes.
RESULTS: dict[str, Callable[[Path], Result]] = {
    "AdapterAnalysis": lambda folder: lorafast.analyze(folder / "fleet/a0"),
    "Comparison": lambda folder: lorafast.compare([folder / "fleet/a0", folder / "fleet/a3"]),
    "Fleet": lambda folder: lorafast.scan(folder / "fleet"),
    "Similarity": lambda folder: lorafast.similarity(folder / "fleet"),
    "Duplicates": lambda folder: lorafast.duplicates(folder / "fleet"),
    "Lineage": lambda folder: lorafast.lineage(folder / "fleet/a0", folder / "fleet"),
    "Trajectory": lambda folder: lorafast.trajectory([folder / "fleet/a0", folder / "fleet/a3"]),
    "MergePlan": lambda folder: lorafast.plan(folder / "base", folder / "fleet/a0"),
    "MergeReport": lambda folder: lorafast.merge(
        folder / "base", folder / "fleet/a0", folder / "merged", overwrite=True
    ),
    "Verification": lambda folder: lorafast.verify(
        folder / "base", folder / "fleet/a0", folder / "merged"
    ),
    "SubtractReport": lambda folder: lorafast.subtract(
        folder / "merged", folder / "fleet/a0", folder / "again", overwrite=True
    ),
}
#: What a merge writes down has no version of its own; the others have the one of all results.
WITHOUT_VERSION = {"MergePlan", "MergeReport", "Verification", "SubtractReport"}


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    folder = tmp_path_factory.mktemp("results")
    make_fleet(folder / "fleet")
    make_base(folder / "base")
    return {name: make(folder) for name, make in RESULTS.items()}


@pytest.mark.parametrize("name", RESULTS)
def test_every_result_is_saved_as_the_json_that_it_says(
    results: dict[str, Result], name: str, tmp_path: Path
) -> None:
    result = results[name]
    assert type(result).__name__ == name
    assert isinstance(result, Result)
    if isinstance(result, lorafast.Similarity):
        # Its file is the one that `load` reads.
        result.save(tmp_path / "similarity.npz")
        again = lorafast.Similarity.load(tmp_path / "similarity.npz")
        assert again.to_json() == result.to_json()
        return
    result.save(tmp_path / "result.json")
    text = (tmp_path / "result.json").read_text()
    assert text == result.to_json() + "\n"

    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is no JSON")

    json.loads(text, parse_constant=refuse)


@pytest.mark.parametrize("name", sorted(set(RESULTS) - WITHOUT_VERSION))
def test_results_say_their_version_and_what_they_are(results: dict[str, Result], name: str) -> None:
    plain = results[name].to_dict()
    assert list(plain)[:2] == ["schema_version", "kind"]
    assert plain["schema_version"] == SCHEMA_VERSION
    assert plain["kind"] == {"AdapterAnalysis": "adapter_analysis"}.get(name, name.lower())


@pytest.mark.parametrize("name", RESULTS)
def test_a_notebook_shows_every_result_without_markup_of_others(
    results: dict[str, Result], name: str
) -> None:
    shown = results[name]._repr_html_()
    tags = {"div", "p", "ul", "li", "b", "table", "thead", "tbody", "tr", "th", "td"}
    assert set(re.findall(r"</?(\w+)>", shown)) <= tags
    assert shown.count("<") == len(re.findall(r"</?\w+>", shown))


def test_an_analysis_of_the_first_schema_is_still_read() -> None:
    finding = Finding("critical", "non_finite", "m", 3.0, "NaN.")
    analysis = records.analysis(findings=[finding])
    plain: dict[str, Any] = json.loads(analysis.to_json())
    assert plain["findings"] == [
        {"severity": "critical", "kind": "non_finite", "module": "m", "value": 3.0,
         "reason": "NaN."}
    ]  # fmt: skip
    old = plain | {"schema_version": 1}
    old["findings"] = [
        {"severity": "severe", "kind": "non_finite", "module": "m", "figure": 3.0,
         "reason": "NaN."}
    ]  # fmt: skip
    again = from_plain(old)
    assert again == from_plain(plain)
    assert again.findings == [finding]


def test_the_figure_of_a_finding_is_its_value() -> None:
    finding = Finding("note", "unused_rank", "m", 2.0, "Unused.")
    with pytest.warns(DeprecationWarning, match=r"Finding\.figure is deprecated.*Finding\.value"):
        assert finding.figure == 2.0
    assert finding.value == 2.0


def test_a_finding_that_is_critical_is_severe_for_one_release() -> None:
    finding = Finding("critical", "non_finite", None, math.inf, "NaN.")
    assert finding.severity == "critical"
    assert finding.severity != "warning"
    assert {"critical": 1}[finding.severity] == 1
    assert json.dumps(finding.severity) == '"critical"'
    for again in (finding, pickle.loads(pickle.dumps(finding))):
        with pytest.warns(DeprecationWarning, match='use "critical"') as caught:
            assert again.severity == "severe"
        assert caught[0].filename == __file__
        with pytest.warns(DeprecationWarning, match='use "critical"'):
            assert (again.severity != "severe") is False
    with pytest.warns(DeprecationWarning, match='use "critical"') as caught:
        old = Finding("severe", "non_finite", None, math.inf, "NaN.")  # type: ignore[arg-type]  # an older word
    assert caught[0].filename == __file__
    assert old == finding
    assert old.severity == "critical"
