"""The cache of a scan: what is read again, and what a killed or a damaged one leaves."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from contextlib import closing
from pathlib import Path

import lorafast
import pytest
from lorafast._fleet import cache as fleet_cache
from support.files import write_safetensors
from support.fleets import make_fleet, tables
from support.handmade import adapter_tensors, make_adapter


@pytest.fixture
def settled(monkeypatch: pytest.MonkeyPatch) -> None:
    """Files that were just written count as finished."""
    monkeypatch.setattr(fleet_cache, "SETTLED", 0)


@pytest.mark.usefixtures("settled")
def test_a_second_scan_reads_only_what_changed(tmp_path: Path) -> None:
    fleet, cache = tmp_path / "fleet", tmp_path / "cache"
    paths = make_fleet(fleet)
    make_adapter(fleet / "broken", peft_type="OFT")
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
    # The last one may be counted before it is handed over.
    assert again.remembered in {5, 6}
