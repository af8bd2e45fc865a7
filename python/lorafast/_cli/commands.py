"""The one place where subcommands are registered, in the order of the help."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafast._cli.command import Command

#: The commands, each a module of this package under its name, with underscores.
NAMES = (
    "merge",
    "verify",
    "subtract",
    "recover",
    "clean",
    "inspect",
    "convert",
    "combine",
    "resize",
    "bake",
    "extract",
    "analyze",
    "compare",
    "scan",
    "scan-diff",
    "similarity",
    "duplicates",
    "lineage",
    "trajectory",
    "report",
    "demo",
    "completion",
)
#: Names that commands have had, and the ones that they have now.
RENAMED = {"info": "inspect", "similar": "similarity"}


def commands(argv: list[str]) -> list[Command]:
    """The commands that a command line can need: the one it begins with, or all of them."""
    names = argv[:1] if argv and argv[0] in NAMES else NAMES
    return [_command(name) for name in names]


def _command(name: str) -> Command:
    command: Command = import_module(f"lorafast._cli.{name.replace('-', '_')}").COMMAND
    return command
