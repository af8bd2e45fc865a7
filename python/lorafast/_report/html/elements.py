"""Elements of every page: HTML as nested calls that escape by themselves, tables, sections."""

from __future__ import annotations

import html
import itertools
import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any, Generic, TypeVar

from lorafast._core import __version__
from lorafast._report.text import format_value

Row = TypeVar("Row")

VOID = frozenset({"meta", "img", "input", "polyline", "wbr"})
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


class Section(Html):
    """A part of a page under a heading, which the page's table of contents leads to."""

    def __new__(cls, title: str, *content: str) -> Section:
        """Makes the section; its id is its title in lower case."""
        identifier = re.sub(r"\W+", "-", title.lower())
        made = super().__new__(
            cls, element("section", element("h2", title), *content, id=identifier)
        )
        made.heading, made.identifier = title, identifier
        return made

    heading: str
    identifier: str


def roving(name: str, *children: str, **attributes: str | float | bool | None) -> Html:
    """An element with a single tab stop: the arrow keys move among its links and buttons."""
    numbers = itertools.chain([0], itertools.repeat(-1))
    # A "<" in a text or an attribute is escaped.
    inner = re.sub(
        r"<(?:a|summary|button)(?=[ >])",
        lambda tag: f'{tag[0]} tabindex="{next(numbers)}"',
        join(children),
    )
    return element(name, Html(inner), class_="roving", **attributes)


def breakable(name: str) -> Html:
    """A name in which a line may end after a dot, a slash, a hyphen or an underscore."""
    return join(re.split(r"(?<=[./_-])(?=[^./_-])", name), "<wbr>")


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


def shown(value: Any) -> str:
    """A value as a page has it: nothing for what was not measured."""
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return ""
    return format_value(value)


def row_ids(noun: str, count: int) -> list[str]:
    """The ids of a table's rows, by which findings and addresses lead to them."""
    return [f"{noun}-{number}" for number in range(1, count + 1)]


def _cell(value: float | str | None) -> Html:
    if isinstance(value, Html):
        return element("td", value)
    if isinstance(value, str):
        return element("td", breakable(value), class_="text")
    # What was not measured is blank, has no value to sort by and stays at the end.
    key = "" if value is None or math.isnan(value) else repr(float(value))
    return element("td", shown(value), data_value=key)


def table(
    rows: Sequence[Row], columns: Sequence[Column[Row]], noun: str, ids: Sequence[str] = ()
) -> Html:
    """A table that can be sorted by a click on a heading and filtered by words.

    Args:
        rows: what the columns take their values from.
        columns: at least one; the first heads the row.
        noun: what a row is, in the plural.
        ids: as `row_ids` makes them, one for each row; without them nothing links to rows.
    """
    head = roving(
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
        (
            element("tr", *(_cell(column.value(row)) for column in columns), id=identifier)
            for row, identifier in zip(rows, ids or itertools.repeat(None), strict=False)
        ),
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
        ),
        folded(
            "What the columns mean",
            definitions((column.title, column.meaning) for column in columns),
            class_="columns",
        ),
        class_="sortable",
    )


def definitions(items: Iterable[tuple[str, str]]) -> Html:
    """A list of words and what they stand for."""
    return element(
        "dl",
        *(element("div", element("dt", word), element("dd", meaning)) for word, meaning in items),
    )


def folded(summary: str, *content: str, class_: str | None = None) -> Html:
    """Content that opens on a click."""
    return element("details", element("summary", summary), *content, class_=class_)


def section(title: str, *content: str) -> Section:
    """A part of the page under a heading."""
    return Section(title, *content)


def natural(text: str) -> tuple[tuple[int, int, str], ...]:
    """A key that sorts names as a reader would: layer 2 before layer 10."""
    return tuple(
        (0, int(part), "") if part.isdecimal() else (1, 0, part)
        for part in re.split(r"(\d+)", text)
        if part
    )


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
    contents = element(
        "nav",
        element(
            "ul",
            *(
                element("li", element("a", part.heading, href=f"#{part.identifier}"))
                for part in content
                if isinstance(part, Section)
            ),
        ),
        aria_label="Contents",
    )
    footer = element(
        "footer",
        element("p", "The arrow keys move among findings, and among the headings of a table.",
                class_="keys"),
        element("p", f"lorafast {__version__}"),
    )  # fmt: skip
    body = element(
        "body",
        element("main", element("h1", title), contents, *content, class_=class_),
        footer,
        element("script", asset("script.js")),
    )
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"
