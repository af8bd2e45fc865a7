"""Findings of a fleet as a whole: what stands out among its adapters."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafast._analysis import findings
from lorafast._analysis.records import Finding
from lorafast._fleet.table import NOTHING, Table, Texts

#: ‖ΔW‖ this many times above or below the median of the adapters of its base.
NORM_OUTLIER = 10.0
#: Fewer adapters than this have no meaningful median.
MIN_ADAPTERS_TO_JUDGE = 5
#: Names that a sentence lists.
NAMED = 3

#: The kinds of finding that `analyze` has not, each with what it means in a few words.
KINDS = findings.KINDS | {
    "same_file": "adapters whose weights files are the same",
    "norm_outlier": "the norm is far from that of the other adapters of its base",
    "several_bases": "adapters of several bases",
}


@dataclass(frozen=True, slots=True)
class FleetFinding:
    """Something to look at in one adapter of a fleet.

    Attributes:
        adapter: the adapter's name; `None` for the whole fleet.
        finding: what it is; of several modules' the one with the greatest value.
        count: how many modules of the adapter it is about.
    """

    adapter: str | None
    finding: Finding
    count: int


def of_fleet(adapters: Table) -> Iterator[tuple[int | None, Finding]]:
    """Findings about adapters among others, each with its row, and about the fleet."""
    yield from _norms(adapters)
    yield from _same_files(adapters)
    yield from _bases(adapters)


def listed(names: Sequence[str], count: int | None = None) -> str:
    """The first names, and how many more there are of the count, or of them."""
    count = len(names) if count is None else count
    text = ", ".join(names[:NAMED])
    return f"{text} and {count - NAMED} more" if count > NAMED else text


def _norms(adapters: Table) -> Iterator[tuple[int, Finding]]:
    if "frobenius_norm" not in adapters:
        return
    norms = adapters["frobenius_norm"]
    bases = _texts(adapters, "base").codes
    is_sound = np.isfinite(norms) & (norms > 0)
    _, firsts = np.unique(bases, return_index=True)
    # Bases in the order in which they come.
    for first in np.sort(firsts).tolist():
        here = np.flatnonzero((bases == bases[first]) & is_sound)
        if len(here) < MIN_ADAPTERS_TO_JUDGE:
            continue
        typical = float(np.median(norms[here]))
        ratios = norms[here] / typical
        is_usual = (ratios >= 1 / NORM_OUTLIER) & (ratios <= NORM_OUTLIER)
        for row in here[~is_usual].tolist():
            ratio = float(norms[row]) / typical
            reason = (
                f"‖ΔW‖ = {norms[row]:.4g} is {ratio:.3g} times the median "
                f"({typical:.4g}) of the {len(here)} adapters of its base."
            )
            yield row, Finding("warning", "norm_outlier", None, ratio, reason)


def _same_files(adapters: Table) -> Iterator[tuple[int, Finding]]:
    digests, names = _texts(adapters, "sha256"), _texts(adapters, "name").values
    rows = np.flatnonzero(digests.codes != NOTHING)
    keys = np.fromiter(
        (hash(digests.values[code]) for code in _ints(digests.codes[rows])), np.int64, len(rows)
    )
    order = np.argsort(keys, kind="stable")
    is_next = np.flatnonzero(np.diff(keys[order]) == 0)
    groups: dict[str, list[int]] = {}
    # Of digests with one hash, in the order of the rows, which a stable sort keeps.
    for row in np.unique(rows[order[np.union1d(is_next, is_next + 1)]]).tolist():
        groups.setdefault(digests.values[int(digests.codes[row])], []).append(row)
    for group in groups.values():
        if len(group) > 1:
            others = listed([names[row] for row in group[1 : NAMED + 1]], len(group) - 1)
            reason = f"Its weights file is the same as that of {others}."
            yield group[0], Finding("note", "same_file", None, float(len(group)), reason)


def _bases(adapters: Table) -> Iterator[tuple[None, Finding]]:
    column = _texts(adapters, "base")
    codes, firsts, counts = np.unique(column.codes, return_index=True, return_counts=True)
    if len(codes) < 2:
        return
    # The most common first, of several those that come first.
    order = np.lexsort((firsts, -counts))
    names = [
        "none named" if codes[place] == NOTHING else column.values[int(codes[place])]
        for place in order.tolist()
    ]
    counted = [
        f"{name} ({count:,})" for name, count in zip(names, counts[order].tolist(), strict=True)
    ]
    reason = f"The adapters name {len(codes)} different bases: {listed(counted)}."
    yield None, Finding("note", "several_bases", None, float(len(codes)), reason)


def _texts(table: Table, name: str) -> Texts:
    column = table.stored()[name]
    assert isinstance(column, Texts)
    return column


def _ints(codes: NDArray[Any]) -> Iterator[int]:
    """Integers of an array, not all of them at a time."""
    for first in range(0, len(codes), 4096):
        yield from codes[first : first + 4096].tolist()


# What users see, and what a pickle names.
FleetFinding.__module__ = "lorafast"
