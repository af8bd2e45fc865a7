"""Limits of what a caller can ask for: the number of worker threads."""

from __future__ import annotations

#: The most worker threads, as in the core.
MAX_THREADS = 1024


def check_threads(threads: int | None) -> None:
    """Checks a number of worker threads.

    Args:
        threads: the number, or `None` for one per core.

    Raises:
        ValueError: there are none, or more than there can be.
    """
    if threads is not None and not 1 <= threads <= MAX_THREADS:
        raise ValueError(
            f"threads is {threads}; it is 1 to {MAX_THREADS}, or None for one per core"
        )
