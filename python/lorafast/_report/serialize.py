"""Analyses and comparisons as plain objects, back again, and in a line."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import TYPE_CHECKING, Any, TypeVar

from lorafast._analysis.records import (
    SCHEMA_VERSION,
    AdapterAnalysis,
    Comparison,
    EntryStatistics,
    Finding,
    Histogram,
    ModuleAnalysis,
    ModuleComparison,
    PairComparison,
    TensorStatistics,
    finding_counts,
)
from lorafast._errors import LorafastError

if TYPE_CHECKING:
    from lorafast._analysis.records import Matrix

KINDS = {AdapterAnalysis: "adapter_analysis", Comparison: "comparison"}

Record = TypeVar("Record")


def to_plain(value: Any) -> Any:
    """Dataclasses as dicts, arrays and tuples as lists, keys as text, and the kind of a page."""
    if is_dataclass(value) and not isinstance(value, type):
        plain = {field.name: to_plain(getattr(value, field.name)) for field in fields(value)}
        kind = KINDS.get(type(value))
        return plain if kind is None else {"schema_version": SCHEMA_VERSION, "kind": kind, **plain}
    if isinstance(value, Mapping):
        return {_key(key): to_plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [to_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return value.tolist()
    return value


def _key(key: Any) -> str:
    return f"{key:g}" if isinstance(key, float) else str(key)


def without_non_finite(value: Any) -> Any:
    """Plain objects with `None` in place of NaN and infinities."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, dict):
        return {key: without_non_finite(item) for key, item in value.items()}
    if isinstance(value, list):
        return [without_non_finite(item) for item in value]
    return value


def from_plain(plain: Mapping[str, Any]) -> AdapterAnalysis | Comparison:
    """What `to_dict` or `to_json` was made of. An infinity that became null comes back as NaN.

    Raises:
        LorafastError: it is something else, or of a later version.
    """
    version = plain.get("schema_version")
    if version != SCHEMA_VERSION:
        raise LorafastError(
            f"the schema version is {version!r}; this lorafast reads {SCHEMA_VERSION}"
        )
    kind = plain.get("kind")
    try:
        if kind == KINDS[AdapterAnalysis]:
            return _analysis(plain)
        if kind == KINDS[Comparison]:
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
    return [Finding(**finding) for finding in plain["findings"]]


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
    return Comparison(
        names=plain["names"],
        analyses=[_analysis(item) for item in plain["analyses"]],
        cosine=matrix(plain["cosine"]),
        modules={path: _module_comparison(item) for path, item in plain["modules"].items()},
        only_in=plain["only_in"],
        findings=_findings(plain),
    )


def _module_comparison(plain: Mapping[str, Any]) -> ModuleComparison:
    rows, columns = plain["shape"]
    matrices = ("cosine", "sign_agreement", "subspace", "subspace_expected")
    return _build(
        ModuleComparison,
        plain,
        shape=(rows, columns),
        pairs=[
            _build(PairComparison, pair, sizes=(pair["sizes"][0], pair["sizes"][1]))
            for pair in plain["pairs"]
        ],
        **{name: matrix(plain[name]) for name in matrices},
    )


def matrix(rows: Sequence[Sequence[float | None]]) -> Matrix:
    """A float64 matrix; `None` is NaN."""
    import numpy as np

    return np.array([[_number(value) for value in row] for row in rows], dtype=np.float64)


def findings_text(findings: Sequence[Finding]) -> str:
    """`2 severe, 1 warning`, or `no findings`."""
    counts = finding_counts(list(findings))
    words = {"severe": "severe", "warning": "warning", "note": "note"}
    parts = [
        f"{count} {words[severity]}{'s' * (count > 1 and severity != 'severe')}"
        for severity, count in counts.items()
        if count
    ]
    return ", ".join(parts) or "no findings"


def short_text(page: AdapterAnalysis | Comparison) -> str:
    """The `__repr__`: what it is, how large, and whether there is anything to look at."""
    if isinstance(page, AdapterAnalysis):
        summary = page.summary
        ranks = ", ".join(map(str, summary["ranks"])) or "none"
        return (
            f"<AdapterAnalysis {page.name!r}: {summary['modules']} modules of rank {ranks}, "
            f"{summary['total_parameters']:,} parameters, ‖ΔW‖ = {summary['frobenius_norm']:.4g}; "
            f"{findings_text(page.findings)}>"
        )
    names = ", ".join(map(repr, page.names[:4])) + ", …" * (len(page.names) > 4)
    return (
        f"<Comparison of {len(page.names)} adapters ({names}): {len(page.modules)} modules, "
        f"mean cosine {mean_cosine(page):.4g}; {findings_text(page.findings)}>"
    )


def mean_cosine(comparison: Comparison) -> float:
    """The mean over the pairs whose cosine is known; NaN if there is none."""
    count = len(comparison.names)
    values = [
        float(comparison.cosine[i, j])
        for i in range(count)
        for j in range(i + 1, count)
        if math.isfinite(comparison.cosine[i, j])
    ]
    return math.fsum(values) / len(values) if values else math.nan


def short_html(page: Any) -> str:
    """The `_repr_html_` of a notebook: the line, and the findings as a list."""
    items = "".join(
        f"<li><b>{finding.severity}</b> {html.escape(finding.module or '')} "
        f"{html.escape(finding.reason)}</li>"
        for finding in page.findings[:10]
    )
    more = len(page.findings) - 10
    if more > 0:
        items += f"<li>… and {more} more</li>"
    text = html.escape(short_text(page).strip("<>"))
    return f"<div><p>{text}</p>" + (f"<ul>{items}</ul>" if items else "") + "</div>"
