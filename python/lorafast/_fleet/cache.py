"""What earlier scans found, so that only what has changed is read again.

A cache is a directory with one SQLite database. Its transactions make a scan that is killed leave
what it had found by then and nothing half-written, and let several scans share a directory. It only
saves time: one that is damaged, locked or on a full disk is a warning, and the scan goes on.
"""

from __future__ import annotations

import json
import os
import sqlite3
import stat
import time
import warnings
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from dataclasses import asdict
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

from lorafast import _core
from lorafast._analysis.findings import KINDS, SEVERITIES
from lorafast._analysis.records import Finding
from lorafast._fleet.entry import SCHEMA_VERSION
from lorafast._io import paths
from lorafast._io.paths import expand, resolved
from lorafast._io.sources import CONFIG, USUAL_WEIGHTS, WEIGHTS
from lorafast._io.strangers import gate
from lorafast._types import Metrics

T = TypeVar("T")
#: An adapter, and its findings with how many there are of each.
Known = tuple[_core.ScannedAdapter, list[tuple[Finding, int]]]

FILE = "lorafast-scan.sqlite"
#: Of a row; raised when its blobs are laid out otherwise, or mean something else.
LAYOUT = 5
#: A file that changed within this time before it was read may change again without its time of
#: change being another one; what is found in it is not kept. In nanoseconds.
SETTLED = 2_000_000_000
#: Seconds between two writes: what a killed scan may have to read again.
INTERVAL = 0.5
#: Seconds to wait for another scan that writes to the same cache.
PATIENCE = 2.0
#: Seconds until a cache that would not be written is tried again, and what may wait until then.
PAUSE = 10.0
MAX_WAITING = 10_000
#: Bytes of a digest, and the most that a row's details may be.
DIGEST = 16
LARGEST = 1 << 28
#: Primary result codes of SQLite. These say that the file is spoilt, or has another program's
#: tables; everything else that it does not do today it may do tomorrow.
ERROR, CORRUPT, FORMAT, NOT_A_DATABASE = 1, 11, 24, 26
SPOILT = frozenset({ERROR, CORRUPT, FORMAT, NOT_A_DATABASE})


def stamp_of(adapter: Path) -> tuple[str, int] | None:
    """What tells whether an adapter is still the same, and when it was last changed.

    Sizes, times of the last change and identities of the weights and the config, together with
    the time of the later change in nanoseconds; `None` where they are not to be had.
    """
    if not _is_text(_key(adapter)):
        return None
    weights = [adapter]
    if adapter.is_dir():
        # Of weights in two formats the same is taken as by whoever opens the adapter.
        weights = [adapter / name for name in USUAL_WEIGHTS]
        if (index := adapter / f"{WEIGHTS}.index.json").exists():
            weights += [index, *sorted(adapter.glob("adapter_model-*-of-*.safetensors"))]
    parts = []
    newest = 0
    for file in [*weights, (adapter if adapter.is_dir() else adapter.parent) / CONFIG]:
        try:
            status = file.stat()
        except OSError:
            parts.append("")
            continue
        parts.append(f"{status.st_size}:{status.st_mtime_ns}:{status.st_ino}")
        newest = max(newest, status.st_mtime_ns)
    return (" ".join(parts), newest) if newest else None


class Cache:
    """The results of earlier scans at one level of metrics. Whatever it cannot do is a warning."""

    def __init__(self, path: Path, metrics: Metrics) -> None:
        self._path = path
        self._metrics = metrics
        self._waiting: list[tuple[str, str, str, str, bytes, bytes]] = []
        self._due = time.monotonic() + INTERVAL
        self._warned = False
        self._connection: sqlite3.Connection | None = None
        self._connect()

    def known(self, adapter: Path, stamp: str) -> Known | None:
        """What was found in an adapter when it had that stamp."""
        query = (
            "SELECT details, cells FROM found "
            "WHERE path = ? AND metrics = ? AND stamp = ? AND version = ?"
        )
        key = (_key(adapter), self._metrics, stamp, _version())
        found = self._try(lambda connection: connection.execute(query, key).fetchone(), None)
        if found is None:
            return None
        # What is damaged is read anew, and what is found then takes its place.
        with gate(lambda _: None):
            return _decode(self._metrics, found)
        return None

    def keep(
        self,
        adapter: Path,
        stamp: str,
        found: _core.ScannedAdapter,
        findings: list[tuple[Finding, int]],
    ) -> None:
        """Remembers what was found; it is written soon, and at the latest by `flush`."""
        key = (_key(adapter), self._metrics, stamp, _version())
        self._waiting.append((*key, *_encode(found, findings)))
        if time.monotonic() > self._due:
            self.flush(last=False)

    def forget_missing(self, directories: Iterable[Path]) -> None:
        """Removes what lay below these directories and is not there any more."""
        for directory in directories:
            below = _key(directory).rstrip(os.sep)
            if _is_text(below):
                self._try(partial(_forget, below), None)

    def flush(self, *, last: bool = True) -> None:
        """Writes what has not been written, all of it or nothing.

        Args:
            last: there is no later time to try, so that what cannot be written is a warning.
        """
        command = "INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?, ?, ?)"

        def write(connection: sqlite3.Connection) -> bool:
            with connection:
                connection.executemany(command, self._waiting)
            return True

        if not self._waiting:
            return
        if last and self._connection is None:
            # Whoever held it may have let it go.
            self._connect()
        if self._try(write, False, quiet=not last):
            self._waiting.clear()
            self._due = time.monotonic() + INTERVAL
            return
        self._due = time.monotonic() + PAUSE
        del self._waiting[:-MAX_WAITING]

    def close(self) -> None:
        """Gives the database up."""
        if self._connection is not None:
            with suppress(sqlite3.Error):
                self._connection.close()
            self._connection = None

    def _connect(self) -> None:
        try:
            found = paths.find(self._path)
            if found is not None and not stat.S_ISREG(found.st_mode):
                raise OSError(f"it is {paths.kind(found)}")
            self._connection = _opened(self._path)
        except OSError as error:
            self._warn(error)
        except sqlite3.Error as error:
            if _is_spoilt(error):
                self._set_aside(error)
            else:
                self._warn(error)

    def _try(
        self, work: Callable[[sqlite3.Connection], T], otherwise: T, *, quiet: bool = False
    ) -> T:
        """What `work` returns; `otherwise` where the database does not do it.

        Args:
            work: what to do.
            otherwise: what to return then.
            quiet: do not tell, since it is tried again.
        """
        for _ in range(2):
            if self._connection is None:
                return otherwise
            try:
                return work(self._connection)
            except sqlite3.Error as error:
                if _is_spoilt(error):
                    # Once more, with a new one.
                    self._set_aside(error)
                    continue
                if not quiet:
                    self._warn(error)
                    # Waiting for each of thousands of adapters would take longer than the scan.
                    self.close()
                return otherwise
        return otherwise

    def _set_aside(self, error: sqlite3.Error) -> None:
        """Renames a database that is none, so that nothing of it is lost, and begins a new one."""
        self.close()
        aside = _free_name(self._path)
        try:
            for ending in ("", "-journal", "-wal", "-shm"):
                with suppress(FileNotFoundError):
                    Path(f"{self._path}{ending}").replace(f"{aside}{ending}")
            self._connection = _opened(self._path)
        except (OSError, sqlite3.Error) as failed:
            self._warn(failed)
            return
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"{self._path}: the cache was damaged ({error}); it was set aside as {aside.name}, "
                "and a new one takes its place",
                stacklevel=2,
            )

    def _warn(self, error: Exception) -> None:
        if self._warned:
            return
        self._warned = True
        warnings.warn(
            f"{self._path}: the cache cannot be used ({error}); what is not in it is read, and "
            "what is found may not be kept",
            stacklevel=2,
        )


@contextmanager
def opened(directory: str | os.PathLike[str], metrics: Metrics) -> Iterator[Cache]:
    """A cache in a directory, which is made; what was found is written even if the scan fails.

    Raises:
        OSError: the directory cannot be made.
    """
    path = Path(expand(directory)) / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    cache = Cache(path, metrics)
    with closing(cache):
        try:
            yield cache
        finally:
            cache.flush()


def _opened(path: Path) -> sqlite3.Connection:
    """The database, with its table.

    Raises:
        sqlite3.Error: it cannot be used.
    """
    connection = sqlite3.connect(path, timeout=PATIENCE)
    try:
        # A path that is no UTF-8 any more is one that is not there.
        connection.text_factory = lambda data: data.decode(errors="surrogateescape")
        connection.execute(
            "CREATE TABLE IF NOT EXISTS found (path TEXT, metrics TEXT, stamp TEXT, "
            "version TEXT, details BLOB, cells BLOB, "
            "PRIMARY KEY (path, metrics)) WITHOUT ROWID"
        )
        # Of an earlier version.
        connection.execute("DROP TABLE IF EXISTS scanned")
        # Whether it has these columns, if it was there.
        connection.execute(
            "SELECT path, metrics, stamp, version, details, cells FROM found LIMIT 0"
        )
    except BaseException:
        connection.close()
        raise
    return connection


def _is_spoilt(error: sqlite3.Error) -> bool:
    code: int | None = getattr(error, "sqlite_errorcode", None)
    return code is not None and code & 0xFF in SPOILT


def _free_name(path: Path) -> Path:
    """A name beside the database that nothing has."""
    number = 1
    while os.path.lexists(aside := path.with_name(f"{path.name}.damaged-{number}")):
        number += 1
    return aside


def _forget(below: str, connection: sqlite3.Connection) -> None:
    # A range of the key; any other condition would read the whole table.
    query = "SELECT DISTINCT path FROM found WHERE path > ? AND path < ?"
    ends = (below + os.sep, below + chr(ord(os.sep) + 1))
    known = connection.execute(query, ends)
    missing = [(path,) for (path,) in known if _is_text(path) and _is_gone(path)]
    if missing:
        with connection:
            connection.executemany("DELETE FROM found WHERE path = ?", missing)


def _key(adapter: Path) -> str:
    return os.fspath(resolved(adapter))


def _is_text(path: object) -> bool:
    """Whether the database, which holds UTF-8, can hold a path."""
    if not isinstance(path, str):
        return False
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_gone(path: str) -> bool:
    """Whether nothing is there; what only cannot be looked at is not gone."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return True
    except OSError:
        return False
    return False


def _version() -> str:
    from lorafast._core import __version__

    return f"{SCHEMA_VERSION}.{LAYOUT} {__version__}"


def _encode(
    found: _core.ScannedAdapter, findings: list[tuple[Finding, int]]
) -> tuple[bytes, bytes]:
    details, cells = found.encode()
    told = json.dumps([[asdict(finding), count] for finding, count in findings])
    packed = zlib.compress(f"{details}\n{told}".encode(), 1)
    return packed, _digest(packed, cells) + cells


def _digest(details: bytes, cells: bytes) -> bytes:
    """What tells a row that was written from one that has been damaged since."""
    made = blake2b(digest_size=DIGEST)
    made.update(details)
    made.update(cells)
    return made.digest()


def _decode(metrics: Metrics, found: tuple[Any, Any]) -> Known:
    """What was found in an adapter, from its row.

    Raises:
        Exception: of any kind: it is damaged.
    """
    packed, marked = found
    if not isinstance(packed, bytes) or not isinstance(marked, bytes):
        raise TypeError("a row holds something other than bytes")
    cells = marked[DIGEST:]
    if _digest(packed, cells) != marked[:DIGEST]:
        raise ValueError("a row has been changed")
    details, _, told = zlib.decompressobj().decompress(packed, LARGEST).decode().partition("\n")
    findings = [(Finding(**finding), int(count)) for finding, count in json.loads(told)]
    if not all(_is_sound(finding, count) for finding, count in findings):
        raise ValueError("a row is no scan's")
    return _core.ScannedAdapter.decode(metrics, details, cells), findings


def _is_sound(finding: Finding, count: int) -> bool:
    """Whether a finding is one that a scan makes."""
    return (
        finding.severity in SEVERITIES
        and finding.kind in KINDS
        and isinstance(finding.module, str | None)
        and isinstance(finding.value, float | int | None)
        and isinstance(finding.reason, str)
        and 0 <= count < 1 << 62
    )
