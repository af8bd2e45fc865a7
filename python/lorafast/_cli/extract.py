"""`lorafast extract`: an adapter from a tuned model and its base."""

from __future__ import annotations

from typing import TYPE_CHECKING

from lorafast._cli.algebra import add_output, finish, rank_of, writing
from lorafast._cli.command import Command
from lorafast._cli.format import number_text, plural
from lorafast._cli.options import executor_type
from lorafast._options import executor_flag

if TYPE_CHECKING:
    import argparse

    from lorafast._cli.terminal import Terminal


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast extract`."""
    parser.add_argument("tuned", metavar="TUNED", help="the model after training")
    parser.add_argument("base", metavar="BASE", help="the model before it")
    parser.add_argument(
        "--rank",
        default="auto",
        metavar="RULE",
        help="a number, energy:0.95, error:0.01, sv_ratio:20, sv_fro:0.95, budget:ranks=512, "
        "budget:parameters=2000000 or budget:bytes=20MB (default: auto, what stands above the "
        "rounding of the stored weights)",
    )
    parser.add_argument(
        "--max-rank", type=int, metavar="N", help="no module gets more (default: 512 for rules)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of the random vectors (default: 0)"
    )
    parser.add_argument(
        "--embeddings",
        default="save",
        choices=("save", "factors", "skip"),
        help="embeddings and heads that differ: whole, as factors, or not at all (default: save)",
    )
    parser.add_argument(
        "--strict",
        action="store_true",
        help="an error where norms, biases or others differ that no factors can say",
    )
    add_output(parser)
    flag = executor_flag("the modules are looked at")
    parser.add_argument("--executor", metavar=flag.metavar, type=executor_type, help=flag.help)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Extract, and show the report."""
    import lorafast

    report = lorafast.extract(
        arguments.tuned,
        arguments.base,
        arguments.output,
        rank=rank_of(arguments.rank),
        max_rank=arguments.max_rank,
        seed=arguments.seed,
        embeddings=arguments.embeddings,
        strict=arguments.strict,
        executor=arguments.executor,
        **writing(arguments),
    )
    further = {}
    if report.certificate:
        worst = max(report.certificate.values())
        further["certificate"] = f"at most {number_text(worst)} of a module's ‖D‖² from the optimum"
    if report.saved:
        further["saved whole"] = plural(len(report.saved), "parameter")
    if report.resumed:
        further["resumed"] = f"{plural(report.resumed, 'parameter')} were finished before"
    title = f"Extracted {arguments.tuned} from {arguments.base}"
    return finish(report, title, arguments, terminal, further)


COMMAND = Command(
    name="extract",
    summary="make an adapter of a tuned model and its base",
    description="Cut the difference of two checkpoints to an adapter, module by module in the\n"
    "memory of one, with each error and a bound on how far it is from the best of its rank.\n"
    "By default the ranks are what stands above the rounding of the stored weights. What an\n"
    "interrupted call finished is picked up by the same call.",
    examples=(
        "lorafast extract tuned base -o adapter",
        "lorafast extract tuned base -o adapter --rank 32",
        "lorafast extract tuned base -o adapter --rank budget:bytes=200MB --dry-run",
    ),
    add_arguments=add_arguments,
    run=run,
)
