"""Names of adapters, each told apart from the others."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._io.hub import HubId, parse
from lorafast._io.paths import expand
from lorafast._io.sources import USUAL_WEIGHTS

if TYPE_CHECKING:
    from lorafast._types import Source


def names_of(adapters: Sequence[Source]) -> list[str]:
    """A distinct name for each adapter: its directory's, and parents' where those are the same.

    Directories are those of the path that was given: a link has its own name, not that of what it
    leads to. Names are compared without regard to case, since files are named after them.
    """
    parts = list(map(_parts, adapters))
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


def position_of(adapter: Source, names: Sequence[str], paths: Sequence[Path]) -> int:
    """Where a member stands, by its name below the root or by its path, however that is spelled.

    Args:
        adapter: the name or the path.
        names: the members' names.
        paths: where each lies.

    Raises:
        KeyError: it is none of them.
    """
    text = os.fspath(adapter)
    for name in (text, os.path.normpath(text).replace(os.sep, "/")):
        if name in names:
            return names.index(name)
    own = [os.path.abspath(path) for path in paths]
    whole = os.path.abspath(os.path.expanduser(text))
    if whole in own:
        return own.index(whole)
    real = [os.path.realpath(path) for path in own]
    target = os.path.realpath(whole)
    if target in real:
        return real.index(target)
    raise KeyError(f"no adapter {text!r} is among the {len(names):,}{_suggestion(text, names)}")


def _suggestion(text: str, names: Sequence[str]) -> str:
    from difflib import get_close_matches

    near = get_close_matches(text, names, n=1) if len(names) <= 10_000 else []
    return f"; did you mean {near[0]!r}?" if near else ""


def labels_of(names: Sequence[str]) -> list[str]:
    """Names as a picture has them: without the directories at either end that all of them share.

    Of `runs/a/final` and `runs/b/final` there are left `a` and `b`. Labels are distinct where
    names are.
    """
    parts = [name.split("/") for name in names]
    # Something is left of each.
    room = min(map(len, parts), default=1) - 1
    if len(set(names)) < 2:
        return list(names)
    first = _shared(parts, room)
    last = _shared([own[::-1] for own in parts], room - first)
    return ["/".join(own[first : len(own) - last]) for own in parts]


def _shared(parts: Sequence[Sequence[str]], most: int) -> int:
    """How many of the first parts all have in common, up to a number."""
    count = 0
    while count < most and len({own[count] for own in parts}) == 1:
        count += 1
    return count


def _parts_of_id(named: HubId) -> tuple[str, ...]:
    """The parts of an id; the revision is one with the repository's name."""
    whole = str(named._replace(below=""))
    owner, slash, name = named.repository.rpartition("/")
    last = name + whole.removeprefix(named.repository).replace("/", "%2F")
    return (*([owner] if slash else []), last, *(part for part in named.below.split("/") if part))


def _parts(adapter: Source) -> tuple[str, ...]:
    """The parts of the path that an adapter is named after, links not followed."""
    path = expand(adapter)
    if not os.path.lexists(path):
        named = parse(adapter)
        if named is None:
            return tuple(part for part in os.fspath(adapter).split("/") if part)
        if named.file is not None:
            usual = named.file in USUAL_WEIGHTS
            below = named.folder if usual else str(Path(named.below).with_suffix(""))
            named = named._replace(below=below)
        return _parts_of_id(named)
    whole = Path(os.path.abspath(path))
    if whole.is_file():
        # Weights that stand alone lose their ending.
        usual = whole.name in USUAL_WEIGHTS
        whole = whole.parent if usual else whole.with_suffix("")
    return tuple(part for part in whole.parts if part != whole.anchor)
