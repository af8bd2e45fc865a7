"""Tables whose columns are NumPy arrays, kept in less room than Python's objects would take."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
from numpy.typing import NDArray

#: A text, or an integer, that is not there.
NOTHING = -1


@dataclass(frozen=True, eq=False)
class Texts:
    """A column of texts of which many are the same.

    Attributes:
        values: the different texts.
        codes: int32, for each row the position of its text; −1 where there is none.
    """

    values: list[str]
    codes: NDArray[np.int32]

    def __len__(self) -> int:
        return len(self.codes)

    def array(self) -> NDArray[Any]:
        """An array of `str` objects, `None` where there is no text."""
        known = np.empty(len(self.values) + 1, dtype=object)
        known[:-1] = self.values
        known[-1] = None
        return known[self.codes]

    @classmethod
    def of(cls, texts: Sequence[str | None]) -> Texts:
        """The column of these texts."""
        known: dict[str, int] = {}
        codes = [NOTHING if text is None else known.setdefault(text, len(known)) for text in texts]
        return cls(list(known), np.array(codes, dtype=np.int32))


@dataclass(frozen=True, eq=False)
class Lists:
    """A column of lists of different lengths.

    Attributes:
        values: all of them, one row after the other.
        offsets: int64, a row's list is `values[offsets[row] : offsets[row + 1]]`.
    """

    values: NDArray[np.float64] | Texts
    offsets: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def array(self) -> NDArray[Any]:
        """An array of objects: float64 arrays that share memory, or lists of `str`."""
        result = np.empty(len(self), dtype=object)
        if isinstance(self.values, Texts):
            texts = self.values.array().tolist()
            for row, (start, end) in enumerate(self._bounds()):
                result[row] = texts[start:end]
        else:
            for row, (start, end) in enumerate(self._bounds()):
                result[row] = self.values[start:end]
        return result

    def _bounds(self) -> Iterator[tuple[int, int]]:
        return pairwise(self.offsets.tolist())

    @classmethod
    def of_texts(cls, lists: Sequence[Sequence[str]]) -> Lists:
        """The column of these lists of texts."""
        flat = [text for texts in lists for text in texts]
        return cls(Texts.of(flat), offsets_of([len(texts) for texts in lists]))


Column = NDArray[Any] | Texts | Lists


def offsets_of(lengths: Sequence[int] | NDArray[Any]) -> NDArray[np.int64]:
    """Where each of lists of these lengths begins, and where the last one ends."""
    offsets = np.zeros(len(lengths) + 1, dtype=np.int64)
    np.cumsum(lengths, out=offsets[1:])
    return offsets


class Table(Mapping[str, NDArray[Any]]):
    """Columns by name, each a NumPy array with a value a row.

    Numbers are int64 or float64 (figures that do not exist are NaN); texts are arrays of `str`
    objects, with `None` where there is none; lists are arrays of objects. Columns of texts and
    lists are made when they are asked for: keep what you take out of the table.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        lengths = {len(column) for column in columns.values()}
        if len(lengths) > 1:
            raise ValueError(f"columns of different lengths: {sorted(lengths)}")
        self._columns = dict(columns)
        self._rows = lengths.pop() if lengths else 0

    @property
    def rows(self) -> int:
        """The number of rows."""
        return self._rows

    def stored(self) -> Mapping[str, Column]:
        """The columns as they are kept."""
        return self._columns

    def __getitem__(self, name: str) -> NDArray[Any]:
        column = self._columns[name]
        return column.array() if isinstance(column, Texts | Lists) else column

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def __repr__(self) -> str:
        return f"Table({self.rows:,} rows: {', '.join(self._columns)})"
