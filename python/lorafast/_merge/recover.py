"""What a merge that was killed left in its output: finished, taken back, or removed."""

from __future__ import annotations

import os
from typing import Literal

from lorafast import _core
from lorafast._io.paths import output_path

Recovery = Literal["nothing", "cleared", "finished", "taken_back", "kept"]


def recover(output: str | os.PathLike[str]) -> Recovery:
    """Brings an output directory to order in which a merge was cut off.

    A merge that was killed while it wrote has changed nothing but a hidden directory, which is
    removed. One that was killed while it moved the finished model into its place has left a
    directory that no loader takes for a model; the files that have not moved yet are moved now.
    Where a part of the new model is lost (after a loss of power, with `sync=False`), the model that
    was there before is put back. The next merge into the directory does the same by itself.

    Args:
        output: the directory that was being written.

    Returns:
        What was done: "nothing" was cut off there, what was unfinished is "cleared", the new model
        is "finished", or the older one "taken_back". "kept": a finished model that could not be
        moved into place lies in the directory's `.lorafast-partial`, and stays there.

    Raises:
        FileNotFoundError: the directory is not there.
        OutputError: a merge is writing there at this moment, somebody else's file has come to the
            place of one of the model's, or what is left of a merge cannot be understood.
        OSError: a file cannot be moved.
    """
    return _core.recover_output(output_path(output))
