"""Errors as lines on stderr, and work on several inputs of which some are broken."""

from __future__ import annotations

import contextlib
import os
import sys
from typing import TYPE_CHECKING

from lorafast._cli.terminal import printable, shortened

if TYPE_CHECKING:
    from collections.abc import Iterator

# A wrong base gives a problem for each module; the first ones tell it.
MAX_PROBLEMS = 3


def print_error(error: Exception, *, as_json: bool = False) -> None:
    """Print `error: …` on stderr; and on stdout, as JSON, what whoever asked for JSON can read."""
    print("error:", printable(sentence(error)), file=sys.stderr)
    for note in getattr(error, "__notes__", ()):
        print("note:", printable(note), file=sys.stderr)
    if as_json:
        import json

        problems: list[str] = getattr(error, "problems", [])
        plain = {"kind": type(error).__name__, "message": str(error), "problems": problems}
        print(json.dumps({"error": plain}, indent=2))


def sentence(error: Exception) -> str:
    """Return what an error says as one line, with the path it is about."""
    if isinstance(error, OSError) and error.strerror and error.filename is not None:
        message = f"{error.strerror}: {os.fsdecode(error.filename)}"
    else:
        message = str(error) or type(error).__name__
    problems: list[str] = getattr(error, "problems", [])
    if len(problems) > 1:
        shown = "; ".join(problems[:MAX_PROBLEMS])
        rest = len(problems) - MAX_PROBLEMS
        message = f"{len(problems)} problems: {shown}" + (f"; and {rest} more" if rest > 0 else "")
    return shortened(message)


class Failures:
    """What could not be done, and why.

    Attributes:
        errors: `path` and `error` of each.
    """

    def __init__(self) -> None:
        self.errors: list[dict[str, str]] = []

    @contextlib.contextmanager
    def of(self, path: str, *, fatal: bool) -> Iterator[None]:
        """Print an error about one input and take note of it; with `fatal` it is raised as ever.

        An argument that is wrong is wrong for all inputs, so a ValueError is always raised.
        """
        import lorafast

        try:
            yield
        except (lorafast.LorafastError, OSError, RecursionError, UnicodeError) as error:
            if fatal or isinstance(error, BrokenPipeError):
                raise
            print_error(error)
            self.errors.append({"path": path, "error": sentence(error)})


def exit_code(failures: Failures, otherwise: int) -> int:
    """Return 1 if anything could not be done: half an answer must not pass for a whole one."""
    return 1 if failures.errors else otherwise
