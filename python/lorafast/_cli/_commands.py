"""The one place where subcommands are registered, in the order of the help."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafast._cli._command import Command

#: The modules of this package, by the names of their commands.
MODULES = {
    "merge": "_merge",
    "verify": "_verify",
    "subtract": "_subtract",
    "recover": "_recover",
    "info": "_info",
    "analyze": "_analyze",
    "compare": "_compare",
    "scan": "_scan",
    "similar": "_similar",
    "duplicates": "_duplicates",
    "lineage": "_lineage",
    "report": "_report",
    "demo": "_demo",
}


def commands(argv: list[str]) -> list[Command]:
    """The commands that a command line can need: the one it begins with, or all of them."""
    names = argv[:1] if argv and argv[0] in MODULES else list(MODULES)
    return [_command(name) for name in names]


def _command(name: str) -> Command:
    command: Command = import_module(f"lorafast._cli.{MODULES[name]}").COMMAND
    return command
