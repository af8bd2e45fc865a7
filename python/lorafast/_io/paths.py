"""Paths and what they lead to: an error is never taken for an absence, and no pipe is opened.

As `file.rs` of the core does it, for what Python looks at by itself.
"""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import BinaryIO

from lorafast._errors import CheckpointError, LorafastError

StrPath = str | os.PathLike[str]


def expand(path: StrPath) -> str:
    """The path with the home directory in place of a leading `~`, otherwise as it was given.

    A `~name` of nobody's stays what it is, as in a shell.
    """
    return os.path.expanduser(os.fspath(path))  # noqa: PTH111 (Path's raises where there is no home)


def output_path(path: StrPath) -> str:
    """The same of what is written, which is no URL here.

    Raises:
        ValueError: it is the URL of a store.
    """
    from lorafast._io.stores import is_url, path_of_file_url, without_user

    if is_url(path):
        raise ValueError(
            f"{without_user(str(path))}: only merge writes to object stores; give a directory, and "
            "upload it"
        )
    return expand(path_of_file_url(path) if isinstance(path, str) else path)


def absolute(path: str) -> str:
    """The path from the root, for processes that are somewhere else; of a URL, what it is."""
    return path if "://" in path else os.path.abspath(path)  # noqa: PTH100 (links stay)


def find(path: StrPath) -> os.stat_result | None:
    """What a path leads to; `None` only where nothing has that name.

    Args:
        path: the path; links are followed.

    Returns:
        What `os.stat` says of it.

    Raises:
        FileNotFoundError: it is a link that leads nowhere.
        OSError: it may not be looked at.
    """
    # Of thousands of texts; a Path for each would take longer than the question.
    try:
        own = os.lstat(path)
    except (FileNotFoundError, NotADirectoryError, ValueError):
        # ValueError: nothing can have that name, as one with a zero byte in it.
        return None
    if not stat.S_ISLNK(own.st_mode):
        return own
    try:
        return os.stat(path)  # noqa: PTH116 (a text, as said above)
    except FileNotFoundError as error:
        try:
            target = os.readlink(path)  # noqa: PTH115 (a text, as said above)
        except OSError:
            # Removed meanwhile.
            return None
        raise FileNotFoundError(
            error.errno,
            f"A link to {target}, which is not there; fetch it again",
            os.fspath(path),
        ) from error


def is_file(path: StrPath) -> bool:
    """Whether a path leads to a plain file.

    Raises:
        OSError: as for `find`.
    """
    found = find(path)
    return found is not None and stat.S_ISREG(found.st_mode)


def is_directory(path: StrPath) -> bool:
    """Whether a path leads to a directory.

    Raises:
        OSError: as for `find`.
    """
    found = find(path)
    return found is not None and stat.S_ISDIR(found.st_mode)


def open_plain(path: StrPath, error: type[LorafastError] = CheckpointError) -> BinaryIO:
    """Opens a plain file for reading, links followed.

    A pipe, a socket or a device would make the reader wait or do something, so what is there is
    looked at before it is opened and after.

    Args:
        path: the file.
        error: the class of the error for what is no plain file.

    Raises:
        LorafastError: it is something else; of the class `error`.
        OSError: it is not there, or may not be read.
    """
    found = find(path)
    if found is not None:
        _require_plain(path, found, error)
    # A pipe that has come meanwhile does not wait for its writer. Plain files do not care.
    flags = os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)
    descriptor = os.open(path, flags)
    try:
        _require_plain(path, os.fstat(descriptor), error)
        return os.fdopen(descriptor, "rb")
    except BaseException:
        os.close(descriptor)
        raise


def _require_plain(path: StrPath, found: os.stat_result, error: type[LorafastError]) -> None:
    if not stat.S_ISREG(found.st_mode):
        raise error(f"{os.fspath(path)}: is {kind(found)}; a plain file is needed here")


def kind(found: os.stat_result) -> str:
    """What a path that is no plain file is, in words."""
    mode = found.st_mode
    for is_kind, words in (
        (stat.S_ISREG, "a plain file"),
        (stat.S_ISDIR, "a directory"),
        (stat.S_ISFIFO, "a pipe"),
        (stat.S_ISSOCK, "a socket"),
        (stat.S_ISBLK, "a device"),
        (stat.S_ISCHR, "a device"),
    ):
        if is_kind(mode):
            return words
    return "no plain file"


def resolved(path: StrPath) -> Path:
    """The path without links and dots; as it is where a link leads into itself."""
    given = Path(path)
    try:
        return given.resolve()
    except (OSError, RuntimeError):
        # Before Python 3.13 a loop is a RuntimeError.
        return given.absolute()
