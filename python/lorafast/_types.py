"""Type aliases of arguments and values that several layers share."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

if TYPE_CHECKING:
    from concurrent.futures import Future
    from pathlib import Path

    import numpy
    from numpy.typing import NDArray

    #: A square or rectangular array of float64.
    Matrix = NDArray[numpy.float64]

#: A path, or where one is taken a hub id.
Source = str | os.PathLike[str]


@runtime_checkable
class HasPaths(Protocol):
    """What is needed of a fleet: where its adapters lie and what they are called."""

    @property
    def paths(self) -> list[Path]: ...

    @property
    def names(self) -> list[str]: ...


#: `object_store`'s keys with their values, or from the beginnings of URLs to such.
StorageOptions = Mapping[str, str] | Mapping[str, Mapping[str, str]]
#: What gives `object_store`'s keys, and the second (since 1970) at which they expire, if they do.
CredentialProvider = Callable[[], tuple[Mapping[str, str], int | float | None]]

#: `True` for a bar on a terminal or in a notebook, elsewhere a line every ten seconds; or what is
#: called with (done, total).
Progress = bool | Callable[[int, int], object]

#: The weight of an adapter: a number for all modules, or numbers by patterns of module names.
Weight = float | Mapping[str, float]


class Executor(Protocol):
    """What is needed of an executor of `concurrent.futures`, and of all that are like them."""

    def submit(
        self, function: Callable[..., Any], /, *arguments: Any, **keywords: Any
    ) -> Future[Any]: ...


#: Who does the work: an executor, or "ray", "processes" or "processes:N" by name.
ExecutorChoice = Executor | str
#: What is called with (done, total).
Report = Callable[[int, int], object]

#: Methods that make sums of updates, with coefficients that follow from their inner products.
SumMethod = Literal[
    "linear",
    "normalized",
    "centroid",
    "slerp",
    "nuslerp",
    "karcher",
    "multislerp",
    "model_stock",
    "projection",
]
#: Methods that look at the singular vectors of several updates.
JointMethod = Literal["knots", "tsv_m", "iso_c", "core_space"]
#: Methods that look at each element of several updates.
EntryMethod = Literal[
    "ties",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "breadcrumbs",
    "breadcrumbs_ties",
    "magnitude_prune",
    "sce",
]
#: The names that PEFT has for such methods.
MethodOfPeft = Literal[
    "cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd"
]
#: How adapters are combined into one.
CombineMethod = Literal[SumMethod, JointMethod, EntryMethod, MethodOfPeft]
#: How several adapters are merged into a base.
Strategy = Literal["sequential", "weighted", "average", SumMethod, EntryMethod, MethodOfPeft]
#: Whose results a merge gives where those differ from what was trained.
Compat = Literal["peft"]
#: How merged weights are computed.
MergePrecision = Literal["default", "exact"]
#: How factors of experts that are stored as one tensor lie on it.
ExpertLayout = Literal["auto", "straight", "transposed"]
#: Whose tokenizer the output of a merge has.
TokenizerChoice = Literal["auto", "base", "adapter"]

#: The formats of adapters that are read.
AdapterFormat = Literal[
    "peft",
    "kohya",
    "lycoris",
    "diffusers",
    "comfyui",
    "onetrainer",
    "xlabs",
    "bfl",
    "cloneofsimo",
    "mlx",
    "gguf",
    "torchtune",
    "tinker",
]

#: How much a scan finds.
Metrics = Literal["full", "headers", "moments", "spectra"]
#: The plots of an analysis.
AnalysisPlot = Literal["overview", "weights", "log_weights", "layers", "heatmap", "spectrum"]
#: The plots of a comparison.
ComparisonPlot = Literal["cosine", "modules", "distributions", "adapters"]
#: The tables of a comparison.
ComparisonTable = Literal["pairs", "modules"]

#: The tables of a fleet.
TableName = Literal["adapters", "modules", "findings"]
#: How much a finding matters.
Severity = Literal["critical", "warning", "note"]

#: What a similarity's matrix holds.
Metric = Literal["cosine", "inner_product"]
#: What products are summed in.
Precision = Literal["auto", "float64", "float32"]
#: The same once it is decided.
SumPrecision = Literal["float64", "float32"]
#: What the order of checkpoints follows.
By = Literal["update", "name", "given"]
#: How the distance of two clusters follows from their members', as SciPy's.
Method = Literal["average", "complete", "single", "weighted"]
