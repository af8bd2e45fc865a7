"""Page of a comparison of several adapters."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import numpy as np

from lorafast._analysis.records import ModuleComparison
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._report.html.elements import (
    Column,
    Html,
    Section,
    document,
    element,
    folded,
    join,
    natural,
    roving,
    row_ids,
    section,
    table,
)
from lorafast._report.html.findings import Found, Targets, findings
from lorafast._report.html.pictures import plots
from lorafast._report.html.subsets import architectures_of, subset
from lorafast._report.palette import NEGATIVE, POSITIVE, cosine_end
from lorafast._report.plots.comparison import MAX_TABLE
from lorafast._report.text import NO_PAIRS, format_value

if TYPE_CHECKING:
    from numpy.typing import NDArray

    Values = NDArray[np.float64]

#: Up to so many adapters have columns of their own in the table of modules.
OWN_COLUMNS = 6

COSINE = "⟨X, Y⟩/(‖X‖·‖Y‖), exact, of two adapters' updates of the module."
SIGN = "Share of entries that both change in the same direction, of those that both change."
PHI = "φ = ‖UᵢᵀUⱼ‖²/min(rᵢ, rⱼ) of the output subspaces (LoRA, §7.2)."
CHANCE = "What φ is expected to be for random subspaces: max(rᵢ, rⱼ)/d."

ADAPTER_COLUMNS: list[Column[tuple[str, AdapterAnalysis]]] = [
    Column("adapter", "Name of the adapter.", lambda a: a[0]),
    Column("modules", "Modules that it updates.", lambda a: a[1].summary["modules"]),
    Column("parameters", "Stored values.", lambda a: a[1].weights.count),
    Column("‖ΔW‖", "Frobenius norm of all updates together: √Σ‖ΔW‖².",
           lambda a: _number(a[1].summary.get("frobenius_norm"))),
    Column("max σ₁", "The greatest spectral norm of a module.",
           lambda a: _number(a[1].summary.get("max_spectral_norm"))),
    Column("mean effective rank", "Mean over modules of Roy and Vetterli's exp H(σ/Σσ).",
           lambda a: _number(a[1].summary.get("mean_effective_rank"))),
    Column("mean", "Mean of the stored weights.", lambda a: a[1].weights.mean),
    Column("std", "Standard deviation of the stored weights.", lambda a: a[1].weights.std),
    Column("min", "The least stored weight.", lambda a: a[1].weights.min),
    Column("max", "The greatest stored weight.", lambda a: a[1].weights.max),
    Column("not finite", "Number of NaN and infinities.", lambda a: a[1].weights.non_finite),
    Column("findings", "Number of findings.", lambda a: len(a[1].findings)),
]  # fmt: skip


def _number(value: object) -> float | None:
    return value if isinstance(value, int | float) else None


def page(comparison: Comparison) -> str:
    """The report of several adapters."""
    pairs = list(zip(comparison.names, comparison.analyses, strict=True))
    modules = sorted(comparison.modules.values(), key=lambda module: natural(module.path))
    found = [Found(None, finding) for finding in comparison.findings]
    found += [Found(name, finding) for name, a in pairs for finding in a.findings]
    adapter_ids = row_ids("adapter", len(pairs))
    module_ids = row_ids("module", len(modules))
    cosines = section("Cosine of the updates", _matrices(comparison))
    only_in = _only_in(comparison)
    targets = Targets(
        adapters=dict(zip(comparison.names, adapter_ids, strict=True)),
        modules=_rows_of_modules(pairs, modules, module_ids),
        kinds={
            **dict.fromkeys(("duplicate", "opposite"), (cosines.identifier, "to the cosines")),
            "different_modules": (only_in.identifier, "to the modules"),
        },
    )
    return document(
        f"Comparison of {len(pairs)} adapters",
        findings(found, targets),
        section("Adapters", table(pairs, ADAPTER_COLUMNS, "adapters", adapter_ids)),
        cosines,
        plots(comparison),
        section(
            "Modules",
            _note(comparison),
            table(modules, _columns(comparison), "modules", module_ids),
        ),
        only_in,
    )


def _note(comparison: Comparison) -> str:
    """Why there are no cosines of modules, where there are none."""
    if comparison.modules_compared:
        return ""
    return element("p", NO_PAIRS, class_="quiet")


def _rows_of_modules(
    pairs: Sequence[tuple[str, AdapterAnalysis]],
    modules: Sequence[ModuleComparison],
    ids: Sequence[str],
) -> dict[str, str]:
    """The ids of the rows of modules, by their paths and by the names of their tensors."""
    rows = {module.path: row for module, row in zip(modules, ids, strict=True)}
    tensors = {
        tensor: rows[path]
        for _, analysis in pairs
        for path, module in analysis.modules.items()
        if path in rows
        for tensor in (module.a_name, module.b_name)
    }
    return {**tensors, **rows}


def _matrices(comparison: Comparison) -> Html:
    """The cosines of the adapters of each architecture, which means nothing across them."""
    found = architectures_of(comparison)
    explained = element(
        "p",
        "⟨X, Y⟩/(‖X‖·‖Y‖) of the whole updates: 1 the same direction, 0 nothing in common, "
        "−1 opposite. A module that only one adapter has is zero in the other.",
        class_="quiet",
    )
    if len(found) < 2:
        return join([explained, _matrix(comparison)])
    apart = "Adapters of different architectures are not compared: each of these has its own table."
    parts = [explained, element("p", apart, class_="quiet")]
    for architecture in found:
        parts.append(element("h3", architecture.label))
        if len(architecture.members) > 1:
            parts.append(_matrix(subset(comparison, architecture.members), architecture.label))
        else:
            name = comparison.names[architecture.members[0]]
            parts.append(element("p", element("b", name), " is the only one of its architecture."))
    return join(parts)


def _matrix(comparison: Comparison, label: str = "all adapters") -> Html:
    """The cosines as a table of colors, each with both names on hover."""
    names = comparison.names
    end = cosine_end(comparison.cosine)
    if len(names) > MAX_TABLE:
        return element("p", "The matrix is among the plots.")
    short = len(names) > 8
    head = element(
        "tr",
        element("td"),
        *(
            element("th", str(i + 1) if short else name, title=name, scope="col")
            for i, name in enumerate(names)
        ),
    )
    rows = [
        element(
            "tr",
            element("th", f"{i + 1}  {name}" if short else name, title=name, scope="row"),
            *(
                _cosine_cell(float(comparison.cosine[i, j]), f"{name} × {other}", end, i == j)
                for j, other in enumerate(names)
            ),
        )
        for i, name in enumerate(names)
    ]
    grid = element("table", element("thead", head), element("tbody", *rows), class_="matrix")
    return element(
        "div", grid, class_="scroll", tabindex="0", role="region", aria_label=f"Cosines of {label}"
    )


#: Of a cell's color: with no more of it, the text of both themes has enough contrast.
MAX_OPACITY = 0.62
#: Why two adapters have no cosine.
UNDEFINED = "an update is zero or not finite, or nothing tells which modules are the same"


def _cosine_cell(value: float, pair: str, end: float, is_itself: bool) -> Html:
    """A cell in the color of its sign, the stronger the greater the cosine; its own adapter's none.

    Args:
        value: the cosine.
        pair: both names.
        end: the magnitude of the full color.
        is_itself: whether the two are one adapter, whose cosine tells nothing.
    """
    if not math.isfinite(value):
        return element("td", title=f"{pair}: undefined, {UNDEFINED}")
    red, green, blue = bytes.fromhex((POSITIVE if value >= 0 else NEGATIVE).removeprefix("#"))
    opacity = MAX_OPACITY * min(1.0, abs(value) / end)
    return element(
        "td",
        f"{value:z.3f}",
        title=f"{pair}: cosine {value:.9g}",
        style=None if is_itself else f"background:rgba({red},{green},{blue},{opacity:.2f})",
        class_="quiet" if is_itself else None,
    )


def _columns(comparison: Comparison) -> list[Column[ModuleComparison]]:
    """What is said of a module: pair by pair for two adapters, in the range of pairs for more."""
    names = comparison.names
    columns: list[Column[ModuleComparison]] = [
        Column("module", "Path of the module.", lambda m: m.path),
        Column("shape", "Rows × columns of ΔW.", lambda m: f"{m.shape[0]}×{m.shape[1]}"),
    ]
    if len(names) > 2:
        meaning = "How many of the adapters have the module."
        columns.append(Column("adapters", meaning, lambda m: sum(m.present)))
        columns += [
            _pair_column("least cosine", f"Least over pairs: {COSINE}", "cosine", np.min),
            _pair_column("greatest cosine", f"Greatest over pairs: {COSINE}", "cosine", np.max),
        ]
    if not comparison.modules_compared:
        columns = columns[:2] + [each for each in columns[2:] if "cosine" not in each.title]
    elif len(names) > 1:
        of = "" if len(names) == 2 else "Mean over pairs: "
        columns += [
            _pair_column("mean cosine" if of else "cosine", of + COSINE, "cosine", np.mean),
            _pair_column("sign agreement", of + SIGN, "sign_agreement", np.mean),
            _pair_column("φ", of + PHI, "subspace", np.mean),
            _pair_column("φ of chance", of + CHANCE, "subspace_expected", np.mean),
        ]
    if len(names) <= OWN_COLUMNS:
        for i, name in enumerate(names):
            columns += [_norm_column(i, name), _rank_column(i, name)]
        return columns
    for word, reduce in (("least", min), ("greatest", max)):
        columns += [
            _range_column(
                f"{word} ‖ΔW‖", f"The {word} Frobenius norm of the update.", "norms", reduce
            ),
            _range_column(f"{word} r", f"The {word} rank of the update.", "ranks", reduce),
        ]
    return columns


def _pair_column(
    title: str, meaning: str, name: str, reduce: Callable[[Values], float]
) -> Column[ModuleComparison]:
    """A reduction over the pairs of different adapters that have a value."""

    def value(module: ModuleComparison) -> float | None:
        matrix = np.asarray(getattr(module, name), dtype=float)
        pairs = matrix[np.triu_indices_from(matrix, 1)]
        pairs = pairs[np.isfinite(pairs)]
        return float(reduce(pairs)) if pairs.size else None

    return Column(title, meaning, value)


def _range_column(
    title: str, meaning: str, name: str, reduce: Callable[[list[float]], float]
) -> Column[ModuleComparison]:
    """A reduction over the adapters that have the module."""

    def value(module: ModuleComparison) -> float | None:
        known = [v for v in getattr(module, name) if v is not None and not math.isnan(v)]
        return reduce(known) if known else None

    return Column(title, meaning, value)


def _norm_column(i: int, name: str) -> Column[ModuleComparison]:
    return Column(f"‖ΔW‖ {name}", f"Frobenius norm of the update in {name}.", lambda m: m.norms[i])


def _rank_column(i: int, name: str) -> Column[ModuleComparison]:
    return Column(f"r {name}", f"Rank of the update in {name}.", lambda m: m.ranks[i])


def _only_in(comparison: Comparison) -> Section:
    """The modules that some adapters have and others lack, adapter by adapter."""
    lists = [
        folded(
            f"{name}: {format_value(len(paths))} not in every adapter",
            element("ul", *(element("li", element("code", path)) for path in paths)),
        )
        for name, paths in comparison.only_in.items()
        if paths
    ]
    text = "Every adapter updates the same modules."
    return section(
        "Modules not in all adapters", roving("div", *lists) if lists else element("p", text)
    )
