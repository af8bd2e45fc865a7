"""GGUF files written by hand, so that malformed ones can be made too, and llama.cpp's orders."""

from __future__ import annotations

import os
import struct
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
from numpy.typing import NDArray

from support.files import Tensor, tensor
from support.handmade import make_adapter, make_base
from support.reference import PREFIX

#: ggml's numbers of types.
TYPES = {"F32": 0, "F16": 1, "Q8_0": 8, "F64": 28, "BF16": 30}
#: A metadata value with the type that it is written in: u32, f32, text, u32 array.
U32, F32, TEXT, ARRAY = 4, 6, 8, 9
HEADS = {"num_attention_heads": 6, "num_key_value_heads": 3, "hidden_size": 20}
#: Module -> (out, in), of heads of four rows.
LLAMA = {
    "model.embed_tokens": (30, 20),
    "model.layers.0.self_attn.q_proj": (24, 20),
    "model.layers.0.self_attn.k_proj": (12, 20),
    "model.layers.0.self_attn.v_proj": (12, 20),
    "model.layers.1.self_attn.o_proj": (20, 24),
    "model.layers.1.mlp.gate_proj": (50, 20),
    "model.layers.1.mlp.up_proj": (50, 20),
    "model.layers.1.mlp.down_proj": (20, 50),
    "lm_head": (30, 20),
}
TENSORS = {
    "embed_tokens": "token_embd",
    "q_proj": "attn_q",
    "k_proj": "attn_k",
    "v_proj": "attn_v",
    "o_proj": "attn_output",
    "gate_proj": "ffn_gate",
    "up_proj": "ffn_up",
    "down_proj": "ffn_down",
    "lm_head": "output",
}
Factors = dict[str, tuple[NDArray[Any], NDArray[Any]]]


def text(value: str | bytes) -> bytes:
    raw = value.encode() if isinstance(value, str) else value
    return struct.pack("<Q", len(raw)) + raw


def entry(key: str, value: Any) -> bytes:
    """An entry of the metadata."""
    if isinstance(value, str):
        return text(key) + struct.pack("<I", TEXT) + text(value)
    if isinstance(value, float):
        return text(key) + struct.pack("<If", F32, value)
    if isinstance(value, list):
        numbers = b"".join(struct.pack("<I", number) for number in value)
        return text(key) + struct.pack("<IIQ", ARRAY, U32, len(value)) + numbers
    return text(key) + struct.pack("<II", U32, value)


def encode(
    tensors: Mapping[str, Tensor],
    metadata: Mapping[str, Any],
    *,
    version: int = 3,
    alignment: int = 32,
) -> bytes:
    """A whole file. Shapes are given in NumPy's order."""
    if alignment != 32:
        metadata = {**metadata, "general.alignment": alignment}
    head = b"GGUF" + struct.pack("<IQQ", version, len(tensors), len(metadata))
    head += b"".join(entry(key, value) for key, value in metadata.items())
    data = b""
    for name, value in tensors.items():
        head += text(name) + struct.pack("<I", len(value.shape))
        head += b"".join(struct.pack("<Q", extent) for extent in reversed(value.shape))
        head += struct.pack("<IQ", TYPES[value.dtype], len(data))
        data += value.data + bytes(-len(value.data) % alignment)
    return head + bytes(-len(head) % alignment) + data


def adapter_metadata(architecture: str = "llama", alpha: float | None = 8.0) -> dict[str, Any]:
    """What convert_lora_to_gguf.py writes."""
    metadata: dict[str, Any] = {
        "general.architecture": architecture,
        "general.type": "adapter",
        "adapter.type": "lora",
    }
    return metadata if alpha is None else metadata | {"adapter.lora.alpha": float(alpha)}


def write(path: Path, content: bytes) -> Path:
    """A file that nobody has just written, so that no reader waits for its writer."""
    path.write_bytes(content)
    os.utime(path, (1_700_000_000, 1_700_000_000))
    return path


def permuted(rows: NDArray[Any], heads: int) -> NDArray[Any]:
    """llama.cpp's `LlamaModel.permute`: the halves of each head, interleaved."""
    halves = rows.reshape(heads, 2, rows.shape[0] // heads // 2, *rows.shape[1:])
    return np.ascontiguousarray(halves.swapaxes(1, 2).reshape(rows.shape))


def regrouped(rows: NDArray[Any], heads: int, groups: int) -> NDArray[Any]:
    """What llama.cpp makes of Falcon's fused rows, and with a group a head of Bloom's and
    GPT-NeoX's: all queries, all keys, all values.
    """
    each = rows.reshape(groups, heads // groups + 2, -1, rows.shape[1])
    parts = (each[:, :-2], each[:, [-2]], each[:, [-1]])
    return np.concatenate([part.reshape(-1, rows.shape[1]) for part in parts])


def values_last(rows: NDArray[Any], keys: int, values: int) -> NDArray[Any]:
    """What llama.cpp makes of the heads of values of linear attention."""
    heads = rows.reshape(keys, values // keys, rows.shape[0] // values, *rows.shape[1:])
    return np.ascontiguousarray(heads.swapaxes(0, 1).reshape(rows.shape))


def factors(modules: Mapping[str, tuple[int, int]], rank: int = 4, seed: int = 3) -> Factors:
    """A (r, in) and B (out, r) of each; of embeddings A has a column for each token."""
    random = np.random.default_rng(seed)
    made = {}
    for module, shape in modules.items():
        rows, columns = reversed(shape) if is_embedding(module) else shape
        a, b = random.normal(size=(rank, columns)), random.normal(size=(rows, rank))
        made[module] = (0.1 * a, 0.1 * b)
    return made


def is_embedding(module: str) -> bool:
    return module.endswith(("embed_tokens", "wte", "word_embeddings", "embed_in"))


def peft(path: Path, made: Factors, dtype: str = "F32", **settings: Any) -> Path:
    tensors = {}
    for module, (a, b) in made.items():
        names = ("lora_A.weight", "lora_B.weight")
        if is_embedding(module):
            names = ("lora_embedding_A", "lora_embedding_B")
        tensors[f"{PREFIX}{module}.{names[0]}"] = tensor(a, dtype)
        tensors[f"{PREFIX}{module}.{names[1]}"] = tensor(b, dtype)
    targets = sorted({module.rsplit(".", 1)[-1] for module in made})
    return make_adapter(path, tensors, **({"target_modules": targets} | settings))


def name_of(module: str) -> str:
    parts = module.split(".")
    own = TENSORS[parts[-1]]
    return (
        f"blk.{parts[2]}.{own}.weight"
        if parts[0] == "model" and "layers" in parts
        else f"{own}.weight"
    )


def arrays(made: Factors, heads: tuple[int, int] | None = (6, 3)) -> dict[str, NDArray[Any]]:
    """The same as llama.cpp's script stores it, in float64."""
    stored = {}
    for module, (a, b) in made.items():
        name = name_of(module)
        moves = heads is not None and module.endswith(("q_proj", "k_proj"))
        stored[f"{name}.lora_a"] = np.ascontiguousarray(a.T) if is_embedding(module) else a
        stored[f"{name}.lora_b"] = (
            permuted(b, heads[module.endswith("k_proj")]) if heads is not None and moves else b
        )
    return stored


def gguf_adapter(path: Path, made: Factors, dtype: str = "F32", **how: Any) -> Path:
    metadata = how.pop("metadata", None) or adapter_metadata(alpha=how.pop("alpha", 8.0))
    tensors = arrays(made, how.pop("heads", (6, 3)))
    return of_arrays(path, tensors, metadata, dtype, **how)


def of_arrays(
    path: Path,
    stored: Mapping[str, NDArray[Any]],
    metadata: Mapping[str, Any],
    dtype: str = "F32",
    **how: Any,
) -> Path:
    tensors = {name: tensor(value, dtype) for name, value in stored.items()}
    return write(path, encode(tensors, metadata, **how))


def llama_base(path: Path, **config: Any) -> Path:
    return make_base(path, modules=LLAMA, config=HEADS | config)


def merged(base: Path, adapter: Path, output: Path, **options: Any) -> dict[str, bytes]:
    lorafast.merge(base, adapter, output, **options)
    return {path.name: path.read_bytes() for path in output.glob("*.safetensors")}
