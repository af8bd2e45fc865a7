"""What the commands that make adapters from adapters share: flags, and how a report is shown."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from lorafast._cli.convert import DTYPES, FORMATS
from lorafast._cli.format import bytes_text, number_text, plural
from lorafast._cli.terminal import Column

if TYPE_CHECKING:
    import argparse
    from collections.abc import Mapping

    from lorafast._algebra.report import AlgebraReport
    from lorafast._cli.terminal import Terminal


def add_output(parser: argparse.ArgumentParser) -> None:
    """Declare the flags that say what is written, and how."""
    output = parser.add_argument_group("what to write")
    output.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help="a directory for peft and mlx, a file for the other formats",
    )
    output.add_argument("--to", default="peft", choices=FORMATS, help="the format (default: peft)")
    output.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="the type of the factors (default: theirs)"
    )
    output.add_argument("--overwrite", action="store_true", help="replace what is there")
    output.add_argument(
        "-n",
        "--dry-run",
        action="store_true",
        help="compute ranks, sizes and errors, and write nothing",
    )
    output.add_argument(
        "--no-sync", action="store_true", help="do not wait until the files are on the disk"
    )
    output.add_argument("--threads", type=int, metavar="N", help="worker threads (default: all)")
    output.add_argument("--json", action="store_true", help="print the report as JSON")
    output.add_argument("--markdown", metavar="FILE", help="write the report as a Markdown page")
    output.add_argument(
        "--plot", metavar="FILE", help="draw the singular values and the cut (.png, .svg, .pdf)"
    )
    output.add_argument("--quiet", action="store_true", help="print warnings and errors only")


def add_base(parser: argparse.ArgumentParser, why: str) -> None:
    """Declare the flag of the base."""
    parser.add_argument("-b", "--base", metavar="BASE", help=f"the model that was trained, {why}")


def writing(arguments: argparse.Namespace) -> dict[str, Any]:
    """What the flags of `add_output` say, as keywords."""
    return {
        "to": arguments.to,
        "dtype": arguments.dtype,
        "overwrite": arguments.overwrite,
        "threads": arguments.threads,
        "dry_run": arguments.dry_run,
        "sync": not arguments.no_sync,
        "progress": not (arguments.quiet or arguments.json),
    }


def rank_of(text: str) -> int | str:
    """A rule for ranks: a number, or its text."""
    return int(text) if text.isascii() and text.isdigit() else text


def finish(
    report: AlgebraReport,
    title: str,
    arguments: argparse.Namespace,
    terminal: Terminal,
    further: Mapping[str, str] | None = None,
) -> int:
    """Show a report, and write the pages that were asked for."""
    for lost in report.lost:
        terminal.warn(f"left out: {lost}")
    if arguments.markdown is not None:
        from lorafast._io.atomic import write

        write(arguments.markdown, report.to_markdown())
    if arguments.plot is not None:
        report.plot().savefig(arguments.plot, bbox_inches="tight")
    if arguments.json:
        terminal.json(report.to_dict())
        return 0
    rehearsal = " (a dry run: nothing was written)" if arguments.dry_run else ""
    terminal.heading(f"{title}{rehearsal}")
    ranks = [rank for rank in report.ranks.values() if rank]
    facts = {
        "modules": f"{len(ranks)} of {plural(len(report.modules), 'module')}",
        "ranks": f"{min(ranks)} to {max(ranks)}, {sum(ranks):,} in all" if ranks else "none",
        "size": f"{bytes_text(report.bytes)} of {report.dtype} factors, as {report.target_format}",
        "error": f"{number_text(report.error)} of ‖ΔW‖ over all modules",
        "output": report.output,
    }
    if report.budget is not None:
        budget = report.budget
        best = (
            "the best choice"
            if budget.gap == 0
            else f"at most {number_text(budget.gap)} of Σσ² missed"
        )
        facts["budget"] = f"{budget.spent:,} of {budget.amount:,} {budget.measure}, {best}"
    facts |= further or {}
    if report.notes:
        facts["notes"] = "; ".join(report.notes)
    terminal.facts(facts)
    if arguments.dry_run:
        _list_modules(report, terminal)
    return 0


def _list_modules(report: AlgebraReport, terminal: Terminal) -> None:
    """The modules with their ranks and errors."""
    rows = [
        [
            name,
            f"{module.shape[0]} × {module.shape[1]}",
            f"{module.source_rank} → {module.rank}",
            f"{module.kept:.2%}",
            number_text(module.error),
        ]
        for name, module in report.modules.items()
    ]
    numbers = (Column(each, number=True) for each in ("shape", "rank", "kept", "error"))
    terminal.line()
    terminal.table([Column("module"), *numbers], rows)
