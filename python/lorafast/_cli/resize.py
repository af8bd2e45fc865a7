"""`lorafast resize`: an adapter of other ranks."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.algebra import add_base, add_output, finish, rank_of, writing
from lorafast._cli.command import Command

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast resize`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter in any format that is read")
    parser.add_argument(
        "-r",
        "--rank",
        required=True,
        metavar="RULE",
        help="a number, auto, energy:0.95, error:0.01, sv_ratio:20, sv_fro:0.95, "
        "sv_cumulative:0.9, or for all modules together budget:ranks=512, "
        "budget:parameters=2000000, budget:bytes=20MB",
    )
    parser.add_argument(
        "--max-rank", type=int, metavar="N", help="no module gets more, as servers ask"
    )
    parser.add_argument(
        "--relative-to",
        default="absolute",
        choices=("absolute", "base"),
        help="what a budget weighs modules by: their error, or that over the base's weight",
    )
    parser.add_argument("--compat", choices=("kohya",), help="the rank rules of older scripts")
    add_base(parser, "for relative budgets and where names depend on it")
    add_output(parser)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Resize, and show the report."""
    import lorafast

    report = lorafast.resize(
        arguments.adapter,
        arguments.output,
        rank=rank_of(arguments.rank),
        max_rank=arguments.max_rank,
        relative_to=arguments.relative_to,
        base=arguments.base,
        compat=arguments.compat,
        **writing(arguments),
    )
    return finish(report, f"Resized {arguments.adapter}", arguments, terminal)


COMMAND = Command(
    name="resize",
    summary="write an adapter with other ranks",
    description="Cut each module's update to its best approximation of a smaller rank, or pad it\n"
    "with zeros to a larger one, without the model.",
    examples=(
        "lorafast resize adapter --rank 16 -o adapter-16",
        "lorafast resize adapter --rank energy:0.95 --max-rank 64 -o small",
        "lorafast resize adapter --rank budget:bytes=20MB --dry-run -o small",
    ),
    add_arguments=add_arguments,
    run=run,
)
