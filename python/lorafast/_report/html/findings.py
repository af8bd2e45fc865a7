"""Findings on a page, each with links to the rows of the tables that it is about."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from lorafast._analysis.findings import group_findings
from lorafast._analysis.records import Finding
from lorafast._fleet.findings import KINDS, listed
from lorafast._report.html.elements import Html, Section, element, folded, join, roving, section
from lorafast._report.text import format_value

#: Kinds of findings beyond these are folded away.
MAX_FINDINGS = 40
#: Findings of one kind that a folded list has; the JSON has them all.
MAX_LISTED = 200


class Found(NamedTuple):
    """A finding, the adapter that it is about where there are several, how often it is there."""

    adapter: str | None
    finding: Finding
    times: int = 1


@dataclass(frozen=True)
class Targets:
    """What findings link to: the ids of rows and of sections.

    Attributes:
        adapters: of the rows of adapters by their names.
        modules: of the rows of modules and tensors by the names that findings have for them.
        kinds: by the kind of a finding about nothing with a row: a section, and what it shows.
    """

    adapters: Mapping[str, str] = field(default_factory=dict)
    modules: Mapping[str, str] = field(default_factory=dict)
    kinds: Mapping[str, tuple[str, str]] = field(default_factory=dict)

    def adapter(self, name: str) -> Html:
        """An adapter's name, as a link to its row if it has one."""
        return _linked(element("b", name), self.adapters.get(name))

    def module(self, name: str) -> Html:
        """The name of a module or a tensor, as a link to its row if it has one."""
        return _linked(element("code", name), self.modules.get(name))


def _linked(content: Html, target: str | None) -> Html:
    return content if target is None else element("a", content, href=f"#{target}")


def findings(items: Sequence[Found], targets: Targets) -> Section:
    """The section of the findings, the most severe first, those of one kind together."""
    groups = group_findings(items, lambda item: item.finding)
    if not groups:
        return section("Findings", element("p", "Nothing out of the ordinary was found."))
    is_of_several = any(item.adapter is not None for item in items)
    entry = _of_several if is_of_several else _of_one
    entries = [
        element(
            "li",
            element("span", group[0].finding.severity, class_="badge"),
            " ",
            *entry(group, targets),
            class_=group[0].finding.severity,
        )
        for group in groups
    ]
    shown = element("ul", *entries[:MAX_FINDINGS], class_="findings")
    rest = entries[MAX_FINDINGS:]
    if rest:
        hidden = element("ul", *rest, class_="findings")
        shown = join([shown, folded(f"{len(rest):,} more kinds of findings", hidden)])
    return section("Findings", roving("div", shown))


def _of_one(group: Sequence[Found], targets: Targets) -> list[Html]:
    """Findings of one kind in one adapter: the first of many, the others folded away."""
    first, *rest = (_finding(item, targets) for item in group)
    if not rest:
        return [first]
    return [first, folded(f"{len(rest):,} more of this kind", _list(rest))]


def _of_several(group: Sequence[Found], targets: Targets) -> list[str]:
    """Findings of one kind in any number of adapters."""
    kind = group[0].finding.kind
    adapters = list(dict.fromkeys(item.adapter for item in group if item.adapter is not None))
    meaning = KINDS.get(kind, kind.replace("_", " "))
    # A formula is not written with another letter.
    first = meaning[:1].upper() if meaning[:1].isascii() else meaning[:1]
    head: list[str] = [element("b", first + meaning[1:])]
    if len(group) == 1:
        return [*head, ": " if adapters else ". ", _finding(group[0], targets)]
    if adapters:
        head.append(f": {listed(adapters)}")
    entries = [_finding(item, targets) for item in group]
    return [*head, folded(f"all {len(entries):,}", _list(entries))]


def _list(entries: Sequence[Html]) -> Html:
    items = [element("li", entry) for entry in entries[:MAX_LISTED]]
    if len(entries) > MAX_LISTED:
        items.append(element("li", f"and {len(entries) - MAX_LISTED:,} more"))
    return element("ul", *items)


def _finding(item: Found, targets: Targets) -> Html:
    """The adapter, the module, the reason and the figure of a finding."""
    finding = item.finding
    parts: list[str] = []
    if item.adapter is not None:
        parts += [targets.adapter(item.adapter), ": "]
    if finding.module is not None:
        parts += [targets.module(finding.module), " "]
    parts.append(finding.reason)
    known = finding.value is not None and not math.isnan(finding.value)
    # No line ends between the kind and its figure.
    value = f"\xa0·\xa0{format_value(finding.value)}" if known else ""
    parts += [" ", element("small", f"{finding.kind.replace('_', ' ')}{value}")]
    if item.times > 1:
        parts.append(element("small", f" ({item.times:,} of these in this adapter)"))
    if finding.kind in targets.kinds:
        target, text = targets.kinds[finding.kind]
        parts += [" ", element("a", text, href=f"#{target}")]
    return join(parts)
