"""Merges of MLX's adapters against the weights that mlx-lm fuses."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import read_checkpoint, tensor
from support.handmade import make_base
from support.mlx_files import (
    EMBEDDING,
    MLP,
    make_mlx,
)


def layer(name: str, kind: str) -> tuple[Any, Any]:
    """A layer of MLX's, and the same with a LoRA or a DoRA of mlx-lm's."""
    nn = pytest.importorskip("mlx.nn", reason="mlx is not installed (pip install mlx[cpu])")
    lora = pytest.importorskip("mlx_lm.tuner.lora", reason="mlx-lm is not installed")
    dora = pytest.importorskip("mlx_lm.tuner.dora")
    switch = pytest.importorskip("mlx_lm.models.switch_layers")
    layers = {
        "linear": lambda: nn.Linear(20, 24, bias=False),
        "embedding": lambda: nn.Embedding(30, 20),
        "experts": lambda: switch.SwitchLinear(20, 12, 3, bias=False),
    }
    kinds = {
        ("linear", "lora"): lora.LoRALinear,
        ("linear", "dora"): dora.DoRALinear,
        ("embedding", "lora"): lora.LoRAEmbedding,
        ("embedding", "dora"): dora.DoRAEmbedding,
        ("experts", "lora"): lora.LoRASwitchLinear,
    }
    base = layers[name]()
    return base, kinds[name, kind].from_base(base, r=4, scale=1.5)


PATHS = {
    "linear": "model.layers.0.self_attn.q_proj",
    "embedding": EMBEDDING,
    "experts": f"{MLP}.switch_mlp.up_proj",
}


@pytest.mark.parametrize(
    ("name", "kind"),
    [("linear", "lora"), ("linear", "dora"), ("embedding", "lora"), ("embedding", "dora"),
     ("experts", "lora")],
)  # fmt: skip
def test_mlx_lm_fuses_to_the_same_weights(name: str, kind: str, tmp_path: Path) -> None:
    base, adapted = layer(name, kind)
    mx = pytest.importorskip("mlx.core")
    random = np.random.default_rng(1)
    for part in ("lora_a", "lora_b", *(["m"] if kind == "dora" else [])):
        shape = getattr(adapted, part).shape
        setattr(adapted, part, mx.array(np.abs(random.normal(size=shape)).astype(np.float32)))
    trained = {
        f"{PATHS[name]}.{part}": tensor(np.array(getattr(adapted, part)))
        for part in ("lora_a", "lora_b", *(["m"] if kind == "dora" else []))
    }
    weight = f"{PATHS[name]}.weight"
    others = {weight: tensor(np.array(base.weight))}
    checkpoint = make_base(tmp_path / "base", others=others, modules={})
    adapter = make_mlx(tmp_path / "mlx", trained, fine_tune_type=kind)
    lorafast.merge(checkpoint, adapter, tmp_path / "out")
    fused = np.array(adapted.fuse().weight)
    found = read_checkpoint(tmp_path / "out")[weight].float64()
    assert np.allclose(found, fused, rtol=1e-4, atol=1e-5)
