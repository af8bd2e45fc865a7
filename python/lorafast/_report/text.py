"""Analyses and comparisons in a line, and in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

from lorafast._analysis.records import finding_counts

if TYPE_CHECKING:
    from lorafast._analysis.records import Finding
    from lorafast._analysis.results import AdapterAnalysis, Comparison


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


def analysis_text(analysis: AdapterAnalysis) -> str:
    """The `__repr__`: what it is, how large, and whether there is anything to look at."""
    summary = analysis.summary
    ranks = ", ".join(map(str, summary["ranks"])) or "none"
    return (
        f"<AdapterAnalysis {analysis.name!r}: {summary['modules']} modules of rank {ranks}, "
        f"{summary['total_parameters']:,} parameters, ‖ΔW‖ = {summary['frobenius_norm']:.4g}; "
        f"{findings_text(analysis.findings)}>"
    )


def comparison_text(comparison: Comparison) -> str:
    """The `__repr__` of a comparison."""
    count, names = len(comparison.names), ", ".join(map(repr, comparison.names[:4]))
    return (
        f"<Comparison of {count} adapters ({names}{', …' * (count > 4)}): "
        f"{len(comparison.modules)} modules, mean cosine {mean_cosine(comparison):.4g}; "
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


def notebook(result: AdapterAnalysis | Comparison) -> str:
    """The `_repr_html_` of a notebook: the line, and the findings as a list."""
    items = "".join(
        f"<li><b>{finding.severity}</b> {html.escape(finding.module or '')} "
        f"{html.escape(finding.reason)}</li>"
        for finding in result.findings[:10]
    )
    more = len(result.findings) - 10
    if more > 0:
        items += f"<li>… and {more} more</li>"
    text = html.escape(repr(result).strip("<>"))
    return f"<div><p>{text}</p>" + (f"<ul>{items}</ul>" if items else "") + "</div>"
