"""MLX's adapters of random factors, and float64 references made from its formulas."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np

from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import MODULES

Array = np.ndarray[Any, np.dtype[np.float64]]


EXPERTS, HIDDEN, WIDTH = 3, 20, 12


MLP = "model.layers.0.mlp"


#: One matrix of an expert: its name, (out, in).
MATRICES = {
    "gate_proj": (WIDTH, HIDDEN),
    "up_proj": (WIDTH, HIDDEN),
    "down_proj": (HIDDEN, WIDTH),
}


EMBEDDING = "model.embed_tokens"


def factors(
    modules: Mapping[str, tuple[int, int]] = MODULES, *, rank: int = 4, dtype: str = "F32"
) -> dict[str, Tensor]:
    """Factors as MLX stores them, of modules with these (out, in)."""
    random = np.random.default_rng(3)
    tensors = {}
    for module, (outputs, inputs) in modules.items():
        a, b = random.normal(size=(inputs, rank)), random.normal(size=(rank, outputs))
        tensors[f"{module}.lora_a"] = tensor(0.1 * a, dtype)
        tensors[f"{module}.lora_b"] = tensor(0.1 * b, dtype)
    return tensors


def expert_factors(*, rank: int = 4, flat: bool = False) -> dict[str, Tensor]:
    random = np.random.default_rng(4)
    tensors = {}
    for name, (outputs, inputs) in MATRICES.items():
        a = 0.1 * random.normal(size=(EXPERTS, rank, inputs))
        b = 0.1 * random.normal(size=(EXPERTS, outputs, rank))
        tensors[f"{MLP}.switch_mlp.{name}.lora_a"] = tensor(a.reshape(-1, inputs) if flat else a)
        tensors[f"{MLP}.switch_mlp.{name}.lora_b"] = tensor(b)
    return tensors


def config(**settings: Any) -> dict[str, Any]:
    parameters = {"rank": 4, "scale": 1.5, "dropout": 0.0}
    usual = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": parameters}
    return usual | {"model": "mlx-community/base", "iters": 100} | settings


def make_mlx(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    whole: Mapping[str, Any] | None = None,
    **settings: Any,
) -> Path:
    path.mkdir(parents=True)
    write_safetensors(path / "adapters.safetensors", tensors, {"format": "mlx"})
    text = json.dumps(config(**settings) if whole is None else whole)
    (path / "adapter_config.json").write_text(text)
    return path


def delta(tensors: Mapping[str, Tensor], module: str, scale: float = 1.5) -> Array:
    a, b = (tensors[f"{module}.lora_{part}"].float64() for part in "ab")
    return scale * (a @ b).T


def assert_merged(base: Path, output: Path, expected: Mapping[str, Array]) -> None:
    """That these tensors are the expected ones, and all others the base's own."""
    before, after = read_checkpoint(base), read_checkpoint(output)
    assert list(before) == list(after)
    for name, value in after.items():
        if name in expected:
            assert not np.allclose(before[name].float64(), expected[name], atol=1e-3), name
            assert np.allclose(value.float64(), expected[name], rtol=1e-5, atol=1e-6), name
        else:
            assert value == before[name], name


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, bytes]:
    lorafast.merge(base, adapter, output, **options)
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
