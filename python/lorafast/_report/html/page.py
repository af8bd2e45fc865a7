"""The report of an analysis or a comparison as one HTML document.

The document loads nothing: style, script and pictures are in it, and its content security policy
forbids the rest. Whatever comes from a file (names, configs) is escaped by `element`.
"""

from __future__ import annotations

from lorafast._analysis.records import AdapterAnalysis, Comparison
from lorafast._report.html import analysis, comparison


def page(subject: AdapterAnalysis | Comparison) -> str:
    """The report of an analysis or a comparison, findings first.

    Plots are in it where matplotlib is installed; where it is not, a sentence says so.

    Args:
        subject: an analysis or a comparison.

    Returns:
        A whole HTML document in UTF-8.
    """
    if isinstance(subject, Comparison):
        return comparison.page(subject)
    return analysis.page(subject)
