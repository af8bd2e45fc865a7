"""Analyses and comparisons as data frames, a row for each module."""

from __future__ import annotations

from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lorafast._analysis.records import ModuleAnalysis
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._errors import missing

if TYPE_CHECKING:
    import pandas
    import polars

#: Fields of a module that are no single value; the first becomes two columns.
NESTED = ("shape", "singular_values", "entries")


def analysis_pandas(analysis: AdapterAnalysis) -> pandas.DataFrame:
    """The table of an analysis in pandas."""
    return _pandas(_analysis_rows(analysis))


def comparison_pandas(comparison: Comparison) -> pandas.DataFrame:
    """The table of a comparison in pandas."""
    return _pandas(_comparison_rows(comparison))


def analysis_polars(analysis: AdapterAnalysis) -> polars.DataFrame:
    """The table of an analysis in polars."""
    return _polars(_analysis_rows(analysis))


def comparison_polars(comparison: Comparison) -> polars.DataFrame:
    """The table of a comparison in polars."""
    return _polars(_comparison_rows(comparison))


def _analysis_rows(analysis: AdapterAnalysis) -> list[dict[str, Any]]:
    return [_module_row(module) for module in analysis.modules.values()]


def _comparison_rows(comparison: Comparison) -> list[dict[str, Any]]:
    return [_comparison_row(comparison, path) for path in comparison.modules]


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


def _pandas(rows: list[dict[str, Any]]) -> pandas.DataFrame:
    try:
        import pandas
    except ImportError as error:
        raise missing("pandas", "pandas", "make a DataFrame") from error
    return pandas.DataFrame(rows)


def _polars(rows: list[dict[str, Any]]) -> polars.DataFrame:
    try:
        import polars
    except ImportError as error:
        raise missing("polars", "polars", "make a DataFrame") from error
    # The whole column decides its type: the first module may lack what a later one has.
    return polars.DataFrame(rows, infer_schema_length=None)
