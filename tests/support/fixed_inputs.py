"""Bases and adapters whose bytes are the same on every machine and with every release of NumPy.

They are told as shapes: what a tensor holds follows from its name and a seed. The numbers are raw
bits of PCG64, whose stream NumPy promises to keep, unlike those of its distributions.
"""

from __future__ import annotations

import json
import math
import zlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from support.files import Tensor, read_safetensors, tensor
from support.handmade import TORCH, adapter_config, make_adapter, write_checkpoint
from support.quantised import Scheme
from support.reference import PREFIX

Shapes = Mapping[str, tuple[int, ...]]
Settings = Mapping[str, Any]


def numbers(name: str, shape: tuple[int, ...], scale: float) -> NDArray[np.float64]:
    """Uniform in ±scale, chosen by the name."""
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(math.prod(shape))
    return (scale * ((bits >> np.uint64(11)) * 2.0**-52 - 1)).reshape(shape)


def values(name: str, shape: tuple[int, ...], scale: float, seed: int) -> NDArray[np.float64]:
    """A tensor's numbers; norms and DoRA's magnitudes lie around 1."""
    if "norm" in name or "magnitude" in name:
        return 1 + numbers(f"{seed} {name}", shape, 0.5)
    return numbers(f"{seed} {name}", shape, scale)


@dataclass(frozen=True)
class Base:
    """A checkpoint.

    Attributes:
        shapes: of its tensors, by name.
        dtype: of them all.
        shards: of the checkpoint.
        config: entries of its config.json.
        scheme: how the matrices among the tensors are quantised.
        equal: tensors that are others again, by name.
    """

    shapes: Shapes
    dtype: str = "BF16"
    shards: int = 1
    config: Settings = field(default_factory=dict)
    scheme: Scheme | None = None
    equal: Mapping[str, str] = field(default_factory=dict)

    def write(self, path: Path) -> Path:
        path.mkdir(parents=True)
        tensors: dict[str, Tensor] = {}
        config = {"model_type": "llama", "torch_dtype": TORCH[self.dtype]} | dict(self.config)
        for name, shape in self.shapes.items():
            weight = values(name, shape, 0.1, 0)
            if self.scheme is not None and len(shape) == 2:
                tensors |= self.scheme.quantise(name, weight)
            else:
                tensors[name] = tensor(weight, self.dtype)
        tensors |= {name: tensors[other] for name, other in self.equal.items()}
        if self.scheme is not None:
            config["quantization_config"] = dict(self.scheme.config)
        write_checkpoint(path, tensors, shards=self.shards)
        (path / "config.json").write_text(json.dumps(config))
        return path


@dataclass(frozen=True)
class Adapter:
    """An adapter.

    Attributes:
        shapes: of its tensors, by their keys without PEFT's prefix.
        settings: entries of its config.
        dtype: of its tensors.
        seed: of its numbers.
        equal: tensors that are others again, by key.
        transposes: tensors that are others' transposes, by key.
        pickled: its tensors are in adapter_model.bin.
    """

    shapes: Shapes
    settings: Settings = field(default_factory=dict)
    dtype: str = "F32"
    seed: int = 1
    equal: Mapping[str, str] = field(default_factory=dict)
    transposes: Mapping[str, str] = field(default_factory=dict)
    pickled: bool = False

    def write(self, path: Path) -> Path:
        arrays = {key: values(key, shape, 0.3, self.seed) for key, shape in self.shapes.items()}
        arrays |= {key: arrays[other] for key, other in self.equal.items()}
        arrays |= {key: arrays[other].T for key, other in self.transposes.items()}
        tensors = {PREFIX + key: tensor(array, self.dtype) for key, array in arrays.items()}
        config = adapter_config(**{"lora_alpha": 6, "target_modules": ["x"]} | dict(self.settings))
        return make_adapter(path, tensors, config=config)


def pickle(adapter: Path) -> None:
    """Puts the tensors of an adapter, of float32, into a pickle."""
    import torch

    weights = adapter / "adapter_model.safetensors"
    state = {
        key: torch.from_numpy(value.float64().astype(np.float32))
        for key, value in read_safetensors(weights).items()
    }
    torch.save(state, adapter / "adapter_model.bin")
    weights.unlink()


def linear(*modules: str, of: Shapes, rank: int = 4, dora: bool = False, bias: bool = False) -> Any:
    """The shapes of factors on modules whose weights a base has as (out, in)."""
    shapes: dict[str, tuple[int, ...]] = {}
    for module in modules:
        rows, columns = of[f"{module}.weight"]
        shapes[f"{module}.lora_A.weight"] = (rank, columns)
        shapes[f"{module}.lora_B.weight"] = (rows, rank)
        if dora:
            shapes[f"{module}.lora_magnitude_vector"] = (rows,)
        if bias:
            shapes[f"{module}.lora_B.bias"] = (rows,)
    return shapes


def turned(*modules: str, of: Shapes, rank: int = 4, dora: bool = False) -> Any:
    """The same of weights stored (in, out)."""
    whole = {f"{module}.weight": of[f"{module}.weight"][::-1] for module in modules}
    return linear(*modules, of=whole, rank=rank, dora=dora)


def embedding(module: str, of: Shapes, rank: int = 4, *, dora: bool = False) -> Any:
    tokens, width = of[f"{module}.weight"]
    shapes = {
        f"{module}.lora_embedding_A": (rank, tokens),
        f"{module}.lora_embedding_B": (width, rank),
    }
    return shapes | ({f"{module}.lora_magnitude_vector": (1, width)} if dora else {})


def convolution(module: str, of: Shapes, rank: int = 4, *, dora: bool = False) -> Any:
    outputs, inputs, *kernel = of[f"{module}.weight"]
    ones = (1,) * len(kernel)
    shapes = {
        f"{module}.lora_A.weight": (rank, inputs, *kernel),
        f"{module}.lora_B.weight": (outputs, rank, *ones),
    }
    return shapes | ({f"{module}.lora_magnitude_vector": (1, outputs, *ones)} if dora else {})


def experts(module: str, count: int, outputs: int, inputs: int, rank: int = 4) -> Any:
    """Factors of all experts together, on a parameter of theirs."""
    return {
        f"{module}.lora_A.weight": (count * rank, inputs),
        f"{module}.lora_B.weight": (outputs, count * rank),
    }
