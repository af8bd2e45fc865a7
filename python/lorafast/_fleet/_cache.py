"""What earlier scans found, so that only what has changed is read again.

A cache is a directory with one SQLite database. Its transactions make a scan that is killed leave
what it had found by then and nothing half-written, and let several scans share a directory.
"""

from __future__ import annotations

import json
import os
import sqlite3
import time
import zlib
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict
from pathlib import Path

from lorafast._errors import LorafastError
from lorafast._fleet._assemble import SCHEMA_VERSION, Entry
from lorafast._fleet._paths import CONFIG
from lorafast._records import Finding
from lorafast._sources import PICKLED_WEIGHTS, WEIGHTS

FILE = "lorafast-scan.sqlite"
#: A file that changed within this time before it was read may change again without its time of
#: change being another one; what is found in it is not kept. In nanoseconds.
SETTLED = 2_000_000_000
#: Seconds between two writes: what a killed scan may have to read again.
INTERVAL = 0.5
#: Seconds to wait for another scan that writes to the same cache.
PATIENCE = 30.0


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
        weights = [adapter / name for name in (WEIGHTS, PICKLED_WEIGHTS)]
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
    """The results of earlier scans at one level of metrics."""

    def __init__(self, connection: sqlite3.Connection, path: Path, metrics: str) -> None:
        self._connection = connection
        self._path = path
        self._metrics = metrics
        self._waiting: list[tuple[str, str, str, str, bytes, bytes]] = []
        self._written = time.monotonic()

    def known(self, adapter: Path, stamp: str) -> Entry | None:
        """What was found in an adapter when it had that stamp."""
        query = (
            "SELECT details, cells FROM found "
            "WHERE path = ? AND metrics = ? AND stamp = ? AND version = ?"
        )
        key = (_key(adapter), self._metrics, stamp, _version())
        found = self._connection.execute(query, key).fetchone()
        return None if found is None else _decode(found)

    def keep(self, adapter: Path, stamp: str, entry: Entry) -> None:
        """Remembers what was found; it is written soon, and at the latest by `flush`."""
        key = (_key(adapter), self._metrics, stamp, _version())
        self._waiting.append((*key, *_encode(entry)))
        if time.monotonic() - self._written > INTERVAL:
            self.flush()

    def forget_missing(self, directories: Iterable[Path]) -> None:
        """Removes what lay below these directories and is not there any more."""
        for directory in directories:
            below = _key(directory).rstrip(os.sep)
            if not _is_text(below):
                continue
            # A range of the key; any other condition would read the whole table.
            query = "SELECT DISTINCT path FROM found WHERE path > ? AND path < ?"
            ends = (below + os.sep, below + chr(ord(os.sep) + 1))
            known = self._connection.execute(query, ends)
            missing = [(path,) for (path,) in known if _is_gone(path)]
            if missing:
                with self._connection:
                    self._connection.executemany("DELETE FROM found WHERE path = ?", missing)

    def flush(self) -> None:
        """Writes what has not been written, all of it or nothing."""
        command = "INSERT OR REPLACE INTO found VALUES (?, ?, ?, ?, ?, ?)"
        with self._connection:
            self._connection.executemany(command, self._waiting)
        self._waiting.clear()
        self._written = time.monotonic()


@contextmanager
def opened(directory: str | os.PathLike[str], metrics: str) -> Iterator[Cache]:
    """A cache in a directory, which is made; what was found is written even if the scan fails.

    Raises:
        LorafastError: its file is damaged or none of lorafast's.
        OSError: the directory cannot be made.
    """
    path = Path(directory).expanduser() / FILE
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        with closing(sqlite3.connect(path, timeout=PATIENCE)) as connection:
            connection.execute(
                "CREATE TABLE IF NOT EXISTS found (path TEXT, metrics TEXT, stamp TEXT, "
                "version TEXT, details BLOB, cells BLOB, "
                "PRIMARY KEY (path, metrics)) WITHOUT ROWID"
            )
            # Of an earlier version.
            connection.execute("DROP TABLE IF EXISTS scanned")
            cache = Cache(connection, path, metrics)
            try:
                yield cache
            finally:
                cache.flush()
    except sqlite3.Error as error:
        raise LorafastError(
            f"{path}: the cache cannot be used ({error}); name another directory or remove the file"
        ) from error


def _key(adapter: Path) -> str:
    return os.fspath(adapter.resolve())


def _is_text(path: str) -> bool:
    """Whether the database, which holds UTF-8, can hold a path."""
    try:
        path.encode()
    except UnicodeEncodeError:
        return False
    return True


def _is_gone(path: str) -> bool:
    """Whether nothing is there; what only cannot be looked at is not gone."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return True
    except OSError:
        return False
    return False


def _version() -> str:
    from lorafast._core import __version__

    return f"{SCHEMA_VERSION} {__version__}"


def _encode(entry: Entry) -> tuple[bytes, bytes]:
    details = {
        "texts": entry.texts,
        "findings": [[asdict(finding), count] for finding, count in entry.findings],
        "paths": entry.paths,
        "kinds": entry.kinds,
    }
    return zlib.compress(json.dumps(details).encode(), 1), entry.cells


def _decode(found: tuple[bytes, bytes]) -> Entry:
    details, cells = found
    plain = json.loads(zlib.decompress(details))
    return Entry(
        texts=tuple(plain["texts"]),
        findings=tuple((Finding(**finding), count) for finding, count in plain["findings"]),
        paths=tuple(plain["paths"]),
        kinds=tuple(plain["kinds"]),
        cells=cells,
    )
