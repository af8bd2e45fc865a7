"""Streams of a command: what it prints, and what that looks like.

On a terminal tables are drawn by rich. Elsewhere they are plain aligned text, whole and unfolded
whatever the width, which `grep` and a log can use and for which rich need not be imported.
"""

from __future__ import annotations

import contextlib
import sys
import warnings
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping, Sequence

    from rich.console import Console


#: Characters of a word, such as a path, and of a message, beyond which it is cut.
LONGEST_WORD = 1_000
LONGEST_MESSAGE = 4_000


class Column(NamedTuple):
    """A table's column: its header, and whether its cells are numbers (set to the right)."""

    header: str
    number: bool = False


def printable(text: str) -> str:
    """Escape what a terminal would obey rather than show: names come from files of strangers."""
    if text.isprintable():
        return text
    return "".join(
        character if character.isprintable() else character.encode("unicode_escape").decode()
        for character in text
    )


def shortened(text: str) -> str:
    """A message on one line, in which nothing is longer than a person reads.

    A name in a stranger's file may have megabytes; its two ends tell what it is.
    """
    words = text.split()
    return _cut(" ".join(_cut(word, LONGEST_WORD) for word in words), LONGEST_MESSAGE)


def _cut(text: str, longest: int) -> str:
    if len(text) <= longest:
        return text
    return f"{text[: longest // 2]}…{text[-longest // 4 :]}"


class Terminal:
    """The command's two streams."""

    def __init__(self, *, quiet: bool = False) -> None:
        self.quiet = quiet
        self._warned: set[str] = set()

    def line(self, text: str = "") -> None:
        """Print a line of the result, unless --quiet."""
        if not self.quiet:
            print(printable(text))

    def heading(self, text: str) -> None:
        """Print the title of what follows, unless --quiet."""
        if self.quiet:
            return
        if sys.stdout.isatty():
            _console().print(printable(text), style="bold", markup=False, soft_wrap=True)
        else:
            print(printable(text))

    def json(self, value: Any) -> None:
        """Print a value as strict JSON: the whole of stdout, --quiet or not."""
        from lorafast._io.plain import json_text

        print(json_text(value))

    def document(self, text: str) -> None:
        """Print a whole report, which is made to be safe to print: --quiet or not."""
        print(text.rstrip("\n"))

    def problem(self, text: str) -> None:
        """Print a line of a verdict that must be seen, --quiet or not."""
        print(printable(text))

    def warn(self, message: str) -> None:
        """Print `warning: …` on stderr, once for each message."""
        if message not in self._warned:
            self._warned.add(message)
            print("warning:", printable(shortened(message)), file=sys.stderr)

    @contextlib.contextmanager
    def python_warnings_as_lines(self) -> Iterator[None]:
        """Show what goes through Python's `warnings` as `warning: …`, without file and line."""
        with warnings.catch_warnings():
            warnings.showwarning = lambda message, *_, **__: self.warn(str(message))
            yield

    def facts(self, rows: Mapping[str, str]) -> None:
        """Print names and values, a pair to a line."""
        self.table((Column(""), Column("")), list(rows.items()))

    def table(self, columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
        """Print a table, unless --quiet."""
        if self.quiet:
            return
        cells = [[printable(cell) for cell in row] for row in rows]
        if sys.stdout.isatty():
            _rich_table(columns, cells)
        else:
            _plain_table(columns, cells)


def _console() -> Console:
    from rich.console import Console

    # The stream of this moment: sys.stdout may have been replaced.
    return Console(file=sys.stdout, highlight=False)


def _rich_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    from rich import box
    from rich.table import Table
    from rich.text import Text

    has_header = any(column.header for column in columns)
    table = Table(
        box=box.SIMPLE_HEAD if has_header else None,
        show_header=has_header,
        show_edge=False,
        # Two blanks between columns, either way: a box adds one of its own.
        padding=(0, 1 if has_header else 2, 0, 0),
        header_style="dim",
    )
    for index, column in enumerate(columns):
        table.add_column(
            column.header,
            justify="right" if column.number else "left",
            no_wrap=column.number,
            style="cyan" if index == 0 and not has_header else None,
            overflow="fold",
        )
    for row in rows:
        # Text, not str: a name with brackets is no markup.
        table.add_row(*map(Text, row))
    _console().print(table)


def _plain_table(columns: Sequence[Column], rows: Sequence[Sequence[str]]) -> None:
    headers = [column.header for column in columns]
    lines = [headers, *rows] if any(headers) else list(rows)
    widths = [max((len(line[index]) for line in lines), default=0) for index in range(len(columns))]
    for line in lines:
        cells = (
            cell.rjust(width) if column.number else cell.ljust(width)
            for cell, width, column in zip(line, widths, columns, strict=True)
        )
        print("  " + "  ".join(cells).rstrip())
