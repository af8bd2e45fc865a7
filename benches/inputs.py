"""Checkpoints and adapters of a given shape, made of random numbers, for the benchmarks.

A sparse checkpoint has headers and holes: it reads as zeros and takes no room.
"""

from __future__ import annotations

import json
import struct
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = {name: code for code, name in TORCH_NAMES.items()}
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool

    def linear(self) -> dict[str, tuple[int, int]]:
        """The Linear weights of one layer: name -> (out, in)."""
        key_value = self.hidden // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name, shape in self.linear().items():
                yield f"{prefix}.{name}.weight", shape
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self, dtype: str) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "torch_dtype": TORCH_NAMES[dtype],
        }


class Noise:
    """Normal numbers in a dtype, taken from different places of one pool: fast to make."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        # A prime length, so that no tensor repeats another's rows.
        values = self.random.standard_normal(4_194_301, dtype=np.float32) * np.float32(0.02)
        self.pool: NDArray[np.generic]
        if dtype == "BF16":
            self.pool = (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
        else:
            self.pool = values.astype({"F32": "<f4", "F16": "<f2"}[dtype])

    def chunks(self, count: int) -> Iterator[memoryview]:
        while count > 0:
            begin = int(self.random.integers(len(self.pool) // 2))
            part = self.pool[begin : begin + count]
            yield memoryview(part).cast("B")
            count -= len(part)


def write_safetensors(
    path: Path,
    tensors: dict[str, tuple[int, ...]],
    dtype: str,
    noise: Noise,
    *,
    sparse: bool = False,
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + int(np.prod(shape)) * noise.pool.itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        if sparse:
            file.truncate(8 + len(text) + offset)
            return
        for shape in tensors.values():
            for chunk in noise.chunks(int(np.prod(shape))):
                file.write(chunk)


def make_checkpoint(
    path: Path, shape: Shape, dtype: str, shards: int, *, sparse: bool = False
) -> int:
    """Write the checkpoint and return the size of its tensors in bytes."""
    return make_model(
        path, dict(shape.tensors()), shape.config(dtype), dtype, shards, sparse=sparse
    )


def make_model(
    path: Path,
    everything: dict[str, tuple[int, ...]],
    config: dict[str, object],
    dtype: str,
    shards: int,
    *,
    sparse: bool = False,
) -> int:
    """Write a model of any tensors and return their size in bytes."""
    path.mkdir()
    noise = Noise(dtype, 1)
    sizes = {name: int(np.prod(s)) * noise.pool.itemsize for name, s in everything.items()}
    total = sum(sizes.values())
    weight_map: dict[str, str] = {}
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    before = 0
    for name, size in sizes.items():
        parts[min(before * shards // total, shards - 1)][name] = everything[name]
        before += size
    for number, part in enumerate(parts, start=1):
        file = (
            f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        )
        write_safetensors(path / file, part, dtype, noise, sparse=sparse)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(config, indent=2))
    return total


def make_adapter(
    path: Path, shape: Shape, targets: list[str], *, rank: int, dtype: str, seed: int
) -> None:
    path.mkdir()
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linear().items():
            if name.split(".")[-1] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = (rank, columns)
                tensors[f"{prefix}.lora_B.weight"] = (rows, rank)
    if not tensors:
        sys.exit(f"error: no linear layer is called any of {targets}")
    write_adapter(path, tensors, targets, rank=rank, dtype=dtype, seed=seed)


def write_adapter(
    path: Path,
    tensors: dict[str, tuple[int, ...]],
    targets: list[str],
    *,
    rank: int,
    dtype: str,
    seed: int,
    dora: bool = False,
) -> None:
    """Write an adapter of those tensors, into a directory that is there."""
    write_safetensors(path / "adapter_model.safetensors", tensors, dtype, Noise(dtype, seed))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "use_dora": dora,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
