"""The findings of one adapter of a fleet, from what the core found in it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

from lorafast import _core
from lorafast._analysis.findings import findings_of_adapter, with_counts
from lorafast._analysis.records import Finding

#: Of the tables; raised when a column changes its meaning or goes away.
SCHEMA_VERSION = 2

#: The columns that findings are made of, each with what stands for it where it was not found.
JUDGED: dict[str, float] = {
    "alpha": math.nan,
    "rank": 0,
    "scaling": math.nan,
    "out_features": 0,
    "in_features": 0,
    "frobenius_norm": math.nan,
    "spectral_norm": math.nan,
    "k90": 0,
    "k99": 0,
    "singular_values": 0,
}


class _Judged:
    """A row of the modules' table with the names that a `ModuleAnalysis` has."""

    __slots__ = (
        *("alpha", "rank", "scaling", "shape", "relative_norm", "frobenius_norm"),
        *("spectral_norm", "k90", "k99", "singular_values", "zero_cause"),
        *("rescaled", "made_of_weight", "change_norm"),
    )

    def __init__(self, cells: Sequence[Any], zero_cause: str | None, rescaled: bool) -> None:
        """The cells are those of `JUDGED`."""
        self.zero_cause = zero_cause
        self.rescaled = rescaled
        # There is no base.
        self.made_of_weight = False
        self.change_norm = None
        self.alpha, self.rank, self.scaling, *shape = cells[:5]
        self.shape = tuple(shape)
        self.relative_norm = None
        self.frobenius_norm, self.spectral_norm, self.k90, self.k99, count = cells[5:]
        self.singular_values = range(count)


def findings_of(found: _core.ScannedAdapter) -> list[tuple[Finding, int]]:
    """The findings that `analyze` has, from as many values as there are at this level.

    Those of one kind are one: that of the greatest value, with how many there are.
    """
    columns = []
    for name, absent in JUDGED.items():
        column = found.column(name)
        columns.append([absent] * len(found.modules) if column is None else column)
    zero_causes, rescaled = dict(found.zero_causes), set(found.rescaled)
    modules: dict[str, Any] = {
        path: _Judged(cells, zero_causes.get(path), path in rescaled)
        for path, *cells in zip(found.modules, *columns, strict=True)
    }
    tensors: dict[str, Any] = {
        name: SimpleNamespace(count=count, non_finite=non_finite)
        for name, count, non_finite in found.non_finite
    }
    findings = findings_of_adapter(modules, tensors, found.features, found.notes)
    return with_counts(findings, _told_apart)


def _told_apart(finding: Finding) -> str | None:
    """One finding of a kind and severity, but each of what an adapter has beside its modules."""
    return finding.reason if finding.kind == "feature" else None
