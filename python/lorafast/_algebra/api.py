"""Adapters from adapters and models: `lorafast.combine`, `lorafast.resize`, `lorafast.extract`."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from lorafast import _core
from lorafast._algebra.report import (
    AlgebraReport,
    BakeReport,
    BudgetUse,
    CombineReport,
    ExtractReport,
    ModuleExtraction,
    ModuleResult,
    ResizeReport,
)
from lorafast._io.executors import check_executor
from lorafast._io.hub import require_directory
from lorafast._io.sources import (
    ADAPTER_PATTERNS,
    BASE_PATTERNS,
    core_source,
    locate,
    require_readers,
)
from lorafast._results import RecordDict
from lorafast._seeds import checked_seed
from lorafast._weights import plain_weight

if TYPE_CHECKING:
    from typing import Literal

    from lorafast._core import AlgebraResult
    from lorafast._types import CombineMethod, ExecutorChoice, Progress, Source, Weight

    Report = TypeVar("Report", bound=AlgebraReport)


def combine(
    adapters: Sequence[Source],
    output: str | os.PathLike[str],
    *,
    method: CombineMethod = "linear",
    weights: Sequence[Weight] | None = None,
    rank: int | str | None = None,
    options: Mapping[str, Any] | None = None,
    seed: int = 0,
    base: Source | None = None,
    compat: str | None = None,
    to: str = "peft",
    dtype: str = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    sync: bool = True,
    progress: Progress = False,
) -> CombineReport:
    """Writes one adapter that stands for a combination of several.

    Updates are combined as what they are, ΔW = s·B·A of each module, and never factor by factor:
    ranks, scales, formats and sets of modules may differ, and weights may be negative. A module
    that an adapter lacks counts as zero there.

    Args:
        adapters: directories, files or hub ids, in any format.
        output: what to write: a directory for "peft" and "mlx", a file for other formats.
        method: how each module's updates Δᵢ become one. Sums, exact in the factors: "linear" is
            Σwᵢ·Δᵢ, "normalized" divides that by Σw, "centroid" is the mean; "slerp" goes from the
            first to the second on the sphere (option "t", ½), "nuslerp" does with
            t = w₂/(w₁+w₂); "karcher" is the Riemannian mean of the directions ("max_iter",
            "tol"), "multislerp" one step towards it ("eps"); "model_stock" shortens the mean by
            how much the updates agree (arXiv:2403.19522); "projection" is the first without its
            part in the span of the others. "svd" is "linear", cut to `rank`, the largest of the
            inputs' in each module if that is `None`.
            Of singular vectors, in factored form: "knots" (arXiv:2410.19735) merges coordinates
            in the left singular vectors of [Δ₁ … Δ_N], "core_space" (arXiv:2509.17786) in bases
            of the stored factors, on whose gauge it depends ("merge": "ties", or any sum or
            method below, with its options); "tsv_m" (arXiv:2412.00081) makes all singular vectors
            orthonormal ("k", the triplets of each; directions that adapters share are an error);
            "iso_c" (arXiv:2502.04959) gives the sum equal singular values, up to its numerical
            rank.
            Of each element ("density", the share kept, 1): "ties" (arXiv:2306.01708),
            "dare_linear" and "dare_ties" (arXiv:2311.03099), "della" and "della_linear"
            (arXiv:2406.11617; "epsilon"), "breadcrumbs" and "breadcrumbs_ties"
            (arXiv:2312.06795; "gamma"), "magnitude_prune", "sce" (arXiv:2408.07990;
            "select_topk"). "normalize" is `True` where signs are elected. What they make has full
            rank, so that `rank` is needed, and the report's errors are those of the truncation;
            `merge` with the same strategy loses nothing. PEFT's names are understood: "cat" is
            "linear", and "ties_svd", "dare_linear_svd", "dare_ties_svd" and "magnitude_prune_svd"
            are the methods without "_svd", cut to `rank` as "svd" is.
        weights: a weight for each adapter: a number, or a mapping from patterns of module names
            ("*.q_proj") to numbers, of which the first that fits counts and 1 where none does.
            1 for all if `None`.
        rank: `None` writes the factors next to one another, which is exact, with the sum of the
            ranks; else a rule as for `resize`. What adapters make of whole weights is of full rank
            in general, and `None` then is the least rank that loses no more than rounding does, and
            an error where that is above 512.
        options: what the method takes, by name; all take "lambda", which multiplies the result.
        seed: of random masks ("dare_linear", "dare_ties", "della", "della_linear"), which depend
            on it, the module, the adapter's place in the list, and the element alone.
        base: the model that was trained: for what adapters make of whole weights (DoRA, IA³, OFT,
            BOFT and the like: W' - W of each is what is combined), for factors that began with a
            part of a weight, for parameters that were trained whole and trained rows (the result is
            the base's and the combined differences to it), and where names depend on it.
        compat: "kohya" chooses ranks as its older scripts do; "peft" gives what PEFT's
            `add_weighted_adapter` makes of the factors, with cross terms between the adapters:
            "linear", "ties", "dare_linear", "dare_ties" and "magnitude_prune" ("density"), beside
            "cat", "svd" and the others that end with "_svd", which have none. Random masks are
            this function's own, by `seed`.
        to: the format to write.
        dtype: the type of the factors; "auto" is the widest of the inputs'.
        overwrite: replace an adapter that is there.
        threads: worker threads; one for each core if `None`.
        dry_run: compute everything, with its errors, and write nothing.
        sync: wait until the files are on the disk.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.

    Returns:
        The report, with the rank and the error of each module.

    Raises:
        FileNotFoundError: an adapter is not there.
        AdapterError: an adapter is broken, or does not fit the others.
        UnsupportedAdapterError: an adapter is of another model, or holds what cannot be summed.
        OutputError: there is something at the output.
        ValueError: an option or a format is not known.
    """
    asked = {
        "method": method,
        "weights": None if weights is None else [plain_weight(weight) for weight in weights],
        "rank": rank,
        "options": dict(options or {}),
        "seed": checked_seed(seed),
        "compat": compat,
        "write": _writing(to, dtype, overwrite, threads, dry_run=dry_run, sync=sync),
    }
    if isinstance(adapters, (str, os.PathLike)):
        raise TypeError("adapters is a list of adapters, and not one of them")
    sources = list(adapters)
    require_readers(*sources, base)
    located = [locate(source, ADAPTER_PATTERNS) for source in sources]
    local = None if base is None else locate(base, BASE_PATTERNS)
    target = require_directory(output)
    from lorafast._io.progress import callback

    with callback(progress, label="combining") as report:
        found = _core.combine_adapters(
            [core_source(source) for source in located],
            target,
            base=local,
            options=_text(asked),
            progress=report,
        )
    return _report(CombineReport, found, located, target)


def resize(
    adapter: Source,
    output: str | os.PathLike[str],
    *,
    rank: int | str,
    max_rank: int | None = None,
    relative_to: Literal["absolute", "base"] = "absolute",
    base: Source | None = None,
    compat: str | None = None,
    to: str = "peft",
    dtype: str = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    sync: bool = True,
    progress: Progress = False,
) -> ResizeReport:
    """Writes an adapter with other ranks: each module's best approximation of its rank.

    Args:
        adapter: a directory, a file or a hub id, in any format.
        output: what to write: a directory for "peft" and "mlx", a file for other formats.
        rank: how many singular values σ of each ΔW are kept, descending: a number (more than
            there are adds zeros); "auto" for those that the rounding of the stored factors does
            not explain; "energy:p" for the least number with Σσ² kept of p·Σσ²; "error:e" for the
            least with ‖ΔW - kept‖ ≤ e·‖ΔW‖; "sv_ratio:q" for σ > σ₁/q; "sv_fro:p" for norms
            (energy p²), "sv_cumulative:p" for Σσ; or, over all modules together,
            "budget:ranks=N", "budget:parameters=N", "budget:bytes=20MB".
        max_rank: no module gets more than this, as servers ask.
        relative_to: what a budget weighs modules by: "absolute", their error itself, or "base",
            that over the norm of the base's weight.
        base: the model that was trained, for relative budgets and where names depend on it.
        compat: "kohya" chooses ranks as its older scripts do, one more than the rules say.
        to: the format to write.
        dtype: the type of the factors; "auto" keeps it.
        overwrite: replace an adapter that is there.
        threads: worker threads; one for each core if `None`.
        dry_run: compute everything, with its errors, and write nothing.
        sync: wait until the files are on the disk.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.

    Returns:
        The report, with the rank, the error and the singular values of each module.

    Raises:
        FileNotFoundError: the adapter is not there.
        AdapterError: the adapter is broken.
        UnsupportedAdapterError: the adapter holds what has no rank.
        OutputError: there is something at the output.
        ValueError: an option or a format is not known.
    """
    asked = {
        "rank": rank,
        "max_rank": max_rank,
        "relative_to": relative_to,
        "compat": compat,
        "write": _writing(to, dtype, overwrite, threads, dry_run=dry_run, sync=sync),
    }
    require_readers(adapter, base)
    located = locate(adapter, ADAPTER_PATTERNS)
    local = None if base is None else locate(base, BASE_PATTERNS)
    target = require_directory(output)
    from lorafast._io.progress import callback

    with callback(progress, label="resizing") as report:
        found = _core.resize_adapter(
            core_source(located), target, base=local, options=_text(asked), progress=report
        )
    return _report(ResizeReport, found, [located], target)


def extract(
    tuned: Source,
    base: Source,
    output: str | os.PathLike[str],
    *,
    rank: int | str = "auto",
    max_rank: int | None = None,
    seed: int = 0,
    embeddings: Literal["save", "factors", "skip"] = "save",
    strict: bool = False,
    to: str = "peft",
    dtype: str = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    sync: bool = True,
    progress: Progress = False,
    executor: ExecutorChoice | None = None,
) -> ExtractReport:
    """Writes an adapter that makes the tuned model of its base, as far as its ranks allow.

    Each layer's difference D of the weights is cut to a rank by a randomized singular value
    decomposition (arXiv:0909.4061), module by module: memory holds one module, whatever the size of
    the model. Both checkpoints may be sharded, of any types, and quantized. The report has for each
    module the error, a bound on how far it is from the best of the same rank, and the floor below
    which nothing can be told from rounding. What is finished when a call is interrupted lies in a
    directory `.NAME.extract` beside the output, and the same call goes on from there.

    Args:
        tuned: the model after training: a directory, a file or a hub id.
        base: the model before it.
        output: what to write: a directory for "peft" and "mlx", a file for other formats.
        rank: how many singular values σ of each D are kept, descending: "auto" for those above
            what the rounding of both checkpoints explains; a number; "energy:p" for the least
            number with Σσ² kept of p·‖D‖², which fits rounding, too, where updates are small;
            "error:e" for the least with ‖D - kept‖ ≤ e·‖D‖; "sv_ratio:q" for σ > σ₁/q; "sv_fro:p"
            for norms (energy p²); or, over all modules together, "budget:ranks=N",
            "budget:parameters=N", "budget:bytes=20MB".
        max_rank: no module gets more than this; without it rules stop at 512, and budgets at 128.
        seed: of the random vectors. The bytes depend on it, and not on threads.
        embeddings: "save" writes embeddings and language heads that differ whole
            (`modules_to_save`) where the format holds that, "factors" extracts them like layers, as
            servers ask, "skip" leaves them out. Tables that grew are written whole.
        strict: an error, with the names, where norms, biases or other parameters differ that no
            factors can say. Otherwise they are written whole where the format holds that, and else
            listed in `lost`.
        to: the format to write.
        dtype: the type of the factors; "auto" is the widest of both checkpoints'.
        overwrite: replace an adapter that is there.
        threads: worker threads; one for each core if `None`.
        dry_run: compute everything, with its errors, and write nothing.
        sync: wait until the files are on the disk.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.
        executor: who looks at the modules: an executor of `concurrent.futures`, "ray", "processes"
            or "processes:N", as for `lorafast.merge`; each task has `threads` threads, 1 if
            missing. The bytes are the same. What tasks finish lies in `.NAME.extract-parts` beside
            the output until the call takes it.

    Returns:
        The report, with ranks, errors, floors and certificates of all modules.

    Raises:
        FileNotFoundError: a checkpoint is not there.
        CheckpointError: a checkpoint is broken, or has values that are not finite.
        PlanError: the two have other tensors or shapes: they are not two states of one model.
        UnsupportedAdapterError: the format cannot hold what differs (`strict`).
        OutputError: there is something at the output.
        ValueError: an option or a format is not known, both are the same files, or nothing differs.
    """
    asked = {
        "rank": rank,
        "max_rank": max_rank,
        "seed": checked_seed(seed),
        "embeddings": embeddings,
        "strict": strict,
        "write": _writing(to, dtype, overwrite, threads, dry_run=dry_run, sync=sync),
    }
    check_executor(executor)
    require_readers(tuned, base)
    inputs = (locate(tuned, BASE_PATTERNS), locate(base, BASE_PATTERNS))
    target = require_directory(output)
    from lorafast._io.progress import callback

    with callback(progress, label="extracting") as report:
        if executor is None:
            found = _core.extract_adapter(
                inputs[0], inputs[1], target, options=_text(asked), parts=(), progress=report
            )
        else:
            from lorafast._algebra.workers import extract_apart

            found = extract_apart(
                inputs, target, asked, executor=executor, threads=threads, progress=report
            )
    extraction = RecordDict(
        {name: ModuleExtraction(**record) for name, record in found["extraction"].items()}
    )
    return _report(
        ExtractReport,
        found,
        inputs,
        target,
        extraction=extraction,
        saved=tuple(found["saved"]),
        unchanged=found["unchanged"],
        resumed=found["resumed"],
    )


def bake(
    adapter: Source,
    output: str | os.PathLike[str],
    *,
    scale: Literal["keep", "fold"] = "keep",
    alpha: float | None = None,
    rslora: bool | None = None,
    pad_to: int | None = None,
    gauge: Literal["keep", "balanced", "orthonormal"] = "keep",
    plain: bool = False,
    rank: int | str | None = None,
    base: Source | None = None,
    to: str = "peft",
    dtype: str = "auto",
    overwrite: bool = False,
    threads: int | None = None,
    dry_run: bool = False,
    sync: bool = True,
    progress: Progress = False,
) -> BakeReport:
    """Writes an adapter's updates in other factors, for whoever reads them.

    ΔW stays what it is: whatever is multiplied by a power of two, padded or relabeled is exact,
    and what is rounded counts in the report.

    Args:
        adapter: a directory, a file or a hub id, in any format.
        output: what to write: a directory for "peft" and "mlx", a file for other formats.
        scale: "fold" multiplies the factors by s, so that alpha is the rank and every reader finds
            a scale of 1; "keep" leaves it.
        alpha: the alpha that is written for all modules; the factors change so that ΔW does not.
        rslora: write a scale of α/√r (`True`) or of α/r (`False`), with an alpha that leaves the
            factors as they are; as the adapter has it if `None`.
        pad_to: the rank that all modules are brought to, with zeros.
        gauge: "balanced" gives each column of B and its row of A one length but for a power of
            two; "orthonormal" writes U√Σ and √ΣVᵀ, σ descending.
        plain: make plain factors of what needs `base`: of twice the rank, of those that began with
            a part of the base's weight (PiSSA, OLoRA, KaSA); and of what an adapter makes of a
            weight as a whole (DoRA, IA³, OFT, BOFT and the like), W' - W, cut to `rank`.
        rank: of what is made of whole weights, which in general is of full rank: a number, or a
            rule as for `resize` ("error:0.1", "energy:0.9", "sv_ratio:20", "sv_fro:0.9"); `None`
            is the least rank that loses no more than rounding to the type of the factors does
            (1e-6 of W' - W; of float16 1e-4, of bfloat16 1e-3), and an error where that is above
            512. The report has each module's error.
        base: the model that was trained.
        to: the format to write.
        dtype: the type of the factors; "auto" keeps it.
        overwrite: replace an adapter that is there.
        threads: worker threads; one for each core if `None`.
        dry_run: compute everything, with its errors, and write nothing.
        sync: wait until the files are on the disk.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.

    Returns:
        The report, with the rank and the error of each module.

    Raises:
        FileNotFoundError: the adapter is not there.
        AdapterError: the adapter is broken.
        UnsupportedAdapterError: the adapter holds what has no other factors.
        OutputError: there is something at the output.
        ValueError: an option or a format is not known, or two of them contradict each other.
    """
    asked = {
        "scale": scale,
        "alpha": alpha,
        "rslora": rslora,
        "pad_to": pad_to,
        "gauge": gauge,
        "plain": plain,
        "rank": rank,
        "write": _writing(to, dtype, overwrite, threads, dry_run=dry_run, sync=sync),
    }
    require_readers(adapter, base)
    located = locate(adapter, ADAPTER_PATTERNS)
    local = None if base is None else locate(base, BASE_PATTERNS)
    target = require_directory(output)
    from lorafast._io.progress import callback

    with callback(progress, label="baking") as report:
        found = _core.bake_adapter(
            core_source(located), target, base=local, options=_text(asked), progress=report
        )
    return _report(BakeReport, found, [located], target)


def _text(asked: Mapping[str, object]) -> str:
    """What is asked, as JSON."""
    try:
        return json.dumps(asked, allow_nan=False)
    except ValueError as error:
        raise ValueError("weights and options are finite numbers, and one is not") from error


def _writing(
    to: str, dtype: str, overwrite: bool, threads: int | None, *, dry_run: bool, sync: bool
) -> dict[str, object]:
    return {
        "to": to,
        "dtype": dtype,
        "overwrite": overwrite,
        "threads": threads,
        "dry_run": dry_run,
        "unsynced": not sync,
    }


def _report(
    kind: type[Report],
    found: AlgebraResult,
    inputs: Sequence[str | os.PathLike[str]],
    output: str | os.PathLike[str],
    **more: Any,
) -> Report:
    modules = RecordDict()
    for name, record in found["modules"].items():
        coefficients, expert_ranks = record["coefficients"], record["expert_ranks"]
        modules[name] = ModuleResult(
            shape=(record["shape"][0], record["shape"][1]),
            source_rank=record["source_rank"],
            rank=record["rank"],
            kept=record["kept"],
            error=record["error"],
            norm=record["norm"],
            singular_values=tuple(record["singular_values"]),
            coefficients=None if coefficients is None else tuple(coefficients),
            expert_ranks=None if expert_ranks is None else tuple(expert_ranks),
        )
    budget = found["budget"]
    return kind(
        inputs=tuple(os.fspath(each) for each in inputs),
        output=os.fspath(output),
        target_format=found["target_format"],
        dtype=found["dtype"],
        modules=modules,
        error=found["error"],
        budget=None if budget is None else BudgetUse(**budget),
        bytes=found["bytes"],
        lost=tuple(found["lost"]),
        notes=tuple(found["notes"]),
        files=tuple(found["files"]),
        **more,
    )
