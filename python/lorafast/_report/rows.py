"""The parts of results as rows of plain values, for data frames and notebooks."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from itertools import combinations
from typing import TYPE_CHECKING, Any, Literal

from lorafast._analysis.records import ModuleAnalysis
from lorafast._similarity.trajectory import Checkpoint

if TYPE_CHECKING:
    from lorafast._analysis.results import AdapterAnalysis, Comparison
    from lorafast._results import FramedResult
    from lorafast._similarity.duplicates import Duplicates
    from lorafast._similarity.lineage import Lineage
    from lorafast._similarity.similarity import Similarity
    from lorafast._similarity.trajectory import Trajectory
    from lorafast._types import ComparisonTable

Row = tuple[Any, ...]
#: What a column holds. A float that is not there is NaN; the others may be `None`.
Kind = Literal["text", "integer", "float", "boolean"]

#: Of a module's update what is no single value: (out, in) are two columns, the others none.
NESTED = ("shape", "singular_values", "entries")
KINDS: dict[str, Kind] = {"int": "integer", "float": "float", "bool": "boolean"}


@dataclass(frozen=True)
class Rows:
    """A table, row by row.

    Attributes:
        columns: what each column holds, by its name in snake_case.
        rows: the rows, each made when it is asked for.
        whole: makes the values of all columns at once, where there may be millions of rows.
    """

    columns: dict[str, Kind]
    rows: Iterator[Row]
    whole: Callable[[], dict[str, list[Any]]] | None = None


def rows_of(result: FramedResult, table: str | None = None) -> Rows:
    """The parts of a result.

    Args:
        result: a result of a class in `PARTS`, or of one derived from it.
        table: which of its tables, where it has several.
    """
    part = next(PARTS[each.__name__] for each in type(result).__mro__ if each.__name__ in PARTS)
    found: Rows = part(result) if table is None else part(result, table)
    return found


def _modules(analysis: AdapterAnalysis) -> Rows:
    """A row for each module."""
    columns: dict[str, Kind] = {}
    names = []
    for field in fields(ModuleAnalysis):
        if field.name == "shape":
            columns |= {"out_features": "integer", "in_features": "integer"}
            names.append(field.name)
        elif field.name not in NESTED:
            columns[field.name] = _kind(str(field.type))
            names.append(field.name)

    def row(module: ModuleAnalysis) -> Row:
        values: list[Any] = []
        for name in names:
            value = getattr(module, name)
            values += value if name == "shape" else [value]
        return tuple(values)

    return Rows(columns, map(row, analysis.modules.values()))


def _kind(annotation: str) -> Kind:
    """What a field of a dataclass holds, by its annotation as text."""
    return KINDS.get(annotation.removesuffix(" | None"), "text")


def _compared(comparison: Comparison, table: ComparisonTable = "pairs") -> Rows:
    """A row for each module and pair of adapters that both have it, or for each module and adapter.

    Raises:
        ValueError: there is no such table, or its pairs were not compared.
    """
    if table == "modules":
        return Rows(
            {"path": "text", "out_features": "integer", "in_features": "integer",
             "adapter": "text", "rank": "integer", "norm": "float"},
            (
                (path, *module.shape, name, module.ranks[at], module.norms[at])
                for path, module in comparison.modules.items()
                for at, name in enumerate(comparison.names)
                if module.present[at]
            ),
        )  # fmt: skip
    if table != "pairs":
        raise ValueError(f"table must be 'pairs' or 'modules', not {table!r}")
    if not comparison.modules_compared:
        raise ValueError(
            "the table 'pairs' needs the pairs of each module, which were not compared; "
            "compare(…, modules=True) does that, and table='modules' has ranks and norms"
        )
    return Rows(
        {"path": "text", "out_features": "integer", "in_features": "integer",
         "first": "text", "second": "text", "first_rank": "integer", "second_rank": "integer",
         "first_norm": "float", "second_norm": "float", "cosine": "float",
         "relative_difference": "float", "sign_agreement": "float", "subspace": "float",
         "subspace_expected": "float"},
        _pairs(comparison),
    )  # fmt: skip


def _pairs(comparison: Comparison) -> Iterator[Row]:
    names = comparison.names
    for path, module in comparison.modules.items():
        differences = {(pair.first, pair.second): pair.relative_difference for pair in module.pairs}
        present = [at for at in range(len(names)) if module.present[at]]
        for i, j in combinations(present, 2):
            yield (
                path, *module.shape, names[i], names[j], module.ranks[i], module.ranks[j],
                module.norms[i], module.norms[j], float(module.cosine[i, j]),
                differences.get((i, j)), float(module.sign_agreement[i, j]),
                float(module.subspace[i, j]), float(module.subspace_expected[i, j]),
            )  # fmt: skip


def _similar(similarity: Similarity) -> Rows:
    """A row for each pair of adapters, in the order of the adapters."""

    def whole() -> dict[str, list[Any]]:
        import numpy as np

        first, second = np.triu_indices(len(similarity), 1)
        names, norms = np.array(similarity.names, dtype=object), similarity.norms
        columns = {
            "first": names[first],
            "second": names[second],
            similarity.metric: similarity.matrix[first, second],
            "first_norm": norms[first],
            "second_norm": norms[second],
            "shared_modules": similarity.shared[first, second],
        }
        return {name: values.tolist() for name, values in columns.items()}

    columns: dict[str, Kind] = {"first": "text", "second": "text", similarity.metric: "float"}
    columns |= {"first_norm": "float", "second_norm": "float", "shared_modules": "integer"}
    return Rows(columns, (row for row in zip(*whole().values(), strict=True)), whole)


def _members(found: Duplicates) -> Rows:
    """A row for each member of each group; the first of a group is the one to keep."""
    figures = ("difference", "tolerance", "factor", "kept")
    columns: dict[str, Kind] = {"group": "integer", "tier": "text", "name": "text", "path": "text"}
    columns |= {"is_first": "boolean", **dict.fromkeys(figures, "float")}
    columns |= {"sha256": "text", "evidence": "text"}

    def rows() -> Iterator[Row]:
        for number, group in enumerate(found.groups):
            evidence = {item.path: item for item in group.evidence}
            for at, (name, path) in enumerate(zip(group.names, group.members, strict=True)):
                item = evidence.get(path)
                known = {} if item is None else item.figures
                yield (
                    number, group.tier, name, os.fspath(path), at == 0,
                    *(known.get(figure) for figure in figures), known.get("sha256"),
                    None if item is None else item.text,
                )  # fmt: skip

    return Rows(columns, rows())


def _candidates(found: Lineage) -> Rows:
    """A row for each candidate."""
    return Rows(
        {"name": "text", "path": "text", "coefficient": "float", "contribution": "float",
         "cosine": "float", "dependent": "text"},
        (
            (found.names[path], os.fspath(path), weight, found.contributions[path],
             found.cosines[path], found.dependent.get(path))
            for path, weight in found.coefficients.items()
        ),
    )  # fmt: skip


def _steps(found: Trajectory) -> Rows:
    """A row for each checkpoint, in their order."""
    columns: dict[str, Kind] = {"step": "integer"}
    names = [field.name for field in fields(Checkpoint)]
    for field in fields(Checkpoint):
        if field.name.startswith("subspace_"):
            columns |= {f"output_{field.name}": "float", f"input_{field.name}": "float"}
        else:
            columns[field.name] = _kind(str(field.type))

    def row(number: int, step: Checkpoint) -> Row:
        values: list[Any] = [number]
        for name in names:
            value = getattr(step, name)
            if name.startswith("subspace_"):
                values += (math.nan, math.nan) if value is None else value
            else:
                values.append(os.fspath(value) if name == "path" else value)
        return tuple(values)

    return Rows(columns, (row(at, step) for at, step in enumerate(found.steps)))


#: For the name of a result's class what makes its rows.
PARTS: dict[str, Any] = {
    "AdapterAnalysis": _modules,
    "Comparison": _compared,
    "Similarity": _similar,
    "Duplicates": _members,
    "Lineage": _candidates,
    "Trajectory": _steps,
}
