"""The description of a subcommand."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

if TYPE_CHECKING:
    import argparse
    from collections.abc import Callable

    from lorafast._cli.terminal import Terminal


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
