"""`lorafast lineage`: what an adapter was made of, and the order of a run's checkpoints."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import plural
from lorafast._cli.similar import add_fleet_arguments, warn_of_errors
from lorafast._cli.terminal import Column
from lorafast._report.text import ABSENT, format_cosine, format_number

if TYPE_CHECKING:
    from lorafast import Lineage, Trajectory
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
    parser.add_argument(
        "--checkpoints",
        action="store_true",
        help="put the adapters named, the checkpoints of one run, in order instead",
    )
    parser.add_argument(
        "--by",
        choices=("update", "name", "given"),
        default="update",
        help="with --checkpoints: what the order follows (default: the updates)",
    )
    add_fleet_arguments(parser)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Take the target apart, or order the checkpoints."""
    import lorafast

    options = {"threads": arguments.threads, "progress": not arguments.quiet}
    result: Lineage | Trajectory
    if arguments.checkpoints:
        paths = [arguments.target, *arguments.candidates]
        result = lorafast.trajectory(paths, by=arguments.by, **options)
    elif not arguments.candidates:
        arguments.parser.error("name a candidate that the target may be made of")
    else:
        result = lorafast.lineage(arguments.target, arguments.candidates, **options)
    warn_of_errors(result.errors, terminal)
    if arguments.json:
        terminal.json(result.to_dict())
    elif isinstance(result, lorafast.Trajectory):
        _show_trajectory(result, terminal)
    else:
        _show_lineage(result, terminal)
    return 0


def _show_lineage(lineage: Lineage, terminal: Terminal) -> None:
    terminal.heading(f"{lineage.name} ≈ {lineage}")
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
                f"{lineage.coefficients[path]:.4f}" if path not in lineage.dependent else "–",
                f"{lineage.contributions[path]:.4f}" if path not in lineage.dependent else "–",
                f"{lineage.cosines[path]:.4f}",
                f"left out: {lineage.dependent[path]}" if path in lineage.dependent else "",
            )
            for path in paths[:MAX_CANDIDATES]
        ],
    )
    rest = len(paths) - MAX_CANDIDATES
    if rest > 0:
        terminal.line(f"  and {plural(rest, 'candidate')} more; --json has all of them")


def _show_trajectory(trajectory: Trajectory, terminal: Terminal) -> None:
    terminal.heading(f"{plural(len(trajectory.steps), 'checkpoint')} in order")
    if trajectory.by == "update" and not trajectory.agrees:
        terminal.line("  note: the numbers in the names give another order")

    def pair(values: tuple[float, float] | None) -> str:
        return ABSENT if values is None else f"{values[0]:.3f} {values[1]:.3f}"

    terminal.table(
        [
            Column("checkpoint"),
            *(
                Column(name, number=True)
                for name in (
                    *("‖ΔW‖", "effective rank", "change", "cos before", "cos last"),
                    *("φ before (out in)", "φ last (out in)"),
                )
            ),
        ],
        [
            (
                step.name,
                f"{step.norm:.4g}",
                f"{step.effective_rank:.3g}",
                format_number(step.change, 3),
                format_cosine(step.cosine_previous),
                format_cosine(step.cosine_last),
                pair(step.subspace_previous),
                pair(step.subspace_last),
            )
            for step in trajectory.steps
        ],
    )


COMMAND = Command(
    name="lineage",
    summary="find what an adapter was mixed of, or the order of a run's checkpoints",
    description="Write an adapter's update as the combination of candidates that is nearest to\n"
    "it, by least squares; or put the checkpoints of one run in order.",
    examples=(
        "lorafast lineage mixed style facts",
        "lorafast lineage unknown adapters/",
        "lorafast lineage --checkpoints run/checkpoint-*",
    ),
    add_arguments=add_arguments,
    run=run,
)
