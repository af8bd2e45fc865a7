"""The one place where subcommands are registered, in the order of the help."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafast._cli.command import Command

#: The modules of this package, by the names of their commands.
MODULES = {
    "merge": "merge",
    "verify": "verify",
    "subtract": "subtract",
    "recover": "recover",
    "info": "info",
    "analyze": "analyze",
    "compare": "compare",
    "scan": "scan",
    "similar": "similar",
    "duplicates": "duplicates",
    "lineage": "lineage",
    "report": "report",
    "demo": "demo",
}


def commands(argv: list[str]) -> list[Command]:
    """The commands that a command line can need: the one it begins with, or all of them."""
    names = argv[:1] if argv and argv[0] in MODULES else list(MODULES)
    return [_command(name) for name in names]


def _command(name: str) -> Command:
    command: Command = import_module(f"lorafast._cli.{MODULES[name]}").COMMAND
    return command
