"""`lorafast merge`: merge adapters into a base checkpoint, or show what a merge would do."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.device import merge_device_name
from lorafast._cli.format import (
    bytes_text,
    count_text,
    dtype_text,
    number_text,
    plural,
    seconds_text,
)

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lorafast import MergeReport
    from lorafast._cli.terminal import Terminal

STRATEGIES = ("sequential", "weighted", "average")
COMPAT = ("peft",)
DTYPES = ("auto", "float16", "bfloat16", "float32", "fp16", "bf16", "fp32")
#: Names of files beside the base that a summary spells out.
MOST_LEFT_OUT = 6
EXPERT_LAYOUTS = ("auto", "straight", "transposed")


def add_input_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the flags that say what is merged; returns their group in the help."""
    inputs = parser.add_argument_group("what to merge")
    inputs.add_argument(
        "--base",
        required=True,
        metavar="PATH",
        help="the model: a directory of safetensors files, one .safetensors file, or a hub id",
    )
    inputs.add_argument(
        "--adapters",
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="the adapters, in the order in which they are to be added: directories or hub ids",
    )
    return inputs


def add_strategy_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the flags that say how adapters combine; returns their group in the help."""
    how = parser.add_argument_group("how to merge")
    how.add_argument(
        "--merge-strategy",
        choices=STRATEGIES,
        default="sequential",
        help="sequential: each adapter at its full scale; weighted: each times its weight; "
        "average: each times 1/N (default: %(default)s)",
    )
    how.add_argument(
        "--weights",
        nargs="+",
        action="extend",
        type=float,
        metavar="W",
        help="a weight for each adapter, for the weighted strategy; negative ones subtract",
    )
    how.add_argument(
        "--allow",
        nargs="+",
        action="extend",
        default=[],
        metavar="FIELD",
        help="unknown fields of an adapter's config that are known not to change the result",
    )
    how.add_argument(
        "--compat",
        choices=COMPAT,
        help="peft: the result of PEFT's own merge where that is not what was trained (tied "
        "embeddings, replicated layers)",
    )
    how.add_argument(
        "--expert-layout",
        choices=EXPERT_LAYOUTS,
        default="auto",
        help="how factors of experts stored as one tensor lie on it, where neither shapes nor "
        "versions tell (default: %(default)s)",
    )
    how.add_argument(
        "--threads", type=int, metavar="N", help="threads to use (default: one for each core)"
    )
    return how


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast merge`."""
    inputs = add_input_arguments(parser)
    inputs.add_argument(
        "--output", metavar="DIR", help="the directory to write; not needed with --dry-run"
    )
    how = add_strategy_arguments(parser)
    how.add_argument(
        "--merge-dtype",
        choices=DTYPES,
        default="auto",
        help="what to write the floating-point tensors as; auto keeps the base's "
        "(default: %(default)s)",
    )
    how.add_argument(
        "--device",
        type=merge_device_name,
        default="cpu",
        metavar="DEVICE",
        help="where products are made: cpu, cpu:amx (16-bit weights, where the processor has AMX; "
        "some differ in the last place), cuda, cuda:N, auto (cpu or cuda, whichever is faster, and "
        "says why), or torch:cpu to compare backends (default: %(default)s)",
    )
    how.add_argument(
        "--device-memory",
        metavar="SIZE",
        help="the most of the device's memory to use, as 2GiB (default: most of what is free)",
    )
    outcome = parser.add_argument_group("what to write and show")
    outcome.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the plan: what changes, at which scale; write nothing",
    )
    outcome.add_argument(
        "--overwrite", action="store_true", help="replace the output directory if it exists"
    )
    outcome.add_argument(
        "--no-sync",
        action="store_true",
        help="do not wait until the output has reached the disk, as cp does not",
    )
    outcome.add_argument(
        "--verify", action="store_true", help="read the result back and prove it, as verify does"
    )
    outcome.add_argument(
        "--no-report",
        action="store_true",
        help="leave merge_report.json and merge_report.md out of the output",
    )
    outcome.add_argument(
        "--json", action="store_true", help="print the report, or the plan, as JSON and no table"
    )
    outcome.add_argument(
        "--quiet", action="store_true", help="print warnings and errors only, and --json's JSON"
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Merge, or with --dry-run plan, and show the result."""
    if arguments.output is None and not arguments.dry_run:
        arguments.parser.error("the following arguments are required: --output (or --dry-run)")
    if arguments.dry_run:
        _dry_run(arguments, terminal)
    else:
        _merge(arguments, terminal)
    return 0


def _dry_run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    import lorafast
    from lorafast._cli.plan_summary import show_plan

    plan = lorafast.plan(
        arguments.base,
        arguments.adapters,
        strategy=arguments.merge_strategy,
        weights=arguments.weights,
        dtype=arguments.merge_dtype,
        allow=arguments.allow,
        compat=arguments.compat,
        expert_layout=arguments.expert_layout,
    ).to_dict()
    if arguments.json:
        terminal.json(plan)
    else:
        show_plan(plan, terminal)
    for warning in plan["warnings"]:
        terminal.warn(warning)
    if arguments.output is not None and not arguments.overwrite and _is_occupied(arguments.output):
        terminal.warn(f"{arguments.output} is not empty: a merge into it needs --overwrite")


def _is_occupied(path: str) -> bool:
    from lorafast._io.paths import expand

    place = Path(expand(path))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return any(place.iterdir())
    return os.path.lexists(place)


def _merge(arguments: argparse.Namespace, terminal: Terminal) -> None:
    import lorafast

    report = lorafast.merge(
        arguments.base,
        arguments.adapters,
        arguments.output,
        strategy=arguments.merge_strategy,
        weights=arguments.weights,
        dtype=arguments.merge_dtype,
        device=arguments.device,
        device_memory=arguments.device_memory,
        threads=arguments.threads,
        overwrite=arguments.overwrite,
        sync=not arguments.no_sync,
        progress=not arguments.quiet,
        allow=arguments.allow,
        compat=arguments.compat,
        expert_layout=arguments.expert_layout,
        verify=arguments.verify,
        report=not arguments.no_report,
    )
    if arguments.json:
        terminal.json(report.to_dict())
    else:
        show_report(report, terminal)
    for warning in report.warnings:
        terminal.warn(warning)


def show_report(report: MergeReport, terminal: Terminal) -> None:
    """Print the closing table of a merge."""
    count = plural(len(report.adapters), "adapter")
    terminal.heading(f"Merged {count} into {report.output_path}")
    tensors = f"{report.tensors_merged:,} merged, {report.tensors_copied:,} copied"
    if report.tensors_cast:
        tensors += f", {report.tensors_cast:,} converted"
    speed = report.bytes_written / report.merge_time if report.merge_time > 0 else 0.0
    where = f"{plural(report.threads, 'thread')} of the cpu"
    if report.device == "cpu:amx":
        where += " with AMX"
    elif report.device != "cpu":
        where = f"{report.device} and {where}"
    facts = {
        "base": report.base,
        "adapters": adapters_text(report.adapters, report.weights),
        "strategy": report.strategy,
        "tensors": tensors,
        "parameters": count_text(report.total_parameters),
        "dtype": dtype_text(report.dtype),
        "written": bytes_text(report.bytes_written),
        "time": f"{seconds_text(report.merge_time)} on {where}"
        + (f", {bytes_text(speed)}/s" if speed else ""),
    }
    if report.left_out:
        shown = ", ".join(report.left_out[:MOST_LEFT_OUT])
        rest = len(report.left_out) - MOST_LEFT_OUT
        facts["left out"] = shown + (f" and {rest} more" if rest > 0 else "")
    if report.verification is not None:
        count = report.verification["elements"]
        facts["verified"] = f"every one of {count_text(count)} weights, read back"
    terminal.facts(facts)
    for reason, names in report.fallbacks.items():
        terminal.line(f"note: {plural(len(names), 'tensor')} merged on the CPU: {reason}")
    for note in report.notes:
        terminal.line(f"note: {note}")


def adapters_text(adapters: Sequence[str], weights: Sequence[float] | None) -> str:
    """Return the adapters with their weights, if they have any: `style × 0.7, facts × -0.3`."""
    if weights is None:
        return ", ".join(adapters)
    return ", ".join(
        f"{adapter} × {number_text(weight)}"
        for adapter, weight in zip(adapters, weights, strict=True)
    )


COMMAND = Command(
    name="merge",
    summary="merge adapters into a base model",
    description="Write base + s·B·A for every layer that an adapter changes, and copy the rest.\n"
    "The result is a model directory that loads as the base does. Nothing is written unless\n"
    "everything fits: every tensor of every adapter has its place in the base, or is refused.",
    examples=(
        "lorafast merge --base llama --adapters style --output llama-style",
        "lorafast merge --base llama --adapters style facts --output mixed \\",
        "    --merge-strategy weighted --weights 0.7 -0.3",
        "lorafast merge --base llama --adapters style --dry-run",
    ),
    add_arguments=add_arguments,
    run=run,
)
