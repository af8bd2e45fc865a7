"""Cells of Markdown and CSV: names from strangers' files break no table and start no formula."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from lorafast._report.text import format_number
from lorafast._weights import weight_text

if TYPE_CHECKING:
    from lorafast._types import Weight

#: Longer cells are cut: names come from strangers' files.
LONGEST_CELL = 120
LONGEST_REASON = 400
#: With one of these first, a spreadsheet takes a text for a formula.
FORMULA = ("=", "+", "-", "@", "\t", "\r")


def _printable(text: str) -> str:
    """The text with blanks in place of what would be obeyed rather than shown."""
    if not text.isprintable():
        text = "".join(c if c.isprintable() else " " for c in text)
    return text.strip()


def cell(text: object, longest: int = LONGEST_CELL) -> str:
    """A text as one table cell that can break neither the table nor the page."""
    clean = _printable(str(text))
    if len(clean) > longest:
        clean = clean[: longest - 1] + "…"
    for character in "\\|`*_<>[]":
        clean = clean.replace(character, "\\" + character)
    return clean


def code(text: object, longest: int = LONGEST_CELL) -> str:
    """A name as code."""
    clean = _printable(str(text))
    if len(clean) > longest:
        clean = "…" + clean[1 - longest :]
    # A backslash in code cannot be escaped, and would take away the one before a bar.
    return "`" + clean.replace("`", "'").replace("\\|", "\\ |").replace("|", "\\|") + "`"


def weight_cell(weight: Weight) -> str:
    """An adapter's weight: a number, or patterns of module names with theirs."""
    return weight_text(weight, lambda number: format_number(number, 6), code)


def table(
    headers: Sequence[str], rows: Iterable[Sequence[str]], *, right: bool = True
) -> list[str]:
    """A table of cells that `cell` or `code` made.

    Args:
        headers: a word for each column.
        rows: their cells.
        right: whether every column but the first is set to the right.
    """
    other = "---:" if right else "---"
    return [
        f"| {' | '.join(headers)} |",
        "|" + "|".join(["---", *[other] * (len(headers) - 1)]) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
    ]


def csv_text(text: str) -> str:
    """A text as a cell of a CSV file, which a spreadsheet shows rather than computes."""
    return f"'{text}" if text.startswith(FORMULA) else text
