"""A fleet's findings and errors as values, each made from its row of a table when asked for."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from pathlib import Path
from typing import TypeVar, overload

from lorafast._analysis.records import Finding
from lorafast._fleet.discovery import ScanError
from lorafast._fleet.findings import FleetFinding
from lorafast._fleet.table import Table
from lorafast._results import shown

T = TypeVar("T")


@shown
class Rows(Sequence[T]):
    """The rows of a table as values. Like a list, but fixed."""

    __slots__ = ("_table",)

    def __init__(self, table: Table) -> None:
        self._table = table

    @property
    def table(self) -> Table:
        """The table."""
        return self._table

    @abstractmethod
    def _at(self, row: int) -> T:
        """The value in a row that there is."""

    def __len__(self) -> int:
        return self._table.rows

    @overload
    def __getitem__(self, index: int) -> T: ...
    @overload
    def __getitem__(self, index: slice) -> list[T]: ...
    def __getitem__(self, index: int | slice) -> T | list[T]:
        if isinstance(index, slice):
            return [self._at(row) for row in range(*index.indices(len(self)))]
        return self._at(range(len(self))[index])

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Rows | list):
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


class FindingList(Rows[FleetFinding]):
    """The findings of a fleet."""

    __slots__ = ("_without_value",)

    def __init__(self, table: Table, without_value: frozenset[str]) -> None:
        """Wraps the table.

        Args:
            table: of findings.
            without_value: kinds of which no figure is told, which is not the same as one that is
                NaN.
        """
        super().__init__(table)
        self._without_value = without_value

    def _at(self, row: int) -> FleetFinding:
        values = self._table.row(row)
        kind = values["kind"]
        figure = None if kind in self._without_value else values["figure"]
        finding = Finding(values["severity"], kind, values["module"], figure, values["reason"])
        return FleetFinding(values["adapter"], finding, values["count"])


class ErrorList(Rows[ScanError]):
    """What could not be read."""

    __slots__ = ()

    def _at(self, row: int) -> ScanError:
        values = self._table.row(row)
        return ScanError(Path(values["path"]), values["reason"])
