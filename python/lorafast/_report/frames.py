"""Analyses and comparisons as data frames, a row for each module."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lorafast._analysis.records import AdapterAnalysis, Comparison, ModuleAnalysis
from lorafast._errors import missing

if TYPE_CHECKING:
    import pandas
    import polars

#: Fields of a module that are no single value; the first becomes two columns.
NESTED = ("shape", "singular_values", "entries")


def rows(page: Any) -> list[dict[str, Any]]:
    """The rows of the table, all with the same columns."""
    if isinstance(page, Comparison):
        return [_comparison_row(page, path) for path in page.modules]
    analysis: AdapterAnalysis = page
    return [_module_row(module) for module in analysis.modules.values()]


def _module_row(module: ModuleAnalysis) -> dict[str, Any]:
    row: dict[str, Any] = {}
    for field in fields(module):
        if field.name == "shape":
            row["out_features"], row["in_features"] = module.shape
        elif field.name not in NESTED:
            row[field.name] = getattr(module, field.name)
    return row


def _comparison_row(comparison: Comparison, path: str) -> dict[str, Any]:
    module = comparison.modules[path]
    row: dict[str, Any] = {
        "path": path,
        "out_features": module.shape[0],
        "in_features": module.shape[1],
    }
    for position, name in enumerate(comparison.names):
        row[f"norm {name}"] = module.norms[position]
        row[f"rank {name}"] = module.ranks[position]
    for i, first in enumerate(comparison.names):
        for j in range(i + 1, len(comparison.names)):
            pair = f"{first} · {comparison.names[j]}"
            row[f"cosine {pair}"] = float(module.cosine[i, j])
            row[f"subspace {pair}"] = float(module.subspace[i, j])
            row[f"sign agreement {pair}"] = float(module.sign_agreement[i, j])
    return row


def pandas_frame(page: Any) -> pandas.DataFrame:
    """The table in pandas."""
    try:
        import pandas
    except ImportError as error:
        raise missing("pandas", "pandas", "make a DataFrame") from error
    return pandas.DataFrame(rows(page))


def polars_frame(page: Any) -> polars.DataFrame:
    """The table in polars."""
    try:
        import polars
    except ImportError as error:
        raise missing("polars", "polars", "make a DataFrame") from error
    # The whole column decides its type: the first module may lack what a later one has.
    return polars.DataFrame(rows(page), infer_schema_length=None)
