"""Tables whose columns are NumPy arrays: the core's Arrow columns, which are not copied."""

from __future__ import annotations

from collections.abc import Iterator, KeysView, Mapping
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafast import _core
from lorafast._results import shown
from lorafast._types import TableName

#: The tables of a fleet.
TABLES: tuple[TableName, ...] = ("adapters", "modules", "findings")
#: Stands for a text, or an integer, that is not there.
NOTHING = -1


@shown
class Table:
    """Columns by name, each a NumPy array with a value a row. To be used as a mapping.

    Numbers are int64 or float64 (figures that do not exist are NaN), and cannot be written to:
    they are the memory that `__arrow_c_stream__` hands to pyarrow, polars, pandas or DuckDB. Texts
    are arrays of `str` objects, with `None` where there is none; lists are arrays of objects.
    Columns of texts and lists are made when they are asked for: keep what you take out of the
    table.
    """

    # No subclass of Mapping, which polars would copy column by column, whatever else it can.
    __slots__ = ("_core", "_paths")

    def __init__(self, core: _core.Table, paths: Mapping[int, str] | None = None) -> None:
        """Wraps a table of the core.

        Args:
            core: the table.
            paths: by row what its column "path" has as escapes, since it is no UTF-8.
        """
        self._core = core
        self._paths = dict(paths or {})

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self._core.rows

    @property
    def nbytes(self) -> int:
        """Bytes that the columns take."""
        return self._core.nbytes

    def __getitem__(self, name: str) -> NDArray[Any]:
        column = _array(self._core.column(name))
        if name == "path":
            for row, path in self._paths.items():
                column[row] = path
        return column

    def __contains__(self, name: object) -> bool:
        return name in self._core.names

    def __iter__(self) -> Iterator[str]:
        return iter(self._core.names)

    def __len__(self) -> int:
        return len(self._core.names)

    def keys(self) -> KeysView[str]:
        """The names of the columns."""
        return dict.fromkeys(self).keys()

    def values(self) -> Iterator[NDArray[Any]]:
        """The columns."""
        return (self[name] for name in self)

    def items(self) -> Iterator[tuple[str, NDArray[Any]]]:
        """The columns with their names."""
        return ((name, self[name]) for name in self)

    def get(self, name: str, default: Any = None) -> Any:
        """A column, or something else where there is none of that name."""
        known = self._core.names
        return self[name] if name in known else default

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        """The table for any library that speaks Arrow's C stream interface, without a copy."""
        return self._core.__arrow_c_stream__(requested_schema)

    def row(self, row: int) -> dict[str, Any]:
        """The values of one row by column, but for lists."""
        values = self._core.row(row)
        if row in self._paths:
            values["path"] = self._paths[row]
        return values

    def coded(self, name: str) -> tuple[NDArray[np.int32], list[str]]:
        """A column of repeated texts: for each row its text's place, −1 for none; the texts."""
        _, codes, texts = self._core.column(name)
        return np.asarray(codes), texts

    def flat(self, name: str) -> tuple[NDArray[Any], NDArray[np.int64]]:
        """A column of lists: all values, of which a row's are from its offset to the next."""
        _, offsets, values = self._core.column(name)
        return _array(values), np.asarray(offsets)


def _array(column: tuple[Any, ...]) -> NDArray[Any]:
    """A column of the core as an array."""
    kind, first, *others = column
    if kind == "numbers":
        return np.asarray(first)
    if kind == "texts":
        return np.array(first, dtype=object)
    if kind == "codes":
        texts = np.array([*others[0], None], dtype=object)
        found: NDArray[Any] = texts[np.asarray(first)]
        return found
    values = _array(others[0])
    is_text = values.dtype == object
    lists = np.empty(len(np.asarray(first)) - 1, dtype=object)
    for row, (start, end) in enumerate(pairwise(np.asarray(first).tolist())):
        lists[row] = values[start:end].tolist() if is_text else values[start:end]
    return lists
