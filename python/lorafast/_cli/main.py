"""The `lorafast` command.

`main` parses, runs one subcommand and turns what it raises into the exit codes of a Unix tool, as
`command.EXIT_CODES` lists them.

What was interrupted, hung up or terminated leaves the output as it was, or, where it says so,
finished; and no temporary files.

Results go to stdout; progress, warnings and errors go to stderr. Each subcommand is a module with a
`COMMAND`, listed in `commands.py`. Nothing that is slow to import (numpy, rich) is imported before
it is needed: `lorafast --version` has to answer at once.
"""

from __future__ import annotations

import atexit
import gc
import os
import sys

# Not `typing`'s, whose import takes longer than the rest.
TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence

__all__ = ["main"]

EXIT_ERROR = 1
EXIT_INTERRUPTED = 130
EXIT_BROKEN_PIPE = 141
#: New objects after which the interpreter looks for cycles; more than all imports make.
COLLECTED_AT_ONCE = 100_000


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line and return its exit code.

    Args:
        argv: The arguments after the program's name; those of the process if None.
    """
    if argv is None:
        _escape_what_the_streams_cannot_encode()
        # The process is this command's. What is imported lives to its end: looking for cycles
        # in it, meanwhile and at the exit, took a tenth of a short command's time.
        gc.set_threshold(COLLECTED_AT_ONCE)
        atexit.register(gc.freeze)
    try:
        return _guarded(argv)
    except KeyboardInterrupt as stop:
        # While something else was being told of.
        return _stopped(stop)
    finally:
        signals = sys.modules.get("lorafast._cli.signals")
        if argv is None and signals is not None:
            signals.raise_no_more()


def _guarded(argv: Sequence[str] | None) -> int:
    """Run the command line, and turn what it raises into an exit code."""
    try:
        status = _run(argv)
        # Here rather than at the interpreter's exit, where a closed pipe cannot be caught.
        sys.stdout.flush()
    except KeyboardInterrupt as stop:
        return _stopped(stop)
    except BrokenPipeError:
        _discard_further_output()
        return EXIT_BROKEN_PIPE
    except Exception as error:
        from lorafast._cli.failures import print_error
        from lorafast._errors import interruption_behind

        behind = interruption_behind(error)
        if behind is not None:
            return _stopped(behind)
        if not _is_for_the_user(error):
            raise
        print_error(error, as_json="--json" in (sys.argv[1:] if argv is None else argv))
        return EXIT_ERROR
    return status


def _stopped(stop: KeyboardInterrupt) -> int:
    """Say what stopped the command, and return its exit code."""
    # A signal's exception says which; Ctrl-C's is Python's own.
    words, status = getattr(stop, "lorafast_outcome", ("interrupted", EXIT_INTERRUPTED))
    for note in getattr(stop, "__notes__", []):
        words += f", but {note}"
    try:
        print(words, file=sys.stderr)
        sys.stdout.flush()
    except OSError:
        # The terminal that was hung up takes no more words.
        _discard_further_output()
    return int(status)


def _run(argv: Sequence[str] | None) -> int:
    words = sys.argv[1:] if argv is None else list(argv)
    if words in (
        ["--version"],
        ["-V"],
    ):  # without a parser, whose making takes longer than the answer
        from lorafast._core import __version__

        print(f"lorafast {__version__}")
        return 0
    if argv is None:
        from lorafast._cli.signals import end_as_by_ctrl_c

        end_as_by_ctrl_c()
    from lorafast._cli.commands import RENAMED, commands
    from lorafast._cli.parser import build_parser
    from lorafast._cli.terminal import Terminal

    if words and words[0] in RENAMED:
        print(f"{words[0]} is called {RENAMED[words[0]]} now", file=sys.stderr)
        words[0] = RENAMED[words[0]]
    try:
        arguments = build_parser(commands(words)).parse_args(words)
        terminal = Terminal(quiet=getattr(arguments, "quiet", False))
        with terminal.python_warnings_as_lines():
            status: int = arguments.run(arguments, terminal)
    except SystemExit as stop:  # argparse ends --help, --version and wrong flags this way
        return stop.code if isinstance(stop.code, int) else EXIT_ERROR
    return status


def _is_for_the_user(error: Exception) -> bool:
    """Whether an error tells about the user's input or machine; any other is a bug in lorafast."""
    import lorafast

    return isinstance(error, (lorafast.LorafastError, OSError, ValueError, ImportError))


def _escape_what_the_streams_cannot_encode() -> None:
    import io

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _discard_further_output() -> None:
    """Keep the interpreter from complaining, at exit, about a pipe or a terminal that is closed."""
    devnull = os.open(os.devnull, os.O_WRONLY)
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except OSError:
            os.dup2(devnull, stream.fileno())
    os.close(devnull)
