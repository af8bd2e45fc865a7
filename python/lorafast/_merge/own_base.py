"""The base that adapters were trained on, as their own configs name it."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from lorafast._errors import AdapterError, PlanError
from lorafast._io.hub import SCHEME, parse, with_revision
from lorafast._io.paths import expand, find, is_directory, open_plain, resolved
from lorafast._io.plain import utf8
from lorafast._io.sources import BASE_PATTERNS, CONFIG, locate
from lorafast._io.stores import without_user
from lorafast._types import Source

#: Configs are a page long.
LONGEST = 16 << 20


class OwnBase(NamedTuple):
    """A base that nobody gave.

    Attributes:
        path: where it lies.
        note: where it is from, in a sentence.
    """

    path: Path
    note: str


def find_own_base(
    adapters: Sequence[Source], located: Sequence[object], revision: str | None = None
) -> OwnBase:
    """Finds the base that adapters name, and says on stderr which it is before it is fetched.

    A path in a config is one here, relative to the current directory, as PEFT takes it.

    Args:
        adapters: how the adapters were given.
        located: where they lie.
        revision: the base's, in the place of the one that the configs name.

    Raises:
        AdapterError: an adapter names none.
        PlanError: two of them name different ones.
        FileNotFoundError: it is not there.
        ValueError: there is no adapter, or one in a store; or a revision is given, and the base is
            a path here.
        LorafastError, OSError: as for `locate`.
    """
    if not adapters:
        raise ValueError("there are no adapters that could name the base; give both")
    names = [os.fspath(adapter) for adapter in adapters]
    bases = []
    for name, place in zip(names, located, strict=True):
        if not isinstance(place, Path):
            raise ValueError(
                f"{without_user(name)}: the base is looked for in configs that lie here or on the "
                "hub; give it (--base)"
            )
        bases.append(_named_base(name, place, revision))
    if any(_place(base) != _place(bases[0]) for base in bases):
        each = "; ".join(f"{name} names {base}" for name, base in zip(names, bases, strict=True))
        raise PlanError(f"the adapters name different base models: {each}; give the base (--base)")
    base = bases[0]
    whose = names[0] if len(names) == 1 else f"all {len(names)} adapters"
    note = f"no base was given: {base.removeprefix(SCHEME)}, which {CONFIG} of {whose} names"
    sys.stderr.write(f"note: {_printable(note)}\n")
    sys.stderr.flush()
    try:
        return OwnBase(locate(base, BASE_PATTERNS), note)
    except FileNotFoundError as error:
        why = f"{error.strerror} (the base that {CONFIG} of {names[0]} names; give it with --base)"
        raise FileNotFoundError(error.errno, why, error.filename) from error


def _named_base(name: str, located: Path, revision: str | None) -> str:
    """The base that one adapter names, as a path or an id with its revision.

    Raises:
        AdapterError: it names none.
        ValueError: as for `find_own_base`.
    """
    config = _config_of(located)
    base = config.get("base_model_name_or_path")
    if not isinstance(base, str) or not base.strip():
        raise AdapterError(
            f"{name}: does not name the model that it was trained on (base_model_name_or_path in "
            f"{CONFIG}); give the base (--base)"
        )
    base = base.strip()
    if find(expand(base)) is not None or parse(base) is None:
        return os.fspath(with_revision(base, revision))
    own = config.get("revision")
    if revision is None and isinstance(own, str) and own:
        named = parse(base)
        # A revision in the id itself is the more particular one.
        revision = own if named is not None and named.revision is None else None
    return os.fspath(with_revision(base, revision))


def _config_of(located: Path) -> dict[str, object]:
    """The config of an adapter; empty where there is none that could be read."""
    folder = located if is_directory(located) else located.parent
    if find(folder / CONFIG) is None:
        return {}
    with open_plain(folder / CONFIG, AdapterError) as file:
        text = file.read(LONGEST)
    try:
        config = json.loads(text)
    except (ValueError, RecursionError):
        # What opens the adapter says what is wrong with it, but only with a base.
        raise AdapterError(f"{folder / CONFIG}: is no JSON") from None
    return config if isinstance(config, dict) else {}


def _place(base: str) -> str:
    """What is the same for two spellings of one base."""
    if not base.startswith(SCHEME) and find(expand(base)) is not None:
        return str(resolved(expand(base)))
    named = parse(base)
    if named is None:
        return base
    return str(named._replace(revision=named.revision or "main"))


def _printable(text: str) -> str:
    """A text of strangers' as one line that moves no cursor."""
    return "".join(char if char.isprintable() else "?" for char in utf8(text))
