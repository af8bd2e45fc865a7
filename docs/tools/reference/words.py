"""What the pages have in common: tables, sentences, and the line that says how they are made."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Sequence

GENERATED = "<!-- Generated: `make reference` writes this file from the code. -->"

#: A bar that would end a cell, and what stands for it.
BAR, PIPE = re.compile(r"(?<!\\)\|"), r"\\|"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> Iterator[str]:
    """The lines of a table in Markdown; cells are Markdown already."""
    yield f"| {' | '.join(columns)} |"
    yield "|" + "---|" * len(columns)
    for row in rows:
        yield f"| {' | '.join(BAR.sub(PIPE, cell) for cell in row)} |"


def sentence(text: str) -> str:
    """A phrase as a sentence: a capital, and a full stop."""
    # A value that is explained stays as it is typed.
    is_value = text.partition(" ")[0].endswith(":")
    first = text if is_value else text[:1].upper() + text[1:]
    return first if first.endswith((".", "!", "?")) or not first else f"{first}."
