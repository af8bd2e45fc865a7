"""The description of a subcommand."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from lorafast._cli.terminal import Terminal

#: The exit codes of every command. `main` gives them, but for 0.
EXIT_CODES = (
    (0, "done"),
    (1, "the work could not be done: one line `error: …` on stderr"),
    (2, "the command line is wrong: usage and one line `error: …` on stderr"),
    (
        129,
        "the terminal was hung up (SIGHUP), unless the command was started to ignore that (nohup)",
    ),
    (130, "interrupted by Ctrl-C"),
    (141, "whoever read the output went away (`lorafast inspect … | head`)"),
    (143, "terminated (SIGTERM)"),
)


class Command(NamedTuple):
    """One subcommand: its words in the help, its flags, and what it does."""

    name: str
    summary: str
    """One line for `lorafast --help`."""
    description: str
    """What `lorafast NAME --help` opens with."""
    examples: tuple[str, ...]
    add_arguments: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace, Terminal], int]
    """Does the work and returns the exit code; errors are raised, `main` prints them."""
    exit_codes: tuple[tuple[int, str], ...] = ()
    """Those that `EXIT_CODES` has not, or of which there is more to say."""
