"""A fleet's findings and errors as columns, from which each is made when it is asked for."""

from __future__ import annotations

import math
import os
from array import array
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafast._analysis.findings import SEVERITIES
from lorafast._analysis.records import Finding
from lorafast._fleet.discovery import ScanError
from lorafast._fleet.findings import FleetFinding
from lorafast._fleet.table import (
    NOTHING,
    Column,
    Lists,
    OnDemand,
    Table,
    Texts,
    Vocabulary,
    Words,
    WordsBuilder,
)


class FindingColumns:
    """Findings that come adapter by adapter, in any order of these."""

    def __init__(self) -> None:
        self._adapters = array("i")
        self._severities = array("b")
        self._kinds = array("h")
        self._modules = array("i")
        self._figures = array("d")
        self._counts = array("q")
        self._reasons = array("i")
        self._kind_names = Vocabulary()
        self._module_names = Vocabulary()
        self._sentences = WordsBuilder()
        #: Kinds of which no figure is told, which is not the same as one that is NaN.
        self._without_figure: set[str] = set()

    def add(self, adapter: int, finding: Finding, count: int) -> None:
        """Keeps a finding of so many modules of the adapter at a position, −1 for the fleet."""
        self._adapters.append(adapter)
        self._severities.append(SEVERITIES.index(finding.severity))
        self._kinds.append(self._kind_names.code(finding.kind))
        self._modules.append(self._module_names.code(finding.module))
        if finding.value is None:
            self._without_figure.add(finding.kind)
        self._figures.append(math.nan if finding.value is None else finding.value)
        self._counts.append(count)
        self._reasons.append(self._sentences.code(finding.reason))

    def arrange(self, rows: NDArray[np.int32]) -> None:
        """Puts them in the order of the adapters, of which the one at a position is now a row.

        Those of one adapter keep their order.
        """
        adapters = rows[np.frombuffer(self._adapters, np.int32)]
        order = np.argsort(adapters, kind="stable")
        self._adapters = array("i", adapters[order].tobytes())
        for name, kind in (
            *(("_severities", np.int8), ("_kinds", np.int16), ("_modules", np.int32)),
            *(("_figures", np.float64), ("_counts", np.int64), ("_reasons", np.int32)),
        ):
            own = getattr(self, name)
            setattr(self, name, array(own.typecode, np.frombuffer(own, kind)[order].tobytes()))

    def counts(self, severity: str, rows: int) -> NDArray[np.int64]:
        """How many of a severity each adapter has, modules counted one by one."""
        result = np.zeros(rows, np.int64)
        here = np.frombuffer(self._severities, np.int8) == SEVERITIES.index(severity)
        adapters = np.frombuffer(self._adapters, np.int32)[here]
        np.add.at(result, adapters, np.frombuffer(self._counts, np.int64)[here])
        return result

    def kinds(self, rows: int) -> Lists:
        """The kinds that each adapter has, each once, in the order of its findings."""
        # A key for each adapter and kind, of which the first one counts.
        names = self._kind_names.texts()
        keys = np.frombuffer(self._adapters, np.int32).astype(np.int64)
        keys *= max(len(names), 1)
        keys += np.frombuffer(self._kinds, np.int16)
        first = np.sort(np.unique(keys, return_index=True)[1])
        offsets = np.zeros(rows + 1, np.int64)
        adapters = np.frombuffer(self._adapters, np.int32)[first]
        offsets[1:] = np.bincount(adapters, minlength=rows)
        np.cumsum(offsets, out=offsets)
        return Lists(Texts(names, np.frombuffer(self._kinds, np.int16)[first]), offsets)

    def build(self, names: Words) -> FindingList:
        """All of them, the severe first, otherwise as they stand. Nothing can be added any more."""
        severities = np.frombuffer(self._severities, np.int8)
        order = np.argsort(severities, kind="stable").astype(np.int32)
        kinds = np.frombuffer(self._kinds, np.int16)[order]
        columns: dict[str, Column] = {
            "adapter": Texts(names, np.frombuffer(self._adapters, np.int32)[order]),
            "severity": Texts(SEVERITIES, severities[order]),
            "kind": Texts(self._kind_names.texts(), kinds),
            "module": Texts(
                self._module_names.texts(), np.frombuffer(self._modules, np.int32)[order]
            ),
            "figure": np.frombuffer(self._figures, np.float64)[order],
            "count": np.frombuffer(self._counts, np.int64)[order],
            "reason": Texts(self._sentences.build(), np.frombuffer(self._reasons, np.int32)[order]),
        }
        return FindingList(Table(columns), frozenset(self._without_figure))


class FindingList(OnDemand[FleetFinding]):
    """Findings, each made from its row of a table when it is asked for."""

    __slots__ = ("_table", "_without_figure")

    def __init__(self, table: Table, without_figure: frozenset[str]) -> None:
        self._table = table
        self._without_figure = without_figure

    @property
    def table(self) -> Table:
        """A row for each finding."""
        return self._table

    def __len__(self) -> int:
        return self._table.rows

    def _at(self, row: int) -> FleetFinding:
        columns = self._table.stored()

        def text(name: str) -> str | None:
            column: Any = columns[name]
            code = column.codes[row]
            return None if code == NOTHING else column.values[int(code)]

        severity = SEVERITIES[SEVERITIES.index(text("severity"))]
        kind, reason = text("kind"), text("reason")
        assert kind is not None
        assert reason is not None
        figure: float | None = float(self._table["figure"][row])
        if kind in self._without_figure:
            figure = None
        finding = Finding(severity, kind, text("module"), figure, reason)
        return FleetFinding(text("adapter"), finding, int(self._table["count"][row]))


class ErrorColumns:
    """What could not be read, in any order of the adapters."""

    def __init__(self) -> None:
        self._positions = array("i")
        self._paths = WordsBuilder()
        self._sentences = WordsBuilder()
        self._reasons = array("i")

    def add(self, position: int, error: ScanError) -> None:
        """Keeps an error, −1 for what is no adapter."""
        self._positions.append(position)
        self._paths.append(os.fspath(error.path))
        self._reasons.append(self._sentences.code(error.reason))

    def build(self) -> ErrorList:
        """All of them, by the adapters' positions. Nothing can be added any more."""
        order = np.argsort(np.frombuffer(self._positions, np.int32), kind="stable")
        reasons = Texts(self._sentences.build(), np.frombuffer(self._reasons, np.int32)[order])
        return ErrorList(Texts(self._paths.build(), order.astype(np.int32)), reasons)


class ErrorList(OnDemand[ScanError]):
    """Errors, each made when it is asked for."""

    __slots__ = ("_paths", "_reasons")

    def __init__(self, paths: Texts, reasons: Texts) -> None:
        self._paths = paths
        self._reasons = reasons

    def __len__(self) -> int:
        return len(self._paths)

    def _at(self, row: int) -> ScanError:
        path, reason = (
            column.values[int(column.codes[row])] for column in (self._paths, self._reasons)
        )
        return ScanError(Path(path), reason)
