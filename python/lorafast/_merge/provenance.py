"""What inputs are called away from the machine that they lie on: hub ids, revisions, names."""

from __future__ import annotations

import os
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafast._io.hub import CACHED, is_hub_url, parse

if TYPE_CHECKING:
    from collections.abc import Iterable

#: `owner/name`, as the hub allows it.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


class Identity(NamedTuple):
    """What a base or an adapter is called in reports.

    Attributes:
        name: its id on the hub, with the folder in it; else the name of its directory or file.
        revision: the commit on the hub.
        hub_id: its id on the hub, where it comes from there.
    """

    name: str
    revision: str | None = None
    hub_id: str | None = None


def identify(path: str) -> Identity:
    """What lies at a path is called, without the path."""
    named = parse(path) if is_hub_url(path) else None
    if named is not None:
        return Identity(str(named), named.revision, named.repository)
    place = _absolute(path)
    cached = CACHED.search(place)
    if cached is None:
        return Identity(Path(place).name or place)
    repository, revision, below = cached.groups()
    hub_id = "/".join(repository.split("--", 1))
    name = f"{hub_id}/{below.replace(os.sep, '/')}" if below else hub_id
    return Identity(name, revision, hub_id)


def _absolute(path: str) -> str:
    """A path from the root, with links as they are."""
    place = Path(path).absolute()
    return str(place.resolve() if ".." in place.parts else place)


def unique_names(paths: Iterable[str]) -> dict[str, str]:
    """A name for each path; those that would share one are numbered."""
    names: dict[str, str] = {}
    taken: set[str] = set()
    for path in paths:
        if path in names:
            continue
        own = name = identify(path).name
        number = 2
        while name in taken:
            name = f"{own} ({number})"
            number += 1
        taken.add(name)
        names[path] = name
    return names


def without_paths(value: Any, names: dict[str, str]) -> Any:
    """A value of plain objects in whose texts names stand in the place of paths.

    Args:
        value: lists, dictionaries, texts, numbers.
        names: a name for each path.
    """
    spelled = {_absolute(path): name for path, name in names.items()} | names
    # What lies below a path is called by its name and the rest.
    longest_first = sorted((path for path in spelled if path), key=len, reverse=True)
    pattern = re.compile(
        "|".join(rf"(?<![\w./\\-]){re.escape(path)}(?![\w-])" for path in longest_first)
    )

    def renamed(part: Any) -> Any:
        if isinstance(part, str):
            return pattern.sub(lambda found: spelled[found[0]], part) if longest_first else part
        if isinstance(part, dict):
            return {renamed(key): renamed(entry) for key, entry in part.items()}
        if isinstance(part, list | tuple):
            return [renamed(entry) for entry in part]
        return part

    return renamed(value)


def hub_id_of_base(path: str, told: Iterable[str | None]) -> str | None:
    """The id on the hub of a base, as its path, its config or its adapters tell it.

    Args:
        path: where the base lies.
        told: what each adapter calls the model that it was trained on.
    """
    own = identify(path).hub_id
    if own is not None:
        return own
    candidates = (_name_in_config(path), *told)
    return next((text for text in candidates if text and _is_hub_id(text)), None)


def _name_in_config(path: str) -> str | None:
    import json

    try:
        name = json.loads((Path(path) / "config.json").read_bytes()).get("_name_or_path")
    except (OSError, ValueError, AttributeError):
        return None
    return name if isinstance(name, str) else None


def _is_hub_id(text: str) -> bool:
    """Whether a text can only be an id on the hub: two parts, and no path here."""
    return HUB_ID.fullmatch(text) is not None and not os.path.lexists(text)
