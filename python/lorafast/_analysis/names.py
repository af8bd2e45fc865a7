"""Names of adapters, each told apart from the others."""

from __future__ import annotations

import os
import stat
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._io.paths import expand, resolved
from lorafast._io.sources import PICKLED_WEIGHTS, WEIGHTS

if TYPE_CHECKING:
    from lorafast._types import Source

#: Directories whose parts are remembered at a time.
REMEMBERED = 1024


def names_of(adapters: Sequence[Source]) -> list[str]:
    """A distinct name for each adapter: its directory's, and parents' where those are the same.

    Compared without regard to case, since files are named after them.
    """
    parts = list(map(_Parts(), adapters))
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


class _Parts:
    """The parts of the real path of an adapter, with most of it known from the one before."""

    def __init__(self) -> None:
        self._folders: dict[str, tuple[str, ...]] = {}

    def __call__(self, adapter: Source) -> tuple[str, ...]:
        path = expand(adapter)
        try:
            mode = os.lstat(path).st_mode
        except (OSError, ValueError):
            # A hub id.
            return tuple(part for part in os.fspath(adapter).split("/") if part)
        # Here for thousands of texts; a Path takes four times as long.
        folder, last = os.path.split(path)
        if not folder or last in ("", ".", "..") or not stat.S_ISDIR(mode):
            return _named_after(resolved(path))
        if folder not in self._folders:
            if len(self._folders) == REMEMBERED:
                self._folders.clear()
            self._folders[folder] = _parts_of(resolved(folder))
        return (*self._folders[folder], last)


def _named_after(path: Path) -> tuple[str, ...]:
    """The parts of what a path is named after; weights that stand alone lose their ending."""
    if path.is_file():
        usual = path.name in (WEIGHTS, PICKLED_WEIGHTS)
        path = path.parent if usual else path.with_suffix("")
    return _parts_of(path)


def _parts_of(path: Path) -> tuple[str, ...]:
    return tuple(part for part in path.parts if part != path.anchor)
