"""Analysis and comparison of adapters: `lorafast.analyze` and `lorafast.compare`."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from lorafast import _core
from lorafast._analysis.findings import findings_of_adapter, findings_of_comparison
from lorafast._analysis.names import names_of
from lorafast._analysis.options import AnalysisOptions, CompareOptions
from lorafast._analysis.records import (
    METRICS,
    PAIR_MATRICES,
    EntryStatistics,
    Histogram,
    ModuleAnalysis,
    ModuleComparison,
    PairComparison,
    TensorStatistics,
    not_compared,
)
from lorafast._analysis.results import AdapterAnalysis, Comparison, places_of
from lorafast._io.changes import unchanged
from lorafast._io.limits import check_threads
from lorafast._io.sources import (
    ADAPTER_PATTERNS,
    BASE_PATTERNS,
    core_source,
    locate,
    require_readers,
)
from lorafast._options import pick
from lorafast._types import HasPaths

if TYPE_CHECKING:
    from lorafast._types import AdapterFormat, Matrix, Progress, Source

#: The percentiles of every tensor.
PERCENTILES = (0.1, 1.0, 5.0, 25.0, 50.0, 75.0, 95.0, 99.0, 99.9)
#: More bins than anyone can draw; each tensor has two histograms.
MAX_BINS = 65_536
#: Fields that statistics have, and modules beside their metrics, under the core's own names.
STATISTICS = (
    *("count", "non_finite", "mean", "std", "min", "max", "l1_norm", "l2_norm", "max_norm"),
    *("zeros", "zero_share", "skewness", "kurtosis"),
)
FIELDS = (
    *("path", "kind", "block", "layer", "rank", "alpha", "scaling", "a_name", "b_name"),
    *("singular_values", "zero_cause", "rescaled", "made_of_weight"),
)


def analyze(
    adapter: Source,
    *,
    base: Source | None = None,
    histogram_bins: int = 50,
    entries: bool = False,
    alpha: float | None = None,
    scale: float | None = None,
    format: AdapterFormat | None = None,
    threads: int | None = None,
    progress: Progress = False,
) -> AdapterAnalysis:
    """Measures an adapter: every tensor's statistics, and every update's spectrum.

    Figures of modules are those of ΔW = s·B·A, which is never formed; they are the same whatever
    the number of threads and whatever factors the update is written in. An adapter that cannot be
    merged (DoRA, saved modules, convolutions) can still be analyzed.

    Args:
        adapter: a directory as PEFT saves it, a weights file in one, or a hub id.
        base: the model that the adapter was trained on, for ‖ΔW‖/‖W₀‖; a directory, a
            `.safetensors` file or a hub id.
        histogram_bins: bins of every histogram, from 1 to 65536.
        entries: also look at the entries of every ΔW; takes out × in × rank operations a module.
        alpha: of weights whose `adapter_config.json` is not there: each module's scale is this over
            its rank. Without it and `scale`, what depends on the scale (norms, singular values) is
            NaN, and a finding says so.
        scale: likewise, the scale itself.
        format: the adapter's format, where its files do not tell it; `None` tells it by them.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.

    Returns:
        The analysis; its findings are what to look at first.

    Raises:
        FileNotFoundError: the adapter or the base is not there.
        ValueError: an argument is outside its domain.
        AdapterError: the adapter is broken, or (UnsupportedAdapterError) is no LoRA.
        PlanError: the base has nothing for one of the adapter's modules.
        MissingDependencyError: the weights are a pickle and torch is not installed.
    """
    options = pick(AnalysisOptions, locals())
    return analyze_named(adapter, names_of([adapter])[0], options)


def analyze_named(adapter: Source, name: str, options: AnalysisOptions) -> AdapterAnalysis:
    """`analyze` under a given name."""
    from lorafast._io.progress import callback

    if not 1 <= options.histogram_bins <= MAX_BINS:
        raise ValueError(
            f"histogram_bins must be from 1 to {MAX_BINS}, not {options.histogram_bins}"
        )
    for name_of, value in (("alpha", options.alpha), ("scale", options.scale)):
        if value is not None and not math.isfinite(value):
            raise ValueError(f"{name_of} must be a finite number, not {value}")
    if options.alpha is not None and options.scale is not None:
        raise ValueError("alpha and scale say the same; give one of them")
    check_threads(options.threads)
    require_readers(adapter, options.base)
    base_path = None if options.base is None else locate(options.base, BASE_PATTERNS)
    source = core_source(locate(adapter, ADAPTER_PATTERNS), options.format)
    with callback(options.progress, label="analyzing") as report:
        found = _core.analyze_adapter(
            source,
            base=base_path,
            percentiles=PERCENTILES,
            bins=options.histogram_bins,
            entries=options.entries,
            threads=options.threads,
            progress=report,
            alpha=options.alpha,
            scale=options.scale,
        )
    return _adapter_analysis(found, name)


def compare(
    adapters: Sequence[Source] | HasPaths,
    *,
    names: Sequence[str] | None = None,
    modules: bool | None = None,
    threads: int | None = None,
    progress: Progress = False,
) -> Comparison:
    """Compares adapters of one model, of any ranks and scales, and analyses each of them.

    Modules are brought together whatever each adapter calls them, as in `lorafast.similarity`.
    Where nothing tells which modules of two adapters are the same, their cosine is NaN and a
    finding says why.

    Args:
        adapters: two or more, each as for `analyze`; or a fleet.
        names: a distinct name for each; their directories' names if `None`, with as many of the
            parents' before them as tell them apart, or those that they have in the fleet.
        modules: also compare the updates of each module, pair by pair; up to ten adapters if
            `None`. N adapters have N²/2 pairs, each with subspaces, angles and signs of every
            module; the cosines of the whole updates are there in any case.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal or in a notebook, or a callable that is given
            (done, total) bytes.

    Returns:
        The comparison. Modules that only some of the adapters have are in `modules` and `only_in`.

    Raises:
        FileNotFoundError: an adapter is not there.
        ValueError: there are fewer than two adapters, or names that are not distinct.
        AdapterError: an adapter is broken, or (UnsupportedAdapterError) is no LoRA.
        MissingDependencyError: some weights are a pickle and torch is not installed.
    """
    options = pick(CompareOptions, locals())
    if isinstance(adapters, str | os.PathLike):
        raise ValueError("adapters must be a sequence of paths, not one path")
    if isinstance(adapters, HasPaths):
        sources: list[Source] = list(adapters.paths)
        names = adapters.names if names is None else names
    else:
        sources = list(adapters)
    if len(sources) < 2:
        raise ValueError(f"a comparison needs two adapters or more, not {len(sources)}")
    chosen = names_of(sources) if names is None else list(names)
    if len(chosen) != len(sources):
        raise ValueError(f"{len(chosen)} names were given for {len(sources)} adapters")
    if len(set(chosen)) != len(chosen):
        raise ValueError(f"the adapters' names are not distinct: {', '.join(chosen)}")
    require_readers(*sources)
    with unchanged([locate(source, ADAPTER_PATTERNS) for source in sources]):
        analyses = [
            analyze_named(source, name, options.of_analysis())
            for source, name in zip(sources, chosen, strict=True)
        ]
        return compare_analyzed(sources, analyses, options)


def compare_analyzed(
    adapters: Sequence[Source], analyses: Sequence[AdapterAnalysis], options: CompareOptions
) -> Comparison:
    """Compares adapters whose analyses, under distinct names, there are already."""
    from lorafast._io.progress import callback

    names = [analysis.name for analysis in analyses]
    sources = [core_source(locate(adapter, ADAPTER_PATTERNS)) for adapter in adapters]
    with callback(options.progress, label="comparing") as report:
        has_pairs = options.compares_modules(len(sources))
        found = _core.compare_adapters(
            sources, modules=has_pairs, threads=options.threads, progress=report
        )
    return _comparison(found, names, analyses, has_pairs)


def _adapter_analysis(found: Mapping[str, Any], name: str) -> AdapterAnalysis:
    tensors = {item["name"]: _statistics(item) for item in found["tensors"]}
    modules = {item["path"]: _module(item) for item in found["modules"]}
    weights = _statistics(found["weights"])
    return AdapterAnalysis(
        name=name,
        path=found["path"],
        config=found["config"],
        summary=_summary(found, len(tensors), weights),
        findings=findings_of_adapter(modules, tensors, found["features"], found["notes"]),
        weights=weights,
        tensors=tensors,
        modules=modules,
    )


def _statistics(item: Mapping[str, Any]) -> TensorStatistics:
    shape = item.get("shape")
    return TensorStatistics(
        shape=None if shape is None else tuple(shape),
        dtype=item.get("dtype"),
        percentiles=dict(zip(PERCENTILES, item["percentiles"], strict=True)),
        histogram=Histogram(**item["histogram"]),
        log_histogram=Histogram(**item["log_histogram"]),
        **{key: item[key] for key in STATISTICS},
    )


def _module(item: Mapping[str, Any]) -> ModuleAnalysis:
    base, entries = item["base"], item["entries"]
    rows, columns = item["shape"]
    norm = item["frobenius_norm"]
    if base is None:
        relative = None
    else:
        relative = norm / base["norm"] if base["norm"] else math.inf if norm else math.nan
    return ModuleAnalysis(
        shape=(rows, columns),
        relative_norm=relative,
        base_norm=None if base is None else base["norm"],
        base_tensor=None if base is None else base["tensor"],
        change_norm=None if base is None else base["change"],
        entries=None
        if entries is None
        else EntryStatistics(**{**entries, "histogram": Histogram(**entries["histogram"])}),
        **{key: item[key] for key in (*FIELDS, *METRICS)},
    )


def _summary(found: Mapping[str, Any], tensors: int, weights: TensorStatistics) -> dict[str, Any]:
    modules = dict(found["summary"])
    return {
        "base": found["base"],
        "modules": modules.pop("modules"),
        "tensors": tensors,
        "total_parameters": weights.count,
        "total_bytes": found["total_bytes"],
        "dtypes": sorted({item["dtype"] for item in found["tensors"]}),
        **modules,
        "features": list(found["features"]),
    }


def _comparison(
    found: Mapping[str, Any],
    names: list[str],
    analyses: Sequence[AdapterAnalysis],
    has_pairs: bool,
) -> Comparison:
    import numpy as np

    count = len(names)
    places = places_of(analyses)
    modules = {
        item["path"]: _module_comparison(item, count, places.get(item["path"]), has_pairs)
        for item in found["modules"]
    }
    only_in: dict[str, list[str]] = {
        name: [
            path
            for path, module in modules.items()
            if module.present[position] and not all(module.present)
        ]
        for position, name in enumerate(names)
    }
    return Comparison(
        names=names,
        analyses=list(analyses),
        cosine=np.array(found["cosine"], dtype=np.float64).reshape(count, count),
        modules=modules,
        only_in=only_in,
        findings=findings_of_comparison(names, found["cosine"], only_in, found["notes"]),
        modules_compared=has_pairs,
    )


def _module_comparison(
    item: Mapping[str, Any], count: int, place: ModuleAnalysis | None, has_pairs: bool
) -> ModuleComparison:
    pairs = [
        PairComparison(
            sizes=(pair["sizes"][0], pair["sizes"][1]),
            **{key: pair[key] for key in pair if key not in ("sizes", "inner_product")},
        )
        for pair in item["pairs"]
    ]
    norms: list[float | None] = item["norms"]

    def symmetric(value: Callable[[PairComparison], float], *, itself: bool = True) -> Matrix:
        import numpy as np

        matrix = np.full((count, count), np.nan)
        for position, norm in enumerate(norms):
            if itself and norm is not None and 0 < norm < math.inf:
                matrix[position, position] = 1.0
        for pair in pairs:
            matrix[pair.first, pair.second] = matrix[pair.second, pair.first] = value(pair)
        return matrix

    def last(grid: list[list[float]]) -> float:
        return grid[-1][-1] if grid and grid[-1] else math.nan

    rows, columns = item["shape"]
    if has_pairs:
        matrices = {
            "cosine": symmetric(lambda pair: pair.cosine),
            "sign_agreement": symmetric(lambda pair: pair.sign_agreement),
            "subspace": symmetric(lambda pair: last(pair.output_phi)),
            "subspace_expected": symmetric(lambda pair: last(pair.output_expected), itself=False),
        }
    else:
        matrices = dict.fromkeys(PAIR_MATRICES, not_compared(count))
    return ModuleComparison(
        path=item["path"],
        shape=(rows, columns),
        present=[rank is not None for rank in item["ranks"]],
        norms=norms,
        ranks=item["ranks"],
        pairs=pairs,
        block=None if place is None else place.block,
        layer=item["path"] if place is None else place.layer,
        **matrices,
    )
