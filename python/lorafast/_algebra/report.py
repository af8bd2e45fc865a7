"""What became of a computation with adapters."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafast._results import RecordDict, Result, shown, view

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure


@shown
@dataclass(frozen=True, repr=False)
class ModuleResult:
    """What became of one module.

    Attributes:
        shape: (outputs, inputs) of ΔW.
        source_rank: the rank of what went in, that of all adapters together.
        rank: the rank that was written; 0 where the module is left out.
        kept: the share of Σσ² that is kept.
        error: ‖ΔW - written‖/‖ΔW‖ (Frobenius norms) of the factors as they were rounded.
        norm: ‖ΔW‖.
        singular_values: σ of ΔW, descending; empty where nothing asked for them, and the leading
            ones where a method looks at each element.
        coefficients: what each adapter's update was multiplied by; `None` of a single adapter and
            where the result is no sum of them.
        expert_ranks: of a parameter that holds a matrix for each expert, the ranks that these need;
            all are written with the largest. `None` of others.
    """

    shape: tuple[int, int]
    source_rank: int
    rank: int
    kept: float
    error: float
    norm: float
    singular_values: tuple[float, ...]
    coefficients: tuple[float, ...] | None
    expert_ranks: tuple[int, ...] | None


@shown
@dataclass(frozen=True, repr=False)
class BudgetUse:
    """How well a budget was spent.

    Attributes:
        measure: what it counts: "ranks", "parameters" or "bytes".
        amount: how much there was.
        spent: how much was spent.
        gap: by how much the Σσ² that is kept can at most fall short of that of the best choice of
            ranks; 0 where this choice is the best.
    """

    measure: str
    amount: int
    spent: int
    gap: float


@dataclass(frozen=True, repr=False)
class AlgebraReport(Result):
    """An adapter that was computed, and how near it is to what it stands for.

    Attributes:
        inputs: the paths of what it was made from.
        output: the directory or the file that was written, or would be.
        target_format: the name of its format.
        dtype: the element type of its factors.
        modules: what became of each module, by its path.
        error: ‖ΔW - written‖/‖ΔW‖ over all modules, of the factors as they were rounded.
        budget: how a budget was spent; `None` where ranks were chosen otherwise.
        bytes: the size of all factors.
        lost: what the format has no place for, in words.
        notes: what else a user would want to know.
        files: the files that were written; none of a rehearsal.
    """

    inputs: tuple[str, ...]
    output: str
    target_format: str
    dtype: str
    modules: Mapping[str, ModuleResult]
    error: float
    budget: BudgetUse | None
    bytes: int
    lost: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[str, ...]

    @property
    def ranks(self) -> dict[str, int]:
        """The rank of each module, by its path; 0 where it is left out."""
        return RecordDict({name: module.rank for name, module in self.modules.items()})

    def to_markdown(self) -> str:
        """The report as a Markdown page."""
        page: str = view("markdown", self)(self)
        return page

    def plot(self, kind: str = "scree", ax: Axes | None = None) -> Figure:
        """Draws the singular values of the modules, with the cut drawn in.

        Args:
            kind: the name of the plot.
            ax: the axes to draw into; a new figure is made if `None`.
        """
        figure: Figure = view("plot", self)(self, kind, ax)
        return figure


@dataclass(frozen=True, repr=False)
class CombineReport(AlgebraReport):
    """A combination of adapters; see `AlgebraReport`."""

    _kind = "combination"


@dataclass(frozen=True, repr=False)
class ResizeReport(AlgebraReport):
    """An adapter of other ranks; see `AlgebraReport`."""

    _kind = "resize"


@dataclass(frozen=True, repr=False)
class BakeReport(AlgebraReport):
    """An adapter in other factors; see `AlgebraReport`."""

    _kind = "bake"


@shown
@dataclass(frozen=True, repr=False)
class ModuleExtraction:
    """What an extraction knows of a module, of the difference D of its weights.

    Attributes:
        floor: the singular value at or below which the rounding of both checkpoints explains what
            is there, whatever its scale in rows and columns (arXiv:1408.6185).
        mean_floor: where the spectrum of rounding of the same size would end if it were even
            (Marchenko and Pastur); lower, and right where no rows or columns are larger than
            others.
        energy_above: the share of ‖D‖² in singular values above the floor, of those that were
            computed; what is left lies below it, or was not looked at.
        certificate: a bound on (error² - optimum²)/‖D‖², how much of the squared error a best
            approximation of the same rank could at most avoid.
    """

    floor: float
    mean_floor: float
    energy_above: float
    certificate: float


@dataclass(frozen=True, repr=False)
class ExtractReport(AlgebraReport):
    """An adapter extracted from two checkpoints; see `AlgebraReport`.

    `singular_values` of a module are the leading ones, and `error` and `kept` are of the whole
    difference of its weights, what rounding made of it included.

    Attributes:
        extraction: the floor and the certificate of each module, by its path.
        saved: the parameters that are written whole.
        unchanged: how many parameters are the same in both checkpoints.
        resumed: how many parameters an interrupted call with the same arguments had finished.
    """

    extraction: Mapping[str, ModuleExtraction]
    saved: tuple[str, ...]
    unchanged: int
    resumed: int

    _kind = "extraction"

    @property
    def certificate(self) -> dict[str, float]:
        """A bound on (error² - optimum²)/‖D‖² of each module, by its path."""
        bounds = {name: module.certificate for name, module in self.extraction.items()}
        return RecordDict(bounds)

    @property
    def floor(self) -> dict[str, float]:
        """The singular value that rounding explains in each module, by its path."""
        return RecordDict({name: module.floor for name, module in self.extraction.items()})
