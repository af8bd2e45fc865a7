"""`lorafast subtract`: take adapters out of a merged model again."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import bytes_text, dtype_text, plural, seconds_text
from lorafast._cli.merge import DTYPES, adapters_text, add_strategy_arguments

if TYPE_CHECKING:
    import argparse

    import lorafast
    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast subtract`."""
    parser.add_argument(
        "merged", metavar="MERGED", help="the merged model: a directory, a file, or a hub id"
    )
    parser.add_argument(
        "adapters",
        metavar="ADAPTER",
        nargs="+",
        help="the adapters that are in it, in the order in which they were merged",
    )
    inputs = parser.add_argument_group("what to take them out of")
    inputs.add_argument("--output", required=True, metavar="DIR", help="the directory to write")
    inputs.add_argument(
        "--base",
        metavar="ORIGINAL",
        help="the base that they were merged into, if it is at hand: the merged model is proved to "
        "be made of it, and the output is this base, byte for byte",
    )
    how = add_strategy_arguments(parser)
    how.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="what to write the floating-point tensors as (default: %(default)s)",
    )
    outcome = parser.add_argument_group("what to write and show")
    outcome.add_argument(
        "--overwrite", action="store_true", help="replace the output directory if it exists"
    )
    outcome.add_argument("--verify", action="store_true", help="read the result back and prove it")
    outcome.add_argument(
        "--no-report",
        action="store_true",
        help="leave subtract_report.json and subtract_report.md out of the output",
    )
    outcome.add_argument("--json", action="store_true", help="print the report as JSON")
    outcome.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Subtract, and show how near the result is to the base."""
    from lorafast import subtract

    report = subtract(
        arguments.merged,
        arguments.adapters,
        arguments.output,
        original=arguments.base,
        strategy=arguments.merge_strategy,
        weights=arguments.weights,
        dtype=arguments.dtype,
        overwrite=arguments.overwrite,
        threads=arguments.threads,
        progress=not arguments.quiet,
        allow=arguments.allow,
        compat=arguments.compat,
        expert_layout=arguments.expert_layout,
        verify=arguments.verify,
        report=not arguments.no_report,
    )
    if arguments.json:
        terminal.json(report.to_dict())
    else:
        show(report, terminal)
    for warning in report.warnings:
        terminal.warn(warning)
    return 0


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
        "lorafast subtract llama-style style --output llama-again",
        "lorafast subtract mixed style facts --output llama-again --base llama \\",
        "    --merge-strategy weighted --weights 0.7 -0.3",
    ),
    add_arguments=add_arguments,
    run=run,
)
