"""Live merges on devices: the CPU's, the simulated one, and CUDA where there is one."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lorafast
import lorafast.torch as live
import numpy as np
import pytest
import torch
from lorafast._torch import in_place, module_plan, program
from support.files import tensor
from support.handmade import PREFIX, adapter_tensors, make_adapter
from support.live_models import MODULES, Model, make, same, state
from support.mutants import ordering_statements, without
from support.simulated_cuda import opened, simulated_cuda

NO_CUDA = pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
DEVICES = ["cpu", "simulated", pytest.param("cuda", marks=[pytest.mark.cuda, NO_CUDA])]


@pytest.fixture
def device(request: pytest.FixtureRequest) -> Iterator[str]:
    with opened(request.param) as name:
        yield name


devices = pytest.mark.parametrize("device", DEVICES, indirect=True)


def dora(path: Path, seed: int = 1) -> Path:
    tensors = adapter_tensors(MODULES, seed=seed, scale=0.1)
    for module, (rows, _) in MODULES.items():
        vector = np.linspace(0.5, 1.5, rows)
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(vector)
    return make_adapter(path, tensors, use_dora=True)


def biases(path: Path) -> Path:
    tensors = adapter_tensors(MODULES, seed=2, scale=0.1)
    tensors[f"{PREFIX}second.bias"] = tensor(np.linspace(-1, 1, 30))
    return make_adapter(path, tensors, bias="all")


def saved(path: Path) -> Path:
    """A norm as a whole, and a bias's own update."""
    tensors = adapter_tensors({"second": MODULES["second"]}, seed=3, scale=0.1)
    for name in ("weight", "bias"):
        tensors[f"{PREFIX}norm.{name}"] = tensor(np.linspace(0.5, 1.5, 30))
    tensors[f"{PREFIX}second.lora_B.bias"] = tensor(np.linspace(0.1, 0.2, 30))
    return make_adapter(path, tensors, modules_to_save=["norm"], lora_bias=True)


KINDS = {
    "plain": lambda folder: [make(folder / "a")],
    "DoRA": lambda folder: [dora(folder / "a")],
    "two with DoRA": lambda folder: [dora(folder / "a"), dora(folder / "b", 4), make(folder / "c")],
    "biases": lambda folder: [biases(folder / "a")],
    "saved modules": lambda folder: [saved(folder / "a")],
    "all": lambda folder: [dora(folder / "a"), biases(folder / "b"), saved(folder / "c")],
}


def assert_near(ours: torch.nn.Module, reference: torch.nn.Module, dtype: torch.dtype) -> None:
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-6)
    for name, value in reference.state_dict().items():
        got = ours.state_dict()[name].cpu().double()
        assert torch.allclose(got, value.double(), rtol=tolerance, atol=1e-6), name


@devices
@pytest.mark.parametrize(
    ("dtype", "keep"), [(torch.float32, "cpu"), (torch.bfloat16, "device")], ids=str
)
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_on_every_device(
    tmp_path: Path, device: str, dtype: torch.dtype, keep: Any, kind: str
) -> None:
    adapters, other = KINDS[kind](tmp_path), biases(tmp_path / "other")
    reference, swapped, model = Model(dtype), Model(dtype), Model(dtype).to(device)
    live.merge_into(reference, adapters)
    live.merge_into(swapped, other)
    before = state(model)
    handle = live.merge_into(model, adapters, keep=keep)
    assert_near(model, reference, dtype)
    handle.swap(other)
    assert_near(model, swapped, dtype)
    handle.swap(adapters)
    assert_near(model, reference, dtype)
    assert handle.unmerge().exact
    assert same(before, state(model))
    with live.applied(model, adapters, keep=keep):
        assert_near(model, reference, dtype)
    assert same(before, state(model))


@devices
def test_products_are_taken_out_again(tmp_path: Path, device: str) -> None:
    for dtype in (torch.float32, torch.float16):
        folder = tmp_path / str(dtype)
        first, second = make(folder / "a"), make(folder / "b", seed=2)
        model = Model(dtype).to(device)
        before = state(model)
        handle = live.merge_into(model, [first, second], keep=None)
        handle.swap(second)
        handle.swap([first, second])
        restoration = handle.unmerge()
        assert not restoration.exact
        off = [
            (before[name].double() - now.double()).abs().max() for name, now in state(model).items()
        ]
        assert max(float(each) for each in off) <= restoration.largest


@devices
def test_a_weight_that_lies_otherwise_and_one_that_is_shared(tmp_path: Path, device: str) -> None:
    adapter = make(tmp_path / "a")
    reference, model = Model(), Model().to(device)
    live.merge_into(reference, adapter)
    with torch.no_grad():
        model.first.weight = torch.nn.Parameter(model.first.weight.detach().T.contiguous().T)
    model.third = torch.nn.Linear(50, 30).to(device)
    model.third.weight = model.second.weight
    assert not model.first.weight.is_contiguous()
    before = state(model)
    handle = live.merge_into(model, adapter)
    assert model.third.weight is not model.second.weight
    for name in MODULES:
        got = model.get_parameter(f"{name}.weight").cpu()
        assert torch.allclose(got, reference.get_parameter(f"{name}.weight"), atol=1e-6)
    handle.unmerge()
    assert model.third.weight is model.second.weight
    assert same(before, state(model))


@devices
def test_an_overflow_changes_nothing(tmp_path: Path, device: str) -> None:
    tensors = adapter_tensors(MODULES, seed=1, scale=0.1)
    name = f"{PREFIX}second.lora_B.weight"
    tensors[name] = tensor(tensors[name].float64() * 1e6)
    model = Model(torch.float16).to(device)
    before = state(model)
    with pytest.raises(lorafast.NumericError, match=r"second\.weight.*float16"):
        live.merge_into(model, make_adapter(tmp_path / "adapter", tensors))
    assert same(before, state(model))


# Only where every order is seen


def found_in_kept_copies(module: Any, adapter: Path) -> list[str]:
    """What is found where the copies that `prepare` made are read by the host at once."""
    with simulated_cuda() as simulator, torch.no_grad():
        model = Model().to("cuda")
        plan = module_plan.plan_module(
            model, adapter, strategy="sequential", weights=None, originals={}
        )
        changed = module.prepare(plan, "cpu", {})
        kept = [each.kept.tolist() for each in changed]
        if not simulator.checker.problems:
            assert kept == [each.tensor.tolist() for each in changed]
    return simulator.checker.problems


def test_kept_copies_are_there_when_they_are_made(tmp_path: Path) -> None:
    adapter = make(tmp_path / "a")
    assert found_in_kept_copies(in_place, adapter) == []
    statements = ordering_statements(in_place)
    for statement in [each for each in statements if ".synchronize(" in each.text]:
        assert found_in_kept_copies(without(in_place, statement), adapter) != [], statement


@pytest.mark.parametrize(
    ("kind", "keep"),
    [(make, "cpu"), (make, "device"), (make, None), (biases, "cpu"), (biases, "device")],
)
def test_all_is_done_on_the_callers_stream(
    tmp_path: Path, kind: Callable[[Path], Path], keep: Any
) -> None:
    """Also what the planner reads of the module, to hold it against what adapters saved."""
    adapters = [kind(tmp_path / "a"), kind(tmp_path / "b")]
    with simulated_cuda() as simulator:
        model = Model().to("cuda")
        before = state(model)
        streams = [torch.cuda.Stream() for _ in range(3)]
        handle = None
        current = torch.cuda.current_stream()
        for stream, adapter in zip(streams, [*adapters, None], strict=True):
            stream.wait_stream(current)
            with torch.cuda.stream(stream):
                if handle is None:
                    # As a step of training would have left it.
                    for parameter in model.parameters():
                        parameter.data.mul_(1.0)
                    handle = live.merge_into(model, adapter, keep=keep)
                elif adapter is not None:
                    handle.swap(adapter)
                else:
                    handle.unmerge()
            current = stream
        torch.cuda.default_stream().wait_stream(current)
        after = state(model)
        assert all(torch.allclose(before[name], after[name], atol=1e-6) for name in before)
        del handle, model
    assert simulator.checker.problems == []


@pytest.mark.parametrize("keep", ["cpu", "device", None])
def test_a_handle_may_be_dropped_while_all_is_still_on_its_way(tmp_path: Path, keep: Any) -> None:
    with simulated_cuda() as simulator:
        model = Model().to("cuda")
        handle = live.merge_into(model, make(tmp_path / "a"), keep=keep)
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            handle.swap(make(tmp_path / "b", seed=2))
        del handle
    assert simulator.checker.problems == []


@pytest.mark.parametrize("keep", ["cpu", "device"])
def test_a_model_over_two_devices(tmp_path: Path, keep: Any) -> None:
    adapters = [dora(tmp_path / "a"), biases(tmp_path / "b")]
    reference = Model()
    live.merge_into(reference, adapters)
    with simulated_cuda(count=2) as simulator:
        model = Model()
        model.first.to("cuda:0")
        model.second.to("cuda:1")
        before = state(model)
        handle = live.merge_into(model, adapters, keep=keep)
        assert [str(each.device) for each in model.parameters()][:2] == ["cuda:0", "cuda:1"]
        assert_near(model, reference, torch.float32)
        handle.unmerge()
        assert same(before, state(model))
    assert simulator.checker.problems == []


@pytest.mark.parametrize("keep", ["cpu", "device", None])
def test_a_swap_without_room_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: Any
) -> None:
    with simulated_cuda() as simulator:
        model = Model().to("cuda")
        handle = live.merge_into(model, make(tmp_path / "a"), keep=keep)
        merged = state(model)
        apply, calls = program.Program.apply, []

        def without_room(*given: Any) -> Any:
            calls.append(1)
            if len(calls) == 2:
                raise torch.OutOfMemoryError("no room")
            return apply(*given)

        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        # What was merged on one stream is merged once more on another.
        with monkeypatch.context() as patch, torch.cuda.stream(side):
            patch.setattr(program.Program, "apply", without_room)
            with pytest.raises(torch.OutOfMemoryError):
                handle.swap(make(tmp_path / "b", seed=2))
            handle.unmerge()
        torch.cuda.current_stream().wait_stream(side)
        now = state(model)
        assert all(torch.allclose(merged[name], now[name], atol=1) for name in now)
        del handle
    assert simulator.checker.problems == []
