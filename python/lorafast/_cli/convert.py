"""`lorafast convert`: an adapter in another format, held against what it was."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import number_text, plural

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal

FORMATS = (
    "peft",
    "kohya",
    "diffusers",
    "comfyui",
    "lycoris",
    "onetrainer",
    "xlabs",
    "bfl",
    "mlx",
    "gguf",
    "torchtune",
    "tinker",
)
DTYPES = ("auto", "float32", "float16", "bfloat16", "float64")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast convert`."""
    parser.add_argument("adapter", metavar="ADAPTER", help="an adapter in any format that is read")
    parser.add_argument("--to", required=True, choices=FORMATS, help="the format to write")
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="PATH",
        help="a directory for peft, mlx, torchtune and tinker, a file for the others",
    )
    parser.add_argument(
        "-b",
        "--base",
        metavar="BASE",
        help="the model that was trained, where names, fused projections or rows depend on it",
    )
    parser.add_argument(
        "--dtype", default="auto", choices=DTYPES, help="the type of the factors (default: theirs)"
    )
    parser.add_argument(
        "--algorithm",
        default="auto",
        choices=("auto", "lora"),
        help="lora: plain factors for LoHa, LoKr and the like too (default: kept if possible)",
    )
    parser.add_argument(
        "--lossy", action="store_true", help="leave out what the format has no place for"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace what is there")
    parser.add_argument("--json", action="store_true", help="print the report as JSON")


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Convert, and show the report."""
    import lorafast

    report = lorafast.convert(
        arguments.adapter,
        arguments.output,
        to=arguments.to,
        base=arguments.base,
        dtype=arguments.dtype,
        algorithm=arguments.algorithm,
        lossy=arguments.lossy,
        overwrite=arguments.overwrite,
    )
    for lost in report.lost:
        terminal.warn(f"left out: {lost}")
    if arguments.json:
        terminal.json(report.to_dict())
        return 0
    terminal.heading(f"Converted {report.adapter}")
    error = "not known" if report.max_error is None else number_text(report.max_error)
    facts = {
        "from": report.source_format,
        "to": report.target_format,
        "modules": plural(report.modules, "module"),
        "largest error": f"{error} of a module's update, read back",
        "output": report.output,
    }
    if report.notes:
        facts["notes"] = "; ".join(report.notes)
    terminal.facts(facts)
    return 0


COMMAND = Command(
    name="convert",
    summary="write an adapter in another format",
    description="Write an adapter in the format of another program, read it back, and hold the\n"
    "update of every module against what it was. What the format cannot hold is an error.",
    examples=(
        "lorafast convert style.safetensors --to peft --base sdxl -o style-peft",
        "lorafast convert adapter --to gguf --base llama -o adapter.gguf",
        "lorafast convert adapters --to peft -o adapter",
    ),
    add_arguments=add_arguments,
    run=run,
)
