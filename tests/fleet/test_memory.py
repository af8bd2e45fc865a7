"""What fleets keep of thousands of adapters: their tables, and little else."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._analysis.names import names_of
from lorafast._fleet.discovery import discover, natural
from support.files import tensor, write_safetensors
from support.handmade import adapter_config, adapter_tensors, make_adapter
from support.reference import PREFIX


def make_many(root: Path, count: int) -> None:
    """Adapters of one module, each with a finding of its own."""
    for index in range(count):
        make_adapter(
            root / f"group-{index % 7}" / f"adapter-{index:05}",
            adapter_tensors({"model.layers.0.q_proj": (8, 8)}, rank=2, seed=index % 5),
            r=2,
            lora_alpha=100 + index,
        )


#: Scans 300 adapters, then 1,500, and prints what Python held at the most in each.
PEAKS = """
import gc, json, sys, tracemalloc
from pathlib import Path
import lorafast
from lorafast._fleet import cache, scan

case, folder = sys.argv[1], Path(sys.argv[2])
cache.SETTLED = cache.INTERVAL = 0
seen = 0

# A full collection alone empties the lists of free tuples, which hold thousands.
def collecting(original):
    def call(*arguments):
        global seen
        seen += 1
        if seen % 25 == 0:
            gc.collect()
        return original(*arguments)
    return call

for name in ("_succeed", "_fail"):
    setattr(scan._Scanning, name, collecting(getattr(scan._Scanning, name)))
# The table of interned names, which paths use, grows all at once when it is full: it has room here.
names = [sys.intern(f"interned-{number}") for number in range(100_000)]
options = {"metrics": "full" if case == "full" else "headers"}
peaks = []
for count in (300, 1500):
    root = folder / f"{count}"
    # What is made on first use stays, and belongs to no fleet.
    lorafast.scan(root, **options)
    gc.collect()
    tracemalloc.start()
    kept = {"cache": folder / "cache"} if case == "cache" else {}
    fleet = lorafast.scan(root, **options, **kept)
    peaks.append(tracemalloc.get_traced_memory()[1])
    tracemalloc.stop()
    found = len(fleet.errors) if case == "broken" else len(fleet)
    assert found == count and (case == "broken" or len(fleet.findings) >= count)
print(json.dumps(peaks))
"""


@pytest.mark.alone
@pytest.mark.parametrize(
    "case",
    [
        pytest.param("headers", marks=pytest.mark.exhaustive),
        pytest.param("full", marks=pytest.mark.exhaustive),
        "cache",
        pytest.param("broken", marks=pytest.mark.exhaustive),
    ],
)
def test_python_keeps_little_of_each_adapter(tmp_path: Path, case: str) -> None:
    for count in (300, 1500):
        make_many(tmp_path / f"{count}", count)
    if case == "broken":
        for path in tmp_path.glob("*/*/*/adapter_config.json"):
            path.write_text("{")
    # In a process of its own: what a test run has imported and cached is not the scan's.
    command = [sys.executable, "-c", PEAKS, case, str(tmp_path)]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peaks = json.loads(run.stdout)
    # The tables are the core's. A path, the texts that it is sorted and named by, and a tuple for
    # the core are what Python has of an adapter at a time; what was found would be more than that.
    # The sentence that says why one cannot be read is Python's until the tables take it.
    growth = (peaks[1] - peaks[0]) / 1200
    assert growth < (1500 if case == "broken" else 1000), peaks


TABLES = """
import resource, sys
from pathlib import Path
import lorafast
from lorafast import _core
found = []
_core.scan_adapters(
    [sys.argv[1]], metrics="full", threads=1,
    receive=lambda batch, *_: found.extend(result for _, result in batch),
)
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    fields = dict(line.split(":", 1) for line in lines)
    return [int(fields[name].split()[0]) << 10 for name in ("VmHWM", "VmRSS")]
before = anonymous()[1]
tables = _core.FleetTables("full", 1)
count = int(sys.argv[2])
# The order in which adapters are done is never quite that in which they were found.
for position in range(count):
    tables.add(position ^ 1, found[0], [])
names = [f"adapter-{position}" for position in range(count)]
adapters, modules = tables.finish(names, names)
print(anonymous()[0] - before, adapters.nbytes + modules.nbytes)
"""


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="memory is told by Linux's /proc")
def test_tables_take_no_more_than_half_of_themselves_beside_them(tmp_path: Path) -> None:
    modules = {f"model.layers.{index}.q_proj": (40, 40) for index in range(200)}
    path = make_adapter(tmp_path / "a", adapter_tensors(modules, rank=16), r=16)
    command = [sys.executable, "-c", TABLES, str(path), "1000"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    peak, size = map(int, run.stdout.split())
    assert size > 80 << 20
    # One column at a time is there twice, when they are brought into order; the singular values
    # are the largest. The constant is what the interpreter and its heap take.
    assert peak < 1.5 * size + (16 << 20)


def test_names_are_told_apart_by_their_parents(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    paths = []
    for name in (
        *("north/final", "south/final", "deep/south/final", "a", "b/a", "other"),
        *("x/adapter_model.safetensors", "y/style.safetensors", "y/style/x", "z.d/w.safetensors"),
    ):
        path = tmp_path / "runs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".safetensors":
            path.touch()
        else:
            path.mkdir(exist_ok=True)
        paths.append(path)
    (tmp_path / "link").symlink_to(tmp_path / "runs" / "north")
    (tmp_path / "whole").symlink_to(tmp_path / "runs" / "other")
    assert names_of(paths) == [
        *("north_final", "runs_south_final", "deep_south_final", "runs_a", "b_a", "other"),
        *("runs_x", "style", "style_x", "w"),
    ]
    links = [tmp_path / "link" / "final", tmp_path / "whole", tmp_path / "link" / ".." / "a"]
    assert names_of(links) == ["final", "whole", "a"]
    assert names_of([Path(os.path.relpath(paths[3])), Path("/")]) == ["a", "adapter"]
    assert names_of([tmp_path / "runs" / "gone"]) == ["gone"]
    cases = names_of([tmp_path / "runs" / "x", tmp_path / "runs" / "X"])
    assert len({name.casefold() for name in cases}) == 2
    assert names_of([paths[0]] * 2) == ["final", "final_2"]
    assert names_of([]) == []


def test_numbers_in_paths_are_sorted_as_numbers() -> None:
    names = ["run/checkpoint-1000", "run/checkpoint-500", "run", "run-2/a", "run/a", "10", "9"]
    for root in ("", "/", "/some/where/"):
        paths = [f"{root}{name}" for name in names]
        assert [path.removeprefix(root) for path in sorted(paths, key=natural)] == [
            *("9", "10", "run", "run/a", "run/checkpoint-500", "run/checkpoint-1000", "run-2/a"),
        ]
        assert [natural(Path(path)) for path in paths] == [natural(path) for path in paths]


def test_the_directory_at_hand_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_adapter(tmp_path / "a")
    monkeypatch.chdir(tmp_path)
    assert discover(".").adapters == ["a"]
    assert lorafast.scan(".").adapters["path"].tolist() == ["a"]


# --- findings ------------------------------------------------------------------------------


def odd_fleet(root: Path) -> lorafast.Fleet:
    """A fleet with findings of all severities, with and without a module and a figure."""
    for index in range(8):
        tensors = adapter_tensors(seed=index % 7)
        b = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
        settings: dict[str, Any] = {"base_model_name_or_path": f"base-{index % 2}"}
        if index == 1:
            tensors[b] = tensor(np.full(tensors[b].shape, np.nan), "F32")
        if index == 2:
            settings["lora_alpha"] = 4000
        if index == 3:
            tensors[b] = tensor(np.zeros(tensors[b].shape), "F32")
            settings["modules_to_save"] = ["head"]
            tensors["base_model.model.head.weight"] = tensor(np.ones((3, 3)), "F32")
        make_adapter(root / f"a{index}", tensors, **settings)
    (root / "a9").mkdir()
    (root / "a9" / "adapter_config.json").write_text("{")
    return lorafast.scan(root)


def test_findings_are_a_sequence_of_values(tmp_path: Path) -> None:
    fleet = odd_fleet(tmp_path)
    found = list(fleet.findings)
    kinds = {item.finding.kind for item in found}
    assert {"non_finite", "unusual_scale", "zero_update", "feature", "several_bases"} <= kinds
    severities = [item.finding.severity for item in found]
    assert severities == sorted(severities, key=["critical", "warning", "note"].index)
    for item in found:
        (own,) = {"feature": [None], "several_bases": [2.0]}.get(item.finding.kind, [...])
        assert own is ... or item.finding.value == own
        assert (item.adapter is None) == (item.finding.kind == "several_bases")
    # Of one adapter they are those of an analysis, the greatest of several modules'.
    names = dict(zip(fleet.names, fleet.paths, strict=True))
    for name, path in names.items():
        whole = lorafast.analyze(path).findings
        own_findings = [item.finding for item in found if item.adapter == name]
        for finding in own_findings:
            assert finding in whole or finding.kind in ("same_file", "norm_outlier")
        assert {f.kind for f in whole} <= {f.kind for f in own_findings}
    assert fleet.findings == found
    assert found == fleet.findings
    assert fleet.findings != found[:-1]
    assert fleet.findings != 3
    assert fleet.findings[1:3] == found[1:3]
    assert fleet.findings[-1] == found[-1]
    assert found[2] in fleet.findings
    assert fleet.findings + found == found + fleet.findings == found * 2
    with pytest.raises(IndexError):
        fleet.findings[len(found)]
    assert pickle.loads(pickle.dumps(fleet)).findings == found


def test_findings_are_a_table(tmp_path: Path) -> None:
    import pyarrow.parquet

    fleet = odd_fleet(tmp_path / "fleet")
    expected = [
        {
            "adapter": item.adapter,
            "severity": item.finding.severity,
            "kind": item.finding.kind,
            "module": item.finding.module,
            "figure": np.nan if item.finding.value is None else item.finding.value,
            "count": item.count,
            "reason": item.finding.reason,
        }
        for item in fleet.findings
    ]
    assert repr(fleet.to_arrow("findings").to_pylist()) == repr(expected)
    assert repr(fleet.to_polars("findings").to_dicts()) == repr(expected)
    # pandas has its own way to say that a text is not there.
    frame = fleet.to_pandas("findings")
    assert list(frame.columns) == list(expected[0])
    for name in frame:
        is_there = [row[name] is not None for row in expected]
        assert frame[name].notna().tolist() == [
            there and row[name] == row[name] for row, there in zip(expected, is_there, strict=True)
        ]
        values = [row[name] for row in expected if row[name] is not None]
        assert repr(frame[name][is_there].tolist()) == repr(values)
    fleet.to_parquet(tmp_path / "out")
    read = pyarrow.parquet.read_table(tmp_path / "out" / "findings.parquet")
    assert repr(read.to_pylist()) == repr(expected)
    # The adapters' table counts them.
    for name, severe in zip(fleet.names, fleet.adapters["severe"].tolist(), strict=True):
        own = [row for row in expected if row["adapter"] == name and row["severity"] == "critical"]
        assert severe == sum(row["count"] for row in own)


def test_errors_are_a_sequence_of_values(tmp_path: Path) -> None:
    for index in range(12):
        make_adapter(tmp_path / f"a{index}", **({} if index % 5 == 0 else {"peft_type": "OFT"}))
    fleet = lorafast.scan([tmp_path / "nowhere", tmp_path])
    found = list(fleet.errors)
    # What is no adapter comes first, then adapters in their order.
    expected = [f"a{index}" for index in range(12) if index % 5]
    assert [error.path.name for error in found] == ["nowhere", *expected]
    assert all(type(error) is lorafast.ScanError for error in found)
    assert "OFT" in found[-1].reason
    assert fleet.errors == found
    assert fleet.errors != found[1:]
    assert fleet.errors[2:4] == found[2:4]
    assert fleet.errors[-1] == found[-1]
    assert pickle.loads(pickle.dumps(fleet)).errors == found
    assert fleet.names == ["a0", "a5", "a10"]


def test_a_fleet_without_findings_has_an_empty_table(tmp_path: Path) -> None:
    path = tmp_path / "a"
    make_adapter(path)
    write_safetensors(path / "adapter_model.safetensors", adapter_tensors(rank=4))
    (path / "adapter_config.json").write_text(json.dumps(adapter_config(r=4)))
    fleet = lorafast.scan(path, metrics="headers")
    assert fleet.findings == []
    assert len(fleet.table("findings")) == 7
    assert fleet.to_arrow("findings").num_rows == 0
    assert fleet.adapters["findings"].tolist() == [[]]
