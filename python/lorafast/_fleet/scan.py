"""Reading many adapters at once: `lorafast.scan`."""

from __future__ import annotations

import os
import time
from array import array
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import numpy as np

from lorafast import _core
from lorafast._fleet import cache as cache_files
from lorafast._fleet.columns import Columns
from lorafast._fleet.discovery import ScanError, discover
from lorafast._fleet.entry import entry_of, row_type
from lorafast._fleet.finding_columns import ErrorColumns
from lorafast._fleet.fleet import Fleet
from lorafast._fleet.progress import Follow, follower
from lorafast._fleet.table import NOTHING, OnDemand, Words, WordsBuilder
from lorafast._io.limits import check_threads
from lorafast._io.sources import CoreSource, core_source, has_only_pickle
from lorafast._io.strangers import reason_of
from lorafast._torch.device import analysis_device
from lorafast._types import Metrics, Source

METRICS: tuple[Metrics, ...] = ("full", "headers", "moments", "spectra")


def scan(
    paths: Source | Iterable[Source],
    *,
    metrics: Metrics = "full",
    threads: int | None = None,
    progress: bool | Callable[[int, int], object] = False,
    cache: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Fleet:
    """Reads any number of adapters and tells what each of them holds.

    Figures are those of `analyze`, bit for bit, whatever the number of threads. Work is spread
    over the modules of all adapters; at most two adapters a thread are open at a time, and memory
    is the tables' and a buffer a thread of the size of the largest module (at least 8 MiB). An
    adapter that cannot be read is a record in `Fleet.errors` and does not end the scan; so is one
    that changed while it was read.

    Args:
        paths: directories, which are searched with all that lies below them; adapters; globs; or
            any number of these.
        metrics: how much to find: "headers" reads no weights; "moments" the statistics of the
            stored factors; "spectra" the singular values of each update s·B·A and what follows
            from them; "full" both.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal, or a callable that is given (done, total) bytes.
        cache: a directory (made if it is not there) that keeps what was found. Only adapters that
            are not in it, or whose weights or config have changed since by size, time or
            identity, are read; a scan that was interrupted goes on where it was. What it knows of
            adapters that have gone from a directory that is searched is removed.
        device: where spectra are found: "cpu", or by torch, in batches of modules of one shape, on
            "cuda" or "cuda:N" ("auto": on a CUDA device where there is one; "torch:cpu" to compare
            backends). There they agree with the CPU's to rounding, not to the bit, and are not
            kept in a cache.

    Returns:
        The fleet: tables of adapters and of modules, findings, and errors.

    Raises:
        ValueError: an argument is outside its domain, or no path was given.
        FileNotFoundError: no path is there.
        AdapterError: the paths hold no adapter at all.
        OSError: the cache's directory cannot be made. A cache that is damaged, or cannot be read or
            written, is a warning.
        DeviceError: the device is not there.
    """
    with follower(progress) as follow:
        return scan_followed(
            paths, follow, metrics=metrics, threads=threads, cache=cache, device=device
        )


def scan_followed(
    paths: Source | Iterable[Source],
    follow: Follow,
    *,
    metrics: Metrics = "full",
    threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Fleet:
    """`scan`, telling `follow` how far it is."""
    if metrics not in METRICS:
        raise ValueError(f"metrics must be one of {', '.join(METRICS)}, not {metrics!r}")
    check_threads(threads)
    place = analysis_device(device, cache)
    found = discover(paths)
    scanning = _Scanning(found.adapters, metrics, threads, follow)
    if metrics in {"full", "spectra"}:
        scanning.device = place
    with ExitStack() as stack:
        if cache is not None:
            known = stack.enter_context(cache_files.opened(cache, metrics))
            scanning.use(known)
            scanning.run()
            known.forget_missing(found.searched)
        else:
            scanning.run()
    for error in found.errors:
        scanning.errors.add(NOTHING, error)
    tables = scanning.columns.tables(found.adapters.words)
    return Fleet(
        metrics=metrics,
        adapters=tables.adapters,
        modules=tables.modules,
        findings=tables.findings,
        errors=scanning.errors.build(),
        bytes_read=scanning.bytes_read,
        remembered=scanning.remembered,
    )


class _Items(OnDemand[CoreSource]):
    """What the core is to read, made when it asks."""

    def __init__(self, adapters: Sequence[Path], positions: Sequence[int]) -> None:
        self._adapters = adapters
        self._positions = positions

    def __len__(self) -> int:
        return len(self._positions)

    def _at(self, row: int) -> CoreSource:
        return core_source(self._adapters[self._positions[row]])


class _Scanning:
    """One scan under way. Positions are those of the adapters that were found."""

    def __init__(
        self, adapters: Sequence[Path], metrics: Metrics, threads: int | None, follow: Follow
    ) -> None:
        self._adapters = adapters
        self._metrics = metrics
        self._threads = threads
        self._follow = follow
        self._type = row_type(metrics)
        #: Where spectra are found, if not by the core.
        self.device: Any = None
        self._cache: cache_files.Cache | None = None
        self._stamps = Words.of([])
        self._stamp_of = np.empty(0, np.int32)
        self.columns = Columns(len(adapters), self._type)
        self.errors = ErrorColumns()
        self.bytes_read = 0
        self.remembered = 0

    def use(self, cache: cache_files.Cache) -> None:
        """Takes what the cache knows, and remembers what is found in it."""
        self._cache = cache
        self._stamp_of = np.full(len(self._adapters), NOTHING, np.int32)
        stamps = WordsBuilder()
        settled = time.time_ns() - cache_files.SETTLED
        for position, adapter in enumerate(self._adapters):
            stamp = cache_files.stamp_of(adapter)
            if stamp is None or stamp[1] >= settled:
                continue
            entry = cache.known(adapter, stamp[0], self._type)
            if entry is not None:
                self.columns.add(position, entry)
                self.remembered += 1
            else:
                self._stamp_of[position] = stamps.append(stamp[0])
        self._stamps = stamps.build()

    def run(self) -> None:
        """Reads everything that is not known."""
        left = self.columns.missing()
        self._follow.begin(len(left))
        failed: list[int] = []
        for position in map(int, left):
            try:
                has_only_pickle(self._adapters[position])
            except OSError as error:
                self._fail(position, error)
                self._follow.finished(1)
                failed.append(position)
        others = array("q", np.setdiff1d(left, failed, assume_unique=True).tobytes())
        if others:
            self._scan(others, _Items(self._adapters, others))

    def _scan(self, positions: Sequence[int], items: Sequence[CoreSource]) -> None:
        def receive(
            batch: list[tuple[int, dict[str, object] | Exception]], done: int, total: int
        ) -> None:
            if self.device is not None:
                batch = self._with_spectra(batch, items)
            for place, result in batch:
                position = positions[place]
                if isinstance(result, Exception):
                    self._fail(position, result)
                else:
                    self._succeed(position, result)
            self._follow.finished(len(batch))
            self._follow.read(done, total)
            self._done = done

        self._done = 0
        metrics = self._metrics if self.device is None else "moments"
        _core.scan_adapters(items, metrics=metrics, threads=self._threads, receive=receive)
        self.bytes_read += self._done
        self._follow.end_of_part()

    def _with_spectra(
        self, batch: list[tuple[int, dict[str, object] | Exception]], items: Sequence[CoreSource]
    ) -> list[tuple[int, dict[str, object] | Exception]]:
        from lorafast._torch.spectra import with_spectra

        result: list[tuple[int, dict[str, object] | Exception]] = []
        for place, found in batch:
            if isinstance(found, Exception):
                result.append((place, found))
        sound = [(place, found) for place, found in batch if not isinstance(found, Exception)]
        failed = with_spectra(
            [(found, items[place]) for place, found in sound],
            self._metrics,
            row_type("moments"),
            self._type,
            self.device,
        )
        for at, (place, found) in enumerate(sound):
            result.append((place, failed.get(at, found)))
        return result

    def _succeed(self, position: int, result: dict[str, object]) -> None:
        try:
            entry = entry_of(result, self._type)
        except MemoryError:
            raise
        except Exception as error:
            # What is odd in a stranger's adapter does not end the others' scan.
            self._fail(position, error)
            return
        self.columns.add(position, entry)
        if self._cache is not None and self._stamp_of[position] != NOTHING:
            stamp = self._stamps[int(self._stamp_of[position])]
            self._cache.keep(self._adapters[position], stamp, entry)

    def _fail(self, position: int, error: Exception) -> None:
        adapter = self._adapters[position]
        self.errors.add(position, ScanError(adapter, _reason(adapter, error)))


def _reason(adapter: Path, error: Exception) -> str:
    """Why an adapter cannot be read, without its own path, which stands beside it."""
    text = reason_of(error)
    if isinstance(error, OSError) and error.filename is not None:
        name = os.path.relpath(error.filename, adapter)
        return text if name == "." else f"{name}: {text}"
    own = os.fspath(adapter)
    return text.removeprefix(f"{own}: ").replace(f"{own}{os.sep}", "")
