"""Merging into loaded modules: taking out again, swapping, refusing, nothing left half-done."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import lorafast.torch as live
import numpy as np
import pytest
import torch
from lorafast._torch import in_place
from lorafast._torch import program as device_program
from support.files import tensor
from support.handmade import PREFIX, adapter_tensors, make_adapter
from support.live_models import MODULES, Model, make, same, state


def delta(adapter: Path, module: str) -> torch.Tensor:
    from safetensors.torch import load_file

    tensors = load_file(adapter / "adapter_model.safetensors")
    a, b = (tensors[f"{PREFIX}{module}.lora_{side}.weight"].double() for side in "AB")
    return 8 / 4 * b @ a


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make(tmp_path / "adapter")


DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


@pytest.mark.parametrize("keep", ["cpu", "device", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_in_and_out_again(adapter: Path, dtype: torch.dtype, keep: Any) -> None:
    model = Model(dtype)
    before, pointer = state(model), model.first.weight.data_ptr()
    handle = live.merge_into(model, adapter, keep=keep)
    assert handle.tensors == ["first.weight", "second.weight"]
    assert model.first.weight.data_ptr() == pointer
    for name in MODULES:
        old = before[f"{name}.weight"].double()
        expected = (old + delta(adapter, name)).to(dtype)
        got = model.state_dict()[f"{name}.weight"]
        assert torch.allclose(got.double(), expected.double(), rtol=1e-6, atol=1e-7)
    restoration = handle.unmerge()
    after = state(model)
    assert not handle.active
    if keep is not None:
        assert restoration == live.Restoration(exact=True)
        assert same(before, after)
        return
    assert not restoration.exact
    off = max((before[name] - after[name]).abs().max().item() for name in before)
    assert 0 < restoration.largest < 2 * torch.finfo(dtype).eps
    assert off <= restoration.largest
    assert 0 < restoration.relative < 20 * torch.finfo(dtype).eps


def test_weights_and_strategies(adapter: Path, tmp_path: Path) -> None:
    other = make(tmp_path / "other", seed=2)
    model = Model()
    before = state(model)
    both = [adapter, other]
    with live.applied(model, both, strategy="weighted", weights=[0.7, -0.3]):
        change = model.first.weight.detach().double() - before["first.weight"].double()
        expected = 0.7 * delta(adapter, "first") - 0.3 * delta(other, "first")
        assert torch.allclose(change, expected, atol=1e-6)
    assert same(before, state(model))
    with pytest.raises(ValueError, match="weights"):
        live.merge_into(model, both, strategy="weighted", weights=[1.0])


def test_blocks_within_blocks(adapter: Path, tmp_path: Path) -> None:
    model = Model()
    before = state(model)
    with live.applied(model, adapter):
        outer = state(model)
        with live.applied(model, make(tmp_path / "other", seed=2)):
            assert not same(outer, state(model))
        assert same(outer, state(model))
    assert same(before, state(model))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_the_bound_holds_after_many_swaps(tmp_path: Path, dtype: torch.dtype) -> None:
    adapters = [
        make_adapter(tmp_path / f"{seed}", adapter_tensors(MODULES, seed=seed, scale=3.0))
        for seed in range(4)
    ]
    model = Model(dtype)
    before = state(model)
    handle = live.merge_into(model, adapters[0], keep=None)
    for count in range(24):
        handle.swap(adapters[(count + 1) % 4])
    # The last one leaves a tensor alone that the others changed.
    handle.swap(make(tmp_path / "part", modules={"second": MODULES["second"]}))
    restoration = handle.unmerge()
    off = max(
        (before[name].double() - now.double()).abs().max() for name, now in state(model).items()
    )
    assert 0 < off <= restoration.largest < 300 * off


def test_autocast_changes_nothing(tmp_path: Path) -> None:
    tensors = adapter_tensors(MODULES, scale=0.1)
    for name, (rows, _) in MODULES.items():
        tensors[f"{PREFIX}{name}.lora_magnitude_vector"] = tensor(np.linspace(0.5, 1.5, rows))
    adapter = make_adapter(tmp_path / "dora", tensors, use_dora=True)
    plain, within = Model(), Model()
    live.merge_into(plain, adapter)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        live.merge_into(within, adapter)
    assert same(state(plain), state(within))


def test_two_parameters_in_one_memory_are_refused(adapter: Path) -> None:
    model = Model()
    model.third = torch.nn.Linear(20, 50, bias=False)
    model.third.weight = torch.nn.Parameter(model.first.weight.detach())
    before = state(model)
    with pytest.raises(lorafast.PlanError, match=r"first\.weight and third\.weight are two"):
        live.merge_into(model, adapter)
    assert same(before, state(model))


def test_a_model_of_another_dtype_than_when_it_was_merged(adapter: Path) -> None:
    model = Model()
    handle = live.merge_into(model, adapter)
    model.to(torch.bfloat16)
    with pytest.raises(lorafast.LorafastError, match="another dtype"):
        handle.unmerge()


def test_inference_tensors(adapter: Path) -> None:
    with torch.inference_mode():
        model = Model()
    with pytest.raises(lorafast.LorafastError, match="inference tensor"):
        live.merge_into(model, adapter)
    with torch.inference_mode():
        before = state(model)
        handle = live.merge_into(model, adapter)
        handle.unmerge()
        assert same(before, state(model))


def test_a_block_that_raises_is_undone(adapter: Path) -> None:
    model = Model()
    before = state(model)

    def fail() -> None:
        with live.applied(model, adapter):
            assert not same(before, state(model))
            raise ZeroDivisionError

    with pytest.raises(ZeroDivisionError):
        fail()
    assert same(before, state(model))
    with live.applied(model, adapter) as handle:
        handle.unmerge()
    assert same(before, state(model))


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("keep", ["cpu", "device", None])
def test_a_swap_is_the_other_merge(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, keep: Any, fused: bool
) -> None:
    monkeypatch.setattr(device_program, "rounds_once", lambda *arguments: fused)
    dtype = torch.bfloat16
    partial = {"second": MODULES["second"]}
    other = make(tmp_path / "other", seed=5, modules=partial, r=4)
    model, reference = Model(dtype), Model(dtype)
    before = state(model)
    handle = live.merge_into(model, adapter, keep=keep)
    handle.swap(other)
    live.merge_into(reference, other)
    assert handle.adapters == [str(other)]
    assert handle.tensors == ["second.weight"]
    if keep is None:
        for name, value in reference.state_dict().items():
            assert torch.allclose(
                model.state_dict()[name].double(), value.double(), rtol=2**-7, atol=2**-10
            )
    else:
        assert same(state(reference), state(model))
    # And to one that changes more again.
    handle.swap([other, adapter])
    assert sorted(handle.tensors) == ["first.weight", "second.weight"]
    restoration = handle.unmerge()
    if keep is not None:
        assert restoration.exact
        assert same(before, state(model))
    else:
        for name, value in before.items():
            assert torch.allclose(model.state_dict()[name].double(), value.double(), atol=2**-7)


def interrupted(call: int) -> Any:
    """A `Program.apply` that is interrupted at that call."""
    apply, calls = device_program.Program.apply, []

    def fail(program: Any, tile: Any, first: int, out: Any = None) -> Any:
        calls.append(first)
        if len(calls) == call:
            raise KeyboardInterrupt
        return apply(program, tile, first, out)

    return fail


def test_a_swap_that_fails_changes_nothing(
    adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for keep in ("cpu", None):
        model = Model()
        handle = live.merge_into(model, adapter, keep=keep)
        merged = state(model)
        with pytest.raises(lorafast.PlanError, match="third"):
            handle.swap(make(tmp_path / f"misfit-{keep}", modules={"third": (4, 4)}))
        assert same(merged, state(model))
        other = make(tmp_path / f"other-{keep}", seed=3)
        with monkeypatch.context() as patch:
            patch.setattr(device_program.Program, "apply", interrupted(2))
            with pytest.raises(KeyboardInterrupt):
                handle.swap(other)
        now = state(model)
        if keep is not None:
            assert same(merged, now)
        assert all(torch.allclose(merged[name], now[name], atol=1e-6) for name in now)
        handle.swap(other)
        handle.unmerge()


def test_an_interrupted_merge_is_undone(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(in_place, "TILE_ELEMENTS", {"cpu": 200})
    for keep in ("cpu", None):
        model = Model()
        before = state(model)
        with monkeypatch.context() as patch:
            # In the middle of the second tensor.
            patch.setattr(device_program.Program, "apply", interrupted(8))
            with pytest.raises(KeyboardInterrupt):
                live.merge_into(model, adapter, keep=keep)
        now = state(model)
        assert all(torch.allclose(before[name], now[name], atol=1e-6) for name in now)
        assert keep is None or same(before, now)


def test_a_pickled_adapter_with_biases(tmp_path: Path) -> None:
    tensors = adapter_tensors(MODULES, seed=1, scale=0.1)
    model = Model()
    # One bias is the model's own again, which replaces nothing; the other's is another.
    tensors[f"{PREFIX}second.bias"] = tensor(model.second.bias.detach().double().numpy())
    plain = make_adapter(tmp_path / "plain", tensors, bias="all")
    pickled = make_adapter(tmp_path / "pickled", tensors, bias="all")
    from safetensors.torch import load_file

    weights = pickled / "adapter_model.safetensors"
    torch.save(load_file(weights), pickled / "adapter_model.bin")
    weights.unlink()
    names = []
    for adapter in (plain, pickled):
        with live.applied(model, adapter) as handle:
            names.append(handle.tensors)
    assert names[0] == names[1] == ["first.weight", "second.weight"]
    tensors[f"{PREFIX}second.bias"] = tensor(np.full(30, 0.5))
    other = make_adapter(tmp_path / "other", tensors, bias="all")
    with live.applied(model, other) as handle:
        assert sorted(handle.tensors) == ["first.weight", "second.bias", "second.weight"]
        assert (model.second.bias == 0.5).all()


# What is refused, by name, with nothing changed


def refused(model: torch.nn.Module, adapter: Any, *says: str, **options: Any) -> None:
    before = {name: id(value) for name, value in model.named_parameters()}
    held = {name: value.clone() for name, value in model.named_parameters() if not value.is_meta}
    with pytest.raises(lorafast.LorafastError) as caught:
        live.merge_into(model, adapter, **options)
    for part in says:
        assert part in str(caught.value)
    assert {name: id(value) for name, value in model.named_parameters()} == before
    for name, value in model.named_parameters():
        assert value.is_meta or torch.equal(value, held[name])


def test_a_module_without_the_layers(adapter: Path, tmp_path: Path) -> None:
    refused(torch.nn.ModuleDict({"other": torch.nn.Linear(20, 50)}), adapter, "first", "module")
    refused(Model(), make(tmp_path / "wide", modules={"first": (50, 21)}), "[50, 21]", "[50, 20]")


def test_meta_tensors(adapter: Path) -> None:
    refused(Model(device="meta"), adapter, "first.weight", "meta device", "device_map")
    model = Model()
    model.second.to("meta")
    refused(model, adapter, "second.weight", "meta device")


def test_untouched_meta_tensors_do_no_harm(tmp_path: Path) -> None:
    model = Model()
    model.norm.to("meta")
    live.merge_into(model, make(tmp_path / "adapter")).unmerge()


def test_sharded_tensors(adapter: Path, tmp_path: Path) -> None:
    from torch import distributed
    from torch.distributed.tensor import distribute_tensor, init_device_mesh

    distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        model = Model()
        mesh = init_device_mesh("cpu", (1,))
        model.first.weight = torch.nn.Parameter(
            distribute_tensor(model.first.weight.detach(), mesh)
        )
        with pytest.raises(lorafast.PlanError, match=r"first\.weight is sharded.*DTensor"):
            live.merge_into(model, adapter)
    finally:
        distributed.destroy_process_group()


class Params4bit(torch.nn.Parameter):
    """As bitsandbytes calls its own: codes of another shape."""


def test_quantised_parameters(adapter: Path) -> None:
    model = Model()
    codes = torch.zeros(500, 1, dtype=torch.uint8)
    model.first.weight = Params4bit(codes, requires_grad=False)
    refused(model, adapter, "first.weight is quantised (Params4bit)")
    model = Model()
    codes = torch.zeros(50, 20).to(torch.float8_e4m3fn)
    model.first.weight = torch.nn.Parameter(codes, requires_grad=False)
    with pytest.raises(lorafast.PlanError, match=r"first\.weight is quantised.*float8_e4m3fn"):
        live.merge_into(model, adapter)


def test_layers_of_packed_weights(adapter: Path) -> None:
    class QuantLinear(torch.nn.Module):
        """As GPTQ's: no weight of that name."""

        in_features, out_features = 20, 50

        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("qweight", torch.zeros(3, 50, dtype=torch.int32))

    model = Model()
    model.first = QuantLinear()
    refused(model, adapter, "GPTQ", "first")


def test_a_peft_model(adapter: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(Model(), LoraConfig(target_modules=["first"]))
    refused(model, adapter, "first is wrapped by PEFT", "unload")


def test_what_no_subtraction_undoes(tmp_path: Path) -> None:
    tensors = adapter_tensors(MODULES, seed=1, scale=0.1)
    for module, (rows, _) in MODULES.items():
        tensors[f"{PREFIX}{module}.lora_magnitude_vector"] = tensor(np.ones(rows))
    dora = make_adapter(tmp_path / "dora", tensors, use_dora=True)
    refused(Model(), dora, "first.weight", "keep='cpu'", keep=None)
    saved = adapter_tensors(MODULES, seed=1, scale=0.1)
    saved[f"{PREFIX}second.bias"] = tensor(np.ones(30))
    whole = make_adapter(tmp_path / "whole", saved, bias="all")
    refused(Model(), whole, "second.bias", "keep='cpu'", keep=None)


def test_an_overflow(tmp_path: Path) -> None:
    tensors = adapter_tensors(MODULES, seed=1, scale=0.1)
    name = f"{PREFIX}second.lora_B.weight"
    tensors[name] = tensor(tensors[name].float64() * 1e6)
    adapter = make_adapter(tmp_path / "adapter", tensors)
    for keep in ("cpu", None):
        model = Model(torch.float16)
        before = state(model)
        with pytest.raises(lorafast.NumericError, match=r"second\.weight.*float16.*row \d+"):
            live.merge_into(model, adapter, keep=keep)
        assert same(before, state(model))
    # Where the sum could leave the range and does not, it is made.
    small = Model(torch.float16)
    small.second.weight.data.zero_()
    tensors[name] = tensor(tensors[name].float64() / 1e3)
    live.merge_into(small, make_adapter(tmp_path / "large", tensors))
    assert small.second.weight.isfinite().all()
    assert small.second.weight.abs().max() > 16


def test_somebody_elses_change_is_not_overwritten(adapter: Path, tmp_path: Path) -> None:
    model = Model()
    before = state(model)
    first = live.merge_into(model, adapter)
    second = live.merge_into(model, make(tmp_path / "other", seed=2))
    with pytest.raises(lorafast.LorafastError, match=r"first\.weight was changed since"):
        first.unmerge()
    second.unmerge()
    with pytest.raises(lorafast.LorafastError, match="not merged in any more"):
        second.unmerge()
    model.first.weight = torch.nn.Parameter(model.first.weight.detach().clone())
    with pytest.raises(lorafast.LorafastError, match=r"first\.weight is another tensor"):
        first.unmerge()
    assert not same(before, state(model))


@pytest.mark.parametrize("keep", ["gpu", "disk", True])
def test_a_wrong_keep(adapter: Path, keep: Any) -> None:
    with pytest.raises(ValueError, match="keep"):
        live.merge_into(Model(), adapter, keep=keep)
    with pytest.raises(ValueError, match="dict"):
        live.merge_into({}, adapter)  # type: ignore[arg-type]  # wrong on purpose


def test_without_torch(adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    model = Model()
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(lorafast.MissingDependencyError, match=r"lorafast\[torch\]"):
        live.merge_into(model, adapter)


# Modules of other makes


@pytest.mark.filterwarnings("ignore:`torch.jit.script_method`:DeprecationWarning")
def test_wrappers_and_layouts_of_memory(adapter: Path) -> None:
    reference = Model()
    live.merge_into(reference, adapter)
    model = Model()
    # Not row after row, and shared by a wrapper.
    model.first.weight = torch.nn.Parameter(model.first.weight.detach().T.contiguous().T)
    assert not model.first.weight.is_contiguous()
    before = state(model)
    handle = live.merge_into(torch.compile(model), adapter)
    assert same(state(reference), state(model))
    handle.unmerge()
    assert same(before, state(model))
    handle = live.merge_into(torch.nn.DataParallel(model), adapter, keep=None)
    assert same(state(reference), state(model))
    assert handle.unmerge().largest < 1e-6


def test_weights_that_need_gradients_and_inference_tensors(adapter: Path) -> None:
    model = Model()
    assert model.first.weight.requires_grad
    live.merge_into(model, adapter)
    model.first(torch.ones(1, 20)).sum().backward()
    assert model.first.weight.grad is not None
    with torch.inference_mode():
        frozen = Model()
    before = state(frozen)
    with torch.inference_mode():
        handle = live.merge_into(frozen, adapter)
        assert not same(before, state(frozen))
        handle.unmerge()
    assert same(before, state(frozen))


def test_a_square_weight_lies_as_its_layer_has_it(tmp_path: Path) -> None:
    from transformers.pytorch_utils import Conv1D

    modules = {"c_fc": (24, 24), "proj": (24, 24)}
    adapter = make(tmp_path / "adapter", modules=modules)
    for kinds in ((Conv1D, torch.nn.Linear), (torch.nn.Linear, Conv1D)):
        model = torch.nn.ModuleDict(
            {name: kind(24, 24) for name, kind in zip(modules, kinds, strict=True)}
        )
        before = state(model)
        live.merge_into(model, adapter)
        for name, kind in zip(modules, kinds, strict=True):
            change = (model[name].weight - before[f"{name}.weight"]).detach().double()
            expected = delta(adapter, name).T if kind is Conv1D else delta(adapter, name)
            assert torch.allclose(change, expected, atol=1e-6), (name, kind)


def test_layers_that_share_a_weight(adapter: Path) -> None:
    model = torch.nn.ModuleDict({"first": torch.nn.Linear(20, 50), "second": Model().second})
    model["third"] = torch.nn.Linear(20, 50)
    model["third"].weight = model["first"].weight
    before = state(model)
    shared = model["first"].weight
    handle = live.merge_into(model, adapter)
    assert model["third"].weight is shared
    assert torch.equal(model["third"].weight, before["third.weight"])
    assert not torch.equal(model["first"].weight, before["first.weight"])
    assert "has its own now" in handle.notes[-1]
    with pytest.raises(lorafast.LorafastError, match="parted"):
        handle.swap(adapter)
    handle.unmerge()
    assert model["first"].weight is shared
    assert same(before, state(model))


@pytest.mark.cuda
@pytest.mark.skipif(not torch.cuda.is_available(), reason="torch sees no CUDA device")
@pytest.mark.parametrize("keep", ["cpu", "device", None])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_on_cuda(adapter: Path, dtype: torch.dtype, keep: Any) -> None:
    reference, model = Model(dtype), Model(dtype).cuda()
    before = state(model)
    live.merge_into(reference, adapter)
    handle = live.merge_into(model, adapter, keep=keep)
    for name, value in reference.state_dict().items():
        got = model.state_dict()[name]
        assert got.is_cuda
        tolerance = 2 * torch.finfo(dtype).eps
        assert torch.allclose(
            got.cpu().double(), value.double(), rtol=max(tolerance, 1e-6), atol=1e-6
        )
    handle.swap(adapter)
    restoration = handle.unmerge()
    assert restoration.exact == (keep is not None)
    assert keep is None or same(before, state(model))
