"""What the torch backend takes of a device's memory: within the bound, whatever is made."""

from __future__ import annotations

import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import lorafast
import pytest
import torch
from lorafast._io import device_names
from lorafast._torch import memory
from lorafast._torch.device import torch_dtype
from lorafast._torch.program import Program, rounds_once
from support.analysis import random_factors, write_factors
from support.device_merges import WAYS, Inputs, go, inputs
from support.files import read_checkpoint
from support.handmade import adapter_tensors
from support.simulated_cuda import simulated_cuda
from support.simulated_streams import Event

CUDA = torch.device("cuda", 0)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Inputs]:
    return {name: inputs(tmp_path_factory.mktemp("way"), way) for name, way in WAYS.items()}


def programs(files: Inputs, dtype: str) -> list[tuple[Any, torch.dtype, torch.dtype, Any]]:
    plan = lorafast.plan(files.base, files.adapters, dtype=dtype)
    found = []
    for tensor in plan.core.changed_tensors():
        if tensor["updates"]:
            updates = plan.core.operands(tuple(tensor["place"]))
            dtypes = torch_dtype(tensor["dtype"]), torch_dtype(tensor["output_dtype"])
            found.append((updates, *dtypes, tensor))
    return found


@pytest.fixture
def slow_link(monkeypatch: pytest.MonkeyPatch) -> None:
    """Tiles are still on their way when the next ones' turn, and the next tensor's, comes."""
    wait = Event.synchronize

    def slowly(event: Event) -> None:
        time.sleep(0.01)
        wait(event)

    monkeypatch.setattr(Event, "synchronize", slowly)


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
@pytest.mark.parametrize(
    "name", ["fused of F16", "sums", "sums in F64", "DoRA", "DoRA of columns of BF16", "in stages"]
)
def test_programs_and_tiles_take_no_more_than_is_reckoned(
    name: str, dtype: Any, made: dict[str, Inputs]
) -> None:
    for updates, own, output, tensor in programs(made[name], dtype):
        rows, columns = tensor["rows"], tensor["columns"]
        with simulated_cuda() as simulator, torch.no_grad():
            rounds_once(CUDA, output)
            simulator.peak = 0
            program = Program(updates, dtype=own, output=output, device=CUDA)
            assert simulator.peak <= memory.building_bytes(updates, own, output)
            tile = torch.ones(rows, columns, dtype=own, device=CUDA)
            before, simulator.peak = simulator.allocated, 0
            if program.needs_scan:
                whole = {"size": (rows, columns), "dtype": own, "device": CUDA}
                program.scan(lambda given=whole: iter([(0, torch.ones(**given))]))
                # The tile of the scan, and the work on it.
                most = rows * columns * (own.itemsize + program.work_size)
                assert simulator.peak - before <= most + 8192
            before, simulator.peak = simulator.allocated, 0
            result = program.apply(tile, 0)
            torch.aminmax(result)
            most = rows * columns * (output.itemsize + program.work_size)
            assert simulator.peak - before <= most + 8192


@pytest.mark.usefixtures("slow_link")
@pytest.mark.parametrize("rank", [4, 48])
@pytest.mark.parametrize("name", ["fused", "sums", "DoRA of columns"])
def test_a_bound_holds_with_all_that_is_made(tmp_path: Path, name: str, rank: int) -> None:
    own, workspace = WAYS[name], 3 << 20
    modules = {"model.layers.0.q_proj": (600, 350), "model.layers.0.up_proj": (300, 450)}
    way = replace(
        own,
        make=lambda given: own.make(given, rank=rank),
        modules=modules,
        settings=dict(own.settings) | {"r": rank},
        options={"device_memory": workspace + (1 << 20)},
        tile_bytes=32 << 20,
    )
    simulator, report = go(way, inputs(tmp_path, way), tmp_path / "out", workspace=workspace)
    assert report is not None
    assert simulator.checker.problems == []
    assert simulator.peak <= workspace + (1 << 20)
    # Not by leaving all to the CPU.
    assert sum(len(names) for names in report.fallbacks.values()) <= (1 if rank > 4 else 0)
    assert simulator.peak > workspace + (1 << 17)


@pytest.mark.usefixtures("slow_link")
def test_programs_that_fill_the_bound_follow_each_other(tmp_path: Path) -> None:
    modules = {f"model.layers.{number}.q_proj": (300, 300) for number in range(4)}
    way = replace(
        WAYS["fused"],
        make=lambda given: adapter_tensors(given, rank=64),
        modules=modules,
        settings={"r": 64},
        options={"device_memory": 1 << 20},
        tile_bytes=32 << 20,
    )
    simulator, report = go(way, inputs(tmp_path, way), tmp_path / "out")
    assert report is not None
    assert report.fallbacks == {}
    # Two programs would not fit.
    assert 16 * 64 * 600 * 1.3 < simulator.peak <= 1 << 20


def test_a_bound_below_cublas_own_workspace_leaves_all_to_the_cpu(
    made: dict[str, Inputs], tmp_path: Path
) -> None:
    files = made["fused"]
    with simulated_cuda(workspace=32 << 20) as simulator:
        report = lorafast.merge(
            files.base, files.adapters, tmp_path / "out", device="cuda", device_memory="16MiB"
        )
    assert simulator.peak == 0
    ((reason, names),) = report.fallbacks.items()
    assert "memory" in reason
    assert len(names) == 3
    lorafast.merge(files.base, files.adapters, tmp_path / "cpu")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "cpu")


def test_the_workspace_where_torch_does_not_say(monkeypatch: pytest.MonkeyPatch) -> None:
    with simulated_cuda(workspace=5 << 20):
        assert memory.workspace_bytes(CUDA) == 5 << 20
        assert memory.workspace_bytes(torch.device("cpu")) == 0
        monkeypatch.delattr(torch.backends.cuda, "cublas_workspace_size")
        monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
        assert memory.workspace_bytes(CUDA) == 32 << 20
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
        assert memory.workspace_bytes(CUDA) == (4096 * 2 + 16 * 8) << 10
        monkeypatch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:2:16:8")
        assert memory.workspace_bytes(CUDA) == (4096 * 2 + 16 * 8) << 10
        monkeypatch.undo()


@pytest.mark.parametrize(
    ("precision", "ranks"), [("float32", (8,)), ("float64", (8,)), ("float32", (8, 5))]
)
def test_a_similarity_takes_what_it_may(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, precision: Any, ranks: tuple[int, ...]
) -> None:
    most = 400_000
    monkeypatch.setattr(device_names, "parse_memory", lambda *arguments: most)
    for number in range(40):
        factors = random_factors({"m": (90, 125, ranks[number % len(ranks)])}, seed=number)
        write_factors(tmp_path / f"{number}", factors, dtype="F32")
    with simulated_cuda() as simulator:
        found = lorafast.similarity(tmp_path, precision=precision, device="cuda")
    assert len(found.names) == 40
    assert simulator.checker.problems == []
    assert most / 4 < simulator.peak <= most
