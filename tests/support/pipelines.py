"""Small pipelines of diffusers and single files in their authors' names, with random weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.handmade import write_checkpoint

#: Module path -> (out, in), of each component with weights.
UNET = {
    "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q": (24, 20),
    "down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k": (24, 36),
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_q": (24, 20),
}
CLIP_L = {
    "text_model.encoder.layers.0.self_attn.q_proj": (12, 12),
    "text_model.encoder.layers.0.mlp.fc1": (48, 12),
}
CLIP_G = {
    "text_model.encoder.layers.0.self_attn.q_proj": (20, 20),
    "text_model.encoder.layers.0.mlp.fc1": (80, 20),
    "text_model.encoder.layers.1.self_attn.q_proj": (20, 20),
    "text_model.encoder.layers.1.mlp.fc1": (80, 20),
}
VAE = {"decoder.mid_block.attentions.0.to_q": (16, 16), "quant_conv": (8, 8)}

#: Folder -> library, class, modules.
SDXL: dict[str, tuple[str, str, Mapping[str, tuple[int, int]]]] = {
    "unet": ("diffusers", "UNet2DConditionModel", UNET),
    "text_encoder": ("transformers", "CLIPTextModel", CLIP_L),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection", CLIP_G),
    "vae": ("diffusers", "AutoencoderKL", VAE),
}


def weights(
    modules: Mapping[str, tuple[int, int]], seed: int, dtype: str = "F32"
) -> dict[str, Tensor]:
    """Linear weights with biases, a convolution and a norm."""
    random = np.random.default_rng(seed)
    tensors = {}
    for module, shape in modules.items():
        tensors[f"{module}.weight"] = tensor(random.normal(scale=0.05, size=shape), dtype)
        tensors[f"{module}.bias"] = tensor(random.normal(scale=0.05, size=shape[0]), dtype)
    tensors["conv_in.weight"] = tensor(random.normal(scale=0.05, size=(8, 4, 3, 3)), dtype)
    tensors["norm.weight"] = tensor(1 + random.normal(scale=0.05, size=20), dtype)
    return tensors


def write_component(
    path: Path,
    library: str,
    class_name: str,
    modules: Mapping[str, tuple[int, int]],
    *,
    seed: int = 0,
    dtype: str = "F32",
    shards: int = 1,
) -> Path:
    """A component's folder: its config and its weights under its library's names."""
    path.mkdir(parents=True, exist_ok=True)
    of_diffusers = library == "diffusers"
    stem = "diffusion_pytorch_model" if of_diffusers else "model"
    config: dict[str, Any] = (
        {"_class_name": class_name, "_diffusers_version": "0.42.1"}
        if of_diffusers
        else {
            "architectures": [class_name],
            "model_type": "clip_text_model",
            "torch_dtype": "float32",
        }
    )
    (path / "config.json").write_text(json.dumps(config))
    write_checkpoint(path, weights(modules, seed, dtype), shards=shards, stem=stem)
    return path


def make_pipeline(
    path: Path,
    components: Mapping[str, tuple[str, str, Mapping[str, tuple[int, int]]]] = SDXL,
    *,
    dtype: str = "F32",
    shards: Mapping[str, int] | None = None,
) -> Path:
    """A pipeline with these components, a scheduler, tokenizers and a card."""
    path.mkdir(parents=True)
    listed: dict[str, Any] = {
        "_class_name": "StableDiffusionXLPipeline",
        "_diffusers_version": "0.42.1",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "tokenizer": ["transformers", "CLIPTokenizer"],
        "feature_extractor": [None, None],
        "force_zeros_for_empty_prompt": True,
    }
    for seed, (folder, (library, class_name, modules)) in enumerate(components.items()):
        listed[folder] = [library, class_name]
        write_component(
            path / folder,
            library,
            class_name,
            modules,
            seed=seed,
            dtype=dtype,
            shards=(shards or {}).get(folder, 1),
        )
    (path / "model_index.json").write_text(json.dumps(listed, indent=2))
    (path / "scheduler").mkdir()
    (path / "scheduler" / "scheduler_config.json").write_text('{"beta_start": 0.00085}')
    (path / "tokenizer").mkdir()
    (path / "tokenizer" / "vocab.json").write_text('{"a": 0}')
    (path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n")
    (path / "tokenizer" / "tokenizer_config.json").write_text("{}")
    (path / "README.md").write_text("---\nlicense: openrail++\n---\n# Toy\n")
    return path


def read_pipeline(path: Path) -> dict[str, Tensor]:
    """Every tensor of a pipeline under its name there."""
    tensors = {}
    for folder in sorted(path.iterdir()):
        if folder.is_dir() and any(folder.glob("*.safetensors")):
            tensors.update({f"{folder.name}.{k}": v for k, v in read_checkpoint(folder).items()})
    return tensors


def files(path: Path) -> dict[str, bytes]:
    """The content of every file below a directory."""
    found = (each for each in path.rglob("*") if each.is_file())
    return {each.relative_to(path).as_posix(): each.read_bytes() for each in found}


def prefixed(prefix: str, modules: Mapping[str, tuple[int, int]]) -> dict[str, tuple[int, int]]:
    return {f"{prefix}{module}": shape for module, shape in modules.items()}


def make_single_file(
    path: Path, dtype: str = "F16", metadata: Mapping[str, str] | None = None
) -> Path:
    """SDXL in its authors' names, of a few modules."""
    random = np.random.default_rng(3)
    shapes = {
        "conditioner.embedders.0.transformer.text_model.encoder.layers.0.mlp.fc1.weight": (48, 12),
        "conditioner.embedders.1.model.transformer.resblocks.0.attn.in_proj_weight": (60, 20),
        "first_stage_model.decoder.conv_in.weight": (8, 4, 3, 3),
        "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q.weight": (24, 20),
        "model.diffusion_model.input_blocks.0.0.weight": (8, 4, 3, 3),
        "denoiser.sigmas": (10,),
    }
    tensors = {
        name: tensor(random.normal(scale=0.05, size=shape), dtype) for name, shape in shapes.items()
    }
    write_safetensors(path, tensors, dict(metadata or {"format": "pt"}))
    return path
