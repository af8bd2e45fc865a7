"""Findings of a fleet as a whole: what stands out among its adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from lorafast._analysis.records import Finding
from lorafast._fleet.explanations import EXPLANATIONS
from lorafast._fleet.table import Table
from lorafast._results import shown

#: ‖ΔW‖ this many times above or below the median of the adapters of its base.
NORM_OUTLIER = 10.0
#: Fewer adapters than this have no meaningful median.
MIN_ADAPTERS_TO_JUDGE = 5
#: Names that a sentence lists.
NAMED = 3

#: All kinds of finding, each with what it means in a few words.
KINDS = {kind: entry.meaning for kind, entry in EXPLANATIONS.items()}


@shown
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
    bases = _codes(adapters["base"].tolist())
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
    groups: dict[str, list[int]] = {}
    for row, digest in enumerate(adapters["blake3"].tolist()):
        if digest is not None:
            groups.setdefault(digest, []).append(row)
    same = [group for group in groups.values() if len(group) > 1]
    names: list[str] = adapters["name"].tolist() if same else []
    for group in same:
        others = listed([names[row] for row in group[1 : NAMED + 1]], len(group) - 1)
        reason = f"Its weights file is the same as that of {others}."
        yield group[0], Finding("note", "same_file", None, float(len(group)), reason)


def _bases(adapters: Table) -> Iterator[tuple[None, Finding]]:
    # The most common first, of several those that come first.
    bases = Counter(adapters["base"].tolist()).most_common()
    if len(bases) < 2:
        return
    counted = [f"{'none named' if base is None else base} ({count:,})" for base, count in bases]
    reason = f"The adapters name {len(bases)} different bases: {listed(counted)}."
    yield None, Finding("note", "several_bases", None, float(len(bases)), reason)


def _codes(texts: Sequence[str | None]) -> NDArray[np.int64]:
    """A number for each different text, by which the rows of one are found."""
    codes: dict[str | None, int] = {}
    return np.array([codes.setdefault(text, len(codes)) for text in texts], dtype=np.int64)


# What users see, and what a pickle names.
FleetFinding.__module__ = "lorafast"
