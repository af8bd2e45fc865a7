"""Readers of analyses and comparisons from the plain objects that were made of them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, TypeVar

from lorafast._analysis.records import (
    PAIR_MATRICES,
    EntryStatistics,
    Finding,
    Histogram,
    ModuleAnalysis,
    ModuleComparison,
    PairComparison,
    TensorStatistics,
    not_compared,
)
from lorafast._analysis.results import AdapterAnalysis, Comparison, places_of
from lorafast._errors import LorafastError
from lorafast._results import READ_VERSIONS

if TYPE_CHECKING:
    from lorafast._types import Matrix


Record = TypeVar("Record")


def from_plain(plain: Mapping[str, Any]) -> AdapterAnalysis | Comparison:
    """What `to_dict` or `to_json` was made of. An infinity that became null comes back as NaN.

    Raises:
        LorafastError: it is something else, or of a later version.
    """
    version = plain.get("schema_version")
    if version not in READ_VERSIONS:
        known = " and ".join(map(str, READ_VERSIONS))
        raise LorafastError(f"the schema version is {version!r}; this lorafast reads {known}")
    kind = plain.get("kind")
    try:
        if kind == AdapterAnalysis._kind:
            return _analysis(plain)
        if kind == Comparison._kind:
            return _comparison(plain)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise LorafastError(f"the {kind} is damaged: {error!r}") from error
    raise LorafastError(f"{kind!r} is no kind of analysis")


def _analysis(plain: Mapping[str, Any]) -> AdapterAnalysis:
    return AdapterAnalysis(
        name=plain["name"],
        path=plain["path"],
        config=plain["config"],
        summary=plain["summary"],
        findings=_findings(plain),
        weights=tensor_statistics(plain["weights"]),
        tensors={name: tensor_statistics(item) for name, item in plain["tensors"].items()},
        modules={path: module_analysis(item) for path, item in plain["modules"].items()},
    )


def _findings(plain: Mapping[str, Any]) -> list[Finding]:
    return [_finding(finding) for finding in plain["findings"]]


def _finding(plain: Mapping[str, Any]) -> Finding:
    """A finding under the names of any version that is read."""
    fields = dict(plain)
    if "figure" in fields:
        fields["value"] = fields.pop("figure")
    if fields["severity"] == "severe":
        fields["severity"] = "critical"
    return Finding(**fields)


def _build(record: type[Record], plain: Mapping[str, Any], **others: Any) -> Record:
    """A record from its fields; a float that is null is NaN."""
    values = {}
    for field in fields(record):  # type: ignore[arg-type]  # every caller gives a dataclass
        if field.name in others:
            continue
        value = plain[field.name]
        values[field.name] = math.nan if value is None and field.type == "float" else value
    return record(**values, **others)


def _histogram(plain: Mapping[str, Any]) -> Histogram:
    return Histogram(edges=list(plain["edges"]), counts=list(plain["counts"]))


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def tensor_statistics(plain: Mapping[str, Any]) -> TensorStatistics:
    """Statistics from their fields."""
    shape = plain["shape"]
    return _build(
        TensorStatistics,
        plain,
        shape=None if shape is None else tuple(shape),
        percentiles={float(key): _number(item) for key, item in plain["percentiles"].items()},
        histogram=_histogram(plain["histogram"]),
        log_histogram=_histogram(plain["log_histogram"]),
    )


def module_analysis(plain: Mapping[str, Any]) -> ModuleAnalysis:
    """A module's record from its fields."""
    entries = plain["entries"]
    rows, columns = plain["shape"]
    return _build(
        ModuleAnalysis,
        plain,
        shape=(rows, columns),
        singular_values=[_number(value) for value in plain["singular_values"]],
        entries=None
        if entries is None
        else _build(EntryStatistics, entries, histogram=_histogram(entries["histogram"])),
    )


def _comparison(plain: Mapping[str, Any]) -> Comparison:
    # Of an adapter whose own analysis stands elsewhere there is the summary.
    analyses = [_analysis({"tensors": {}, "modules": {}, **item}) for item in plain["analyses"]]
    places = places_of(analyses)
    return Comparison(
        names=plain["names"],
        analyses=analyses,
        cosine=matrix(plain["cosine"]),
        modules={
            path: _module_comparison(item, len(plain["names"]), places.get(path))
            for path, item in plain["modules"].items()
        },
        only_in=plain["only_in"],
        findings=_findings(plain),
        modules_compared=plain.get("modules_compared", True),
    )


def _module_comparison(
    plain: Mapping[str, Any], count: int, place: ModuleAnalysis | None
) -> ModuleComparison:
    rows, columns = plain["shape"]
    return _build(
        ModuleComparison,
        plain,
        shape=(rows, columns),
        pairs=[
            _build(PairComparison, pair, sizes=(pair["sizes"][0], pair["sizes"][1]))
            for pair in plain.get("pairs", ())
        ],
        # Earlier versions had them in the adapters' analyses alone.
        block=plain.get("block", None if place is None else place.block),
        layer=plain.get("layer", plain["path"] if place is None else place.layer),
        **{
            name: matrix(plain[name]) if name in plain else not_compared(count)
            for name in PAIR_MATRICES
        },
    )


def matrix(rows: Sequence[Sequence[float | None]]) -> Matrix:
    """A float64 matrix; `None` is NaN."""
    import numpy as np

    return np.array([[_number(value) for value in row] for row in rows], dtype=np.float64)
