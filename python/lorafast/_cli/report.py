"""`lorafast report`: write the reports of an output directory again, from its JSON files."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._cli.command import Command

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast report`."""
    parser.add_argument(
        "directory", metavar="DIR", help="what `lorafast analyze` or `compare` wrote with --output"
    )
    parser.add_argument(
        "--format",
        choices=("md", "html"),
        help="write one of the two only (default: both)",
    )
    parser.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Read the analyses, write the reports, and list the files."""
    from lorafast._io.paths import expand
    from lorafast._report.directory import read_directory, write_reports

    directory = Path(expand(arguments.directory))
    analyses, comparison = read_directory(directory)
    for form in [arguments.format] if arguments.format else ["md", "html"]:
        for path in write_reports(directory, analyses, comparison, form):
            terminal.line(str(path))
    return 0


COMMAND = Command(
    name="report",
    summary="write reports from the results in an output directory",
    description="Write the Markdown and HTML reports of earlier analyses and comparisons, from\n"
    "the JSON files in DIR/analysis; the adapters themselves are not needed.",
    examples=("lorafast report runs/style", "lorafast report runs/style --format html"),
    add_arguments=add_arguments,
    run=run,
)
