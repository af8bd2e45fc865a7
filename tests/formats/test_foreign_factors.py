"""Factors in other programs' layouts and under their names: every command says what they are."""

from __future__ import annotations

from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX
from support.refusal import refuses

EXPERTS = "model.layers.0.mlp.experts.gate_up_proj"
A, B = ".lora_A", ".lora_B"


def pair(a: tuple[int, ...], b: tuple[int, ...], end: str = ".weight") -> dict[str, Tensor]:
    return {
        f"{PREFIX}{EXPERTS}{A}{end}": tensor(np.ones(a)),
        f"{PREFIX}{EXPERTS}{B}{end}": tensor(np.ones(b)),
    }


LAYOUTS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "[experts, rank, in]": ((8, 4, 20), (8, 50, 4)),
    "A shared by all": ((1, 4, 20), (8, 50, 4)),
    "B shared by all": ((8, 4, 20), (1, 50, 4)),
    "[experts, in, rank]": ((8, 20, 4), (8, 4, 50)),
    "MLX before": ((32, 20), (8, 50, 4)),
    "B flat": ((8, 4, 20), (50, 32)),
}


@pytest.mark.parametrize("end", [".weight", ".default.weight", ""])
@pytest.mark.parametrize("layout", LAYOUTS)
def test_experts_in_one_tensor_are_called_so(tmp_path: Path, layout: str, end: str) -> None:
    base = make_base(tmp_path / "base")
    tensors = pair(*LAYOUTS[layout], end)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors() | tensors)
    says = ["factors of 8 experts", f"experts.gate_up_proj{A}{end} of shape", "not read yet"]
    raised = refuses(tmp_path, lorafast.UnsupportedAdapterError, base, adapter, *says)
    assert "kernel" not in str(raised)
    for look in (lorafast.inspect, lorafast.analyze):
        with pytest.raises(lorafast.UnsupportedAdapterError) as error:
            look(adapter)
        assert all(words in str(error.value) for words in says)
    scanned = lorafast.scan(adapter)
    assert len(scanned.errors) == 1
    assert "factors of 8 experts" in scanned.errors[0].reason


def test_a_rank_of_one_is_told_from_a_convolution(tmp_path: Path) -> None:
    """Four experts of rank 1 with four outputs have a convolution's shapes; the rank tells."""
    tensors = pair((4, 1, 20), (4, 4, 1))
    adapter = make_adapter(tmp_path / "experts", tensors, r=1)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="factors of 4 experts"):
        lorafast.inspect(adapter)


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


def test_kohya_s_experts_are_called_so(tmp_path: Path) -> None:
    path = tmp_path / "experts.safetensors"
    key = "lora_unet_model_layers_0_mlp_experts_gate_up_proj"
    write_safetensors(
        path,
        {
            f"{key}.lora_down.weight": tensor(np.ones((8, 4, 20))),
            f"{key}.lora_up.weight": tensor(np.ones((8, 50, 4))),
        },
    )
    with pytest.raises(lorafast.UnsupportedAdapterError, match="factors of 8 experts"):
        lorafast.inspect(path)
