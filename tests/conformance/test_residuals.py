"""Adapters whose initialisation took a part of the base's weights out of them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lorafast
import numpy as np
import pytest
from matrix import lora
from support.compare import assert_merged_like_float64
from support.files import read_checkpoint, tensor, write_safetensors
from support.models import Models, state
from support.reference import merge_float64
from toys import Toys, merge_with_peft


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


def with_settings(adapter: Path, path: Path, **settings: object) -> Path:
    shutil.copytree(adapter, path)
    config = path / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | settings))
    return path


@pytest.mark.parametrize("strategy", ["sequential", "weighted"])
def test_each_takes_its_own_part_out_of_the_base(
    toys: Toys, tmp_path: Path, strategy: lorafast.Strategy
) -> None:
    base = toys.base("layers")
    kinds = ({"init_lora_weights": "pissa"}, {"init_lora_weights": "olora"}, {"kasa_config": {}})
    adapters = [
        toys.adapter(f"residual-{number}", base, lora("lin0", "nobias", **kind), seed=number)
        for number, kind in enumerate(kinds)
    ]
    weights = [0.5, -0.25, 2.0] if strategy == "weighted" else None
    lorafast.merge(
        base, adapters, tmp_path / "out", strategy=strategy, weights=weights, verify=True
    )
    terms = merge_float64(read_checkpoint(base), adapters, strategy=strategy, weights=weights)
    assert_merged_like_float64(read_checkpoint(tmp_path / "out"), terms)


def test_a_randomised_decomposition_is_a_warning(toys: Toys, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(toys.base("layers"), base)
    tensors = read_checkpoint(base)
    # One component that stands out, which an iteration finds.
    values = tensors["lin0.weight"].float64() + 0.3
    write_safetensors(base / "model.safetensors", tensors | {"lin0.weight": tensor(values, "F32")})
    settings = lora("lin0", r=1, init_lora_weights="pissa")
    adapter = toys.adapter("pissa-one", base, settings)
    randomised = with_settings(adapter, tmp_path / "a", init_lora_weights="pissa_niter_16")
    lorafast.merge(base, adapter, tmp_path / "exact")
    report = lorafast.merge(base, randomised, tmp_path / "out")
    assert any("randomised" in warning for warning in report.warnings)
    theirs = state(merge_with_peft(base, [randomised]))["lin0.weight"].float64()
    ours = read_checkpoint(tmp_path / "out")
    assert np.abs(ours["lin0.weight"].float64() - theirs).max() <= 1e-5 * np.abs(theirs).max()
    assert ours == read_checkpoint(tmp_path / "exact")


def test_a_rank_that_leaves_nothing_is_refused(toys: Toys, tmp_path: Path) -> None:
    base = toys.base("layers")
    adapter = toys.adapter("kasa-whole", base, lora("nobias", r=36, kasa_config={}))
    narrow = tmp_path / "base"
    shutil.copytree(base, narrow)
    tensors = read_checkpoint(narrow)
    tensors["nobias.weight"] = tensor(np.zeros((36, 61)), "F32")
    write_safetensors(narrow / "model.safetensors", tensors)
    name = "base_model.model.nobias.lora_B.weight"
    path = with_settings(adapter, tmp_path / "adapter")
    factors = read_checkpoint(path / "adapter_model.safetensors")
    factors[name] = tensor(factors[name].float64()[:36], "F32")
    write_safetensors(path / "adapter_model.safetensors", factors)
    with pytest.raises(lorafast.PlanError, match="rank 36 leaves nothing"):
        lorafast.merge(narrow, path, tmp_path / "out")


def test_a_weight_that_is_not_finite_is_refused(toys: Toys, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(toys.base("layers"), base)
    adapter = toys.adapter(
        "pissa-alone", toys.base("layers"), lora("lin0", init_lora_weights="pissa")
    )
    tensors = read_checkpoint(base)
    values = tensors["lin0.weight"].float64()
    values[3, 4] = np.inf
    tensors["lin0.weight"] = tensor(values, "F32")
    write_safetensors(base / "model.safetensors", tensors)
    with pytest.raises(lorafast.LorafastError, match=r"lin0\.weight: holds numbers that are not"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_only_linear_layers_begin_so(toys: Toys, tmp_path: Path) -> None:
    base = toys.base("layers")
    adapter = toys.adapter("pissa-elsewhere", base, lora("convolution2"))
    changed = with_settings(adapter, tmp_path / "adapter", init_lora_weights="pissa")
    with pytest.raises(lorafast.PlanError, match="convolution2 is no plain linear layer"):
        lorafast.merge(base, changed, tmp_path / "out")
