"""Reading many adapters at once: `lorafast.scan`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from lorafast._fleet._fleet import Fleet
    from lorafast._fleet._paths import Source

Metrics = Literal["full", "headers", "moments", "spectra"]

METRICS: tuple[Metrics, ...] = ("full", "headers", "moments", "spectra")


def scan(
    paths: Source | Iterable[Source],
    *,
    metrics: Metrics = "full",
    threads: int | None = None,
    progress: bool | Callable[[int, int], object] = False,
    cache: str | os.PathLike[str] | None = None,
    device: str = "cpu",
) -> Fleet:
    """Reads any number of adapters and tells what each of them holds.

    Figures are those of `analyze`, bit for bit, whatever the number of threads. Work is spread
    over the modules of all adapters; at most two adapters a thread are open at a time, and memory
    is the tables' and a buffer a thread of the size of the largest module (at least 8 MiB). An
    adapter that cannot be read is a record in `Fleet.errors` and does not end the scan; so is one
    that changed while it was read.

    Args:
        paths: directories, which are searched with all that lies below them; adapters; globs; or
            any number of these.
        metrics: how much to find: "headers" reads no weights; "moments" the statistics of the
            stored factors; "spectra" the singular values of each update s·B·A and what follows
            from them; "full" both.
        threads: worker threads; one for each core if `None`.
        progress: `True` for a bar on a terminal, or a callable that is given (done, total) bytes.
        cache: a directory (made if it is not there) that keeps what was found. Only adapters that
            are not in it, or whose weights or config have changed since by size, time or
            identity, are read; a scan that was interrupted goes on where it was. What it knows of
            adapters that have gone from a directory that is searched is removed.
        device: where spectra are found: "cpu", or by torch, in batches of modules of one shape, on
            "cuda" or "cuda:N" ("auto": on a CUDA device where there is one; "torch:cpu" to compare
            backends). There they agree with the CPU's to rounding, not to the bit, and are not
            kept in a cache.

    Returns:
        The fleet: tables of adapters and of modules, findings, and errors.

    Raises:
        ValueError: an argument is outside its domain, or no path was given.
        FileNotFoundError: no path is there.
        AdapterError: the paths hold no adapter at all.
        OSError: the cache's directory cannot be made. A cache that is damaged, or cannot be read or
            written, is a warning.
        DeviceError: the device is not there.
    """
    from lorafast._fleet._progress import follower
    from lorafast._fleet._scanning import scan_followed

    with follower(progress) as follow:
        return scan_followed(
            paths, follow, metrics=metrics, threads=threads, cache=cache, device=device
        )
