"""Names of thousands of adapters, in little more room than their letters take."""

from __future__ import annotations

import os
import stat
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from lorafast._analysis.names import numbered
from lorafast._fleet.table import Words
from lorafast._io.sources import PICKLED_WEIGHTS, WEIGHTS

#: Directories whose real paths are remembered at a time.
REMEMBERED = 1024
#: Stands between the parts of a path, in none of which it can be.
SEPARATOR = "\0"


def names_of(paths: Words) -> Words:
    """What `lorafast._analysis.names.names_of` says of paths that are there, in less memory.

    Names are compared by their hashes; only those that are not alone with theirs are looked at.
    """
    parts = Words.of(map(_Parts(), paths))
    depths = np.ones(len(parts), np.int32)

    def name(position: int) -> str:
        own = parts[position].split(SEPARATOR)
        return "_".join(own[-int(depths[position]) :]) or "adapter"

    hashes = np.fromiter((hash(name(i).casefold()) for i in range(len(parts))), np.int64)
    while True:
        grew = []
        for group in _same(hashes):
            by_name: dict[str, list[int]] = {}
            for position in group.tolist():
                by_name.setdefault(name(position).casefold(), []).append(position)
            for positions in by_name.values():
                # One adapter given twice has no parents that tell it apart from itself.
                if len({parts[position] for position in positions}) < 2:
                    continue
                for position in positions:
                    if depths[position] < parts[position].count(SEPARATOR) + 1:
                        depths[position] += 1
                        grew.append(position)
        if not grew:
            break
        for position in grew:
            hashes[position] = hash(name(position).casefold())
    names = map(name, range(len(parts)))
    alone = next(_same(hashes), None) is None
    return Words.of(names if alone else numbered(list(names)))


def _same(hashes: NDArray[np.int64]) -> Iterator[NDArray[np.intp]]:
    """Positions of equal hashes, where there are several."""
    order = np.argsort(hashes, kind="stable")
    ordered = hashes[order]
    starts = np.flatnonzero(np.concatenate([[True], ordered[1:] != ordered[:-1]]))
    ends = np.append(starts[1:], len(ordered))
    for place in np.flatnonzero(ends - starts > 1).tolist():
        yield order[starts[place] : ends[place]]


class _Parts:
    """The parts of the real path of an adapter, with most of it known from the one before."""

    def __init__(self) -> None:
        self._real: dict[str, str] = {}

    def __call__(self, path: str) -> str:
        folder, last = os.path.split(path)
        try:
            status = None if last in ("", ".", "..") else os.lstat(path)
        except OSError:
            status = None
        if status is None or stat.S_ISLNK(status.st_mode):
            real = os.path.realpath(path)
            # Here and below for thousands of texts; a Path takes four times as long.
            is_file = os.path.isfile(real)  # noqa: PTH113 (as said)
        else:
            if folder not in self._real:
                if len(self._real) == REMEMBERED:
                    self._real.clear()
                self._real[folder] = os.path.realpath(folder)
            real = os.path.join(self._real[folder], last)  # noqa: PTH118 (as said)
            is_file = stat.S_ISREG(status.st_mode)
        if is_file:
            place = Path(real)
            usual = place.name in (WEIGHTS, PICKLED_WEIGHTS)
            real = os.fspath(place.parent if usual else place.with_suffix(""))
        parts = os.path.splitdrive(real)[1].split(os.sep)  # noqa: PTH206 (as said)
        return SEPARATOR.join(part for part in parts if part)
