"""Who may touch which memory when: a happens-before checker of streams and host threads.

Every stream and every piece of work of a host thread is an actor with a vector clock. An access is
the actor and its time; another actor knows of it, that is, comes after it, if its clock has got as
far. Clocks grow where one actor waits for another alone, so that what merely happened to come in
the right order in this run is found as well.
"""

from __future__ import annotations

import itertools
import sys
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

Clock = dict[int, int]
_numbers = itertools.count()
#: Frames of these are how an access came about, not where.
OWN = {"clocks.py", "host_threads.py", "simulated_cuda.py", "simulated_streams.py"}
TESTS = Path(__file__).parent.parent


def learn(clock: Clock, other: Clock) -> None:
    for number, time in other.items():
        if clock.get(number, 0) < time:
            clock[number] = time


class Actor:
    """A stream, or a piece of a host thread's work."""

    def __init__(self, name: str) -> None:
        self.name, self.number = name, next(_numbers)
        self.clock: Clock = {self.number: 1}
        #: When it last did something, rather than only told or heard of it.
        self.busy = 0

    @property
    def now(self) -> int:
        return self.clock[self.number]

    def publish(self) -> Clock:
        """All that has happened so far; what the actor does from now on is later."""
        clock = self.clock.copy()
        self.clock[self.number] += 1
        return clock

    def follow(self, other: Actor) -> None:
        """Comes after all that the other has done so far."""
        learn(self.clock, other.publish())

    def knows(self, access: Access) -> bool:
        return self.clock.get(access.actor.number, 0) >= access.time


@dataclass(frozen=True)
class Access:
    actor: Actor
    time: int
    where: str

    def __str__(self) -> str:
        return f"{self.actor.name} at {self.where}"


@dataclass(eq=False)
class Memory:
    """An allocation.

    Attributes:
        name: of what kind it is, and where it was made.
        size: bytes.
        home: the stream on which it was allocated; None for pinned memory of the host.
        written: the last write.
        reads: the reads since, by actor.
        recorded: the streams that `record_stream` was called for.
        on_death: called when nobody holds it any more.
    """

    name: str
    size: int
    home: Actor | None = None
    written: Access | None = None
    reads: dict[int, Access] = field(default_factory=dict)
    recorded: dict[int, Actor] = field(default_factory=dict)
    on_death: Callable[[Memory], None] | None = None

    def __del__(self) -> None:
        if self.on_death is not None:
            self.on_death(self)


class Checker:
    """Takes every access, and notes what is not ordered.

    Attributes:
        problems: what was found, each once.
        accesses: how many accesses were seen, by the actor's kind and what it did.
    """

    def __init__(self) -> None:
        self.problems: list[str] = []
        self.accesses: dict[str, int] = {}

    def report(self, problem: str) -> None:
        if problem not in self.problems:
            self.problems.append(problem)

    def _seen(self, actor: Actor, what: str) -> Access:
        kind = f"{actor.name.split()[0]} {what}"
        self.accesses[kind] = self.accesses.get(kind, 0) + 1
        actor.busy = actor.now
        return Access(actor, actor.now, where())

    def read(self, memory: Memory, actor: Actor) -> Access:
        access = self._seen(actor, "reads")
        if memory.written is None:
            self.report(f"{memory.name} is read by {access} before anything was written")
        elif not actor.knows(memory.written):
            self.report(
                f"{memory.name} is read by {access}, which does not wait for the write by "
                f"{memory.written}"
            )
        memory.reads[actor.number] = access
        return access

    def write(self, memory: Memory, actor: Actor) -> Access:
        access = self._seen(actor, "writes")
        earlier = [("write", memory.written)] if memory.written is not None else []
        earlier += [("read", other) for other in memory.reads.values()]
        for kind, other in earlier:
            if not actor.knows(other):
                self.report(
                    f"{memory.name} is written by {access}, which does not wait for the {kind} "
                    f"by {other}"
                )
        memory.written, memory.reads = access, {}
        return access

    def die(self, memory: Memory, host: Actor) -> None:
        """Its memory goes back to the stream on which it was allocated."""
        if memory.home is None:
            # Pinned memory: torch notes the streams of asynchronous copies itself.
            return
        knowing = [memory.home, host, *memory.recorded.values()]
        last = [memory.written] if memory.written is not None else []
        for access in [*last, *memory.reads.values()]:
            if not any(actor.knows(access) for actor in knowing):
                self.report(
                    f"{memory.name} goes back to {memory.home.name} while it may still be used by "
                    f"{access}, which no record_stream tells"
                )


@cache
def _is_told(file: str) -> bool:
    """Whether a file is where something may have happened: not torch's, not this checker's."""
    path = Path(file)
    if path.parent == Path(__file__).parent:
        return path.name not in OWN
    return "site-packages" not in path.parts and (
        "lorafast" in path.parts or path.is_relative_to(TESTS)
    )


def where() -> str:
    """The innermost place outside of torch and of this checker, as file:line function."""
    frame = sys._getframe(1)
    while frame is not None:
        if _is_told(frame.f_code.co_filename):
            name = frame.f_code.co_filename.rpartition("/")[2]
            return f"{name}:{frame.f_lineno} {frame.f_code.co_name}"
        frame = frame.f_back
    return threading.current_thread().name
