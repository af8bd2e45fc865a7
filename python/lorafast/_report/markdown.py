"""Markdown pages of an analysis and of a comparison: findings first, under 200 lines.

Where an adapter has more to show than fits, the page shows the greatest and says how many it left
out; the JSON has everything.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lorafast._analysis.findings import KINDS, one_of_each_kind
from lorafast._analysis.records import Finding, ModuleAnalysis, ModuleComparison
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._report.cells import LONGEST_REASON, cell, code, table
from lorafast._report.text import ABSENT, NO_PAIRS, format_number, format_range

#: Rows of the tables, so that the page stays under 200 lines.
MAX_FINDINGS = 20
MAX_LAYERS = 30
MAX_BLOCKS = 48
MAX_MODULES = 12
MAX_ADAPTERS = 16


def analysis_page(analysis: AdapterAnalysis) -> str:
    """The page of an analysis."""
    return "\n".join(_analysis(analysis)) + "\n"


def comparison_page(comparison: Comparison) -> str:
    """The page of a comparison."""
    return "\n".join(_comparison(comparison)) + "\n"


def findings_section(findings: Sequence[Finding]) -> list[str]:
    """The findings, those of one kind in one line with the one of the greatest value."""
    if not findings:
        return ["## Findings", "", "Nothing out of the ordinary."]
    groups = one_of_each_kind(findings)
    lines = ["## Findings", ""]
    for worst, count in groups[:MAX_FINDINGS]:
        where = f"{code(worst.module)}: " if worst.module is not None else ""
        text = f"- **{worst.severity}** · {KINDS[worst.kind]}: {where}"
        text += cell(worst.reason, LONGEST_REASON)
        lines.append(text + (f" *({count} of these)*" if count > 1 else ""))
    rest = len(groups) - MAX_FINDINGS
    if rest > 0:
        lines.append(f"- and {rest} more")
    return lines


def mean(values: Iterable[float]) -> float:
    """The mean of the finite values; NaN of none."""
    finite = [value for value in values if math.isfinite(value)]
    return math.fsum(finite) / len(finite) if finite else math.nan


def greatest(values: Iterable[float]) -> float:
    """The greatest of the finite values; NaN of none."""
    return max((value for value in values if math.isfinite(value)), default=math.nan)


def _analysis(analysis: AdapterAnalysis) -> list[str]:
    summary, weights = analysis.summary, analysis.weights
    facts = {
        "Adapter": code(analysis.path),
        "Base": code(summary["base"]) if summary["base"] else ABSENT,
        "Modules": f"{summary['modules']:,}",
        "Parameters": f"{summary['total_parameters']:,} ({', '.join(summary['dtypes'])})",
        "Rank": format_range(summary["ranks"]),
        "α": format_range(summary["alphas"]),
        "Scale s": format_range(summary["scalings"]),
        "‖ΔW‖ (all modules)": format_number(summary["frobenius_norm"]),
        "σ₁, median and greatest": f"{format_number(summary['median_spectral_norm'])}, "
        f"{format_number(summary['max_spectral_norm'])}",
        "Effective rank, mean": format_number(summary["mean_effective_rank"]),
    }
    lines = [f"# LoRA analysis: {cell(analysis.name)}", ""]
    lines += [*findings_section(analysis.findings), "", "## Summary", ""]
    lines += table(["", ""], ([key, value] for key, value in facts.items()))
    lines += ["", "## Stored weights", ""]
    columns = {
        "mean": weights.mean,
        "std": weights.std,
        "min": weights.min,
        **{f"{key:g} %": value for key, value in weights.percentiles.items() if 1 <= key <= 99},
        "max": weights.max,
        "zeros": weights.zero_share,
        "not finite": float(weights.non_finite),
    }
    lines += table(list(columns), [[format_number(value) for value in columns.values()]])
    modules = list(analysis.modules.values())
    if modules:
        lines += ["", "## Layers", "", *_groups(modules, "layer", lambda m: m.layer, MAX_LAYERS)]
        blocks = [module for module in modules if module.block is not None]
        if blocks:
            lines += ["", "## Blocks", ""]
            lines += _groups(blocks, "block", lambda m: m.block, MAX_BLOCKS)
        lines += ["", "## Largest updates", "", *_largest(modules)]
        lines += [
            "",
            "Figures of modules are of ΔW = s·B·A, the scale included. ‖ΔW‖ = √Σσ²; stable rank "
            "Σσ²/σ₁²; effective rank exp H(σ/Σσ) (Roy & Vetterli 2007); k₉₉: directions that hold "
            "99 % of Σσ². Percentiles are those of the stored values.",
        ]
    return lines


def _groups(
    modules: Sequence[ModuleAnalysis],
    name: str,
    key: Callable[[ModuleAnalysis], Any],
    most: int,
) -> list[str]:
    """A table of modules taken together: a row for each value of `key`."""
    groups: dict[Any, list[ModuleAnalysis]] = {}
    for module in modules:
        groups.setdefault(key(module), []).append(module)
    order = sorted(groups) if name == "block" else list(groups)
    relative = any(module.relative_norm is not None for module in modules)
    headers = [name, "modules", "rank", "‖ΔW‖ mean", "σ₁ max", "stable rank", "effective rank"]
    headers += ["k₉₉ mean", *(["‖ΔW‖/‖W₀‖ mean"] if relative else [])]
    rows = []
    for value in order[:most]:
        group = groups[value]
        row = [
            code(value),
            str(len(group)),
            format_range(module.rank for module in group),
            format_number(mean(module.frobenius_norm for module in group)),
            format_number(greatest(module.spectral_norm for module in group)),
            format_number(mean(module.stable_rank for module in group)),
            format_number(mean(module.effective_rank for module in group)),
            format_number(mean(module.k99 for module in group)),
        ]
        if relative:
            known = (module.relative_norm for module in group)
            row.append(format_number(mean(value for value in known if value is not None)))
        rows.append(row)
    lines = table(headers, rows)
    if len(order) > most:
        lines += ["", f"{len(order) - most} more {name}s are left out here."]
    return lines


def _largest(modules: Sequence[ModuleAnalysis]) -> list[str]:
    finite = [module for module in modules if math.isfinite(module.frobenius_norm)]
    finite.sort(key=lambda module: -module.frobenius_norm)
    headers = ["module", "out × in", "rank", "‖ΔW‖", "σ₁", "stable rank", "effective rank", "k₉₉"]
    rows = (
        [
            code(module.path),
            f"{module.shape[0]} × {module.shape[1]}",
            str(module.rank),
            format_number(module.frobenius_norm),
            format_number(module.spectral_norm),
            format_number(module.stable_rank),
            format_number(module.effective_rank),
            str(module.k99),
        ]
        for module in finite[:MAX_MODULES]
    )
    return table(headers, rows)


def _comparison(comparison: Comparison) -> list[str]:
    names = comparison.names
    shown = names[:MAX_ADAPTERS]
    lines = [f"# LoRA comparison of {len(names)} adapters", ""]
    findings = list(comparison.findings)
    lines += findings_section(findings)
    critical = [
        f"{cell(analysis.name)}: {cell(finding.reason, LONGEST_REASON)}"
        for analysis in comparison.analyses
        for finding in analysis.findings
        if finding.severity == "critical"
    ]
    lines += [f"- **critical** · {text}" for text in critical[:MAX_FINDINGS]]
    lines += ["", "## Adapters", ""]
    headers = ["adapter", "modules", "parameters", "rank", "scale", "‖ΔW‖", "mean", "std"]
    headers += ["effective rank", "findings"]
    rows = []
    for analysis in comparison.analyses[:MAX_ADAPTERS]:
        summary = analysis.summary
        rows.append(
            [
                cell(analysis.name),
                f"{summary['modules']:,}",
                f"{summary['total_parameters']:,}",
                format_range(summary["ranks"]),
                format_range(summary["scalings"]),
                format_number(summary["frobenius_norm"]),
                format_number(analysis.weights.mean),
                format_number(analysis.weights.std),
                format_number(summary["mean_effective_rank"]),
                str(len(analysis.findings)),
            ]
        )
    lines += table(headers, rows)
    lines += ["", "## Cosine of the whole updates", ""]
    cosines = (
        [
            f"{i + 1}. {cell(name)}",
            *(format_number(float(value)) for value in comparison.cosine[i, : len(shown)]),
        ]
        for i, name in enumerate(shown)
    )
    lines += table(["", *(str(i + 1) for i in range(len(shown)))], cosines)
    if len(names) > len(shown):
        lines += ["", f"{len(names) - len(shown)} more adapters are left out here."]
    shared = {path: module for path, module in comparison.modules.items() if module.pairs}
    if not comparison.modules_compared:
        lines += ["", NO_PAIRS]
    elif shared:
        lines += ["", "## Modules of the most aligned updates", "", *_modules(shared)]
    for name, paths in list(comparison.only_in.items())[:MAX_ADAPTERS]:
        if paths:
            some = ", ".join(code(path) for path in paths[:4])
            rest = f" and {len(paths) - 4} more" if len(paths) > 4 else ""
            lines += ["", f"Not in all the others, but in {cell(name)}: {some}{rest}."]
    lines += [
        "",
        "Cosines are of ΔW = s·B·A, whatever the ranks. φ is the subspace similarity of the LoRA "
        "paper (§7.2) of the whole output subspaces, beside what random subspaces would have.",
    ]
    return lines


def _modules(modules: Mapping[str, ModuleComparison]) -> list[str]:
    def strength(module: ModuleComparison) -> float:
        known = [abs(p.cosine) for p in module.pairs if math.isfinite(p.cosine)]
        return max(known, default=-1.0)

    ordered = sorted(modules.values(), key=lambda module: -strength(module))
    rows = []
    for module in ordered[:MAX_MODULES]:
        pair = max(module.pairs, key=lambda p: abs(p.cosine) if math.isfinite(p.cosine) else -1.0)
        i, j = pair.first, pair.second
        rows.append(
            [
                code(module.path),
                f"{i + 1}, {j + 1}",
                f"{format_number(module.norms[i])}, {format_number(module.norms[j])}",
                format_number(pair.cosine),
                format_number(float(module.subspace[i, j])),
                format_number(float(module.subspace_expected[i, j])),
                format_number(pair.sign_agreement),
            ]
        )
    headers = ["module", "adapters", "‖ΔW‖", "cosine", "φ", "φ random", "sign agreement"]
    return table(headers, rows)
