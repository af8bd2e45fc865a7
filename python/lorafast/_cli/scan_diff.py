"""`lorafast scan-diff`: what has changed between two scans."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafast._cli.command import Command
from lorafast._cli.format import plural
from lorafast._cli.terminal import Column

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lorafast import AdapterChange, FindingChange, ScanDiff
    from lorafast._cli.terminal import Terminal

EXIT_CHANGED = 3
#: Names, and changed adapters, that are listed; --json has all of them.
MAX_NAMES = 12
MAX_CHANGED = 30
#: Figures of a changed adapter that are told.
MAX_FIGURES = 4


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast scan-diff`."""
    saved = "a JSON file of `scan --json`, or a directory of `scan --output`"
    parser.add_argument("before", metavar="OLD", help=f"the earlier scan: {saved}")
    parser.add_argument("after", metavar="NEW", help="the later scan, likewise")
    parser.add_argument(
        "--check",
        action="store_true",
        help=f"exit with {EXIT_CHANGED} where anything has changed",
    )
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--quiet", action="store_true", help="print errors only, and --json's JSON")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Compare the scans, and show what has changed."""
    import lorafast

    found = lorafast.scan_diff(arguments.before, arguments.after)
    if arguments.json:
        terminal.json(found.to_dict())
    else:
        show(found, terminal)
    return EXIT_CHANGED if arguments.check and found else 0


def show(found: ScanDiff, terminal: Terminal) -> None:
    """Print what was added, removed and changed."""
    terminal.heading(f"{found.before} → {found.after}: {found.summary}")
    for note in found.notes:
        terminal.line(f"  note: {note}")
    for change in found.findings:
        terminal.line(f"  {_finding_text(change)}")
    _list("Added", found.added, terminal)
    _list("Removed", found.removed, terminal)
    _list("Renamed", [f"{one} → {other}" for one, other in found.renamed], terminal)
    errors = [f"{name}: {reason}" for name, reason in found.unreadable.items()]
    _list("Cannot be read now", errors, terminal)
    _list("Can be read again", found.readable, terminal)
    if found.changed:
        terminal.line()
        terminal.heading("Changed")
        terminal.table(
            [Column("adapter"), Column("what")],
            [(change.name, _change_text(change)) for change in found.changed[:MAX_CHANGED]],
        )
        _rest(len(found.changed) - MAX_CHANGED, terminal)


def _list(title: str, lines: Sequence[str], terminal: Terminal) -> None:
    if not lines:
        return
    terminal.line()
    terminal.heading(title)
    for line in lines[:MAX_NAMES]:
        terminal.line(f"  {line}")
    _rest(len(lines) - MAX_NAMES, terminal)


def _rest(count: int, terminal: Terminal) -> None:
    if count > 0:
        terminal.line(f"  and {count:,} more; --json has all of them")


def _change_text(change: AdapterChange) -> str:
    """What has changed of an adapter, in words."""
    parts = ["other weights"] if change.weights else []
    for key, (before, after) in list(change.metrics.items())[:MAX_FIGURES]:
        parts.append(f"{key} {_text(before)} → {_text(after)}")
    if len(change.metrics) > MAX_FIGURES:
        parts.append(f"{plural(len(change.metrics) - MAX_FIGURES, 'more figure')}")
    return "; ".join([*parts, *map(_finding_text, change.findings)])


def _finding_text(change: FindingChange) -> str:
    """A finding that came (`+`), went (`−`) or changed its number."""
    if change.before and change.after:
        return f"{change.severity} {change.kind} ×{change.before} → ×{change.after}"
    return f"{'+' if change.after else '−'}{change.severity} {change.kind}"


def _text(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, list):
        return ",".join(map(str, value)) or "none"
    return "none" if value is None else str(value)


COMMAND = Command(
    name="scan-diff",
    summary="show what has changed between two scans",
    description="Compare two scans that were saved: adapters added, removed, renamed and changed,\n"
    "and by which figures and findings. Adapters are the same where their paths below the\n"
    "directory that was scanned are. `lorafast scan DIR --against OLD` does both in one.",
    examples=(
        "lorafast scan runs --json --quiet > monday.json",
        "lorafast scan-diff monday.json tuesday.json",
        "lorafast scan-diff monday.json tuesday.json --check --quiet   # in a pipeline",
        "lorafast scan runs --against monday.json",
    ),
    add_arguments=add_arguments,
    run=run,
    exit_codes=((EXIT_CHANGED, "with --check, anything has changed"),),
)
