"""Reading many adapters at once: `lorafast.scan`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from lorafast import _core
from lorafast._analysis.records import Finding
from lorafast._errors import raise_interruption
from lorafast._fleet import cache as cache_files
from lorafast._fleet.discovery import ScanError, discover
from lorafast._fleet.entry import SCHEMA_VERSION, findings_of
from lorafast._fleet.findings import of_fleet
from lorafast._fleet.fleet import Fleet
from lorafast._fleet.members import names_below
from lorafast._fleet.options import ScanOptions
from lorafast._fleet.progress import Follow, follower
from lorafast._fleet.rows import ErrorList, FindingList
from lorafast._fleet.table import Table
from lorafast._io.executors import check_executor_on
from lorafast._io.limits import check_threads
from lorafast._io.paths import absolute
from lorafast._io.plain import utf8
from lorafast._io.sources import CoreSource, core_source
from lorafast._io.strangers import reason_of
from lorafast._options import check_choices, pick
from lorafast._torch.device import analysis_device
from lorafast._types import ExecutorChoice, Metrics, Severity, Source

Item = str | CoreSource
Found = _core.ScannedAdapter | Exception
#: What a worker found, with its findings.
Read = tuple[_core.ScannedAdapter, list[tuple[Finding, int]]]
Told = tuple[Severity, str, str | None, float | None, str, int]


def scan(
    paths: Source | Iterable[Source],
    *,
    metrics: Metrics = "full",
    exclude: Sequence[str] = (),
    threads: int | None = None,
    progress: bool | Callable[[int, int], object] = False,
    cache: str | os.PathLike[str] | None = None,
    device: str = "cpu",
    executor: ExecutorChoice | None = None,
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
        exclude: patterns of what is left out, and of all that lies below it: the name of a file or
            a directory at any depth (`checkpoint-*`), or with a slash a path below the root
            (`old/*`, `**/tmp/*`), which may also be absolute.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.
        cache: a directory (made if it is not there) that keeps what was found. Only adapters that
            are not in it, or whose weights or config have changed since by size, time or
            identity, are read; a scan that was interrupted goes on where it was. What it knows of
            adapters that have gone from a directory that is searched is removed.
        device: where spectra are found: "cpu", or by torch, in batches of modules of one shape, on
            "cuda" or "cuda:N" ("auto": on a CUDA device where there is one; "torch:cpu" to compare
            backends). There they agree with the CPU's to rounding, not to the bit, and are not
            kept in a cache.
        executor: who reads the adapters, about 256 MiB of them a task: an executor of
            `concurrent.futures`, "ray", "processes" or "processes:N", as for `lorafast.merge`; each
            task has `threads` threads, 1 if missing. The figures are the same bits. All workers
            have to see the adapters under the same paths; the cache is this process's alone.

    Returns:
        The fleet: tables of adapters and of modules, findings, and errors.

    Raises:
        ValueError: an argument is outside its domain, no path was given, or a pattern is empty.
        FileNotFoundError: no path is there.
        AdapterError: the paths hold no adapter at all.
        OSError: the cache's directory cannot be made. A cache that is damaged, or cannot be read or
            written, is a warning.
        DeviceError: the device is not there.
    """
    options = pick(ScanOptions, locals())
    with follower(options.progress) as follow:
        return _scan(paths, options, follow)


def _scan(paths: Source | Iterable[Source], options: ScanOptions, follow: Follow) -> Fleet:
    """`scan`, telling `follow` how far it is."""
    check_choices(options)
    check_threads(options.threads)
    check_executor_on(options.executor, options.device)
    place = analysis_device(options.device, options.cache)
    found = discover(paths, options.exclude)
    scanning = _Scanning(found.adapters, found.root, options, follow)
    if options.metrics in {"full", "spectra"}:
        scanning.device = place
    with ExitStack() as stack:
        if options.cache is not None:
            known = stack.enter_context(cache_files.opened(options.cache, options.metrics))
            scanning.use(known)
            scanning.run()
            known.forget_missing(found.searched)
        else:
            scanning.run()
    for error in found.errors:
        scanning.fail(None, error)
    return scanning.fleet()


class _Scanning:
    """One scan under way. Positions are those of the adapters that were found."""

    def __init__(
        self, adapters: Sequence[str], root: str, options: ScanOptions, follow: Follow
    ) -> None:
        self._adapters = adapters
        self._root = root
        self._options = options
        self._follow = follow
        #: Where spectra are found, if not by the core.
        self.device: Any = None
        self._cache: cache_files.Cache | None = None
        self._stamps: dict[int, str] = {}
        self._tables = _core.FleetTables(options.metrics, SCHEMA_VERSION)
        self._errors: list[tuple[int | None, str]] = []
        self._without_value: set[str] = set()
        self._bytes_read = 0
        self._remembered = 0

    def use(self, cache: cache_files.Cache) -> None:
        """Takes what the cache knows, and remembers what is found in it."""
        self._cache = cache
        settled = time.time_ns() - cache_files.SETTLED
        for position, adapter in enumerate(map(Path, self._adapters)):
            stamp = cache_files.stamp_of(adapter)
            if stamp is None or stamp[1] >= settled:
                continue
            known = cache.known(adapter, stamp[0])
            if known is not None:
                self._add(position, *known)
                self._remembered += 1
            else:
                self._stamps[position] = stamp[0]

    def run(self) -> None:
        """Reads everything that is not known."""
        known = set(self._tables.positions())
        left = [position for position in range(len(self._adapters)) if position not in known]
        self._follow.begin(len(left))
        positions: list[int] = []
        sources: list[Item] = []
        for position in left:
            adapter = self._adapters[position]
            try:
                source = core_source(Path(adapter))
            except OSError as error:
                self._fail(position, error)
                self._follow.finished(1)
                continue
            positions.append(position)
            # Thousands of paths are kept as texts.
            sources.append(source if isinstance(source, tuple) else adapter)
        if positions:
            self._scan(positions, sources)

    def fleet(self) -> Fleet:
        """All that was found. Nothing can be added any more."""
        tables = self._tables
        here = [self._adapters[position] for position in tables.positions()]
        names = names_below(self._root, here)
        core = tables.finish(list(map(utf8, here)), names)
        adapters, modules = (Table(core[0], _no_utf8(here)), Table(core[1]))
        # What only the whole fleet shows comes after what was found in single adapters.
        more = [(row, self._told(finding, 1)) for row, finding in of_fleet(adapters)]
        # As the core arranges them.
        order = sorted(self._errors, key=lambda each: -1 if each[0] is None else each[0])
        failed = [path for _, path in order]
        return Fleet(
            metrics=self._options.metrics,
            adapters=adapters,
            modules=modules,
            findings=FindingList(Table(tables.findings(more)), frozenset(self._without_value)),
            errors=ErrorList(Table(tables.errors(), _no_utf8(failed))),
            bytes_read=self._bytes_read,
            remembered=self._remembered,
            root=Path(self._root),
        )

    def _scan(self, positions: Sequence[int], items: Sequence[Item]) -> None:
        done = 0

        def receive(batch: Sequence[tuple[int, Found | Read]], read: int, total: int) -> None:
            nonlocal done
            if self.device is not None:
                batch = self._with_spectra(batch, items)
            for place, result in batch:
                if isinstance(result, Exception):
                    self._fail(positions[place], result)
                elif isinstance(result, tuple):
                    self._keep(positions[place], *result)
                else:
                    self._succeed(positions[place], result)
            self._follow.finished(len(batch))
            self._follow.read(read, total)
            done = read

        options = self._options
        metrics = options.metrics if self.device is None else "moments"
        if options.executor is not None:
            from lorafast._fleet.workers import scan_apart

            adapters = [self._adapters[position] for position in positions]
            done = scan_apart(adapters, options, receive)
        else:
            _core.scan_adapters(items, metrics=metrics, threads=options.threads, receive=receive)
        self._bytes_read += done
        self._follow.end_of_part()

    def _with_spectra(
        self, batch: Sequence[tuple[int, Any]], items: Sequence[Item]
    ) -> list[tuple[int, Found]]:
        from lorafast._torch.spectra import with_spectra

        failed = [(place, found) for place, found in batch if isinstance(found, Exception)]
        sound = [(place, found) for place, found in batch if not isinstance(found, Exception)]
        sources = [(found, items[place]) for place, found in sound]
        made = with_spectra(sources, self._options.metrics, self.device)
        places = (place for place, _ in sound)
        return [*failed, *zip(places, made, strict=True)]

    def _succeed(self, position: int, found: _core.ScannedAdapter) -> None:
        try:
            findings = findings_of(found)
        except MemoryError:
            raise
        except Exception as error:
            raise_interruption(error)
            # What is odd in a stranger's adapter does not end the others' scan.
            self._fail(position, error)
            return
        self._keep(position, found, findings)

    def _keep(
        self, position: int, found: _core.ScannedAdapter, findings: list[tuple[Finding, int]]
    ) -> None:
        self._add(position, found, findings)
        if self._cache is not None and position in self._stamps:
            adapter = Path(self._adapters[position])
            self._cache.keep(adapter, self._stamps.pop(position), found, findings)

    def _add(
        self, position: int, found: _core.ScannedAdapter, findings: Iterable[tuple[Finding, int]]
    ) -> None:
        told = [self._told(finding, count) for finding, count in findings]
        self._tables.add(position, found, told)

    def _told(self, finding: Finding, count: int) -> Told:
        if finding.value is None:
            self._without_value.add(finding.kind)
        return (
            *(finding.severity, finding.kind, finding.module, finding.value, finding.reason),
            count,
        )

    def _fail(self, position: int, error: Exception) -> None:
        adapter = Path(self._adapters[position])
        self.fail(position, ScanError(adapter, _reason(adapter, error)))

    def fail(self, position: int | None, error: ScanError) -> None:
        """Keeps an error: of the adapter at a position, or of what is none."""
        self._tables.add_error(position, utf8(os.fspath(error.path)), utf8(error.reason))
        self._errors.append((position, os.fspath(error.path)))


def _no_utf8(paths: Iterable[str]) -> dict[int, str]:
    """The paths that no Arrow column can hold, by row."""
    return {row: path for row, path in enumerate(paths) if utf8(path) != path}


def _reason(adapter: Path, error: Exception) -> str:
    """Why an adapter cannot be read, without its own path, which stands beside it."""
    text = reason_of(error)
    if isinstance(error, OSError) and error.filename is not None:
        name = os.path.relpath(error.filename, adapter)
        return text if name == "." else f"{name}: {text}"
    # Other processes have its whole path.
    for own in (absolute(os.fspath(adapter)), os.fspath(adapter)):
        text = text.removeprefix(f"{own}: ").replace(f"{own}{os.sep}", "")
    return text
