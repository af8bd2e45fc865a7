"""Results in a line, and in a notebook."""

from __future__ import annotations

import html
import math
from collections.abc import Iterable
from typing import TYPE_CHECKING

from lorafast._analysis.findings import finding_counts
from lorafast._report.text import format_residual
from lorafast._results import Result

if TYPE_CHECKING:
    from lorafast._analysis.records import Finding
    from lorafast._analysis.results import AdapterAnalysis, Comparison
    from lorafast._merge.report import MergeReport
    from lorafast._merge.subtract import SubtractReport
    from lorafast._similarity.lineage import Lineage

#: Findings that a notebook shows.
MAX_FINDINGS = 10
#: Terms of a combination in words, …
MAX_TERMS = 8
#: … of which those of less than this share of the target's norm are left out.
WORTH_A_WORD = 0.01


def findings_text(findings: Iterable[Finding], *, none: str = "no findings") -> str:
    """`2 critical, 1 warning`, or that there are none."""
    parts = [
        f"{count:,} {severity}{'s' * (count != 1 and severity != 'critical')}"
        for severity, count in finding_counts(findings).items()
        if count
    ]
    return ", ".join(parts) or none


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


def lineage_text(lineage: Lineage) -> str:
    """The combination in words: `0.70·A + 0.30·B, residual 0.2 %`."""
    shares = lineage.contributions
    paths = [path for path, share in shares.items() if abs(share) >= WORTH_A_WORD]
    paths.sort(key=lambda path: -abs(shares[path]))
    text = ""
    for path in paths[:MAX_TERMS]:
        weight = lineage.coefficients[path]
        sign = ("−" if weight < 0 else "") if not text else (" − " if weight < 0 else " + ")
        text += f"{sign}{abs(weight):.2f}·{lineage.names[path]}"
    if len(paths) > MAX_TERMS:
        text += f" and {len(paths) - MAX_TERMS} more"
    return f"{text or 'none of the candidates'}, residual {format_residual(lineage.residual)}"


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


def notebook_line(result: Result) -> str:
    """The `_repr_html_` of a result: its line."""
    return f"<div><p>{_line(result)}</p></div>"


def notebook_findings(result: AdapterAnalysis | Comparison) -> str:
    """The line, and the findings as a list."""
    items = "".join(
        f"<li><b>{finding.severity}</b> {html.escape(finding.module or '')} "
        f"{html.escape(finding.reason)}</li>"
        for finding in result.findings[:MAX_FINDINGS]
    )
    more = len(result.findings) - MAX_FINDINGS
    if more > 0:
        items += f"<li>… and {more} more</li>"
    return f"<div><p>{_line(result)}</p>" + (f"<ul>{items}</ul>" if items else "") + "</div>"


def notebook_page(result: MergeReport | SubtractReport) -> str:
    """The page of a merge or a subtraction, as it stands beside the output."""
    return f"<pre>{html.escape(result.to_markdown())}</pre>"


def _line(result: Result) -> str:
    return html.escape(repr(result).removeprefix("<").removesuffix(">"))
