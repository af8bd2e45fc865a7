"""Lineages: an adapter as a combination of others: `lorafast.lineage`."""

from __future__ import annotations

import math
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._errors import AdapterError
from lorafast._fleet.discovery import ScanError
from lorafast._fleet.members import ByMember
from lorafast._io.paths import expand
from lorafast._io.plain import to_plain
from lorafast._io.progress import pace
from lorafast._results import FramedResult, RecordDict, RecordList, view
from lorafast._similarity.collection import Adapters, found_by, opened
from lorafast._similarity.options import MEMORY
from lorafast._types import Progress, Source

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from lorafast import _core
    from lorafast._types import Matrix

#: A candidate with less of its own than this, beside those before it, may be one of them again.
SUSPICIOUS = 1e-2
#: Below this there is nothing of its own that float64 could tell.
NOTHING = 1e-7
#: Relative residuals below this are computed again from the stacked factors, where no digit of
#: the difference is lost …
SMALL = 1e-3
#: … while the ranks of all terms together stay below this.
STACKED_RANKS = 256
#: Above this residual the nearest combination has less than 2 % of the target's Σσ²: the target is
#: made of nothing among the candidates.
UNRELATED = 0.99
#: Above this one, more than a quarter of Σσ² comes from elsewhere, and words say so.
PARTLY = 0.5


@dataclass(frozen=True, repr=False)
class Lineage(FramedResult):
    """An adapter's update as a combination of others'. Made by `lorafast.lineage`.

    Attributes:
        target: where the adapter lies.
        name: its name.
        names: a distinct name for each candidate, by its path.
        coefficients: for each candidate's path (its name finds it too) wᵢ of Σ wᵢ·Xᵢ, the
            combination that is nearest to the target in the Frobenius norm; 0 for those in
            `dependent`.
        residual: ‖T − Σ wᵢ·Xᵢ‖/‖T‖: 0 for a mixture, 1 for something unrelated. Above 0.99
            (`related` is false) the combination has less than 2 % of ‖T‖², and is none.
        cosines: of the target with each candidate, by its path.
        contributions: wᵢ·‖Xᵢ‖/‖T‖ of each, by its path.
        dependent: candidates that are combinations of those before them, as far as rounding can
            tell, with the sentence that says so; they are left out, for their coefficients could
            be anything.
        errors: candidates that could not be read or compared, with the reason.
    """

    target: Path
    name: str
    names: dict[Path, str]
    coefficients: dict[Path, float]
    residual: float
    cosines: dict[Path, float]
    contributions: dict[Path, float]
    dependent: dict[Path, str] = field(default_factory=dict)
    errors: list[ScanError] = field(default_factory=list)

    _kind = "lineage"

    def __post_init__(self) -> None:
        for name in ("names", "coefficients", "cosines", "contributions", "dependent"):
            values = getattr(self, name)
            if not isinstance(values, ByMember):
                object.__setattr__(self, name, RecordDict(values))
        object.__setattr__(self, "errors", RecordList(self.errors))

    @property
    def explained(self) -> float:
        """The share of ‖T‖² that the combination has: 1 − residual²."""
        return 1.0 - self.residual**2

    @property
    def related(self) -> bool:
        """Whether the target has anything of the candidates: a residual of at most 99 %."""
        return self.residual <= UNRELATED

    def __str__(self) -> str:
        """The combination in words: `0.70·A + 0.30·B, residual 0.2 %`.

        Above a residual of 99 % it is `nothing of these`, above 50 % it ends in `something else`.
        """
        text: str = view("combination", self)(self)
        return text

    def _plain(self) -> dict[str, Any]:
        return {
            "target": os.fspath(self.target),
            "name": self.name,
            "text": str(self),
            "residual": self.residual,
            "explained": self.explained,
            "related": self.related,
            "candidates": [
                {
                    "path": os.fspath(path),
                    "name": self.names[path],
                    "coefficient": weight,
                    "contribution": self.contributions[path],
                    "cosine": self.cosines[path],
                    "dependent": self.dependent.get(path),
                }
                for path, weight in self.coefficients.items()
            ],
            "errors": to_plain(self.errors),
        }


def lineage(
    target: Source,
    candidates: Adapters,
    *,
    threads: int | None = None,
    progress: Progress = False,
) -> Lineage:
    """Finds the combination of candidates that an adapter is nearest to.

    Least squares on the exact Gram matrix of the updates s·B·A, in float64, whatever the ranks,
    scales and factorisations. A target that was mixed of the candidates comes out with their
    weights and a residual of what rounding did; what it does not share with any of them is the
    residual. Modules that only one adapter has are zero in the others; which are the same is told
    as by `lorafast.similarity`, and a candidate of which nothing tells it is an error.

    Candidates that say the same (duplicates, or a mixture of others) make the weights ambiguous.
    They are taken in the order given, and one that has nothing of its own beside those before
    it, beyond what rounding of the stored factors explains, is put into `dependent`.

    Args:
        target: the adapter: a directory, a weights file, or a candidate's name.
        candidates: directories, which are searched; adapters; globs; any number of these; or a
            fleet. The target itself is left out where it is among them.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) multiplications.

    Returns:
        Weights and residual.

    Raises:
        ValueError: the target is not one adapter, or an argument is outside its domain.
        FileNotFoundError: the target, or every candidate, is not there.
        AdapterError: the target, or every candidate, cannot be read; or the target is zero or
            not finite.
    """
    others, errors, names = found_by(candidates)
    targets, target_errors, target_names = found_by([_path_of(target, names, others)])
    if len(targets) != 1:
        if target_errors and not targets:
            raise AdapterError(f"{target_errors[0].path}: {target_errors[0].reason}")
        raise ValueError(f"{target}: holds {len(targets)} adapters; name one of them")
    own = targets[0].resolve()
    kept = [at for at, path in enumerate(others) if path.resolve() != own]
    # Among the candidates it has its name there; else its own, but if that is a candidate's.
    own_name = next((names[at] for at in range(len(others)) if at not in kept), target_names[0])
    if own_name in (names[at] for at in kept):
        own_name = os.fspath(targets[0])
    if not kept:
        raise ValueError("there is no candidate beside the target itself")
    chosen = [own_name, *(names[at] for at in kept)]
    paths = [targets[0], *(others[at] for at in kept)]
    found = opened(paths, errors, chosen, threads, progress=progress)
    if found.paths[0] != targets[0]:
        reason = next(error.reason for error in errors if error.path == targets[0])
        raise AdapterError(f"{targets[0]}: {reason}")
    usable = [0, *_of_one_shape(found.core, errors, found.paths)]
    if len(usable) < 2:
        raise AdapterError(
            f"no candidate can be compared with the target; {errors[0].path}: {errors[0].reason}"
        )
    gram = _gram(found.core, usable, len(found.paths), threads, progress)
    square = gram[0, 0]
    if not math.isfinite(square) or square == 0:
        what = "is zero" if square == 0 else "holds NaN or infinity"
        raise AdapterError(
            f"{targets[0]}: its low-rank update {what}; there is nothing to take apart"
        )
    solution = _Solution(found.core, usable, gram, threads)
    labels = {found.paths[at]: found.names[at] for at in usable[1:]}
    dependent = solution.dependent([found.names[at] for at in usable])
    norms = solution.norms
    places = {found.paths[at]: place for place, at in enumerate(usable) if place}

    def of_each(values: Iterable[float]) -> ByMember[float]:
        return ByMember(zip(labels, map(float, values), strict=True), list(labels.values()))

    return Lineage(
        target=targets[0],
        name=found.names[0],
        names=labels,
        coefficients=of_each(solution.weights[place] for place in places.values()),
        residual=solution.residual(),
        cosines=of_each(
            gram[0, place] / (norms[0] * norms[place]) if norms[place] else math.nan
            for place in places.values()
        ),
        contributions=of_each(
            solution.weights[place] * norms[place] / norms[0] for place in places.values()
        ),
        dependent={path: dependent[place] for path, place in places.items() if place in dependent},
        errors=errors,
    )


def _path_of(target: Source, names: Sequence[str], paths: Sequence[Path]) -> Source:
    """Where the target lies; one that is not there may be a candidate's name."""
    if not os.path.lexists(expand(target)) and os.fspath(target) in names:
        return paths[names.index(os.fspath(target))]
    return target


def _of_one_shape(
    core: _core.Collection, errors: list[ScanError], paths: Sequence[Path]
) -> list[int]:
    """The candidates whose modules have the shapes of the target's."""
    modules = core.modules()
    members = core.members()
    wanted = {modules[at][0]: modules[at][1:] for at in members[0]["modules"]}
    usable = []
    for at in range(1, len(paths)):
        reason = core.reason_apart(0, at)
        if reason is not None:
            errors.append(ScanError(paths[at], f"is not comparable with the target: {reason}"))
            continue
        own = (modules[module] for module in members[at]["modules"])
        clash = next((m for m in own if wanted.get(m[0], m[1:]) != m[1:]), None)
        if clash is None:
            usable.append(at)
            continue
        name, rows, columns = clash
        errors.append(
            ScanError(
                paths[at],
                f"is of another base than the target: module {name} updates a weight of shape "
                f"[{rows}, {columns}] in it but of shape {list(wanted[name])} in the target",
            )
        )
    return usable


def _gram(
    core: _core.Collection, usable: list[int], count: int, threads: int | None, progress: Progress
) -> Matrix:
    """The inner products of some members, in float64."""
    import numpy as np

    pairs = len(usable) * (len(usable) + 1) // 2
    with pace(progress, "comparing", pairs, "pairs") as report:
        whole, *_ = core.products(
            [usable],
            precision="float64",
            per_module=False,
            memory=MEMORY,
            cache=None,
            threads=threads,
            progress=report,
        )
    matrix: Matrix = np.frombuffer(whole, dtype="<f8").reshape(count, count)
    return matrix[np.ix_(usable, usable)]


class _Solution:
    """Least squares on a Gram matrix whose first row is the target's."""

    def __init__(
        self, core: _core.Collection, usable: list[int], gram: Matrix, threads: int | None
    ) -> None:
        import numpy as np

        self.core, self.usable, self.gram, self.threads = core, usable, gram, threads
        self.norms: NDArray[numpy.float64] = np.sqrt(gram.diagonal())
        self.independent, self._reasons = self._sort()
        self.weights = np.zeros(len(usable))
        chosen = self.independent
        if chosen:
            scale = self.norms[chosen]
            system = gram[np.ix_(chosen, chosen)] / np.outer(scale, scale)
            right = gram[chosen, 0] / scale
            self.weights[chosen] = np.linalg.solve(system, right) / scale

    def _sort(self) -> tuple[list[int], dict[int, list[int]]]:
        """The candidates with something of their own, and what each of the others is made of.

        Cholesky's method, column after column: a candidate's own is its distance from the span of
        those before it.
        """
        import numpy as np

        count = len(self.usable)
        chosen: list[int] = []
        reasons: dict[int, list[int]] = {}
        # Row i holds what is known of candidate i in terms of those that were chosen.
        factor = np.zeros((count, count))
        tolerances: dict[int, float] = {}
        with np.errstate(divide="ignore"):
            inverse = np.where(self.norms > 0, 1 / self.norms, 0.0)
        for at in range(1, count):
            norm = float(self.norms[at])
            if not math.isfinite(norm) or norm == 0:
                reasons[at] = []
                continue
            size = len(chosen)
            row = factor[at, :size]
            own = math.sqrt(max(1.0 - float(row @ row), 0.0))
            limit = NOTHING
            if NOTHING < own < SUSPICIOUS:
                limit = max(limit, self._rounding(at, chosen, tolerances) / norm)
            if own <= limit:
                reasons[at] = self._made_of(at, chosen, row, factor)
                continue
            # Candidates that are not finite spoil their own rows alone.
            with np.errstate(invalid="ignore"):
                column = self.gram[at:, at] * inverse[at:] / norm - factor[at:, :size] @ row
            factor[at:, size] = column / own
            chosen.append(at)
        return chosen, reasons

    def _made_of(self, at: int, chosen: list[int], row: Matrix, factor: Matrix) -> list[int]:
        """Those of the chosen that a candidate without anything of its own is made of."""
        import numpy as np

        cosines = np.abs(self.gram[at, chosen]) / (self.norms[chosen] * self.norms[at])
        like = int(np.argmax(cosines))
        if cosines[like] > 1 - SUSPICIOUS**2:
            return [chosen[like]]
        shares = np.linalg.solve(factor[chosen, : len(row)].T, row)
        return [chosen[place] for place in np.flatnonzero(np.abs(shares) > 0.01)]

    def _rounding(self, at: int, chosen: list[int], known: dict[int, float]) -> float:
        """What rounding may have done to a candidate and to the most similar of those before it."""
        import numpy as np

        cosines = np.abs(self.gram[at, chosen]) / self.norms[chosen]
        like = chosen[int(np.argmax(cosines))]
        for place in (at, like):
            if place not in known:
                [(plain, _)] = self.core.signatures(
                    [self.usable[place]], threads=self.threads, progress=None
                )
                if isinstance(plain, Exception):
                    raise plain
                known[place] = plain["tolerance"]
        return math.hypot(known[at], known[like] * self.norms[at] / self.norms[like])

    def dependent(self, names: Sequence[str]) -> dict[int, str]:
        """Why each candidate that is left out is."""
        texts = {}
        for at, parts in self._reasons.items():
            if self.norms[at] == 0:
                texts[at] = "has a low-rank update of zero"
            elif not math.isfinite(self.norms[at]):
                texts[at] = "holds NaN or infinity"
            elif len(parts) == 1:
                factor = self.gram[at, parts[0]] / self.gram[parts[0], parts[0]]
                scale = "" if abs(factor - 1) < 1e-2 else f"{factor:.4g} times "
                texts[at] = f"is {scale}the update of {names[parts[0]]}"
            else:
                shown = ", ".join(names[part] for part in parts[:3])
                texts[at] = f"is a combination of {shown}{', …' if len(parts) > 3 else ''}"
        return texts

    def residual(self) -> float:
        """‖T − Σ wᵢ·Xᵢ‖/‖T‖."""
        square = self.gram[0, 0]
        chosen = self.independent
        share = 1.0 - float(self.weights[chosen] @ self.gram[0, chosen]) / square
        relative = math.sqrt(min(max(share, 0.0), 1.0))
        members = self.core.members()
        ranks = sum(max(members[self.usable[at]]["ranks"], default=0) for at in self.independent)
        if relative < SMALL and ranks <= STACKED_RANKS:
            terms = [(self.usable[at], float(self.weights[at])) for at in self.independent]
            norm = self.core.combination_norm(self.usable[0], terms, threads=self.threads)
            relative = norm / math.sqrt(square)
        return relative
