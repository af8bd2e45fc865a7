"""Values as a notebook shows them: a line, notices, and tables of bounded size."""

from __future__ import annotations

import html
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import islice
from typing import TYPE_CHECKING, Any

from lorafast._report.lines import clipped, fields_of, is_record, line, short
from lorafast._report.rows import PARTS, rows_of
from lorafast._words import plural

if TYPE_CHECKING:
    from lorafast._fleet.table import Table

#: Characters of a page, beyond which rows are left out.
LONGEST = 16_000
#: Rows of a table, and columns.
ROWS = 10
COLUMNS = 10
#: Characters of a cell, and of a notice or the value of a field.
CELL = 60
SENTENCE = 300
#: Notices of a kind.
NOTICES = 10
#: Tables beside that of the fields.
TABLES = 3
#: Up to so many adapters have the matrix of their cosines.
MATRIX = 12
#: Up to so many have their most similar pairs shown.
SIMILAR = 1000

#: Fields of sentences, each of which is a point of a list.
SENTENCES = ("problems", "warnings", "findings", "errors", "notes")
#: What is shown of classes whose attributes are no fields.
ATTRIBUTES = {
    "MergePlan": (
        "base", "adapters", "tensors_merged", "tensors_replaced", "tensors_repeated",
        "tensors_copied", "tensors_cast", "total_parameters", "bytes_to_write", "warnings",
        "notes", "tensors",
    ),
    "CheckpointListing": (
        "path", "total_parameters", "total_bytes", "quantised", "warnings", "files", "tensors",
    ),
    "AdapterListing": (
        "path", "type", "base", "r", "alpha", "rslora", "peft_version", "total_parameters",
        "total_bytes", "features", "warnings", "modules", "tensors",
    ),
}  # fmt: skip


def page(value: object) -> str:
    """The `_repr_html_` of a value: well-formed, without markup of others, and of bounded size."""
    made = _Page(value)
    attributes = dict(_attributes(value))
    for name in SENTENCES:
        if attributes.get(name):
            made.add_notices(name, attributes.pop(name))
    parts = _parts(value)
    if parts is None and not attributes and isinstance(value, Mapping | Sequence):
        made.add_items("", value)
        return made.text()
    tables: dict[str, Any] = {}
    facts: list[tuple[str, Any]] = []
    for name, item in attributes.items():
        if _is_table(item):
            tables[name] = item
        elif item is not None and name not in SENTENCES:
            facts.append((name, item))
    made.add_table(
        "", ("", ""), ((name, short(item, SENTENCE)) for name, item in facts), len(facts)
    )
    _add_matrix(made, value)
    if parts is not None:
        made.add_table(*parts)
    for name, item in islice(tables.items(), TABLES):
        # What the rows of the parts tell already.
        if parts is None or name in ("adapters", "modules", "tensors", "analyses"):
            made.add_items(name, item)
    return made.text()


def table_page(table: Table) -> str:
    """The `_repr_html_` of a fleet's table: its first rows and columns."""
    made = _Page(table)
    made.add_items("", table)
    return made.text()


def _attributes(value: object) -> Iterator[tuple[str, Any]]:
    """What is shown of a value, by name."""
    if is_record(value):
        yield from fields_of(value)
        return
    for each in type(value).__mro__:
        for name in ATTRIBUTES.get(each.__name__, ()):
            yield name, getattr(value, name)


def _is_table(item: object) -> bool:
    """Whether something is shown as a table of its own: records, or a table of a fleet."""
    if hasattr(item, "row") and hasattr(item, "rows"):
        return True
    if isinstance(item, str) or not isinstance(item, Mapping | Sequence) or not item:
        return False
    values = item.values() if isinstance(item, Mapping) else item
    return is_record(next(iter(values)))


def _parts(value: Any) -> tuple[str, Sequence[str], Iterable[Sequence[str]], int] | None:
    """The rows that a data frame of the value has; `None` where others tell more."""
    kind = next((each.__name__ for each in type(value).__mro__ if each.__name__ in PARTS), None)
    # An analysis has tables of records, and a matrix of many has millions of rows.
    if kind in (None, "AdapterAnalysis", "Comparison"):
        return None
    if kind == "Similarity":
        is_few = MATRIX < len(value) <= SIMILAR
        pairs = [
            [clipped(one, CELL), clipped(other, CELL), f"{figure:z.4f}"]
            for one, other, figure in (value.pairs(ROWS) if is_few else ())
        ]
        return "most similar", ("first", "second", value.metric), pairs, len(pairs)
    found = rows_of(value)
    count = {
        "Duplicates": lambda: sum(len(group.members) for group in value.groups),
        "Lineage": lambda: len(value.coefficients),
        "Trajectory": lambda: len(value.steps),
    }[str(kind)]()
    shown = [at for at, name in enumerate(found.columns) if name != "path"]
    headers = [list(found.columns)[at] for at in shown]
    return "", headers, ([_cell(row[at]) for at in shown] for row in found.rows), count


def _add_matrix(made: _Page, value: Any) -> None:
    """The matrix of a comparison or similarity of a few adapters."""
    names = getattr(value, "names", None)
    matrix: Any = getattr(value, "matrix", getattr(value, "cosine", None))
    if names is None or getattr(matrix, "ndim", 0) != 2 or len(names) > MATRIX:
        return
    heads = [clipped(name, 24) for name in names]
    rows = ([heads[at], *(f"{number:z.4f}" for number in matrix[at])] for at in range(len(names)))
    made.add_table(getattr(value, "metric", "cosine"), ("", *heads), rows, len(names))


def _cell(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, str):
        return clipped(value, CELL)
    if isinstance(value, os.PathLike):
        return clipped(os.fsdecode(value), CELL)
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return short(value, CELL)


class _Page:
    """A page that is made piece by piece, up to `LONGEST` characters."""

    def __init__(self, value: object) -> None:
        text = line(value).removeprefix("<").removesuffix(">")
        self._pieces = [f"<p>{_escaped(text)}</p>"]
        self._length = len(self._pieces[0])

    def text(self) -> str:
        """The page as HTML."""
        return f"<div>{''.join(self._pieces)}</div>"

    def _add(self, piece: str) -> None:
        self._pieces.append(piece)
        self._length += len(piece)

    def _is_full(self, piece: str = "") -> bool:
        return self._length + len(piece) > LONGEST

    def add_notices(self, name: str, notices: Sequence[Any]) -> None:
        """A list of sentences, the first ones of many."""
        if self._is_full():
            return
        shown = [f"<li>{_notice(notice)}</li>" for notice in notices[:NOTICES]]
        more = len(notices) - len(shown)
        if more:
            shown.append(f"<li>… and {more:,} more</li>")
        self._add(f"<p><b>{_escaped(name)}</b></p><ul>{''.join(shown)}</ul>")

    def add_items(self, name: str, items: Any) -> None:
        """A table of the values of a mapping or sequence, or of the rows of a fleet's table."""
        if hasattr(items, "row") and hasattr(items, "rows"):
            count = items.rows
            records = [items.row(at) for at in range(min(count, ROWS))]
            headers = list(records[0]) if records else list(items)
            rows: Iterable[Sequence[str]] = (
                [_cell(record[header]) for header in headers[:COLUMNS]] for record in records
            )
            self.add_table(name, headers, rows, count)
            return
        count = len(items)
        if isinstance(items, Mapping):
            pairs = list(islice(items.items(), ROWS))
        else:
            pairs = list(enumerate(islice(items, ROWS)))
        values = [item for _, item in pairs]
        if values and is_record(values[0]):
            # Where the key is a field as well, it is not told twice.
            heads = [field for field, _ in fields_of(values[0])]
            is_keyed = isinstance(items, Mapping) and "path" not in heads
            rows = (
                [*([_cell(key)] if is_keyed else []), *(_cell(each) for _, each in fields_of(item))]
                for key, item in pairs
            )
            self.add_table(name, ["", *heads] if is_keyed else heads, rows, count)
            return
        self.add_table(name, ("", ""), ([_cell(key), _cell(item)] for key, item in pairs), count)

    def add_table(
        self, name: str, headers: Sequence[str], rows: Iterable[Sequence[str]], count: int
    ) -> None:
        """A table, of many rows and columns the first ones.

        Args:
            name: what stands above it.
            headers: the names of the columns.
            rows: the cells of each row.
            count: how many rows there are.
        """
        if not count or self._is_full():
            return
        hidden = len(headers) - COLUMNS
        head = [*headers[:COLUMNS], *([f"… {hidden} more"] if hidden > 0 else [])]
        title = f"<p><b>{_escaped(name)}</b>: {count:,}</p>" if name else ""
        has_heads = any(head)
        top = f"<thead><tr>{_cells('th', head)}</tr></thead>" if has_heads else ""
        # The table of a value's fields is whole.
        most = ROWS if has_heads else max(ROWS, 60)
        body: list[str] = []
        for row in islice(rows, most):
            piece = f"<tr>{_cells('td', row[:COLUMNS])}{'<td>…</td>' * (hidden > 0)}</tr>"
            if self._is_full("".join(body) + piece):
                break
            body.append(piece)
        more = count - len(body)
        last = f"<p>… {plural(more, 'more row')}</p>" if more else ""
        self._add(f"{title}<table>{top}<tbody>{''.join(body)}</tbody></table>{last}")


def _cells(tag: str, texts: Iterable[str]) -> str:
    return "".join(f"<{tag}>{_escaped(text)}</{tag}>" for text in texts)


def _escaped(text: str) -> str:
    return html.escape(clipped(text, SENTENCE))


def _notice(notice: Any) -> str:
    """A warning, finding or error as the content of a list's point."""
    if isinstance(notice, str):
        return _escaped(notice)
    if hasattr(notice, "finding"):
        adapter = "" if notice.adapter is None else f"{_escaped(notice.adapter)}: "
        return f"{adapter}{_notice(notice.finding)}"
    if hasattr(notice, "before"):
        counts = f"of {plural(notice.before, 'module')} before, of {notice.after:,} now"
        return f"<b>{_escaped(notice.severity)}</b> {_escaped(notice.kind)}: {counts}"
    if hasattr(notice, "severity"):
        module = f" {_escaped(notice.module)}" if notice.module else ""
        return f"<b>{_escaped(notice.severity)}</b>{module} {_escaped(notice.reason)}"
    if hasattr(notice, "reason"):
        return f"{_escaped(os.fsdecode(notice.path))}: {_escaped(notice.reason)}"
    return _escaped(short(notice, SENTENCE))
