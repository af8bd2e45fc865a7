"""`lorafast compare`: what several adapters of one model have in common."""

from __future__ import annotations

import argparse
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._analysis.options import CompareOptions
from lorafast._cli.analyze import add_report_arguments, require_packages, show_findings
from lorafast._cli.command import Command
from lorafast._cli.failures import Failures, exit_code
from lorafast._cli.format import count_text, number_text
from lorafast._cli.options import add_options, chosen
from lorafast._cli.terminal import Column
from lorafast._options import options_in
from lorafast._report.text import format_cosine

if TYPE_CHECKING:
    from lorafast import AdapterAnalysis, Comparison
    from lorafast._cli.terminal import Terminal

MAX_COSINES = 12
EXIT_ERROR = 1


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast compare`."""
    parser.add_argument(
        "adapters",
        nargs="+",
        metavar="ADAPTER",
        help="two or more directories, weights files or hub ids",
    )
    parser.add_argument(
        "--names", nargs="+", metavar="NAME", help="a name for each (default: their directories')"
    )
    add_options(parser, options_in(CompareOptions))
    outcome = add_report_arguments(parser)
    outcome.add_argument("--json", action="store_true", help="print everything as JSON")
    outcome.add_argument(
        "--quiet", action="store_true", help="print errors only, and --json's JSON"
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Compare the adapters that can be read; those that cannot are named."""
    if len(arguments.adapters) < 2:
        arguments.parser.error("a comparison needs two adapters or more")
    if arguments.names is not None:
        if len(arguments.names) != len(arguments.adapters):
            arguments.parser.error("--names needs a name for each adapter")
        if len(set(arguments.names)) != len(arguments.names):
            arguments.parser.error("--names must differ from each other")
    from lorafast._analysis.api import analyze_named, compare_analyzed
    from lorafast._analysis.names import names_of
    from lorafast._io.changes import unchanged
    from lorafast._io.sources import ADAPTER_PATTERNS, locate

    names = arguments.names or names_of(arguments.adapters)
    require_packages(arguments, *arguments.adapters)
    failures = Failures()
    sources: list[str] = []
    analyses: list[AdapterAnalysis] = []
    options = CompareOptions(**chosen(arguments, options_in(CompareOptions)))
    with ExitStack() as held:
        for adapter, name in zip(arguments.adapters, names, strict=True):
            with failures.of(adapter, fatal=False), ExitStack() as own:
                own.enter_context(unchanged([locate(adapter, ADAPTER_PATTERNS)]))
                analyses.append(analyze_named(adapter, name, options.of_analysis()))
                sources.append(adapter)
                # What was analyzed has to stay what it is until it is compared.
                held.enter_context(own.pop_all())
        if len(analyses) < 2:
            return EXIT_ERROR
        comparison = compare_analyzed(sources, analyses, options)
    if arguments.output is not None:
        _write(comparison, arguments, terminal)
    _print(comparison, arguments, terminal)
    return exit_code(failures, 0)


def _write(comparison: Comparison, arguments: argparse.Namespace, terminal: Terminal) -> None:
    from lorafast._errors import MissingDependencyError
    from lorafast._io.paths import expand
    from lorafast._report.directory import (
        ANALYSIS_DIRECTORY,
        PLOT_DIRECTORY,
        file_stems,
        write_analysis,
        write_comparison,
        write_plots,
        write_reports,
    )

    output = Path(expand(arguments.output))
    directory = output / ANALYSIS_DIRECTORY
    for stem, analysis in zip(file_stems(comparison.names), comparison.analyses, strict=True):
        write_analysis(directory, stem, analysis)
    write_comparison(directory, comparison)
    write_reports(output, [], comparison, arguments.report_format or "md")
    if arguments.plots is not False:
        try:
            pictures = output / PLOT_DIRECTORY
            write_plots(pictures, comparison)
        except MissingDependencyError as error:
            terminal.warn(f"no plots were drawn: {error}")


def _print(comparison: Comparison, arguments: argparse.Namespace, terminal: Terminal) -> None:
    prints_report = arguments.output is None and arguments.report_format is not None
    if arguments.json or (prints_report and arguments.report_format == "json"):
        terminal.json(comparison.to_dict())
    elif prints_report:
        is_html = arguments.report_format == "html"
        terminal.document(comparison.to_html() if is_html else comparison.to_markdown())
    else:
        show_comparison(comparison, terminal)
        if arguments.output is not None:
            terminal.line()
            terminal.line(f"Written to {arguments.output}")


def show_comparison(comparison: Comparison, terminal: Terminal) -> None:
    """Print findings, the adapters side by side, and the cosines."""
    terminal.heading(f"Comparison of {len(comparison.names)} adapters")
    show_findings(comparison.findings, terminal)
    columns = [Column("#", number=True), Column("adapter")]
    columns += [
        Column(name, number=True)
        for name in ("modules", "rank", "scale", "parameters", "‖ΔW‖", "effective", "findings")
    ]
    rows = []
    for position, analysis in enumerate(comparison.analyses, start=1):
        summary = analysis.summary
        rows.append(
            (
                str(position),
                analysis.name,
                str(summary["modules"]),
                _span(summary["ranks"]),
                _span(summary["scalings"]),
                count_text(summary["total_parameters"]),
                f"{summary['frobenius_norm']:.4g}",
                f"{summary['mean_effective_rank']:.3g}",
                str(len(analysis.findings)),
            )
        )
    terminal.table(columns, rows)
    terminal.line()
    terminal.heading("Cosine of the whole updates")
    count = min(len(comparison.names), MAX_COSINES)
    columns = [Column("#", number=True)]
    columns += [Column(str(position + 1), number=True) for position in range(count)]
    terminal.table(
        columns,
        [
            (str(i + 1), *(format_cosine(float(comparison.cosine[i, j])) for j in range(count)))
            for i in range(count)
        ],
    )
    if len(comparison.names) > count:
        terminal.line(f"  and {len(comparison.names) - count} more; --json has all of them")
    if not comparison.modules_compared:
        from lorafast._report.text import NO_PAIRS

        terminal.line()
        terminal.line(NO_PAIRS)


def _span(values: list[float]) -> str:
    if not values:
        return "none"
    if len(values) == 1:
        return number_text(values[0])
    return f"{number_text(values[0])} to {number_text(values[-1])}"


COMMAND = Command(
    name="compare",
    summary="compare adapters of one model: cosines, subspaces, norms",
    description="Compare the updates of two or more adapters, of any ranks and scales: exact\n"
    "cosines of the whole updates, and for up to ten adapters (or with --modules) of each module,\n"
    "with shared subspaces and agreement of signs.",
    examples=(
        "lorafast compare style facts tone",
        "lorafast compare run-1/checkpoint-500 run-2/checkpoint-500 --output runs/comparison",
    ),
    add_arguments=add_arguments,
    run=run,
    exit_codes=((EXIT_ERROR, "an adapter cannot be read; two that can are compared all the same"),),
)
