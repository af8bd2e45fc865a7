"""Small checkpoints and adapters written by hand, without torch."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from support.files import Tensor, layout, tensor, write_safetensors
from support.reference import PREFIX

# Module path -> (out, in).
MODULES = {
    "model.layers.0.self_attn.q_proj": (24, 20),
    "model.layers.0.mlp.up_proj": (50, 20),
    "model.layers.1.self_attn.q_proj": (24, 20),
    "model.layers.1.mlp.up_proj": (50, 20),
}


def make_base(
    path: Path,
    *,
    modules: Mapping[str, tuple[int, int]] = MODULES,
    dtype: str = "F32",
    seed: int = 0,
    shards: int = 1,
    scale: float = 0.05,
    config: Mapping[str, Any] | None = None,
    others: Mapping[str, Tensor] | None = None,
    stem: str = "model",
) -> Path:
    """A checkpoint with these Linear weights, a norm, and whatever `others` holds."""
    path.mkdir(parents=True)
    random = np.random.default_rng(seed)
    tensors = {
        f"{module}.weight": tensor(random.normal(scale=scale, size=shape), dtype)
        for module, shape in modules.items()
    }
    tensors["model.norm.weight"] = tensor(1 + random.normal(scale=scale, size=20), dtype)
    tensors.update(others or {})
    write_checkpoint(path, tensors, shards=shards, stem=stem)
    (path / "config.json").write_text(
        json.dumps({"model_type": "llama", "torch_dtype": TORCH[dtype]} | dict(config or {}))
    )
    (path / "tokenizer.json").write_text('{"tokens": ["a", "b"]}')
    return path


TORCH = {"F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16"}


def write_checkpoint(
    path: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, stem: str = "model"
) -> None:
    metadata = {"format": "pt", "note": "kept"}
    if shards == 1:
        write_safetensors(path / f"{stem}.safetensors", tensors, metadata)
        return
    names = list(tensors)
    weight_map = {}
    for number in range(shards):
        file = f"{stem}-{number + 1:05}-of-{shards:05}.safetensors"
        part = names[number::shards]
        write_safetensors(path / file, {name: tensors[name] for name in part}, metadata)
        weight_map.update(dict.fromkeys(part, file))
    total = sum(len(value.data) for value in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (path / f"{stem}.safetensors.index.json").write_text(json.dumps(index))


def adapter_config(**settings: Any) -> dict[str, Any]:
    """A config as PEFT writes it, with these entries set."""
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "base",
        "r": 4,
        "lora_alpha": 8,
        "lora_dropout": 0.0,
        "target_modules": ["q_proj", "up_proj"],
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "init_lora_weights": True,
        "use_rslora": False,
        "use_dora": False,
        "lora_bias": False,
        "modules_to_save": None,
        "rank_pattern": {},
        "alpha_pattern": {},
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
        "loftq_config": {},
        "megatron_config": None,
        "megatron_core": "megatron.core",
        "revision": None,
    } | settings


def adapter_tensors(
    modules: Mapping[str, tuple[int, int]] = MODULES,
    *,
    rank: int = 4,
    dtype: str = "F32",
    seed: int = 1,
    scale: float = 0.1,
) -> dict[str, Tensor]:
    random = np.random.default_rng(seed)
    tensors = {}
    for module, (rows, columns) in modules.items():
        a = random.normal(scale=scale, size=(rank, columns))
        b = random.normal(scale=scale, size=(rows, rank))
        tensors[f"{PREFIX}{module}.lora_A.weight"] = tensor(a, dtype)
        tensors[f"{PREFIX}{module}.lora_B.weight"] = tensor(b, dtype)
    return tensors


def make_adapter(
    path: Path,
    tensors: Mapping[str, Tensor] | None = None,
    *,
    config: Mapping[str, Any] | str | None = None,
    **settings: Any,
) -> Path:
    """An adapter directory; `settings` change the usual config, `config` replaces it."""
    path.mkdir(parents=True)
    text = config if isinstance(config, str) else json.dumps(config or adapter_config(**settings))
    (path / "adapter_config.json").write_text(text)
    rank = settings.get("r", 4)
    write_safetensors(
        path / "adapter_model.safetensors",
        adapter_tensors(rank=rank) if tensors is None else tensors,
        {"format": "pt"},
    )
    return path


def rewrite_header(path: Path, change: Any) -> None:
    """Apply `change` to a sound file's header dict and write it back, whatever it says then."""
    from support.files import encode, read_safetensors

    header, body = layout(read_safetensors(path))
    change(header)
    path.write_bytes(encode(json.dumps(header), body))


def names(modules: Sequence[str] | Mapping[str, Any] = MODULES) -> list[str]:
    return [f"{module}.weight" for module in modules]
