"""Errors about strangers' files, of whatever these make Python's own readers raise."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from lorafast import _core
from lorafast._errors import CheckpointError, LorafastError, raise_interruption
from lorafast._io.paths import StrPath, open_plain

#: More than any header; a file that says more is no safetensors file.
LARGEST_HEADER = 100 << 20


def parse_json(
    text: str | bytes, path: StrPath, error: type[LorafastError] = CheckpointError
) -> Any:
    """What a stranger's JSON says.

    Args:
        text: the JSON.
        path: where it stands, for the error.
        error: the class of the error.

    Raises:
        LorafastError: it is no JSON, or nested too deeply; of the class `error`.
    """
    try:
        return json.loads(text)
    except RecursionError as raised:
        raise error(f"{os.fspath(path)}: its JSON is nested too deeply to be read") from raised
    except ValueError as raised:
        raise error(f"{os.fspath(path)}: cannot be read as JSON: {raised}") from raised


def read_json(path: StrPath, error: type[LorafastError] = CheckpointError) -> Any:
    """What a stranger's JSON file says.

    Raises:
        LorafastError: it is no JSON, or no plain file.
        OSError: it is not there, or cannot be read.
    """
    with open_plain(path, error) as file:
        return parse_json(file.read(), path, error)


def read_header(path: StrPath, error: type[LorafastError] = CheckpointError) -> dict[str, Any]:
    """The header of a safetensors file: the entry of each tensor, and `__metadata__`.

    Raises:
        LorafastError: it is no safetensors file, or no plain file.
        OSError: it is not there, or cannot be read.
    """
    with open_plain(path, error) as file:
        length = int.from_bytes(file.read(8), "little")
        size = os.fstat(file.fileno()).st_size
        if not 2 <= length <= min(LARGEST_HEADER, size - 8):
            found = _core.identify_path(path)
            raise error(f"{os.fspath(path)}: {found or 'is no safetensors file: it has no header'}")
        header = parse_json(file.read(length), path, error)
    if not isinstance(header, dict):
        raise error(f"{os.fspath(path)}: is no safetensors file: its header is no JSON object")
    return header


def reason_of(error: BaseException) -> str:
    """What went wrong with one path, without naming it again."""
    if isinstance(error, OSError) and error.strerror:
        return error.strerror
    if isinstance(error, RecursionError):
        return "it is nested too deeply to be read"
    if isinstance(error, LorafastError | OSError | ValueError):
        return str(error) or type(error).__name__
    # Of other classes the message alone says little: KeyError's is a name.
    return f"{type(error).__name__}: {error}" if str(error) else type(error).__name__


@contextmanager
def gate(fail: Callable[[Exception], object]) -> Iterator[None]:
    """Gives whatever one adapter, or one row of a cache, makes the block raise to `fail`.

    The others go on. Running out of memory is no adapter's error.
    """
    try:
        yield
    except MemoryError:
        raise
    except Exception as error:
        raise_interruption(error)
        fail(error)
