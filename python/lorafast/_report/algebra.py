"""The page of an adapter that was computed: result, error, and every module's rank."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._report.cells import LONGEST_REASON, cell, code, table
from lorafast._report.text import format_number, format_percent

if TYPE_CHECKING:
    from lorafast._algebra.report import AlgebraReport

#: A path is shown whole for as long as it can be opened by hand.
LONGEST_PATH = 1000
TITLES = {
    "CombineReport": "Combined adapters",
    "ResizeReport": "Resized adapter",
    "BakeReport": "Baked adapter",
    "ExtractReport": "Extracted adapter",
}


def algebra_page(report: AlgebraReport) -> str:
    """The page, in which nothing that came from strangers' files is markup."""
    lines = [f"# {TITLES.get(type(report).__name__, 'Computed adapter')}", ""]
    written = [module.rank for module in report.modules.values() if module.rank]
    facts = {
        "Made from": "<br>".join(code(path, LONGEST_PATH) for path in report.inputs),
        "Output": code(report.output, LONGEST_PATH),
        "Format": f"{cell(report.target_format)}, {cell(report.dtype)}",
        "Modules": f"{len(written)} of {len(report.modules)}",
        "Ranks": f"{min(written)} to {max(written)}, {sum(written):,} in all" if written else "-",
        "Size of the factors": f"{report.bytes / 1e6:,.2f} MB",
        "Error": f"{format_number(report.error, 4)} of ‖ΔW‖ over all modules",
    }
    if report.budget is not None:
        budget = report.budget
        gap = "the best choice of ranks" if budget.gap == 0 else f"within {budget.gap:.3g} of it"
        facts["Budget"] = f"{budget.spent:,} of {budget.amount:,} {cell(budget.measure)}; {gap}"
    lines += table(["", ""], facts.items(), right=False)
    if report.lost:
        lines += ["", "## Left out", ""]
        lines += [f"- {cell(each, LONGEST_REASON)}" for each in report.lost]
    if report.notes:
        lines += ["", "## Notes", ""]
        lines += [f"- {cell(each, LONGEST_REASON)}" for each in report.notes]
    headers = ["Module", "Shape", "Rank before", "Rank", "Σσ² kept", "Error", "‖ΔW‖"]
    rows = [
        [
            code(name),
            f"{module.shape[0]} × {module.shape[1]}",
            str(module.source_rank),
            str(module.rank) if module.rank else "left out",
            format_percent(module.kept),
            format_number(module.error, 3),
            format_number(module.norm, 4),
        ]
        for name, module in report.modules.items()
    ]
    lines += ["", "## Modules", "", *table(headers, rows)]
    return "\n".join(lines) + "\n"
