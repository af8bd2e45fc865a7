"""Names of adapters that tell them apart, and the blocks and layers in modules' paths."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._io.paths import expand, resolved
from lorafast._io.sources import PICKLED_WEIGHTS, WEIGHTS

if TYPE_CHECKING:
    from lorafast._types import Source

#: A block's index in a module's path: its first whole number.
BLOCK = re.compile(r"(?:(.*?)\.)?(\d+)\.(.+)", re.DOTALL)


def names_of(adapters: Sequence[Source]) -> list[str]:
    """A distinct name for each adapter: its directory's, and parents' where those are the same.

    Compared without regard to case, since files are named after them.
    """
    parts = [_parts(adapter) for adapter in adapters]
    depths = [1] * len(parts)
    while True:
        names = [
            "_".join(own[-depth:]) or "adapter" for own, depth in zip(parts, depths, strict=True)
        ]
        groups: dict[str, list[int]] = {}
        for position, name in enumerate(names):
            groups.setdefault(name.casefold(), []).append(position)
        grew = False
        for group in groups.values():
            # One adapter given twice has no parents that tell it apart from itself.
            is_same = len({parts[position] for position in group}) < 2
            for position in [] if is_same else group:
                if depths[position] < len(parts[position]):
                    depths[position] += 1
                    grew = True
        if not grew:
            return numbered(names)


def numbered(names: Sequence[str]) -> list[str]:
    """The names, with numbers behind those that come again (one adapter given twice)."""
    taken: set[str] = set()
    result = []
    for name in names:
        candidate, number = name, 2
        while candidate.casefold() in taken:
            candidate, number = f"{name}_{number}", number + 1
        taken.add(candidate.casefold())
        result.append(candidate)
    return result


def _parts(adapter: Source) -> tuple[str, ...]:
    path = Path(expand(adapter))
    if not os.path.lexists(path):
        # A hub id.
        return tuple(part for part in os.fspath(adapter).split("/") if part)
    path = resolved(path)
    if path.is_file():
        usual = path.name in (WEIGHTS, PICKLED_WEIGHTS)
        path = path.parent if usual else path.with_suffix("")
    return tuple(part for part in path.parts if part != path.anchor)


def layers_of(paths: Sequence[str]) -> list[tuple[int | None, str]]:
    """Block and layer of each path.

    What stands before the block's index is left out where it is the same for all blocks, and
    kept where blocks of several kinds (an encoder's and a decoder's) would be taken for one.
    """
    matches = [BLOCK.fullmatch(path) for path in paths]
    stems = {match[1] for match in matches if match}
    places: list[tuple[int | None, str]] = []
    for path, match in zip(paths, matches, strict=True):
        if match is None:
            places.append((None, path))
            continue
        stem, block, rest = match.groups()
        places.append((int(block), f"{stem}.{rest}" if len(stems) > 1 and stem else rest))
    return places
