"""Names of tensors, with the numbers of their layers collapsed.

`model.layers.0.mlp.up_proj.weight` to `model.layers.31.mlp.up_proj.weight` are one line,
`model.layers.{0-31}.mlp.up_proj.weight`. A pattern stands for exactly the names that went into it:
where layers 3 and 7 differ, it says so (`{0-2,4-6,8-31}`).
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

# A whole number between separators (`layers.3.`, `blocks_3_`), not part of a word (`fc1`, `q4`).
_NUMBER = re.compile(r"(?<![0-9A-Za-z])([0-9]+)(?![0-9A-Za-z])")

Numbers = tuple[int, ...]


def collapse(names: Iterable[str]) -> list[tuple[str, int]]:
    """Return (pattern, number of names) in the order in which the names first appear."""
    families: dict[tuple[tuple[str, ...], tuple[int, ...]], set[Numbers]] = {}
    for name in names:
        # split() alternates: text, number, text, number, …, text.
        parts = _NUMBER.split(name)
        texts, digits = tuple(parts[::2]), parts[1::2]
        # 007 has a width to keep, 7 has none.
        widths = tuple(len(text) if text[0] == "0" and len(text) > 1 else 1 for text in digits)
        families.setdefault((texts, widths), set()).add(tuple(map(int, digits)))
    patterns = []
    for (texts, widths), members in families.items():
        for ranges, count in _boxes(members):
            pattern = texts[0] + "".join(
                f"{_range_text(values, width)}{text}"
                for values, width, text in zip(ranges, widths, texts[1:], strict=True)
            )
            patterns.append((pattern, count))
    return patterns


def _boxes(members: set[Numbers]) -> list[tuple[list[list[int]], int]]:
    """Cut a set of number tuples into products of sets, one set for each position."""
    if members == {()}:
        return [([], 1)]
    tails: dict[int, set[Numbers]] = {}
    for first, *rest in members:
        tails.setdefault(first, set()).add(tuple(rest))
    firsts: dict[frozenset[Numbers], list[int]] = {}
    for first in sorted(tails):
        firsts.setdefault(frozenset(tails[first]), []).append(first)
    return [
        ([values, *ranges], len(values) * count)
        for tail, values in firsts.items()
        for ranges, count in _boxes(set(tail))
    ]


def _range_text(values: list[int], width: int) -> str:
    """Return `{0-2,5}` for [0, 1, 2, 5], and a lone number as it is."""
    runs: list[list[int]] = []
    for value in values:
        if runs and value == runs[-1][-1] + 1:
            runs[-1].append(value)
        else:
            runs.append([value])
    texts = []
    for run in runs:
        ends = [run[0]] if len(run) == 1 else [run[0], run[-1]]
        # Two neighbours are a list, three a range.
        texts.append((",", "-")[len(run) > 2].join(f"{end:0{width}}" for end in ends))
    return texts[0] if len(values) == 1 else "{" + ",".join(texts) + "}"
