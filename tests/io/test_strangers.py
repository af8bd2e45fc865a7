"""What one stranger's file, path or cache row does stays with that one."""

from __future__ import annotations

import csv
import os
import socket
import sqlite3
import sys
import threading
import warnings
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._cli.main import main
from lorafast._fleet import cache as fleet_cache
from lorafast._fleet.discovery import discover
from lorafast._io import paths
from lorafast._io.strangers import parse_json, read_header
from lorafast._report.cells import cell, code, csv_text
from lorafast._report.directory import read_directory
from support.files import encode
from support.handmade import adapter_tensors, make_adapter

DEEP = "[" * 100_000 + "]" * 100_000
LIMIT = 60


@contextmanager
def within_limit() -> Iterator[None]:
    """Fails, rather than hanging for ever, where something waits for a pipe."""
    import faulthandler

    faulthandler.dump_traceback_later(LIMIT, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        faulthandler.cancel_dump_traceback_later()


@pytest.fixture
def fleet(tmp_path: Path) -> Path:
    """Two sound adapters, of different weights."""
    for seed, name in enumerate(("a", "b")):
        make_adapter(tmp_path / "fleet" / name, adapter_tensors(rank=4, seed=seed))
    return tmp_path / "fleet"


def spoil(fleet: Path) -> set[str]:
    """Adds whatever strangers' directories can hold; returns the names that are errors."""
    (fleet / "headers").mkdir()
    (fleet / "headers" / "deep.safetensors").write_bytes(encode(f'{{"a": {DEEP}}}', b""))
    (fleet / "headers" / "deep_lora.safetensors").write_bytes(encode(f'{{"a": {DEEP}}}', b""))
    make_adapter(fleet / "deep_config", config=f'{{"r": {DEEP}}}')
    make_adapter(fleet / "latin", config='{"peft_type": "LORA"}')
    (fleet / "latin" / "adapter_config.json").write_bytes(b'{"peft_type": "\xff"}')
    make_adapter(fleet / "half_a_link")
    weights = fleet / "half_a_link" / "adapter_model.safetensors"
    weights.unlink()
    weights.symlink_to("../blobs/0123")
    make_adapter(fleet / "pipe")
    (fleet / "pipe" / "adapter_model.safetensors").unlink()
    os.mkfifo(fleet / "pipe" / "adapter_model.safetensors")
    make_adapter(fleet / "pickled_pipe")
    (fleet / "pickled_pipe" / "adapter_model.safetensors").unlink()
    os.mkfifo(fleet / "pickled_pipe" / "adapter_model.bin")
    os.mkfifo(fleet / "headers" / "queue.safetensors")
    make_adapter(fleet / "pickle")
    (fleet / "pickle" / "adapter_model.safetensors").unlink()
    (fleet / "pickle" / "adapter_model.bin").write_bytes(b"\x80\x02\xff\xff")
    return {
        *("deep.safetensors", "deep_lora.safetensors", "deep_config", "latin", "half_a_link"),
        *("pipe", "pickled_pipe", "queue.safetensors", "pickle"),
    }


def test_each_odd_adapter_of_a_scan_is_an_error_beside_the_others(fleet: Path) -> None:
    odd = spoil(fleet)
    with within_limit():
        found = lorafast.scan(fleet)
    assert found.names == ["a", "b"]
    assert {error.path.name for error in found.errors} == odd
    reasons = {error.path.name: error.reason for error in found.errors}
    assert "nested too deeply" in reasons["deep.safetensors"]
    assert "is a pipe; a plain file is needed here" in reasons["queue.safetensors"]
    assert "is a pipe; a plain file is needed here" in reasons["pickled_pipe"]


@pytest.mark.parametrize("what", ["similarity", "duplicates", "trajectory"])
def test_each_odd_adapter_is_left_out_of_a_comparison(fleet: Path, what: str) -> None:
    odd = spoil(fleet)
    with within_limit():
        found: Any = getattr(lorafast, what)(fleet)
    assert {error.path.name for error in found.errors} == odd


def test_each_odd_candidate_is_left_out_of_a_lineage(fleet: Path) -> None:
    odd = spoil(fleet)
    with within_limit():
        found = lorafast.lineage(fleet / "a", fleet)
    assert {error.path.name for error in found.errors} == odd


def test_the_commands_say_a_line_for_each_and_do_the_others(
    fleet: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    odd = [str(fleet / name) for name in sorted(spoil(fleet)) if (fleet / name).is_dir()]
    with within_limit():
        status = main(["compare", str(fleet / "a"), *odd, str(fleet / "b"), "--quiet"])
    assert status == 1
    errors = capsys.readouterr().err
    assert errors.count("error: ") == len(odd) == len(errors.splitlines())
    assert "Traceback" not in errors


def test_a_name_that_is_no_utf8_is_scanned_compared_and_written(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    if sys.platform != "linux":
        pytest.skip("names are bytes on Linux alone")
    pytest.importorskip("pyarrow")
    odd = Path(os.fsdecode(os.fsencode(fleet) + b"/c\xff"))
    make_adapter(odd, adapter_tensors(rank=4, seed=5))
    output = tmp_path / "tables"
    assert main(["scan", str(fleet), "--output", str(output), "--quiet"]) == 0
    found = lorafast.scan(fleet)
    assert (len(found), len(found.errors)) == (3, 0)
    assert "c\\udcff" in found.to_arrow()["name"].to_pylist()
    assert odd in found.paths
    for ending in ("csv", "json", "npz"):
        assert main(["similarity", str(fleet), "--output", str(tmp_path / f"s.{ending}")]) == 0
    assert len(lorafast.Similarity.load(tmp_path / "s.npz")) == 3
    assert main(["analyze", str(odd), "--output", str(tmp_path / "analysis"), "--no-plots"]) == 0
    assert main(["duplicates", str(fleet)]) == 0
    assert main(["lineage", str(odd), str(fleet)]) == 0
    assert "Traceback" not in capsys.readouterr().err


def test_json_that_is_deep_or_none_is_a_sentence(tmp_path: Path) -> None:
    with pytest.raises(lorafast.CheckpointError, match=r"x\.json: its JSON is nested too deeply"):
        parse_json(DEEP, "x.json")
    with pytest.raises(lorafast.AdapterError, match=r"x\.json: cannot be read as JSON"):
        parse_json(b"\xff", "x.json", lorafast.AdapterError)
    for content in (b"", b"\1\0\0", (1 << 62).to_bytes(8, "little"), encode("[]", b"")):
        (tmp_path / "x.safetensors").write_bytes(content)
        with pytest.raises(lorafast.CheckpointError, match=r"is (no safetensors|an empty) file"):
            read_header(tmp_path / "x.safetensors")


def test_a_saved_similarity_that_is_none_is_a_sentence(tmp_path: Path) -> None:
    import numpy as np

    file = tmp_path / "s.npz"
    for about in (DEEP, "[]", "{}", '{"kind": "similarity", "schema_version": 1}'):
        np.savez(file, about=np.array(about))
        with pytest.raises(lorafast.LorafastError, match=r"s\.npz"):
            lorafast.Similarity.load(file)
    os.mkfifo(tmp_path / "pipe.npz")
    with within_limit(), pytest.raises(lorafast.LorafastError, match="is a pipe"):
        lorafast.Similarity.load(tmp_path / "pipe.npz")


def test_a_report_of_odd_files_is_a_sentence(tmp_path: Path) -> None:
    (tmp_path / "analysis").mkdir()
    (tmp_path / "analysis" / "x_analysis.json").write_text(DEEP)
    with pytest.raises(lorafast.LorafastError, match="cannot be read as an analysis"):
        read_directory(tmp_path)


# --- what a path leads to ------------------------------------------------------------------


def test_only_a_name_that_nothing_has_is_absent(tmp_path: Path) -> None:
    assert paths.find(tmp_path / "nothing") is None
    (tmp_path / "file").touch()
    assert paths.find(tmp_path / "file" / "below") is None
    assert paths.is_file(tmp_path / "file")
    (tmp_path / "link").symlink_to("file")
    assert paths.is_file(tmp_path / "link")
    (tmp_path / "broken").symlink_to("blobs/12")
    with pytest.raises(FileNotFoundError, match="A link to blobs/12, which is not there; fetch"):
        paths.find(tmp_path / "broken")
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(OSError, match="symbolic links"):
        paths.find(tmp_path / "loop")


def test_what_may_not_be_looked_at_is_no_absence(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: object) -> os.stat_result:
        raise PermissionError(13, "Permission denied", str(path))

    make_adapter(tmp_path / "adapter")
    # Root may look at everything, and tests often run as root.
    monkeypatch.setattr(os, "lstat", refuse)
    with pytest.raises(PermissionError):
        lorafast.plan(tmp_path / "adapter", tmp_path / "adapter")


def test_a_link_that_leads_nowhere_is_told_before_anything_is_written(tmp_path: Path) -> None:
    from support.handmade import make_base

    base = make_base(tmp_path / "base")
    (tmp_path / "adapter").symlink_to("snapshots/0123")
    with pytest.raises(FileNotFoundError, match="A link to snapshots/0123"):
        lorafast.merge(base, tmp_path / "adapter", tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pipes_and_sockets_are_never_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    os.mkfifo(tmp_path / "pipe")
    with within_limit(), pytest.raises(lorafast.CheckpointError, match="is a pipe"):
        paths.open_plain(tmp_path / "pipe")
    monkeypatch.chdir(tmp_path)
    with closing(socket.socket(socket.AF_UNIX)) as listener:
        listener.bind("socket")
        with pytest.raises(lorafast.CheckpointError, match="is a socket"):
            paths.open_plain(tmp_path / "socket")
    with pytest.raises(lorafast.CheckpointError, match="is a device"):
        paths.open_plain("/dev/zero")
    with pytest.raises(lorafast.CheckpointError, match="is a directory"):
        paths.open_plain(tmp_path)


def test_a_home_of_nobodys_is_left_as_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", "/home/somebody")
    assert paths.expand("~/x") == "/home/somebody/x"
    assert paths.expand("~no-such-person-here/x") == "~no-such-person-here/x"
    assert paths.expand(Path("x")) == "x"


def test_unreadable_weights_among_others_are_an_error(fleet: Path) -> None:
    (fleet / "loose").mkdir()
    (fleet / "loose" / "gone.safetensors").symlink_to("nowhere")
    found = discover(fleet)
    assert [Path(path).name for path in found.adapters] == ["a", "b"]
    (error,) = found.errors
    assert error.path.name == "gone.safetensors"
    assert error.reason == "A link to nowhere, which is not there; fetch it again"


# --- caches --------------------------------------------------------------------------------


@pytest.fixture
def cached(fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The cache of a scan of the fleet."""
    monkeypatch.setattr(fleet_cache, "SETTLED", 0)
    monkeypatch.setattr(fleet_cache, "PATIENCE", 0.1)
    lorafast.scan(fleet, cache=tmp_path / "cache")
    assert lorafast.scan(fleet, cache=tmp_path / "cache").remembered == 2
    return tmp_path / "cache"


def same_tables(one: lorafast.Fleet, other: lorafast.Fleet) -> bool:
    return all(
        str(one.adapters[name].tolist()) == str(other.adapters[name].tolist())
        for name in one.adapters
    )


@pytest.mark.parametrize(
    "change",
    [
        "details = x'00'",
        "details = NULL",
        "details = 'text'",
        "details = CAST(x'fffe' AS TEXT)",
        "cells = x''",
        "cells = 12",
        "cells = substr(cells, 1, length(cells) - 8)",
        "cells = cells || x'00'",
        # One bit of a figure.
        "cells = CAST(substr(cells, 1, length(cells) - 1) || x'7f' AS BLOB)",
        "stamp = NULL",
        "version = CAST(x'ff' AS TEXT)",
    ],
)
def test_a_damaged_row_is_read_anew_and_made_good(fleet: Path, cached: Path, change: str) -> None:
    with closing(sqlite3.connect(cached / fleet_cache.FILE)) as connection, connection:
        connection.execute(f"UPDATE found SET {change} WHERE path LIKE '%/a'")
    again = lorafast.scan(fleet, cache=cached)
    assert (again.remembered, len(again)) == (1, 2)
    assert same_tables(again, lorafast.scan(fleet))
    assert lorafast.scan(fleet, cache=cached).remembered == 2


@pytest.mark.parametrize(
    "text",
    [DEEP, "[]", "{}", '{"texts": [1], "findings": [], "paths": [], "kinds": []}', '"\\ud800"'],
)
def test_a_row_that_was_made_to_deceive_is_read_anew(fleet: Path, cached: Path, text: str) -> None:
    import zlib

    details = zlib.compress(text.encode())
    row = (details, fleet_cache._digest(details, b""))
    with closing(sqlite3.connect(cached / fleet_cache.FILE)) as connection, connection:
        connection.execute("UPDATE found SET details = ?, cells = ?", row)
        # A path that is no text, below a directory that is searched.
        odd = "INSERT INTO found SELECT CAST(? AS TEXT), 'full', '', '', x'', x''"
        connection.execute(odd, (os.fsencode(fleet) + b"/\xff\xfe",))
    again = lorafast.scan(fleet, cache=cached)
    assert (again.remembered, len(again)) == (0, 2)
    assert lorafast.scan(fleet, cache=cached).remembered == 2


@pytest.mark.parametrize("where", ["head", "middle", "schema", "view", "empty"])
def test_a_damaged_database_is_set_aside_with_one_warning(
    fleet: Path, cached: Path, where: str
) -> None:
    file = cached / fleet_cache.FILE
    if where in ("schema", "view"):
        with closing(sqlite3.connect(file)) as connection, connection:
            connection.execute("DROP TABLE found")
            kind = "TABLE found (x)" if where == "schema" else "VIEW found AS SELECT 1 AS path"
            connection.execute(f"CREATE {kind}")
    elif where == "empty":
        file.write_bytes(b"")
        assert len(lorafast.scan(fleet, cache=cached)) == 2
        return
    else:
        content = bytearray(file.read_bytes())
        start = 0 if where == "head" else 4096
        content[start : start + 4096] = b"\x5a" * 4096
        file.write_bytes(content)
    spoilt = file.read_bytes()
    with pytest.warns(UserWarning, match="was damaged") as told:
        again = lorafast.scan(fleet, cache=cached)
    assert len(told) == 1
    assert (len(again), again.remembered) == (2, 0)
    aside = file.with_name(f"{file.name}.damaged-1")
    assert aside.read_bytes() == spoilt or where in ("schema", "view")
    assert lorafast.scan(fleet, cache=cached).remembered == 2


def test_a_locked_cache_is_a_warning(fleet: Path, cached: Path) -> None:
    with closing(sqlite3.connect(cached / fleet_cache.FILE)) as connection:
        connection.execute("BEGIN EXCLUSIVE")
        with pytest.warns(UserWarning, match="cache cannot be used") as told:
            again = lorafast.scan(fleet, cache=cached)
        assert len(told) == 1
        assert len(again) == 2
    assert lorafast.scan(fleet, cache=cached).remembered == 2


def test_a_cache_that_is_locked_while_the_scan_ends_loses_nothing_but_itself(
    fleet: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(fleet_cache, "SETTLED", 0)
    monkeypatch.setattr(fleet_cache, "PATIENCE", 0.1)
    cache = tmp_path / "cache"
    lorafast.scan(fleet / "a", cache=cache)
    holder: list[sqlite3.Connection] = []

    def lock(done: int, total: int) -> None:
        if not holder:
            holder.append(sqlite3.connect(cache / fleet_cache.FILE, check_same_thread=False))
            holder[0].execute("BEGIN IMMEDIATE")

    with pytest.warns(UserWarning, match="may not be kept") as told:
        found = lorafast.scan(fleet, cache=cache, progress=lock)
    holder[0].close()
    assert len(told) == 1
    assert (len(found), found.remembered) == (2, 1)
    assert lorafast.scan(fleet, cache=cache).remembered == 1


def test_a_cache_that_cannot_be_one_is_a_warning(
    fleet: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "cache" / fleet_cache.FILE).mkdir(parents=True)
    with pytest.warns(UserWarning, match="it is a directory"):
        assert len(lorafast.scan(fleet, cache=tmp_path / "cache")) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("default")
        assert main(["scan", str(fleet), "--cache", str(tmp_path / "cache"), "--quiet"]) == 0
    assert capsys.readouterr().err.count("warning: ") == 1


def test_scans_that_share_a_cache_all_end(fleet: Path, cached: Path) -> None:
    found: list[int] = []

    def scan() -> None:
        found.append(len(lorafast.scan(fleet, cache=cached)))

    threads = [threading.Thread(target=scan) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == [2] * 4


# --- names in pages, tables and messages ----------------------------------------------------


def test_a_name_breaks_no_table_and_starts_no_formula() -> None:
    assert code("a|b`c\nd") == "`a\\|b'c d`"
    assert cell("<b>[x](y)|*_") == "\\<b\\>\\[x\\](y)\\|\\*\\_"
    for text in ("=1+1", "+1", "-1", "@sum", "\tx", "\rx"):
        assert csv_text(text) == f"'{text}"
    assert csv_text("plain=1") == "plain=1"


def test_a_message_quotes_no_more_of_a_name_than_a_person_reads() -> None:
    from lorafast._cli.failures import sentence

    long = sentence(lorafast.AdapterError(f"model.safetensors: tensor {'x' * 100_000} is odd"))
    assert len(long) < 2_000
    assert long.startswith("model.safetensors: tensor xxx")
    assert long.endswith("xxx is odd")
    path = "/" + "/".join(["folder"] * 100)
    assert sentence(FileNotFoundError(2, "No such file or directory", path)).endswith(path)
    assert len(sentence(lorafast.AdapterError("many words " * 10_000))) < 5_000


def test_names_in_a_csv_are_texts_and_numbers_stay(tmp_path: Path) -> None:
    for name in ("=cmd|'A0", "@b"):
        make_adapter(tmp_path / "fleet" / name)
    output = tmp_path / "s.csv"
    assert main(["similarity", str(tmp_path / "fleet"), "--output", str(output), "--quiet"]) == 0
    with output.open(newline="") as file:
        rows = list(csv.reader(file))
    assert rows[0][1:] == ["'=cmd|'A0", "'@b"]
    assert all(float(value) == pytest.approx(1.0) for row in rows[1:] for value in row[1:])


def test_names_in_the_merges_page_are_no_markup(tmp_path: Path) -> None:
    from support.handmade import make_base

    adapter = make_adapter(tmp_path / "a|b`<script>\n# x")
    base = make_base(tmp_path / "base")
    report = lorafast.merge(base, adapter, tmp_path / "out|`")
    page = (tmp_path / "out|`" / "merge_report.md").read_text()
    assert "\n# x" not in page
    rows = [line for line in page.splitlines() if line.startswith("| 0 | ")]
    assert rows[0].replace("\\|", "").count("|") == 5
    subtracted = lorafast.subtract(report.output_path, adapter, tmp_path / "again")
    assert "\n# x" not in subtracted.to_markdown()
