"""Adapters that several steps of one job open anew, and that may not change in between."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from lorafast._errors import AdapterError, LorafastError
from lorafast._io.sources import ADAPTER_PATTERNS

CHANGED = "changed while it was read; run again when it is complete"


@contextmanager
def unchanged(adapters: Sequence[Path]) -> Iterator[None]:
    """Holds adapters against what they were, once the work on them is done or has failed.

    A step looks at the files that it has opened itself, which tells nothing of those before it.

    Args:
        adapters: their directories, or weights files in these.

    Raises:
        AdapterError: one of them changed, which comes before whatever else failed then.
    """
    before = [_stamps(adapter) for adapter in adapters]

    def changed() -> AdapterError | None:
        for adapter, earlier in zip(adapters, before, strict=True):
            for file, stamp in _stamps(adapter).items():
                if stamp != earlier[file]:
                    return AdapterError(f"{file}: {CHANGED}")
        return None

    try:
        yield
    except (LorafastError, OSError) as error:
        raise changed() or error from error.__cause__
    if (found := changed()) is not None:
        raise found


def _stamps(adapter: Path) -> dict[Path, tuple[int, int, int, int] | None]:
    """Length, time of change and identity of the files that make an adapter up."""
    if adapter.is_dir():
        files = [adapter / name for name in ADAPTER_PATTERNS]
    else:
        files = [adapter, adapter.parent / ADAPTER_PATTERNS[0]]
    stamps: dict[Path, tuple[int, int, int, int] | None] = {}
    for file in files:
        try:
            status = file.stat()
        except OSError:
            stamps[file] = None
        else:
            stamps[file] = (status.st_size, status.st_mtime_ns, status.st_dev, status.st_ino)
    return stamps
