"""Adapters and key lists that others made, random files of the lists, and bases of their shapes."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from safetensors.numpy import save_file

Array = npt.NDArray[Any]
Shape = tuple[int, ...]

DATA = Path(
    os.environ.get("LORAFAST_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
#: diffusers' classes of the lists' families, with the arguments that give the lists' widths.
CLASSES: dict[str, tuple[str, dict[str, Any]]] = {
    "flux1": ("FluxTransformer2DModel", {"guidance_embeds": True}),
    "krea2": ("Krea2Transformer2DModel", {}),
    "cosmos2": ("CosmosTransformer3DModel", {"num_layers": 1}),
    "qwen_image": ("QwenImageTransformer2DModel", {"num_layers": 2}),
    # The lists of Anima have text and modulation as wide as the model.
    "anima": (
        "CosmosTransformer3DModel",
        {
            "num_layers": 1,
            "num_attention_heads": 16,
            "text_embed_dim": 2048,
            "adaln_lora_dim": 2048,
        },
    ),
}


def same(extent: int) -> int:
    return extent


def narrowed(extent: int) -> int:
    """A width made 32 times smaller; ranks stay."""
    return extent // 32 if extent >= 256 else extent


def shapes_of(family: str) -> dict[str, Shape]:
    """The parameters of diffusers' class."""
    import diffusers
    import torch

    class_name, arguments = CLASSES[family]
    with torch.device("meta"):
        model = getattr(diffusers, class_name)(**arguments)
    return {name: tuple(value.shape) for name, value in model.state_dict().items()}


def listed(name: str) -> dict[str, Shape]:
    keys: Mapping[str, list[int]] = json.loads((DATA / "keys" / f"{name}.json").read_text())["keys"]
    return {key: tuple(shape) for key, shape in keys.items()}


def random_file(name: str, path: Path, width: Callable[[int], int] = same) -> Path:
    """Random tensors of the shapes of a list."""
    random = np.random.default_rng(1)

    def value(key: str, shape: Shape) -> Array:
        if key.endswith(".alpha"):
            return np.full(shape, 8, np.float16)
        if width is not same:
            values = random.normal(scale=0.1, size=tuple(map(width, shape)))
            return values.astype(np.float32)
        # The values do not matter, and large tensors take time.
        block = random.normal(size=min(int(np.prod(shape)), 1024)).astype(np.float16)
        return np.resize(block, shape)

    save_file({key: value(key, shape) for key, shape in listed(name).items()}, path)
    return path


def sparse(path: Path, shapes: dict[str, tuple[int, ...]]) -> Path:
    """A checkpoint of these shapes without content, which takes no room on the disk."""
    entries, end = {}, 0
    for name, shape in shapes.items():
        start, end = end, end + 2 * int(np.prod(shape))
        entries[name] = {"dtype": "BF16", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    header += b" " * (-len(header) % 8)
    with path.open("wb") as file:
        file.write(len(header).to_bytes(8, "little") + header)
        file.truncate(8 + len(header) + end)
    return path
