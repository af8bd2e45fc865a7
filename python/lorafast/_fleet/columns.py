"""What is kept of each adapter while a scan goes on, and the tables that it becomes.

Each position has its place in arrays from the beginning, and its cells lie in pages of their own
(`arena.py`), which go back to the system while the tables' columns are filled from them: memory
is that of the tables, and nothing beside them that grows with the number of adapters.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafast._analysis.names import layers_of
from lorafast._fleet.arena import Room, fresh
from lorafast._fleet.entry import FIGURES, TEXTS, Entry, number_type
from lorafast._fleet.finding_columns import FindingColumns, FindingList
from lorafast._fleet.findings import of_fleet
from lorafast._fleet.names import names_of
from lorafast._fleet.table import NOTHING, SHORT, Column, Lists, Table, Texts, Vocabulary, Words

#: Hexadecimal digits of a digest, of which no two adapters need have the same.
DIGITS = 64
#: Bytes of cells that are brought into columns at a time, and adapters that they are of.
BATCH = 1 << 18
MOST_AT_A_TIME = 128

Layout = tuple[tuple[str, ...], tuple[str, ...]]


@dataclass(frozen=True, slots=True)
class Tables:
    """What a scan ends in."""

    adapters: Table
    modules: Table
    findings: FindingList


class Columns:
    """Adapters by their position among those that are scanned, of which some may stay away."""

    def __init__(self, count: int, kind: np.dtype[Any]) -> None:
        """Room for so many adapters, whose modules' rows are of this type."""
        self._kind = kind
        self._own = number_type(kind)
        self._room = Room()
        self._places = np.full(count, NOTHING, np.int64)
        self._lengths = np.zeros(count, np.int64)
        self._layouts = np.full(count, NOTHING, np.int32)
        self._known: dict[Layout, int] = {}
        self._codes = {key: np.full(count, NOTHING, np.int32) for key in TEXTS if key != "sha256"}
        self._texts = {key: Vocabulary() for key in self._codes}
        self._digests = fresh(count * DIGITS, np.uint8)
        self._has_digest = np.zeros(count, np.bool_)
        self._findings = FindingColumns()

    def __contains__(self, position: int) -> bool:
        return bool(self._layouts[position] >= 0)

    def __len__(self) -> int:
        return int(np.count_nonzero(self._layouts >= 0))

    def missing(self) -> NDArray[np.intp]:
        """The positions of which nothing is there."""
        return np.flatnonzero(self._layouts < 0)

    def add(self, position: int, entry: Entry) -> None:
        """Keeps what was found in an adapter."""
        layout = (entry.paths, entry.kinds)
        self._layouts[position] = self._known.setdefault(layout, len(self._known))
        self._places[position] = self._room.keep(entry.cells)
        self._lengths[position] = len(entry.cells)
        for key, text in zip(TEXTS, entry.texts, strict=True):
            if key != "sha256":
                self._codes[key][position] = self._texts[key].code(text)
            elif text is not None:
                start = position * DIGITS
                self._digests[start : start + DIGITS] = np.frombuffer(text.encode(), np.uint8)
                self._has_digest[position] = True
        for finding, count in entry.findings:
            self._findings.add(position, finding, count)

    def tables(self, paths: Words) -> Tables:
        """The tables of those that are there. Nothing can be added any more."""
        here = np.flatnonzero(self._layouts >= 0)
        if len(here) < len(paths):
            paths = Words.of(paths[position] for position in here.tolist())
        names = names_of(paths)
        adapters, modules = self._filled(paths, names, here)
        rows = np.full(len(self._places), NOTHING, np.int32)
        rows[here] = np.arange(len(here), dtype=np.int32)
        findings = self._findings
        findings.arrange(rows)
        for column, severity in (
            ("severe", "critical"),
            ("warnings", "warning"),
            ("notes", "note"),
        ):
            adapters[column] = findings.counts(severity, len(here))
        adapters["findings"] = findings.kinds(len(here))
        table = Table(adapters)
        # What only the whole fleet shows comes after what was found in single adapters.
        for row, finding in of_fleet(table):
            findings.add(NOTHING if row is None else row, finding, 1)
        return Tables(table, Table(modules), findings.build(names))

    def _filled(
        self, paths: Words, names: Words, here: NDArray[np.intp]
    ) -> tuple[dict[str, Column], dict[str, Column]]:
        """The columns of both tables but for the findings."""
        kind, own = self._kind, self._own
        count = len(here)
        adapters: dict[str, Column] = {"path": Texts.each(paths), "name": Texts.each(names)}
        own_figures = {key: fresh(count, own[key].newbyteorder("=")) for key in own.names or ()}
        for key in (*FIGURES, *own_figures):
            if key == "sha256":
                adapters[key] = self._digests_of(here)
            elif key in TEXTS:
                adapters[key] = Texts(self._texts[key].texts(), _of(self._codes.pop(key), here))
            elif key not in adapters:
                adapters[key] = own_figures[key]
        sizes = np.array([len(paths) for paths, _ in self._known], np.int64)
        lengths = sizes[self._layouts[here]]
        total = int(lengths.sum())
        modules: dict[str, Column] = {
            "adapter": Texts(names, np.repeat(np.arange(count, dtype=np.int32), lengths))
        }
        places = self._layout_columns(modules, total)
        numbers = {key: fresh(total, kind[key].newbyteorder("=")) for key in kind.names or ()}
        # Their lengths become their offsets in place.
        offsets = fresh(total + 1, np.int64)
        if "singular_values" in numbers:
            numbers["singular_values"] = offsets[1:]
        others = count * own.itemsize + total * kind.itemsize
        singular = fresh((int(self._lengths[here].sum()) - others) // 8, np.float64)
        adapter = row = value = 0
        for batch in self._batches(here):
            codes = self._layouts[batch].tolist()
            figures, rows, values = self._taken(batch, sizes[codes].tolist())
            for key, target in own_figures.items():
                target[adapter : adapter + len(batch)] = figures[key]
            for key, target in numbers.items():
                target[row : row + len(rows)] = rows[key]
            singular[value : value + len(values)] = values
            for target, of_layout in places:
                parts = [of_layout[code] for code in codes]
                np.concatenate(parts, out=target[row : row + len(rows)])
            adapter += len(batch)
            row += len(rows)
            value += len(values)
        modules |= {key: column for key, column in numbers.items() if key != "singular_values"}
        if "singular_values" in numbers:
            np.cumsum(offsets, out=offsets)
            modules["singular_values"] = Lists(singular, offsets)
        return adapters, modules

    def _layout_columns(
        self, modules: dict[str, Column], total: int
    ) -> list[tuple[NDArray[Any], list[NDArray[Any]]]]:
        """Columns that tell where each module lies in its model, still empty.

        Most adapters of a fleet have the same modules, so that for each column there is also what
        each of the layouts puts into it.
        """
        names, layers, kinds = (Vocabulary() for _ in range(3))
        of_layouts: list[list[NDArray[Any]]] = [[], [], [], []]
        for paths, own_kinds in self._known:
            found = layers_of(paths)
            blocks = [NOTHING if block is None else block for block, _ in found]
            own: tuple[NDArray[Any], ...] = (
                np.array([names.code(path) for path in paths], np.int32),
                np.array(blocks, np.int64),
                np.array([layers.code(layer) for _, layer in found], np.int32),
                np.array([kinds.code(kind) for kind in own_kinds], np.int32),
            )
            for column, part in zip(of_layouts, own, strict=True):
                column.append(part)
        codes = [fresh(total, np.int32) for _ in range(3)]
        blocks_column = fresh(total, np.int64)
        modules["module"] = Texts(names.texts(), codes[0])
        modules["block"] = blocks_column
        modules["layer"] = Texts(layers.texts(), codes[1])
        modules["kind"] = Texts(kinds.texts(), codes[2])
        return list(zip((codes[0], blocks_column, *codes[1:]), of_layouts, strict=True))

    def _batches(self, here: NDArray[np.intp]) -> Iterator[list[int]]:
        """Positions of few adapters with few cells, or of one with many."""
        batch: list[int] = []
        size = 0
        for first in range(0, len(here), MOST_AT_A_TIME):
            some = here[first : first + MOST_AT_A_TIME]
            for position, length in zip(some.tolist(), self._lengths[some].tolist(), strict=True):
                if batch and (size + length > BATCH or len(batch) == MOST_AT_A_TIME):
                    yield batch
                    batch, size = [], 0
                batch.append(position)
                size += length
        if batch:
            yield batch

    def _taken(
        self, batch: Sequence[int], sizes: Sequence[int]
    ) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.float64]]:
        """The figures, modules' rows and singular values of some adapters; they go out of the room.

        Args:
            batch: their positions.
            sizes: how many modules each has.
        """
        figures, rows, values = [], [], []
        for position, size in zip(batch, sizes, strict=True):
            cells = self._room.at(int(self._places[position]), int(self._lengths[position]))
            start = self._own.itemsize
            end = start + size * self._kind.itemsize
            figures.append(cells[:start])
            rows.append(cells[start:end])
            values.append(cells[end:])
        found = (
            np.frombuffer(b"".join(figures), self._own),
            np.frombuffer(b"".join(rows), self._kind),
            np.frombuffer(b"".join(values), "<f8"),
        )
        # No view may be left when the room is given back.
        del cells, figures, rows, values
        for position in batch:
            self._room.release(int(self._places[position]))
        return found

    def _digests_of(self, here: NDArray[np.intp]) -> Texts:
        """The digests, each at its place; none where no weights were read."""
        has = self._has_digest[here]
        codes = np.arange(len(here), dtype=np.int32)
        codes[~has] = NOTHING
        data, self._digests = self._digests, np.empty(0, np.uint8)
        if not has.any():
            return Texts([], codes)
        if len(here) * DIGITS < len(data):
            data = data.reshape(-1, DIGITS)[here].reshape(-1)
        size = np.int32 if len(data) < SHORT else np.int64
        offsets = np.arange(0, len(data) + 1, DIGITS, dtype=size)
        return Texts(Words(data, offsets), codes)


def _of(column: NDArray[Any], here: NDArray[np.intp]) -> NDArray[Any]:
    """The column of those that are there, which is itself where all are."""
    return column if len(here) == len(column) else column[here]
