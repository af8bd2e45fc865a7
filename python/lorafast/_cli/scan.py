"""`lorafast scan`: what hundreds or thousands of adapters hold, in tables."""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import bytes_text, count_text, plural, seconds_text
from lorafast._cli.options import add_options, chosen
from lorafast._cli.terminal import Column
from lorafast._fleet.options import ScanOptions
from lorafast._options import options_in

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorafast._cli.terminal import Terminal
    from lorafast._fleet.discovery import ScanError
    from lorafast._fleet.findings import FleetFinding
    from lorafast._fleet.fleet import Fleet

EXIT_ERROR = 1
#: As `lorafast analyze --check` ends.
EXIT_FINDINGS = 3
#: The severities that can be asked for.
CHECKED = ("critical", "warning")
PAGE = "fleet.html"
MAX_FINDINGS = 12
MAX_ERRORS = 8
MAX_GROUPS = 20
NAMED = 3


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast scan`."""
    parser.add_argument(
        "paths",
        nargs="+",
        metavar="DIR",
        help="directories to search, adapters, or globs in quotes",
    )
    add_options(parser, options_in(ScanOptions))
    outcome = parser.add_argument_group("what to write and show")
    outcome.add_argument(
        "--output",
        metavar="DIR",
        help="write adapters.parquet, modules.parquet, findings.parquet and errors.json into a "
        "directory",
    )
    outcome.add_argument(
        "--html",
        action="store_true",
        help=f"write the page {PAGE} too, into --output or else into the current directory",
    )
    outcome.add_argument(
        "--against",
        metavar="OLD",
        help="also show what has changed since an earlier scan: a JSON file of --json, or a "
        "directory of --output",
    )
    outcome.add_argument(
        "--json",
        action="store_true",
        help="print the adapters' table, findings and errors as JSON; with --against what has "
        "changed",
    )
    outcome.add_argument(
        "--quiet", action="store_true", help="print errors only, and --json's JSON"
    )
    status = parser.add_argument_group("exit code")
    # Spelled out, so that the word behind a bare one is a directory and no level.
    status.add_argument(
        *("--check", *(f"--check={level}" for level in CHECKED)),
        dest="check",
        nargs=0,
        action=_Check,
        help=f"exit with {EXIT_FINDINGS} where there is a finding of that severity or a greater "
        "one (default: critical)",
    )
    status.add_argument(
        "--fail-on-errors",
        action="store_true",
        help=f"exit with {EXIT_ERROR} where an adapter cannot be read, whatever else there is",
    )


class _Check(argparse.Action):
    """The severity that a flag names behind its equals sign; critical without one."""

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: object,
        option_string: str | None = None,
    ) -> None:
        """Keep the severity."""
        del parser, values
        setattr(namespace, self.dest, str(option_string).partition("=")[2] or "critical")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Scan, write what was asked for, and show findings, errors, and what the fleet is made of."""
    import lorafast
    from lorafast._fleet.difference import is_parquet
    from lorafast._io.packages import require

    for word in arguments.paths:
        if arguments.check and word in CHECKED and not os.path.lexists(word):
            arguments.parser.error(f"--check takes its level behind an equals sign: --check={word}")
    needs = {}
    if arguments.against is not None and is_parquet(arguments.against):
        needs["pyarrow"] = f"read the scan in {arguments.against}"
    if arguments.output is not None:
        needs["pyarrow"] = f"write Parquet files into {arguments.output}"
    if arguments.html:
        needs["plotly"] = "draw the charts of a page"
    require(needs)
    started = time.perf_counter()
    fleet = lorafast.scan(arguments.paths, **chosen(arguments, options_in(ScanOptions)))
    seconds = time.perf_counter() - started
    # Before it is written, perhaps over the earlier one.
    changed = None if arguments.against is None else lorafast.scan_diff(arguments.against, fleet)
    written = _write(fleet, arguments)
    if arguments.json:
        terminal.json((fleet if changed is None else changed).to_dict())
    else:
        _show(fleet, seconds, terminal)
        if changed is not None:
            from lorafast._cli.scan_diff import show

            terminal.line()
            show(changed, terminal)
        if written:
            terminal.line()
            for path in written:
                terminal.line(f"Written to {path}")
    if not len(fleet) or (arguments.fail_on_errors and fleet.errors):
        return EXIT_ERROR
    return EXIT_FINDINGS if _has_findings(fleet, arguments.check) else 0


def _has_findings(fleet: Fleet, level: str | None) -> bool:
    """Whether there is a finding of some severity, or of a greater one."""
    from lorafast._analysis.findings import SEVERITIES

    if level is None:
        return False
    enough = set(map(str, SEVERITIES[: SEVERITIES.index(level) + 1]))
    return not enough.isdisjoint(map(str, fleet.findings.table["severity"]))


def _write(fleet: Fleet, arguments: argparse.Namespace) -> list[Path]:
    written: list[Path] = []
    if arguments.output is not None:
        written += fleet.to_parquet(arguments.output)
    if arguments.html:
        from lorafast._fleet.fleet import write_whole
        from lorafast._io.paths import expand

        target = Path(expand(arguments.output or ".")) / PAGE
        page = fleet.to_html().encode(errors="backslashreplace")
        written.append(write_whole(target, lambda file: file.write(page)))
    return written


def _show(fleet: Fleet, seconds: float, terminal: Terminal) -> None:
    terminal.heading(f"{plural(len(fleet), 'adapter')}, {plural(fleet.modules.rows, 'module')}")
    _show_findings(fleet.findings, terminal)
    _show_errors(fleet.errors, terminal)
    what = "headers" if fleet.metrics == "headers" else bytes_text(fleet.bytes_read)
    rate = f"{what} in {seconds_text(seconds)}"
    read = len(fleet) - fleet.remembered + len(fleet.errors)
    if seconds > 0:
        rate += f", {read / seconds:,.0f} adapters/s"
    facts = {
        "parameters": count_text(int(fleet.adapters["parameters"].sum())),
        "weights": bytes_text(int(fleet.adapters["bytes"].sum())),
        "read": rate,
    }
    if fleet.remembered:
        facts["from the cache"] = plural(fleet.remembered, "adapter")
    terminal.facts(facts)
    _show_groups(fleet, terminal)


def _show_findings(findings: Sequence[FleetFinding], terminal: Terminal) -> None:
    """A line for each kind of finding, with the adapters it is about."""
    from lorafast._analysis.findings import group_findings
    from lorafast._fleet.findings import KINDS

    groups = group_findings(findings, lambda item: item.finding)
    for items in groups[:MAX_FINDINGS]:
        severity, kind = items[0].finding.severity, items[0].finding.kind
        names = list(dict.fromkeys(item.adapter for item in items if item.adapter is not None))
        if not names:
            terminal.line(f"  {severity}: {items[0].finding.reason}")
            continue
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        terminal.line(f"  {severity}: {KINDS[kind]}: {', '.join(names[:NAMED])}{more}")
    if len(groups) > MAX_FINDINGS:
        terminal.line(f"  and {len(groups) - MAX_FINDINGS} more")


def _show_errors(errors: Sequence[ScanError], terminal: Terminal) -> None:
    """What could not be read, and why; that of many on stderr, where warnings go."""
    if not errors:
        return
    terminal.warn(f"{plural(len(errors), 'adapter')} could not be read")
    terminal.line()
    terminal.heading("Could not be read")
    for error in errors[:MAX_ERRORS]:
        terminal.line(f"  {error.path}: {error.reason}")
    if len(errors) > MAX_ERRORS:
        terminal.line(f"  and {len(errors) - MAX_ERRORS} more")
    terminal.line()


def _show_groups(fleet: Fleet, terminal: Terminal) -> None:
    """The adapters of each base and rank, with the range of their figures."""
    import numpy as np

    adapters = fleet.adapters
    keys = list(zip(adapters["base"].tolist(), adapters["rank"].tolist(), strict=True))
    groups: dict[tuple[str | None, int], list[int]] = {}
    for position, key in enumerate(keys):
        groups.setdefault(key, []).append(position)
    if not groups:
        return
    has_spectra = "frobenius_norm" in adapters
    columns = [Column("base"), Column("rank", number=True), Column("adapters", number=True)]
    if has_spectra:
        columns += [
            Column(name, number=True) for name in ("‖ΔW‖ median", "least", "greatest", "eff. rank")
        ]
    norms = adapters["frobenius_norm"] if has_spectra else None
    ranks = adapters["mean_effective_rank"] if has_spectra else None
    rows = []
    ordered = sorted(groups.items(), key=lambda group: -len(group[1]))
    for (base, rank), members in ordered[:MAX_GROUPS]:
        row = [base or "not named", str(rank) if rank >= 0 else "–", f"{len(members):,}"]
        if norms is not None and ranks is not None:
            own = norms[members][np.isfinite(norms[members])]
            effective = ranks[members][np.isfinite(ranks[members])]
            row += (
                [f"{value:.4g}" for value in (np.median(own), own.min(), own.max())]
                if len(own)
                else ["–"] * 3
            )
            row.append(f"{effective.mean():.3g}" if len(effective) else "–")
        rows.append(row)
    terminal.line()
    terminal.heading("Adapters by base and rank")
    terminal.table(columns, rows)
    if len(groups) > MAX_GROUPS:
        terminal.line(f"  and {len(groups) - MAX_GROUPS} more")


COMMAND = Command(
    name="scan",
    summary="measure every adapter below some directories",
    description="Search directories for adapters and measure all of them at once: norms, ranks\n"
    "and spectra of every module, and what deserves attention. An adapter that cannot be read is\n"
    "listed with the reason and does not keep the others from being read. Adapters are named by\n"
    "their paths below the directory that is searched.",
    examples=(
        "lorafast scan runs",
        "lorafast scan 'runs/*/final' --output fleet --html",
        "lorafast scan runs --cache ~/.cache/lorafast --metrics spectra",
        "lorafast scan runs --exclude 'checkpoint-*' --exclude old/",
        "lorafast scan runs --check=warning --fail-on-errors --quiet   # in a pipeline",
        "lorafast scan runs --json | jq '.errors'",
        "lorafast scan runs --against last-week.json",
    ),
    add_arguments=add_arguments,
    run=run,
    exit_codes=(
        (EXIT_ERROR, "no adapter can be read, or with --fail-on-errors one cannot"),
        (EXIT_FINDINGS, "with --check, there is a finding of that severity or a greater one"),
    ),
)
