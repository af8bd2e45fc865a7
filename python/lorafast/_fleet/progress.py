"""How far a scan is: adapters and bytes, their rates, and the time that is left."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Follow:
    """Hears of a scan's progress and does nothing."""

    def begin(self, adapters: int) -> None:
        """So many adapters are to be read."""

    def finished(self, adapters: int) -> None:
        """So many more are done."""

    def read(self, done: int, total: int) -> None:
        """So many bytes of the present part are read, and so many there are."""

    def end_of_part(self) -> None:
        """What is read next is counted from zero again."""


class Report(Follow):
    """Passes the bytes on to a callable of (done, total)."""

    def __init__(self, report: Callable[[int, int], object]) -> None:
        self._report = report
        self._before = 0
        self._total = 0

    def read(self, done: int, total: int) -> None:
        """Reports the bytes of all parts so far."""
        self._total = total
        if self._before + total > 0:
            self._report(self._before + done, self._before + total)

    def end_of_part(self) -> None:
        """Counts on from here."""
        self._before += self._total


@contextmanager
def follower(progress: bool | Callable[[int, int], object]) -> Iterator[Follow]:
    """What hears of a scan's progress.

    Args:
        progress: a callable is given (done, total) bytes; `True` draws a bar on standard error if
            that is a terminal; anything else is silence.
    """
    if callable(progress):
        yield Report(progress)
    elif not progress or not sys.stderr.isatty():
        yield Follow()
    else:
        with _bar() as bar:
            yield bar


@contextmanager
def _bar() -> Iterator[Follow]:
    import time

    from rich.console import Console
    from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("scanning"),
        BarColumn(),
        TextColumn("{task.fields[adapters]} · {task.fields[rates]}"),
        TimeRemainingColumn(),
    )

    class Bar(Follow):
        """Redraws the bar as bytes come in; adapters stand beside it."""

        def __init__(self, bar: Progress) -> None:
            self._bar = bar
            self._task = bar.add_task("", total=None, adapters="looking for adapters", rates="")
            self._start = time.monotonic()
            self._all = self._done = self._before = self._part = 0

        def begin(self, adapters: int) -> None:
            self._all = adapters
            self._start = time.monotonic()

        def finished(self, adapters: int) -> None:
            self._done += adapters

        def read(self, done: int, total: int) -> None:
            self._part = total
            seconds = max(time.monotonic() - self._start, 1e-3)
            read = self._before + done
            self._bar.update(
                self._task,
                completed=read,
                total=self._before + total,
                adapters=f"{self._done:,} of {self._all:,} adapters",
                rates=f"{self._done / seconds:,.0f} adapters/s · {read / seconds / 1e9:.2f} GB/s",
            )

        def end_of_part(self) -> None:
            self._before += self._part

    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        yield Bar(bar)
