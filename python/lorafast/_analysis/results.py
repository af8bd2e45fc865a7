"""Results of analyses and comparisons: what was measured, and what it can be turned into."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafast._analysis.names import position_of
from lorafast._analysis.records import PAIR_MATRICES
from lorafast._io.plain import fields_of
from lorafast._results import FramedResult, RecordDict, RecordList, view

if TYPE_CHECKING:
    from collections.abc import Iterable

    import pandas
    import polars
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

    from lorafast._analysis.records import (
        Finding,
        ModuleAnalysis,
        ModuleComparison,
        TensorStatistics,
    )
    from lorafast._types import AnalysisPlot, ComparisonPlot, ComparisonTable, Matrix, Source


class _Measured(FramedResult):
    """What an analysis and a comparison can be turned into beside what every result can."""

    def to_markdown(self) -> str:
        """A report for a person: findings first, under 200 lines whatever the adapter."""
        text: str = view("markdown", self)(self)
        return text

    def to_html(self) -> str:
        """The report with its plots as one HTML document that loads nothing from elsewhere."""
        text: str = view("html", self)(self)
        return text


@dataclass(frozen=True, repr=False)
class AdapterAnalysis(_Measured):
    """What one adapter holds. Made by `lorafast.analyze`.

    Attributes:
        name: the adapter's name: its directory's.
        path: where it was read from.
        config: `adapter_config.json` as it stands.
        summary: the figures of the whole adapter: `modules`, `tensors`, `total_parameters`,
            `total_bytes`, `ranks`, `alphas`, `scalings`, `frobenius_norm` (√Σ‖ΔW‖²),
            `max_spectral_norm`, `median_spectral_norm`, `mean_effective_rank`, `dtypes`,
            `features` (what there is beside plain low-rank products), `base`.
        findings: what an expert would point at, the most severe first.
        weights: all stored weights taken together.
        tensors: statistics of each tensor by its name, in the order of the file.
        modules: each module's update by its path, in the order of the file.
    """

    _kind = "adapter_analysis"

    name: str
    path: str
    config: dict[str, Any]
    summary: dict[str, Any]
    findings: list[Finding]
    weights: TensorStatistics
    tensors: dict[str, TensorStatistics]
    modules: dict[str, ModuleAnalysis]

    def __post_init__(self) -> None:
        object.__setattr__(self, "findings", RecordList(self.findings))
        object.__setattr__(self, "tensors", RecordDict(self.tensors))
        object.__setattr__(self, "modules", RecordDict(self.modules))

    def plot(self, kind: AnalysisPlot = "overview", *, ax: Axes | None = None) -> Figure:
        """Draws one plot.

        Args:
            kind: what to draw:

                - "overview": distribution of the stored weights and of their magnitudes, mean and
                  standard deviation by layer, in four panels;
                - "weights": the distribution of the stored weights;
                - "log_weights": the distribution of their magnitudes;
                - "layers": mean and standard deviation of the stored factors by layer;
                - "heatmap": ‖ΔW‖ by block and layer;
                - "spectrum": singular values of the updates, and their cumulative energy.
            ax: matplotlib's axes to draw into. A plot of several panels takes their place in the
                figure. A new figure is made if `None`.

        Returns:
            A matplotlib Figure that belongs to no window, or the one of `ax`.

        Raises:
            ValueError: there is no such plot, or it does not fit into `ax`.
            MissingDependencyError: matplotlib is not installed.
        """
        figure: Figure = view("plot", self)(self, kind, ax)
        return figure


@dataclass(frozen=True, eq=False, repr=False)
class Comparison(_Measured):
    """What N adapters have in common. Made by `lorafast.compare`.

    Attributes:
        names: a distinct name for each adapter, in the order given.
        analyses: the analysis of each.
        cosine: N×N, of the whole updates: Σ⟨X, Y⟩ over the modules that both have, over the norms
            of the whole adapters; modules that only one has are zero in the other. NaN where
            nothing tells which modules of two adapters are the same.
        modules: each module of any adapter by its path in the first that has it.
        only_in: for each adapter's name, modules that it has and not all the others have.
        findings: what to know of the comparison itself.
        modules_compared: whether the updates of each module were compared, pair by pair.

    `to_dict` has each adapter's summary, findings and weights taken together, and none of what its
    own analysis has of tensors and modules.
    """

    _kind = "comparison"

    names: list[str]
    analyses: list[AdapterAnalysis]
    cosine: Matrix
    modules: dict[str, ModuleComparison]
    only_in: dict[str, list[str]]
    findings: list[Finding] = field(default_factory=list)
    modules_compared: bool = True

    def _plain(self) -> dict[str, Any]:
        kept = {"name", "path", "config", "summary", "findings", "weights"}
        pairs = set() if self.modules_compared else {"pairs", *PAIR_MATRICES}
        return {
            **fields_of(self, {"analyses", "modules"}),
            "analyses": [fields_of(own, set(vars(own)) - kept) for own in self.analyses],
            "modules": {path: fields_of(own, pairs) for path, own in self.modules.items()},
        }

    def position(self, adapter: Source) -> int:
        """Where an adapter stands in `names`, by its name or by its path.

        Raises:
            KeyError: it is none of those compared.
        """
        return position_of(adapter, self.names, [Path(own.path) for own in self.analyses])

    def __post_init__(self) -> None:
        object.__setattr__(self, "analyses", RecordList(self.analyses))
        object.__setattr__(self, "modules", RecordDict(self.modules))
        object.__setattr__(self, "only_in", RecordDict(self.only_in))
        object.__setattr__(self, "findings", RecordList(self.findings))

    def plot(self, kind: ComparisonPlot = "cosine", *, ax: Axes | None = None) -> Figure:
        """Draws one plot.

        Args:
            kind: what to draw:

                - "cosine": the cosine of the updates of each two adapters;
                - "modules": the cosine of the updates by block and layer, where modules were
                  compared;
                - "distributions": the distributions of the adapters' stored weights;
                - "adapters": number of parameters, mean, standard deviation and range of each.
            ax: matplotlib's axes to draw into. A plot of several panels takes their place in the
                figure. A new figure is made if `None`.

        Returns:
            A matplotlib Figure that belongs to no window, or the one of `ax`.

        Raises:
            ValueError: there is no such plot, what it shows was not computed, or it does not
                fit into `ax`.
            MissingDependencyError: matplotlib is not installed.
        """
        figure: Figure = view("plot", self)(self, kind, ax)
        return figure

    def to_pandas(self, table: ComparisonTable = "pairs") -> pandas.DataFrame:
        """A table as a data frame with columns in snake_case, and floats as float64.

        Args:
            table: "pairs" has a row for each module and pair of adapters that both have it;
                "modules" one for each module and adapter that has it.

        Raises:
            ValueError: there is no such table, or its pairs were not compared.
            MissingDependencyError: pandas is not installed.
        """
        frame: pandas.DataFrame = view("pandas", self)(self, table)
        return frame

    def to_polars(self, table: ComparisonTable = "pairs") -> polars.DataFrame:
        """A table as a data frame; tables and columns are those of `to_pandas`.

        Args:
            table: likewise.

        Raises:
            ValueError: there is no such table, or its pairs were not compared.
            MissingDependencyError: polars is not installed.
        """
        frame: polars.DataFrame = view("polars", self)(self, table)
        return frame


def places_of(analyses: Iterable[AdapterAnalysis]) -> dict[str, ModuleAnalysis]:
    """A module of each path, for its block and layer: of the adapter that has the most modules.

    Layers are named so that those of one adapter are told apart (an encoder's from a decoder's).
    """
    places: dict[str, ModuleAnalysis] = {}
    for analysis in sorted(analyses, key=lambda one: len(one.modules)):
        places.update(analysis.modules)
    return places


# What users see, and what a pickle names.
AdapterAnalysis.__module__ = Comparison.__module__ = "lorafast"
