"""Bases and adapters of image models for conversions, and merges of what was converted."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from support import image_formats as toys
from support.image_formats import Pair, Tensors, save


def kohya_file(path: Path, components: dict[str, Tensors], alpha: float, *, dora: bool) -> Path:
    """Factors of every linear layer and convolution, under kohya's keys for these prefixes."""
    tensors: Tensors = {}
    for prefix, weights in components.items():
        for seed, (name, weight) in enumerate(weights.items()):
            if weight.ndim < 2 or not name.endswith(".weight"):
                continue
            pair = Pair(weight, seed)
            flat = prefix + name.removesuffix(".weight").replace(".", "_")
            tensors[f"{flat}.lora_down.weight"] = pair.down
            tensors[f"{flat}.lora_up.weight"] = pair.up
            tensors[f"{flat}.alpha"] = np.array(alpha, np.float32)
            if dora:
                shape = (len(weight), *(1 for _ in weight.shape[1:]))
                random = np.random.default_rng(seed)
                tensors[f"{flat}.dora_scale"] = (1 + random.random(shape)).astype(np.float32)
    return save(path, tensors, {"ss_network_module": "networks.lora", "sshs_model_hash": "0"})


def scene(root: Path, kind: str, alpha: float, *, dora: bool) -> tuple[Path, Path]:
    """A base, and a file of kohya's for it as sd-scripts names modules."""
    if kind.startswith("flux"):
        theirs = toys.in_the_authors_names("flux1", toys.flux())
        if kind == "flux file":
            base = save(root / "flux.safetensors", theirs)
        else:
            base = toys.pipeline(root / "base", transformer=toys.flux())
        return base, kohya_file(root / "x.safetensors", {"lora_unet_": theirs}, alpha, dora=dora)
    unet, clip = toys.unet(kind), toys.clip()
    if kind == "sd1":
        base = toys.pipeline(root / "base", unet=unet, text_encoder=clip)
        trained = {"lora_unet_": unet, "lora_te_": clip}
    else:
        # What tells it from Stable Diffusion 1.
        unet["add_embedding.linear_1.weight"] = np.ones((4, 4), np.float32)
        base = toys.pipeline(root / "base", unet=unet, text_encoder=clip, text_encoder_2=clip)
        sgm = toys.in_the_authors_names(kind, unet)
        trained = {"lora_unet_": sgm, "lora_te1_": clip, "lora_te2_": clip}
    return base, kohya_file(root / "x.safetensors", trained, alpha, dora=dora)


def merged(base: Path, adapter: Path, output: Path) -> Tensors:
    """What a merge of an adapter, or of one for each component, writes."""
    folders = sorted(path.parent for path in adapter.rglob("adapter_config.json"))
    if len(folders) < 2:
        return toys.merge(base, adapter, output)
    found = {}
    for folder in folders:
        part = toys.merge(base / folder.name, folder, output / folder.name)
        found |= {f"{folder.name}.{name}": value for name, value in part.items()}
    return found
