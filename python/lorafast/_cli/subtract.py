"""`lorafast subtract`: take adapters out of a merged model again."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING

from lorafast._cli.adapters import adapters_of
from lorafast._cli.command import Command
from lorafast._cli.format import bytes_text, dtype_text, plural, seconds_text
from lorafast._cli.merge import adapters_text
from lorafast._cli.options import add_options, chosen, say_renamed
from lorafast._merge.api import options_of

if TYPE_CHECKING:
    import lorafast
    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast subtract`."""
    inputs = parser.add_argument_group("what to take out, and of what")
    inputs.add_argument(
        "--merged", metavar="PATH", help="the merged model: a directory, a file, or a hub id"
    )
    inputs.add_argument(
        "-a",
        "--adapters",
        nargs="+",
        action="extend",
        default=[],
        metavar="PATH",
        help="the adapters that are in it, in the order in which they were merged",
    )
    inputs.add_argument(
        "-b",
        "--base",
        metavar="PATH",
        help="the base that they were merged into, if it is at hand: the merged model is proved to "
        "be made of it, and the output is this base, byte for byte",
    )
    inputs.add_argument(
        "-o", "--output", required=True, metavar="DIR", help="the directory to write"
    )
    # How the merged model and the adapters were given before they had flags.
    parser.add_argument("first", nargs="?", help=argparse.SUPPRESS)
    parser.add_argument("others", nargs="*", help=argparse.SUPPRESS)
    how = parser.add_argument_group("how it was merged, and how to subtract")
    outcome = parser.add_argument_group("what to write and show")
    add_options(parser, options_of("subtract"), how, outcome)
    outcome.add_argument("--json", action="store_true", help="print the report as JSON")
    outcome.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Subtract, and show how near the result is to the base."""
    from lorafast import subtract

    merged, words = _inputs(arguments)
    adapters, weights = adapters_of(arguments, words)
    options = chosen(arguments, options_of("subtract")) | {"weights": weights}
    report = subtract(merged, adapters, arguments.output, original=arguments.base, **options)
    if arguments.json:
        terminal.json(report.to_dict())
    else:
        show(report, terminal)
    for warning in report.warnings:
        terminal.warn(warning)
    return 0


def _inputs(arguments: argparse.Namespace) -> tuple[str, list[str]]:
    """The merged model and the adapters, which once were given without flags."""
    merged, adapters = arguments.merged, arguments.adapters
    if arguments.first is not None:
        if merged is not None or adapters:
            arguments.parser.error(f"unrecognized arguments: {arguments.first}")
        say_renamed("subtract MERGED ADAPTER …", "subtract --merged MERGED --adapters ADAPTER …")
        merged, adapters = arguments.first, arguments.others
    needed = {"--merged": merged is not None, "--adapters": bool(adapters)}
    missing = [name for name, given in needed.items() if not given]
    if missing:
        arguments.parser.error(f"the following arguments are required: {', '.join(missing)}")
    return merged, adapters


def show(report: lorafast.SubtractReport, terminal: Terminal) -> None:
    """Print what was done and how near the result is to the base."""
    count = plural(len(report.adapters), "adapter")
    terminal.heading(f"Took {count} out of {report.merged}")
    terminal.facts(
        {
            "output": report.output_path,
            "it is": report.exactness(),
            "adapters": adapters_text(report.adapters, report.weights),
            "strategy": report.strategy,
            "tensors": f"{report.tensors_changed:,} change",
            "dtype": "as before" if report.dtype == "auto" else dtype_text(report.dtype),
            "written": bytes_text(report.bytes_written),
            "time": seconds_text(report.seconds),
        }
    )
    for note in report.notes:
        terminal.line(f"note: {note}")


COMMAND = Command(
    name="subtract",
    summary="take adapters out of a merged model again",
    description="Write what a merged model was before adapters were merged into it. Without the\n"
    "base at hand the adapters are subtracted, which gives it back to within rounding, and the\n"
    "output says how near. With --base the merged model is proved to be made of it first, and\n"
    "the output is that base, byte for byte.",
    examples=(
        "lorafast subtract --merged llama-style --adapters style --output llama-again",
        "lorafast subtract --merged mixed --adapters style facts --base llama \\",
        "    --output llama-again --strategy weighted --weights 0.7 -0.3",
    ),
    add_arguments=add_arguments,
    run=run,
)
