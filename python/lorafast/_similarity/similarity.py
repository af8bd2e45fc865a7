"""Similarities of many adapters: the matrix, and what is asked of it."""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._analysis.names import position_of
from lorafast._errors import LorafastError
from lorafast._fleet.discovery import ScanError
from lorafast._io import atomic
from lorafast._io.paths import expand, open_plain
from lorafast._io.plain import to_plain
from lorafast._io.strangers import parse_json
from lorafast._results import READ_VERSIONS, FramedResult, RecordDict, RecordList, view

if TYPE_CHECKING:
    import numpy
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lorafast._types import Matrix, Method, Metric

#: What a file makes its readers raise that is none of `Similarity.save`.
NO_SIMILARITY = (KeyError, TypeError, ValueError, AttributeError, EOFError, NotImplementedError)


@dataclass(frozen=True, eq=False, repr=False)
class Similarity(FramedResult):
    """How similar many adapters' updates are. Made by `lorafast.similarity`.

    The product of two adapters is ⟨X, Y⟩ = Σ ⟨ΔW, ΔW′⟩ over the modules that both have; what one
    has and the other has not is zero there, and counts in the norm of the one that has it.

    Attributes:
        metric: "cosine" or "inner_product".
        precision: what products were summed in: "float64" or "float32".
        names: a distinct name for each of the N adapters.
        paths: where each lies.
        matrix: N×N float64: ⟨X, Y⟩/(‖X‖·‖Y‖), or ⟨X, Y⟩. NaN where an adapter is not finite, and
            for cosines where one is zero; NaN for adapters of different bases, and where nothing
            tells which of their modules are the same (`notes` says why).
        norms: ‖X‖ of each, float64.
        groups: for each base the positions of its adapters, those apart that are not comparable
            with the others; one entry unless they were split.
        modules: the modules that any of them updates.
        presence: N×P, whether the adapter has the module.
        per_module: for each module the matrix of its updates alone, where it was asked for; NaN
            for adapters that have it not.
        errors: what could not be read, each with its path and the reason.
        notes: what to know of the matrix: adapters that lack modules, what is no part of it.
        seconds: where the time went: "opening" the adapters, "reading" their factors,
            "multiplying" them. On a device the last two overlap, and "multiplying" is both.
    """

    metric: Metric
    precision: str
    names: list[str]
    paths: list[Path]
    matrix: Matrix
    norms: NDArray[numpy.float64]
    groups: dict[str, list[int]]
    modules: list[str]
    presence: NDArray[numpy.bool_]
    per_module: dict[str, Matrix] | None = None
    errors: list[ScanError] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)

    _kind = "similarity"
    # A matrix of thousands of rows is no reading.
    _indent = None

    def __post_init__(self) -> None:
        for name in ("names", "paths", "modules", "errors", "notes"):
            object.__setattr__(self, name, RecordList(getattr(self, name)))
        object.__setattr__(self, "groups", RecordDict(self.groups))
        if self.per_module is not None:
            object.__setattr__(self, "per_module", RecordDict(self.per_module))

    def __len__(self) -> int:
        return len(self.names)

    @property
    def shared(self) -> NDArray[numpy.int64]:
        """N×N: how many modules two adapters both have; on the diagonal, how many each has."""
        import numpy as np

        present = self.presence.astype(np.float32)
        counts: NDArray[numpy.int64] = np.rint(present @ present.T).astype(np.int64)
        return counts

    @property
    def coverage(self) -> Matrix:
        """N×N: modules that both have, as a share of those that either has."""
        import numpy as np

        shared = self.shared.astype(np.float64)
        own = shared.diagonal()
        either = own[:, None] + own[None, :] - shared
        return np.divide(shared, either, out=np.zeros_like(shared), where=either > 0)

    def position(self, adapter: str | os.PathLike[str]) -> int:
        """Where an adapter stands, by its name or its path.

        Raises:
            KeyError: there is none of that name.
        """
        return position_of(adapter, self.names, self.paths)

    def nearest(self, adapter: str | os.PathLike[str], k: int = 5) -> list[tuple[str, float]]:
        """The adapters most similar to one, the most similar first.

        Args:
            adapter: its name or its path.
            k: how many; fewer where there are fewer with a figure.

        Returns:
            Name and figure of each; an adapter is not its own neighbour.

        Raises:
            KeyError: there is no such adapter.
            ValueError: k is less than 1.
        """
        import numpy as np

        if k < 1:
            raise ValueError(f"k must be at least 1, not {k}")
        position = self.position(adapter)
        row = np.array(self.matrix[position])
        row[position] = np.nan
        known = np.flatnonzero(np.isfinite(row))
        # Stable, so that equal ones stay in the order of the adapters.
        order = known[np.argsort(-row[known], kind="stable")][:k]
        return [(self.names[other], float(row[other])) for other in order]

    def linkage(self, method: Method = "average") -> Matrix:
        """SciPy's hierarchical linkage of the distances 1 − cosine.

        Args:
            method: how the distance of two clusters follows from their members'.

        Returns:
            The (N − 1)×4 array of `scipy.cluster.hierarchy.linkage`.

        Raises:
            ValueError: there are fewer than two adapters, or pairs without a cosine (zero or
                non-finite adapters, several bases: see `split`).
            MissingDependencyError: SciPy is not installed.
        """
        from lorafast._similarity.clusters import cosines, linkage

        return linkage(cosines(self.metric, self.matrix, self.norms), method)

    def clusters(
        self, *, threshold: float = 0.5, count: int | None = None, method: Method = "average"
    ) -> list[list[str]]:
        """Groups of similar adapters, by hierarchical clustering of 1 − cosine.

        Adapters of different bases are never in one cluster, nor is one without a cosine (zero or
        not finite) with any other.

        Args:
            threshold: the cosine at which clusters are no longer joined.
            count: how many clusters to make of each base instead.
            method: how the distance of two clusters follows from their members', as SciPy's.

        Returns:
            The clusters, the largest first, each the names of its members.

        Raises:
            ValueError: an argument is outside its domain.
            MissingDependencyError: SciPy is not installed.
        """
        from lorafast._similarity.clusters import clusters, cosines

        matrix = cosines(self.metric, self.matrix, self.norms)
        found = clusters(matrix, list(self.groups.values()), threshold, count, method)
        return [[self.names[at] for at in cluster] for cluster in found]

    def plot(self, *, method: Method = "average", ax: Axes | None = None) -> Figure:
        """The matrix as a heatmap, similar adapters side by side, with the tree that orders it.

        Args:
            method: how the distance of two clusters follows from their members', as SciPy's.
            ax: matplotlib's axes whose place in their figure the plot takes. A new figure is made
                if `None`.

        Returns:
            A matplotlib Figure that belongs to no window, or the one of `ax`.

        Raises:
            ValueError: the plot does not fit into `ax`.
            MissingDependencyError: matplotlib or SciPy is not installed.
        """
        figure: Figure = view("plot", self)(self, method, ax)
        return figure

    def split(self) -> dict[str, Similarity]:
        """One similarity for each base."""
        import numpy as np

        parts = {}
        for base, positions in self.groups.items():
            square = np.ix_(positions, positions)
            per_module = self.per_module
            parts[base] = Similarity(
                metric=self.metric,
                precision=self.precision,
                names=[self.names[position] for position in positions],
                paths=[self.paths[position] for position in positions],
                matrix=self.matrix[square],
                norms=self.norms[positions],
                groups={base: list(range(len(positions)))},
                modules=self.modules,
                presence=self.presence[positions],
                per_module=per_module
                and {name: matrix[square] for name, matrix in per_module.items()},
                errors=self.errors,
                notes=self.notes,
            )
        return parts

    def pairs(self, count: int = 20) -> list[tuple[str, str, float]]:
        """The most similar pairs, the most similar first.

        Args:
            count: how many; fewer where there are fewer with a figure.
        """
        import numpy as np

        # Row after row: an index for every pair of many adapters would be larger than the matrix.
        best: list[tuple[float, int, int]] = []
        for row in range(len(self) - 1):
            values = self.matrix[row, row + 1 :]
            known = np.flatnonzero(np.isfinite(values))
            if len(known) > count:
                known = known[np.argsort(-values[known], kind="stable")[:count]]
            best += [(-float(values[at]), row, row + 1 + int(at)) for at in known]
            best = sorted(best)[:count]
        return [(self.names[x], self.names[y], -value) for value, x, y in best]

    def _plain(self) -> dict[str, Any]:
        """The fields but `seconds`, so that the same figures make the same file."""
        return {
            "metric": self.metric,
            "precision": self.precision,
            "names": to_plain(self.names),
            "paths": to_plain(self.paths),
            "matrix": self.matrix.tolist(),
            "norms": self.norms.tolist(),
            "groups": to_plain(self.groups),
            "modules": to_plain(self.modules),
            "presence": self.presence.tolist(),
            "per_module": self.per_module
            and {name: matrix.tolist() for name, matrix in self.per_module.items()},
            "errors": to_plain(self.errors),
            "notes": to_plain(self.notes),
        }

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes everything into one compressed `.npz` file, which `load` reads.

        Raises:
            OSError: it cannot be written.
        """
        import numpy as np

        plain = {**self.to_dict(), "matrix": None, "norms": None, "presence": None}
        plain["per_module"] = None if self.per_module is None else list(self.per_module)
        arrays: dict[str, Any] = {
            "matrix": self.matrix,
            "norms": self.norms,
            "presence": self.presence,
        }
        for number, matrix in enumerate((self.per_module or {}).values()):
            arrays[f"module_{number}"] = matrix
        with atomic.writing(expand(path)) as file:
            np.savez_compressed(file, about=np.array(json.dumps(plain)), **arrays)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Similarity:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            LorafastError: it is something else, or of a later version.
        """
        import zipfile
        import zlib

        import numpy as np

        try:
            with (
                open_plain(expand(path), LorafastError) as own,
                np.load(own, allow_pickle=False) as file,
            ):
                plain = parse_json(str(file["about"]), path, LorafastError)
                version = plain.get("schema_version")
                if plain.get("kind") != cls._kind or version not in READ_VERSIONS:
                    raise LorafastError(
                        f"{path}: is no similarity of schema version {READ_VERSIONS[-1]}"
                    )
                modules = plain["per_module"]
                return cls(
                    metric=plain["metric"],
                    precision=plain["precision"],
                    names=plain["names"],
                    paths=[Path(own) for own in plain["paths"]],
                    matrix=file["matrix"],
                    norms=file["norms"],
                    groups=plain["groups"],
                    modules=plain["modules"],
                    presence=file["presence"],
                    per_module=None
                    if modules is None
                    else {name: file[f"module_{at}"] for at, name in enumerate(modules)},
                    errors=[
                        ScanError(Path(error["path"]), error["reason"]) for error in plain["errors"]
                    ],
                    notes=plain["notes"],
                )
        except (zipfile.BadZipFile, zlib.error, *NO_SIMILARITY) as error:
            raise LorafastError(f"{path}: is no similarity that was saved ({error})") from error


# What users see, and what a pickle names.
Similarity.__module__ = "lorafast"
