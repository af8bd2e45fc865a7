"""Holds signatures of functions and flags of commands against tables of options."""

from __future__ import annotations

import argparse
import inspect
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from lorafast import _types
from lorafast._options import Option, members_of

#: What signatures name in their annotations.
NAMES = {**vars(_types), "os": os, "Callable": Callable, "Mapping": Mapping, "Sequence": Sequence}


def keywords(function: Any) -> dict[str, inspect.Parameter]:
    """A function's parameters that are given by name alone."""
    parameters = inspect.signature(function).parameters.values()
    return {each.name: each for each in parameters if each.kind is each.KEYWORD_ONLY}


def check_signature(function: Any, options: Iterable[Option], beside: set[str]) -> None:
    """Asserts that a function takes some options, with their types and defaults.

    Args:
        function: the function.
        options: the options.
        beside: its other keywords.
    """
    given = keywords(function)
    expected = {option.name: option for option in options}
    assert {name: each.default for name, each in given.items() if name not in beside} == {
        name: option.default for name, option in expected.items()
    }
    assert beside <= given.keys()
    for name, option in expected.items():
        kind = given[name].annotation
        kind = eval(kind, NAMES) if isinstance(kind, str) else kind
        assert members_of(kind) == option.members, name


def check_flags(
    add_arguments: Callable[[argparse.ArgumentParser], None], options: Iterable[Option]
) -> None:
    """Asserts that a command has a flag for each of some options, with its help and its default."""
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    shown = {
        action.dest: action for action in parser._actions if action.help is not argparse.SUPPRESS
    }
    for option in options:
        if option.help is None:
            assert option.name not in shown
            continue
        action, flag = shown[option.name], option.flag
        name = flag.name or option.name.replace("_", "-")
        letter = [f"-{flag.short}"] if flag.short else []
        long = f"--no-{name}" if option.default is True else f"--{name}"
        assert action.option_strings == [*letter, long]
        default = [] if option.default == () else option.default
        assert action.default == (default if flag.unit is None else default // flag.unit)
        assert action.help == option.help
        assert action.metavar == flag.metavar
        if option.choices is not None:
            assert tuple(action.choices or ()) == option.choices
