"""Combinations beside PEFT's `add_weighted_adapter`: the same where it is right, and a mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.algebra import distance, updates_of, write_toy

pytest.importorskip("peft")


@pytest.fixture
def trained(tmp_path: Path) -> tuple[Any, list[Path]]:
    """A PEFT model with two adapters, and the adapters as they are saved."""
    import torch
    from peft import LoraConfig, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, num_key_value_heads=2))
    common = {"target_modules": ["q_proj", "down_proj"], "init_lora_weights": False}
    peft = get_peft_model(model, LoraConfig(r=4, lora_alpha=6, **common), adapter_name="one")
    peft.add_adapter("two", LoraConfig(r=3, lora_alpha=5, **common))
    peft.save_pretrained(tmp_path / "saved", selected_adapters=["one", "two"])
    return peft, [tmp_path / "saved" / "one", tmp_path / "saved" / "two"]


def peft_updates(model: Any, adapter: str) -> dict[str, np.ndarray[Any, Any]]:
    found = {}
    for name, module in model.named_modules():
        if hasattr(module, "get_delta_weight"):
            update = module.get_delta_weight(adapter).detach().double().numpy()
            found[name.removeprefix("base_model.model.")] = update
    return found


@pytest.mark.parametrize("rank", [2, 5])
@pytest.mark.parametrize("weights", [[1.0, 1.0], [0.7, 0.3]])
def test_a_recompressed_sum_is_that_of_its_svd(
    trained: tuple[Any, list[Path]], tmp_path: Path, rank: int, weights: list[float]
) -> None:
    model, adapters = trained
    model.add_weighted_adapter(["one", "two"], weights, "sum", "svd", svd_rank=rank)
    lorafast.combine(adapters, tmp_path / "out", weights=weights, rank=rank)
    assert distance(updates_of(tmp_path / "out"), peft_updates(model, "sum")) < 5e-6


def test_a_sum_side_by_side_is_that_of_its_cat(
    trained: tuple[Any, list[Path]], tmp_path: Path
) -> None:
    model, adapters = trained
    model.add_weighted_adapter(["one", "two"], [1.0, 0.5], "sum", "cat")
    report = lorafast.combine(adapters, tmp_path / "out", weights=[1.0, 0.5])
    assert set(report.ranks.values()) == {7}
    assert distance(updates_of(tmp_path / "out"), peft_updates(model, "sum")) < 5e-6


def test_what_is_written_loads_in_peft(trained: tuple[Any, list[Path]], tmp_path: Path) -> None:
    model, adapters = trained
    lorafast.combine(adapters, tmp_path / "out", weights=[1.0, -0.5], rank="energy:0.8")
    model.load_adapter(tmp_path / "out", "ours")
    wanted = updates_of(tmp_path / "out")
    assert distance(peft_updates(model, "ours"), wanted) < 1e-6
    lorafast.bake(adapters[0], tmp_path / "stable", rslora=True)
    model.load_adapter(tmp_path / "stable", "stable")
    assert distance(peft_updates(model, "stable"), updates_of(adapters[0])) < 1e-6


def test_a_sum_of_factors_is_no_sum_of_updates(tmp_path: Path) -> None:
    """What PEFT calls linear has cross terms: 53 % beside the sum of the toys."""
    paths = [write_toy(tmp_path, name) for name in "XY"]
    tensors = [load_file(path / "adapter_model.safetensors") for path in paths]
    weights, scales = (1.0, -0.5), (2.0, 1.0)
    factors = []
    for part in ("lora_A", "lora_B"):
        total = np.zeros(())
        for own, weight, scale in zip(tensors, weights, scales, strict=True):
            [factor] = [value for name, value in own.items() if part in name]
            root = np.sqrt(abs(weight) * scale)
            total = total + (np.sign(weight) * root if part == "lora_B" else root) * factor
        factors.append(total)
    linear = factors[1] @ factors[0]
    lorafast.combine(paths, tmp_path / "out", weights=weights)
    [exact] = updates_of(tmp_path / "out").values()
    off = np.linalg.norm(linear - exact) / np.linalg.norm(exact)
    assert off == pytest.approx(0.527985, abs=1e-6)
