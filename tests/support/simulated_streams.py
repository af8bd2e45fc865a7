"""Streams, events and memory of a CUDA device that does not exist."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch

from support.clocks import Access, Actor, Checker, Clock, Memory, learn
from support.host_threads import host

#: As torch's allocator rounds.
GRANULE = 512


@dataclass
class OnItsWay:
    """A copy between a device and pinned memory that nobody has waited for yet.

    Attributes:
        access: the stream's access to the pinned memory.
        memory: the pinned memory.
        pinned: where in it, as a plain tensor.
        content: what it is (of a source) or will be (of a target).
        incoming: whether the pinned memory is the target.
    """

    access: Access
    memory: Memory
    pinned: torch.Tensor
    content: torch.Tensor
    incoming: bool


class Simulator:
    """The devices, with what has happened on them.

    Attributes:
        checker: what takes the accesses.
        capacity: bytes of memory of each device.
        workspace: bytes that a GEMM takes once for each thread and stream.
        allocated: bytes of living tensors and workspaces, of all devices together.
        peak: the most bytes at once, those with that still wait for a recorded stream.
    """

    def __init__(self, capacity: int, workspace: int, count: int) -> None:
        self.checker = Checker()
        self.capacity, self.workspace, self.count = capacity, workspace, count
        self.lock = threading.RLock()
        self.closed = False
        self.allocated = self.peak = self.peak_allocated = 0
        self.completed: Clock = {}
        self.on_their_way: list[OnItsWay] = []
        #: Bytes of dead tensors, each with the times of the streams that it waits for.
        self.dying: list[tuple[int, Clock]] = []
        self.workspaces: dict[tuple[int, int], int] = {}
        self.made = 0
        self.defaults = [Stream(self, index, "default") for index in range(count)]
        self.local = threading.local()

    # Streams

    def index(self, device: Any = None) -> int:
        if device is None or (device := torch.device(device)).index is None:
            return int(getattr(self.local, "device", 0))
        if device.index >= self.count:
            raise RuntimeError("CUDA error: invalid device ordinal")
        return int(device.index)

    def current(self, device: Any = None) -> Stream:
        index = self.index(device)
        streams: dict[int, Stream] = self.local.__dict__.setdefault("streams", {})
        return streams.get(index, self.defaults[index])

    def launch(self, device: Any = None) -> Actor:
        """The stream on which the thread launches something now, which then comes after it."""
        actor = self.current(device).actor
        actor.follow(host())
        return actor

    def waited(self, clock: Clock) -> None:
        """This thread has waited for the device to get that far."""
        learn(host().clock, clock)
        learn(self.completed, clock)
        for copy in [one for one in self.on_their_way if self._is_complete(one.access)]:
            self._arrive(copy)
        self._bury()

    def synchronize(self, device: Any = None) -> None:
        index = self.index(device)
        for stream in Stream.known(self):
            if stream.number == index:
                self.waited(stream.actor.publish())

    # Copies on their way

    def _is_complete(self, access: Access) -> bool:
        return self.completed.get(access.actor.number, 0) >= access.time

    def _arrive(self, copy: OnItsWay) -> None:
        # Two threads can wait for one copy: it arrives once.
        with self.lock:
            left = [one for one in self.on_their_way if one is not copy]
            if len(left) == len(self.on_their_way):
                return
            self.on_their_way[:] = left
            if copy.incoming:
                copy.pinned.copy_(copy.content)
            elif not same_bytes(copy.pinned, copy.content):
                self.checker.report(
                    f"{copy.memory.name} was changed while a copy of it by {copy.access} was on "
                    "its way"
                )

    def settle(self, memory: Memory, actor: Actor) -> None:
        """Lets copies into the memory arrive that the actor comes after."""
        for copy in list(self.on_their_way):
            if copy.memory is memory and copy.incoming and actor.knows(copy.access):
                self._arrive(copy)

    # Memory

    def allocate(self, size: int, device: Any, what: str) -> Memory:
        size = -(-size // GRANULE) * GRANULE
        self._take(size)
        self.made += 1
        stream = self.current(device)
        name = f"tensor {self.made} ({what}, {size} bytes, of {stream.actor.name})"
        return Memory(name, size, stream.actor, on_death=self._died)

    def _take(self, size: int) -> None:
        if self.allocated + size > self.capacity:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {size} bytes.")
        self.allocated += size
        self._note_peak()

    def _note_peak(self) -> None:
        self.peak_allocated = max(self.peak_allocated, self.allocated)
        waiting = sum(size for size, _ in self.dying)
        # Where memory runs out, the allocator waits for the dead.
        self.peak = max(self.peak, min(self.allocated + waiting, self.capacity))

    def _died(self, memory: Memory) -> None:
        with self.lock:
            if self.closed:
                return
            self.allocated -= memory.size
            self.checker.die(memory, host())
            # An event on each, which is complete once all before it is.
            times = {actor.number: actor.busy for actor in memory.recorded.values()}
            if times:
                self.dying.append((memory.size, times))
                self._bury()

    def _bury(self) -> None:
        done = self.completed
        self.dying = [
            (size, times)
            for size, times in self.dying
            if any(done.get(number, 0) < time for number, time in times.items())
        ]

    def use_workspace(self, device: Any) -> None:
        key = (threading.get_ident(), self.current(device).actor.number)
        if self.workspace and key not in self.workspaces:
            self._take(self.workspace)
            self.workspaces[key] = self.workspace

    def clear_workspaces(self) -> None:
        self.allocated -= sum(self.workspaces.values())
        self.workspaces.clear()


def same_bytes(left: torch.Tensor, right: torch.Tensor) -> bool:
    """Whether two tensors are the same, NaN and all."""
    sides = [each.contiguous().reshape(-1).view(torch.uint8) for each in (left, right)]
    return torch.equal(*sides)


class Event:
    """`torch.cuda.Event`."""

    def __init__(self, **options: Any) -> None:
        self.clock: Clock | None = None
        self.simulator: Simulator | None = None

    def record(self, stream: Stream | None = None) -> None:
        stream = active().current() if stream is None else stream
        self.simulator = stream.simulator
        with stream.simulator.lock:
            stream.actor.follow(host())
            self.clock = stream.actor.publish()

    def wait(self, stream: Stream | None = None) -> None:
        stream = active().current() if stream is None else stream
        stream.wait_event(self)

    def synchronize(self) -> None:
        # Of one that was never recorded, CUDA says that it is complete.
        if self.clock is not None and self.simulator is not None:
            with self.simulator.lock:
                self.simulator.waited(self.clock)

    def query(self) -> bool:
        clock = self.clock or {}
        completed = self.simulator.completed if self.simulator is not None else {}
        return all(completed.get(number, 0) >= time for number, time in clock.items())


class Stream:
    """`torch.cuda.Stream`."""

    def __init__(self, simulator: Simulator, number: int, name: str) -> None:
        self.simulator, self.number = simulator, number
        self.device = torch.device("cuda", number)
        self.actor = Actor(f"stream {name} of cuda:{number}")
        simulator.__dict__.setdefault("streams", []).append(self)

    @staticmethod
    def known(simulator: Simulator) -> list[Stream]:
        return list(simulator.__dict__["streams"])

    def wait_event(self, event: Event) -> None:
        with self.simulator.lock:
            self.actor.follow(host())
            learn(self.actor.clock, event.clock or {})

    def wait_stream(self, other: Stream) -> None:
        self.wait_event(other.record_event())

    def record_event(self, event: Event | None = None) -> Event:
        event = Event() if event is None else event
        event.record(self)
        return event

    def synchronize(self) -> None:
        with self.simulator.lock:
            self.actor.follow(host())
            self.simulator.waited(self.actor.publish())

    def query(self) -> bool:
        return self.record_event().query()


_active: list[Simulator] = []


def active() -> Simulator:
    return _active[-1]


@contextmanager
def activated(simulator: Simulator) -> Iterator[None]:
    _active.append(simulator)
    try:
        yield
    finally:
        _active.pop()
