"""Flags made of tables of options, and flags and commands that have had other names."""

from __future__ import annotations

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lorafast._cli.terminal import printable

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from lorafast._options import Option


def add_options(
    parser: argparse.ArgumentParser,
    options: Iterable[Option],
    how: argparse._ArgumentGroup | None = None,
    output: argparse._ArgumentGroup | None = None,
) -> None:
    """Declare a flag for each of some options that the command has.

    Args:
        parser: the command's, which understands older names too.
        options: the options.
        how: the group of those that say how the work is done; the parser itself if `None`.
        output: the group of those that say what is written; likewise.
    """
    for option in options:
        flag = option.flag
        if option.help is None:
            continue
        group = (output if flag.output else how) or parser
        settings = _settings(option)
        names = ([f"-{flag.short}"] if flag.short else []) + [_flag(option)]
        group.add_argument(*names, dest=option.name, help=option.help, **settings)
        if flag.older_name is not None:
            settings |= {"default": argparse.SUPPRESS, "action": Renamed, "newer": _flag(option)}
            older = f"--{flag.older_name}"
            parser.add_argument(older, dest=option.name, help=argparse.SUPPRESS, **settings)


def chosen(arguments: argparse.Namespace, options: Iterable[Option]) -> dict[str, Any]:
    """The values that a command line gives to some options, by their names."""
    given: dict[str, Any] = {}
    for option in options:
        unit = option.flag.unit
        if option.name == "progress":
            # The one that has no flag of its own.
            given["progress"] = not arguments.quiet
        elif option.help is not None:
            value = getattr(arguments, option.name)
            given[option.name] = value if unit is None else max(1, int(value * unit))
    return given


class NamedValue(argparse.Action):
    """A flag that is given once for each of some values, with the value's name: `density=0.5`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the value to those that were given before."""
        name, equals, text = str(values).partition("=")
        words = {"true": True, "false": False}
        try:
            value = words[text.lower()] if text.lower() in words else float(text)
        except ValueError:
            equals = ""
        if not (name and equals):
            parser.error(
                f"{option_string} takes NAME=VALUE, the value a number, true or false, not "
                f"{values!r}"
            )
        whole = isinstance(value, float) and value.is_integer()
        given = dict(getattr(namespace, self.dest) or {})
        given[name.replace("-", "_")] = int(value) if whole else value
        setattr(namespace, self.dest, given)


class NamedText(argparse.Action):
    """A flag that is given once for each of some texts, with the text's name: `aws_region=eu`."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Add the text to those that were given before."""
        name, equals, text = str(values).partition("=")
        if not (name and equals):
            # What was meant as a value may be a secret.
            parser.error(f"{option_string} takes KEY=VALUE")
        setattr(namespace, self.dest, dict(getattr(namespace, self.dest) or {}) | {name: text})


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
    name = option.flag.name or option.name.replace("_", "-")
    return f"--no-{name}" if option.default is True else f"--{name}"


def _settings(option: Option) -> dict[str, Any]:
    """What argparse has to know of an option's type."""
    if isinstance(option.default, bool):
        return {"action": "store_false" if option.default else "store_true"}
    if option.default is None and bool in option.members:
        return {"action": "store_const", "const": True, "default": None}
    settings: dict[str, Any] = {"default": option.default}
    if option.flag.metavar is not None:
        settings["metavar"] = option.flag.metavar
    if option.is_mapping:
        settings["action"] = NamedText if option.holds_texts else NamedValue
    elif option.choices is not None:
        settings["choices"] = option.choices
    elif option.items is not None:
        default = None if option.default is None else list(option.default)
        several = (
            {"action": "append"} if option.flag.repeated else {"nargs": "+", "action": "extend"}
        )
        kind = option.items if option.flag.check is None else checked(option.flag.check)
        settings |= {**several, "type": kind, "default": default}
    elif option.flag.check is not None:
        settings["type"] = checked(option.flag.check)
    elif option.flag.unit is not None:
        settings |= {"type": float, "default": float(option.default // option.flag.unit)}
    elif int in option.members and str not in option.members:
        settings["type"] = int
    elif float in option.members:
        settings["type"] = float
    return settings


def executor_type(text: str) -> str:
    """The name of an executor, for argparse."""
    from lorafast._io.executors import check_executor_name

    name: str = checked(check_executor_name)(text)
    return name


def checked(check: Callable[[str], Any]) -> Callable[[str], Any]:
    """A check as argparse's `type`, whose words are shown."""

    def convert(text: str) -> Any:
        try:
            return check(text)
        except ValueError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return convert
