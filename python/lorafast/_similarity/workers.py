"""A similarity whose products other processes make: rectangles of the matrix."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from lorafast import _core
from lorafast._errors import PlanError
from lorafast._io.executors import Task, opened, run
from lorafast._io.paths import absolute
from lorafast._io.sources import core_source

if TYPE_CHECKING:
    from lorafast._similarity.collection import Collected
    from lorafast._similarity.options import SimilarityOptions
    from lorafast._types import Matrix, Report, SumPrecision

#: Ranks of one side of a rectangle: the most, and the fewest, which are those of a tile.
MOST_RANKS, FEWEST_RANKS = 4096, 512
#: Rectangles are smaller where there would be fewer than so many.
FEWEST_TASKS = 16


class Comparison(NamedTuple):
    """What all tasks of a similarity have in common."""

    adapters: tuple[str, ...]
    groups: tuple[tuple[int, ...], ...]
    digest: str
    options: dict[str, Any]
    """Of the core's blocks."""


def products_apart(
    found: Collected,
    groups: Sequence[Sequence[int]],
    precision: SumPrecision,
    options: SimilarityOptions,
    progress: Report | None,
) -> tuple[Matrix, list[Matrix]]:
    """`Collection.products` by an executor's workers: of all, and of each module.

    Raises:
        PlanError: a worker has other adapters under these paths, or another lorafast.
        WorkerError: a worker died.
    """
    import numpy as np

    assert options.executor is not None
    how: dict[str, Any] = {
        "precision": precision,
        "per_module": options.per_module,
        "memory": options.memory,
        "ranks": MOST_RANKS,
    }
    paths = [os.fspath(path) for path in found.paths]
    adapters = tuple(map(absolute, paths))
    # Paths are part of what tells collections apart, and workers have whole ones.
    core = found.core if list(adapters) == paths else _opened(adapters, 1)
    digest, blocks = core.blocks(groups, **how)
    while len(blocks) < FEWEST_TASKS and how["ranks"] > FEWEST_RANKS:
        how["ranks"] //= 2
        digest, blocks = core.blocks(groups, **how)
    common = Comparison(adapters, tuple(map(tuple, groups)), digest, how)
    threads = {"threads": options.threads or 1}
    tasks = [
        Task(block_products, (common, place), threads, work)
        for place, (work, _, _) in enumerate(blocks)
    ]
    count = len(found.names)
    matrix = np.full((count, count), np.nan)
    kept = len(found.core.modules()) if options.per_module else 0
    tables = [np.full((count, count), np.nan) for _ in range(kept)]

    def receive(place: int, made: tuple[bytearray, list[bytearray]]) -> None:
        _, rows, columns = blocks[place]
        for target, part in zip([matrix, *tables], [made[0], *made[1]], strict=True):
            values = np.frombuffer(part, dtype="<f8").reshape(len(rows), len(columns))
            _put(target, rows, columns, values)

    with opened(options.executor, options.threads) as executor:
        run(executor, tasks, receive, progress=progress)
    return matrix, tables


def _put(target: Matrix, rows: list[int], columns: list[int], values: Matrix) -> None:
    """Puts a rectangle in its place, on both sides of the diagonal."""
    import numpy as np

    x, y = np.array(rows), np.array(columns)
    if rows == columns:
        # Those below its own diagonal were not made.
        upper = x[:, None] <= y[None, :]
        values = np.where(upper, values, values.T)
    target[np.ix_(x, y)] = values
    target[np.ix_(y, x)] = values.T


def _opened(adapters: Sequence[str], threads: int) -> _core.Collection:
    sources = [core_source(Path(adapter)) for adapter in adapters]
    collection, failures = _core.open_collection(sources, threads=threads, progress=None)
    for at, error in failures:
        raise PlanError(f"{adapters[at]}: could be read before, and now cannot: {error}")
    return collection


#: The collection that this process opened last, by the digest of what is asked of it.
_last: tuple[str, _core.Collection] | None = None


def block_products(
    common: Comparison, place: int, *, threads: int
) -> tuple[bytearray, list[bytearray]]:
    """The task of a worker: the products of one rectangle.

    Raises:
        PlanError: the adapters, or lorafast, are not those of the one who asks.
    """
    global _last  # noqa: PLW0603 (one a process)
    known = _last
    if known is None or known[0] != common.digest:
        known = _last = (common.digest, _opened(common.adapters, threads))
    return known[1].block(common.groups, place, common.digest, **common.options, threads=threads)
