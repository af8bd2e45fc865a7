"""What fleets keep of thousands of adapters: their tables, and little else."""

from __future__ import annotations

import gc
import json
import os
import pickle
import sys
import tracemalloc
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._analysis.names import names_of
from lorafast._fleet import cache as fleet_cache
from lorafast._fleet import names as fleet_names
from lorafast._fleet import table as fleet_table
from lorafast._fleet.arena import CHUNK, Room, fresh
from lorafast._fleet.discovery import discover, natural
from lorafast._fleet.table import LOOKED_BACK, TABLES, Lists, PathList, Texts, Words, WordsBuilder
from support.files import tensor, write_safetensors
from support.handmade import adapter_config, adapter_tensors, make_adapter
from support.reference import PREFIX

TEXTS = ["", "a", "ΔW", "same", "same", "b\udcff", "end"]


def column_bytes(column: Any) -> int:
    """What a column takes."""
    if isinstance(column, Texts):
        values: Any = column.values
        own = values.nbytes if isinstance(values, Words) else sum(map(sys.getsizeof, values))
        return column.codes.nbytes + int(own)
    if isinstance(column, Lists):
        return column_bytes(column.values) + column.offsets.nbytes
    return int(column.nbytes)


def table_bytes(fleet: lorafast.Fleet) -> int:
    tables = (fleet.table(name) for name in TABLES)
    return sum(column_bytes(column) for table in tables for column in table.stored().values())


def make_many(root: Path, count: int) -> None:
    """Adapters of one module, each with a finding of its own."""
    for index in range(count):
        make_adapter(
            root / f"group-{index % 7}" / f"adapter-{index:05}",
            adapter_tensors({"model.layers.0.q_proj": (8, 8)}, rank=2, seed=index % 5),
            r=2,
            lora_alpha=100 + index,
        )


@pytest.mark.alone
@pytest.mark.parametrize(
    ("case", "most"),
    [
        pytest.param("headers", 100, marks=pytest.mark.exhaustive),
        pytest.param("full", 100, marks=pytest.mark.exhaustive),
        ("cache", 200),
        pytest.param("broken", 600, marks=pytest.mark.exhaustive),
    ],
)
def test_nothing_grows_with_the_fleet_but_its_tables(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, most: float
) -> None:
    # What is bounded for thousands is to be bounded for hundreds here.
    monkeypatch.setattr(fleet_table, "LOOKED_BACK", 64)
    monkeypatch.setattr(fleet_cache, "SETTLED", 0)
    monkeypatch.setattr(fleet_cache, "INTERVAL", 0)
    beyond = []
    for count in (300, 1500):
        root = tmp_path / f"{count}"
        make_many(root, count)
        if case == "broken":
            for path in root.glob("*/*/adapter_config.json"):
                path.write_text("{")
        options: dict[str, Any] = {"metrics": "full" if case == "full" else "headers"}
        if case == "cache":
            options["cache"] = tmp_path / "cache"
        # What is made on first use stays, and belongs to no fleet.
        lorafast.scan(root / "group-0", metrics=options["metrics"])
        gc.collect()
        tracemalloc.start()
        try:
            # A full collection alone empties the lists of free tuples, which hold thousands.
            fleet = lorafast.scan(root, progress=lambda *_: gc.collect() and None, **options)
            # Pages of their own are not traced, but neither are they for a fleet as small as this.
            beyond.append(tracemalloc.get_traced_memory()[1] - table_bytes(fleet))
        finally:
            tracemalloc.stop()
        if case == "broken":
            assert len(fleet.errors) == count
        else:
            assert len(fleet.findings) >= len(fleet) == count
    # A path as an object alone takes 400 bytes, a finding or an error with its texts 800. Where no
    # adapter is sound, the search with its sorted texts is the most that there is at a time.
    assert (beyond[1] - beyond[0]) / 1200 < most


def test_texts_come_back_as_they_were() -> None:
    words = Words.of(TEXTS)
    assert list(words) == TEXTS
    assert [words[place] for place in range(-len(TEXTS), 0)] == TEXTS
    assert words[1:6:2] == TEXTS[1:6:2]
    assert len(words) == len(TEXTS)
    assert words.offsets.dtype == np.int32
    assert list(pickle.loads(pickle.dumps(words))) == TEXTS
    for place in (len(TEXTS), -len(TEXTS) - 1):
        with pytest.raises(IndexError):
            words[place]
    assert list(Words.of([])) == []
    many = [f"{index}" for index in range(3 * LOOKED_BACK)]
    assert list(Words.of(many)) == many


def test_a_text_that_comes_again_is_kept_once() -> None:
    builder = WordsBuilder()
    codes = [builder.code(text) for text in ("a", "b", "a")]
    assert codes == [0, 1, 0]
    # Only so many are looked at.
    codes += [builder.code(f"{index}") for index in range(LOOKED_BACK)]
    again = builder.code("a")
    words = builder.build()
    assert again > 1
    assert words[again] == "a"
    assert len(words) == again + 1


def test_paths_are_made_on_demand() -> None:
    paths = PathList(Words.of(["/a/b", "c"]))
    assert list(paths) == [Path("/a/b"), Path("c")]
    assert paths[-1] == Path("c")
    assert paths[:1] == [Path("/a/b")]


def test_room_gives_back_what_was_released() -> None:
    room = Room()
    random = np.random.default_rng(0)
    data = [random.bytes(size) for size in (10, CHUNK - 20, 30, 3 * CHUNK, 1, CHUNK)]
    places = [room.keep(each) for each in data]
    assert [
        bytes(room.at(place, len(each))) for place, each in zip(places, data, strict=True)
    ] == data
    room.release(places[0])
    # The first chunk holds another one still.
    assert bytes(room.at(places[1], len(data[1]))) == data[1]
    room.release(places[1])
    with pytest.raises(ValueError, match="released"):
        room.at(places[1], 1)
    room.release(places[5])
    again = room.keep(b"after the last")
    assert bytes(room.at(again, 14)) == b"after the last"
    assert bytes(room.at(places[2], 30)) == data[2]


@pytest.mark.parametrize("count", [0, 5, CHUNK])
def test_fresh_arrays_are_zeros_to_write_to(count: int) -> None:
    array = fresh(count, np.int64)
    assert array.dtype == np.int64
    assert array.shape == (count,)
    assert not array.any()
    array[:] = 7
    assert (array == 7).all()


def test_names_are_those_of_an_analysis(tmp_path: Path) -> None:
    (tmp_path / "runs").mkdir()
    paths = []
    for name in (
        *("north/final", "south/final", "North/FINAL", "deep/south/final", "a", "b/a", "other"),
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
    paths += [tmp_path / "link" / "final", tmp_path / "whole", tmp_path / "runs" / "gone"]
    paths += [Path(os.path.relpath(paths[4])), tmp_path / "link" / ".." / "a", Path("/")]
    for some in (paths, paths[:4], paths[3:9], paths[::-1], paths[:1], paths * 2, []):
        assert list(fleet_names.names_of(Words.of(map(os.fspath, some)))) == names_of(some)


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
    assert list(discover(".").adapters.words) == ["a"]
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
    assert repr(fleet.findings) == repr(found)
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
        make_adapter(tmp_path / f"a{index}", **({} if index % 5 == 0 else {"peft_type": "IA3"}))
    fleet = lorafast.scan([tmp_path / "nowhere", tmp_path])
    found = list(fleet.errors)
    # What is no adapter comes first, then adapters in their order.
    expected = [f"a{index}" for index in range(12) if index % 5]
    assert [error.path.name for error in found] == ["nowhere", *expected]
    assert all(type(error) is lorafast.ScanError for error in found)
    assert "IA3" in found[-1].reason
    assert fleet.errors == found
    assert fleet.errors != found[1:]
    assert fleet.errors[2:4] == found[2:4]
    assert fleet.errors[-1] == found[-1]
    assert repr(fleet.errors) == repr(found)
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
