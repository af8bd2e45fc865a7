"""Factors in other programs' layouts and under their names: every command says what they are."""

from __future__ import annotations

from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import read_checkpoint, tensor
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX
from support.refusal import refuses

A, B = ".lora_A", ".lora_B"


def test_convolutions_are_still_read(tmp_path: Path) -> None:
    random = np.random.default_rng(1)
    others = {"conv.weight": tensor(random.normal(size=(5, 1, 3)))}
    base = make_base(tmp_path / "base", others=others)
    tensors = {
        f"{PREFIX}conv{A}.weight": tensor(random.normal(size=(4, 1, 3))),
        f"{PREFIX}conv{B}.weight": tensor(random.normal(size=(5, 4, 1))),
    }
    adapter = make_adapter(tmp_path / "adapter", tensors)
    lorafast.merge(base, adapter, tmp_path / "out")
    found = read_checkpoint(tmp_path / "out")["conv.weight"].float64()
    a, b = (value.float64() for value in tensors.values())
    right = others["conv.weight"].float64() + 2 * (b[:, :, 0] @ a.reshape(4, 3)).reshape(5, 1, 3)
    assert np.allclose(found, right, atol=1e-6)


def test_transposed_factors_are_called_so(tmp_path: Path) -> None:
    module = "model.layers.0.mlp.up_proj"
    tensors = {
        f"{PREFIX}{module}{A}.weight": tensor(np.ones((20, 4))),
        f"{PREFIX}{module}{B}.weight": tensor(np.ones((4, 50))),
    }
    adapter = make_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(
        lorafast.UnsupportedAdapterError, match=r"transposes of factors of rank 4.*MLX"
    ):
        lorafast.inspect(adapter)


@pytest.mark.parametrize(
    ("ending", "words"),
    [
        (".lora_a", "MLX"),
        (".lora_b.weight", "torchtune"),
        (".adapter.linear_in.weight", "Megatron"),
        (".lora_down.weight", "kohya"),
        (".lokr_w1", "LoKr"),
        (".hada_w2_b", "LoHa"),
        (".oft_R.weight", "OFT"),
        (".dora_scale", "LyCORIS"),
        (".lora_E", "not known"),
    ],
)
def test_names_of_other_programs_are_called_theirs(tmp_path: Path, ending: str, words: str) -> None:
    base = make_base(tmp_path / "base")
    key = f"{PREFIX}model.layers.0.mlp.up_proj{ending}"
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | {key: tensor(np.ones((4, 4)))})
    refuses(tmp_path, lorafast.UnsupportedAdapterError, base, adapter, key, words, "not read yet")
    with pytest.raises(lorafast.UnsupportedAdapterError, match=words):
        lorafast.inspect(adapter)
