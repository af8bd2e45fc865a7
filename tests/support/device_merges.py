"""File merges that go every way of the torch backend's CUDA path, each in a moment."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
from lorafast._torch import file_merge
from lorafast._torch import program as device_program

from support.files import Tensor, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX
from support.simulated_cuda import Simulator, simulated_cuda

SQUARE, TALL, SMALL = "model.layers.0.q_proj", "model.layers.0.up_proj", "model.layers.1.q_proj"
MODULES = {SQUARE: (120, 100), TALL: (200, 40), SMALL: (7, 40)}
#: A bound on memory beyond what there is.
PLENTY = {"device_memory": 32 << 20}
#: As many rows of these as make several tiles of each tensor.
TILE_BYTES = 4 << 10


def dora(modules: Mapping[str, tuple[int, int]], *, rank: int = 4) -> dict[str, Tensor]:
    tensors = adapter_tensors(modules, rank=rank)
    for name, (rows, _) in modules.items():
        vector = np.linspace(0.5, 1.5, rows)
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = tensor(vector)
    return tensors


@dataclass(frozen=True)
class Way:
    """A merge.

    Attributes:
        dtype: of the base.
        make: the adapters' tensors, each with settings.
        transposed: whether the base's weights lie (in, out).
        modules: of base and adapters, as the layers have them.
        options: of the merge.
        capacity: bytes of the device.
        tile_bytes: of a tile, at most.
        leaves: how many tensors are left to the CPU.
        fail: a `Program.apply` in place of the true one, which it gets.
        raises: what the merge ends with.
    """

    dtype: str = "F32"
    make: Callable[[Mapping[str, tuple[int, int]]], dict[str, Tensor]] = adapter_tensors
    count: int = 1
    transposed: bool = False
    modules: Mapping[str, tuple[int, int]] = field(default_factory=lambda: MODULES)
    settings: Mapping[str, Any] = field(default_factory=dict)
    options: Mapping[str, Any] = field(default_factory=dict)
    capacity: int = 64 << 20
    tile_bytes: int = TILE_BYTES
    leaves: int = 0
    fail: Callable[..., Any] | None = None
    raises: type[BaseException] | None = None


def without_room(most: int, last: int) -> Callable[..., Any]:
    """Has no room for tiles of more than a few rows, nor for the row `last` at all."""

    def apply(true: Any, program: Any, tile: torch.Tensor, first: int, *rest: Any) -> Any:
        result = true(program, tile, first, *rest)
        if len(tile) > most or first <= last < first + len(tile):
            raise torch.OutOfMemoryError("no room")
        return result

    return apply


def interrupted(true: Any, program: Any, tile: torch.Tensor, first: int, *rest: Any) -> Any:
    result = true(program, tile, first, *rest)
    if first > 50:
        raise KeyboardInterrupt
    return result


LARGE = {SQUARE: (100, 80), TALL: (80, 100), SMALL: (60, 90)}
WITH_DORA = {"use_dora": True}
WAYS = {
    "fused": Way("BF16"),
    "fused of F16": Way("F16", count=2),
    "sums": Way("F32", count=2),
    "sums in F64": Way("F64"),
    "DoRA": Way("F32", dora, settings=WITH_DORA),
    "DoRA of BF16": Way("BF16", dora, settings=WITH_DORA),
    "DoRA of columns": Way("F32", dora, transposed=True, settings=WITH_DORA),
    "DoRA of columns of BF16": Way("BF16", dora, 2, transposed=True, settings=WITH_DORA),
    "exact": Way("F32", count=2, options={"precision": "exact"}),
    "exact of BF16": Way("BF16", options={"precision": "exact"}),
    "in stages": Way("F32", dora, 2, settings=WITH_DORA, options={"compat": "peft"}),
    "large programs": Way(
        "F32",
        lambda modules: adapter_tensors(modules, rank=48),
        modules=LARGE,
        settings={"r": 48},
        options={"device_memory": 1 << 20},
    ),
    "halved": Way("F32", fail=without_room(7, -1)),
    "one row without room": Way("F32", fail=without_room(7, 9), leaves=2),
    "out of memory": Way("F32", capacity=96 << 10, options=PLENTY, tile_bytes=48 << 10),
    "out of memory in a scan": Way(
        "F32",
        dora,
        transposed=True,
        settings=WITH_DORA,
        capacity=96 << 10,
        options=PLENTY,
        tile_bytes=20 << 10,
        leaves=2,
    ),
    "interrupted": Way("BF16", fail=interrupted, raises=KeyboardInterrupt),
    "overflow": Way(
        "F16",
        lambda modules: adapter_tensors(modules, scale=300.0),
        raises=lorafast.NumericError,
    ),
}


@dataclass
class Inputs:
    base: Path
    adapters: list[Path]


def inputs(folder: Path, way: Way) -> Inputs:
    """The files of a merge."""
    stored = {name: shape[::-1] if way.transposed else shape for name, shape in way.modules.items()}
    config = {"model_type": "gpt2"} if way.transposed else {}
    base = make_base(folder / "base", modules=stored, dtype=way.dtype, shards=2, config=config)
    adapters = []
    settings = dict(way.settings) | ({"fan_in_fan_out": True} if way.transposed else {})
    for number in range(way.count):
        adapters.append(make_adapter(folder / f"{number}", way.make(way.modules), **settings))
    return Inputs(base, adapters)


@contextmanager
def conditions(way: Way, module: Any) -> Iterator[None]:
    """Small tiles, and what fails on this way."""
    with pytest.MonkeyPatch.context() as patches:
        patches.setitem(sys.modules, "lorafast._torch.file_merge", module)
        patches.setitem(module.TILE_BYTES, "cuda", way.tile_bytes)
        if way.fail is not None:
            true, fail = device_program.Program.apply, way.fail
            patches.setattr(device_program.Program, "apply", lambda *given: fail(true, *given))
        yield


def go(
    way: Way, files: Inputs, output: Path, *, module: Any = file_merge, **simulated: Any
) -> tuple[Simulator, lorafast.MergeReport | None]:
    """Merges on the simulated device, by another module than `_files` if one is given."""
    report = None
    given = {"capacity": way.capacity, "files": module} | simulated
    with conditions(way, module), simulated_cuda(**given) as simulator:
        merge = partial(lorafast.merge, files.base, files.adapters, output, device="cuda")
        if way.raises is None:
            report = merge(**way.options)
        else:
            with pytest.raises(way.raises):
                merge(**way.options)
    return simulator, report
