"""`lorafast demo`: the main job from end to end, on inputs that it makes itself."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import bytes_text, number_text
from lorafast._cli.terminal import Column

if TYPE_CHECKING:
    import argparse
    from collections.abc import Sequence

    from lorafast._cli.demo_inputs import DemoInputs, TensorCheck
    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast demo`."""
    parser.add_argument(
        "--output",
        metavar="DIR",
        default="lorafast-demo",
        help="where to put the inputs and the merged model, about 260 MB (default: %(default)s)",
    )


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Make a model and two adapters, merge them, and prove the result; 1 if it is wrong."""
    from lorafast._cli.demo_inputs import make_inputs
    from lorafast._io.paths import expand

    directory = Path(expand(arguments.output))
    terminal.heading(f"1. A small model and two adapters of random numbers, in {directory}")
    inputs = make_inputs(directory)
    _show_files([inputs.base, *inputs.adapters], directory, terminal)

    terminal.line()
    terminal.heading("2. What a merge would do")
    _echo(inputs, "--dry-run", terminal=terminal)
    _show_plan(inputs, terminal)

    terminal.line()
    terminal.heading("3. The merge")
    _echo(inputs, "--output", str(inputs.merged), terminal=terminal)
    _merge(inputs, terminal)
    terminal.line()
    _show_files([inputs.merged], directory, terminal)

    terminal.line()
    terminal.heading("4. The result, against the same sum in float64 with NumPy")
    return _show_check(inputs, terminal)


def _echo(inputs: DemoInputs, *last: str, terminal: Terminal) -> None:
    """Print the merge as a command, a line for each group of flags, ready to be pasted."""
    weights = map(number_text, inputs.weights)
    lines = (
        ["lorafast", "merge", "--base", str(inputs.base)],
        ["--adapters", *map(str, inputs.adapters)],
        ["--strategy", "weighted", "--weights", *weights],
        last,
    )
    first, *others = map(shlex.join, lines)
    terminal.line(f"$ {first} \\")
    for line in others[:-1]:
        terminal.line(f"      {line} \\")
    terminal.line(f"      {others[-1]}")
    terminal.line()


def _show_files(paths: Sequence[Path], directory: Path, terminal: Terminal) -> None:
    rows = [
        (str(file.relative_to(directory)), bytes_text(file.stat().st_size))
        for path in paths
        for file in sorted(path.iterdir())
    ]
    terminal.table((Column("file"), Column("size", number=True)), rows)


def _show_plan(inputs: DemoInputs, terminal: Terminal) -> None:
    import lorafast
    from lorafast._cli.plan_summary import show_plan

    plan = lorafast.plan(inputs.base, inputs.adapters, strategy="weighted", weights=inputs.weights)
    show_plan(plan.to_dict(), terminal)


def _merge(inputs: DemoInputs, terminal: Terminal) -> None:
    import lorafast
    from lorafast._cli.merge import show_report

    report = lorafast.merge(
        inputs.base,
        inputs.adapters,
        inputs.merged,
        strategy="weighted",
        weights=inputs.weights,
        progress=True,
    )
    show_report(report, terminal)
    for warning in report.warnings:
        terminal.warn(warning)


def _show_check(inputs: DemoInputs, terminal: Terminal) -> int:
    from lorafast._cli.demo_inputs import check_merge

    checks = list(check_merge(inputs))
    columns = (
        Column("tensor"),
        Column("weights", number=True),
        Column("identical", number=True),
        Column("unexplained", number=True),
    )
    terminal.table(columns, [_check_row(check) for check in checks])
    terminal.line()
    wrong = [check.name for check in checks if not check.ok]
    if wrong:
        terminal.line(f"WRONG: {', '.join(wrong)}")
        return 1
    changed = [check for check in checks if check.changed]
    share = sum(check.identical for check in changed) / sum(check.weights for check in changed)
    terminal.line(
        f"Right: {share:.3%} of the merged weights are that sum, rounded once to bfloat16;"
    )
    terminal.line("the others are within the error of a float32 sum. The rest is the base's.")
    return 0


def _check_row(check: TensorCheck) -> tuple[str, str, str, str]:
    identical = f"{check.identical / check.weights:.3%}"
    return check.name, f"{check.weights:,}", identical, f"{check.unexplained:,}"


COMMAND = Command(
    name="demo",
    summary="merge two adapters into a small model, all made on the spot, and check the result",
    description="Make a small Llama-shaped model and two LoRA adapters of random numbers, merge\n"
    "them, and compare the result with the same computation in float64.",
    examples=("lorafast demo", "lorafast demo --output /tmp/lorafast-demo"),
    add_arguments=add_arguments,
    run=run,
)
