"""What only a fleet as a whole can show: what stands out among its adapters."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorafast import _findings
from lorafast._fleet._fleet import FleetFinding
from lorafast._records import Finding

if TYPE_CHECKING:
    from lorafast._fleet._table import Table

#: ‖ΔW‖ this many times above or below the median of the adapters of its base.
NORM_OUTLIER = 10.0
#: Fewer adapters than this have no meaningful median.
LEAST_ADAPTERS_TO_JUDGE = 5
#: Names that a sentence lists.
NAMED = 3

#: The kinds of finding that `analyze` has not, each with what it means in a few words.
KINDS = _findings.KINDS | {
    "same_file": "adapters whose weights files are the same",
    "norm_outlier": "the norm is far from that of the other adapters of its base",
    "several_bases": "adapters of several bases",
}


def of_fleet(adapters: Table) -> list[FleetFinding]:
    """Findings about adapters among others, and about the fleet."""
    return [*_norms(adapters), *_same_files(adapters), *_bases(adapters)]


def listed(names: Sequence[str]) -> str:
    """The first names, and how many more there are."""
    text = ", ".join(names[:NAMED])
    return f"{text} and {len(names) - NAMED} more" if len(names) > NAMED else text


def _norms(adapters: Table) -> list[FleetFinding]:
    if "frobenius_norm" not in adapters:
        return []
    found = []
    norms, bases, names = (adapters[key] for key in ("frobenius_norm", "base", "name"))
    for base in dict.fromkeys(bases.tolist()):
        here = np.flatnonzero((bases == base) & np.isfinite(norms) & (norms > 0))
        if len(here) < LEAST_ADAPTERS_TO_JUDGE:
            continue
        typical = float(np.median(norms[here]))
        for position in here.tolist():
            ratio = float(norms[position]) / typical
            if not 1 / NORM_OUTLIER <= ratio <= NORM_OUTLIER:
                reason = (
                    f"‖ΔW‖ = {norms[position]:.4g} is {ratio:.3g} times the median "
                    f"({typical:.4g}) of the {len(here)} adapters of its base."
                )
                finding = Finding("warning", "norm_outlier", None, ratio, reason)
                found.append(FleetFinding(names[position], finding, 1))
    return found


def _same_files(adapters: Table) -> list[FleetFinding]:
    groups: dict[str, list[str]] = {}
    for digest, name in zip(adapters["sha256"].tolist(), adapters["name"].tolist(), strict=True):
        if digest is not None:
            groups.setdefault(digest, []).append(name)
    found = []
    for names in groups.values():
        if len(names) > 1:
            reason = f"Its weights file is the same as that of {listed(names[1:])}."
            finding = Finding("note", "same_file", None, float(len(names)), reason)
            found.append(FleetFinding(names[0], finding, 1))
    return found


def _bases(adapters: Table) -> list[FleetFinding]:
    bases = Counter("none named" if base is None else base for base in adapters["base"].tolist())
    if len(bases) < 2:
        return []
    counted = [f"{base} ({count:,})" for base, count in bases.most_common()]
    reason = f"The adapters name {len(bases)} different bases: {listed(counted)}."
    return [FleetFinding(None, Finding("note", "several_bases", None, len(bases), reason), 1)]
