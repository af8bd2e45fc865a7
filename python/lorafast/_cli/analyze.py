"""`lorafast analyze`: what one or several adapters hold, findings first."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._analysis.options import AnalysisOptions
from lorafast._cli.command import Command
from lorafast._cli.failures import Failures, exit_code
from lorafast._cli.format import bytes_text, count_text, number_text, plural
from lorafast._cli.options import add_options, chosen
from lorafast._cli.terminal import Column
from lorafast._options import options_in

if TYPE_CHECKING:
    from lorafast import AdapterAnalysis
    from lorafast._cli.terminal import Terminal

EXIT_ERROR = 1
EXIT_CRITICAL = 3
FORMATS = ("md", "json", "html")
MAX_FINDINGS = 12
MAX_MODULES = 10


def add_report_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the flags that say what is written; returns their group in the help."""
    outcome = parser.add_argument_group("what to write and show")
    outcome.add_argument(
        "--output", metavar="DIR", help="write JSON, report and plots into a directory"
    )
    outcome.add_argument(
        "--plots",
        action=argparse.BooleanOptionalAction,
        help="draw plots into the output directory (default: yes, where matplotlib is installed)",
    )
    outcome.add_argument(
        "--format",
        # The options of an analysis have a format, which is an adapter's.
        dest="report_format",
        choices=FORMATS,
        help="the report: what --output writes beside the JSON (default: md); without --output it "
        "is printed in place of the tables",
    )
    return outcome


def require_packages(arguments: argparse.Namespace, *sources: str | None) -> None:
    """Ask for everything that adapters, base and plots need, before any of them is read."""
    from lorafast._io.packages import require
    from lorafast._io.sources import readers_needs

    needs = readers_needs(*sources)
    if arguments.plots and arguments.output is not None:
        needs["matplotlib"] = f"draw plots into {arguments.output}"
    require(needs)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast analyze`."""
    parser.add_argument(
        "adapters", nargs="+", metavar="ADAPTER", help="directories, weights files or hub ids"
    )
    what = parser.add_argument_group("what to measure")
    add_options(parser, options_in(AnalysisOptions), what)
    outcome = add_report_arguments(parser)
    outcome.add_argument("--json", action="store_true", help="print everything as JSON")
    outcome.add_argument(
        "--check", action="store_true", help="exit with 3 where there is a critical finding"
    )
    outcome.add_argument(
        "--quiet", action="store_true", help="print errors only, and --json's JSON"
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Analyse each adapter; those that are broken are named, and the others done all the same."""
    several = len(arguments.adapters) > 1
    if arguments.report_format == "html" and arguments.output is None and several:
        arguments.parser.error("--format html of several adapters needs --output")
    from lorafast._analysis.api import analyze_named
    from lorafast._analysis.names import names_of

    options = AnalysisOptions(**chosen(arguments, options_in(AnalysisOptions)))
    require_packages(arguments, *arguments.adapters, arguments.base)
    failures = Failures()
    analyses: list[AdapterAnalysis] = []
    for adapter, name in zip(arguments.adapters, names_of(arguments.adapters), strict=True):
        with failures.of(adapter, fatal=not several):
            analyses.append(analyze_named(adapter, name, options))
    if arguments.output is not None:
        _write(analyses, arguments, terminal)
    _print(analyses, arguments, terminal, failures)
    critical = any(finding.severity == "critical" for a in analyses for finding in a.findings)
    return exit_code(failures, EXIT_CRITICAL if arguments.check and critical else 0)


def _write(
    analyses: list[AdapterAnalysis], arguments: argparse.Namespace, terminal: Terminal
) -> None:
    from lorafast._errors import MissingDependencyError
    from lorafast._io.paths import expand
    from lorafast._report.directory import (
        ANALYSIS_DIRECTORY,
        PLOT_DIRECTORY,
        file_stems,
        write_analysis,
        write_plots,
        write_reports,
    )

    output = Path(expand(arguments.output))
    stems = file_stems([analysis.name for analysis in analyses])
    for stem, analysis in zip(stems, analyses, strict=True):
        write_analysis(output / ANALYSIS_DIRECTORY, stem, analysis)
        if arguments.plots is not False:
            try:
                directory = output / PLOT_DIRECTORY
                write_plots(directory, analysis, stem)
            except MissingDependencyError as error:
                terminal.warn(f"no plots were drawn: {error}")
    if analyses:
        write_reports(output, analyses, None, arguments.report_format or "md")


def _print(
    analyses: list[AdapterAnalysis],
    arguments: argparse.Namespace,
    terminal: Terminal,
    failures: Failures,
) -> None:
    if arguments.json or (arguments.report_format == "json" and arguments.output is None):
        terminal.json(_all_as_json(analyses, failures))
    elif arguments.report_format is not None and arguments.output is None:
        for analysis in analyses:
            is_html = arguments.report_format == "html"
            terminal.document(analysis.to_html() if is_html else analysis.to_markdown())
    else:
        for position, analysis in enumerate(analyses):
            if position:
                terminal.line()
            show_analysis(analysis, terminal)
        if arguments.output is not None and analyses:
            terminal.line()
            terminal.line(f"Written to {arguments.output}")


def _all_as_json(analyses: list[AdapterAnalysis], failures: Failures) -> dict[str, Any]:
    from lorafast._results import SCHEMA_VERSION

    return {
        "schema_version": SCHEMA_VERSION,
        "analyses": [analysis.to_dict() for analysis in analyses],
        "errors": failures.errors,
    }


def show_analysis(analysis: AdapterAnalysis, terminal: Terminal) -> None:
    """Print findings, what the adapter is, and its largest updates."""
    summary, weights = analysis.summary, analysis.weights
    # Of weights without their config the scale may not be known.
    scaled = bool(summary["scalings"]) or not analysis.modules
    terminal.heading(f"{analysis.name}: {plural(summary['modules'], 'module')}")
    show_findings(analysis.findings, terminal)
    terminal.facts(
        {
            "path": analysis.path,
            "base": str(summary["base"] or "not named"),
            "parameters": f"{count_text(summary['total_parameters'])}, "
            f"{bytes_text(summary['total_bytes'])}, {', '.join(summary['dtypes'])}",
            "rank": ", ".join(map(str, summary["ranks"])) or "none",
            "scale": ", ".join(map(number_text, summary["scalings"][:6]))
            or ("none" if scaled else "not known"),
            "weights": f"mean {weights.mean:.4g}, std {weights.std:.4g}, "
            f"from {weights.min:.4g} to {weights.max:.4g}",
            "norm of ΔW": f"{summary['frobenius_norm']:.4g}, largest σ "
            f"{summary['max_spectral_norm']:.4g}"
            if scaled
            else "not known without the scale",
        }
    )
    # What is not a number stands first: it is what to look at.
    modules = sorted(
        analysis.modules.values(),
        key=lambda m: -m.frobenius_norm if math.isfinite(m.frobenius_norm) else -math.inf,
    )
    if not modules:
        return
    terminal.line()
    terminal.heading("Largest updates")
    relative = any(module.relative_norm is not None for module in modules)
    columns = [Column("module"), Column("rank", number=True), Column("‖ΔW‖", number=True)]
    if relative:
        columns.append(Column("‖ΔW‖/‖W‖", number=True))
    columns += [Column(name, number=True) for name in ("σ₁", "stable", "effective", "k₉₉")]
    rows = []
    for module in modules[:MAX_MODULES]:
        row = [module.path, str(module.rank), f"{module.frobenius_norm:.4g}" if scaled else ""]
        if relative:
            is_known = scaled and module.relative_norm is not None
            row.append(f"{module.relative_norm:.4g}" if is_known else "")
        row += [
            f"{module.spectral_norm:.4g}" if scaled else "",
            f"{module.stable_rank:.3g}",
            f"{module.effective_rank:.3g}",
            str(module.k99),
        ]
        rows.append(row)
    terminal.table(columns, rows)
    if len(modules) > MAX_MODULES:
        terminal.line(f"  and {len(modules) - MAX_MODULES} more")


def show_findings(findings: Any, terminal: Terminal) -> None:
    """Print findings, a line for each kind with the one of the greatest value."""
    from lorafast._analysis.findings import one_of_each_kind

    groups = one_of_each_kind(findings)
    for worst, count in groups[:MAX_FINDINGS]:
        where = "" if worst.module is None else f"{worst.module}: "
        more = f" ({count} of these)" if count > 1 else ""
        terminal.line(f"  {worst.severity}: {where}{worst.reason}{more}")
    if len(groups) > MAX_FINDINGS:
        terminal.line(f"  and {len(groups) - MAX_FINDINGS} more")


COMMAND = Command(
    name="analyze",
    summary="show what adapters hold: findings, norms, spectra",
    description="Measure adapters: the statistics of every tensor and the spectrum of every\n"
    "update s·B·A. What deserves attention stands first: NaN, an adapter that was never\n"
    "trained, an odd scale, dead or dominant modules, rank that is unused.",
    examples=(
        "lorafast analyze style",
        "lorafast analyze style --base llama --output runs/style",
        "lorafast analyze checkpoint-* --check --quiet   # in a pipeline: 3 if one is broken",
        "lorafast analyze style --json | jq '.analyses[0].findings'",
    ),
    add_arguments=add_arguments,
    run=run,
    exit_codes=(
        (EXIT_ERROR, "an adapter cannot be read, whatever is found in the others"),
        (EXIT_CRITICAL, "with --check, there is a critical finding"),
    ),
)
