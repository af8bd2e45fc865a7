"""What is on its way through a device: tiles, the buffers that hold them, and their tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lorafast._torch.program import Program

if TYPE_CHECKING:
    import torch

    from lorafast import _core

#: Of the tiles of a run of rows with the same updates, every so many has its first row measured
#: for what rounding takes away; as the core has it, whose tiles are smaller.
MEASURED = 16
#: Bytes of a value before it is rounded, as it is measured.
EXACT_BYTES = 4

Place = tuple[int, int]


@dataclass
class Slot:
    """Host buffers of one tile, as bytes; pinned where the device is another."""

    source: torch.Tensor
    target: torch.Tensor
    finite: torch.Tensor
    #: A row before it is rounded, as float32, where the tile is measured.
    exact: torch.Tensor
    done: Any = None


@dataclass(eq=False)
class Work:
    """One tensor with its program on the device.

    Attributes:
        tensor: what the core says of it.
        place: where the plan has it.
        columns: elements of a row.
        dtype: in which its rows are read.
        output: in which they are written.
        program: what is done to them.
        rows: of a tile, at most.
        failed: whether it is left to the CPU after all.
    """

    tensor: _core.ChangedTensor
    place: Place
    columns: int
    dtype: torch.dtype
    output: torch.dtype
    program: Program
    rows: int = 0
    failed: bool = False

    @property
    def read_bytes(self) -> int:
        """Of a row as it is read."""
        return self.columns * self.dtype.itemsize

    @property
    def written_bytes(self) -> int:
        """Of a row as it is written."""
        return self.columns * self.output.itemsize

    @property
    def exact_bytes(self) -> int:
        """Of a row before it is rounded."""
        return self.columns * EXACT_BYTES

    @property
    def is_measured(self) -> bool:
        """Whether what rounding takes away is measured, as the core does for 16 bits."""
        return self.output.itemsize == 2


@dataclass
class Tile:
    work: Work
    first: int
    rows: int
    #: Whether what rounding takes of its first row is measured.
    measured: bool = False

    @property
    def place(self) -> Place:
        return self.work.place


def tiles_of(work: Work, most: Callable[[], int]) -> Iterator[Tile]:
    """The tiles of a tensor, none of which lies in two of its segments.

    Args:
        work: the tensor.
        most: the rows of the next tile, at most.
    """
    for start, end in work.tensor["segments"]:
        first, number = start, 0
        while first < end:
            rows = min(most(), end - first)
            yield Tile(work, first, rows, work.is_measured and number % MEASURED == 0)
            first, number = first + rows, number + 1


@dataclass
class Rows:
    """What a writer needs to know of a tile.

    Attributes:
        place: where the plan has its tensor.
        first: its first row in that.
        dtype: in which it was read.
        measured: whether its slot has the first row before rounding, too.
        only_added: whether that is what was added to W₀ alone.
        exact: whether what is not finite was not decided.
    """

    place: Place
    first: int
    dtype: torch.dtype
    measured: bool = False
    only_added: bool = False
    exact: bool = False
