"""A merge whose shards other processes write, and a verification whose tensors they look at.

The shards are written into a directory beside the output, `.NAME.parts`, each with a receipt. What
is there with its receipt is not written again, so that the call that follows one that was
interrupted, or lost a worker, does the rest. The directory goes when the model is in its place.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

from lorafast import _core
from lorafast._errors import LorafastError, OutputError, PlanError, WorkerError
from lorafast._io import atomic
from lorafast._io.executors import Task, opened, run
from lorafast._io.paths import absolute, resolved

if TYPE_CHECKING:
    from lorafast._core import OutputLock, Summary, VerifyOutcome
    from lorafast._merge.options import ExecutionOptions
    from lorafast._types import Report

    class Written(Protocol):
        """A `WrittenShard`."""

        def _asdict(self) -> dict[str, Any]: ...

    class Part(Protocol):
        """A `PlanPart`."""

        @property
        def names(self) -> tuple[str, ...]: ...
        @property
        def bytes(self) -> int: ...
        @property
        def digest(self) -> str: ...
        def plan_again(self) -> _core.Plan: ...
        def write(
            self, directory: str, *, threads: int, sync: bool, progress: Report
        ) -> Sequence[Written]: ...

    class Planned(Protocol):
        """A `MergePlan`."""

        core: _core.Plan
        base: str
        adapters: list[str]
        bytes_to_write: int

        @property
        def digest(self) -> str: ...
        def parts(self) -> Sequence[Part]: ...
        def whole(self) -> Part: ...


#: What the files in the directory of parts end in that say that a shard is written.
RECEIPT = ".receipt.json"
#: Seconds between two looks whether a task is still wanted.
LOOK_EVERY = 0.5
#: A task verifies about so many bytes, or an eighth of the whole if that is less.
VERIFIED_BYTES = 1 << 30
LEAST_PARTS = 8


#: Why what lies in a store is refused.
_OF_FILES = (
    "is in an object store, and an executor's workers read files that all of them see; leave the "
    "executor out, or download it"
)


def _require_files(plan: Planned) -> None:
    """Makes sure that base and adapters are files, which any process can open by their names.

    Raises:
        ValueError: one lies in a store.
    """
    for name in (plan.base, *plan.adapters):
        if "://" in name:
            raise ValueError(f"{name}: {_OF_FILES}")


def write_model(
    plan: Planned,
    output: str,
    execution: ExecutionOptions,
    card: str | None,
    progress: Report | None,
) -> tuple[Summary, OutputLock]:
    """Has a plan's shards written by an executor, and makes the output of them.

    Raises:
        OutputError: the parts of another merge lie beside the output, or it may not be written.
        WorkerError: a worker died.
        LorafastError: as `lorafast.merge`.
    """
    begin = time.perf_counter()
    if "://" in output:
        raise OutputError(
            f"{output}: with an executor the output is a directory on a file system that all "
            "workers share; upload it afterwards"
        )
    _require_files(plan)
    parts = plan.parts()
    _check_output(plan, Path(output), overwrite=execution.overwrite)
    with _claimed(plan, Path(output), overwrite=execution.overwrite) as place:
        written = _written(place, parts, execution, progress)
        whole = 2 * plan.bytes_to_write

        def tell(done: int, total: int) -> None:
            if progress is not None:
                progress(max(0, whole - total + done), whole)

        summary, lock = _core.assemble_shards(
            plan.core,
            place,
            written,
            output,
            overwrite=execution.overwrite,
            sync=execution.sync,
            card=card,
            # The parts are removed, so that the shards can be the output's own files.
            adopt=True,
            progress=None if progress is None else tell,
        )
    # Of each task; this process only looks at what they wrote.
    summary["threads"] = execution.threads or 1
    summary["seconds"] = time.perf_counter() - begin
    return summary, lock


def _written(
    place: Path, parts: Sequence[Part], execution: ExecutionOptions, progress: Report | None
) -> list[dict[str, Any]]:
    """The receipts of all shards, which are written where they are not there."""
    assert execution.executor is not None
    written: list[dict[str, Any]] = []
    left: list[Part] = []
    for part in parts:
        receipts = _receipts_of(place, part)
        if receipts is None:
            left.append(part)
        else:
            written += receipts
    # The core tells of the shards in the output, of as many bytes again.
    bytes_of_all = sum(part.bytes for part in parts)
    _check_space(place, bytes_of_all - sum(receipt["bytes"] for receipt in written))

    def tell(done: int, total: int) -> None:
        if progress is not None:
            progress(done, 2 * bytes_of_all)

    # This call's tasks, and no others, end when this is there.
    stop = place / f"stop-{os.urandom(8).hex()}"
    threads = execution.threads or 1
    how = {"threads": threads, "sync": execution.sync, "stop": stop.name}
    tasks = [Task(write_part, (part, str(place)), how, part.bytes) for part in left]
    if tasks:
        with opened(execution.executor, threads) as executor:
            run(
                executor,
                tasks,
                lambda _, receipts: written.extend(receipts),
                progress=tell,
                done=bytes_of_all - sum(task.size for task in tasks),
                stop=stop.touch,
                again="the same call again completes the merge: what was written is kept beside "
                f"the output, in {place}",
            )
    return written


def write_part(
    part: Part, directory: str, *, threads: int, sync: bool, stop: str
) -> list[dict[str, Any]]:
    """The task of a worker: writes some shards and their receipts.

    Args:
        part: the shards.
        directory: where to.
        threads: how many threads to use.
        sync: wait until they have reached the disk.
        stop: the name of the file that says that nobody waits for them any more.

    Raises:
        PlanError: base, adapters or lorafast are not those that the merge was planned with.
        LorafastError: as `lorafast.merge`.
    """
    place = Path(directory)
    if not place.is_dir():
        raise PlanError(
            f"{directory}: is not there for this worker: the output has to lie on a file system "
            "that all workers share"
        )
    shards = part.write(directory, threads=threads, sync=sync, progress=_while_wanted(place / stop))
    receipts = [shard._asdict() for shard in shards]
    for receipt in receipts:
        target = place / (receipt["name"] + RECEIPT)
        atomic.write(target, json.dumps({**receipt, "digest": part.digest}), sync=sync)
    return receipts


def _while_wanted(stop: Path) -> Callable[[int, int], None]:
    """A report of progress that ends the work when a file is there."""
    looked = time.monotonic()

    def look(done: int, total: int) -> None:
        nonlocal looked
        if time.monotonic() - looked >= LOOK_EVERY:
            looked = time.monotonic()
            if stop.exists():
                raise LorafastError("the merge that this is a part of was ended")

    return look


def _receipts_of(place: Path, part: Part) -> list[dict[str, Any]] | None:
    """The receipts of a part that is written already."""
    found = []
    for name in part.names:
        try:
            receipt = json.loads((place / (name + RECEIPT)).read_bytes())
            length = (place / name).stat().st_size
        except (OSError, ValueError):
            return None
        if not isinstance(receipt, dict) or receipt.pop("digest", None) != part.digest:
            return None
        if receipt.get("name") != name or receipt.get("bytes") != length:
            return None
        found.append(receipt)
    return found


def _check_output(plan: Planned, output: Path, *, overwrite: bool) -> None:
    """Refuses an output that the core would refuse at the end, before any work.

    Raises:
        OutputError: it is not empty, no directory, or lies in what is read.
    """
    if output.exists() and not output.is_dir():
        raise OutputError(f"{output}: is not a directory")
    if not overwrite and output.is_dir() and any(output.iterdir()):
        raise OutputError(
            f"{output}: is not empty; write to another directory, or allow overwriting"
        )
    for read in (plan.base, *plan.adapters):
        if resolved(output).is_relative_to(resolved(read)):
            raise OutputError(f"{output}: lies in {read}, which is read; write somewhere else")


def _check_space(place: Path, needed: int) -> None:
    import shutil

    free = shutil.disk_usage(place).free
    if free < needed:
        raise OutputError(
            f"{place}: the shards need {needed:,} more bytes, and {free:,} are free there"
        )


@contextmanager
def _claimed(plan: Planned, output: Path, *, overwrite: bool) -> Iterator[Path]:
    """The directory of a merge's parts, which no other call has meanwhile.

    It is removed unless the same call again can use what is in it.

    Raises:
        OutputError: another call has it, or it holds the parts of another merge.
    """
    output = Path(absolute(str(output)))
    place = output.parent / f".{output.name}.parts"
    place.mkdir(parents=True, exist_ok=True)
    with _locked(place):
        job, claim = _job(plan), place / "job.json"
        try:
            known = json.loads(claim.read_bytes())
        except (OSError, ValueError):
            known = None
        if known is None or (known != job and overwrite):
            _empty(place)
            atomic.write(claim, json.dumps(job), sync=True)
        elif known != job:
            raise OutputError(
                f"{place}: holds parts of another merge into {output} that was not finished "
                "(or its base or adapters changed since); finish that one, allow overwriting, or "
                f"remove {place}"
            )
        for remains in (*place.glob("stop-*"), *place.rglob("*.partial")):
            with suppress(OSError):
                remains.unlink()
        try:
            yield place
        except OutputError as error:
            # Of a shard that was damaged since; it has to be written again.
            for receipt in place.rglob(f"*{RECEIPT}"):
                if str(error).startswith(str(receipt).removesuffix(RECEIPT) + ": "):
                    receipt.unlink(missing_ok=True)
            raise
        except LorafastError as error:
            if not isinstance(error, WorkerError):
                # The same call again would meet it again.
                _remove(place)
            raise
        _remove(place)


@contextmanager
def _locked(place: Path) -> Iterator[None]:
    import fcntl

    with (place / "lock").open("wb") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise OutputError(f"{place}: another merge into this output is under way") from None
        yield


def _job(plan: Planned) -> dict[str, Any]:
    """What tells one merge from others: its plan, and the states of the base's files."""
    base = Path(plan.base)
    files = sorted(base.rglob("*.safetensors")) if base.is_dir() else [base]
    states = [(path.name, (state := path.stat()).st_size, state.st_mtime_ns) for path in files]
    return {"plan": plan.digest, "base": [list(state) for state in states]}


def _empty(place: Path) -> None:
    import shutil

    for entry in place.iterdir():
        if entry.name == "lock":
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.rmtree(entry, ignore_errors=True)
        else:
            entry.unlink(missing_ok=True)


def _remove(place: Path) -> None:
    import shutil

    shutil.rmtree(place, ignore_errors=True)


def verified(
    plan: Planned,
    merged: Path | _core.StoreLocation,
    execution: ExecutionOptions,
    *,
    full: bool,
    split: bool,
    progress: Report | None,
) -> VerifyOutcome:
    """What `Plan.verify` finds, found by an executor's workers.

    Raises:
        PlanError: base, adapters or lorafast are not the same for all of them.
        WorkerError: a worker died.
        LorafastError: as `lorafast.verify`.
    """
    assert execution.executor is not None
    _require_files(plan)
    if not isinstance(merged, Path):
        raise ValueError(f"{merged}: {_OF_FILES}")
    threads = execution.threads or 1
    size = plan.bytes_to_write
    count = max(LEAST_PARTS, -(-size // VERIFIED_BYTES))
    found: list[Any] = [()] * count
    whole, where = plan.whole(), absolute(str(merged))
    how = {"threads": threads, "full": full, "split": split}
    tasks = [
        Task(verify_part, (whole, where, (place, count)), how, size // count or 1)
        for place in range(count)
    ]

    def receive(place: int, result: Any) -> None:
        found[place] = result

    with opened(execution.executor, threads) as executor:
        run(executor, tasks, receive, progress=progress, again="verify again")
    return plan.core.verify_found(merged, [finding for part in found for finding in part])


def verify_part(
    whole: Part, merged: str, part: tuple[int, int], *, threads: int, full: bool, split: bool
) -> list[Any]:
    """The task of a worker: looks at some tensors.

    Raises:
        PlanError: base, adapters or lorafast are not those of the one who asks.
        LorafastError: as `lorafast.verify`.
    """
    core = whole.plan_again()
    return core.verify_part(merged, part, threads=threads, full=full, split=split)
