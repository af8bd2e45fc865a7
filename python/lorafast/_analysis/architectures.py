"""Architectures: which adapters update modules of one model, or of models of the same shapes."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field

#: Names in the label of an architecture.
NAMED = 2


@dataclass
class Architecture:
    """Adapters whose modules can stand in one table of modules.

    Attributes:
        label: the bases that they name.
        members: their positions among the adapters that were sorted.
    """

    label: str = ""
    members: list[int] = field(default_factory=list)


@dataclass
class _Group(Architecture):
    """An architecture while adapters are added to it."""

    bases: dict[str | None, str | None] = field(default_factory=dict)
    shapes: dict[Hashable, Hashable] = field(default_factory=dict)

    def takes(self, key: str | None, shapes: Mapping[Hashable, Hashable], by_base: bool) -> bool:
        if by_base and key not in self.bases:
            return False
        own = self.shapes
        shared = [place for place in shapes if place in own]
        if any(own[place] != shapes[place] for place in shared):
            return False
        return bool(shared) or (key is not None and key in self.bases)


def architectures(
    bases: Sequence[str | None],
    shapes: Sequence[Mapping[Hashable, Hashable]],
    *,
    by_base: bool = False,
) -> list[Architecture]:
    """Sorts adapters by the architecture that they were trained for.

    Two adapters are of one architecture if they name one base or update a module of one name, and
    if no module that both update has two shapes. A base is known by the last part of its name,
    which a local copy and the hub have in common.

    Args:
        bases: the base that each adapter names.
        shapes: for each adapter the shape of the update of each of its modules.
        by_base: keep adapters of different bases apart even if all shapes agree.

    Returns:
        The architectures, each with a label of its own, those of the most adapters first.
    """
    groups: list[_Group] = []
    for member, (base, own) in enumerate(zip(bases, shapes, strict=True)):
        key = None if base is None else base.rstrip("/\\").replace("\\", "/").split("/")[-1].lower()
        fitting = [group for group in groups if group.takes(key, own, by_base)]
        # What names its base belongs to that base's, even if the shapes fit another as well.
        fitting.sort(key=lambda group: key is None or key not in group.bases)
        if not fitting:
            groups.append(_Group())
            fitting = groups[-1:]
        group = fitting[0]
        group.members.append(member)
        group.bases.setdefault(key, base)
        group.shapes.update(own)
    groups.sort(key=lambda group: -len(group.members))
    labels = [_label([base for base in group.bases.values() if base]) for group in groups]
    for position, group in enumerate(groups):
        number = labels[: position + 1].count(labels[position])
        again = f", shapes {number}" if labels.count(labels[position]) > 1 else ""
        group.label = labels[position] + again
    return list(groups)


def _label(bases: Sequence[str]) -> str:
    if not bases:
        return "no base named"
    more = f" and {len(bases) - NAMED} more" if len(bases) > NAMED else ""
    return ", ".join(bases[:NAMED]) + more
