"""Page of a fleet: what to look at first, then distributions, then every adapter."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Sequence
from importlib import resources
from typing import TYPE_CHECKING, Any

import numpy as np

from lorafast._errors import LorafastError, missing
from lorafast._fleet.table import NOTHING
from lorafast._report import palette
from lorafast._report.html import fleet_charts, fleet_groups
from lorafast._report.html.chart import Chart
from lorafast._report.html.elements import (
    Column,
    Html,
    asset,
    breakable,
    definitions,
    document,
    element,
    folded,
    row_ids,
    section,
    table,
)
from lorafast._report.html.findings import Found, Targets, findings
from lorafast._report.lines import findings_text
from lorafast._words import plural

if TYPE_CHECKING:
    from lorafast._fleet.discovery import ScanError
    from lorafast._fleet.fleet import Fleet

#: Entries of a list that are not folded away.
SHOWN = 12
#: Entries of a folded list; the tables and the JSON have them all.
MAX_LISTED = 200
#: More adapters than this are not compared with each other unless it is asked for.
COMPARED_UNASKED = 1000

Row = dict[str, Any]


def page(fleet: Fleet, similarity: Any) -> str:
    """The document.

    Raises:
        MissingDependencyError: plotly is not installed.
    """
    library = _plotly()
    matrices, notes = _similarity(fleet, similarity)
    charts = [*fleet_charts.charts(fleet), *matrices]
    drawn = [(chart, _place(index, chart)) for index, chart in enumerate(charts)]
    pictures = [place for chart, place in drawn if not chart.wide]
    wide = [place for chart, place in drawn if chart.wide]
    said = [element("p", note, class_="quiet") for note in notes]
    ids = row_ids("adapter", len(fleet))
    rows = dict(zip(fleet.names, ids, strict=True))
    found = [(item.adapter, item.finding, item.count) for item in fleet.findings]
    return document(
        f"A fleet of {plural(len(fleet), 'adapter')}",
        _summary(fleet),
        findings([Found(*item) for item in found], Targets(adapters=rows)),
        _errors(fleet.errors),
        section("Distributions", element("div", *pictures, class_="charts")) if pictures else "",
        section("Similarity", *wide, *said) if wide or said else "",
        section("Adapters", table(_rows(fleet), _columns(fleet), "adapters", ids)),
        element(
            "script",
            _data(charts),
            type="application/json",
            id="charts",
            data_on_dark=json.dumps(palette.ON_DARK),
        ),
        element("script", library),
        element("script", asset("charts.js")),
        class_="fleet",
    )


def _plotly() -> Html:
    """Plotly's script: charts that can be zoomed and hovered over without being connected."""
    try:
        file = resources.files("plotly") / "package_data" / "plotly.min.js"
        return Html(file.read_text(encoding="utf-8"))
    except (ImportError, FileNotFoundError) as error:
        raise missing("plotly", "charts", "draw the charts of a page") from error


def _data(charts: Sequence[Chart]) -> Html:
    plain = [
        {"traces": chart.traces, "layout": chart.layout, "height": chart.height} for chart in charts
    ]
    # A name may hold what would end the script.
    return Html(json.dumps(plain, allow_nan=False).replace("<", "\\u003c"))


def _place(index: int, chart: Chart) -> Html:
    parts = [
        element("h3", chart.title),
        element("p", chart.caption, class_="quiet"),
        element("div", id=f"chart-{index}", style=f"height: {chart.height}px"),
    ]
    if chart.wide:
        parts.insert(2, element("output", "Point at a cell to see the pair and its cosine."))
    return element(
        "div",
        *parts,
        class_="chart wide" if chart.wide else "chart",
        role="group",
        aria_label=chart.title,
    )


def _similarity(fleet: Fleet, similarity: Any) -> tuple[list[Chart], list[str]]:
    """A matrix for each group of adapters that have cosines with each other, and what to say."""
    if isinstance(similarity, str):
        if len(fleet) < 2:
            return [], []
        if len(fleet) > COMPARED_UNASKED:
            note = (
                f"More than {COMPARED_UNASKED:,} adapters are compared only when it is asked for: "
                "to_html(similarity=lorafast.similarity(fleet))."
            )
            return [], [note]
        from lorafast._similarity import api

        try:
            # Those of another base have nothing to be compared by: each base has its own matrix.
            similarity = api.similarity(fleet, group_by_base=True)
        except (LorafastError, ValueError, OSError) as error:
            return [], [f"The adapters were not compared with each other: {error}"]
    if similarity is None:
        return [], []
    return fleet_groups.matrices(fleet, list(similarity.names), np.asarray(similarity.matrix))


def _summary(fleet: Fleet) -> Html:
    adapters = fleet.adapters
    bases = Counter("none named" if base is None else base for base in adapters["base"].tolist())
    common = ", ".join(f"{base} ({count:,})" for base, count in bases.most_common(3))
    more = f" and {len(bases) - 3} more" if len(bases) > 3 else ""
    counted = findings_text((item.finding for item in fleet.findings), none="none")
    facts = [
        ("adapters", f"{len(fleet):,}"),
        ("could not be read", f"{len(fleet.errors):,}"),
        ("modules", f"{fleet.modules.rows:,}"),
        ("parameters", f"{int(adapters['parameters'].sum()):,}"),
        ("weights files", f"{adapters['bytes'].sum() / 1e6:,.1f} MB"),
        ("bases", f"{common}{more}"),
        ("findings", counted),
        ("looked at", {"headers": "headers alone"}.get(fleet.metrics, fleet.metrics)),
    ]
    return section("Summary", definitions(facts))


def _errors(errors: Sequence[ScanError]) -> str:
    if not errors:
        return ""
    entries = [(os.fspath(error.path), error.reason) for error in errors]
    shown = [definitions(entries[:SHOWN])]
    rest = entries[SHOWN : SHOWN + MAX_LISTED]
    if rest:
        left = len(entries) - SHOWN - len(rest)
        more = [element("p", f"and {left:,} more, all in fleet.errors")] if left else []
        shown.append(folded(f"{len(entries) - SHOWN:,} more", definitions(rest), *more))
    return section("Could not be read", element("div", *shown, class_="errors"))


def _rows(fleet: Fleet) -> list[Row]:
    columns = {name: fleet.adapters[name].tolist() for name in fleet.adapters if name != "findings"}
    columns["findings"] = [
        ", ".join(kinds).replace("_", " ") for kinds in fleet.adapters["findings"].tolist()
    ]
    keys = list(columns)
    return [dict(zip(keys, row, strict=True)) for row in zip(*columns.values(), strict=True)]


def _columns(fleet: Fleet) -> list[Column[Row]]:
    def of(key: str, title: str, meaning: str) -> Column[Row]:
        return Column(title, meaning, lambda row: row[key])

    def of_text(key: str, title: str, meaning: str) -> Column[Row]:
        return Column(title, meaning, lambda row: row[key] or "")

    columns = [
        Column[Row](
            "adapter",
            "Its path below the directory that was scanned.",
            lambda row: element("span", breakable(row["name"]), title=row["path"]),
        ),
        of_text("base", "base", "base_model_name_or_path of its config."),
        Column[Row](
            "r",
            "The rank that most of its modules have.",
            lambda row: None if row["rank"] == NOTHING else row["rank"],
        ),
        of("alpha", "α", "The alpha that most of its modules have."),
        of("scaling", "s", "The scale that most of its modules have: α/r, or α/√r for rsLoRA."),
        of("modules", "modules", "Modules with a low-rank update."),
        of("parameters", "parameters", "Stored values."),
        Column[Row]("MB", "Size of the weights file.", lambda row: row["bytes"] / 1e6),
    ]
    if "frobenius_norm" in fleet.adapters:
        columns += [
            of("frobenius_norm", "‖ΔW‖", "Frobenius norm of all updates: √Σ‖ΔW‖²."),
            of("max_spectral_norm", "max σ₁", "The greatest spectral norm of a module."),
            of("mean_effective_rank", "effective rank", "The mean of the modules' effective "
               "ranks (Roy and Vetterli: exp H(σ/Σσ), H the entropy)."),
        ]  # fmt: skip
    if "std" in fleet.adapters:
        columns += [
            of("std", "std", "Standard deviation of all stored values."),
            of("zero_share", "zeros", "Share of the stored values that are zero."),
            of("non_finite", "not finite", "NaN and infinities among the stored values."),
        ]
    columns.append(of_text("findings", "findings", "The kinds of findings."))
    return columns
