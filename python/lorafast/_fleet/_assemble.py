"""From what the core finds in each adapter to the tables of a fleet."""

from __future__ import annotations

import math
import struct
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from statistics import median
from types import SimpleNamespace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafast import _core, _findings
from lorafast._analysis import _layers as layers_of
from lorafast._fleet._room import Room
from lorafast._fleet._table import NOTHING, Column, Lists, Table, Texts, offsets_of
from lorafast._records import Finding

#: Of the tables and of the cache; raised when a column changes its meaning or goes away.
SCHEMA_VERSION = 1
#: Of all weights of an adapter taken together, under the names of `TensorStatistics`.
WEIGHTS = (
    *("mean", "std", "min", "max", "l2_norm", "skewness", "kurtosis", "zero_share", "non_finite"),
)
#: The cells of an adapter at every level.
FIGURES = (
    *("peft_type", "base", "rank", "alpha", "scaling", "scaling_rule", "modules", "tensors"),
    *("parameters", "bytes", "dtypes", "sha256"),
)
TEXTS = ("peft_type", "base", "scaling_rule", "dtypes", "sha256")
INTEGERS = ("rank", "modules", "tensors", "parameters", "bytes")
INTEGERS_OF_WEIGHTS = ("non_finite",)
#: Of the updates of an adapter, under the names of `AdapterAnalysis.summary`.
SPECTRA = ("frobenius_norm", "max_spectral_norm", "median_spectral_norm", "mean_effective_rank")


@dataclass(slots=True)
class Entry:
    """One adapter, small enough that thousands fit into memory.

    Attributes:
        texts: the adapter's own texts, in the order of `TEXTS`.
        findings: each kind with the worst of it and how many there are.
        paths: the modules' paths.
        kinds: linear, embedding or convolution, for each module.
        cells: the adapter's numbers, eight bytes each in the order of `number_type`; the modules'
            as the core encodes them, row after row; the singular values, one module after the
            other.
    """

    texts: tuple[str | None, ...]
    findings: tuple[tuple[Finding, int], ...]
    paths: tuple[str, ...]
    kinds: tuple[str, ...]
    cells: memoryview

    def numbers(self, own: np.dtype[Any]) -> memoryview:
        """The adapter's own, of the type `number_type`."""
        return self.cells[: own.itemsize]

    def modules(
        self, own: np.dtype[Any], kind: np.dtype[Any]
    ) -> tuple[NDArray[Any], NDArray[np.float64]]:
        """The modules' rows, and their singular values."""
        rows = np.frombuffer(self.cells, kind, len(self.paths), own.itemsize)
        start = own.itemsize + rows.nbytes
        if start == len(self.cells):
            return rows, np.empty(0)
        return rows, np.frombuffer(self.cells, "<f8", offset=start)


EMPTY = memoryview(b"")

#: Paths and kinds of the modules of adapters, so that those that have the same share them.
Layouts = dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[tuple[str, ...], tuple[str, ...]]]


def row_type(metrics: str) -> np.dtype[Any]:
    """The NumPy type of a module's row."""
    columns = _core.scan_columns(metrics)
    return np.dtype([(name, "<i8" if integer else "<f8") for name, integer in columns])


@cache
def number_type(kind: np.dtype[Any]) -> np.dtype[Any]:
    """The NumPy type of an adapter's own numbers, where its modules' rows have this type."""
    keys = [key for key in FIGURES if key not in TEXTS]
    if "a_mean" in (kind.names or ()):
        keys += WEIGHTS
    if "frobenius_norm" in (kind.names or ()):
        keys += SPECTRA
    integers = INTEGERS + INTEGERS_OF_WEIGHTS
    return np.dtype([(key, "<i8" if key in integers else "<f8") for key in keys])


@cache
def _cells(kind: np.dtype[Any]) -> struct.Struct:
    own = number_type(kind)
    return struct.Struct("<" + "".join("q" if own[k].kind == "i" else "d" for k in own.names or ()))


def entry_of(found: Mapping[str, Any], kind: np.dtype[Any], layouts: Layouts, room: Room) -> Entry:
    """What the core found in one adapter, with its findings and the adapter's own figures."""
    rows = np.frombuffer(found["rows"], dtype=kind)
    paths, kinds = shared_layout(layouts, found["module_paths"], found["module_kinds"])
    figures = _figures(found, rows)
    numbers = _cells(kind).pack(*(figures[key] for key in number_type(kind).names or ()))
    return Entry(
        texts=tuple(figures[key] for key in TEXTS),
        findings=_grouped(_findings_of(found, rows)),
        paths=paths,
        kinds=kinds,
        cells=room.keep(numbers + found["rows"] + found["singular_values"]),
    )


def _grouped(findings: Sequence[Finding]) -> tuple[tuple[Finding, int], ...]:
    """Findings of one kind as one: that of the greatest figure, and how many there are.

    There is one of a kind and severity, whatever the number of modules; only what an adapter has
    beside its modules is told word for word.
    """
    groups: dict[tuple[str, str, str], list[Finding]] = {}
    for finding in findings:
        own = finding.reason if finding.kind == "feature" else ""
        groups.setdefault((finding.severity, finding.kind, own), []).append(finding)
    return tuple((max(group, key=_magnitude), len(group)) for group in groups.values())


def _magnitude(finding: Finding) -> float:
    figure = finding.figure
    return -math.inf if figure is None or math.isnan(figure) else abs(figure)


def shared_layout(
    layouts: Layouts, paths: Sequence[str], kinds: Sequence[str]
) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Paths and kinds as tuples, the same ones for the same modules."""
    layout = (tuple(paths), tuple(kinds))
    return layouts.setdefault(layout, layout)


def _figures(found: Mapping[str, Any], rows: NDArray[Any]) -> dict[str, Any]:
    config = found["config"]
    figures: dict[str, Any] = {
        "peft_type": _text(config.get("peft_type")),
        "base": _text(config.get("base_model_name_or_path")),
        "rank": _most(rows["rank"], NOTHING),
        "alpha": _most(rows["alpha"], math.nan),
        "scaling": _most(rows["scaling"], math.nan),
        "scaling_rule": "alpha/sqrt(r)" if found["rank_stabilised"] else "alpha/r",
        "modules": len(rows),
        "tensors": found["tensors"],
        "parameters": found["parameters"],
        "bytes": found["total_bytes"],
        "dtypes": " ".join(found["dtypes"]),
        "sha256": found["sha256"],
    }
    if found["weights"] is not None:
        figures |= {name: found["weights"][name] for name in WEIGHTS}
    if "frobenius_norm" in (rows.dtype.names or ()):
        spectral = [norm for norm in rows["spectral_norm"].tolist() if math.isfinite(norm)]
        effective = [rank for rank in rows["effective_rank"].tolist() if math.isfinite(rank)]
        figures |= {
            "frobenius_norm": math.hypot(*rows["frobenius_norm"].tolist()),
            "max_spectral_norm": max(spectral, default=math.nan),
            "median_spectral_norm": median(spectral) if spectral else math.nan,
            "mean_effective_rank": math.fsum(effective) / len(effective) if effective else math.nan,
        }
    return figures


def _text(value: Any) -> str | None:
    return value if isinstance(value, str) else None


def _most(values: NDArray[Any], default: float) -> Any:
    """The value that most modules have, the greatest of several."""
    counts = Counter(values.tolist())
    return max(counts, key=lambda value: (counts[value], value)) if counts else default


#: The columns that findings are made of, each with what stands for it where it was not found.
JUDGED: dict[str, float] = {
    "alpha": math.nan,
    "rank": 0,
    "scaling": math.nan,
    "out_features": 0,
    "in_features": 0,
    "frobenius_norm": math.nan,
    "spectral_norm": math.nan,
    "k90": 0,
    "k99": 0,
    "singular_values": 0,
}


class _Judged:
    """A row of the modules' table with the names that a `ModuleAnalysis` has."""

    __slots__ = (
        *("alpha", "rank", "scaling", "shape", "relative_norm", "frobenius_norm"),
        *("spectral_norm", "k90", "k99", "singular_values"),
    )

    def __init__(self, cells: Sequence[Any]) -> None:
        """The cells are those of `JUDGED`."""
        self.alpha, self.rank, self.scaling, *shape = cells[:5]
        self.shape = tuple(shape)
        self.relative_norm = None
        self.frobenius_norm, self.spectral_norm, self.k90, self.k99, count = cells[5:]
        self.singular_values = range(count)


def _findings_of(found: Mapping[str, Any], rows: NDArray[Any]) -> list[Finding]:
    """The findings that `analyze` has, from as many figures as there are at this level."""
    names = rows.dtype.names or ()
    columns = []
    for name, absent in JUDGED.items():
        columns.append(rows[name].tolist() if name in names else [absent] * len(rows))
    modules: dict[str, Any] = {
        path: _Judged(cells) for path, *cells in zip(found["module_paths"], *columns, strict=True)
    }
    tensors: dict[str, Any] = {
        tensor["name"]: SimpleNamespace(count=tensor["count"], non_finite=tensor["non_finite"])
        for tensor in found["non_finite"]
    }
    return _findings.of_adapter(modules, tensors, found["features"], found["notes"])


def adapter_table(
    paths: Sequence[str], names: Sequence[str], entries: Sequence[Entry], kind: np.dtype[Any]
) -> Table:
    """The table with a row for each adapter, which has its columns even without a row."""
    columns: dict[str, Column] = {"path": Texts.of(paths), "name": Texts.of(names)}
    own = number_type(kind)
    numbers = np.frombuffer(b"".join(entry.numbers(own) for entry in entries), dtype=own)
    for key in (*FIGURES, *(own.names or ())):
        if key in columns:
            continue
        if key in TEXTS:
            place = TEXTS.index(key)
            columns[key] = Texts.of([entry.texts[place] for entry in entries])
        else:
            columns[key] = numbers[key].copy()
    for column, severity in (("severe", "severe"), ("warnings", "warning"), ("notes", "note")):
        counts = [
            sum(count for finding, count in entry.findings if finding.severity == severity)
            for entry in entries
        ]
        columns[column] = np.array(counts, dtype=np.int64)
    kinds = [list(dict.fromkeys(found.kind for found, _ in entry.findings)) for entry in entries]
    columns["findings"] = Lists.of_texts(kinds)
    return Table(columns)


def module_table(names: Sequence[str], entries: Sequence[Entry], kind: np.dtype[Any]) -> Table:
    """The table with a row for each module of each adapter. Takes the entries' cells away."""
    lengths = [len(entry.paths) for entry in entries]
    count = sum(lengths)
    columns: dict[str, Column] = {
        "adapter": Texts(list(names), np.repeat(np.arange(len(names), dtype=np.int32), lengths))
    }
    columns |= _places(entries, count)
    numbers = {
        name: np.empty(count, dtype=np.int64 if kind[name].kind == "i" else np.float64)
        for name in kind.names or ()
    }
    own = number_type(kind)
    has_spectra = "singular_values" in numbers
    others = count * kind.itemsize + len(entries) * own.itemsize
    singular = np.empty((sum(len(entry.cells) for entry in entries) - others) // 8)
    row = value = 0
    for entry in entries:
        rows, values = entry.modules(own, kind)
        for name, target in numbers.items():
            target[row : row + len(rows)] = rows[name]
        singular[value : value + len(values)] = values
        row += len(rows)
        value += len(values)
        # What has been copied need not be held twice.
        del rows, values
        entry.cells = EMPTY
    columns |= {name: column for name, column in numbers.items() if name != "singular_values"}
    if has_spectra:
        columns["singular_values"] = Lists(singular, offsets_of(numbers["singular_values"]))
    return Table(columns)


def _places(entries: Sequence[Entry], count: int) -> dict[str, Column]:
    """Where each module lies in its model. Most adapters of a fleet have the same modules."""
    modules: dict[str, int] = {}
    layers: dict[str, int] = {}
    kinds: dict[str, int] = {}
    module_codes, layer_codes, kind_codes = (np.empty(count, dtype=np.int32) for _ in range(3))
    blocks = np.empty(count, dtype=np.int64)
    known: dict[tuple[tuple[str, ...], tuple[str, ...]], tuple[NDArray[Any], ...]] = {}
    row = 0
    for entry in entries:
        key = (entry.paths, entry.kinds)
        if key not in known:
            places = layers_of(entry.paths)
            known[key] = (
                np.array(
                    [modules.setdefault(path, len(modules)) for path in entry.paths], np.int32
                ),
                np.array([NOTHING if block is None else block for block, _ in places], np.int64),
                np.array([layers.setdefault(layer, len(layers)) for _, layer in places], np.int32),
                np.array([kinds.setdefault(kind, len(kinds)) for kind in entry.kinds], np.int32),
            )
        here = slice(row, row + len(entry.paths))
        module_codes[here], blocks[here], layer_codes[here], kind_codes[here] = known[key]
        row += len(entry.paths)
    return {
        "module": Texts(list(modules), module_codes),
        "block": blocks,
        "layer": Texts(list(layers), layer_codes),
        "kind": Texts(list(kinds), kind_codes),
    }
