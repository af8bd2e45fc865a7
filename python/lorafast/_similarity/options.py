"""The options of similarity and of trajectories, in two tables."""

# Annotations are evaluated here, as the flags are read from them.
import os
from typing import Annotated, NamedTuple

from lorafast._options import THREADS, Flag, device_flag, executor_flag
from lorafast._types import By, ExecutorChoice, Metric, Precision, Progress

#: Bytes of stacked factors, where nothing else is said.
MEMORY = 1 << 30


class SimilarityOptions(NamedTuple):
    """What adapters are compared by, and how."""

    metric: Annotated[Metric, Flag(None)] = "cosine"
    per_module: Annotated[bool, Flag(None)] = False
    group_by_base: Annotated[
        bool, Flag("compare adapters within each base, where there are several")
    ] = False
    ignore_base: Annotated[
        bool,
        Flag("compare all adapters whose updates have the same shapes, whatever base they name"),
    ] = False
    precision: Annotated[
        Precision,
        Flag("what products are summed in (default: float64, and float32 for very many)"),
    ] = "auto"
    memory: Annotated[int, Flag("memory for factors (default: 1)", metavar="GB", unit=10**9)] = (
        MEMORY
    )
    cache: Annotated[
        str | os.PathLike[str] | None,
        Flag("keep what is done here, and go on from it next time", metavar="DIR"),
    ] = None
    device: Annotated[str, device_flag("products are made")] = "cpu"
    device_memory: Annotated[int | str | None, Flag(None)] = None
    threads: Annotated[int | None, THREADS] = None
    executor: Annotated[ExecutorChoice | None, executor_flag("products are made")] = None
    progress: Annotated[Progress, Flag(None)] = False


class TrajectoryOptions(NamedTuple):
    """What the order of checkpoints follows, and how they are read."""

    by: Annotated[By, Flag("what the order follows (default: the updates)")] = "update"
    threads: Annotated[int | None, THREADS] = None
    progress: Annotated[Progress, Flag(None)] = False
