"""Pages of a merge and of a subtraction: result, inputs, scales, warnings."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lorafast._merge.coverage import left_over, summary_text
from lorafast._report.cells import LONGEST_REASON, cell, code, table, weight_cell
from lorafast._report.text import format_number, format_options

if TYPE_CHECKING:
    from lorafast._merge.report import MergeReport
    from lorafast._merge.subtract import SubtractReport

#: A path is shown whole for as long as it can be opened by hand.
LONGEST_PATH = 1000


def merge_page(report: MergeReport) -> str:
    """The page, in which nothing that came from strangers' files is markup."""
    report = report.portable()
    lines = ["# LoRA merge", ""]
    lines += _warning_lines(report.warnings)
    rate = report.bytes_written / report.merge_time / 1e9 if report.merge_time > 0 else 0.0
    facts = {
        "Base": _path(report.base) + _revision(report.sources[0]),
        "Output": _path(report.output_path),
        "Strategy": cell(report.strategy),
        **_settings(report),
        "dtype": cell(report.dtype),
        "Device": f"{cell(report.device)} ({report.threads} threads, "
        f"{cell(report.instruction_set)})",
        "Parameters": f"{report.total_parameters:,}",
        "Size": f"{report.model_size_mb:,.1f} MiB",
        "Tensors": ", ".join(
            f"{count} {what}"
            for what, count in {
                "merged": report.tensors_merged,
                "replaced": report.tensors_replaced,
                "repeated": report.tensors_repeated,
                "copied": report.tensors_copied,
                "cast": report.tensors_cast,
            }.items()
        ),
        "Lost in rounding": "nothing was measured"
        if report.rounding is None
        else f"{report.rounding['lost']:.1%} of the change",
        "Time": f"{report.merge_time:.2f} s ({rate:.2f} GB/s)",
        "lorafast": cell(report.versions["lorafast"]),
    }
    lines += table(["", ""], facts.items(), right=False)
    lines += _adapter_lines(report.adapters, report.weights, report.adapter_sha256)
    origins: dict[str, list[str]] = {}
    for name, origin in report.file_origins.items():
        origins.setdefault(origin, []).append(name)
    headers = ["Adapter", "Rank", "Scale", "Weight", "Modules"]
    scales = (
        [
            *(str(group[key]) for key in ("adapter", "rank")),
            *(format_number(group[key], 6) for key in ("scale", "weight")),
            str(group["modules"]),
        ]
        for group in report.groups
    )
    lines += ["", "## Scales", "", *table(headers, scales, right=False)]
    lines += ["", "## What became of every tensor, config field and file of weights", ""]
    for position, coverage in enumerate(report.coverage):
        lines.append(f"- adapter {position}: {summary_text(coverage)}")
        lines += [
            f"    - {use}: {_codes(names)} ({cell(reason, LONGEST_REASON)})"
            for use, reason, names in left_over(coverage)
        ]
    if report.fallbacks:
        lines += ["", "## Merged on the CPU", ""]
        lines += [
            f"- {cell(reason, LONGEST_REASON)}: {_codes(names)}"
            for reason, names in report.fallbacks.items()
        ]
    if origins:
        lines += ["", "## Files beside the weights", ""]
        lines += [f"- of the {cell(origin)}: {_codes(names)}" for origin, names in origins.items()]
    lines += _note_lines(report.notes)
    if report.left_out:
        lines += ["", "## Not carried over", ""]
        lines.append(_codes(report.left_out))
    return "\n".join(lines) + "\n"


def _settings(report: MergeReport) -> dict[str, str]:
    """What the strategy was given beside weights, if anything."""
    found = {}
    if report.strategy_options:
        found["Strategy's options"] = cell(format_options(report.strategy_options), LONGEST_REASON)
    if report.seed is not None:
        found["Seed"] = str(report.seed)
    return found


def subtract_page(report: SubtractReport) -> str:
    """The page of a subtraction."""
    report = report.portable()
    lines = ["# LoRA adapters taken out", ""]
    lines += _warning_lines(report.warnings)
    facts = {
        "Merged model": _path(report.merged),
        "Base at hand": "no" if report.original is None else _path(report.original),
        "Output": _path(report.output_path),
        "The output is": cell(report.exactness(), LONGEST_REASON),
        "Strategy": cell(report.strategy),
        "dtype": cell(report.dtype),
        "Tensors changed": f"{report.tensors_changed}",
        "Time": f"{report.seconds:.2f} s ({report.threads} threads)",
        "lorafast": cell(report.versions["lorafast"]),
    }
    lines += table(["", ""], facts.items(), right=False)
    lines += _adapter_lines(report.adapters, report.weights, report.adapter_sha256)
    lines += _note_lines(report.notes)
    return "\n".join(lines) + "\n"


def _path(text: str) -> str:
    """A path as code."""
    return code(text, LONGEST_PATH)


def _revision(source: dict[str, Any]) -> str:
    """The commit on the hub, where it is known."""
    return f" at {code(source['revision'])}" if source["revision"] else ""


def _warning_lines(warnings: Iterable[str]) -> list[str]:
    """The warnings that a page opens with."""
    return [f"> **Warning:** {cell(warning, LONGEST_REASON)}\n" for warning in warnings]


def _adapter_lines(
    adapters: list[str],
    weights: list[float | dict[str, float]] | None,
    digests: dict[str, str],
) -> list[str]:
    """The table of the adapters."""
    rows = (
        [
            str(position),
            _path(adapter),
            weight_cell(1.0 if weights is None else weights[position]),
            code(digests[adapter]),
        ]
        for position, adapter in enumerate(adapters)
    )
    headers = ["#", "Adapter", "Weight", "SHA-256"]
    return ["", "## Adapters", "", *table(headers, rows, right=False)]


def _note_lines(notes: Iterable[str]) -> list[str]:
    """The notes, if there are any."""
    lines = [f"- {cell(note, LONGEST_REASON)}" for note in notes]
    return ["", "## Notes", "", *lines] if lines else []


def _codes(names: Iterable[str]) -> str:
    return ", ".join(code(name) for name in names)
