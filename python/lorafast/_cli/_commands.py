"""The one place where subcommands are registered, in the order of the help."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli import (
    _analyze,
    _compare,
    _demo,
    _duplicates,
    _info,
    _lineage,
    _merge,
    _report,
    _scan,
    _similar,
    _subtract,
    _verify,
)

if TYPE_CHECKING:
    from lorafast._cli._command import Command

COMMANDS: tuple[Command, ...] = (
    _merge.COMMAND,
    _verify.COMMAND,
    _subtract.COMMAND,
    _info.COMMAND,
    _analyze.COMMAND,
    _compare.COMMAND,
    _scan.COMMAND,
    _similar.COMMAND,
    _duplicates.COMMAND,
    _lineage.COMMAND,
    _report.COMMAND,
    _demo.COMMAND,
)
