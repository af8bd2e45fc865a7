"""Executors that do odd things, and what they have workers call."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ProcessPoolExecutor, ThreadPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from typing import Any

#: Of processes that begin anew, as on another machine.
SPAWN = get_context("spawn")


def pool(workers: int = 2) -> ProcessPoolExecutor:
    """Processes that share nothing with this one."""
    return ProcessPoolExecutor(workers, mp_context=SPAWN)


def dying(marker: str, watched: str, function: Callable[..., Any], *given: Any, **how: Any) -> Any:
    """Calls a function; the first process that comes here kills itself while it works.

    Args:
        marker: a file that says that somebody died.
        watched: the directory in which the work is under way when something unfinished is there.
        function: what to call.
        given: its arguments.
        how: its keywords.
    """
    try:
        os.close(os.open(marker, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return function(*given, **how)
    worker = threading.Thread(target=function, args=given, kwargs=how)
    worker.start()
    end = time.monotonic() + 20
    while worker.is_alive() and time.monotonic() < end:
        if any(Path(watched).rglob("*.partial")):
            break
    os.kill(os.getpid(), signal.SIGKILL)
    return None


class Recording(Executor):
    """Runs each task in a thread and keeps what it was given."""

    def __init__(self, before: Callable[[int], object] = lambda number: None) -> None:
        self.calls: list[tuple[Callable[..., Any], tuple[Any, ...], dict[str, Any]]] = []
        self._before = before
        self._threads = ThreadPoolExecutor(1)

    def submit(self, function: Callable[..., Any], /, *given: Any, **how: Any) -> Future[Any]:
        number = len(self.calls)
        self.calls.append((function, given, how))

        def call() -> Any:
            self._before(number)
            return function(*given, **how)

        return self._threads.submit(call)


class Deadly(Executor):
    """A pool of which one worker kills itself while it works."""

    def __init__(self, marker: Path, watched: Path) -> None:
        self._pool = pool(1)
        self._with = (str(marker), str(watched))

    def submit(self, function: Callable[..., Any], /, *given: Any, **how: Any) -> Future[Any]:
        return self._pool.submit(dying, *self._with, function, *given, **how)
