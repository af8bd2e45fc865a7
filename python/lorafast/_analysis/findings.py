"""Findings: the rules for what an expert would point at in an adapter, and their thresholds.

Every finding follows from figures of ΔW = s·B·A or from the config; none is an opinion about what
the adapter was trained for. Which modules change nothing, and why, the core says as a merge does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from statistics import median
from typing import TypeVar, get_args

from lorafast._analysis.explanations import EXPLANATIONS
from lorafast._analysis.records import Finding, ModuleAnalysis, TensorStatistics
from lorafast._types import Severity
from lorafast._words import agree, plural

Item = TypeVar("Item")

#: Scales s that trainers choose: alpha from r/4 to 16·r.
ORDINARY_SCALING = (0.25, 16.0)
#: The scale that mlx-lm sets where nobody asks for another.
MLX_SCALING = 20.0
#: Ranks above this are rare, and cost more than they are known to bring (LoRA, §7.2).
LARGEST_ORDINARY_RANK = 512
#: ‖ΔW‖ below this share of the adapter's median: the module has practically not been trained.
DEAD_SHARE = 1e-3
#: σ₁ above this many times the adapter's median σ₁.
SPECTRAL_OUTLIER = 10.0
#: The rank counts as mostly unused where k₉₉ is at most this share of it.
UNUSED_RANK_SHARE = 0.25
#: The rank counts as exhausted where k₉₀ is at least this share of it: no direction is idle.
EXHAUSTED_RANK_SHARE = 0.85
#: Below this rank neither of the two says anything.
MIN_RANK_TO_JUDGE = 4
#: One module with more than this share of Σ‖ΔW‖².
DOMINANT_SHARE = 0.5
#: Fewer modules than this have no meaningful median and no meaningful shares.
MIN_MODULES_TO_JUDGE = 4
#: ‖ΔW‖/‖W₀‖ above this: the update is as large as what it changes.
OVERWHELMING_RELATIVE_NORM = 1.0
#: Updates of a greater cosine than this are one update but for rounding and scale.
DUPLICATE_COSINE = 0.999

#: From the one that weighs most to the one that weighs least.
SEVERITIES: tuple[Severity, ...] = get_args(Severity)

#: The kinds of finding, each with what it means in a few words.
KINDS: dict[str, str] = {kind: entry.meaning for kind, entry in EXPLANATIONS.items()}


def findings_of_adapter(
    modules: dict[str, ModuleAnalysis],
    tensors: dict[str, TensorStatistics],
    features: Sequence[str],
    notes: Sequence[str],
) -> list[Finding]:
    """The findings of one adapter, the most severe first, then in the order of `KINDS`."""
    found = list(_of_tensors(tensors))
    found += _of_scales(modules)
    found += _of_updates(modules)
    found += _of_ranks(modules)
    found += [Finding("note", "feature", None, None, f"{_capital(text)}.") for text in features]
    found += [Finding("note", "unmeasured", None, None, f"{_capital(text)}.") for text in notes]
    if not modules:
        reason = "The adapter holds no pair of low-rank factors."
        found.append(Finding("critical", "no_modules", None, 0.0, reason))
    return in_order(found)


def in_order(findings: Iterable[Finding]) -> list[Finding]:
    """The most severe first, then by kind; otherwise as they were found."""
    places = {kind: place for place, kind in enumerate(KINDS)}
    return sorted(findings, key=lambda f: (SEVERITIES.index(f.severity), places[f.kind]))


def finding_counts(findings: Iterable[Finding]) -> Mapping[Severity, int]:
    """How many findings there are of each severity, the critical first."""
    counts = dict.fromkeys(SEVERITIES, 0)
    for finding in findings:
        counts[finding.severity] += 1
    return counts


def group_findings(
    items: Iterable[Item],
    of: Callable[[Item], Finding],
    apart: Callable[[Item], Hashable] = lambda _: None,
) -> list[list[Item]]:
    """Findings of one severity and kind together, the most severe first, otherwise as they come.

    Args:
        items: findings, or what holds one each.
        of: the finding of an item.
        apart: what keeps items of one severity and kind in groups of their own.
    """
    groups: dict[tuple[Hashable, ...], list[Item]] = {}
    for item in sorted(items, key=lambda item: SEVERITIES.index(of(item).severity)):
        finding = of(item)
        groups.setdefault((apart(item), finding.severity, finding.kind), []).append(item)
    return list(groups.values())


def with_counts(
    findings: Iterable[Finding], apart: Callable[[Finding], Hashable]
) -> list[tuple[Finding, int]]:
    """Findings of one kind as one: that of the greatest value, and how many there are."""
    groups = group_findings(findings, lambda finding: finding, apart)
    return [(max(group, key=_magnitude), len(group)) for group in groups]


def one_of_each_kind(findings: Iterable[Finding]) -> list[tuple[Finding, int]]:
    """`with_counts` for a person; findings about no module differ in what they say, and stay."""
    return with_counts(findings, lambda f: f.reason if f.module is None else None)


def _magnitude(finding: Finding) -> float:
    value = finding.value
    return -math.inf if value is None or math.isnan(value) else abs(value)


def _of_tensors(tensors: dict[str, TensorStatistics]) -> Iterable[Finding]:
    for name, statistics in tensors.items():
        if statistics.non_finite:
            yield Finding(
                "critical",
                "non_finite",
                name,
                float(statistics.non_finite),
                f"{statistics.non_finite:,} of {plural(statistics.count, 'value')} of {name} "
                f"{agree(statistics.non_finite, 'is', 'are')} NaN or infinite; whatever it is "
                "merged into breaks.",
            )


def _of_scales(modules: dict[str, ModuleAnalysis]) -> Iterable[Finding]:
    groups: dict[tuple[float, int, float, bool], list[str]] = {}
    for path, module in modules.items():
        is_nothing = module.scaling == 0 and module.zero_cause is not None
        key = (module.alpha, module.rank, module.scaling, is_nothing)
        groups.setdefault(key, []).append(path)
    for (alpha, rank, scaling, is_nothing), paths in groups.items():
        where = None if len(paths) == len(modules) else paths[0]
        # Of one module the finding is about that one.
        several = f"{plural(len(paths), 'module')} (the first: {paths[0]})"
        who = f"{several} have" if where is not None and len(paths) > 1 else "It has"
        if where is None:
            who = "Every module has" if len(paths) > 1 else "The only module has"
        what = f"{who} alpha {alpha:g} and rank {rank}, a scale of {scaling:g}"
        low, high = ORDINARY_SCALING
        if is_nothing:
            reason = f"{what}: the update is zero whatever was trained."
            yield Finding("critical", "zero_scale", where, scaling, reason)
        elif scaling == 0:
            reason = f"{what}: the product B·A adds nothing, whatever was trained."
            yield Finding("warning", "unusual_scale", where, scaling, reason)
        elif scaling < 0:
            reason = f"{what}: it subtracts what was trained."
            yield Finding("warning", "unusual_scale", where, scaling, reason)
        elif not low <= scaling <= high and scaling != MLX_SCALING and not math.isnan(scaling):
            reason = f"{what}; usual are {low:g} to {high:g}."
            yield Finding("warning", "unusual_scale", where, scaling, reason)
        if rank > LARGEST_ORDINARY_RANK:
            reason = f"{who} rank {rank}; more than {LARGEST_ORDINARY_RANK} is rare."
            yield Finding("warning", "unusual_rank", where, float(rank), reason)
    for path, module in modules.items():
        if module.rank > min(module.shape):
            reason = (
                f"Rank {module.rank} is more than a weight of shape {list(module.shape)} can have."
            )
            yield Finding("warning", "unusual_rank", path, float(module.rank), reason)


def _of_updates(modules: dict[str, ModuleAnalysis]) -> Iterable[Finding]:
    finite = {p: m for p, m in modules.items() if math.isfinite(m.frobenius_norm)}
    alive = {p: m for p, m in finite.items() if m.frobenius_norm > 0}
    # What a scale of zero does is a finding of its own.
    nothing = {p: m for p, m in modules.items() if m.zero_cause is not None and m.scaling != 0}
    if nothing and all(module.zero_cause is not None for module in modules.values()):
        causes: dict[str, list[str]] = {}
        for path, module in modules.items():
            causes.setdefault(str(module.zero_cause), []).append(path)
        told = "; ".join(
            f"{cause} in {len(paths)} of {plural(len(modules), 'module')} (the first: {paths[0]})"
            for cause, paths in causes.items()
        )
        reason = f"Every update is zero, and merging the modules changes nothing: {told}."
        yield Finding("critical", "untrained", None, 0.0, reason)
        return
    for path, module in nothing.items():
        reason = f"{_capital(str(module.zero_cause))}: merging the module changes nothing."
        yield Finding("warning", "zero_update", path, 0.0, reason)
    for path, module in finite.items():
        if module.relative_norm is not None and module.relative_norm > OVERWHELMING_RELATIVE_NORM:
            reason = f"‖ΔW‖ is {module.relative_norm:.3g} times ‖W₀‖."
            yield Finding("warning", "overwhelming_update", path, module.relative_norm, reason)
    yield from _dead(finite, alive)
    if len(alive) < MIN_MODULES_TO_JUDGE:
        return
    typical_spectral = median(module.spectral_norm for module in alive.values())
    largest = max(module.frobenius_norm for module in alive.values())
    # Relative to the largest, squares neither over- nor underflow.
    squares = {p: (m.frobenius_norm / largest) ** 2 for p, m in alive.items()}
    energy = math.fsum(squares.values())
    for path, module in alive.items():
        ratio = module.spectral_norm / typical_spectral
        if ratio > SPECTRAL_OUTLIER:
            reason = (
                f"σ₁ = {module.spectral_norm:.4g} is {ratio:.3g} times the adapter's median "
                f"({typical_spectral:.4g})."
            )
            yield Finding("warning", "spectral_outlier", path, ratio, reason)
        part = squares[path] / energy
        if part > DOMINANT_SHARE:
            reason = f"This one of {plural(len(alive), 'module')} carries {part:.1%} of Σ‖ΔW‖²."
            yield Finding("warning", "dominant_module", path, part, reason)


def _dead(finite: dict[str, ModuleAnalysis], alive: dict[str, ModuleAnalysis]) -> Iterable[Finding]:
    """Modules whose change is next to nothing.

    A magnitude changes the weight whatever the product is, so that of DoRA only a base tells.
    """
    sizes = {path: module.frobenius_norm for path, module in alive.items() if not module.rescaled}
    for path, module in finite.items():
        if module.rescaled and module.change_norm is not None:
            sizes[path] = module.change_norm
    known = [size for size in sizes.values() if 0 < size < math.inf]
    if len(known) < MIN_MODULES_TO_JUDGE:
        return
    typical = median(known)
    for path, size in sizes.items():
        share = size / typical
        if share < DEAD_SHARE:
            what = "‖W′ − W₀‖" if finite[path].rescaled else "‖ΔW‖"
            reason = f"{what} is {share:.1e} of the adapter's median: practically not trained."
            yield Finding("warning", "dead_module", path, share, reason)


def _of_ranks(modules: dict[str, ModuleAnalysis]) -> Iterable[Finding]:
    for path, module in modules.items():
        # What is made of a whole weight has no factors whose rank could be judged.
        possible = 0 if module.made_of_weight else len(module.singular_values)
        if possible < MIN_RANK_TO_JUDGE or not module.frobenius_norm > 0:
            continue
        if module.k99 <= UNUSED_RANK_SHARE * possible:
            reason = (
                f"{module.k99} of {possible} directions {agree(module.k99, 'holds', 'hold')} 99 % "
                "of the energy; "
                "a smaller rank would do."
            )
            yield Finding("note", "unused_rank", path, float(module.k99), reason)
        elif module.k90 >= EXHAUSTED_RANK_SHARE * possible:
            reason = (
                f"{module.k90} of {possible} directions {agree(module.k90, 'is', 'are')} needed "
                "for 90 % of the energy; a larger rank might fit better."
            )
            yield Finding("note", "exhausted_rank", path, float(module.k90), reason)


def findings_of_comparison(
    names: Sequence[str],
    cosine: Sequence[Sequence[float]],
    only_in: dict[str, list[str]],
    notes: Sequence[str],
) -> list[Finding]:
    """The findings that only a comparison can make."""
    found = []
    for i, first in enumerate(names):
        for j in range(i + 1, len(names)):
            value = float(cosine[i][j])
            if abs(value) > DUPLICATE_COSINE:
                kind, relation = (
                    ("duplicate", "one update up to scale")
                    if value > 0
                    else ("opposite", "one update with opposite signs")
                )
                reason = f"{first} and {names[j]} are {relation}: their cosine is {value:.6f}."
                found.append(Finding("warning", kind, None, value, reason))
    for name, paths in only_in.items():
        if paths:
            reason = (
                f"{name} has {plural(len(paths), 'module')} that not all the others have "
                f"(the first: {paths[0]})."
            )
            found.append(Finding("note", "different_modules", None, float(len(paths)), reason))
    found += [Finding("warning", "unmeasured", None, None, f"{_capital(n)}.") for n in notes]
    return in_order(found)


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]
