"""What crosses from the core is what its stub says, to the last key."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, get_args

import lorafast
import pytest
from digest_cases import CASES
from lorafast import _core
from lorafast._merge.api import MergeOptions
from lorafast._merge.plan import make_plan
from support.handmade import adapter_tensors, make_adapter, make_base
from support.pipelines import UNET, make_pipeline, prefixed
from support.stub import Shapes


def test_what_crosses_is_what_the_stub_says(tmp_path: Path) -> None:
    shapes = Shapes()

    def holds(value: Any, expected: str) -> None:
        assert list(shapes.differences(value, expected)) == []

    for number, case in enumerate(CASES.values()):
        base = case.base.write(tmp_path / f"{number}" / "base")
        adapters = [
            adapter.write(tmp_path / f"{number}" / f"{position}")
            for position, adapter in enumerate(case.adapters)
        ]
        plan = lorafast.plan(base, adapters, **case.options).core
        holds(plan.describe(), "PlanDescription")
        for tensor in plan.changed_tensors():
            holds(tensor, "ChangedTensor")
            if not tensor["quantised"]:
                for operands in plan.operands(tensor["place"]):
                    holds(operands, "Operands")
        for path in (base, *adapters):
            holds(lorafast.inspect(path).to_dict(), "Listing")
    assert _core.adapter_format(adapters[0]) in get_args(shapes.stub["AdapterFormat"])
    pipeline = make_pipeline(tmp_path / "pipeline")
    unet = make_adapter(tmp_path / "unet", adapter_tensors(prefixed("unet.", UNET)))
    holds(lorafast.plan(pipeline, unet).core.describe(), "PlanDescription")
    holds(lorafast.inspect(pipeline).to_dict(), "Listing")
    options = '{"to": "kohya"}'
    file = tmp_path / "unet.safetensors"
    holds(_core.convert_adapter(unet, file, base=None, options=options), "Conversion")
    carry_out_and_measure(tmp_path, holds)
    make_adapters(tmp_path, holds)
    # Each dictionary of the stub was held against something; tests/stores have the stores' own.
    assert shapes.seen == shapes.types.keys() - {"Cleaned", "StoreRequests"}


def make_adapters(tmp_path: Path, holds: Callable[[Any, str], None]) -> None:
    adapter, base, merged = (tmp_path / name for name in ("one", "base", "merged"))
    options = '{"rank": "budget:ranks=4"}'
    made = tmp_path / "made"
    found = _core.resize_adapter(adapter, made, base=None, options=options, progress=None)
    holds(found, "AlgebraResult")
    made = tmp_path / "extracted"
    apart = _core.plan_extraction(merged, base, made, options=options, parts=())
    holds(apart, "ExtractPlan")
    extracted = _core.extract_adapter(merged, base, made, options=options, parts=(), progress=None)
    holds(extracted, "ExtractResult")


def carry_out_and_measure(tmp_path: Path, holds: Callable[[Any, str], None]) -> None:
    base = make_base(tmp_path / "base")
    adapters = [
        make_adapter(tmp_path / name, adapter_tensors(seed=seed))
        for seed, name in enumerate(("one", "two"))
    ]
    plan = lorafast.plan(base, adapters).core
    merged = tmp_path / "merged"
    summary, lock = plan.execute(merged, {"recipes": {}})
    holds(summary, "Summary")
    assert summary["recipes"]
    assert lock.release() is None
    holds(plan.verify(merged, full=True), "VerifyOutcome")
    begun = plan.begin(tmp_path / "stepwise", {"threads": 1})
    begun.run(set())
    holds(begun.finish()[0], "Summary")
    back = make_plan(merged, adapters, MergeOptions(), subtract=True).core
    back.execute(tmp_path / "back")
    holds(back.distance(tmp_path / "back"), "Distance")
    holds(_core.build_info(), "BuildInfo")
    for shard in _core.write_shards(
        plan, [0], tmp_path / "parts", threads=1, sync=False, progress=None
    ):
        holds(shard, "WrittenShard")
    for metric in _core.module_metrics():
        holds(metric, "Metric")

    analysis = _core.analyze_adapter(
        adapters[0], base=base, percentiles=[50.0], bins=4, entries=True, threads=1, progress=None
    )
    holds(analysis, "Analysis")
    compared = _core.compare_adapters(adapters, modules=True, threads=1, progress=None)
    holds(compared, "AdapterComparison")
    collection, failures = _core.open_collection(adapters, threads=1, progress=None)
    assert failures == []
    for member in collection.members():
        holds(member, "Member")
    for signature, _ in collection.signatures([0, 1], threads=1, progress=None):
        holds(signature, "Signature")
    for relation in collection.relations([(0, 0), (0, 1)], threads=1, progress=None):
        holds(relation, "Relation")
    for step in collection.drift([0, 1], threads=1, progress=None):
        holds(step, "Drift")


@pytest.mark.parametrize("name", CASES)
def test_the_values_of_a_plan_say_as_much(tmp_path: Path, name: str) -> None:
    case = CASES[name]
    base = case.base.write(tmp_path / "base")
    adapters = [
        adapter.write(tmp_path / f"{position}") for position, adapter in enumerate(case.adapters)
    ]
    plan = lorafast.plan(base, adapters, **case.options)
    described = plan.to_dict()["tensors"]
    for tensor, plain in zip(plan.tensors, described, strict=True):
        assert {**plain, "shape": tuple(plain["shape"]), "updates": tensor.updates} == {
            key: value for key, value in tensor._asdict().items() if key in plain
        }
        for update, entry in zip(tensor.updates, plain["updates"], strict=True):
            values = update._asdict()
            assert values.keys() >= entry.keys()
            assert all(values[key] == entry[key] for key in entry if key != "part")  # type: ignore[literal-required]  # keys are the dictionary's own
            assert (update.part is None) == ("part" not in entry)


def test_a_difference_is_found() -> None:
    shapes = Shapes()
    info = _core.build_info()
    assert list(shapes.differences({**info, "amx": 1}, "BuildInfo")) == [
        "BuildInfo.amx is 1, no <class 'bool'>"
    ]
    assert list(shapes.differences({**info, "odd": 1}, "BuildInfo")) == ["BuildInfo has odd"]
    del info["amx"]  # type: ignore[misc]  # wrong on purpose
    assert list(shapes.differences(info, "BuildInfo")) == ["BuildInfo has no amx"]
