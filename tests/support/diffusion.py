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


#: UNets: which of their levels have attention on the way down and up, two layers each.
UNETS: dict[str, dict[str, list[int]]] = {
    "sd1": {"down": [1, 1, 1, 0], "up": [0, 1, 1, 1]},
    "sd2": {"down": [1, 1, 1, 0], "up": [0, 1, 1, 1]},
    "sdxl": {"down": [0, 1, 1], "up": [1, 1, 0]},
}
#: The modules of a residual block.
RESIDUAL = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}


def _unet_table(down: list[int], up: list[int]) -> dict[str, str]:
    """diffusers' beginnings of names with the author's."""
    table = {
        "conv_in": "input_blocks.0.0",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "mid_block.resnets.0": "middle_block.0",
        "mid_block.attentions.0": "middle_block.1",
        "mid_block.resnets.1": "middle_block.2",
    }
    for block in range(len(down)):
        for layer in range(2):
            place = 3 * block + layer + 1
            table[f"down_blocks.{block}.resnets.{layer}"] = f"input_blocks.{place}.0"
            table[f"down_blocks.{block}.attentions.{layer}"] = f"input_blocks.{place}.1"
        conv = f"input_blocks.{3 * block + 3}.0.op"
        table[f"down_blocks.{block}.downsamplers.0.conv"] = conv
        for layer in range(3):
            place = 3 * block + layer
            table[f"up_blocks.{block}.resnets.{layer}"] = f"output_blocks.{place}.0"
            table[f"up_blocks.{block}.attentions.{layer}"] = f"output_blocks.{place}.1"
        behind = 2 if up[block] else 1
        conv = f"output_blocks.{3 * block + 2}.{behind}.conv"
        table[f"up_blocks.{block}.upsamplers.0.conv"] = conv
    return table


def unet_in_the_authors_names(kind: str, tensors: dict[str, Array]) -> dict[str, Array]:
    """A UNet of diffusers' names in its author's."""
    table = _unet_table(**UNETS[kind])

    def theirs(name: str) -> str:
        (start,) = (start for start in table if name.startswith(f"{start}."))
        rest = name.removeprefix(start)
        if ".resnets." in start:
            _, module, leaf = rest.split(".")
            rest = f".{RESIDUAL[module]}.{leaf}"
        return table[start] + rest

    return {theirs(name): value for name, value in tensors.items()}


def unet(kind: str) -> Any:
    """diffusers' own class in the structure of a kind, with narrow layers."""
    import diffusers

    shape = UNETS[kind]
    levels = len(shape["down"])
    return diffusers.UNet2DConditionModel(
        block_out_channels=tuple(4 * (level + 1) for level in range(levels)),
        norm_num_groups=2,
        layers_per_block=2,
        cross_attention_dim=6,
        attention_head_dim=2,
        use_linear_projection=kind != "sd1",
        transformer_layers_per_block=(1, 1, 2) if kind == "sdxl" else 1,
        down_block_types=tuple(
            "CrossAttnDownBlock2D" if attention else "DownBlock2D" for attention in shape["down"]
        ),
        up_block_types=tuple(
            "CrossAttnUpBlock2D" if attention else "UpBlock2D" for attention in shape["up"]
        ),
        **(
            {
                "addition_embed_type": "text_time",
                "addition_time_embed_dim": 2,
                "projection_class_embeddings_input_dim": 8,
            }
            if kind == "sdxl"
            else {}
        ),
    )


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
