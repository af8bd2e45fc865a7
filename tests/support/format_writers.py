"""Writers of one layer's adapter in every format, which share no code with lorafast."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from support.files import Tensor, tensor, write_safetensors
from support.gguf_files import adapter_metadata, encode
from support.handmade import adapter_config

PEFT = "base_model.model."


@dataclass(frozen=True)
class Layer:
    """What is to be written: the parts under the names that kohya and LyCORIS give them."""

    modules: tuple[str, ...]
    kind: str
    algorithm: str
    rank: int
    parts: Mapping[str, Tensor]

    @property
    def module(self) -> str:
        (module,) = self.modules
        return module

    @property
    def alpha(self) -> float:
        """The alpha that a config has to give."""
        value = self.parts.get("alpha")
        return float(self.rank) if value is None else float(value.float64())

    def weights(self) -> dict[str, Tensor]:
        """The parts without the alpha."""
        return {name: value for name, value in self.parts.items() if name != "alpha"}


Writer = Callable[[Path, Layer], Path]


def shaped(value: Tensor, *shape: int) -> Tensor:
    return Tensor(value.dtype, np.empty(value.shape, "i1").reshape(shape).shape, value.data)


def turned(value: Tensor) -> Tensor:
    """The transpose, of whatever type."""
    values = value.float64()
    return tensor(np.ascontiguousarray(values.T), value.dtype)


def write_config(path: Path, config: Mapping[str, Any]) -> None:
    (path / "adapter_config.json").write_text(json.dumps(config))


def renamed(layer: Layer, prefix: str, names: Mapping[str, str]) -> dict[str, Tensor]:
    """All parts behind a prefix, those in the table under its names."""
    return {prefix + names.get(part, part): value for part, value in layer.parts.items()}


# One file, a tensor for each part.

#: The endings of PEFT's and diffusers' current releases.
LORA_A = {
    "lora_down.weight": "lora_A.weight",
    "lora_up.weight": "lora_B.weight",
    "dora_scale": "lora_magnitude_vector",
}
#: Those of earlier releases of diffusers.
LORA_DOWN = {"lora_down.weight": "lora.down.weight", "lora_up.weight": "lora.up.weight"}
LINEAR_LAYER = {
    "lora_down.weight": "lora_linear_layer.down.weight",
    "lora_up.weight": "lora_linear_layer.up.weight",
    "alpha": "lora_linear_layer.alpha",
}
NORMS = {"diff": "w_norm"}


def one_file(path: Path, tensors: Mapping[str, Tensor], metadata: Any = None) -> Path:
    return write_safetensors(path / "adapter.safetensors", tensors, metadata)


def flattened(prefix: str) -> Writer:
    """kohya's way: the module's name with underscores behind a prefix."""

    def write(path: Path, layer: Layer) -> Path:
        key = prefix + layer.module.replace(".", "_") + "."
        return one_file(path, renamed(layer, key, NORMS if layer.kind == "norm" else {}))

    return write


def dotted(
    prefix: str, names: Mapping[str, str] | None = None, metadata: Mapping[str, str] | None = None
) -> Writer:
    """The module's own name behind a prefix."""

    def write(path: Path, layer: Layer) -> Path:
        return one_file(path, renamed(layer, f"{prefix}{layer.module}.", names or {}), metadata)

    return write


def attention_processor(prefix: str) -> Writer:
    """`….attn1.processor.to_q_lora.down.weight`, with the alpha that networks had beside it."""

    def write(path: Path, layer: Layer) -> Path:
        attention, _, name = layer.module.rpartition(".")
        key = f"{prefix}{attention}.processor.{name}_lora"
        names = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight"}
        return one_file(path, renamed(layer, f"{key}.", names))

    return write


def with_metadata(prefix: str, component: str, *, rslora: bool = False) -> Writer:
    """diffusers' own scale: PEFT's config of the component in the file's metadata."""

    def write(path: Path, layer: Layer) -> Path:
        alpha = layer.alpha / layer.rank**0.5 if rslora else layer.alpha
        config = {"peft_type": "LORA", "r": layer.rank, "lora_alpha": alpha, "use_rslora": rslora}
        fields = {f"{component}.{name}": value for name, value in config.items()}
        metadata = {"lora_adapter_metadata": json.dumps(fields)}
        tensors = renamed(layer, f"{prefix}{layer.module}.", LORA_A)
        tensors.pop(f"{prefix}{layer.module}.alpha")
        return one_file(path, tensors, metadata)

    return write


def xlabs(path: Path, layer: Layer) -> Path:
    block = layer.module.removesuffix(".img_attn.proj")
    names = {"lora_down.weight": "down.weight", "lora_up.weight": "up.weight"}
    return one_file(path, renamed(layer, f"{block}.processor.proj_lora1.", names))


# cloneofsimo's, where layers are counted and all have the same factors here.


def numbered(path: Path, layer: Layer) -> Path:
    names = {"lora_down.weight": "down", "lora_up.weight": "up"}
    tensors: dict[str, Tensor] = {}
    for number in range(len(layer.modules)):
        tensors |= renamed(layer, f"unet:{number}:", names)
    return one_file(path, tensors)


def in_torch(value: Tensor) -> Any:
    import torch

    types = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    flat = torch.frombuffer(bytearray(value.data), dtype=types[value.dtype])
    return flat.reshape(value.shape)


def listed_pairs(path: Path, layer: Layer) -> Path:
    import torch

    pair = [in_torch(layer.parts[f"lora_{part}.weight"]) for part in ("up", "down")]
    torch.save(pair * len(layer.modules), path / "lora.pt")
    return path / "lora.pt"


# Directories with a config.


def peft(
    *, rslora: bool = False, patterns: bool = False, scale: str = "alpha", shards: bool = False
) -> Writer:
    """PEFT's directory of the adapter type that the algorithm needs."""

    def write(path: Path, layer: Layer) -> Path:
        last = layer.module.rsplit(".", 1)[-1]
        prefix = f"{PEFT}{layer.module}."
        parts = layer.weights()
        family = layer.algorithm.split(",")[0]
        config: dict[str, Any] = {"peft_type": "LORA", "target_modules": [last], "r": layer.rank}
        if family in {"loha", "lokr"}:
            config |= {"peft_type": family.upper(), "alpha": layer.alpha}
        elif family == "ia3":
            is_input = bool(parts.pop("on_input").float64())
            config = {
                "peft_type": "IA3",
                "target_modules": [last],
                "feedforward_modules": [last] if is_input else [],
            }
            count = parts["weight"].shape[1 if is_input else 0]
            axes = [1] * max(2, len(parts["weight"].shape))
            # Of a convolution both kinds lie on the second axis.
            axes[1 if is_input or layer.kind != "linear" else 0] = count
            if layer.kind != "linear":
                axes = [1, count, 1, 1]
            parts = {"ia3_l": shaped(parts["weight"], *axes)}
        elif family == "whole":
            config |= {"lora_alpha": 1, "r": 1, "target_modules": [], "modules_to_save": [last]}
            parts = {"weight": parts["whole"]}
        else:
            parts = lora_of_peft(layer, parts)
            config |= adapter_config(r=layer.rank, lora_alpha=layer.alpha, target_modules=[last])
            config |= {"use_dora": family == "dora"}
        if rslora:
            config |= {"use_rslora": True, "lora_alpha": layer.alpha / layer.rank**0.5}
        if patterns:
            config |= {"r": 2 * layer.rank, scale: 77.0}
            config |= {"rank_pattern": {last: layer.rank}, "alpha_pattern": {last: layer.alpha}}
        write_config(path, config)
        tensors = {prefix + name: value for name, value in parts.items()}
        if not shards:
            write_safetensors(path / "adapter_model.safetensors", tensors)
            return path
        files = {}
        for number, (name, value) in enumerate(tensors.items(), 1):
            files[name] = f"adapter_model-{number:05}-of-{len(tensors):05}.safetensors"
            write_safetensors(path / files[name], {name: value})
        index = {"metadata": {"total_size": 0}, "weight_map": files}
        (path / "adapter_model.safetensors.index.json").write_text(json.dumps(index))
        return path

    return write


def lora_of_peft(layer: Layer, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The factors, and magnitudes in the shape that each kind of layer has there."""
    names = LORA_A
    if layer.kind == "embedding":
        names = LORA_A | {"lora_down.weight": "lora_embedding_A"}
        names |= {"lora_up.weight": "lora_embedding_B"}
    found = {names.get(name, name): value for name, value in parts.items()}
    if magnitude := found.get("lora_magnitude_vector"):
        count = int(np.prod(magnitude.shape))
        axes = (1, count, 1, 1) if layer.kind.startswith("conv") else (count,)
        found["lora_magnitude_vector"] = shaped(magnitude, *axes)
    return found


def mlx(*, vlm: bool = False, archive: bool = False) -> Writer:
    """mlx-lm's directory; mlx-vlm's names and config, or the archive of the first releases."""

    def write(path: Path, layer: Layer) -> Path:
        family = layer.algorithm.split(",")[0]
        scale = layer.alpha / layer.rank
        config: dict[str, Any] = {"fine_tune_type": family, "num_layers": 1}
        config["lora_parameters"] = {"rank": layer.rank, "scale": scale, "dropout": 0.0}
        if vlm:
            config = {"rank": layer.rank, "alpha": scale, "dropout": 0.0}
        ends = {"lora_down.weight": "A", "lora_up.weight": "B"} if vlm else {}
        ends = ends or {"lora_down.weight": "lora_a", "lora_up.weight": "lora_b"}
        parts = layer.weights()
        if family == "whole":
            config = {"fine_tune_type": "full", "num_layers": 1}
            tensors = {f"{layer.module}.weight": parts["whole"]}
        else:
            tensors = {}
            for name, value in parts.items():
                if name == "dora_scale":
                    tensors[f"{layer.module}.m"] = shaped(value, int(np.prod(value.shape)))
                else:
                    end = ends.get(name, name)
                    tensors[f"{layer.module}.{end}"] = turned(value)
        write_config(path, config)
        if archive:
            types = {"F32": "<f4", "F16": "<f2", "BF16": "V2"}
            arrays = {
                name: np.frombuffer(value.data, types[value.dtype]).reshape(value.shape)
                for name, value in tensors.items()
            }
            np.savez(path / "adapters.npz", **arrays)
        else:
            write_safetensors(path / "adapters.safetensors", tensors, {"format": "mlx"})
        return path

    return write


def torchtune(*, pickled: bool = False) -> Writer:
    def write(path: Path, layer: Layer) -> Path:
        names = {"lora_down.weight": "lora_a.weight", "lora_up.weight": "lora_b.weight"}
        names |= {"dora_scale": "magnitude"}
        tensors = {}
        for name, value in layer.weights().items():
            is_magnitude = name == "dora_scale"
            own = shaped(value, int(np.prod(value.shape))) if is_magnitude else value
            tensors[f"layers.0.mlp.w3.{names.get(name, name)}"] = own
        config = adapter_config(r=layer.rank, lora_alpha=layer.alpha, target_modules=["up_proj"])
        write_config(path, config | {"use_dora": layer.algorithm == "dora"})
        if pickled:
            import torch

            state = {name: in_torch(value) for name, value in tensors.items()}
            torch.save(state, path / "adapter_model.pt")
        else:
            write_safetensors(path / "adapter_model.safetensors", tensors)
        return path

    return write


def tinker(path: Path, layer: Layer) -> Path:
    """The head under tinker's name, beside PEFT's config."""
    parts = {LORA_A.get(name, name): value for name, value in layer.weights().items()}
    tensors = {f"{PEFT}model.unembed_tokens.{name}": value for name, value in parts.items()}
    write_config(
        path,
        adapter_config(r=layer.rank, lora_alpha=layer.alpha, target_modules="all-linear"),
    )
    write_safetensors(path / "adapter_model.safetensors", tensors)
    return path


def gguf(path: Path, layer: Layer) -> Path:
    """llama.cpp's file; of an embedding A lies (tokens, r)."""
    own = {"embedding": "token_embd"}.get(layer.kind, "blk.0.ffn_up")
    names = {"lora_down.weight": "lora_a", "lora_up.weight": "lora_b"}
    tensors = {}
    for name, value in layer.weights().items():
        is_turned = layer.kind == "embedding" and name == "lora_down.weight"
        key = f"{own}.weight.{names.get(name, name)}"
        tensors[key] = turned(value) if is_turned else value
    file = path / "adapter.gguf"
    file.write_bytes(encode(tensors, adapter_metadata(alpha=layer.alpha)))
    return file
