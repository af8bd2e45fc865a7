"""Scanning fleets: the figures of `analyze` in tables, whatever is wrong with some adapters."""

from __future__ import annotations

import hashlib
import json
import math
import os
import shutil
import sqlite3
import subprocess
import sys
import threading
from contextlib import closing
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._fleet import cache as fleet_cache
from support.files import tensor, write_safetensors
from support.handmade import MODULES, adapter_config, adapter_tensors, make_adapter, make_base
from support.reference import PREFIX

FIGURES = (
    *("rank", "alpha", "scaling", "frobenius_norm", "spectral_norm", "stable_rank"),
    *("effective_rank", "energy_effective_rank", "participation_ratio", "k90", "k95", "k99"),
    *("numerical_rank", "condition", "entry_mean", "kind", "layer"),
)
STATISTICS = ("mean", "std", "min", "max", "l2_norm", "skewness", "kurtosis", "zero_share")
SUMMARY = ("frobenius_norm", "max_spectral_norm", "median_spectral_norm", "mean_effective_rank")


def assert_same_figures(fleet: lorafast.Fleet) -> None:
    """Every cell is the figure that `analyze` has, bit for bit."""
    modules = {name: fleet.modules[name] for name in fleet.modules}
    adapters = {name: fleet.adapters[name] for name in fleet.adapters}
    row = 0
    for position, (path, name) in enumerate(zip(fleet.paths, fleet.names, strict=True)):
        analysis = lorafast.analyze(path)
        assert adapters["path"][position] == str(path)
        assert adapters["name"][position] == name
        for column in SUMMARY:
            same(adapters[column][position], analysis.summary[column])
        for column in (*STATISTICS, "non_finite"):
            same(adapters[column][position], getattr(analysis.weights, column))
        assert adapters["modules"][position] == analysis.summary["modules"]
        assert adapters["parameters"][position] == analysis.summary["total_parameters"]
        assert adapters["bytes"][position] == analysis.summary["total_bytes"]
        assert adapters["base"][position] == analysis.summary["base"]
        kinds = [finding.kind for finding in analysis.findings]
        assert adapters["findings"][position] == list(dict.fromkeys(kinds))
        counts = [
            sum(finding.severity == severity for finding in analysis.findings)
            for severity in ("severe", "warning", "note")
        ]
        assert [adapters[c][position] for c in ("severe", "warnings", "notes")] == counts
        for module in analysis.modules.values():
            assert modules["adapter"][row] == name
            assert modules["module"][row] == module.path
            assert modules["block"][row] == (-1 if module.block is None else module.block)
            assert (modules["out_features"][row], modules["in_features"][row]) == module.shape
            for column in FIGURES:
                same(modules[column][row], getattr(module, column))
            assert modules["singular_values"][row].tolist() == module.singular_values or math.isnan(
                module.frobenius_norm
            )
            for side, tensor_name in (("a", module.a_name), ("b", module.b_name)):
                for column in STATISTICS:
                    expected = getattr(analysis.tensors[tensor_name], column)
                    same(modules[f"{side}_{column}"][row], expected)
            row += 1
    assert row == fleet.modules.rows


def same(found: Any, expected: Any) -> None:
    if isinstance(expected, float) and math.isnan(expected):
        assert math.isnan(found)
    else:
        assert found == expected


def make_fleet(root: Path, count: int = 6) -> list[Path]:
    """Adapters of several ranks and types, some with something odd about them."""
    paths = []
    for index in range(count):
        rank = (4, 8, 2)[index % 3]
        dtype = ("F32", "BF16", "F16")[index % 3]
        tensors = adapter_tensors(rank=rank, dtype=dtype, seed=index)
        b = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
        if index % 4 == 1:
            tensors[b] = tensor(np.zeros(tensors[b].shape), dtype)
        if index % 4 == 2:
            tensors[b] = tensor(np.full(tensors[b].shape, math.nan), dtype)
        paths.append(make_adapter(root / f"a{index}", tensors, r=rank, use_rslora=index % 2 == 1))
    return paths


def tables(fleet: lorafast.Fleet) -> dict[str, Any]:
    """Everything that two scans of the same adapters have in common, as plain objects."""
    found = {
        f"{name}.{column}": [
            value.tolist() if isinstance(value, np.ndarray) else value
            for value in fleet.table(name)[column].tolist()  # type: ignore[arg-type]
        ]
        for name in ("adapters", "modules")
        for column in fleet.table(name)  # type: ignore[arg-type]
    }
    # NaN is not itself, but repr says what it is.
    return {"tables": repr(found), "findings": repr(fleet.findings), "errors": fleet.errors}


def test_figures_are_those_of_analyze(tmp_path: Path) -> None:
    paths = make_fleet(tmp_path)
    fleet = lorafast.scan(tmp_path, threads=2)
    assert fleet.paths == paths
    assert fleet.errors == []
    assert_same_figures(fleet)
    assert (
        fleet.adapters["sha256"][0]
        == hashlib.sha256((paths[0] / "adapter_model.safetensors").read_bytes()).hexdigest()
    )
    assert fleet.adapters["scaling_rule"][:2].tolist() == ["alpha/r", "alpha/sqrt(r)"]
    assert [len(values) for values in fleet.modules["singular_values"][:8]] == [4] * 4 + [8] * 4
    severe = [item for item in fleet.findings if item.finding.severity == "severe"]
    assert {item.adapter for item in severe} == {"a2"}
    assert fleet.findings[: len(severe)] == severe


def test_rows_have_as_many_singular_values_as_their_updates(tmp_path: Path) -> None:
    # No more than the smaller side of the weight, whatever the rank.
    make_adapter(tmp_path / "wide", adapter_tensors(rank=22), r=22)
    make_adapter(tmp_path / "narrow", adapter_tensors(rank=2), r=2)
    fleet = lorafast.scan(tmp_path)
    lengths = [len(values) for values in fleet.modules["singular_values"]]
    assert lengths == [2] * 4 + [20] * 4
    assert_same_figures(fleet)


def test_threads_do_not_change_the_tables(tmp_path: Path) -> None:
    make_fleet(tmp_path, 20)
    assert tables(lorafast.scan(tmp_path, threads=1)) == tables(lorafast.scan(tmp_path, threads=5))


@pytest.mark.real_data
def test_everything_that_others_trained(real_data: Path) -> None:
    fleet = lorafast.scan(real_data / "adapters")
    assert len(fleet) >= 4
    assert_same_figures(fleet)
    folders = {path for path in (real_data / "adapters").iterdir() if path.is_dir()}
    seen = [*fleet.paths, *(error.path for error in fleet.errors)]
    assert {folder for folder in folders if not any(folder in (p, *p.parents) for p in seen)} == (
        set()
    )
    for error in fleet.errors:
        with pytest.raises((lorafast.LorafastError, OSError)) as refused:
            lorafast.analyze(error.path)
        assert error.reason in str(refused.value)
        assert not error.reason.startswith("/")
        assert len(error.reason) > 20


@pytest.mark.parametrize("metrics", ["headers", "moments", "spectra"])
def test_levels_have_the_columns_of_the_full_one(tmp_path: Path, metrics: Any) -> None:
    make_fleet(tmp_path)
    full = lorafast.scan(tmp_path)
    less = lorafast.scan(tmp_path, metrics=metrics)
    assert less.metrics == metrics
    for name in ("adapters", "modules"):
        few, all_ = less.table(name), full.table(name)
        assert set(few) < set(all_)
        for column in set(few) - {"findings", "severe", "warnings", "notes", "sha256"}:
            assert repr(few[column].tolist()) == repr(all_[column].tolist()), column
    assert ("a_mean" in less.modules) == (metrics == "moments")
    assert ("singular_values" in less.modules) == (metrics == "spectra")
    hashes = less.adapters["sha256"].tolist()
    assert hashes == ([None] * 6 if metrics == "headers" else full.adapters["sha256"].tolist())
    assert less.bytes_read > 0


def test_broken_adapters_are_records_and_the_others_are_read(tmp_path: Path) -> None:
    good = make_adapter(tmp_path / "good")
    weights = (good / "adapter_model.safetensors").read_bytes()
    short = make_adapter(tmp_path / "short")
    (short / "adapter_model.safetensors").write_bytes(weights[:-10])
    long = make_adapter(tmp_path / "long")
    (long / "adapter_model.safetensors").write_bytes(weights + b"\0" * 10)
    make_adapter(tmp_path / "other", peft_type="IA3")
    make_adapter(tmp_path / "json", config="{")
    bare = make_adapter(tmp_path / "bare")
    (bare / "adapter_config.json").unlink()
    (make_adapter(tmp_path / "empty") / "adapter_model.safetensors").unlink()
    pickle = make_adapter(tmp_path / "pickle")
    (pickle / "adapter_model.safetensors").unlink()
    (pickle / "adapter_model.bin").write_bytes(b"no pickle")
    lost = make_adapter(tmp_path / "lost")
    (lost / "adapter_model.safetensors").unlink()
    (lost / "adapter_model.safetensors").symlink_to("gone")
    fleet = lorafast.scan([tmp_path, tmp_path / "nowhere"])
    assert fleet.names == ["good"]
    reasons = {error.path.name: error.reason for error in fleet.errors}
    assert reasons.keys() == {
        *("short", "long", "other", "json", "bare", "empty", "pickle", "lost", "nowhere")
    }
    assert reasons["short"].startswith("adapter_model.safetensors: is truncated")
    assert "10 bytes after its last tensor" in reasons["long"]
    assert "IA3" in reasons["other"]
    assert "adapter_config.json" in reasons["json"]
    assert reasons["bare"].startswith("holds no adapter_config.json")
    assert "no adapter_model.safetensors" in reasons["empty"]
    assert "adapter_model.bin: cannot be read" in reasons["pickle"]
    assert reasons["nowhere"] == "No such file or directory"


SCAN_AS_SOMEBODY = """
import json, os, sys
import lorafast
if os.geteuid() == 0:
    # What is imported on first use may lie where only root can read.
    lorafast.scan(sys.argv[1] + "/good")
    # Root may read everything, and tests often run as root.
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
fleet = lorafast.scan(sys.argv[1])
print(json.dumps([fleet.names, [[error.path.name, error.reason] for error in fleet.errors]]))
"""


def test_unreadable_files_and_directories_are_records() -> None:
    # Not in pytest's own directory, which is closed to others.
    with TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        make_adapter(root / "good")
        (make_adapter(root / "closed") / "adapter_model.safetensors").chmod(0)
        (make_adapter(root / "secret") / "adapter_config.json").chmod(0)
        make_adapter(root / "locked" / "inside")
        (root / "locked").chmod(0)
        try:
            run = subprocess.run(
                [sys.executable, "-c", SCAN_AS_SOMEBODY, name], capture_output=True, check=False
            )
        finally:
            (root / "locked").chmod(0o755)
    assert run.returncode == 0, run.stderr.decode()
    names, errors = json.loads(run.stdout)
    assert names == ["good"]
    assert dict(errors) == {
        "locked": "Permission denied",
        "closed": "adapter_model.safetensors: Permission denied",
        "secret": "adapter_config.json: Permission denied",
    }


def test_nothing_to_scan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(lorafast.AdapterError, match="no adapter was found"):
        lorafast.scan(tmp_path)
    make_base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match="no adapter was found"):
        lorafast.scan(tmp_path)
    with pytest.raises(FileNotFoundError):
        lorafast.scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no path"):
        lorafast.scan([])
    with pytest.raises(ValueError, match="metrics must be one of"):
        lorafast.scan(tmp_path, metrics="most")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="threads"):
        lorafast.scan(tmp_path, threads=0)


def test_a_fleet_without_a_sound_adapter_has_empty_tables(tmp_path: Path) -> None:
    make_adapter(tmp_path / "other", peft_type="IA3")
    fleet = lorafast.scan(tmp_path)
    assert len(fleet) == 0
    assert len(fleet.errors) == 1
    assert fleet.modules["singular_values"].tolist() == []
    assert fleet.adapters["path"].tolist() == []
    assert fleet.to_pandas("modules").shape[0] == 0


def test_adapters_of_one_name_are_told_apart(tmp_path: Path) -> None:
    for name in ("north/final", "south/final", "south/old"):
        make_adapter(tmp_path / name)
    fleet = lorafast.scan(tmp_path)
    assert fleet.names == ["north_final", "south_final", "old"]
    assert set(fleet.modules["adapter"]) == set(fleet.names)


def test_links_in_a_loop_end(tmp_path: Path) -> None:
    make_adapter(tmp_path / "run" / "a")
    (tmp_path / "run" / "again").symlink_to(tmp_path)
    assert len(lorafast.scan(tmp_path)) == 1


def test_pickled_adapters_are_read_and_keep_their_own_hash(tmp_path: Path) -> None:
    import torch

    for index in range(3):
        path = make_adapter(tmp_path / f"p{index}")
        weights = path / "adapter_model.safetensors"
        from safetensors.torch import load_file

        torch.save(load_file(weights), path / "adapter_model.bin")
        weights.unlink()
    make_adapter(tmp_path / "s")
    fleet = lorafast.scan(tmp_path)
    assert fleet.names == ["p0", "p1", "p2", "s"]
    assert_same_figures(fleet)
    own = hashlib.sha256((tmp_path / "p0" / "adapter_model.bin").read_bytes()).hexdigest()
    assert fleet.adapters["sha256"][0] == own


def test_files_that_change_while_they_are_read_never_end_the_scan(tmp_path: Path) -> None:
    modules = {f"model.layers.{i}.q_proj": (512, 512) for i in range(20)}
    path = make_adapter(tmp_path / "training", adapter_tensors(modules, rank=16), r=16)
    make_adapter(tmp_path / "still")
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for size in (len(whole) // 2, 100, 0, len(whole), len(whole) + 4096):
                with weights.open("r+b") as file:
                    file.truncate(size)
                    if size == len(whole):
                        file.seek(0)
                        file.write(whole)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        fleets = [lorafast.scan(tmp_path, threads=2) for _ in range(60)]
    finally:
        done.set()
        writer.join()
    for fleet in fleets:
        assert "still" in fleet.names
        assert len(fleet) + len(fleet.errors) == 2


def test_progress_is_told_in_bytes(tmp_path: Path) -> None:
    paths = make_fleet(tmp_path)
    size = sum((path / "adapter_model.safetensors").stat().st_size for path in paths)
    told: list[tuple[int, int]] = []
    fleet = lorafast.scan(tmp_path, progress=lambda done, total: told.append((done, total)))
    assert told[-1] == (size, size)
    assert fleet.bytes_read == size


def test_an_exception_of_the_progress_ends_the_scan(tmp_path: Path) -> None:
    make_fleet(tmp_path)

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        lorafast.scan(tmp_path, progress=refuse)


# --- the cache -----------------------------------------------------------------------------


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were just written count as finished."""
    monkeypatch.setattr(fleet_cache, "SETTLED", 0)


@pytest.mark.usefixtures("settled")
def test_a_second_scan_reads_only_what_changed(tmp_path: Path) -> None:
    fleet, cache = tmp_path / "fleet", tmp_path / "cache"
    paths = make_fleet(fleet)
    make_adapter(fleet / "broken", peft_type="IA3")
    first = lorafast.scan(fleet, cache=cache)
    assert (first.remembered, first.bytes_read > 0) == (0, True)
    second = lorafast.scan(fleet, cache=cache)
    assert (second.remembered, len(second.errors)) == (6, 1)
    assert tables(second) == tables(first) == tables(lorafast.scan(fleet))

    # Another alpha; other weights of the same size; one that went away; a new one.
    config = paths[0] / "adapter_config.json"
    config.write_text(config.read_text().replace('"lora_alpha": 8', '"lora_alpha": 9'))
    file = paths[3] / "adapter_model.safetensors"
    write_safetensors(file, adapter_tensors(rank=4, seed=99), {"format": "pt"})
    shutil.rmtree(paths[4])
    make_adapter(fleet / "new")
    third = lorafast.scan(fleet, cache=cache)
    assert third.remembered == 3
    assert third.adapters["alpha"][0] == 9.0
    assert tables(third) == tables(lorafast.scan(fleet))
    # Each level for itself.
    assert lorafast.scan(fleet, cache=cache, metrics="headers").remembered == 0
    assert lorafast.scan(fleet, cache=cache, metrics="headers").remembered == 6
    assert lorafast.scan(fleet, cache=cache).remembered == 6


def test_what_changed_a_moment_ago_is_not_remembered(tmp_path: Path) -> None:
    (path,) = make_fleet(tmp_path / "fleet", 1)
    lorafast.scan(tmp_path / "fleet", cache=tmp_path / "cache")
    # Other weights in the same file, of the same size, at what may be the same time.
    file = path / "adapter_model.safetensors"
    status = file.stat()
    write_safetensors(file, adapter_tensors(rank=4, seed=99), {"format": "pt"})
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns))
    again = lorafast.scan(tmp_path / "fleet", cache=tmp_path / "cache")
    assert tables(again) == tables(lorafast.scan(tmp_path / "fleet"))


@pytest.mark.usefixtures("settled")
def test_another_schema_is_read_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_fleet(tmp_path / "fleet")
    lorafast.scan(tmp_path / "fleet", cache=tmp_path / "cache")
    monkeypatch.setattr(fleet_cache, "SCHEMA_VERSION", 10_000)
    assert lorafast.scan(tmp_path / "fleet", cache=tmp_path / "cache").remembered == 0


@pytest.mark.usefixtures("settled")
def test_what_has_gone_from_a_directory_is_forgotten(tmp_path: Path) -> None:
    fleet, cache = tmp_path / "fleet", tmp_path / "cache"
    for name in ("a", "b", "c"):
        make_adapter(fleet / name)
        make_adapter(tmp_path / "fleets" / name)

    def known() -> set[str]:
        with closing(sqlite3.connect(cache / fleet_cache.FILE)) as connection:
            rows = connection.execute("SELECT path FROM found").fetchall()
        return {os.path.relpath(path, tmp_path.resolve()) for (path,) in rows}

    lorafast.scan([fleet, tmp_path / "fleets"], cache=cache)
    everything = {f"{folder}/{name}" for folder in ("fleet", "fleets") for name in "abc"}
    assert known() == everything
    shutil.rmtree(fleet / "b")
    shutil.rmtree(tmp_path / "fleets" / "c")
    # A scan of one adapter, or of another directory, says nothing of the others.
    lorafast.scan([fleet / "a"], cache=cache)
    assert known() == everything
    lorafast.scan(fleet, cache=cache)
    assert known() == everything - {"fleet/b"}


@pytest.mark.usefixtures("settled")
@pytest.mark.skipif(sys.platform != "linux", reason="names are bytes on Linux alone")
def test_a_name_that_is_no_text_is_scanned_and_not_cached(tmp_path: Path) -> None:
    make_adapter(tmp_path / "fleet" / "a")
    make_adapter(Path(os.fsdecode(os.fsencode(tmp_path / "fleet") + b"/b\xff")))
    for remembered in (0, 1):
        fleet = lorafast.scan(tmp_path / "fleet", cache=tmp_path / "cache")
        assert (fleet.remembered, len(fleet.errors)) == (remembered, 0)
        assert len(fleet.adapters["path"]) == 2


@pytest.mark.usefixtures("settled")
def test_a_file_that_is_no_cache_is_set_aside_whole(tmp_path: Path) -> None:
    make_fleet(tmp_path / "fleet", 1)
    content = "something else entirely, long enough for a header" * 40
    (tmp_path / fleet_cache.FILE).write_text(content)
    with pytest.warns(UserWarning, match="was damaged") as told:
        assert len(lorafast.scan(tmp_path / "fleet", cache=tmp_path)) == 1
    assert len(told) == 1
    assert (tmp_path / f"{fleet_cache.FILE}.damaged-1").read_text() == content
    assert lorafast.scan(tmp_path / "fleet", cache=tmp_path).remembered == 1


KILLED = """
import os, signal, sys
from lorafast._fleet import cache as fleet_cache
import lorafast
fleet_cache.SETTLED, fleet_cache.INTERVAL = 0, 0
when, fleet, cache = sys.argv[1:]
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
flushes = 0
original = fleet_cache.Cache.flush
def flush(self, **options):
    global flushes
    flushes += 1
    if flushes > 200:
        if when == "between writes":
            kill()
        rows = self._waiting * 2000
        def some():
            for count, row in enumerate(rows):
                if count > 1900:
                    kill()
                yield (f"{row[0]}{count}", *row[1:])
        class Half:
            __iter__ = lambda self: some()
            clear = lambda self: None
        self._waiting = Half()
    original(self, **options)
fleet_cache.Cache.flush = flush
lorafast.scan(fleet, cache=cache)
"""


@pytest.mark.usefixtures("settled")
@pytest.mark.parametrize("when", ["between writes", "while it writes"])
def test_a_killed_scan_goes_on_where_it_was(tmp_path: Path, when: str) -> None:
    fleet, cache = tmp_path / "fleet", tmp_path / "cache"
    tensors = adapter_tensors({"model.layers.0.q_proj": (8, 8)}, rank=2)
    for index in range(500):
        make_adapter(fleet / f"a{index}", tensors, r=2, lora_alpha=index + 1)
    command = [sys.executable, "-c", KILLED, when, str(fleet), str(cache)]
    killed = subprocess.run(command, check=False, capture_output=True, text=True)
    assert killed.returncode == -9, killed.stderr
    again = lorafast.scan(fleet, cache=cache)
    assert again.remembered == 200
    assert tables(again) == tables(lorafast.scan(fleet))
    assert lorafast.scan(fleet, cache=cache).remembered == 500


@pytest.mark.usefixtures("settled")
def test_an_interrupted_scan_keeps_what_it_had(tmp_path: Path) -> None:
    make_fleet(tmp_path / "fleet", 6)

    def interrupt(done: int, total: int) -> None:
        if done == total:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lorafast.scan(tmp_path / "fleet", cache=tmp_path / "cache", progress=interrupt)
    again = lorafast.scan(tmp_path / "fleet", cache=tmp_path / "cache")
    assert again.remembered == 6


# --- tables in other forms -----------------------------------------------------------------


def test_data_frames_hold_the_tables(tmp_path: Path) -> None:
    import polars
    import pyarrow

    make_fleet(tmp_path)
    make_adapter(
        tmp_path / "outside",
        adapter_tensors({"score": (8, 8)}),
        base_model_name_or_path=None,
    )
    fleet = lorafast.scan(tmp_path)
    for name in ("adapters", "modules"):
        table = fleet.table(name)
        arrow, pandas_, polars_ = (
            fleet.to_arrow(name),
            fleet.to_pandas(name),
            fleet.to_polars(name),
        )
        assert arrow.column_names == list(pandas_.columns) == polars_.columns == list(table)
        for column in table:
            values = table[column].tolist()
            expected = [v.tolist() if isinstance(v, np.ndarray) else v for v in values]
            if column == "block":
                expected = [None if block < 0 else block for block in expected]
                assert pandas_[column].isna().sum() == 1
            elif column != "base":
                plain = [
                    v.tolist() if isinstance(v, np.ndarray) else v for v in pandas_[column].tolist()
                ]
                assert repr(plain) == repr(expected)
            assert repr(arrow[column].to_pylist()) == repr(expected), column
            assert repr(polars_[column].to_list()) == repr(expected), column
    assert arrow.schema.metadata[b"lorafast.schema_version"] == b"1"
    taken = polars.DataFrame(fleet)
    assert repr(taken["frobenius_norm"].to_list()) == repr(
        fleet.adapters["frobenius_norm"].tolist()
    )
    assert pyarrow.table(fleet).num_rows == 7
    with pytest.raises(ValueError, match="table must be"):
        fleet.to_arrow("tensors")  # type: ignore[arg-type]


def test_parquet_files_hold_the_tables_and_the_errors(tmp_path: Path) -> None:
    import pyarrow.parquet

    make_fleet(tmp_path / "fleet")
    make_adapter(tmp_path / "fleet" / "other", peft_type="IA3")
    fleet = lorafast.scan(tmp_path / "fleet")
    files = fleet.to_parquet(tmp_path / "out" / "deep")
    assert sorted(file.name for file in files) == sorted(
        file.name for file in (tmp_path / "out" / "deep").iterdir()
    )
    for name in ("adapters", "modules"):
        file = tmp_path / "out" / "deep" / f"{name}.parquet"
        read = pyarrow.parquet.read_table(file)
        assert repr(read.to_pylist()) == repr(fleet.to_arrow(name).to_pylist())
        assert read.schema.metadata[b"lorafast.schema_version"] == b"1"
        group = pyarrow.parquet.ParquetFile(file).metadata.row_group(0)
        assert {group.column(i).compression for i in range(group.num_columns)} == {"ZSTD"}
    errors = json.loads((tmp_path / "out" / "deep" / "errors.json").read_text())["errors"]
    assert [error["path"] for error in errors] == [str(tmp_path / "fleet" / "other")]
    (tmp_path / "file").write_text("")
    with pytest.raises(lorafast.OutputError, match="cannot be written"):
        fleet.to_parquet(tmp_path / "file")


def test_a_table_is_a_mapping_of_arrays(tmp_path: Path) -> None:
    make_fleet(tmp_path)
    fleet = lorafast.scan(tmp_path)
    assert isinstance(fleet.modules["frobenius_norm"], np.ndarray)
    assert fleet.modules["rank"].dtype == np.int64
    assert fleet.modules["adapter"].dtype == object
    assert len(fleet.adapters["name"]) == fleet.adapters.rows == len(fleet) == 6
    assert "rank" in fleet.modules
    with pytest.raises(KeyError):
        fleet.modules["nothing"]
    assert repr(fleet) == "<Fleet 6 adapters, 24 modules>"
    assert next(iter(MODULES)) in fleet.modules["module"]
    assert adapter_config()["r"] == 4
