"""Names of a fleet's members, which are paths below its root, and values that they find."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from lorafast._analysis.names import numbered, position_of
from lorafast._io.hub import CACHED
from lorafast._io.plain import utf8
from lorafast._results import shown
from lorafast._types import Source

T = TypeVar("T")


def common_root(directories: Sequence[str]) -> str:
    """The directory that some directories lie in, or the only one of them; spelled as they are.

    Empty where nothing holds them all, as on two drives.
    """
    paths = list(dict.fromkeys(map(os.path.normpath, directories)))
    if len(paths) == 1:
        return paths[0]
    # Nothing tells where a path that begins with dots lies but the current directory.
    if any(os.path.isabs(path) or path.startswith(os.pardir) for path in paths):
        paths = list(map(os.path.abspath, paths))
    try:
        return os.path.commonpath(paths) or os.curdir
    except ValueError:
        return ""


def names_below(root: str, paths: Iterable[str]) -> list[str]:
    """A distinct name for each path: what it is below a root, with slashes.

    The root itself has its own name, and what lies in the hub's cache is called by its id. Links
    are not followed, and bytes that are no UTF-8 are
    escapes.

    Args:
        root: a directory; if empty, names are whole paths.
        paths: what lies in it, spelled in any way.
    """
    # Here for thousands of texts; os.path.relpath takes several times as long.
    top = os.path.abspath(root) if root else ""
    inside = top if top.endswith(os.sep) else top + os.sep
    names = []
    for path in paths:
        whole = os.path.abspath(path)
        if not root:
            name = whole
        elif whole == top:
            name = os.path.basename(whole) or os.curdir
        elif whole.startswith(inside):
            name = whole[len(inside) :]
        else:
            name = os.path.relpath(whole, top)
        if (own := CACHED.search(name if whole != top else whole)) is not None:
            # What was given by an id is called by it.
            repository, _, below = own.groups()
            name = repository.replace("--", os.sep, 1) + (os.sep + below if below else "")
        names.append(utf8(name.replace(os.sep, "/")))
    # A root that holds one of its own name, or one given twice.
    return names if len(set(names)) == len(names) else numbered(names)


@shown
class ByMember(dict[Path, T]):
    """Values by the path of an adapter, which its name and other spellings of the path find too."""

    def __init__(self, values: Iterable[tuple[Path, T]], names: Sequence[str]) -> None:
        """Takes the values in order.

        Args:
            values: each adapter's path with its value.
            names: the adapters' names, in the same order.
        """
        super().__init__(values)
        self._names = list(names)

    def __missing__(self, adapter: Source) -> T:
        paths = list(self)
        return self[paths[position_of(adapter, self._names, paths)]]

    def __reduce__(self) -> tuple[type[ByMember[T]], tuple[list[tuple[Path, T]], list[str]]]:
        return type(self), (list(self.items()), self._names)
