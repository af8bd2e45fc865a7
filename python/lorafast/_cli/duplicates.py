"""`lorafast duplicates`: equivalent adapters, one update in different parameterizations."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorafast._analysis.options import CommonOptions
from lorafast._cli.command import Command
from lorafast._cli.format import plural
from lorafast._cli.options import chosen
from lorafast._cli.similarity import add_fleet_arguments, warn_of_errors
from lorafast._cli.terminal import Column
from lorafast._options import options_in

if TYPE_CHECKING:
    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast duplicates`."""
    parser.add_argument(
        "adapters", nargs="+", metavar="DIR", help="directories to search, adapters, or globs"
    )
    add_fleet_arguments(parser, CommonOptions)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Find the groups and show them with their evidence."""
    import lorafast
    from lorafast._similarity.duplicates import TIERS

    options = chosen(arguments, options_in(CommonOptions))
    found = lorafast.duplicates(arguments.adapters, **options)
    warn_of_errors(found.errors, terminal)
    if arguments.json:
        terminal.json(found.to_dict())
        return 0
    terminal.heading(f"Duplicates among {plural(len(found.names), 'adapter')}")
    for note in found.notes:
        terminal.line(f"  note: {note}")
    for tier, meaning in TIERS.items():
        groups = [group for group in found if group.tier == tier]
        if not groups:
            continue
        terminal.line()
        terminal.heading(meaning[0].upper() + meaning[1:])
        rows = []
        for group in groups:
            rows.append((group.names[0], "", ""))
            rows += [
                ("", name, evidence.text)
                for name, evidence in zip(group.names[1:], group.evidence, strict=True)
            ]
        terminal.table([Column("adapter (X)"), Column("the same (Y)"), Column("evidence")], rows)
    terminal.line()
    if len(found):
        terminal.line(
            f"{plural(len(found), 'group')}; {plural(found.redundant, 'adapter')} could go"
        )
    else:
        terminal.line("No two of them are the same update.")
    return 0


COMMAND = Command(
    name="duplicates",
    summary="find equivalent adapters: one update in different parameterizations",
    description="Find adapters that are the same update: copies, other headers, other factors,\n"
    "scale moved into the factors, other dtypes, scaled copies and truncations.",
    examples=("lorafast duplicates adapters/", "lorafast duplicates team-*/ --json"),
    add_arguments=add_arguments,
    run=run,
)
