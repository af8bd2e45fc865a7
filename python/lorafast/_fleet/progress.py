"""Progress of a scan: adapters and bytes, their rates, and the time that is left."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

from lorafast._io.progress import Report, callback


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


class _Counted(Follow):
    """Passes the bytes of all parts on, and counts the adapters for what stands beside a bar."""

    def __init__(self) -> None:
        self.report: Report = lambda done, total: None
        self._start = time.monotonic()
        self._all = self._finished = self._before = self._part = 0

    def begin(self, adapters: int) -> None:
        self._all = adapters
        self._start = time.monotonic()

    def finished(self, adapters: int) -> None:
        self._finished += adapters

    def read(self, done: int, total: int) -> None:
        self._part = total
        if self._before + total > 0:
            self.report(self._before + done, self._before + total)

    def end_of_part(self) -> None:
        self._before += self._part

    def note(self, done: int, total: int | None) -> str:
        """Adapters and rates."""
        if total is None:
            return "looking for adapters"
        seconds = max(time.monotonic() - self._start, 1e-3)
        return (
            f"{self._finished:,} of {self._all:,} adapters · "
            f"{self._finished / seconds:,.0f} adapters/s · {done / seconds / 1e9:.2f} GB/s"
        )


@contextmanager
def follower(progress: bool | Report) -> Iterator[Follow]:
    """What hears of a scan's progress.

    Args:
        progress: a callable is given (done, total) bytes; `True` draws a bar in a notebook or on a
            terminal, and else writes a line on standard error every ten seconds; anything else is
            silence.
    """
    follow = _Counted()
    with callback(progress, label="scanning", note=follow.note) as report:
        if report is None:
            yield Follow()
        else:
            follow.report = report
            yield follow
