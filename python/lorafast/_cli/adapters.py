"""Adapters as a command line gives them: paths, several in one word, and weights behind them."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import argparse
    from collections.abc import Iterable, Sequence

    from lorafast._types import Weight


def adapters_of(
    arguments: argparse.Namespace, words: Iterable[str]
) -> tuple[list[str], Sequence[Weight] | None]:
    """The adapters that words name, and their weights, if any has one.

    A word is an adapter; several with commas between them; or either with a weight behind a colon,
    `style:0.7`. What is there under the word as it stands is taken as it stands.

    Args:
        arguments: the parsed command line, with the weights that `--weights` gives.
        words: what was given as adapters.
    """
    found = [each for word in words for each in _parts(word)]
    adapters = [name for name, _ in found]
    given: Sequence[Weight] | None = arguments.weights
    if all(weight is None for _, weight in found):
        return adapters, given
    if given is not None:
        arguments.parser.error("weights stand both behind adapters and in --weights; give one")
    return adapters, [1.0 if weight is None else weight for _, weight in found]


def _parts(word: str) -> list[tuple[str, float | None]]:
    if _is_there(word):
        return [(word, None)]
    parts = [part for part in word.split(",") if part]
    if len(parts) > 1:
        return [named for part in parts for named in _parts(part)]
    name, colon, tail = word.rpartition(":")
    if colon and name:
        try:
            return [(name, float(tail))]
        except ValueError:
            pass
    return [(word, None)]


def _is_there(word: str) -> bool:
    from lorafast._io.paths import expand

    return os.path.lexists(expand(word))
