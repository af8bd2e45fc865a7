"""Tables whose columns are NumPy arrays, kept in less room than Python's objects would take."""

from __future__ import annotations

from abc import abstractmethod
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any, TypeVar, overload

import numpy as np
from numpy.typing import NDArray

from lorafast._types import TableName

T = TypeVar("T")

#: A text, or an integer, that is not there.
NOTHING = -1
#: As many texts as `Words.Builder` looks back to for one that is the same.
LOOKED_BACK = 4096
#: Bytes up to which four-byte offsets reach.
SHORT = 1 << 31
#: The tables of a fleet.
TABLES: tuple[TableName, ...] = ("adapters", "modules", "findings")


@dataclass(frozen=True, eq=False)
class Words(Sequence[str]):
    """Texts in little more room than their bytes, made into objects when they are asked for.

    Attributes:
        data: all of them as UTF-8, one after the other. Names of files that are no text keep the
            lone surrogates that stand for their bytes.
        offsets: int32, or int64 of more than 2 GiB: a text is `data[offsets[i] : offsets[i + 1]]`.
    """

    data: NDArray[np.uint8]
    offsets: NDArray[Any]

    def __len__(self) -> int:
        return len(self.offsets) - 1

    @overload
    def __getitem__(self, index: int) -> str: ...
    @overload
    def __getitem__(self, index: slice) -> list[str]: ...
    def __getitem__(self, index: int | slice) -> str | list[str]:
        if isinstance(index, slice):
            return [self[place] for place in range(*index.indices(len(self)))]
        place = range(len(self))[index]
        return self._text(*self.offsets[place : place + 2].tolist())

    def __iter__(self) -> Iterator[str]:
        # Some at a time: offsets are small, integers are not.
        for first in range(0, len(self), LOOKED_BACK):
            for start, end in pairwise(self.offsets[first : first + LOOKED_BACK + 1].tolist()):
                yield self._text(start, end)

    def _text(self, start: int, end: int) -> str:
        return self.data[start:end].tobytes().decode(errors="surrogatepass")

    @property
    def nbytes(self) -> int:
        """Bytes that they take."""
        return self.data.nbytes + self.offsets.nbytes

    @classmethod
    def of(cls, texts: Iterable[str]) -> Words:
        """These texts, in this order."""
        builder = WordsBuilder()
        for text in texts:
            builder.append(text)
        return builder.build()


class WordsBuilder:
    """Texts that come one by one."""

    def __init__(self) -> None:
        self._data = bytearray()
        self._ends = array("q", [0])
        self._recent: dict[str, int] = {}

    def append(self, text: str) -> int:
        """Puts a text behind the others, and gives its place among them."""
        self._data += text.encode(errors="surrogatepass")
        self._ends.append(len(self._data))
        return len(self._ends) - 2

    def code(self, text: str) -> int:
        """The place of a text, which is put behind the others unless it was among the last."""
        known = self._recent.get(text)
        if known is None:
            if len(self._recent) == LOOKED_BACK:
                self._recent.clear()
            known = self._recent[text] = self.append(text)
        return known

    def build(self) -> Words:
        """All of them. Nothing can be added any more."""
        self._recent.clear()
        offsets = np.frombuffer(self._ends, np.int64)
        if len(self._data) < SHORT:
            offsets = offsets.astype(np.int32)
        return Words(np.frombuffer(self._data, np.uint8), offsets)


class OnDemand(Sequence[T]):
    """Values, each made when it is asked for. Like a list, but fixed."""

    __slots__ = ()

    @abstractmethod
    def _at(self, row: int) -> T:
        """The value in a row that there is."""

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._at(row) for row in range(*index.indices(len(self)))]
        return self._at(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, OnDemand | list):
            return NotImplemented
        return len(self) == len(other) and all(
            one == another for one, another in zip(self, other, strict=True)
        )

    # As a list's; mypy wants a method here, which would make it hashable.
    __hash__ = None  # type: ignore[assignment]

    def __add__(self, other: Sequence[T]) -> list[T]:
        return [*self, *other]

    def __radd__(self, other: Sequence[T]) -> list[T]:
        return [*other, *self]

    def __repr__(self) -> str:
        return repr(list(self))


class PathList(OnDemand[Path]):
    """Paths, each made when it is asked for."""

    __slots__ = ("words",)

    def __init__(self, words: Words) -> None:
        self.words = words

    def __len__(self) -> int:
        return len(self.words)

    def _at(self, row: int) -> Path:
        return Path(self.words[row])

    def __iter__(self) -> Iterator[Path]:
        return map(Path, self.words)


@dataclass(frozen=True, eq=False)
class Texts:
    """A column of texts.

    Attributes:
        values: the texts, each different one at least once.
        codes: of signed integers, for each row the position of its text; −1 where there is none.
    """

    values: Sequence[str]
    codes: NDArray[np.signedinteger[Any]]

    def __len__(self) -> int:
        return len(self.codes)

    def array(self) -> NDArray[Any]:
        """An array of `str` objects, `None` where there is no text."""
        known = np.empty(len(self.values) + 1, dtype=object)
        for place, text in enumerate(self.values):
            known[place] = text
        known[-1] = None
        found: NDArray[Any] = known[self.codes]
        return found

    @classmethod
    def each(cls, words: Words) -> Texts:
        """The column with a row for each of these texts."""
        return cls(words, np.arange(len(words), dtype=np.int32))


class Vocabulary:
    """The different texts of a column, and the numbers that stand for them."""

    def __init__(self) -> None:
        self._codes: dict[str, int] = {}

    def code(self, text: str | None) -> int:
        """The number of a text, a new one for a new text; −1 for none."""
        return NOTHING if text is None else self._codes.setdefault(text, len(self._codes))

    def texts(self) -> list[str]:
        """The texts in the order of their numbers."""
        return list(self._codes)


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


Column = NDArray[Any] | Texts | Lists


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
