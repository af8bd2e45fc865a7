"""What the parts of a file merge take of a device's memory, as far as torch allocates it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch

#: Bytes that an element of B takes at most, beyond what is kept of it, while its coefficient is
#: multiplied in: in float64, and what is made of that.
SCALED_ELEMENT = 12
#: Bytes that a factor's element takes at most where factors are written as 16-bit parts: kept are
#: four and six parts, and its three parts stand beside them until they are in their rows.
SPLIT_ELEMENT = 24
#: Bytes of the ranks that parts are padded with, for each row and column.
PADDING = 14
#: Bytes for an allocator that rounds every tensor up, and for the smallest of them.
SLACK = 32 << 10
#: Bytes of cuBLAS's workspace where torch does not say: on Hopper and newer, and before.
WORKSPACE = {True: 32 << 20, False: (8 << 20) + (128 << 10)}


def workspace_bytes(device: torch.device) -> int:
    """What cuBLAS takes for itself on a CUDA device, for the stream on which products are made."""
    import torch

    if device.type != "cuda":
        return 0
    if hasattr(torch.backends.cuda, "cublas_workspace_size"):
        return int(torch.backends.cuda.cublas_workspace_size())
    # As torch reads it: any number of ":KiB:count".
    setting = os.environ.get("CUBLAS_WORKSPACE_CONFIG", "")
    pairs = re.findall(r":(\d+):(\d+)", setting)
    if pairs:
        return sum(1024 * int(size) * int(count) for size, count in pairs)
    return WORKSPACE[torch.cuda.get_device_capability(device)[0] >= 9]


def building_bytes(
    updates: Sequence[Mapping[str, Any]], dtype: torch.dtype, output: torch.dtype
) -> int:
    """The most that the program of some updates takes on its device, above all while it is built.

    Args:
        updates: as the core describes them.
        dtype: of the weight.
        output: of the merged weight.
    """
    import torch

    split = dtype == output and dtype in {torch.float16, torch.bfloat16}
    split = split and all(update["kind"] in {"low_rank", "vector"} for update in updates)
    wide = 8 if dtype == torch.float64 else 4
    total = SLACK
    largest = 0
    for update in updates:
        for product in update["products"]:
            extents = product["outputs"] + product["inputs"]
            # Factors one by one, and behind one another.
            total += (SPLIT_ELEMENT if split else 2 * wide) * product["rank"] * extents
            total += PADDING * extents if split else 0
            largest = max(largest, product["rank"] * product["outputs"])
        if update["base_override"] is not None:
            # Read in a type of two bytes at least.
            total += wide * (len(update["base_override"][1]) // 2)
        if update["kind"] == "dora":
            # Norms, and what gains are made of.
            total += 3 * len(update["magnitude"])
    if wide == 4 and not split:
        total += SCALED_ELEMENT * largest
    return int(total)
