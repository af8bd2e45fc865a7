"""Fleets of small adapters, and their tables as plain objects."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
from lorafast._io.plain import to_plain

from support.files import tensor
from support.handmade import adapter_tensors, make_adapter
from support.reference import PREFIX


def make_fleet(root: Path, count: int = 6) -> list[Path]:
    """Adapters of several ranks and types, some with something odd about them."""
    paths = []
    for index in range(count):
        rank = (4, 8, 2)[index % 3]
        dtype = ("F32", "BF16", "F16")[index % 3]
        tensors = adapter_tensors(rank=rank, dtype=dtype, seed=index)
        b = f"{PREFIX}model.layers.0.mlp.up_proj.lora_B.weight"
        if index % 4 == 1:
            tensors[b] = tensor(np.zeros(tensors[b].shape), dtype)
        if index % 4 == 2:
            tensors[b] = tensor(np.full(tensors[b].shape, math.nan), dtype)
        paths.append(make_adapter(root / f"a{index}", tensors, r=rank, use_rslora=index % 2 == 1))
    return paths


def tables(fleet: lorafast.Fleet) -> dict[str, Any]:
    """Everything that two scans of the same adapters have in common, as plain objects."""
    found = {
        f"{name}.{column}": [
            value.tolist() if isinstance(value, np.ndarray) else value
            for value in fleet.table(name)[column].tolist()  # type: ignore[arg-type]  # a text of these
        ]
        for name in ("adapters", "modules")
        for column in fleet.table(name)  # type: ignore[arg-type]  # a text of these
    }
    # NaN is not itself, but repr says what it is.
    return {
        "tables": repr(found),
        "findings": repr([to_plain(item) for item in fleet.findings]),
        "errors": fleet.errors,
    }
