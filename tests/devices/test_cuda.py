"""File merges where there is a GPU, and, so that these tests themselves have run, where not."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import torch
from lorafast._torch import file_merge
from lorafast._torch.memory import workspace_bytes
from support.device_merges import WAYS, Way, conditions, inputs
from support.files import read_checkpoint
from support.simulated_cuda import opened

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
#: What fails there is made to fail; on a GPU it is enough that all else comes out right.
PLAIN = [name for name, way in WAYS.items() if way.fail is None and way.raises is None]


CUDA = pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])


@pytest.fixture(params=["simulated", CUDA])
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with opened(request.param) as name:
        yield name


def check(way: Way, folder: Path, device: str, **options: Any) -> lorafast.MergeReport:
    """Merges on a device and on the CPU, and compares."""
    files = inputs(folder, way)
    given = dict(way.options) | options
    report = lorafast.merge(files.base, files.adapters, folder / "out", device=device, **given)
    compat = way.options.get("compat")
    lorafast.merge(files.base, files.adapters, folder / "cpu", compat=compat)
    ours, cpu = read_checkpoint(folder / "out"), read_checkpoint(folder / "cpu")
    assert ours.keys() == cpu.keys()
    for key, value in cpu.items():
        tolerance = {"BF16": 2.0**-7, "F16": 2.0**-9, "F32": 2.0**-20, "F64": 2.0**-48}
        error = np.abs(ours[key].float64() - value.float64())
        assert error.max() <= tolerance[value.dtype] * np.abs(value.float64()).max(), key
    return report


@pytest.mark.parametrize(
    ("device", "name"),
    [
        pytest.param(device, name, marks=[pytest.mark.cuda, NO_CUDA] if device == "cuda" else [])
        for device in ("simulated", "cuda")
        for name in PLAIN
        # The simulated ones are in test_torch_streams.py.
        if device == "cuda" or name == "in stages"
    ],
    indirect=["device"],
)
def test_every_way_is_the_cpus(tmp_path: Path, device: str, name: str) -> None:
    with conditions(WAYS[name], file_merge):
        report = check(WAYS[name], tmp_path, device)
    assert report.device.startswith("cuda")
    assert report.fallbacks == {}


@pytest.mark.parametrize("name", ["fused", "DoRA of columns"])
def test_torch_counts_no_more_than_the_bound(tmp_path: Path, device: str, name: str) -> None:
    modules = {"model.layers.0.q_proj": (1500, 700)}
    way = replace(WAYS[name], modules=modules)
    most = (2 << 20) + workspace_bytes(torch.device("cuda", 0))
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    report = check(way, tmp_path, device, device_memory=most)
    assert report.fallbacks == {}
    assert 0 < torch.cuda.max_memory_allocated() - before <= most


def test_a_device_that_runs_out_halves_its_tiles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str
) -> None:
    modules = {"model.layers.0.q_proj": (4096, 2048)}
    way = replace(WAYS["sums"], modules=modules, count=1)
    execute, sizes = file_merge.execute, []

    def noted(*given: Any, **options: Any) -> Any:
        outcome = execute(*given, **options)
        sizes.append(outcome.tile_bytes)
        return outcome

    monkeypatch.setattr(file_merge, "execute", noted)
    torch.cuda.empty_cache()
    total = torch.cuda.mem_get_info()[1]
    # A tile of 32 MiB and what is made of it do not go into it, nor half of both beside cuBLAS.
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved() + (60 << 20)) / total)
    try:
        report = check(way, tmp_path, device, device_memory="8GiB")
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
        torch.cuda.empty_cache()
    assert report.fallbacks == {}
    assert 0 < sizes[0] <= file_merge.TILE_BYTES["cuda"] // 2
