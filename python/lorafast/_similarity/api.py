"""Similarity of many adapters with each other: `lorafast.similarity`."""

from __future__ import annotations

import math
import os
import time
import warnings
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafast._analysis.names import numbered
from lorafast._errors import LorafastError
from lorafast._options import check_choices, pick
from lorafast._similarity.collection import apart
from lorafast._similarity.options import MEMORY, SimilarityOptions
from lorafast._similarity.similarity import Similarity
from lorafast._types import ExecutorChoice, Metric, Precision, Progress
from lorafast._words import agree, plural

if TYPE_CHECKING:
    import numpy
    from numpy.typing import NDArray

    from lorafast._similarity.collection import Adapters, Collected
    from lorafast._types import Matrix

#: Up to so many multiplications are made in float64: some minutes of a core.
DOUBLE_WORK = 4 * 10**12


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
    executor: ExecutorChoice | None = None,
) -> Similarity:
    """The exact similarity of the updates of all adapters with each other.

    Ranks, alphas and modules may differ. The products come from the factors alone, stacked by
    module: K = blocksum((𝐁ᵀ𝐁)∘(𝐀𝐀ᵀ)), N²r²(m + n)/2 multiplications a module. That is cheaper
    than dense updates while r < √(mn/(m + n)).

    Figures are of the low-rank updates s·B·A. What an adapter does beside them (DoRA's
    magnitudes, biases, saved modules, trained rows) is no part of them; `notes` says where there
    is any. Embeddings and convolutions count as the matrices that their factors make.

    Modules are brought together whatever each adapter calls them: with the prefixes of the class
    that was loaded, a trainer's wrappers, the names of another release of transformers, experts
    one by one or stacked. Where nothing tells which modules of two adapters are the same, they
    have no figure, and `notes` says why; where they change other modules of one model, it is 0.

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
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) multiplications.
        device: where products are made: "cpu", or by torch on "cuda" or "cuda:N" ("auto": on a
            CUDA device where there is one; "torch:cpu" to compare backends). There they agree with
            the CPU's to the precision's rounding, not to the bit, and are not kept in a cache.
        device_memory: bytes for factors and their products on the device, or a text such as
            "2GiB", which is the default. cuBLAS's workspace comes on top.
        executor: who makes the products, those of some adapters with some others a task: an
            executor of `concurrent.futures`, "ray", "processes" or "processes:N", as for
            `lorafast.merge`; each task has `threads` threads, 1 if missing, and `memory` bytes. The
            figures are the same bits. It keeps no cache.

    Returns:
        The similarity. Adapters that cannot be read are in `errors` and not in the matrix.

    Raises:
        ValueError: an argument is outside its domain, or no path was given.
        FileNotFoundError: no path is there.
        AdapterError: no adapter can be read, or one was changed meanwhile.
        LorafastError: the adapters belong to different bases; the message lists the groups.
        DeviceError: the device is not there.
    """
    from lorafast._io.paths import expand
    from lorafast._io.progress import pace
    from lorafast._similarity.collection import collected
    from lorafast._torch.device import analysis_device

    options = pick(SimilarityOptions, locals())
    bound = _checked(options)
    place = analysis_device(options.device, options.cache)
    begin = time.perf_counter()
    found = collected(adapters, options.threads, options.progress)
    seconds = {"opening": time.perf_counter() - begin}
    groups = dict(found.core.groups(options.ignore_base))
    ignored = _ignored_bases(found, groups) if options.ignore_base else []
    if ignored:
        groups = _with_all_bases(found, groups)
    if len(groups) > 1 and not options.group_by_base:
        raise LorafastError(_several_bases(groups, found.names, options.ignore_base))
    groups = _comparable(groups, found)
    positions = list(groups.values())
    summed_in = options.precision
    if summed_in == "auto":
        work = found.core.work(positions)
        summed_in = "float64" if work <= DOUBLE_WORK else "float32"
    pairs = sum(len(group) * (len(group) + 1) // 2 for group in positions)
    with pace(options.progress, "comparing", pairs, "pairs") as report:
        if place is not None:
            from lorafast._torch.gram import products

            begin = time.perf_counter()
            matrix, tables = products(
                found.core,
                positions,
                device=place,
                precision=summed_in,
                per_module=options.per_module,
                memory=bound,
                threads=options.threads,
                progress=report,
            )
            seconds["multiplying"] = time.perf_counter() - begin
        elif options.executor is not None:
            from lorafast._similarity.workers import products_apart

            begin = time.perf_counter()
            matrix, tables = products_apart(found, positions, summed_in, options, report)
            seconds["multiplying"] = time.perf_counter() - begin
        else:
            whole, modules, _, (reading, multiplying), unsaved = found.core.products(
                positions,
                precision=summed_in,
                per_module=options.per_module,
                memory=options.memory,
                cache=None if options.cache is None else Path(expand(options.cache)),
                threads=options.threads,
                progress=report,
            )
            seconds |= {"reading": reading, "multiplying": multiplying}
            if unsaved is not None:
                warnings.warn(
                    f"the cache could not be written, and this run is not kept: {unsaved}",
                    stacklevel=2,
                )
            count = len(found.names)
            matrix = _square(whole, count)
            tables = [_square(table, count) for table in modules]
    own = tables if options.per_module else None
    similar = _similarity(
        found,
        groups,
        matrix,
        own,
        metric=options.metric,
        precision=summed_in,
        ignored=ignored,
    )
    return replace(similar, seconds=seconds)


def _checked(options: SimilarityOptions) -> int | None:
    """The bytes of the device's memory, once the options are found to be sound.

    Raises:
        ValueError: one is outside its domain.
    """
    from lorafast._io.device_names import parse_memory
    from lorafast._io.executors import check_executor_on

    check_choices(options)
    if options.memory < 1:
        raise ValueError("memory must be a positive number of bytes")
    check_executor_on(options.executor, options.device)
    if options.executor is not None and options.cache is not None:
        raise ValueError("cache keeps what this process computes; leave it out with an executor")
    return parse_memory(options.device_memory, options.device)


def _comparable(groups: Mapping[str, Sequence[int]], found: Collected) -> dict[str, list[int]]:
    """The groups, each cut into adapters whose modules are known to be one model's."""
    parts: dict[str, list[int]] = {}
    for base, members in groups.items():
        families: dict[int, list[int]] = {}
        for at in members:
            families.setdefault(found.members[at]["family"], []).append(at)
        for number, family in enumerate(families.values(), 1):
            parts[base if number == 1 else f"{base}, other modules {number}"] = family
    return parts


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


def _bases(found: Collected, members: Sequence[int]) -> dict[str, int]:
    """The bases that some adapters name, each with how many of them do, the most common first."""
    named = (found.members[at]["base"] or "no base named" for at in members)
    return dict(Counter(named).most_common())


def _with_all_bases(found: Collected, groups: Mapping[str, Sequence[int]]) -> dict[str, list[int]]:
    """Groups of one shape under the names of all bases in each."""
    named = [(list(_bases(found, members)), label) for label, members in groups.items()]
    labels = [_listed(bases) if len(bases) > 1 else label for bases, label in named]
    return dict(zip(numbered(labels), map(list, groups.values()), strict=True))


def _ignored_bases(found: Collected, groups: Mapping[str, Sequence[int]]) -> list[str]:
    """What to know where adapters of several bases are compared as of one."""
    notes = []
    for members in groups.values():
        bases = _bases(found, members)
        if len(bases) > 1:
            counted = [f"{base} ({count:,})" for base, count in bases.items()]
            notes.append(
                f"{plural(len(members), 'adapter')} of {len(bases)} bases are compared as of one: "
                f"{_listed(counted)}"
            )
    return notes


def _similarity(
    found: Collected,
    groups: dict[str, list[int]],
    matrix: Matrix,
    modules: list[Matrix] | None,
    *,
    metric: Metric,
    precision: str,
    ignored: Sequence[str],
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
        notes=[*ignored, *_notes(found, groups, norms, presence)],
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
    notes = apart(found, groups.values())
    lacking = []
    for members in groups.values():
        wanted = presence[list(members)].any(axis=0).sum()
        lacking += [found.names[at] for at in members if presence[at].sum() < wanted]
    if lacking:
        verb = agree(len(lacking), "lacks", "lack")
        notes.append(
            f"{_some(lacking)} of {len(found.names)} {verb} modules that others have; what is not "
            "shared counts as zero (`shared` has the numbers)"
        )
    left_out = [at for at, member in enumerate(found.members) if member["left_out"]]
    if left_out:
        example = ", ".join(found.members[left_out[0]]["left_out"])
        notes.append(
            f"{_some([found.names[at] for at in left_out])} "
            f"{agree(len(left_out), 'does', 'do')} more than add low-rank updates, "
            f"which is no part of the figures ({found.names[left_out[0]]}: {example})"
        )
    zero = [name for name, norm in zip(found.names, norms, strict=True) if norm == 0]
    if zero:
        verb = agree(len(zero), "has", "have")
        notes.append(f"{_some(zero)} {verb} a low-rank update of zero and no cosine")
    odd = [name for name, norm in zip(found.names, norms, strict=True) if not math.isfinite(norm)]
    if odd:
        verbs = agree(len(odd), "holds", "hold"), agree(len(odd), "has", "have")
        notes.append(f"{_some(odd)} {verbs[0]} NaN or infinity and {verbs[1]} no figures")
    return notes


def _listed(names: Sequence[str]) -> str:
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return ", ".join(names[:3]) + more


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(names[:3])
    more = ", …" if len(names) > 3 else ""
    return f"{plural(len(names), 'adapter')} ({shown}{more})"
