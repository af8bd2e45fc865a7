"""`lorafast lineage`: what an adapter was made of."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorafast._analysis.options import CommonOptions
from lorafast._cli.command import Command
from lorafast._cli.format import plural
from lorafast._cli.options import add_options, chosen, say_renamed
from lorafast._cli.similarity import add_fleet_arguments, warn_of_errors
from lorafast._cli.terminal import Column
from lorafast._options import options_in
from lorafast._similarity.options import TrajectoryOptions

if TYPE_CHECKING:
    from lorafast import Lineage
    from lorafast._cli.terminal import Terminal

MAX_CANDIDATES = 30


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast lineage`."""
    parser.add_argument("target", metavar="TARGET", help="the adapter to take apart")
    parser.add_argument(
        "candidates",
        nargs="*",
        metavar="CANDIDATE",
        help="what it may be made of: directories to search, adapters, or globs",
    )
    # What `lorafast trajectory` does was once a mode of this command.
    parser.add_argument("--checkpoints", action="store_true", help=argparse.SUPPRESS)
    hidden = (each._replace(help=argparse.SUPPRESS) for each in options_in(TrajectoryOptions))
    add_options(parser, (each for each in hidden if each.name not in CommonOptions._fields))
    add_fleet_arguments(parser, CommonOptions)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Take the target apart."""
    if arguments.checkpoints:
        from lorafast._cli import trajectory

        say_renamed("lineage --checkpoints", "trajectory")
        arguments.adapters = [arguments.target, *arguments.candidates]
        return trajectory.run(arguments, terminal)
    if not arguments.candidates:
        arguments.parser.error("name a candidate that the target may be made of")
    import lorafast

    options = chosen(arguments, options_in(CommonOptions))
    result = lorafast.lineage(arguments.target, arguments.candidates, **options)
    warn_of_errors(result.errors, terminal)
    if arguments.json:
        terminal.json(result.to_dict())
    else:
        _show(result, terminal)
    return 0


def _show(lineage: Lineage, terminal: Terminal) -> None:
    terminal.heading(f"{lineage.name}{' ≈' if lineage.related else ':'} {lineage}")
    terminal.line()
    paths = sorted(lineage.coefficients, key=lambda path: -abs(lineage.contributions[path]))
    terminal.table(
        [
            Column("candidate"),
            Column("coefficient", number=True),
            Column("share of the norm", number=True),
            Column("cosine", number=True),
            Column(""),
        ],
        [
            (
                lineage.names[path],
                f"{lineage.coefficients[path]:z.4f}" if path not in lineage.dependent else "–",
                f"{lineage.contributions[path]:z.4f}" if path not in lineage.dependent else "–",
                f"{lineage.cosines[path]:z.4f}",
                f"left out: {lineage.dependent[path]}" if path in lineage.dependent else "",
            )
            for path in paths[:MAX_CANDIDATES]
        ],
    )
    rest = len(paths) - MAX_CANDIDATES
    if rest > 0:
        terminal.line(f"  and {plural(rest, 'candidate')} more; --json has all of them")


COMMAND = Command(
    name="lineage",
    summary="find what an adapter was mixed of",
    description="Write an adapter's update as the combination of candidates that is nearest to\n"
    "it, by least squares. Where that leaves more than 99 % of its norm, the adapter is made of\n"
    "nothing of these.",
    examples=(
        "lorafast lineage mixed style facts",
        "lorafast lineage unknown adapters/",
    ),
    add_arguments=add_arguments,
    run=run,
)
