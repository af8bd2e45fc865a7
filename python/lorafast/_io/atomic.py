"""Small files that are written whole or not at all."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


@contextmanager
def writing(path: str | os.PathLike[str], *, sync: bool = False) -> Iterator[BinaryIO]:
    """A new file that takes the place of `path` when the block ends, and is gone if it fails.

    It is made beside its place under a name that nobody can know, never through a link, with the
    mode that the process's umask gives. A link at `path` is replaced, not followed.

    Args:
        path: where the file is to be; its directory must exist.
        sync: wait until the content has reached the disk, so that a loss of power leaves the old
            file or the new one.

    Yields:
        The file, open for writing and reading.

    Raises:
        OSError: it cannot be written; the error names `path`.
    """
    target = Path(path)
    # Not made of the target's name, which may be as long as names can be.
    temporary = target.with_name(f".lorafast-{os.urandom(8).hex()}.part")
    with _about(target, temporary):
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL
        flags |= getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        # Made within: a signal's exception can come as soon as it is there.
        try:
            with os.fdopen(os.open(temporary, flags, 0o666), "w+b") as file:
                yield file
                file.flush()
                if sync:
                    os.fsync(file.fileno())
            temporary.replace(target)
        except BaseException:
            with suppress(OSError):
                temporary.unlink()
            raise


def write(path: str | os.PathLike[str], content: str | bytes, *, sync: bool = False) -> Path:
    """Writes a file whole or not at all.

    Args:
        path: where to; its directory must exist.
        content: bytes, or a text that becomes UTF-8. Bytes of files' names that are none
            are written as escapes.
        sync: as for `writing`.

    Returns:
        The path.

    Raises:
        OSError: it cannot be written.
    """
    data = content.encode(errors="backslashreplace") if isinstance(content, str) else content
    with writing(path, sync=sync) as file:
        file.write(data)
    return Path(path)


@contextmanager
def _about(target: Path, temporary: Path) -> Iterator[None]:
    """Makes errors of the temporary file, or of none, errors of the file that was asked for."""
    try:
        yield
    except OSError as error:
        if error.errno is None or error.filename not in {None, os.fspath(temporary), temporary}:
            raise
        raise OSError(error.errno, error.strerror, os.fspath(target)) from error
