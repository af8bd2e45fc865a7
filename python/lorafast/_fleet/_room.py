"""Room for what a scan finds until its tables are made, given back as they are filled."""

from __future__ import annotations

import mmap

#: Bytes that are taken from the system at a time, and given back.
CHUNK = 1 << 20
#: Pages of this process alone, which count as its own; Windows knows no others.
PRIVATE: dict[str, int] = {"flags": mmap.MAP_PRIVATE} if hasattr(mmap, "MAP_PRIVATE") else {}


class Room:
    """Keeps bytes in pages of their own.

    Thousands of small objects on the heap keep its pages from being given back when they are
    freed. Pages of which no view is left go back to the system at once.
    """

    def __init__(self) -> None:
        self._left = memoryview(b"")

    def keep(self, data: bytes) -> memoryview:
        """A copy of the bytes; its room is given back some time after it is deleted."""
        if not data:
            return memoryview(b"")
        if len(self._left) < len(data):
            self._left = memoryview(mmap.mmap(-1, max(CHUNK, len(data)), **PRIVATE))
        own, self._left = self._left[: len(data)], self._left[len(data) :]
        own[:] = data
        return own.toreadonly()
