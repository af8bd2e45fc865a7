"""Toy diffusion models in both namings, and an independent reading of the rules between them."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[Any]
RULES: dict[str, list[list[str]]] = json.loads(
    (Path(__file__).parents[2] / "rust/src/checkpoint/names/diffusion/families.json").read_text()
)

# diffusers' class, the arguments that make it small in depth alone, and its converter.
FAMILIES: dict[str, tuple[str, dict[str, Any], str]] = {
    "flux1": (
        "FluxTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1, "guidance_embeds": True},
        "convert_flux_transformer_checkpoint_to_diffusers",
    ),
    "flux2": (
        "Flux2Transformer2DModel",
        {"num_layers": 1, "num_single_layers": 1},
        "convert_flux2_transformer_checkpoint_to_diffusers",
    ),
    "chroma": (
        "ChromaTransformer2DModel",
        {"num_layers": 1, "num_single_layers": 1},
        "convert_chroma_transformer_checkpoint_to_diffusers",
    ),
    "sd3": (
        "SD3Transformer2DModel",
        {"num_layers": 2, "dual_attention_layers": (0,), "qk_norm": "rms_norm"},
        "convert_sd3_transformer_checkpoint_to_diffusers",
    ),
    "hunyuan_video": (
        "HunyuanVideoTransformer3DModel",
        {"num_layers": 1, "num_single_layers": 1, "num_refiner_layers": 1},
        "convert_hunyuan_video_transformer_to_diffusers",
    ),
    "wan": (
        "WanTransformer3DModel",
        {"num_layers": 1, "image_dim": 1280, "added_kv_proj_dim": 5120},
        "convert_wan_transformer_to_diffusers",
    ),
    "ltx": (
        "LTXVideoTransformer3DModel",
        {"num_layers": 1},
        "convert_ltx_transformer_checkpoint_to_diffusers",
    ),
    "z_image": (
        "ZImageTransformer2DModel",
        {"n_layers": 1, "n_refiner_layers": 1},
        "convert_z_image_transformer_checkpoint_to_diffusers",
    ),
    "lumina2": (
        "Lumina2Transformer2DModel",
        {"num_layers": 1, "num_refiner_layers": 1},
        "convert_lumina2_to_diffusers",
    ),
    "sana": (
        "SanaTransformer2DModel",
        {"num_layers": 1},
        "convert_sana_transformer_to_diffusers",
    ),
    "krea2": (
        "Krea2Transformer2DModel",
        {"num_layers": 1},
        "convert_krea2_transformer_checkpoint_to_diffusers",
    ),
    "cosmos2": (
        "CosmosTransformer3DModel",
        {"num_layers": 1},
        "convert_cosmos_transformer_checkpoint_to_diffusers",
    ),
}


def shapes_of(family: str) -> dict[str, tuple[int, ...]]:
    """The parameters of diffusers' own class, few blocks of them, with their shapes."""
    import diffusers
    import torch

    name, arguments, _ = FAMILIES[family]
    with torch.device("meta"):
        model = getattr(diffusers, name)(**arguments)
    return {name: tuple(tensor.shape) for name, tensor in model.state_dict().items()}


def converted(family: str, tensors: dict[str, Array]) -> dict[str, Array]:
    """A model in its author's names, brought to diffusers' by diffusers."""
    import diffusers.loaders.single_file_utils as converters
    import torch

    convert = getattr(converters, FAMILIES[family][2])
    given = {name: torch.from_numpy(value.copy()) for name, value in tensors.items()}
    if family == "sana":
        # What diffusers takes out of every checkpoint.
        given |= {name: torch.zeros(1) for name in ("pos_embed", "y_embedder.y_embedding")}
    found = convert(given)
    return {name: value.numpy() for name, value in found.items()}


def _pattern(template: str) -> str:
    """A template as a regular expression."""
    parts = re.split(r"(\{[^}]*\})", template)
    seen: set[str] = set()

    def part(text: str) -> str:
        if not text.startswith("{"):
            return re.escape(text)
        name = text[1:-1]
        if name == "*":
            return "(?P<rest>.+)"
        kind = r"[^.]+" if name in "ab" else r"\d+"
        if name in seen:
            return f"(?P={name})"
        seen.add(name)
        return f"(?P<{name}>{kind})"

    return "".join(map(part, parts)) + r"(?P<tail>(?:\..*)?)$"


def _render(template: str, match: re.Match[str]) -> str:
    def value(found: re.Match[str]) -> str:
        return match["rest" if found[1] == "*" else found[1]]

    return re.sub(r"\{([^}]*)\}", value, template) + match["tail"]


def original_name(family: str, name: str, last: int) -> tuple[str, int, int, str]:
    """The author's name of a parameter, which part of how many it is there, and how it lies."""
    for ours, theirs, *lie in json.loads(json.dumps(RULES[family]).replace("{last}", str(last))):
        before, bracket, rest = ours.partition("[")
        inner, _, after = rest.partition("]")
        parts = [before + one + after for one in inner.split(",")] if bracket else [ours]
        for slot, part in enumerate(parts):
            if match := re.match(_pattern(part), name):
                return _render(theirs, match), slot, len(parts), "".join(lie)
    return name, 0, 1, ""


def in_the_authors_names(family: str, tensors: dict[str, Array]) -> dict[str, Array]:
    """A model of diffusers' names in its author's, by the rules."""
    numbers = re.findall(r"(?<!single_)transformer_blocks\.(\d+)\.", "\n".join(tensors))
    last = max(map(int, numbers), default=0)
    parts: dict[str, dict[int, Array]] = {}
    for name, value in tensors.items():
        theirs, slot, _, lie = original_name(family, name, last)
        half = len(value) // 2 if lie == "swap" else 0
        parts.setdefault(theirs, {})[slot] = np.roll(value, half, axis=0)
    return {
        name: np.concatenate([found[slot] for slot in sorted(found)])
        for name, found in parts.items()
    }
