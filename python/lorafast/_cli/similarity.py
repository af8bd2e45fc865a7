"""`lorafast similarity`: how similar many adapters are."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._cli.command import Command
from lorafast._cli.format import plural
from lorafast._cli.options import add_options, chosen
from lorafast._cli.terminal import Column
from lorafast._options import options_in
from lorafast._similarity.options import SimilarityOptions

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lorafast import Similarity
    from lorafast._cli.terminal import Terminal
    from lorafast._fleet.discovery import ScanError
    from lorafast._options import Table

MAX_PAIRS = 20
#: How many are shown of one adapter, where nothing else is said.
NEAREST = 5
MAX_ERRORS = 3
PICTURES = (".png", ".svg", ".pdf")
ENDINGS = (".npz", ".json", ".csv", *PICTURES)


def add_fleet_arguments(parser: argparse.ArgumentParser, table: type[Table]) -> None:
    """Declare the flags of a command that reads many adapters, its options and every one's."""
    add_options(parser, options_in(table))
    parser.add_argument("--json", action="store_true", help="print everything as JSON")
    parser.add_argument("--quiet", action="store_true", help="print errors only, and --json's JSON")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags of `lorafast similarity`."""
    parser.add_argument(
        "adapters", nargs="+", metavar="DIR", help="directories to search, adapters, or globs"
    )
    parser.add_argument(
        "--nearest", type=int, metavar="K", help="show the K most similar of each adapter"
    )
    parser.add_argument(
        "--of",
        action="append",
        metavar="ADAPTER",
        help="show the most similar of this one alone, by its path or its name; may be repeated",
    )
    parser.add_argument(
        "--output",
        metavar="FILE",
        help="write the matrix: .npz (everything, for Similarity.load), .csv, .json, or the "
        "clustered picture: .png, .svg, .pdf",
    )
    add_fleet_arguments(parser, SimilarityOptions)


def run(arguments: argparse.Namespace, terminal: Terminal) -> int:
    """Compare the adapters, show the result, and write it where that was asked for."""
    if arguments.nearest is not None and arguments.nearest < 1:
        arguments.parser.error("--nearest must be at least 1")
    if arguments.of and arguments.nearest is None:
        arguments.nearest = NEAREST
    if arguments.output is not None and Path(arguments.output).suffix not in ENDINGS:
        arguments.parser.error(f"--output must end in one of {', '.join(ENDINGS)}")
    if not 0 < arguments.memory < math.inf:
        arguments.parser.error("--memory must be a positive number of gigabytes")
    import lorafast

    options = chosen(arguments, options_in(SimilarityOptions))
    _require_packages(arguments)
    similarity = lorafast.similarity(arguments.adapters, **options)
    warn_of_errors(similarity.errors, terminal)
    if arguments.output is not None:
        from lorafast._io.paths import expand

        _write(similarity, Path(expand(arguments.output)))
    # One that is not there is told before anything is printed.
    shown = [similarity.names[_place(similarity, adapter)] for adapter in arguments.of or ()]
    if arguments.json:
        terminal.json(_plain(similarity, arguments.nearest, shown or similarity.names))
        return 0
    _show(similarity, arguments.nearest, shown or similarity.names, terminal)
    if arguments.output is not None:
        terminal.line()
        terminal.line(f"Written to {arguments.output}")
    return 0


def _require_packages(arguments: argparse.Namespace) -> None:
    """Ask for everything that the picture and the device need, before the first adapter is read."""
    from lorafast._io.packages import require
    from lorafast._io.sources import device_needs

    needs = {}
    if arguments.output is not None and Path(arguments.output).suffix in PICTURES:
        draw = f"draw {arguments.output}"
        needs = {"matplotlib": draw, "scipy": "cluster the adapters in it"}
    require(needs | device_needs(arguments.device))


def warn_of_errors(errors: list[ScanError], terminal: Terminal) -> None:
    """Say what was left out and why."""
    for error in errors[:MAX_ERRORS]:
        terminal.warn(f"left out {error.path}: {error.reason}")
    if len(errors) > MAX_ERRORS:
        terminal.warn(f"left out {len(errors) - MAX_ERRORS} more")


def _place(similarity: Similarity, adapter: str) -> int:
    """Where an adapter stands that a command line names.

    Raises:
        LorafastError: it is none of those compared.
    """
    from lorafast._errors import LorafastError

    try:
        return similarity.position(adapter)
    except KeyError as error:
        raise LorafastError(str(error.args[0])) from None


def _plain(similarity: Similarity, nearest: int | None, names: Sequence[str]) -> dict[str, object]:
    plain = similarity.to_dict()
    if nearest is not None:
        plain["nearest"] = {
            name: [{"name": other, "cosine": cosine} for other, cosine in found]
            for name in names
            for found in [similarity.nearest(name, nearest)]
        }
    return plain


def _write(similarity: Similarity, output: Path) -> None:
    from lorafast._io import atomic

    if output.suffix in PICTURES:
        figure = similarity.plot()
        with atomic.writing(output) as file:
            figure.savefig(file, format=output.suffix.removeprefix("."), dpi=120)
    elif output.suffix == ".npz":
        similarity.save(output)
    elif output.suffix == ".json":
        atomic.write(output, similarity.to_json())
    else:
        atomic.write(output, _csv(similarity))


def _csv(similarity: Similarity) -> str:
    import csv
    import io

    from lorafast._report.cells import csv_text

    text = io.StringIO(newline="")
    writer = csv.writer(text)
    names = list(map(csv_text, similarity.names))
    writer.writerow(["", *names])
    for name, row in zip(names, similarity.matrix, strict=True):
        writer.writerow([name, *(repr(float(value)) for value in row)])
    return text.getvalue()


def _show(
    similarity: Similarity, nearest: int | None, names: Sequence[str], terminal: Terminal
) -> None:
    count = len(similarity)
    terminal.heading(f"Similarity of {plural(count, 'adapter')}")
    facts = {
        "modules": f"{len(set(similarity.modules)):,}",
        "precision": similarity.precision,
        "mean cosine": _mean(similarity),
    }
    for base, members in similarity.groups.items():
        facts[f"base {base}"] = plural(len(members), "adapter")
    terminal.facts(facts)
    for note in similarity.notes:
        terminal.line(f"  note: {note}")
    terminal.line()
    if nearest is not None:
        columns = [Column("adapter"), Column("cosine", number=True), Column("nearest")]
        rows = []
        for name in names:
            for rank, (other, cosine) in enumerate(similarity.nearest(name, nearest)):
                rows.append((name if rank == 0 else "", f"{cosine:z.4f}", other))
        terminal.table(columns, rows)
        return
    shown = similarity.pairs(MAX_PAIRS)
    if not shown:
        terminal.line("There is no pair of adapters to compare.")
        return
    terminal.heading("Most similar")
    terminal.table(
        [Column("cosine", number=True), Column("adapter"), Column("adapter")],
        [(f"{cosine:z.4f}", first, second) for first, second, cosine in shown],
    )
    rest = sum(len(m) * (len(m) - 1) // 2 for m in similarity.groups.values()) - len(shown)
    if rest > 0:
        terminal.line(f"  and {plural(rest, 'pair')} more; --nearest K shows those of each adapter")


def _mean(similarity: Similarity) -> str:
    import numpy as np

    finite = np.isfinite(similarity.matrix)
    np.fill_diagonal(finite, False)
    pairs = int(finite.sum())
    return f"{similarity.matrix.sum(where=finite) / pairs:z.4f}" if pairs else "–"


COMMAND = Command(
    name="similarity",
    summary="show how similar many adapters are: all cosines of their updates",
    description="Compare the updates of all adapters with each other, exactly, whatever their\n"
    "ranks, scales and factors: cosines, nearest neighbours, a clustered picture.",
    examples=(
        "lorafast similarity adapters/",
        "lorafast similarity adapters/ --nearest 3 --output similarity.npz",
        "lorafast similarity adapters/ --of adapters/style",
        "lorafast similarity team-a/ team-b/ --group-by-base --output similarity.png",
    ),
    add_arguments=add_arguments,
    run=run,
)
