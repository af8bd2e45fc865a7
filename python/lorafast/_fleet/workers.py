"""A scan whose adapters other processes read."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast import _core
from lorafast._analysis.records import Finding
from lorafast._errors import raise_interruption
from lorafast._fleet.entry import findings_of
from lorafast._io.executors import Task, chunks, opened, run
from lorafast._io.paths import absolute
from lorafast._io.sources import core_source

if TYPE_CHECKING:
    from lorafast._fleet.options import ScanOptions
    from lorafast._types import Metrics

#: Bytes of adapters that a task reads, and the most adapters.
TASK_BYTES = 256 << 20
TASK_ADAPTERS = 1024

Found = _core.ScannedAdapter | Exception
Findings = list[tuple[Finding, int]]
#: What a worker tells of an adapter: what was found, encoded, with its findings, or the error.
Told = tuple[tuple[str, bytes], Findings] | Exception


def scan_apart(
    adapters: Sequence[str],
    options: ScanOptions,
    receive: Callable[
        [list[tuple[int, tuple[_core.ScannedAdapter, Findings] | Exception]], int, int], object
    ],
) -> int:
    """`scan_adapters` by an executor's workers.

    Args:
        adapters: their paths.
        options: of the scan.
        receive: is called with what a task found, and the bytes done and in all.

    Returns:
        The bytes of weights that were read.

    Raises:
        WorkerError: a worker died.
    """
    assert options.executor is not None
    sizes = [_size(adapter) for adapter in adapters]
    weighed = [max(size, TASK_BYTES // TASK_ADAPTERS) for size in sizes]
    runs = chunks(weighed, TASK_BYTES)
    how = {"metrics": options.metrics, "threads": options.threads or 1}
    tasks = [
        Task(scan_some, ([absolute(adapters[at]) for at in places],), how, 1) for places in runs
    ]
    total = sum(sizes)
    done = read = 0

    def take(task: int, told: tuple[list[tuple[int, Told]], int]) -> None:
        nonlocal done, read
        places = runs[task]
        done += sum(sizes[at] for at in places)
        read += told[1]
        decoded = [(places[at], _decoded(options.metrics, one)) for at, one in told[0]]
        receive(decoded, done, total)

    with opened(options.executor, options.threads) as executor:
        run(executor, tasks, take, again="the same call again reads all, or with a cache the rest")
    return read


def scan_some(
    adapters: Sequence[str], *, metrics: Metrics, threads: int
) -> tuple[list[tuple[int, Told]], int]:
    """The task of a worker: reads some adapters.

    Returns:
        What was found, and the bytes of weights that were read.
    """
    told: list[tuple[int, Told]] = []
    places: list[int] = []
    sources: list[Any] = []
    for place, adapter in enumerate(adapters):
        try:
            sources.append(core_source(Path(adapter)))
        except OSError as error:
            told.append((place, error))
        else:
            places.append(place)
    read = 0

    def receive(batch: list[tuple[int, Found]], done: int, total: int) -> None:
        nonlocal read
        read = done
        for at, found in batch:
            told.append((places[at], _told(found)))

    if sources:
        _core.scan_adapters(sources, metrics=metrics, threads=threads, receive=receive)
    return told, read


def _told(found: Found) -> Told:
    if isinstance(found, Exception):
        return found
    try:
        # Not all that they are made of is encoded.
        return found.encode(), list(findings_of(found))
    except MemoryError:
        raise
    except Exception as error:
        raise_interruption(error)
        # What is odd in a stranger's adapter does not end the others' scan.
        return error


def _decoded(metrics: Metrics, told: Told) -> tuple[_core.ScannedAdapter, Findings] | Exception:
    if isinstance(told, Exception):
        return told
    encoded, findings = told
    return _core.ScannedAdapter.decode(metrics, *encoded), findings


def _size(adapter: str) -> int:
    """Bytes of an adapter's files, as far as they can be told."""
    try:
        path = Path(adapter)
        files = path.iterdir() if path.is_dir() else [path]
        return sum(file.stat().st_size for file in files if file.is_file())
    except OSError:
        return 0
