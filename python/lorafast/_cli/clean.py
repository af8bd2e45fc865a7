"""`lorafast clean`: remove what unfinished merges left in an object store."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import plural
from lorafast._cli.options import add_options, chosen
from lorafast._merge.options import StoreOptions
from lorafast._options import options_in

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast clean`."""
    parser.add_argument("output", metavar="URL", help="the output of a merge that did not finish")
    add_options(parser, options_in(StoreOptions, verb="clean"))
    parser.add_argument("--json", action="store_true", help="print what was removed as JSON")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Remove what is left, and say what that was."""
    from lorafast import clean

    removed = clean(arguments.output, **chosen(arguments, options_in(StoreOptions, verb="clean")))
    if arguments.json:
        terminal.json({"removed": removed})
    else:
        what = plural(len(removed), "object") if removed else "nothing was left to be"
        terminal.line(f"{what} removed")
    return 0


COMMAND = Command(
    name="clean",
    summary="remove what an unfinished merge left in an object store",
    description="Remove claim, markers and shards of merges that did not finish. A finished model\n"
    "that lies there stays. The same merge, run again, would complete it instead.",
    examples=("lorafast clean s3://models/llama-style",),
    add_arguments=add_arguments,
    run=run,
)
