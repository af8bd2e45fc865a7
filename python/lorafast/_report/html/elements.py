"""HTML as nested calls that escape by themselves, and the parts that both reports are made of."""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Generic, TypeVar

from lorafast._analysis.records import Finding
from lorafast._analysis.results import AdapterAnalysis, Comparison
from lorafast._core import __version__
from lorafast._errors import MissingDependencyError
from lorafast._report.plots.png import png

Row = TypeVar("Row")

VOID = frozenset({"meta", "img", "input", "polyline"})
SEVERITIES = ("severe", "warning", "note")
#: Kinds of findings beyond these are folded away.
FINDINGS_SHOWN = 40
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


def number(value: float | None, digits: int = 4) -> str:
    """A figure for reading: whole numbers in full, others in significant digits."""
    if value is None:
        return "–"
    if isinstance(value, int):
        return f"{value:,}"
    if not math.isfinite(value):
        return "NaN" if math.isnan(value) else "∞" if value > 0 else "−∞"
    return f"{value:.{digits}g}"


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
    return element("td", number(value), data_value=key)


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


def words(value: Any) -> str:
    """A value of the summary as a reader would write it."""
    if value is None:
        return "–"
    if isinstance(value, bool):
        return "yes" if value else "no"
    if isinstance(value, int | float):
        return number(value)
    if isinstance(value, Mapping):
        return ", ".join(f"{key} (×{words(count)})" for key, count in value.items()) or "none"
    if isinstance(value, Sequence) and not isinstance(value, str):
        return ", ".join(map(words, value)) or "none"
    return str(value)


def findings(items: Sequence[tuple[str | None, Finding]]) -> Html:
    """The findings, each with the adapter it is about where there are several."""
    if not items:
        return section("Findings", element("p", "Nothing out of the ordinary was found."))
    groups: dict[tuple[str | None, str, str], list[Finding]] = {}
    for adapter, finding in sorted(items, key=lambda item: SEVERITIES.index(item[1].severity)):
        groups.setdefault((adapter, finding.severity, finding.kind), []).append(finding)
    entries = [_finding_group(adapter, group) for (adapter, _, _), group in groups.items()]
    shown = element("ul", *entries[:FINDINGS_SHOWN], class_="findings")
    rest = entries[FINDINGS_SHOWN:]
    if rest:
        hidden = element("ul", *rest, class_="findings")
        shown = join([shown, folded(f"{len(rest):,} more kinds of findings", hidden)])
    return section("Findings", shown)


def _finding_group(adapter: str | None, group: Sequence[Finding]) -> Html:
    """Findings of one kind in one adapter: the first of many, the others folded away."""
    first, rest = group[0], group[1:]
    return element(
        "li",
        element("span", first.severity, class_="badge"),
        " ",
        *((element("b", adapter), ": ") if adapter is not None else ()),
        _finding(first),
        *([folded(f"{len(rest):,} more of this kind", _plain_list(rest))] if rest else []),
        class_=first.severity,
    )


def _plain_list(group: Sequence[Finding]) -> Html:
    return element("ul", *(element("li", _finding(finding)) for finding in group))


def _finding(finding: Finding) -> Html:
    return join(
        [
            *((element("code", finding.module), " ") if finding.module is not None else ()),
            finding.reason,
            " ",
            element("small", f"{finding.kind.replace('_', ' ')}{_figure_of(finding)}"),
        ]
    )


def _figure_of(finding: Finding) -> str:
    return "" if finding.figure is None else f" · {number(finding.figure)}"


def plots(
    subject: AdapterAnalysis | Comparison, kinds: Sequence[str], described: Mapping[str, str]
) -> Html:
    """Pictures of some kinds, each with what it shows, or why there are none."""
    pictures = []
    for kind in kinds:
        try:
            drawn = png(subject.plot(kind))
        except MissingDependencyError as error:
            return section("Plots", element("p", f"There are no plots here: {error}."))
        source = "data:image/png;base64," + base64.b64encode(drawn).decode("ascii")
        caption = described[kind][0].upper() + described[kind][1:]
        image = element("img", src=source, alt=caption)
        pictures.append(element("figure", image, element("figcaption", caption)))
    return section("Plots", *pictures)


def document(title: str, *content: str) -> str:
    """The whole page."""
    here = resources.files("lorafast._report.html")
    style = Html((here / "style.css").read_text(encoding="utf-8"))
    script = Html((here / "script.js").read_text(encoding="utf-8"))
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", name_="viewport", content="width=device-width, initial-scale=1"),
        element("meta", http_equiv="Content-Security-Policy", content=POLICY),
        element("title", title),
        element("style", style),
    )
    footer = element("footer", element("p", f"lorafast {__version__}"))
    body = element(
        "body",
        element("main", element("h1", title), *content),
        footer,
        element("script", script),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
