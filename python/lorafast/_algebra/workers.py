"""An extraction whose modules other processes look at."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast import _core
from lorafast._errors import LorafastError, OutputError, WorkerError
from lorafast._io.executors import Task, chunks, opened, run
from lorafast._io.paths import absolute

if TYPE_CHECKING:
    from lorafast._core import ExtractResult
    from lorafast._types import ExecutorChoice, Report

#: Bytes of both checkpoints that a task looks at.
TASK_BYTES = 1 << 30


def extract_apart(
    inputs: Sequence[Path],
    output: str,
    asked: dict[str, Any],
    *,
    executor: ExecutorChoice,
    threads: int | None,
    progress: Report | None,
) -> ExtractResult:
    """`extract_adapter`, after an executor's workers looked at the modules.

    Each task leaves what it finishes in a directory of its own, so that two attempts at one do not
    meet; what an earlier call's tasks left is taken first.

    Raises:
        WorkerError: a worker died.
        LorafastError: as `lorafast.extract`.
    """
    tuned, base = (absolute(os.fspath(path)) for path in inputs)
    target = Path(absolute(output))
    place = target.parent / f".{target.name}.extract-parts"
    try:
        found = _extracted(
            (tuned, base),
            target,
            place,
            asked,
            executor=executor,
            threads=threads,
            progress=progress,
        )
    except LorafastError as error:
        if not isinstance(error, WorkerError | OutputError):
            # The same call again would meet it again.
            for remains in (place, target.parent / f".{target.name}.extract"):
                shutil.rmtree(remains, ignore_errors=True)
        raise
    shutil.rmtree(place, ignore_errors=True)
    return found


def _extracted(
    inputs: tuple[str, str],
    target: Path,
    place: Path,
    asked: dict[str, Any],
    *,
    executor: ExecutorChoice,
    threads: int | None,
    progress: Report | None,
) -> ExtractResult:
    tuned, base = inputs
    options = json.dumps(asked)
    plan = _core.plan_extraction(tuned, base, target, options=options, parts=_parts(place))
    names = [name for name, _ in plan["left"]]
    sizes = [size for _, size in plan["left"]]
    own = json.dumps({**asked, "write": {**asked["write"], "threads": threads or 1}})
    tasks = []
    for run_of in chunks(sizes, TASK_BYTES):
        directory = os.fspath(place / os.urandom(8).hex())
        arguments = (tuned, base, directory, plan["digest"], [names[at] for at in run_of])
        size = sum(sizes[at] for at in run_of)
        tasks.append(Task(extract_part, arguments, {"options": own}, size))
    if tasks:
        with opened(executor, threads) as workers:
            run(workers, tasks, lambda place, result: None, progress=progress)
    return _core.extract_adapter(
        tuned, base, target, options=options, parts=_parts(place), progress=None
    )


def extract_part(
    tuned: str, base: str, directory: str, digest: str, names: list[str], *, options: str
) -> None:
    """The task of a worker: looks at some parameters.

    Raises:
        PlanError: the checkpoints or lorafast are not those of the one who asks.
        LorafastError: as `lorafast.extract`.
    """
    # Another attempt at the same task may be under way.
    own = f"{directory}-{os.urandom(4).hex()}"
    _core.extract_part(tuned, base, own, digest, names, options=options)


def _parts(place: Path) -> list[Path]:
    with suppress(FileNotFoundError):
        return sorted(entry for entry in place.iterdir() if entry.is_dir())
    return []
