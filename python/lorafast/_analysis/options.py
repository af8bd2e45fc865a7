"""The options of analysis, and those that everything which reads adapters has, in two tables."""

# Annotations are evaluated here, as the flags are read from them.
from typing import Annotated, NamedTuple

from lorafast._options import THREADS, Flag
from lorafast._types import AdapterFormat, Progress, Source

#: Modules of more adapters than this are compared pair by pair only when it is asked for: their
#: number grows with the square of the adapters'.
MODULES_UNASKED = 10


class AnalysisOptions(NamedTuple):
    """What an analysis measures, and how."""

    base: Annotated[
        Source | None,
        Flag("the model, to relate each update's norm to its weight's", metavar="PATH"),
    ] = None
    histogram_bins: Annotated[
        int, Flag("bins of histograms (default: 50)", metavar="N", name="bins")
    ] = 50
    entries: Annotated[bool, Flag("also look at every entry of every update")] = False
    alpha: Annotated[
        float | None,
        Flag("alpha of weights without their config: each scale is alpha / rank", metavar="A"),
    ] = None
    scale: Annotated[
        float | None,
        Flag("scale of weights without their config, in alpha's place", metavar="S"),
    ] = None
    format: Annotated[
        AdapterFormat | None,
        Flag(
            "the adapter's format, where its files do not tell it (default: told by the files)",
            name="adapter-format",
        ),
    ] = None
    threads: Annotated[int | None, THREADS] = None
    progress: Annotated[Progress, Flag(None)] = False


class CompareOptions(NamedTuple):
    """What a comparison tells, and how adapters are read."""

    modules: Annotated[
        bool | None,
        Flag(
            "also compare the updates of each module, pair by pair: subspaces, angles, signs "
            f"(default: of up to {MODULES_UNASKED} adapters)"
        ),
    ] = None
    threads: Annotated[int | None, THREADS] = None
    progress: Annotated[Progress, Flag(None)] = False

    def of_analysis(self) -> AnalysisOptions:
        """Those of an analysis that is made in the same way."""
        return AnalysisOptions(threads=self.threads, progress=self.progress)

    def compares_modules(self, adapters: int) -> bool:
        """Whether the pairs of each module are told of, for a number of adapters."""
        return adapters <= MODULES_UNASKED if self.modules is None else self.modules


class CommonOptions(NamedTuple):
    """How adapters are read, where there is nothing else to choose."""

    threads: Annotated[int | None, THREADS] = None
    progress: Annotated[Progress, Flag(None)] = False
