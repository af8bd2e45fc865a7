"""`lorafast merge`: merge adapters into a base checkpoint, or show what a merge would do."""

from __future__ import annotations

import contextlib
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._cli.adapters import adapters_of
from lorafast._cli.command import Command
from lorafast._cli.format import (
    bytes_text,
    count_text,
    dtype_text,
    number_text,
    plural,
    seconds_text,
)
from lorafast._cli.neurotrain import add_neurotrain_arguments
from lorafast._cli.options import add_options, chosen
from lorafast._io.sources import offline
from lorafast._merge.api import options_of
from lorafast._merge.plan import make_plan
from lorafast._weights import weight_text

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lorafast import MergeReport
    from lorafast._cli.terminal import Terminal
    from lorafast._merge.api import Verb
    from lorafast._types import Weight

#: Names of files beside the base that a summary spells out.
MAX_LEFT_OUT = 6


def add_input_arguments(parser: argparse.ArgumentParser) -> argparse._ArgumentGroup:
    """Declare the flags that say what is merged; returns their group in the help."""
    inputs = parser.add_argument_group("what to merge")
    inputs.add_argument(
        "-b",
        "--base",
        metavar="PATH",
        help="the model: a directory of safetensors files, a pipeline of diffusers or one of its\n"
        "components, one .safetensors file, or a hub id (owner/name, or with revision\n"
        "and folder owner/name@revision/folder); without it, the model that the adapters' own\n"
        "configs name",
    )
    inputs.add_argument(
        "-a",
        "--adapters",
        required=True,
        nargs="+",
        action="extend",
        metavar="PATH",
        help="the adapters, in the order in which they are to be added: directories or hub ids, "
        "each with its weight behind it if it has one (style:0.7); commas may stand between them",
    )
    return inputs


def inputs_of(arguments: argparse.Namespace, verb: Verb) -> tuple[list[str], dict[str, Any]]:
    """The adapters of a command line, and a verb's options, their weights among them."""
    adapters, weights = adapters_of(arguments, arguments.adapters)
    return adapters, chosen(arguments, options_of(verb)) | {"weights": weights}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast merge`."""
    inputs = add_input_arguments(parser)
    inputs.add_argument(
        "-o",
        "--output",
        metavar="DIR",
        help="the directory to write, or hf://owner/name (hf://owner/name@branch) to publish it "
        "on the hub; not needed with --dry-run",
    )
    how = parser.add_argument_group("how to merge")
    outcome = parser.add_argument_group("what to write and show")
    outcome.add_argument(
        "--dry-run",
        action="store_true",
        help="check everything and print the plan: what changes, at which scale; write nothing",
    )
    add_options(parser, options_of("merge"), how, outcome)
    add_neurotrain_arguments(parser, inputs, outcome)
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
    with offline() if arguments.local_files_only else contextlib.nullcontext():
        if arguments.dry_run:
            _dry_run(arguments, terminal)
        else:
            _merge(arguments, terminal)
    return 0


def _dry_run(arguments: argparse.Namespace, terminal: Terminal) -> None:
    import lorafast
    from lorafast._cli.plan_summary import show_plan

    adapters, options = inputs_of(arguments, "plan")
    plan = lorafast.plan(arguments.base, adapters, **options).to_dict()
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
    from lorafast._io.stores import is_url, path_of_file_url

    if is_url(path):
        # What lies there is looked at when it is written.
        return False
    place = Path(expand(path_of_file_url(path)))
    with contextlib.suppress(FileNotFoundError, NotADirectoryError):
        return any(place.iterdir())
    return os.path.lexists(place)


def _merge(arguments: argparse.Namespace, terminal: Terminal) -> None:
    import lorafast

    adapters, options = inputs_of(arguments, "merge")
    if arguments.save_safetensors:
        report = lorafast.merge(arguments.base, adapters, arguments.output, **options)
    else:
        report = _merge_into_pickles(arguments, adapters, options)
    if arguments.json:
        terminal.json(report.to_dict())
    else:
        show_report(report, terminal)
    for warning in report.warnings:
        terminal.warn(warning)


def _merge_into_pickles(
    arguments: argparse.Namespace, adapters: list[str], options: dict[str, Any]
) -> MergeReport:
    from lorafast._merge import merged_files
    from lorafast._merge.api import MergeOptions
    from lorafast._merge.options import ExecutionOptions
    from lorafast._options import pick

    execution = pick(ExecutionOptions, options)
    execution.memory()
    plan = make_plan(
        arguments.base,
        adapters,
        pick(MergeOptions, options),
        device=execution.device,
        needs=merged_files.PICKLE_NEEDS,
    )
    return merged_files.carry_out(plan, arguments.output, execution, save_safetensors=False)


def show_report(report: MergeReport, terminal: Terminal) -> None:
    """Print the closing table of a merge."""
    count = plural(len(report.adapters), "adapter")
    terminal.heading(f"Merged {count} into {report.output_path}")
    tensors = f"{report.tensors_merged:,} merged, {report.tensors_copied:,} copied"
    if report.tensors_replaced:
        tensors += f", {report.tensors_replaced:,} replaced"
    if report.tensors_repeated:
        tensors += f", {report.tensors_repeated:,} repeated"
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
        shown = ", ".join(report.left_out[:MAX_LEFT_OUT])
        rest = len(report.left_out) - MAX_LEFT_OUT
        facts["left out"] = shown + (f" and {rest} more" if rest > 0 else "")
    if report.verification is not None:
        count = report.verification["elements"]
        facts["verified"] = f"every one of {count_text(count)} weights, read back"
    terminal.facts(facts)
    for reason, names in report.fallbacks.items():
        terminal.line(f"note: {plural(len(names), 'tensor')} merged on the CPU: {reason}")
    for note in report.notes:
        terminal.line(f"note: {note}")


def adapters_text(adapters: Sequence[str], weights: Sequence[Weight] | None) -> str:
    """Return the adapters with their weights, if they have any: `style × 0.7, facts × -0.3`."""
    if weights is None:
        return ", ".join(adapters)
    return ", ".join(
        f"{adapter} × {weight_text(weight, number_text)}"
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
        "lorafast merge --base llama --adapters style:0.7 facts:-0.3 --output mixed",
        "lorafast merge --base llama --adapters style --dry-run",
    ),
    add_arguments=add_arguments,
    run=run,
)
