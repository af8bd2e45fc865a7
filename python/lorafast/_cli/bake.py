"""`lorafast bake`: the same update in other factors."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.algebra import add_base, add_output, finish, rank_of, writing
from lorafast._cli.command import Command

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast bake`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter in any format that is read")
    parser.add_argument(
        "--scale",
        default="keep",
        choices=("keep", "fold"),
        help="fold: multiply the factors by the scale, so that alpha is the rank",
    )
    parser.add_argument("--alpha", type=float, metavar="A", help="the alpha to write")
    parser.add_argument(
        "--rslora",
        choices=("true", "false"),
        help="write a scale of α/√r, or of α/r (default: as it is)",
    )
    parser.add_argument("--pad-to", type=int, metavar="N", help="pad all ranks to N with zeros")
    parser.add_argument(
        "--gauge",
        default="keep",
        choices=("keep", "balanced", "orthonormal"),
        help="balanced: factors of even size, exactly; orthonormal: singular vectors",
    )
    parser.add_argument(
        "--plain",
        action="store_true",
        help="plain factors of PiSSA, OLoRA, KaSA, DoRA and the like, which need the base",
    )
    parser.add_argument(
        "-r",
        "--rank",
        metavar="RULE",
        help="with --plain: the rank of what is made of whole weights (DoRA and the like): a "
        "number, error:0.1, energy:0.9, … (default: the least that loses no more than rounding)",
    )
    add_base(parser, "for --plain and where names depend on it")
    add_output(parser)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Bake, and show the report."""
    import lorafast

    report = lorafast.bake(
        arguments.adapter,
        arguments.output,
        scale=arguments.scale,
        alpha=arguments.alpha,
        rslora=None if arguments.rslora is None else arguments.rslora == "true",
        pad_to=arguments.pad_to,
        gauge=arguments.gauge,
        plain=arguments.plain,
        rank=None if arguments.rank is None else rank_of(arguments.rank),
        base=arguments.base,
        **writing(arguments),
    )
    return finish(report, f"Baked {arguments.adapter}", arguments, terminal)


COMMAND = Command(
    name="bake",
    summary="write the same update in other factors",
    description="Fold scales into factors, relabel alphas, pad ranks, balance factors, change\n"
    "their type, or make plain ones of PiSSA's and DoRA's, without changing the update.",
    examples=(
        "lorafast bake adapter --scale fold --dtype bfloat16 -o adapter-bf16",
        "lorafast bake adapter --pad-to 64 -o padded",
        "lorafast bake pissa --plain --base llama -o plain",
        "lorafast bake dora --plain --base llama --rank 64 -o plain",
    ),
    add_arguments=add_arguments,
    run=run,
)
