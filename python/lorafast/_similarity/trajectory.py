"""Trajectories: the checkpoints of one run in their order: `lorafast.trajectory`."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._analysis.names import position_of
from lorafast._errors import LorafastError
from lorafast._fleet.discovery import ScanError, natural
from lorafast._io.plain import to_plain
from lorafast._io.progress import pace
from lorafast._options import check_choices, pick
from lorafast._results import FramedResult, RecordList, shown
from lorafast._similarity.collection import Adapters, collected, families
from lorafast._similarity.lineage import _gram
from lorafast._similarity.options import TrajectoryOptions
from lorafast._types import By, Progress, Source

if TYPE_CHECKING:
    from lorafast._types import Matrix

#: Checkpoints that the search begins with, the nearest to zero first.
STARTS = 8
#: Checkpoints that are moved together in the search for a shorter way.
LONGEST_PIECE = 3


@shown
@dataclass(frozen=True)
class Checkpoint:
    """One checkpoint on the way of a run.

    Attributes:
        path: where it lies.
        name: its name.
        norm: ‖ΔW‖ of the whole update.
        effective_rank: the mean over the modules of exp H(σ/Σσ) (Roy & Vetterli 2007).
        change: ‖X − P‖/‖X‖ with P the checkpoint before; `None` for the first.
        cosine_previous: with the checkpoint before; `None` for the first.
        cosine_last: with the last checkpoint.
        subspace_previous: φ = ‖UᵢᵀUⱼ‖²/min(i, j) with the checkpoint before (Hu et al. 2021,
            LoRA, §7.2), the mean over modules, of the output and the input subspaces; `None` for
            the first.
        subspace_last: the same with the last checkpoint.
    """

    path: Path
    name: str
    norm: float
    effective_rank: float
    change: float | None
    cosine_previous: float | None
    cosine_last: float
    subspace_previous: tuple[float, float] | None
    subspace_last: tuple[float, float]


@dataclass(frozen=True, repr=False)
class Trajectory(FramedResult):
    """Checkpoints in their order. Made by `lorafast.trajectory`.

    Attributes:
        steps: the checkpoints in order, with what changed from one to the next.
        by: what the order follows: "update", "name" or "given".
        agrees: whether the numbers in the names give the same order.
        length: Σ‖Xᵢ − Xᵢ₋₁‖ along the way, from the zero update on.
        errors: what could not be read, each with its path and the reason.
    """

    steps: list[Checkpoint]
    by: By
    agrees: bool
    length: float
    errors: list[ScanError] = field(default_factory=list)

    _kind = "trajectory"

    def __post_init__(self) -> None:
        object.__setattr__(self, "steps", RecordList(self.steps))
        object.__setattr__(self, "errors", RecordList(self.errors))

    @property
    def order(self) -> list[Path]:
        """The checkpoints' paths in order."""
        return [step.path for step in self.steps]

    @property
    def names(self) -> list[str]:
        """Their names in order."""
        return [step.name for step in self.steps]

    def step(self, checkpoint: Source) -> Checkpoint:
        """A checkpoint by its name or its path.

        Raises:
            KeyError: there is none of that name.
        """
        return self.steps[position_of(checkpoint, self.names, self.order)]

    def _plain(self) -> dict[str, Any]:
        return {
            "by": self.by,
            "agrees": self.agrees,
            "length": self.length,
            "steps": to_plain(self.steps),
            "errors": to_plain(self.errors),
        }


def trajectory(
    adapters: Adapters,
    *,
    by: By = "update",
    threads: int | None = None,
    progress: Progress = False,
) -> Trajectory:
    """Puts the checkpoints of one run in order, and follows norm, rank and subspaces along it.

    A run starts at the zero update and moves on by small steps, so that its checkpoints' order is
    the shortest way from zero through all of them, by the distances ‖X − Y‖ of the whole updates.
    The way is found by nearest neighbours, from several first checkpoints on, and improved by
    reversing and moving pieces of it (2-opt and or-opt) until nothing makes it shorter.

    Args:
        adapters: the checkpoints: a run's directory, which is searched; adapters; globs; any
            number of these; or a fleet.
        by: what the order follows: "update"; "name", the numbers in the paths; or "given".
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) of each of two parts.

    Returns:
        The checkpoints in order. Those that cannot be read are in `errors`.

    Raises:
        ValueError: an argument is outside its domain.
        FileNotFoundError: no path is there.
        AdapterError: no checkpoint can be read, or one was changed meanwhile.
        LorafastError: the checkpoints update weights of different shapes, nothing tells which of
            their modules are the same, or one of them is not finite.
    """
    import numpy as np

    check_choices(pick(TrajectoryOptions, locals()))
    found = collected(adapters, threads, progress)
    groups = found.core.groups(True)
    if len(groups) > 1:
        firsts = ", ".join(found.names[members[0]] for _, members in groups)
        raise LorafastError(
            f"the checkpoints are of {len(groups)} models, by the shapes of their updates "
            f"(among them {firsts}); give those of one run"
        )
    (first, *_), *others = families(found)
    if others:
        reason = found.core.reason_apart(first, others[0][0])
        raise LorafastError(
            f"{found.paths[first]} and {found.paths[others[0][0]]} are not comparable: {reason}; "
            "give the checkpoints of one run"
        )
    count = len(found.paths)
    gram = _gram(found.core, list(range(count)), count, threads, progress)
    for at in range(count):
        if not math.isfinite(gram[at, at]):
            raise LorafastError(f"{found.paths[at]}: holds NaN or infinity")
    named = sorted(range(count), key=lambda at: natural(found.paths[at]))
    order = {"update": _shortest(gram, named), "name": named, "given": list(range(count))}[by]
    with pace(progress, "following", len(found.core.modules()), "modules") as report:
        drifts = found.core.drift(order, threads=threads, progress=report)
    squares = gram.diagonal()
    norms = np.sqrt(squares)

    def cosine(x: int, y: int) -> float:
        if not norms[x] or not norms[y]:
            return math.nan
        return float(np.clip(gram[x, y] / (norms[x] * norms[y]), -1, 1)) if x != y else 1.0

    steps = []
    length = float(norms[order[0]])
    for place, (at, drift) in enumerate(zip(order, drifts, strict=True)):
        before = order[place - 1] if place else None
        change = drift["change"]
        length += change or 0.0
        previous = drift["previous"]
        steps.append(
            Checkpoint(
                path=found.paths[at],
                name=found.names[at],
                norm=float(norms[at]),
                effective_rank=drift["effective_rank"],
                change=None
                if change is None
                else (change / float(norms[at]) if norms[at] else math.nan),
                cosine_previous=None if before is None else cosine(at, before),
                cosine_last=cosine(at, order[-1]),
                subspace_previous=None if previous is None else (previous[0], previous[1]),
                subspace_last=(drift["last"][0], drift["last"][1]),
            )
        )
    return Trajectory(steps, by, order == named, length, found.errors)


def _shortest(gram: Matrix, named: list[int]) -> list[int]:
    """A way from zero through all points that no reversal and no move makes shorter."""
    import numpy as np

    squares = gram.diagonal()
    count = len(named)
    # Point 0 is the zero update; ties are decided by the names.
    distances = np.zeros((count + 1, count + 1))
    own = gram[np.ix_(named, named)]
    inner = squares[named][:, None] + squares[named][None, :] - 2 * own
    distances[1:, 1:] = np.sqrt(np.maximum(inner, 0.0))
    distances[0, 1:] = distances[1:, 0] = np.sqrt(squares[named])
    np.fill_diagonal(distances, 0.0)
    firsts = sorted(range(1, count + 1), key=lambda point: distances[0, point])
    ways = []
    for first in firsts[:STARTS]:
        way = [0, first]
        left = [point for point in range(1, count + 1) if point != first]
        while left:
            nearest = min(left, key=lambda point: distances[way[-1], point])
            way.append(nearest)
            left.remove(nearest)
        while _improve(way, distances):
            pass
        ways.append(way)
    best = min(ways, key=lambda way: float(sum(distances[x, y] for x, y in pairwise(way))))
    return [named[point - 1] for point in best[1:]]


def _improve(way: list[int], distances: Matrix) -> bool:
    """Makes the way shorter by one reversal or one move of a piece, if any does.

    The start stays where it is, the end is free.
    """
    count = len(way)
    floor = 1e-12 * float(distances.max())

    def step(points: list[int], place: int) -> float:
        """From the point at a place to the next; nothing comes after the last."""
        return (
            float(distances[points[place], points[place + 1]]) if place + 1 < len(points) else 0.0
        )

    for i in range(1, count - 1):
        for j in range(i + 1, count):
            gain = step(way, i - 1) + step(way, j) - float(distances[way[i - 1], way[j]])
            gain -= float(distances[way[i], way[j + 1]]) if j + 1 < count else 0.0
            if gain > floor:
                way[i : j + 1] = way[i : j + 1][::-1]
                return True
    for size in range(1, min(LONGEST_PIECE, count - 2) + 1):
        for i in range(1, count - size + 1):
            piece, rest = way[i : i + size], [*way[:i], *way[i + size :]]
            gain = step(way, i - 1) + step(way, i + size - 1) - step(rest, i - 1)
            for j in range(1, len(rest) + 1):
                for turned in (piece, piece[::-1]):
                    cost = float(distances[rest[j - 1], turned[0]]) - step(rest, j - 1)
                    cost += float(distances[turned[-1], rest[j]]) if j < len(rest) else 0.0
                    if gain - cost > floor:
                        way[:] = [*rest[:j], *turned, *rest[j:]]
                        return True
    return False
