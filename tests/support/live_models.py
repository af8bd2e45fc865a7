"""A small module to merge into, adapters for it, and its state."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from support.handmade import adapter_tensors, make_adapter

MODULES = {"first": (50, 20), "second": (30, 50)}


class Model(torch.nn.Module):
    """Two layers, and a norm that nobody adapts."""

    def __init__(self, dtype: torch.dtype = torch.float32, **devices: Any) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first = torch.nn.Linear(20, 50, bias=False, dtype=dtype, **devices)
        self.second = torch.nn.Linear(50, 30, dtype=dtype, **devices)
        self.norm = torch.nn.LayerNorm(30, dtype=dtype, **devices)


def make(path: Path, seed: int = 1, modules: Any = MODULES, **settings: Any) -> Path:
    return make_adapter(path, adapter_tensors(modules, seed=seed, scale=0.1), **settings)


def state(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def same(left: dict[str, torch.Tensor], right: dict[str, torch.Tensor]) -> bool:
    assert left.keys() == right.keys()
    return all(torch.equal(left[name], right[name]) for name in left)
