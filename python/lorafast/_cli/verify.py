"""`lorafast verify`: hold a merged checkpoint against the base and the adapters."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import count_text, plural
from lorafast._cli.merge import add_input_arguments, inputs_of
from lorafast._cli.options import add_options
from lorafast._merge.api import options_of
from lorafast._words import agree

if TYPE_CHECKING:
    import argparse

    import lorafast
    from lorafast._cli.terminal import Terminal

EXIT_PROBLEMS = 3
#: Problems that are spelled out; the JSON has them all.
SHOWN = 10


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast verify`."""
    inputs = add_input_arguments(parser)
    inputs.add_argument(
        "--merged", required=True, metavar="PATH", help="the merged model, whoever made it"
    )
    how = parser.add_argument_group("how it was merged")
    outcome = parser.add_argument_group("what to check and show")
    add_options(parser, options_of("verify"), how, outcome)
    outcome.add_argument(
        "--full",
        action="store_true",
        help="compute every row of the merged weights in float64 as well, not a sample",
    )
    outcome.add_argument(
        "--digests",
        action="store_true",
        help="--merged is the merge_report.json of an exact merge: hold its digests against what "
        "base and adapters make; the model need not be there",
    )
    outcome.add_argument("--json", action="store_true", help="print the outcome as JSON")
    outcome.add_argument(
        "--quiet", action="store_true", help="print problems, warnings and errors only"
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Verify, and show what was found."""
    from lorafast import verify

    adapters, options = inputs_of(arguments, "verify")
    outcome = verify(
        arguments.base,
        adapters,
        arguments.merged,
        full=arguments.full,
        digests=arguments.digests,
        **options,
    )
    if arguments.json:
        terminal.json(outcome.to_dict())
    else:
        show(outcome, terminal)
    for warning in outcome.warnings:
        terminal.warn(warning)
    return 0 if outcome.ok else EXIT_PROBLEMS


def show(outcome: lorafast.Verification, terminal: Terminal) -> None:
    """Print the verdict, what it rests on, and what rounding did."""
    if outcome.ok:
        terminal.heading("The merge is right")
    else:
        terminal.problem(
            f"{plural(len(outcome.problems), 'problem')}: the merge is not what it should be"
        )
        for problem in outcome.problems[:SHOWN]:
            terminal.problem(f"  {problem}")
        if len(outcome.problems) > SHOWN:
            terminal.problem(f"  and {len(outcome.problems) - SHOWN} more")
    compared = f"{plural(outcome.tensors_copied, 'tensor')} that no adapter changes"
    if outcome.tensors_replaced:
        replaced = outcome.tensors_replaced
        compared += f", {replaced:,} that {agree(replaced, 'is', 'are')} replaced"
    lost = f"{outcome.lost:.2%} of the change; {outcome.unmoved:.2%} of the weights did not move"
    if len(outcome.adapters) > 1:
        shares = (f"{entry['adapter']} {entry['lost']:.2%}" for entry in outcome.adapters)
        lost += f" (as a share of each adapter's own change: {', '.join(shares)})"
    terminal.facts(
        {
            "computed again": f"{plural(outcome.tensors_merged, 'tensor')}, "
            f"{outcome.rows_exact:,} of their rows in float64 as well",
            "compared": compared,
            "weights in all": count_text(outcome.elements),
            "lost to rounding": lost,
        }
    )


COMMAND = Command(
    name="verify",
    summary="prove that a merged model is right",
    description="Compare every tensor of a merged model with what base and adapters make: the\n"
    "untouched ones byte for byte, the merged ones computed again. The first tensor\n"
    "that differs is named, and how.",
    examples=(
        "lorafast verify --base llama --adapters style --merged llama-style",
        "lorafast verify --base llama --adapters style --merged llama-style --full --json",
    ),
    add_arguments=add_arguments,
    run=run,
    exit_codes=((EXIT_PROBLEMS, "the model is not what it should be"),),
)
