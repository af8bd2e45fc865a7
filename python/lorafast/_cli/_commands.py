"""The one place where subcommands are registered, in the order of the help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli import _demo, _info, _merge

if TYPE_CHECKING:
    from lorafast._cli._command import Command

COMMANDS: tuple[Command, ...] = (
    _merge.COMMAND,
    _info.COMMAND,
    _demo.COMMAND,
)
