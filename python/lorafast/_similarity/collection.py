"""Collections of adapters in the core, of paths or a fleet, with what could not be read."""

from __future__ import annotations

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafast import _core
from lorafast._errors import AdapterError
from lorafast._fleet.discovery import ScanError, discover
from lorafast._fleet.members import names_below
from lorafast._io.limits import check_threads
from lorafast._io.progress import pace
from lorafast._io.sources import CoreSource, core_source
from lorafast._io.strangers import gate, reason_of
from lorafast._types import HasPaths, Progress, Source

#: Directories, adapters, globs, any number of these, or a fleet.
Adapters = Source | Iterable[Source] | HasPaths


@dataclass
class Collected:
    """Adapters that could be read.

    Attributes:
        core: the core's collection, in the order of `paths`.
        paths: where each lies.
        names: a distinct name for each.
        members: what the core says of each.
        errors: what could not be read.
    """

    core: _core.Collection
    paths: list[Path]
    names: list[str]
    members: list[_core.Member]
    errors: list[ScanError]


def collected(adapters: Adapters, threads: int | None, progress: Progress) -> Collected:
    """Opens each adapter for a moment; those that cannot be read are errors, not the end.

    Raises:
        ValueError: no path was given, or an argument is outside its domain.
        FileNotFoundError: no path is there.
        AdapterError: there is no adapter, or none that can be read.
    """
    found, errors, names = found_by(adapters)
    return opened(found, errors, names, threads, progress=progress)


def found_by(adapters: Adapters) -> tuple[list[Path], list[ScanError], list[str]]:
    """Adapters' paths, what could not be looked into, and the names: paths below the root.

    Raises:
        ValueError: no path was given.
        FileNotFoundError: no path is there.
        AdapterError: there is no adapter.
    """
    if isinstance(adapters, HasPaths):
        if not adapters.paths:
            raise AdapterError("the fleet holds no adapter that could be read")
        return list(adapters.paths), [], list(adapters.names)
    discovery = discover(adapters)
    names = names_below(discovery.root, discovery.adapters)
    return list(map(Path, discovery.adapters)), list(discovery.errors), names


def opened(
    found: Sequence[Path],
    errors: list[ScanError],
    names: Sequence[str],
    threads: int | None,
    *,
    progress: Progress,
) -> Collected:
    """Opens adapters whose paths are known; adds to `errors` what cannot be read.

    Raises:
        ValueError: an argument is outside its domain.
        AdapterError: there is no adapter that can be read.
    """
    check_threads(threads)
    sources, positions = _readable(found, errors)
    # A callable is told of the work that follows.
    with pace(progress is True, "opening", len(sources), "adapters") as report:
        core, failures = _core.open_collection(sources, threads=threads, progress=report)
    failed = {position for position, _ in failures}
    errors += [
        ScanError(path, _reason(error, path))
        for path, error in ((found[positions[at]], error) for at, error in failures)
    ]
    kept = [place for at, place in enumerate(positions) if at not in failed]
    if not kept:
        raise AdapterError(_nothing(errors))
    paths, chosen = [found[place] for place in kept], [names[place] for place in kept]
    return Collected(core, paths, chosen, core.members(), errors)


def _readable(found: Sequence[Path], errors: list[ScanError]) -> tuple[list[CoreSource], list[int]]:
    """Each adapter as the core opens it, and its place."""
    sources: list[CoreSource] = []
    positions = []
    for place, path in enumerate(found):

        def fail(error: Exception, path: Path = path) -> None:
            errors.append(ScanError(path, _reason(error, path)))

        with gate(fail):
            sources.append(core_source(path))
            positions.append(place)
    return sources, positions


def _reason(error: Exception, path: Path) -> str:
    """What went wrong, without the path that stands beside it."""
    reason = reason_of(error)
    return reason.removeprefix(f"{path}: ").removeprefix(f"{path}{os.sep}")


def _nothing(errors: Sequence[ScanError]) -> str:
    if not errors:
        return "there is no adapter"
    first = errors[0]
    rest = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return f"no adapter could be read; {first.path}: {first.reason}{rest}"


def apart(found: Collected, groups: Iterable[Sequence[int]]) -> list[str]:
    """Which groups of adapters are not comparable, and why: a sentence for each two of them.

    Those that are of different bases are apart for that.
    """
    notes = []
    known = [members for members in groups if members]
    for place, members in enumerate(known):
        for others in known[place + 1 :]:
            reason = found.core.reason_apart(members[0], others[0])
            if reason is not None:
                one, other = (_and_others(found, group) for group in (members, others))
                notes.append(f"{one} cannot be compared with {other}: {reason}")
    return notes


def _and_others(found: Collected, members: Sequence[int]) -> str:
    name, more = found.names[members[0]], len(members) - 1
    return f"{name} and {more} other{'s' * (more > 1)}" if more else name


def families(found: Collected) -> list[list[int]]:
    """The positions of the adapters that can be compared with each other."""
    known: dict[int, list[int]] = {}
    for at, member in enumerate(found.members):
        known.setdefault(member["family"], []).append(at)
    return list(known.values())
