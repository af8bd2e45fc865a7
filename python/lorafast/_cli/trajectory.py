"""`lorafast trajectory`: the order of a run's checkpoints, and how each moves to the next."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import plural
from lorafast._cli.options import chosen
from lorafast._cli.similarity import add_fleet_arguments, warn_of_errors
from lorafast._cli.terminal import Column
from lorafast._options import options_in
from lorafast._similarity.options import TrajectoryOptions

if TYPE_CHECKING:
    import argparse

    from lorafast import Trajectory
    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast trajectory`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="DIR",
        help="the checkpoints of one run: directories to search, adapters, or globs",
    )
    add_fleet_arguments(parser, TrajectoryOptions)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Order the checkpoints, and show how they move."""
    import lorafast
    from lorafast._io.plain import without_non_finite

    options = chosen(arguments, options_in(TrajectoryOptions))
    result = lorafast.trajectory(arguments.adapters, **options)
    warn_of_errors(result.errors, terminal)
    if arguments.json:
        terminal.json(without_non_finite(result.to_dict()))
    else:
        _show(result, terminal)
    return 0


def _show(trajectory: Trajectory, terminal: Terminal) -> None:
    terminal.heading(f"{plural(len(trajectory.steps), 'checkpoint')} in order")
    if trajectory.by == "update" and not trajectory.agrees:
        terminal.line("  note: the numbers in the names give another order")

    def number(value: float | None, digits: str) -> str:
        return "–" if value is None else f"{value:{digits}}"

    def pair(values: tuple[float, float] | None) -> str:
        return "–" if values is None else f"{values[0]:.3f} {values[1]:.3f}"

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
                number(step.change, ".3g"),
                number(step.cosine_previous, ".4f"),
                f"{step.cosine_last:z.4f}",
                pair(step.subspace_previous),
                pair(step.subspace_last),
            )
            for step in trajectory.steps
        ],
    )


COMMAND = Command(
    name="trajectory",
    summary="put the checkpoints of one run in order, and show how they move",
    description="Put the checkpoints of one run in the order of their updates, and show how far\n"
    "and in which direction each moves from the one before.",
    examples=(
        "lorafast trajectory run/checkpoint-*",
        "lorafast trajectory run --by name --json",
    ),
    add_arguments=add_arguments,
    run=run,
)
