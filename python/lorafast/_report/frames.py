"""Results as data frames, a row for each of their parts."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from lorafast._errors import missing
from lorafast._io.plain import utf8
from lorafast._report.rows import Kind, rows_of

if TYPE_CHECKING:
    import pandas
    import polars

    from lorafast._results import FramedResult

#: What pandas calls a column's type; whole numbers that may be missing are its own Int64.
PANDAS: dict[Kind, Any] = {"integer": "int64", "float": "float64", "boolean": "bool"}


def to_pandas(result: FramedResult, table: str | None = None) -> pandas.DataFrame:
    """A table of a result in pandas.

    Args:
        result: the result.
        table: which of its tables, where it has several.

    Raises:
        ValueError: there is no such table.
        MissingDependencyError: pandas is not installed.
    """
    columns = _columns(result, table)
    try:
        import pandas
    except ImportError as error:
        raise missing("pandas", "pandas", "make a DataFrame") from error
    made = {}
    for name, (kind, values) in columns.items():
        if kind == "text":
            made[name] = pandas.Series(values, dtype=object).infer_objects()
        else:
            is_nullable = kind == "integer" and None in values
            made[name] = pandas.Series(values, dtype="Int64" if is_nullable else PANDAS[kind])
    return pandas.DataFrame(made)


def to_polars(result: FramedResult, table: str | None = None) -> polars.DataFrame:
    """A table of a result in polars.

    Args:
        result: the result.
        table: which of its tables, where it has several.

    Raises:
        ValueError: there is no such table.
        MissingDependencyError: polars is not installed.
    """
    columns = _columns(result, table)
    try:
        import polars
    except ImportError as error:
        raise missing("polars", "polars", "make a DataFrame") from error
    kinds = {
        "text": polars.String,
        "integer": polars.Int64,
        "float": polars.Float64,
        "boolean": polars.Boolean,
    }
    return polars.DataFrame(
        [polars.Series(name, values, kinds[kind]) for name, (kind, values) in columns.items()]
    )


def _columns(result: FramedResult, table: str | None) -> dict[str, tuple[Kind, list[Any]]]:
    """The columns, each with what it holds; a float that is not there is NaN."""
    found = rows_of(result, table)
    if found.whole is not None:
        whole = found.whole()
        return {name: (kind, whole[name]) for name, kind in found.columns.items()}
    columns: dict[str, tuple[Kind, list[Any]]] = {
        name: (kind, []) for name, kind in found.columns.items()
    }
    for row in found.rows:
        for (kind, values), found_value in zip(columns.values(), row, strict=True):
            value = found_value
            if value is None and kind == "float":
                value = math.nan
            elif kind == "text" and value is not None:
                # Names of files may be no UTF-8, which columns of texts are.
                value = utf8(value)
            values.append(value)
    return columns
