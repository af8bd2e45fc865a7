"""Room for what a scan finds until its tables are made, given back as they are filled."""

from __future__ import annotations

import mmap
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

#: Bytes that are taken from the system at a time, and given back.
CHUNK = 1 << 20
#: Bytes from which on an array has pages of its own.
LARGE = 1 << 16
#: Bits of a place that say where in its chunk something lies.
OFFSET_BITS = 40
#: Pages of this process alone, which count as its own; Windows knows no others.
PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}


class Room:
    """Keeps bytes in pages of their own, and hands out places: integers that say where.

    Thousands of small objects on the heap keep its pages from being given back when they are
    freed, and are larger than what they hold. A chunk of pages goes back to the system as soon as
    everything in it was released.
    """

    def __init__(self) -> None:
        self._chunks: list[memoryview | None] = []
        self._held: list[int] = []
        self._used = 0

    def keep(self, data: bytes) -> int:
        """Copies the bytes, and says where they lie."""
        if not self._chunks or len(self._last()) - self._used < len(data):
            if self._chunks and not self._held[-1]:
                self._chunks[-1] = None
            size = max(CHUNK, len(data))
            self._chunks.append(memoryview(mmap.mmap(-1, size, **PRIVATE)))
            self._held.append(0)
            self._used = 0
        start = self._used
        self._last()[start : start + len(data)] = data
        self._used += len(data)
        self._held[-1] += 1
        return (len(self._chunks) - 1) << OFFSET_BITS | start

    def _last(self) -> memoryview:
        last = self._chunks[-1]
        return memoryview(b"") if last is None else last

    def at(self, place: int, length: int) -> memoryview:
        """What lies at a place; not to be kept longer than the place."""
        chunk = self._chunks[place >> OFFSET_BITS]
        if chunk is None:
            raise ValueError("what was kept there has been released")
        start = place & ((1 << OFFSET_BITS) - 1)
        return chunk[start : start + length]

    def release(self, place: int) -> None:
        """Gives the place up; once, and with no view of it left."""
        index = place >> OFFSET_BITS
        self._held[index] -= 1
        # The last chunk is released too, but what is kept next needs a new one then.
        if not self._held[index]:
            self._chunks[index] = None


def fresh(count: int, dtype: DTypeLike) -> NDArray[Any]:
    """An array of zeros that takes memory as it is filled, page by page.

    NumPy asks for huge pages for large arrays, and the heap gives others what it has to make zero
    first. Where dozens of columns are filled side by side, either takes memory long before its use.
    """
    kind = np.dtype(dtype)
    size = count * kind.itemsize
    if size < LARGE:
        return np.zeros(count, kind)
    return np.frombuffer(mmap.mmap(-1, size, **PRIVATE), kind, count)
