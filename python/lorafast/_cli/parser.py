"""The argument parser: argparse, coloured by rich-argparse when help is shown."""

from __future__ import annotations

import argparse
import re
import sys
from typing import TYPE_CHECKING, Any, NoReturn

from lorafast._core import __version__

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorafast._cli.command import Command

# argparse before Python 3.14 takes `-1e-3` for a flag, and every version takes `-inf` for one; the
# merge has a better answer to an infinite weight than "expected at least one argument".
NEGATIVE_NUMBER = re.compile(r"-(\.?\d|inf|nan)", re.IGNORECASE)


#: A word that is wrong, in argparse's messages.
WRONG_WORD = re.compile(r"invalid choice: '([^']*)'|(?<=unrecognized arguments: )(--?[\w=.-]+)")


class Parser(argparse.ArgumentParser):
    """An argument parser that reads negative numbers in any notation and has coloured help."""

    def __init__(self, **options: Any) -> None:
        super().__init__(
            formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False, **options
        )
        self._negative_number_matcher = NEGATIVE_NUMBER

    def format_help(self) -> str:
        """Return the help; this alone pays for the import of rich."""
        from rich_argparse import RawDescriptionRichHelpFormatter

        class Help(RawDescriptionRichHelpFormatter):
            group_name_formatter = str.capitalize

        self.formatter_class = Help
        return super().format_help().rstrip() + "\n"

    def error(self, message: str) -> NoReturn:
        """Print the usage and one line `error: …`, and exit with 2."""
        from lorafast._cli.terminal import printable

        self.print_usage(sys.stderr)
        self.exit(2, f"error: {printable(message + self._suggestion(message))}\n")

    def _suggestion(self, message: str) -> str:
        """`; did you mean …?` where a word of the message is nearly one that there is."""
        from difflib import get_close_matches

        known = self._known()
        for found in WRONG_WORD.finditer(message):
            word = found[1] or found[2] or ""
            near = get_close_matches(word.partition("=")[0], known - {word}, n=1)
            if near:
                return f"; did you mean {near[0]}?"
        return ""

    def _known(self) -> set[str]:
        """Every flag that the parser or one of its commands has, and every choice."""
        known: set[str] = set()
        for action in self._actions:
            known.update(action.option_strings)
            if isinstance(action, argparse._SubParsersAction):
                from lorafast._cli.commands import NAMES

                known.update(NAMES)
                for parser in action.choices.values():
                    known |= parser._known()
            elif action.choices is not None:
                known.update(map(str, action.choices))
        return known


def build_parser(commands: Sequence[Command]) -> argparse.ArgumentParser:
    """Return the parser of the whole command line, a subparser for each of the commands."""
    parser = Parser(
        prog="lorafast",
        description="Merge LoRA adapters into safetensors checkpoints, as fast as copying them.",
        epilog="`lorafast COMMAND --help` shows a command's flags and examples.",
    )
    parser.add_argument("-V", "--version", action="version", version=f"lorafast {__version__}")
    subparsers = parser.add_subparsers(title="commands", metavar="COMMAND", dest="command")
    for command in commands:
        subparser = subparsers.add_parser(
            command.name,
            help=command.summary,
            description=command.description,
            epilog=_epilog(command),
        )
        command.add_arguments(subparser)
        # A command that finds its flags at odds reports it as a wrong flag, through its own parser.
        subparser.set_defaults(run=command.run, parser=subparser)
    parser.set_defaults(run=lambda *_: _no_command(parser))
    return parser


def _epilog(command: Command) -> str:
    lines = ["examples:", *(f"  {line}" for line in command.examples)]
    if command.exit_codes:
        lines += ["", "exit code:", *(f"  {code}  {why}" for code, why in command.exit_codes)]
    return "\n".join(lines)


def _no_command(parser: argparse.ArgumentParser) -> int:
    parser.print_help(sys.stderr)
    return 2
