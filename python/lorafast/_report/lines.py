"""Values in one line: what `repr` gives, whatever the size of the model."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from lorafast._analysis.findings import finding_counts
from lorafast._analysis.names import labels_of
from lorafast._report.text import format_residual
from lorafast._results import view
from lorafast._words import plural

if TYPE_CHECKING:
    from lorafast._algebra.report import AlgebraReport
    from lorafast._analysis.records import Finding
    from lorafast._analysis.results import AdapterAnalysis, Comparison
    from lorafast._fleet.difference import ScanDiff
    from lorafast._fleet.fleet import Fleet
    from lorafast._fleet.table import Table
    from lorafast._merge.listing import AdapterListing, CheckpointListing
    from lorafast._merge.plan import MergePlan
    from lorafast._merge.report import MergeReport
    from lorafast._merge.subtract import SubtractReport
    from lorafast._merge.verify import Verification
    from lorafast._similarity.duplicates import Duplicates
    from lorafast._similarity.lineage import Lineage
    from lorafast._similarity.similarity import Similarity
    from lorafast._similarity.trajectory import Trajectory

#: Characters of a line, …
LONGEST = 200
#: … of a path or name in it, of which the middle is left out, …
NAME = 72
#: … and of one of several values.
PART = 40
#: Values that a line names, of a list or mapping.
SOME = 3
#: Terms of a combination in words, …
MAX_TERMS = 8
#: … of which those of less than this share of the target's norm are left out.
WORTH_A_WORD = 0.01


def line(value: object) -> str:
    """The `__repr__`: the text of its kind as one line of at most `LONGEST` characters."""
    text: str = printable(view("text", value)(value))
    if len(text) <= LONGEST:
        return text
    end = text[-1] if text[-1] in ">)}]" else ""
    return text[: LONGEST - 1 - len(end)] + "…" + end


def printable(text: str) -> str:
    """The text with escapes for what is not printed, such as the end of a line."""
    if text.isprintable():
        return text
    return "".join(c if c.isprintable() else ascii(c)[1:-1] for c in text)


def clipped(text: str, room: int = NAME) -> str:
    """A name or path on one line, without its middle where it is long: the end tells most."""
    text = printable(text[: room + 1] + text[-room:] if len(text) > 2 * room else text)
    if len(text) <= room:
        return text
    tail = (room - 1) * 2 // 3
    return f"{text[: room - 1 - tail]}…{text[-tail:]}"


def is_record(value: object) -> bool:
    """Whether a value consists of named fields: a dataclass or a named tuple."""
    if isinstance(value, type):
        return False
    return hasattr(value, "__dataclass_fields__") or hasattr(value, "_fields")


def fields_of(value: Any) -> Iterator[tuple[str, Any]]:
    """The fields of a record that are shown, in order."""
    if hasattr(value, "_fields"):
        yield from zip(value._fields, value, strict=True)
        return
    from dataclasses import fields

    for field in fields(value):
        if field.repr:
            yield field.name, getattr(value, field.name)


def short(value: Any, room: int = PART) -> str:
    """A value within another one: a number or text, or what it is and how much of it there is."""
    if isinstance(value, float):
        return f"{value:.6g}"
    if value is None or isinstance(value, int | range):
        return clipped(repr(value), room)
    if isinstance(value, str | os.PathLike):
        text = os.fsdecode(value)
        # Escapes of what is not printed are not escaped once more.
        return repr(clipped(text, room)) if text.isprintable() else f"'{clipped(text, room)}'"
    if is_record(value):
        return f"{type(value).__name__}(…)" if room <= PART else clipped(record_text(value), room)
    return _extent(value, room)


def _extent(value: Any, room: int) -> str:
    """What an array, a mapping, a sequence or anything else is, and how much of it there is."""
    if isinstance(getattr(value, "shape", None), tuple) and hasattr(value, "dtype"):
        return f"{value.dtype}[{', '.join(map(str, value.shape))}]"
    if isinstance(value, Mapping):
        return f"{{{plural(len(value), 'item')}}}" if value else "{}"
    if isinstance(value, Sequence | set | frozenset):
        plain = all(isinstance(each, str | int | float) for each in islice(value, SOME))
        if len(value) <= SOME and plain:
            return clipped(f"[{', '.join(short(each, room) for each in value)}]", NAME)
        return f"[{plural(len(value), 'item')}]"
    return type(value).__name__


def value_text(value: object) -> str:
    """The text of a value that has none of its own: a record, a mapping, a sequence or a table."""
    if is_record(value):
        return record_text(value)
    if isinstance(value, Mapping):
        items = (f"{short(key, PART)}: {short(item)}" for key, item in value.items())
        return f"{{{_some(items, len(value))}}}"
    if isinstance(value, Sequence):
        ends = "()" if isinstance(value, tuple) else "[]"
        return f"{ends[0]}{_some((short(item, 2 * PART) for item in value), len(value))}{ends[1]}"
    return f"<{type(value).__name__}>"


def record_text(value: object) -> str:
    """`Name(field=value, …)`, without fields that are `None`, for as long as the line is."""
    name = type(value).__name__
    text = f"{name}("
    for field, item in fields_of(value):
        if item is None:
            continue
        part = f"{', ' * (not text.endswith('('))}{field}={short(item)}"
        if len(text) + len(part) > LONGEST - len(", …)"):
            return f"{text}, …)"
        text += part
    return f"{text})"


def _some(parts: Iterator[str], count: int) -> str:
    """The first few parts, as many as a line holds, and how many more there are."""
    taken: list[str] = []
    room = LONGEST - len("[, … 1,000,000 more]")
    for part in islice(parts, SOME):
        room -= len(part) + 2
        if room < 0 and taken:
            break
        taken.append(part)
    more = count - len(taken)
    return ", ".join(taken) + (f", … {more:,} more" if more else "")


def findings_text(findings: Iterable[Finding], *, none: str = "no findings") -> str:
    """`2 critical, 1 warning`, or that there are none."""
    parts = [
        f"{count:,} {severity}{'s' * (count != 1 and severity != 'critical')}"
        for severity, count in finding_counts(findings).items()
        if count
    ]
    return ", ".join(parts) or none


def analysis_text(analysis: AdapterAnalysis) -> str:
    """What an adapter is, how large, and whether there is anything to look at."""
    summary = analysis.summary
    ranks = [str(rank) for rank in summary["ranks"]]
    shown = ", ".join(ranks[:SOME]) + ", …" * (len(ranks) > SOME)
    return (
        f"<AdapterAnalysis {clipped(analysis.name)!r}: {plural(summary['modules'], 'module')} of "
        f"rank {shown or 'none'}, {summary['total_parameters']:,} parameters, "
        f"‖ΔW‖ = {summary['frobenius_norm']:.4g}; {findings_text(analysis.findings)}>"
    )


def comparison_text(comparison: Comparison) -> str:
    """Which adapters, how many modules, and how alike they are."""
    count = len(comparison.names)
    names = ", ".join(repr(clipped(name, 24)) for name in comparison.names[:SOME])
    return (
        f"<Comparison of {plural(count, 'adapter')} ({names}{', …' * (count > SOME)}): "
        f"{plural(len(comparison.modules), 'module')}, mean cosine {mean_cosine(comparison):.4g}; "
        f"{findings_text(comparison.findings)}>"
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


def lineage_text(lineage: Lineage) -> str:
    """The target and its combination."""
    words = combination_text(lineage, terms=SOME, room=24)
    return f"<Lineage of {clipped(lineage.name, 32)}: {words}>"


def combination_text(lineage: Lineage, terms: int = MAX_TERMS, room: int | None = None) -> str:
    """The combination in words: `0.70·A + 0.30·B, residual 0.2 %`.

    Args:
        lineage: what was found.
        terms: how many are named.
        room: characters of a name; all of them if `None`.
    """
    from lorafast._similarity.lineage import PARTLY

    residual = f"residual {format_residual(lineage.residual)}"
    if not lineage.related:
        return f"nothing of these, {residual}"
    shares = lineage.contributions
    paths = [path for path, share in shares.items() if abs(share) >= WORTH_A_WORD]
    paths.sort(key=lambda path: -abs(shares[path]))
    labels = dict(zip(lineage.names, labels_of(list(lineage.names.values())), strict=True))
    text = ""
    for path in paths[:terms]:
        weight = lineage.coefficients[path]
        sign = ("−" if weight < 0 else "") if not text else (" − " if weight < 0 else " + ")
        name = labels[path]
        text += f"{sign}{abs(weight):.2f}·{name if room is None else clipped(name, room)}"
    if len(paths) > terms:
        text += f" and {len(paths) - terms} more"
    if lineage.residual > PARTLY:
        text += " + something else"
    return f"{text}, {residual}"


def plan_text(plan: MergePlan) -> str:
    """What goes where, and how much of it changes."""
    return (
        f"<MergePlan: {plural(len(plan.adapters), 'adapter')} into {clipped(plan.base)}; "
        f"{plan.tensors_merged + plan.tensors_replaced + plan.tensors_repeated} tensors "
        f"change, {plan.tensors_copied} are copied, {plan.tensors_cast} cast; "
        f"{plan.bytes_to_write / 1e9:.2f} GB to write{_noticed(plan.warnings)}>"
    )


def merge_text(report: MergeReport) -> str:
    """What went where, how much of it changed, and how long that took."""
    changed = report.tensors_merged + report.tensors_replaced + report.tensors_repeated
    return (
        f"<MergeReport: {plural(len(report.adapters), 'adapter')} into {clipped(report.base, 48)} "
        f"→ {clipped(report.output_path, 48)}; {plural(changed, 'tensor')} changed, "
        f"{report.bytes_written / 1e9:.2f} GB in {report.merge_time:.2f} s"
        f"{_noticed(report.warnings)}>"
    )


def subtract_text(report: SubtractReport) -> str:
    """What was taken out of what, and whether the base came back exactly."""
    exact = "exactly the base" if report.exact else "the base to within rounding"
    return (
        f"<SubtractReport: {plural(len(report.adapters), 'adapter')} out of "
        f"{clipped(report.merged, 40)} → {clipped(report.output_path, 40)}; "
        f"{plural(report.tensors_changed, 'tensor')} changed, {exact}{_noticed(report.warnings)}>"
    )


def algebra_text(report: AlgebraReport) -> str:
    """What was made of what, with which ranks, and how near it is."""
    ranks = [rank for rank in report.ranks.values() if rank]
    low, high = min(ranks, default=0), max(ranks, default=0)
    span = f"rank {low}" if low == high else f"ranks {low}–{high}"
    return (
        f"<{type(report).__name__}: {plural(len(report.inputs), 'input')} → "
        f"{clipped(report.output, 48)}; {plural(len(ranks), 'module')}, {span}, "
        f"error {report.error:.3g}{_noticed(report.lost)}>"
    )


def verification_text(found: Verification) -> str:
    """Whether a checkpoint is what it should be, and what was looked at."""
    count = len(found.problems)
    verdict = "ok" if found.ok else f"{plural(count, 'problem')}: {clipped(found.problems[0])}"
    return (
        f"<Verification: {verdict}; {found.tensors_merged} tensors computed again, "
        f"{found.tensors_copied + found.tensors_replaced} compared{_noticed(found.warnings)}>"
    )


def _noticed(warnings: Sequence[str]) -> str:
    return f"; {plural(len(warnings), 'warning')}" if warnings else ""


def listing_text(listing: AdapterListing | CheckpointListing) -> str:
    """What lies where, and how large it is."""
    return (
        f"<{type(listing).__name__}: {clipped(listing.path, 96)}; "
        f"{plural(len(listing['tensors']), 'tensor')} in {plural(len(listing['files']), 'file')}, "
        f"{listing.total_parameters:,} parameters>"
    )


def fleet_text(fleet: Fleet) -> str:
    """How many adapters and modules, and what could not be read."""
    parts = [plural(len(fleet), "adapter"), plural(fleet.modules.rows, "module")]
    if fleet.errors:
        parts.append(plural(len(fleet.errors), "error"))
    return f"<Fleet {', '.join(parts)}>"


def scan_diff_text(found: ScanDiff) -> str:
    """Which scans, and how many adapters have changed."""
    return f"<ScanDiff {clipped(found.before, 40)} → {clipped(found.after, 40)}: {found.summary}>"


def table_text(table: Table) -> str:
    """How many rows, and the columns."""
    return f"Table({plural(table.rows, 'row')}: {', '.join(table)})"


def similarity_text(similarity: Similarity) -> str:
    """How many adapters, and what was measured of them."""
    parts = [plural(len(similarity), "adapter"), f"{similarity.metric}"]
    parts.append(plural(len(similarity.modules), "module"))
    if len(similarity.groups) > 1:
        parts.append(f"{len(similarity.groups)} bases")
    if similarity.errors:
        parts.append(plural(len(similarity.errors), "error"))
    return f"<Similarity of {', '.join(parts)}>"


def duplicates_text(found: Duplicates) -> str:
    """How many groups, and how many adapters could go."""
    return (
        f"<Duplicates: {plural(len(found), 'group')}, {found.redundant:,} of "
        f"{plural(len(found.names), 'adapter')} could go>"
    )


def trajectory_text(found: Trajectory) -> str:
    """The checkpoints in order, or of many the first and the last."""
    names = [clipped(name, 32) for name in found.names]
    if len(names) > SOME + 1:
        names[2:-1] = ["…"]
    return f"<Trajectory of {plural(len(found.steps), 'checkpoint')}: {' → '.join(names)}>"
