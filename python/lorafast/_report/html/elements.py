"""Elements of every page: HTML as nested calls that escape by themselves, tables, findings."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Generic, TypeVar

from lorafast._analysis.findings import group_findings
from lorafast._analysis.records import Finding
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._core import __version__
from lorafast._errors import MissingDependencyError
from lorafast._report.plots.draw import draw, plots_of
from lorafast._report.plots.png import png
from lorafast._report.text import format_value

Row = TypeVar("Row")

VOID = frozenset({"meta", "img", "input", "polyline"})
#: Kinds of findings beyond these are folded away.
MAX_FINDINGS = 40
#: Nothing from outside may be loaded, whatever a name in a file holds.
POLICY = (
    "default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'unsafe-inline'; "
    "base-uri 'none'; form-action 'none'"
)


class Html(str):
    """Text that is HTML already; any other string is escaped where it is put into an element."""

    __slots__ = ()


def element(name: str, *children: str, **attributes: str | float | bool | None) -> Html:
    """One element.

    Args:
        name: of the tag.
        children: what is in it; strings that are no `Html` are escaped.
        attributes: `class_` is written `class`, other underscores as hyphens; `None` and `False`
            leave an attribute out.
    """
    written = "".join(
        f' {key.rstrip("_").replace("_", "-")}="{html.escape(str(value), quote=True)}"'
        for key, value in attributes.items()
        if value is not None and value is not False
    )
    if name in VOID:
        return Html(f"<{name}{written}>")
    return Html(f"<{name}{written}>{join(children)}</{name}>")


def join(parts: Iterable[str], separator: str = "") -> Html:
    """Parts one after the other, escaped unless they are HTML."""
    return Html(
        separator.join(
            part if isinstance(part, Html) else html.escape(str(part), quote=False)
            for part in parts
        )
    )


@dataclass(frozen=True)
class Column(Generic[Row]):
    """A column of a table.

    Attributes:
        title: its heading.
        meaning: the formula or the explanation shown on hover.
        value: a row's value: a number, a text, `None`, or `Html`.
        sortable: whether the values have an order.
    """

    title: str
    meaning: str
    value: Callable[[Row], float | str | None]
    sortable: bool = True


def _cell(value: float | str | None) -> Html:
    if isinstance(value, Html):
        return element("td", value)
    if isinstance(value, str):
        return element("td", value, class_="text")
    # What has no order, as NaN, has no value to sort by and stays at the end.
    key = "" if value is None or math.isnan(value) else repr(float(value))
    return element("td", format_value(value), data_value=key)


def table(rows: Sequence[Row], columns: Sequence[Column[Row]], noun: str) -> Html:
    """A table that can be sorted by a click on a heading and filtered by words.

    Args:
        rows: what the columns take their values from.
        columns: at least one; the first heads the row.
        noun: what a row is, in the plural.
    """
    head = element(
        "tr",
        *(
            element(
                "th",
                element("button", column.title, type="button") if column.sortable else column.title,
                title=column.meaning,
                scope="col",
                aria_sort="none" if column.sortable else None,
            )
            for column in columns
        ),
    )
    body = join(
        (element("tr", *(_cell(column.value(row)) for column in columns)) for row in rows),
        "\n",
    )
    label = f"Show only {noun} with all of these words"
    return element(
        "div",
        element(
            "p",
            element("input", type="search", placeholder=f"Filter {noun}", aria_label=label),
            " ",
            element("output", f"{len(rows):,} {noun}", data_noun=noun),
            class_="tools",
        ),
        element(
            "div",
            element("table", element("thead", head), element("tbody", body)),
            class_="scroll",
            tabindex="0",
        ),
        folded(
            "What the columns mean",
            definitions((column.title, column.meaning) for column in columns),
        ),
        class_="sortable",
    )


def definitions(items: Iterable[tuple[str, str]]) -> Html:
    """A list of words and what they stand for."""
    return element(
        "dl",
        *(element("div", element("dt", word), element("dd", meaning)) for word, meaning in items),
    )


def folded(summary: str, *content: str, open_: bool = False) -> Html:
    """Content that opens on a click."""
    return element("details", element("summary", summary), *content, open="open" if open_ else None)


def section(title: str, *content: str) -> Html:
    """A part of the page under a heading."""
    return element("section", element("h2", title), *content)


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts names as a reader would: layer 2 before layer 10."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
        if part
    )


def findings_section(entries: Sequence[Html]) -> Html:
    """The findings of a page, each as `finding_entry` makes it; what is too much is folded away."""
    if not entries:
        return section("Findings", element("p", "Nothing out of the ordinary was found."))
    shown = element("ul", *entries[:MAX_FINDINGS], class_="findings")
    rest = entries[MAX_FINDINGS:]
    if rest:
        hidden = element("ul", *rest, class_="findings")
        shown = join([shown, folded(f"{len(rest):,} more kinds of findings", hidden)])
    return section("Findings", shown)


def finding_entry(severity: str, *content: str) -> Html:
    """Findings of one kind, under their severity."""
    return element("li", element("span", severity, class_="badge"), " ", *content, class_=severity)


def finding_line(finding: Finding, *after: str) -> Html:
    """The module and the reason of a finding."""
    module = () if finding.module is None else (element("code", finding.module), " ")
    return join([*module, finding.reason, *after])


def findings(items: Sequence[tuple[str | None, Finding]]) -> Html:
    """The findings, each with the adapter it is about where there are several."""
    groups = group_findings(items, lambda item: item[1], lambda item: item[0])
    return findings_section([_finding_group(group) for group in groups])


def _finding_group(group: Sequence[tuple[str | None, Finding]]) -> Html:
    """Findings of one kind in one adapter: the first of many, the others folded away."""
    adapter, first = group[0]
    rest = [element("li", _finding(finding)) for _, finding in group[1:]]
    more = [folded(f"{len(rest):,} more of this kind", element("ul", *rest))] if rest else []
    name = () if adapter is None else (element("b", adapter), ": ")
    return finding_entry(first.severity, *name, _finding(first), *more)


def _finding(finding: Finding) -> Html:
    value = "" if finding.value is None else f" · {format_value(finding.value)}"
    kind = finding.kind.replace("_", " ")
    return finding_line(finding, " ", element("small", f"{kind}{value}"))


def plots(subject: AdapterAnalysis | Comparison) -> Html:
    """The plots of a result's page, each with what it shows, or why there are none."""
    pictures = []
    for plot in plots_of(subject).values():
        if not plot.page(subject):
            continue
        try:
            drawn = png(draw(subject, plot.kind))
        except MissingDependencyError as error:
            return section("Plots", element("p", f"There are no plots here: {error}."))
        source = "data:image/png;base64," + base64.b64encode(drawn).decode("ascii")
        caption = plot.caption[0].upper() + plot.caption[1:]
        image = element("img", src=source, alt=caption)
        pictures.append(element("figure", image, element("figcaption", caption)))
    return section("Plots", *pictures)


def asset(name: str) -> Html:
    """A style or a script that lies beside this module."""
    return Html((resources.files("lorafast._report.html") / name).read_text(encoding="utf-8"))


def document(title: str, *content: str, class_: str | None = None) -> str:
    """The whole page.

    Args:
        title: its title, which also heads it.
        content: its sections.
        class_: what the style sheet tells it from other pages by.
    """
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", asset("style.css")),
    )
    footer = element("footer", element("p", f"lorafast {__version__}"))
    body = element(
        "body",
        element("main", element("h1", title), *content, class_=class_),
        footer,
        element("script", asset("script.js")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
