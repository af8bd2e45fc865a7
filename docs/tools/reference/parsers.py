"""The command's parsers as plain values: what a page about a command says."""

from __future__ import annotations

import argparse
import re
from collections.abc import Iterator
from dataclasses import dataclass

from lorafast._cli.command import Command
from lorafast._cli.commands import commands
from lorafast._cli.parser import build_parser

#: What the help of an argument says of its default.
DEFAULT = re.compile(r"\s*\(default: ([^()]*(?:\([^()]*\)[^()]*)*)\)")
#: More choices than these are listed behind the help rather than in the argument's name.
CHOICES_IN_NAME = 4
#: Groups under argparse's own titles, which a page calls otherwise.
TITLES = {"positional arguments": "arguments", "options": "options"}


@dataclass(frozen=True)
class Argument:
    """An option or a positional argument.

    Attributes:
        flags: its flags, none of a positional argument.
        value: what stands for its values, with dots for several; "" if it has none.
        help: what it does, on one line, without its default.
        default: what its value is otherwise, in words; "" if that goes without saying.
        choices: all values that it may have, where these are not in `value`.
        required: whether it has to be given.
    """

    flags: tuple[str, ...]
    value: str
    help: str
    default: str
    choices: tuple[str, ...]
    required: bool


@dataclass(frozen=True)
class Group:
    """Arguments that the help shows together."""

    title: str
    arguments: tuple[Argument, ...]


@dataclass(frozen=True)
class Page:
    """A command: what it is, and all its arguments."""

    command: Command
    usage: str
    groups: tuple[Group, ...]

    @property
    def name(self) -> str:
        return self.command.name

    @property
    def paragraphs(self) -> list[str]:
        """The description, with a line a paragraph."""
        return [" ".join(text.split()) for text in self.command.description.split("\n\n")]


def pages() -> list[Page]:
    """All commands, in the order of the help."""
    every = commands([])
    parsers = _subparsers(build_parser(every))
    return [_page(command, parsers[command.name]) for command in every]


def _subparsers(parser: argparse.ArgumentParser) -> dict[str, argparse.ArgumentParser]:
    (action,) = (a for a in parser._actions if isinstance(a, argparse._SubParsersAction))
    return dict(action.choices)


def _page(command: Command, parser: argparse.ArgumentParser) -> Page:
    groups = []
    for group in parser._action_groups:
        arguments = tuple(_arguments(group._group_actions, parser))
        if arguments:
            title = str(group.title)
            groups.append(Group(TITLES.get(title, title), arguments))
    return Page(command, _usage(command.name, groups), tuple(groups))


def _arguments(
    actions: list[argparse.Action], parser: argparse.ArgumentParser
) -> Iterator[Argument]:
    for action in actions:
        # What is not shown are older names, and --help is everybody's.
        if action.help != argparse.SUPPRESS and not isinstance(action, argparse._HelpAction):
            yield _argument(action, parser)


def _argument(action: argparse.Action, parser: argparse.ArgumentParser) -> Argument:
    choices = tuple(map(str, action.choices)) if action.choices is not None else ()
    name = action.metavar
    if not isinstance(name, str):
        is_short = 0 < len(choices) <= CHOICES_IN_NAME
        flag = max(action.option_strings, key=len, default=action.dest)
        name = "|".join(choices) if is_short else flag.lstrip("-").replace("-", "_").upper()
        choices = () if is_short else choices
    words = " ".join((action.help or "").split())
    values = dict(vars(action), prog=parser.prog)
    if isinstance(values["default"], list):
        values["default"] = " ".join(map(str, values["default"]))
    words %= values
    told = DEFAULT.search(words)
    default = told[1] if told else _default(action)
    return Argument(
        flags=tuple(sorted(action.option_strings, key=lambda flag: len(flag.lstrip("-")) > 1)),
        value=_repeated(name, action.nargs),
        help=DEFAULT.sub("", words, count=1).strip(),
        default=default,
        choices=choices,
        required=action.required and bool(action.option_strings),
    )


def _default(action: argparse.Action) -> str:
    """A default that the help does not mention."""
    if action.nargs == 0 or action.default in (None, argparse.SUPPRESS, [], ""):
        return ""
    return str(action.default)


def _repeated(name: str, nargs: int | str | None) -> str:
    """What stands for the values of an argument."""
    if isinstance(nargs, int):
        return " ".join([name] * nargs)
    return {None: name, "?": f"[{name}]", "*": f"[{name} …]", "+": f"{name} …"}[nargs]


def _usage(name: str, groups: list[Group]) -> str:
    """The command line, with the options that must be given and the positional arguments."""
    words = ["lorafast", name]
    arguments = [argument for group in groups for argument in group.arguments]
    for argument in arguments:
        if argument.required:
            words += [max(argument.flags, key=len), argument.value]
    if any(argument.flags and not argument.required for argument in arguments):
        words.append("[OPTIONS]")
    words += [argument.value for argument in arguments if not argument.flags]
    return " ".join(words)
