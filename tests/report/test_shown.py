"""What a notebook or a prompt shows of every value: a line, and tables of bounded size."""

from __future__ import annotations

import pickle
import typing
import xml.etree.ElementTree
from collections.abc import Callable, Collection, Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

import lorafast
import lorafast.torch
import numpy as np
import pytest
from lorafast._analysis.records import Histogram
from lorafast._report.lines import LONGEST
from lorafast._results import RecordDict, RecordList, RecordTuple
from support import records
from support.fleets import make_fleet
from support.handmade import adapter_tensors, make_adapter, make_base

#: As many modules as a model of some size has.
MANY = {f"model.layers.{layer}.mlp.up_proj": (8, 8) for layer in range(400)}
#: A name with what is markup in HTML, what ends a line, and more than a line holds.
ODD = "<b>&\"' \n" + "long-" * 30


def one_of_each(folder: Path) -> Iterator[tuple[str, Any]]:
    """A value of every public class, of a model with many modules, by the class's name."""
    base = make_base(folder / "base", modules=MANY)
    adapters = [
        make_adapter(folder / "fleet" / f"{ODD}{seed}", adapter_tensors(MANY, seed=seed))
        for seed in range(3)
    ]
    make_adapter(folder / "fleet" / "copy", adapter_tensors(MANY, seed=0))
    make_adapter(folder / "fleet" / "broken", peft_type="OFT")
    first, second, third = adapters
    plan = lorafast.plan(base, first)
    yield "MergePlan", plan
    yield "PlannedTensor", next(each for each in plan.tensors if each.updates)
    yield "Update", next(each.updates[0] for each in plan.tensors if each.updates)
    (part,) = plan.parts()
    yield "PlanPart", part
    yield "WrittenShard", part.write(folder / "parts")[0]
    report = lorafast.merge(base, first, folder / f"merged {ODD}")
    yield "MergeReport", report
    yield "Verification", lorafast.verify(base, first, report.output_path)
    yield "SubtractReport", lorafast.subtract(report.output_path, first, folder / "again")
    yield "CheckpointListing", lorafast.inspect(base)
    converted = folder / f"{ODD}.safetensors"
    yield "ConversionReport", lorafast.convert(first, converted, to="kohya")
    combined = lorafast.combine([first, second], folder / "both", rank="budget:ranks=900")
    yield "CombineReport", combined
    shared = {each.name: getattr(combined, each.name) for each in fields(lorafast.AlgebraReport)}
    yield "AlgebraReport", lorafast.AlgebraReport(**shared)
    yield "BudgetUse", combined.budget
    yield "ModuleResult", next(iter(combined.modules.values()))
    yield "ResizeReport", lorafast.resize(first, folder / "small", rank=2)
    yield "BakeReport", lorafast.bake(first, folder / "baked", scale="fold")
    extracted = lorafast.extract(report.output_path, base, folder / "extracted")
    yield "ExtractReport", extracted
    yield "ModuleExtraction", next(iter(extracted.extraction.values()))
    yield "AdapterListing", lorafast.inspect(first)
    analysis = lorafast.analyze(first, base=base, entries=True)
    yield "AdapterAnalysis", analysis
    yield "Finding", records.Finding("warning", "feature", ODD, 2.0, ODD * 10)
    yield "TensorStatistics", analysis.weights
    yield "Histogram", analysis.weights.histogram
    module = next(iter(analysis.modules.values()))
    yield "ModuleAnalysis", module
    yield "EntryStatistics", module.entries
    comparison = lorafast.compare(adapters)
    yield "Comparison", comparison
    compared = next(iter(comparison.modules.values()))
    yield "ModuleComparison", compared
    yield "PairComparison", compared.pairs[0]
    fleet = lorafast.scan(folder / "fleet")
    yield "Fleet", fleet
    yield "FleetFinding", fleet.findings[0]
    yield "ScanError", fleet.errors[0]
    untrained = {
        name: records_zero(value) if "lora_B" in name else value
        for name, value in adapter_tensors(MANY).items()
    }
    make_adapter(folder / "later" / "copy", untrained)
    make_adapter(folder / "later" / ODD, peft_type="OFT")
    difference = lorafast.scan_diff(fleet, lorafast.scan(folder / "later"))
    yield "ScanDiff", difference
    yield "AdapterChange", difference.changed[0]
    yield "FindingChange", difference.changed[0].findings[0]
    yield "Similarity", lorafast.similarity(folder / "fleet", per_module=True)
    found = lorafast.duplicates(folder / "fleet")
    yield "Duplicates", found
    yield "DuplicateGroup", found[0]
    yield "Evidence", found[0].evidence[0]
    yield "Lineage", lorafast.lineage(first, [second, third])
    way = lorafast.trajectory(adapters)
    yield "Trajectory", way
    yield "Checkpoint", way.steps[0]


@pytest.fixture(scope="module")
def values(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    return dict(one_of_each(tmp_path_factory.mktemp("values")))


#: What is open rather than a value.
OPENED = {"MergedView", "MergedSlice"}


def is_value(name: str) -> bool:
    public = getattr(lorafast, name)
    is_class = isinstance(public, type) and not issubclass(public, Exception)
    return is_class and name not in OPENED


def check(value: Any, *, most: int = 20_000) -> str:
    """Holds what is shown of a value against what a notebook can bear; returns the page."""
    text = repr(value)
    assert len(text.splitlines()) == 1
    assert text.isprintable()
    assert len(text) <= LONGEST
    page = value._repr_html_()
    assert len(page) < most
    root = xml.etree.ElementTree.fromstring(page)
    # Its own tags have no attributes: whatever has is from somewhere else.
    assert {each.tag for each in root.iter()} <= {
        "div", "p", "ul", "li", "b", "table", "thead", "tbody", "tr", "th", "td",
    }  # fmt: skip
    for table in root.iter("table"):
        assert len({len(row) for row in table.iter("tr")}) == 1, "rows of one length"
    return page


def test_there_is_one_of_every_public_value(values: dict[str, Any]) -> None:
    assert set(values) == {name for name in lorafast.__all__ if is_value(name)}
    for name, value in values.items():
        assert type(value) is getattr(lorafast, name)


@pytest.mark.parametrize("name", [name for name in lorafast.__all__ if is_value(name)])
def test_every_value_is_a_line_and_a_table(values: dict[str, Any], name: str) -> None:
    value = values[name]
    page = check(value)
    assert name.removesuffix("Listing")[:4] in repr(value)
    assert "<table>" in page


@pytest.mark.parametrize("name", [name for name in lorafast.__all__ if is_value(name)])
def test_so_is_whatever_a_value_holds(values: dict[str, Any], name: str) -> None:
    """What somebody types next: an attribute, which may have an entry for every module."""
    value = values[name]
    older = ("accounts", "figure", "verdict")  # which warn
    for attribute in dir(value):
        held = None if attribute in older else getattr(value, attribute)
        if attribute.startswith("_") or callable(held) or isinstance(held, str):
            continue
        if hasattr(held, "_repr_html_"):
            check(held)
        elif isinstance(held, Collection) and len(held) >= len(MANY):
            # Arrays and lists of numbers look as ever.
            assert isinstance(next(iter(held)), float | int | np.ndarray), attribute


def test_parts_are_checked_too(values: dict[str, Any]) -> None:
    assert len(values["AdapterAnalysis"].modules) == len(MANY)
    assert len(values["AdapterListing"].tensors) == 2 * len(MANY)
    assert len(values["MergeReport"].coverage[0]["tensors"]) == 2 * len(MANY)


def test_containers_show_some_and_how_many_more(values: dict[str, Any]) -> None:
    modules = values["AdapterAnalysis"].modules
    assert len(modules) == len(MANY)
    assert repr(modules).startswith("{'model.layers.0.mlp.up_proj': ModuleAnalysis(…), ")
    assert repr(modules).endswith(", … 397 more}")
    assert "… 390 more rows" in modules._repr_html_()
    assert "model.layers.9.mlp.up_proj" in modules._repr_html_()
    tensors = values["MergePlan"].tensors
    assert repr(tensors).startswith("(PlannedTensor(name='")
    assert "more)" in repr(tensors)
    assert repr(values["Verification"].untouched)[0] == "["
    assert repr(values["Fleet"].findings)[0] == "["


@pytest.mark.parametrize(
    ("shown", "plain"),
    [
        (RecordDict({"a": 1, "b": 2}), {"a": 1, "b": 2}),
        (RecordList([1, 2]), [1, 2]),
        (RecordTuple((1, 2)), (1, 2)),
    ],
)
def test_containers_are_what_they_were_before(shown: Any, plain: Any) -> None:
    assert shown == plain
    assert isinstance(shown, type(plain))
    again = pickle.loads(pickle.dumps(shown))
    assert again == plain
    assert type(again) is type(shown)
    # A short one looks as ever.
    assert repr(shown) == repr(plain)
    assert repr(type(shown)()) == repr(type(plain)())


def test_to_dict_has_plain_containers(values: dict[str, Any]) -> None:
    def plain(value: Any) -> None:
        assert type(value) in (dict, list, str, int, float, bool, type(None)), type(value)
        items = value.values() if isinstance(value, dict) else value
        for item in items if isinstance(value, dict | list) else ():
            plain(item)

    for name in ("MergeReport", "Verification", "SubtractReport", "AdapterAnalysis", "Comparison",
                 "Lineage", "Duplicates", "Trajectory", "Similarity", "MergePlan"):  # fmt: skip
        plain(values[name].to_dict())


def test_strangers_names_are_text(values: dict[str, Any]) -> None:
    for name in ("AdapterAnalysis", "MergeReport", "Fleet", "Duplicates"):
        page = values[name]._repr_html_()
        assert "&lt;b&gt;&amp;" in page
        assert "<b>&" not in page


def test_the_line_of_a_merge_says_what_went_where(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    report = lorafast.merge(base, adapter, tmp_path / "out")
    assert repr(report).startswith("<MergeReport: 1 adapter into ")
    assert "/out; 4 tensors changed, 0.00 GB in " in repr(report)
    page = report._repr_html_()
    for field in ("strategy", "total_parameters", "adapter_sha256"):
        assert f"<td>{field}</td>" in page


def test_warnings_stand_above_the_table(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    tensors = {
        name: records_zero(value) if "lora_B" in name else value
        for name, value in adapter_tensors().items()
    }
    report = lorafast.merge(base, make_adapter(tmp_path / "zero", tensors), tmp_path / "out")
    assert report.warnings
    assert repr(report).endswith("; 1 warning>")
    page = report._repr_html_()
    assert page.index("<li>") < page.index("<table>")


def records_zero(value: Any) -> Any:
    from support.files import tensor

    return tensor(np.zeros(value.shape), value.dtype)


def test_a_page_is_bounded_whatever_the_names() -> None:
    long = "&" * 5000
    analysis = records.analysis()
    many = {f"{long}{at}": module for at, module in enumerate([*analysis.modules.values()] * 100)}
    own = lorafast.AdapterAnalysis(
        **{**vars(analysis), "name": long, "path": long, "modules": many}
    )
    check(own)
    check(own.modules)
    check(lorafast.ScanError(Path(long), long))
    check(Histogram([0.0] * 10_000, [1] * 9_999))


def test_a_merged_module_is_shown_without_the_model() -> None:
    import torch

    module = torch.nn.Linear(2, 2)
    handle = lorafast.torch.MergedModule(module, ["style"], ["weight"] * 1000, "cpu")
    check(handle)
    assert "Linear" in repr(handle)
    check(lorafast.torch.Restoration(exact=True))
    assert repr(lorafast.torch.Restoration(True)) == (
        "Restoration(exact=True, largest=0, relative=0)"
    )


def test_a_fleet_of_errors_and_one_of_nothing_are_shown(tmp_path: Path) -> None:
    make_fleet(tmp_path / "fleet")
    fleet = lorafast.scan(tmp_path / "fleet")
    for name in ("adapters", "modules", "findings"):
        check(fleet.table(typing.cast(Any, name)))
    page = check(fleet)
    assert "<td>a0</td>" in page
    make_adapter(tmp_path / "bad" / "a", peft_type="OFT")
    check(lorafast.scan(tmp_path / "bad"))


def test_a_subclass_is_shown_under_its_own_name() -> None:
    class Own(lorafast.ScanError):
        pass

    assert repr(Own(Path("x"), "because")) == "Own(path='x', reason='because')"


CASES: list[Callable[[], Any]] = [
    lambda: lorafast.ScanError(Path("a\udcffb"), "reason"),
    lambda: lorafast.ScanError(Path("a\u202eb\x00\n"), "rea\x1bson"),
]


@pytest.mark.parametrize("make", CASES)
def test_what_cannot_be_printed_is_escaped(make: Callable[[], Any]) -> None:
    value = make()
    check(value)
    repr(value).encode()
    value._repr_html_().encode()
