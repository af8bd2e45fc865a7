"""`lorafast combine`: one adapter of several."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, get_args

from lorafast._cli.algebra import add_base, add_output, finish, rank_of, writing
from lorafast._cli.command import Command
from lorafast._cli.options import checked
from lorafast._types import CombineMethod
from lorafast._weights import weight_of

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal

METHODS: tuple[str, ...] = get_args(CombineMethod)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast combine`."""
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="the adapters, in any format"
    )
    parser.add_argument(
        "-m",
        "--method",
        default="linear",
        choices=METHODS,
        metavar="METHOD",
        help=f"how they become one: {', '.join(METHODS)}",
    )
    parser.add_argument(
        "-w",
        "--weights",
        nargs="+",
        type=checked(weight_of),
        metavar="W",
        help="a weight for each: a number, or PATTERN=NUMBER,… by module names (*.q_proj=0.5,*=1)",
    )
    parser.add_argument(
        "-r",
        "--rank",
        metavar="RULE",
        help="cut to this rank: a number, auto, energy:0.95, error:0.01, sv_ratio:20, …, "
        "budget:ranks=512 (default: the sum of the ranks, which is exact)",
    )
    parser.add_argument(
        "--option",
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="an option of the method, as t=0.3 for slerp",
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of random masks (default: 0)"
    )
    parser.add_argument(
        "--compat",
        choices=("peft", "kohya"),
        help="PEFT's results on raw factors, or the rank rules of kohya's older scripts",
    )
    add_base(parser, "for DoRA and the like, for saved modules, and where names depend on it")
    add_output(parser)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Combine, and show the report."""
    import lorafast

    adapters = list(arguments.adapters)
    report = lorafast.combine(
        adapters,
        arguments.output,
        method=arguments.method,
        weights=arguments.weights,
        rank=None if arguments.rank is None else rank_of(arguments.rank),
        options=dict(_option(arguments, text) for text in arguments.option),
        seed=arguments.seed,
        base=arguments.base,
        compat=arguments.compat,
        **writing(arguments),
    )
    return finish(report, f"Combined {len(adapters)} adapters", arguments, terminal)


def _option(arguments: argparse.Namespace, text: str) -> tuple[str, Any]:
    """A method's option, and its value as Python has it."""
    name, sign, value = text.partition("=")
    if not sign:
        arguments.parser.error(f"argument --option: {text!r} is not NAME=VALUE")
    words = {"true": True, "false": False}
    if value.lower() in words:
        return name, words[value.lower()]
    for kind in (int, float):
        try:
            return name, kind(value)
        except ValueError:
            continue
    return name, value


COMMAND = Command(
    name="combine",
    summary="make one adapter of several",
    description="Combine the updates of several adapters, whatever their formats, ranks and\n"
    "scales, without the model. Every module's error is measured and shown.",
    examples=(
        "lorafast combine style subject --weights 1 0.6 -o both",
        "lorafast combine a b c --method karcher --rank 16 -o mean",
        "lorafast combine a b --method ties --option density=0.5 --rank 32 -o both",
        "lorafast combine a b --rank budget:bytes=20MB --dry-run -o small",
    ),
    add_arguments=add_arguments,
    run=run,
)
