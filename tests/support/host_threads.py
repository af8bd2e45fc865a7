"""Host threads as actors: what starting, joining, futures and lists that hand things over order.

Each task of a pool is an actor of its own, though several run in one thread one after the other:
that they do is no order that the code under test asks for.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager
from typing import Any

import pytest

from support.clocks import Actor, learn

_local = threading.local()


def host() -> Actor:
    """The actor of what this thread does now."""
    actor: Actor | None = getattr(_local, "actor", None)
    if actor is None:
        actor = _local.actor = Actor(f"host {threading.current_thread().name}")
    return actor


def begin() -> None:
    """A new actor for this thread, so that a test knows nothing of an earlier one."""
    _local.actor = Actor(f"host {threading.current_thread().name}")


def patch_threads(
    patches: pytest.MonkeyPatch, within: Callable[[], AbstractContextManager[Any]]
) -> None:
    """Makes threads, pools and futures carry clocks; each thread's work runs `within` a context."""
    start, join = threading.Thread.start, threading.Thread.join
    submit, result = ThreadPoolExecutor.submit, Future.result

    def started(thread: threading.Thread) -> None:
        clock, run = host().publish(), thread.run

        def entered() -> None:
            begin()
            learn(host().clock, clock)
            try:
                with within():
                    run()
            finally:
                thread.finished_clock = host().publish()

        thread.run = entered
        start(thread)

    def joined(thread: threading.Thread, timeout: float | None = None) -> None:
        join(thread, timeout)
        if not thread.is_alive():
            learn(host().clock, getattr(thread, "finished_clock", {}))

    def submitted(
        pool: ThreadPoolExecutor, call: Callable[..., Any], /, *arguments: Any, **options: Any
    ) -> Future[Any]:
        clock = host().publish()
        ended: dict[str, Any] = {}

        def task() -> Any:
            thread = host()
            _local.actor = own = Actor(f"host {threading.current_thread().name} {call.__name__}")
            learn(own.clock, clock)
            try:
                return call(*arguments, **options)
            finally:
                ended["clock"] = own.publish()
                # Who joins the thread waits for its tasks.
                learn(thread.clock, ended["clock"])
                _local.actor = thread

        future: Future[Any] = submit(pool, task)
        future.ended = ended
        return future

    def resulting(future: Future[Any], timeout: float | None = None) -> Any:
        try:
            return result(future, timeout)
        finally:
            learn(host().clock, getattr(future, "ended", {}).get("clock", {}))

    patches.setattr(threading.Thread, "start", started)
    patches.setattr(threading.Thread, "join", joined)
    patches.setattr(ThreadPoolExecutor, "submit", submitted)
    patches.setattr(Future, "result", resulting)


def asked_for_by(
    asking: Actor, call: Callable[..., Any], within: Callable[[], AbstractContextManager[Any]]
) -> Callable[..., Any]:
    """A call as the core's threads make it, for one that waits for them meanwhile: what that one
    knows is known to them, and what they do to it."""

    def asked(*arguments: Any) -> Any:
        begin()
        learn(host().clock, asking.publish())
        try:
            with within():
                return call(*arguments)
        finally:
            learn(asking.clock, host().publish())

    return asked


class HandedOver(list[Any]):
    """A list by which threads hand things over: who takes one comes after who put it there."""

    def __init__(self, items: list[Any]) -> None:
        super().__init__(items)
        self.clocks: dict[int, dict[int, int]] = {}

    def append(self, item: Any) -> None:
        self.clocks[id(item)] = host().publish()
        super().append(item)

    def pop(self, *at: Any) -> Any:
        item = super().pop(*at)
        learn(host().clock, self.clocks.pop(id(item), {}))
        return item
