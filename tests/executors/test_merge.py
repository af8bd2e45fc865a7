"""Merges whose shards workers write: the bytes, and what happens where something breaks."""

from __future__ import annotations

import fcntl
import json
import pickle
from collections.abc import Iterator
from concurrent.futures import Executor, ProcessPoolExecutor, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import lorafast
import pytest
from lorafast._cli.main import main
from lorafast._merge.workers import write_part
from support.handmade import make_adapter, make_base
from support.workers import Deadly, Recording, pool

REPORTS = {"merge_report.json", "merge_report.md"}
OPTIONS: dict[str, Any] = {"strategy": "weighted", "weights": [0.5, -2.0]}
#: Fields of a report that are not the same twice, and recipes, which are one process's.
PASSING = {"merge_time", "timestamp", "output_path", "threads", "rounding", "recipes"}


@pytest.fixture(scope="module")
def workers() -> Iterator[ProcessPoolExecutor]:
    with pool() as executor:
        yield executor


@pytest.fixture
def inputs(tmp_path: Path) -> tuple[Path, list[Path]]:
    base = make_base(tmp_path / "base", shards=4, dtype="BF16")
    return base, [make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two", lora_alpha=3)]


def contents(folder: Path) -> dict[str, bytes]:
    files = (path for path in folder.rglob("*") if path.is_file())
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in files}
    return {name: content for name, content in found.items() if name not in REPORTS}


def merge(inputs: tuple[Path, list[Path]], output: Path, **options: Any) -> lorafast.MergeReport:
    return lorafast.merge(*inputs, output, **(OPTIONS | options))


def test_a_pool_makes_the_same_model(
    tmp_path: Path, inputs: tuple[Path, list[Path]], workers: ProcessPoolExecutor
) -> None:
    whole = merge(inputs, tmp_path / "whole", verify=True)
    told: list[tuple[int, int]] = []
    apart = merge(
        inputs,
        tmp_path / "out",
        executor=workers,
        verify=True,
        progress=lambda done, total: told.append((done, total)),
    )
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert {path.name for path in (tmp_path / "out").iterdir()} >= REPORTS
    ours, theirs = apart.to_dict(), whole.to_dict()
    assert ours.keys() == theirs.keys()
    same = ours.keys() - PASSING
    assert {name: ours[name] for name in same} == {name: theirs[name] for name in same}
    assert apart.verification is not None
    assert whole.rounding is not None
    assert apart.rounding == pytest.approx(whole.rounding, rel=1e-12)
    assert not (tmp_path / ".out.parts").exists()
    of_merge = told[: next(place for place, (_, total) in enumerate(told) if total != told[0][1])]
    assert [done for done, _ in of_merge] == sorted(done for done, _ in of_merge)
    assert of_merge[-1][0] == of_merge[-1][1]


@pytest.mark.parametrize(
    "executor", [ThreadPoolExecutor(2), "processes:2"], ids=["threads", "name"]
)
def test_any_executor_makes_it(
    tmp_path: Path, inputs: tuple[Path, list[Path]], executor: Executor | str
) -> None:
    merge(inputs, tmp_path / "whole")
    (tmp_path / "out").mkdir()
    merge(inputs, tmp_path / "out", executor=executor, sync=False)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    make = {"strategy": "average", "weights": None}
    merge(inputs, tmp_path / "whole", overwrite=True, **make)
    merge(inputs, tmp_path / "out", overwrite=True, executor=executor, **make)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_the_paths_may_be_relative(
    tmp_path: Path,
    inputs: tuple[Path, list[Path]],
    workers: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    merge(inputs, tmp_path / "whole")
    monkeypatch.chdir(tmp_path)
    merge((Path("base"), [Path("one"), Path("two")]), Path("out"), executor=workers)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_worker_that_died_is_told_and_the_same_call_does_the_rest(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    merge(inputs, tmp_path / "whole")
    place = tmp_path / ".out.parts"
    with pytest.raises(lorafast.WorkerError, match=r"a worker died.*the same call again") as died:
        merge(inputs, tmp_path / "out", executor=Deadly(tmp_path / "died", place))
    assert str(place) in str(died.value)
    assert not (tmp_path / "out").exists()
    assert place.is_dir()
    merge(inputs, tmp_path / "out", executor=Recording())
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    assert not place.exists()


def test_what_is_written_is_not_written_again(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    merge(inputs, tmp_path / "whole")

    def stop(number: int) -> None:
        if number == 2:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space left"):
        merge(inputs, tmp_path / "out", executor=Recording(stop))
    receipts = sorted((tmp_path / ".out.parts").glob("*.receipt.json"))
    assert len(receipts) >= 2
    assert "sha256" in json.loads(receipts[0].read_text())
    again = Recording()
    merge(inputs, tmp_path / "out", executor=again)
    assert len(again.calls) == 4 - len(receipts)
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_what_was_damaged_meanwhile_is_found(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    def stop(number: int) -> None:
        if number == 3:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        merge(inputs, tmp_path / "out", executor=Recording(stop))
    place = tmp_path / ".out.parts"
    first, second = sorted(place.glob("*.safetensors"))[:2]
    first.write_bytes(first.read_bytes()[:-1])
    again = Recording()
    merge(inputs, tmp_path / "out", executor=again)
    assert len(again.calls) == 2
    with pytest.raises(OSError, match="Input/output"):
        merge(inputs, tmp_path / "other", executor=Recording(stop))
    second = tmp_path / ".other.parts" / second.name
    content = bytearray(second.read_bytes())
    content[-1] ^= 1
    second.write_bytes(content)
    with pytest.raises(lorafast.OutputError, match="write that part again"):
        merge(inputs, tmp_path / "other", executor=Recording())
    assert not (tmp_path / "other").exists()
    again = Recording()
    merge(inputs, tmp_path / "other", executor=again)
    assert len(again.calls) == 1
    assert contents(tmp_path / "other") == contents(tmp_path / "out")


def test_an_interruption_keeps_what_is_written(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    merge(inputs, tmp_path / "whole")

    def interrupt(done: int, total: int) -> None:
        if done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        merge(inputs, tmp_path / "out", executor=Recording(), progress=interrupt)
    assert not (tmp_path / "out").exists()
    again = Recording()
    merge(inputs, tmp_path / "out", executor=again)
    assert len(again.calls) < 4
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")


def test_a_task_that_nobody_waits_for_ends(
    tmp_path: Path, inputs: tuple[Path, list[Path]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafast._merge.workers.LOOK_EVERY", -1.0)
    part = lorafast.plan(*inputs, **OPTIONS).parts()[0]
    (tmp_path / "parts").mkdir()
    (tmp_path / "parts" / "stop").touch()
    with pytest.raises(lorafast.LorafastError, match="was ended"):
        write_part(part, str(tmp_path / "parts"), threads=1, sync=False, stop="stop")
    assert not list((tmp_path / "parts").glob("*.receipt.json"))


def test_parts_of_another_merge_are_refused(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    def stop(number: int) -> None:
        if number:
            raise OSError(5, "Input/output error")

    with pytest.raises(OSError, match="Input/output"):
        merge(inputs, tmp_path / "out", executor=Recording(stop))
    none = Recording()
    with pytest.raises(lorafast.OutputError, match="parts of another merge"):
        merge(inputs, tmp_path / "out", executor=none, weights=[1.0, 1.0])
    shard = sorted(inputs[0].glob("*.safetensors"))[0]
    shard.write_bytes(shard.read_bytes())
    with pytest.raises(lorafast.OutputError, match="base or adapters changed"):
        merge(inputs, tmp_path / "out", executor=none)
    assert none.calls == []
    merge(inputs, tmp_path / "out", executor=Recording(), overwrite=True)
    assert lorafast.verify(*inputs, tmp_path / "out", **OPTIONS).ok


def test_two_calls_at_once_are_refused(tmp_path: Path, inputs: tuple[Path, list[Path]]) -> None:
    place = tmp_path / ".out.parts"
    place.mkdir()
    with (place / "lock").open("wb") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(lorafast.OutputError, match="under way"):
            merge(inputs, tmp_path / "out", executor=Recording())


def test_two_attempts_at_a_shard_write_the_same(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    merge(inputs, tmp_path / "whole")
    place = tmp_path / "parts"
    place.mkdir()
    parts = lorafast.plan(*inputs, **OPTIONS).parts()
    how = {"threads": 1, "sync": False, "stop": "stop"}
    with ThreadPoolExecutor(8) as executor:
        attempts = [executor.submit(write_part, part, str(place), **how) for part in 4 * parts]
        receipts = [attempt.result() for attempt in attempts]
    assert receipts[: len(parts)] * 4 == receipts
    for shard in place.glob("*.safetensors"):
        assert shard.read_bytes() == (tmp_path / "whole" / shard.name).read_bytes()
    assert not list(place.rglob("*.partial"))


def test_a_worker_with_another_adapter_refuses(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    def change(number: int) -> None:
        weights = inputs[1][0] / "adapter_model.safetensors"
        content = bytearray(weights.read_bytes())
        content[-1] ^= 1
        weights.write_bytes(content)

    with pytest.raises(lorafast.PlanError, match="plan it again"):
        merge(inputs, tmp_path / "out", executor=Recording(change))
    assert {path.name for path in tmp_path.iterdir()} == {"base", "one", "two"}


def test_a_worker_that_does_not_see_the_output_says_so(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    part = lorafast.plan(*inputs, **OPTIONS).parts()[0]
    with pytest.raises(lorafast.PlanError, match="a file system that all workers share"):
        write_part(part, str(tmp_path / "nowhere"), threads=1, sync=False, stop="stop")


def test_an_error_of_a_task_has_its_traceback(
    tmp_path: Path, inputs: tuple[Path, list[Path]], workers: ProcessPoolExecutor
) -> None:
    huge = make_adapter(tmp_path / "huge", lora_alpha=1e38)
    with pytest.raises(lorafast.NumericError) as failed:
        lorafast.merge(inputs[0], huge, tmp_path / "out", dtype="float16", executor=workers)
    assert "write_part" in str(failed.value.__cause__)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / ".out.parts").exists()


def test_a_task_is_names_and_options(tmp_path: Path, inputs: tuple[Path, list[Path]]) -> None:
    heard = Recording()
    merge(inputs, tmp_path / "out", executor=heard, threads=2)
    assert len(heard.calls) == 4
    for call in heard.calls:
        assert len(pickle.dumps(call)) < 4096
        assert call[2]["threads"] == 2


def test_an_output_that_is_there_costs_no_work(
    tmp_path: Path, inputs: tuple[Path, list[Path]]
) -> None:
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "model.safetensors").write_bytes(b"")
    none = Recording()
    with pytest.raises(lorafast.OutputError, match="is not empty"):
        merge(inputs, tmp_path / "out", executor=none)
    assert none.calls == []


def test_the_shards_take_no_room_twice(tmp_path: Path, inputs: tuple[Path, list[Path]]) -> None:
    for shard in inputs[0].glob("*.safetensors"):
        shard.chmod(0o640)
    written: dict[str, int] = {}

    def look(done: int, total: int) -> None:
        for shard in (tmp_path / ".out.parts").glob("*.safetensors"):
            written[shard.name] = shard.stat().st_ino

    merge(inputs, tmp_path / "out", executor=Recording(), progress=look)
    found = {path.name: path.stat() for path in (tmp_path / "out").glob("*.safetensors")}
    assert {name: each.st_ino for name, each in found.items()} == written
    assert {each.st_mode & 0o777 for each in found.values()} == {0o640}
    assert {each.st_nlink for each in found.values()} == {1}


def test_an_output_in_a_store_is_refused(inputs: tuple[Path, list[Path]]) -> None:
    with pytest.raises(lorafast.OutputError, match="upload it afterwards"):
        lorafast.plan(*inputs).execute("s3://bucket/out", executor=Recording())


@pytest.mark.parametrize("inside", ["base", "one"])
def test_an_output_in_what_is_read_costs_no_work(
    tmp_path: Path, inputs: tuple[Path, list[Path]], inside: str
) -> None:
    before = contents(tmp_path)
    with pytest.raises(lorafast.OutputError, match="which is read"):
        merge(inputs, tmp_path / inside / "out", executor=Recording())
    assert contents(tmp_path) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"executor": "spark"}, "executor is 'spark'; it is an executor of concurrent.futures"),
        ({"executor": "processes:0"}, "executor is 'processes:0'"),
        ({"executor": 3}, "executor is 3"),
        ({"executor": "processes", "device": "torch:cpu"}, "leave the device out"),
    ],
    ids=str,
)
def test_what_is_no_executor_is_refused(
    tmp_path: Path, inputs: tuple[Path, list[Path]], options: dict[str, Any], message: str
) -> None:
    with pytest.raises(ValueError, match=message):
        merge(inputs, tmp_path / "out", **options)


def test_the_command_takes_executors_by_name(
    tmp_path: Path, inputs: tuple[Path, list[Path]], capsys: pytest.CaptureFixture[str]
) -> None:
    base, adapters = inputs
    lorafast.merge(base, adapters, tmp_path / "whole")
    given = ["--base", str(base), "--adapters", *map(str, adapters)]
    where = ["--output", str(tmp_path / "out"), "--quiet"]
    assert main(["merge", *given, *where, "--executor", "processes:2"]) == 0
    assert contents(tmp_path / "out") == contents(tmp_path / "whole")
    capsys.readouterr()
    merged = ["--merged", str(tmp_path / "out"), "--quiet"]
    assert main(["verify", *given, *merged, "--executor", "processes:1"]) == 0
    assert main(["merge", *given, *where, "--executor", "spark"]) == 2
    assert "'spark' is no executor" in capsys.readouterr().err
