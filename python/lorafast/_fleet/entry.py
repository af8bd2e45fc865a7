"""Entries of a fleet: what the core finds in an adapter, as its own figures and findings."""

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

from lorafast import _core
from lorafast._analysis.findings import findings_of_adapter, with_counts
from lorafast._analysis.records import Finding
from lorafast._fleet.table import NOTHING

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
    """One adapter.

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
    cells: bytes


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


def entry_of(found: Mapping[str, Any], kind: np.dtype[Any]) -> Entry:
    """What the core found in one adapter, with its findings and the adapter's own figures."""
    rows = np.frombuffer(found["rows"], dtype=kind)
    figures = _figures(found, rows)
    numbers = _cells(kind).pack(*(figures[key] for key in number_type(kind).names or ()))
    return Entry(
        texts=tuple(figures[key] for key in TEXTS),
        findings=tuple(with_counts(_findings_of(found, rows), _told_apart)),
        paths=tuple(found["module_paths"]),
        kinds=tuple(found["module_kinds"]),
        cells=numbers + found["rows"] + found["singular_values"],
    )


def _told_apart(finding: Finding) -> str | None:
    """One finding of a kind and severity, but each of what an adapter has beside its modules."""
    return finding.reason if finding.kind == "feature" else None


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
    return findings_of_adapter(modules, tensors, found["features"], found["notes"])
