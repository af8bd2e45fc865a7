"""Which adapters are alike: `lorafast.similarity`."""

from __future__ import annotations

import json
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from lorafast._errors import LorafastError
from lorafast._fleet._paths import ScanError

if TYPE_CHECKING:
    import numpy
    from matplotlib.figure import Figure
    from numpy.typing import NDArray

    from lorafast._fleet._collect import Adapters, Collected
    from lorafast._records import Matrix

Metric = Literal["cosine", "inner_product"]
Precision = Literal["auto", "float64", "float32"]
Method = Literal["average", "complete", "single", "weighted"]
Progress = bool | Callable[[int, int], object]

METRICS: tuple[Metric, ...] = ("cosine", "inner_product")
PRECISIONS: tuple[Precision, ...] = ("auto", "float64", "float32")
#: Up to so many multiplications are made in float64: some minutes of a core.
DOUBLE_WORK = 4 * 10**12
#: Bytes of stacked factors, where nothing else is said.
MEMORY = 1 << 30
SCHEMA_VERSION = 1


@dataclass(frozen=True, eq=False, repr=False)
class Similarity:
    """How alike many adapters' updates are. Made by `lorafast.similarity`.

    The product of two adapters is ⟨X, Y⟩ = Σ ⟨ΔW, ΔW′⟩ over the modules that both have; what one
    has and the other has not is zero there, and counts in the norm of the one that has it.

    Attributes:
        metric: "cosine" or "inner_product".
        precision: what products were summed in: "float64" or "float32".
        names: a distinct name for each of the N adapters.
        paths: where each lies.
        matrix: N×N float64: ⟨X, Y⟩/(‖X‖·‖Y‖), or ⟨X, Y⟩. NaN where an adapter is not finite, and
            for cosines where one is zero; NaN for adapters of different bases.
        norms: ‖X‖ of each, float64.
        groups: for each base the positions of its adapters; one entry unless they were split.
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

    def __len__(self) -> int:
        return len(self.names)

    def __repr__(self) -> str:
        parts = [f"{len(self):,} adapters", f"{self.metric}", f"{len(self.modules):,} modules"]
        if len(self.groups) > 1:
            parts.append(f"{len(self.groups)} bases")
        if self.errors:
            parts.append(f"{len(self.errors):,} errors")
        return f"<Similarity of {', '.join(parts)}>"

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
        if isinstance(adapter, str) and adapter in self.names:
            return self.names.index(adapter)
        path = Path(adapter)
        for position, own in enumerate(self.paths):
            if own == path or own.resolve() == path.resolve():
                return position
        raise KeyError(f"no adapter {os.fspath(adapter)!r} is among the {len(self)}")

    def nearest(self, adapter: str | os.PathLike[str], k: int = 5) -> list[tuple[str, float]]:
        """The adapters most like one, the most alike first.

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
        from lorafast._fleet._clusters import linkage

        return linkage(self, method)

    def clusters(
        self, *, threshold: float = 0.5, count: int | None = None, method: Method = "average"
    ) -> list[list[str]]:
        """Groups of adapters that are alike, by hierarchical clustering of 1 − cosine.

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
        from lorafast._fleet._clusters import clusters

        return clusters(self, threshold, count, method)

    def plot(self, *, method: Method = "average") -> Figure:
        """The matrix as a heatmap with like beside like, and the dendrogram that orders it.

        Args:
            method: how the distance of two clusters follows from their members', as SciPy's.

        Returns:
            A matplotlib Figure that belongs to no window.

        Raises:
            MissingDependencyError: matplotlib or SciPy is not installed.
        """
        from lorafast._plots._similarity import clustered

        return clustered(self, method)

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
        """The most alike pairs, the most alike first.

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

    def to_dict(self) -> dict[str, Any]:
        """Every field as plain objects, with `schema_version` and `kind`; NaN stays NaN."""
        return {
            "schema_version": SCHEMA_VERSION,
            "kind": "similarity",
            "metric": self.metric,
            "precision": self.precision,
            "names": self.names,
            "paths": [os.fspath(path) for path in self.paths],
            "matrix": self.matrix.tolist(),
            "norms": self.norms.tolist(),
            "groups": self.groups,
            "modules": self.modules,
            "presence": self.presence.tolist(),
            "per_module": self.per_module
            and {name: matrix.tolist() for name, matrix in self.per_module.items()},
            "errors": [
                {"path": os.fspath(error.path), "reason": error.reason} for error in self.errors
            ],
            "notes": self.notes,
        }

    def to_json(self) -> str:
        """`to_dict` as strict JSON: NaN, which JSON does not have, becomes null."""
        from lorafast._serialise import without_non_finite

        return json.dumps(without_non_finite(self.to_dict()), allow_nan=False)

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
        target = Path(path)
        partial = target.with_name(f".{target.name}.{os.getpid()}")
        try:
            with partial.open("wb") as file:
                np.savez_compressed(file, about=np.array(json.dumps(plain)), **arrays)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Similarity:
        """Reads what `save` wrote.

        Raises:
            FileNotFoundError: it is not there.
            LorafastError: it is something else, or of a later version.
        """
        import zipfile

        import numpy as np

        try:
            with np.load(path, allow_pickle=False) as file:
                plain = json.loads(str(file["about"]))
                version = plain.get("schema_version")
                if plain.get("kind") != "similarity" or version != SCHEMA_VERSION:
                    raise LorafastError(
                        f"{path}: is no similarity of schema version {SCHEMA_VERSION}"
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
        except (zipfile.BadZipFile, KeyError, ValueError, EOFError) as error:
            raise LorafastError(f"{path}: is no similarity that was saved ({error})") from error


def similarity(
    adapters: Adapters,
    *,
    metric: Metric = "cosine",
    per_module: bool = False,
    group_by_base: bool = False,
    ignore_base: bool = False,
    precision: Precision = "auto",
    memory: int = MEMORY,
    cache: str | os.PathLike[str] | None = None,
    threads: int | None = None,
    progress: Progress = False,
    device: str = "cpu",
    device_memory: int | str | None = None,
) -> Similarity:
    """The exact similarity of the updates of all adapters with each other.

    Ranks, alphas and modules may differ. The products come from the factors alone, stacked by
    module: K = blocksum((𝐁ᵀ𝐁)∘(𝐀𝐀ᵀ)), N²r²(m + n)/2 multiplications a module. That is cheaper
    than dense updates while r < √(mn/(m + n)).

    Figures are of the low-rank updates s·B·A. What an adapter does beside them (DoRA's
    magnitudes, biases, saved modules, trained rows) is no part of them; `notes` says where there
    is any. Embeddings and convolutions count as the matrices that their factors make.

    Memory is `memory` bytes for factors, and 16·N² for the result (times one and the number of
    modules with `per_module`); few files are open at a time. The figures are the same whatever
    the threads, the memory, and the interruptions.

    Args:
        adapters: directories, which are searched; adapters; globs; any number of these; or a
            fleet.
        metric: "cosine", or "inner_product" for ⟨X, Y⟩ itself.
        per_module: also keep the matrix of each module, in N² numbers each.
        group_by_base: sort the adapters by their base, and compare only within each. A base is
            known by the last part of the name that `adapter_config.json` gives it, and by the
            shapes of what is updated.
        ignore_base: compare adapters in one matrix whatever base they name, as long as the shapes
            of their updates agree.
        precision: what products are summed in. "float64" gives cosines to 1e-13; "float32", at
            twice the speed, to about 1e-7 (norms are always float64); "auto" is float64 for up
            to 4·10¹² multiplications and float32 beyond.
        memory: bytes for stacked factors.
        cache: a directory (made if it is not there) where what is done is written down every few
            seconds. The same call goes on where an earlier one was interrupted; what is finished
            is not computed again. It may be deleted at any time.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal, or a callable that is given (done, total)
            multiplications.
        device: where products are made: "cpu", or by torch on "cuda" or "cuda:N" ("auto": on a
            CUDA device where there is one; "torch:cpu" to compare backends). There they agree with
            the CPU's to the precision's rounding, not to the bit, and are not kept in a cache.
        device_memory: bytes for factors and their products on the device, or a text such as
            "2GiB", which is the default.

    Returns:
        The similarity. Adapters that cannot be read are in `errors` and not in the matrix.

    Raises:
        ValueError: an argument is outside its domain, or no path was given.
        FileNotFoundError: no path is there.
        AdapterError: no adapter can be read, or one was changed meanwhile.
        LorafastError: the adapters belong to different bases; the message lists the groups.
        DeviceError: the device is not there.
    """
    from lorafast._fleet._collect import collected, pace
    from lorafast._torch._devices import analysis_device, parse_memory

    if metric not in METRICS:
        raise ValueError(f"metric must be one of {', '.join(METRICS)}, not {metric!r}")
    if precision not in PRECISIONS:
        raise ValueError(f"precision must be one of {', '.join(PRECISIONS)}, not {precision!r}")
    if memory < 1:
        raise ValueError("memory must be a positive number of bytes")
    bound = parse_memory(device_memory, device)
    place = analysis_device(device, cache)
    begin = time.perf_counter()
    with collected(adapters, threads, progress) as found:
        seconds = {"opening": time.perf_counter() - begin}
        groups = dict(found.core.groups(ignore_base))
        if len(groups) > 1 and not group_by_base:
            raise LorafastError(_several_bases(groups, found.names, ignore_base))
        positions = list(groups.values())
        if precision == "auto":
            work = found.core.work(positions)
            precision = "float64" if work <= DOUBLE_WORK else "float32"
        pairs = sum(len(group) * (len(group) + 1) // 2 for group in positions)
        with pace(progress, "comparing", pairs, "pairs") as report:
            if place is not None:
                from lorafast._torch._products import products

                begin = time.perf_counter()
                matrix, tables = products(
                    found.core,
                    positions,
                    device=place,
                    precision=precision,
                    per_module=per_module,
                    memory=bound,
                    threads=threads,
                    progress=report,
                )
                seconds["multiplying"] = time.perf_counter() - begin
            else:
                whole, modules, _, (reading, multiplying) = found.core.products(
                    positions,
                    precision=precision,
                    per_module=per_module,
                    memory=memory,
                    cache=None if cache is None else Path(cache),
                    threads=threads,
                    progress=report,
                )
                seconds |= {"reading": reading, "multiplying": multiplying}
                count = len(found.names)
                matrix = _square(whole, count)
                tables = [_square(table, count) for table in modules]
        own = tables if per_module else None
        similar = _similarity(found, groups, matrix, own, metric=metric, precision=precision)
        return replace(similar, seconds=seconds)


def _several_bases(groups: Mapping[str, Sequence[int]], names: Sequence[str], ignored: bool) -> str:
    parts = []
    for base, members in groups.items():
        shown = ", ".join(names[member] for member in members[:3])
        more = ", …" if len(members) > 3 else ""
        parts.append(f"{base} ({len(members)}: {shown}{more})")
    hint = "group_by_base (--group-by-base) compares within each"
    if not ignored:
        hint += (
            ", ignore_base (--ignore-base) takes them for one model where the shapes of their "
            "updates agree"
        )
    return f"the adapters belong to {len(groups)} bases: {'; '.join(parts)}; {hint}"


def _similarity(
    found: Collected,
    groups: dict[str, list[int]],
    matrix: Matrix,
    modules: list[Matrix] | None,
    *,
    metric: Metric,
    precision: str,
) -> Similarity:
    import numpy as np

    count = len(found.names)
    names = [name for name, _, _ in found.core.modules()]
    presence = np.zeros((count, len(names)), dtype=np.bool_)
    for member, row in zip(found.members, presence, strict=True):
        row[member["modules"]] = True
    norms = np.sqrt(matrix.diagonal())
    per_module: dict[str, Matrix] | None = None
    if metric == "cosine":
        _to_cosines(matrix, norms)
    if modules is not None:
        per_module = {}
        for at, (name, table) in enumerate(zip(names, modules, strict=True)):
            own = table
            absent = ~presence[:, at]
            own[absent] = np.nan
            own[:, absent] = np.nan
            if metric == "cosine":
                _to_cosines(own, np.sqrt(own.diagonal()))
            # Modules of one name and different shapes are of different bases.
            if name in per_module:
                own = np.where(np.isnan(per_module[name]), own, per_module[name])
            per_module[name] = own
    return Similarity(
        metric=metric,
        precision=precision,
        names=found.names,
        paths=found.paths,
        matrix=matrix,
        norms=norms,
        groups=groups,
        modules=names,
        presence=presence,
        per_module=per_module,
        errors=found.errors,
        notes=_notes(found, groups, norms, presence),
    )


def _square(table: bytearray, count: int) -> Matrix:
    import numpy as np

    return np.frombuffer(table, dtype="<f8").reshape(count, count)


def _to_cosines(matrix: Matrix, norms: NDArray[numpy.float64]) -> None:
    """Inner products become cosines in place: the matrix may be most of the memory."""
    import numpy as np

    with np.errstate(divide="ignore", invalid="ignore"):
        inverse = np.where((norms > 0) & np.isfinite(norms), 1 / norms, np.nan)
    # One factor a pair, so that the matrix stays symmetric to the bit.
    for place, own in enumerate(inverse):
        matrix[place] *= own * inverse
    np.clip(matrix, -1.0, 1.0, out=matrix)
    places = np.flatnonzero(np.isfinite(inverse))
    matrix[places, places] = 1.0


def _notes(
    found: Collected,
    groups: Mapping[str, Sequence[int]],
    norms: NDArray[numpy.float64],
    presence: NDArray[numpy.bool_],
) -> list[str]:
    notes = []
    lacking = []
    for members in groups.values():
        wanted = presence[list(members)].any(axis=0).sum()
        lacking += [found.names[at] for at in members if presence[at].sum() < wanted]
    if lacking:
        notes.append(
            f"{_some(lacking)} of {len(found.names)} lack modules that others have; what is not "
            "shared counts as zero (`shared` has the numbers)"
        )
    left_out = [at for at, member in enumerate(found.members) if member["left_out"]]
    if left_out:
        example = ", ".join(found.members[left_out[0]]["left_out"])
        notes.append(
            f"{_some([found.names[at] for at in left_out])} do more than add low-rank updates, "
            f"which is no part of the figures ({found.names[left_out[0]]}: {example})"
        )
    zero = [name for name, norm in zip(found.names, norms, strict=True) if norm == 0]
    if zero:
        notes.append(f"{_some(zero)} are zero (never trained) and have no cosine")
    odd = [name for name, norm in zip(found.names, norms, strict=True) if not math.isfinite(norm)]
    if odd:
        notes.append(f"{_some(odd)} hold NaN or infinity and have no figures")
    return notes


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    more = ", …" if len(names) > 3 else ""
    return f"{len(names)} adapter{'s' * (len(names) > 1)} ({shown}{more})"
