"""Comparisons cut down to the adapters of one architecture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafast._analysis.architectures import Architecture, architectures
from lorafast._analysis.records import PAIR_MATRICES, not_compared

if TYPE_CHECKING:
    from lorafast._analysis.records import ModuleComparison
    from lorafast._analysis.results import Comparison


def architectures_of(comparison: Comparison) -> list[Architecture]:
    """The architectures of the adapters compared.

    Bases of other names do not keep adapters apart here: whoever compares two adapters wants their
    cosine wherever there is one.
    """
    shapes: list[dict[Any, Any]] = [{} for _ in comparison.names]
    for path, module in comparison.modules.items():
        for position, (own, analysis) in enumerate(zip(shapes, comparison.analyses, strict=True)):
            if module.present[position]:
                known = analysis.modules.get(path)
                own[path] = module.shape if known is None else known.shape
    bases = [analysis.summary["base"] for analysis in comparison.analyses]
    return architectures(bases, shapes)


def subset(comparison: Comparison, members: Sequence[int]) -> Comparison:
    """The comparison of some of its adapters alone, with the modules that one of them has."""
    members = list(members)
    names = [comparison.names[member] for member in members]
    return replace(
        comparison,
        names=names,
        analyses=[comparison.analyses[member] for member in members],
        cosine=_cut(comparison.cosine, members),
        modules={
            path: _of_members(module, members, has_pairs=comparison.modules_compared)
            for path, module in comparison.modules.items()
            if any(module.present[member] for member in members)
        },
        only_in={name: comparison.only_in.get(name, []) for name in names},
        findings=[],
    )


def _of_members(
    module: ModuleComparison, members: list[int], *, has_pairs: bool
) -> ModuleComparison:
    matrices: dict[str, Any] = dict.fromkeys(PAIR_MATRICES, not_compared(len(members)))
    if has_pairs:
        matrices = {name: _cut(getattr(module, name), members) for name in PAIR_MATRICES}
    lists: dict[str, Any] = {
        name: [getattr(module, name)[member] for member in members]
        for name in ("present", "norms", "ranks")
    }
    return replace(module, **lists, **matrices, pairs=[])


def _cut(matrix: Any, members: list[int]) -> Any:
    """Rows and columns of a matrix, if there is one."""
    return None if matrix is None else np.asarray(matrix)[np.ix_(members, members)]
