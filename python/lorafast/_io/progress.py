"""Progress of a long job: a bar on a terminal or in a notebook, or what the caller wants of it."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager

Report = Callable[[int, int], object]
#: Between two lines of plain text.
SECONDS_A_LINE = 10.0
#: What stands beside a bar for (done, total); the total is not known (`None`) at first.
Note = Callable[[int, int | None], str]


def in_notebook() -> bool:
    """Whether this is a kernel of Jupyter, whose cells show HTML."""
    # Nobody but a kernel has imported IPython's shell by itself.
    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    shell = ipython.get_ipython()
    return getattr(shell, "kernel", None) is not None


@contextmanager
def callback(
    progress: bool | Report, *, label: str = "merging", note: Note | None = None
) -> Iterator[Report | None]:
    """What the core is to call with (done, total).

    Args:
        progress: a callable is passed on; `True` draws a bar in a notebook's cell, or on standard
            error if that is a terminal, and else writes a line there every ten seconds; anything
            else is silence.
        label: the word before the bar.
        note: what stands beside it; bytes and their rate if `None`.
    """
    if callable(progress):
        yield progress
        return
    if not progress:
        yield None
        return
    if in_notebook():
        from lorafast._io.notebook_bar import notebook_bar

        with notebook_bar(label, note or _gigabytes) as report:
            yield report
        return
    if not sys.stderr.isatty():
        yield _lines(label, note)
        return
    from rich.console import Console
    from rich.progress import (
        BarColumn,
        DownloadColumn,
        Progress,
        TextColumn,
        TimeRemainingColumn,
        TransferSpeedColumn,
    )

    beside = (
        (DownloadColumn(), TransferSpeedColumn())
        if note is None
        else (TextColumn("{task.fields[note]}"),)
    )
    columns = (TextColumn("{task.description}"), BarColumn(), *beside, TimeRemainingColumn())
    text = note or (lambda done, total: "")
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(label, total=None, note=text(0, None))
        yield lambda done, total: bar.update(
            task, completed=done, total=total, note=text(done, total)
        )


def _gigabytes(done: int, total: int | None) -> str:
    """What stands beside a bar of bytes."""
    return "" if total is None else f"{done / 1e9:.1f} of {total / 1e9:.1f} GB"


def _lines(label: str, note: Note | None) -> Report:
    """A line of plain text on standard error every ten seconds, for logs."""
    import time

    start = last = time.monotonic()

    def report(done: int, total: int) -> None:
        nonlocal last
        now = time.monotonic()
        if now - last < SECONDS_A_LINE:
            return
        last = now
        share = done / total if total else 1.0
        text = (note or _gigabytes)(done, total)
        print(f"{label}: {share:.0%}, {text}, {now - start:.0f} s", file=sys.stderr, flush=True)

    return report


@contextmanager
def pace(
    progress: bool | Report, label: str, count: int, unit: str, *, is_bytes: bool = False
) -> Iterator[Report | None]:
    """`callback` for work that a person counts in another unit than the core.

    Args:
        progress: as for `callback`.
        label: the word before the bar.
        count: how many there are of what a person counts in.
        unit: what that is, in the plural.
        is_bytes: whether the core counts in bytes.
    """
    import time

    start = time.monotonic()

    def note(done: int, total: int | None) -> str:
        if total is None:
            return ""
        share = done / total if total else 1.0
        speed = share * count / max(time.monotonic() - start, 1e-3)
        text = f"{share * count:,.0f} of {count:,} {unit} · {speed:,.0f} {unit}/s"
        if is_bytes:
            text += f" · {speed * total / count / 1e9:.2f} GB/s"
        return text

    with callback(progress, label=label, note=note) as report:
        yield report
