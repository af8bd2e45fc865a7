"""Temporary directories that do not outlive a crash's next run.

Each is named `lorafast-MACHINE-…`, lies in the system's temporary directory, and holds a file that
is locked for as long as it is in use. The system drops the lock of a process that is killed, so
whoever makes the next one can tell what was left behind, and removes it.
"""

from __future__ import annotations

import os
import stat
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

try:
    import fcntl
except ImportError:  # Windows, where nothing is swept.
    # It is a module elsewhere.
    fcntl = None  # type: ignore[assignment]

#: With the machine's name, for others that share the directory may not see its locks.
PREFIX = f"lorafast-{os.uname().nodename if hasattr(os, 'uname') else ''}-"
LOCK = ".lorafast-lock"


class Scratch:
    """A temporary directory.

    Attributes:
        path: where it is.
    """

    def __init__(self) -> None:
        """Makes it, after removing what crashed runs of this user have left.

        Raises:
            OSError: it cannot be made.
        """
        sweep()
        self.path = Path(tempfile.mkdtemp(prefix=PREFIX))
        self._owner = os.getpid()
        self._lock = _locked(self.path)

    def remove(self) -> None:
        """Removes it with all that is in it, once; what cannot be removed stays.

        A process that was forked meanwhile leaves it to its parent.
        """
        if self._owner != os.getpid():
            return
        self._owner = -1
        _remove(self.path)
        if self._lock is not None:
            os.close(self._lock)


@contextmanager
def directory() -> Iterator[Path]:
    """A temporary directory for the length of a block.

    Raises:
        OSError: it cannot be made.
    """
    own = Scratch()
    try:
        yield own.path
    finally:
        own.remove()


def sweep() -> None:
    """Removes this user's directories whose lock nobody holds."""
    if fcntl is None:
        return
    with suppress(OSError), os.scandir(tempfile.gettempdir()) as listing:
        for entry in listing:
            if entry.name.startswith(PREFIX):
                with suppress(OSError):
                    _remove_if_left(Path(entry.path))


def _locked(folder: Path) -> int | None:
    """A locked file in a new directory; `None` where there are no locks."""
    if fcntl is None:
        return None
    # Locked before it has its name, so that nobody finds it free.
    fresh = folder / f"{LOCK}-new"
    flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW
    descriptor = os.open(fresh, flags, 0o600)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        fresh.rename(folder / LOCK)
    except OSError:
        # A file system without locks: what a crash leaves there stays.
        os.close(descriptor)
        return None
    return descriptor


def _remove_if_left(path: Path) -> None:
    """Removes a directory if it is this user's and the process that made it is gone.

    Raises:
        OSError: it is none, somebody else's, or in use.
    """
    assert fcntl is not None
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        if os.fstat(folder).st_uid != os.geteuid():
            return
        # What has no lock is another version's, or another program's.
        flags = os.O_RDWR | os.O_NOFOLLOW | os.O_NONBLOCK
        lock = os.open(LOCK, flags, dir_fd=folder)
    finally:
        os.close(folder)
    try:
        found = os.fstat(lock)
        if not stat.S_ISREG(found.st_mode) or found.st_uid != os.geteuid():
            return
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        _remove(path)
    finally:
        os.close(lock)


def _remove(path: Path) -> None:
    import shutil

    # It follows no links, neither at the path nor below it.
    shutil.rmtree(path, ignore_errors=True)
