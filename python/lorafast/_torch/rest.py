"""What the core does on the CPU's threads while a device makes products."""

from __future__ import annotations

import threading
from collections.abc import Set
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lorafast import _core
    from lorafast._torch.tiles import Place


class _Stopped(Exception):  # noqa: N818 (it never leaves this module)
    """Ends the CPU's part."""


class Rest(threading.Thread):
    """All of an execution but the merges that a device makes.

    Attributes:
        done: bytes that are done.
        error: what it ended with, if not well.
    """

    def __init__(self, execution: _core.Execution, places: Set[Place]) -> None:
        super().__init__(name="lorafast-rest")
        self.execution, self.places = execution, places
        self.done = 0
        self.error: BaseException | None = None
        self._is_stopped_early = False

    def run(self) -> None:
        """Carry it out."""
        try:
            self.execution.run(self.places, progress=self._report)
        except _Stopped:
            pass
        except BaseException as error:
            self.error = error

    def stop(self) -> None:
        """Ends it at the next report of its progress."""
        self._is_stopped_early = True

    def _report(self, done: int, total: int) -> None:
        if self._is_stopped_early:
            raise _Stopped
        self.done = done
