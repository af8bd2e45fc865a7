"""What is no adapter of MLX's: one sentence says why, and nothing is written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_safetensors, tensor, write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.mlx_files import (
    MLP,
    factors,
    make_mlx,
)
from support.reference import PREFIX

MODULE = next(iter(MODULES))


BROKEN: dict[str, tuple[dict[str, Any], dict[str, Tensor | None], str]] = {
    "no scale": ({"lora_parameters": {"rank": 4}}, {}, "has no scale"),
    "alpha alone": ({"lora_parameters": {"rank": 4, "alpha": 8}}, {}, "no setting of MLX's"),
    "no lora_a": ({}, {f"{MODULE}.lora_a": None}, "but not its lora_a"),
    "no lora_b": ({}, {f"{MODULE}.lora_b": None}, "but not its lora_b"),
    "m alone": ({}, {f"{MODULE}x.m": tensor(np.ones(3))}, "but not its factors"),
    "ranks": ({}, {f"{MODULE}.lora_b": tensor(np.ones((3, 24)))}, "no pair of factors"),
    "another rank": (
        {"lora_parameters": {"rank": 8, "scale": 2.0}},
        {},
        "rank 4 but its config gives every module rank 8",
    ),
    "three dimensions": ({}, {f"{MODULE}.lora_b": tensor(np.ones((4, 6, 4)))}, "no pair"),
    "a magnitude": ({}, {f"{MODULE}.m": tensor(np.ones(24))}, "does not set fine_tune_type"),
    "no magnitude": ({"fine_tune_type": "dora"}, {}, "no magnitude for"),
    "its length": (
        {"fine_tune_type": "dora"},
        {f"{MODULE}.m": tensor(np.ones(7))},
        r"has shape \[7\]",
    ),
    "a whole weight": (
        {},
        {"model.norm.weight": tensor(np.ones(20))},
        "no part of a LoRA of MLX's",
    ),
    "mixed with PEFT's": (
        {},
        {f"{PREFIX}{MODULE}.lora_A.weight": tensor(np.ones((4, 20)))},
        "no part of a LoRA of MLX's",
    ),
    "integers": ({}, {f"{MODULE}.lora_a": tensor(np.ones((20, 4)), "I32")}, "floating-point"),
    "another training": ({"fine_tune_type": "prefix"}, {}, "fine_tune_type"),
    "rank of text": ({"lora_parameters": {"rank": "4", "scale": 1.0}}, {}, "whole number"),
    "infinite": ({"lora_parameters": {"rank": 4, "scale": 1e999}}, {}, "JSON|finite"),
    "twice": (
        {},
        {
            f"{MLP}.experts.up_proj.lora_a": tensor(np.ones((2, 4, 20))),
            f"{MLP}.experts.up_proj.lora_b": tensor(np.ones((2, 12, 4))),
            f"{MLP}.switch_mlp.up_proj.lora_a": tensor(np.ones((2, 4, 20))),
            f"{MLP}.switch_mlp.up_proj.lora_b": tensor(np.ones((2, 12, 4))),
        },
        "which are one module",
    ),
}


@pytest.mark.parametrize("name", BROKEN)
def test_what_is_broken_is_said_in_one_sentence(name: str, tmp_path: Path) -> None:
    settings, changes, sentence = BROKEN[name]
    tensors: dict[str, Tensor] = dict(factors())
    for key, value in changes.items():
        if value is None:
            del tensors[key]
        else:
            tensors[key] = value
    adapter = make_mlx(tmp_path / "mlx", tensors, **settings)
    base = make_base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match=sentence) as raised:
        lorafast.merge(base, adapter, tmp_path / "out")
    assert str(adapter) in str(raised.value)
    assert not (tmp_path / "out").exists()


def test_weights_of_mlx_beside_a_config_of_peft_are_no_adapter(tmp_path: Path) -> None:
    adapter = make_mlx(tmp_path / "mlx", factors(), whole={"peft_type": "LORA", "r": 4})
    with pytest.raises(lorafast.AdapterError, match="the weights beside it are MLX's"):
        lorafast.inspect(adapter)


def test_adapters_without_its_keys_are_not_mlx_s(tmp_path: Path) -> None:
    """PEFT's own files keep their format, whatever lies beside."""
    peft = make_adapter(tmp_path / "peft", adapter_tensors())
    write_safetensors(peft / "adapters.safetensors", factors())
    base = make_base(tmp_path / "base")
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"adapters\.safetensors"):
        lorafast.plan(base, peft)
    assert read_safetensors(peft / "adapter_model.safetensors")


def test_without_its_config_what_needs_no_scale_is_said(tmp_path: Path) -> None:
    tensors = factors()
    file = write_safetensors(tmp_path / "adapters.safetensors", tensors)
    base = make_base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match=r"holds no adapter_config\.json.*scale"):
        lorafast.plan(base, file)
    assert lorafast.inspect(file).to_dict()["adapter"]["alpha"] is None
    given = lorafast.analyze(file, scale=1.5)
    own = lorafast.analyze(make_mlx(tmp_path / "mlx", tensors))
    for module in MODULES:
        norm = own.modules[module].frobenius_norm
        assert given.modules[module].frobenius_norm == norm
