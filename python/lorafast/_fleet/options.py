"""The options of scanning, in one table."""

# Annotations are evaluated here, as the flags are read from them.
import os
from collections.abc import Sequence
from typing import Annotated, NamedTuple

from lorafast._options import THREADS, Flag, device_flag, executor_flag
from lorafast._types import ExecutorChoice, Metrics, Progress


class ScanOptions(NamedTuple):
    """What a scan finds, and how."""

    metrics: Annotated[
        Metrics,
        Flag(
            "how much to find: headers reads no weights, moments looks at the stored values, "
            "spectra at the singular values of the updates (default: full, both)"
        ),
    ] = "full"
    exclude: Annotated[
        Sequence[str],
        Flag(
            "leave out what matches a pattern, with all below it: a name at any depth "
            "(checkpoint-*), or with a slash a path below the directory that is searched (old/*); "
            "may be repeated",
            metavar="PATTERN",
            repeated=True,
        ),
    ] = ()
    cache: Annotated[
        str | os.PathLike[str] | None,
        Flag(
            "keep what was found in a directory; a later scan reads only what changed, and one "
            "that was interrupted goes on where it was",
            metavar="DIR",
        ),
    ] = None
    threads: Annotated[int | None, THREADS] = None
    device: Annotated[str, device_flag("singular values are found")] = "cpu"
    executor: Annotated[ExecutorChoice | None, executor_flag("the adapters are read")] = None
    progress: Annotated[Progress, Flag(None)] = False
