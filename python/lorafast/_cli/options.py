"""Flags made of the options of merging, and flags and commands that have had other names."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lorafast._cli.terminal import printable
from lorafast._merge.options import options_of

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorafast._merge.options import Option, Verb


def add_options(
    parser: argparse.ArgumentParser,
    how: argparse._ArgumentGroup,
    output: argparse._ArgumentGroup,
    verb: Verb,
) -> None:
    """Declare a flag for each option of a verb that the command has.

    Args:
        parser: the command's, which understands older names too.
        how: the group of those that say how the work is done.
        output: the group of those that say what is written.
        verb: whose options.
    """
    for option in options_of(verb):
        flag = option.flag
        if flag.help is None:
            continue
        group = output if flag.output else how
        settings = _settings(option)
        words = flag.other_help.get(verb, flag.help)
        group.add_argument(_flag(option), dest=option.name, help=words, **settings)
        if flag.older_name is not None:
            settings |= {"default": argparse.SUPPRESS, "action": Renamed, "newer": _flag(option)}
            older = f"--{flag.older_name}"
            parser.add_argument(older, dest=option.name, help=argparse.SUPPRESS, **settings)


def chosen(arguments: argparse.Namespace, verb: Verb) -> dict[str, Any]:
    """The options of a verb, by name, that a command line gives."""
    options = {
        option.name: getattr(arguments, option.name)
        for option in options_of(verb)
        if option.flag.help is not None
    }
    # The one that has no flag of its own.
    return options if verb == "plan" else options | {"progress": not arguments.quiet}


class Renamed(argparse.Action):
    """A flag that has another name now: it says so, and is taken for that one."""

    def __init__(self, option_strings: Sequence[str], *, newer: str, **settings: Any) -> None:
        super().__init__(option_strings, **settings)
        self.newer = newer

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Take the value."""
        say_renamed(str(option_string), self.newer)
        setattr(namespace, self.dest, values)


def say_renamed(older: str, newer: str) -> None:
    """Say on stderr what something is called now."""
    print(printable(f"{older} is called {newer} now"), file=sys.stderr)


def _flag(option: Option) -> str:
    name = option.name.replace("_", "-")
    return f"--no-{name}" if option.default is True else f"--{name}"


def _settings(option: Option) -> dict[str, Any]:
    """What argparse has to know of an option's type."""
    if isinstance(option.default, bool):
        return {"action": "store_false" if option.default else "store_true"}
    settings: dict[str, Any] = {"default": option.default}
    if option.flag.metavar is not None:
        settings["metavar"] = option.flag.metavar
    if option.choices is not None:
        settings["choices"] = option.choices
    elif option.items is not None:
        default = None if option.default is None else list(option.default)
        settings |= {"nargs": "+", "action": "extend", "type": option.items, "default": default}
    elif option.flag.check is not None:
        settings["type"] = _type(option.flag.check)
    elif int in option.members and str not in option.members:
        settings["type"] = int
    return settings


def _type(check: Any) -> Any:
    """A check as argparse's `type`, whose words are shown."""

    def checked(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return checked
