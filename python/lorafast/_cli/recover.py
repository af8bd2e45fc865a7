"""`lorafast recover`: bring an output to order in which a merge was cut off."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.command import Command

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal

#: What was done, in words.
SENTENCES = {
    "nothing": "no merge was cut off there",
    "cleared": "a merge was cut off while it wrote; what it left is removed",
    "finished": "a merge was cut off as it put its model in place, or after that; the model is "
    "whole, its report may be missing",
    "taken_back": "a merge was cut off and its model is not whole; what was there before is back",
    "kept": "a finished model that could not be moved into place lies in its .lorafast-partial",
}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast recover`."""
    parser.add_argument("output", metavar="DIR", help="the output directory of a merge")
    parser.add_argument("--json", action="store_true", help="print what was done as JSON")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Recover, and say what was done."""
    from lorafast import recover

    done = recover(arguments.output)
    if arguments.json:
        terminal.json({"output": arguments.output, "done": done})
    else:
        terminal.line(f"{arguments.output}: {SENTENCES[done]}")
    return 0


COMMAND = Command(
    name="recover",
    summary="finish or take back a merge that was killed",
    description="Bring an output directory to order in which a merge was cut off: finish putting\n"
    "its model in place, or put back what was there before. The next merge into the directory\n"
    "does so by itself.",
    examples=("lorafast recover llama-style",),
    add_arguments=add_arguments,
    run=run,
)
