"""Toy bases of image models in two namings, and files of adapters in every trainer's."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import numpy.typing as npt
from safetensors.numpy import load_file, save_file

from support import diffusion

Array = npt.NDArray[Any]
Tensors = dict[str, Array]
#: Extents of the toy Flux: the width, the MLP's, the inputs of an image and a text token.
WIDTH, MLP, IMAGE, TEXT = 12, 20, 4, 6


def flux() -> Tensors:
    """A Flux with one block of each kind, in diffusers' names."""
    shapes: dict[str, tuple[int, ...]] = {
        "x_embedder": (WIDTH, IMAGE),
        "context_embedder": (WIDTH, TEXT),
        "norm_out.linear": (2 * WIDTH, WIDTH),
        "proj_out": (IMAGE, WIDTH),
    }
    block, single = "transformer_blocks.0", "single_transformer_blocks.0"
    square = ["to_q", "to_k", "to_v", "add_q_proj", "add_k_proj", "add_v_proj", "to_out.0"]
    shapes |= {f"{block}.attn.{name}": (WIDTH, WIDTH) for name in [*square, "to_add_out"]}
    shapes |= {f"{single}.attn.{name}": (WIDTH, WIDTH) for name in square[:3]}
    for part in ("ff", "ff_context"):
        shapes[f"{block}.{part}.net.0.proj"] = (MLP, WIDTH)
        shapes[f"{block}.{part}.net.2"] = (WIDTH, MLP)
    shapes[f"{block}.norm1.linear"] = (6 * WIDTH, WIDTH)
    shapes[f"{single}.proj_mlp"] = (MLP, WIDTH)
    shapes[f"{single}.proj_out"] = (WIDTH, WIDTH + MLP)
    random = np.random.default_rng(3)
    tensors = {}
    for name, shape in shapes.items():
        tensors[f"{name}.weight"] = random.normal(size=shape).astype(np.float32)
        tensors[f"{name}.bias"] = random.normal(size=shape[:1]).astype(np.float32)
    for name in ("norm_q", "norm_k", "norm_added_q", "norm_added_k"):
        tensors[f"{block}.attn.{name}.weight"] = random.normal(size=3).astype(np.float32)
    return tensors


def unet(kind: str = "sd1") -> Tensors:
    """A UNet of one transformer block in each level, in diffusers' names."""
    shapes: dict[str, tuple[int, ...]] = {"conv_in": (4, 4, 3, 3), "conv_out": (4, 4, 3, 3)}
    levels = diffusion.UNETS[kind]
    blocks = ["mid_block.attentions.0"]
    for side, count in (("down", 2), ("up", 3)):
        for level, attention in enumerate(levels[side]):
            name = f"{side}_blocks.{level}"
            for layer in range(count):
                shapes[f"{name}.resnets.{layer}.conv1"] = (4, 4, 3, 3)
                if attention:
                    blocks.append(f"{name}.attentions.{layer}")
            if level + 1 < len(levels[side]):
                sampler = "downsamplers" if side == "down" else "upsamplers"
                shapes[f"{name}.{sampler}.0.conv"] = (4, 4, 3, 3)
    shapes |= {f"mid_block.resnets.{layer}.conv1": (4, 4, 3, 3) for layer in range(2)}
    for place, name in enumerate(blocks):
        width = 4 + place % 2
        shapes[f"{name}.proj_in"] = (width, 4, 1, 1) if kind == "sd1" else (width, 4)
        block = f"{name}.transformer_blocks.0"
        for attention, inputs in (("attn1", width), ("attn2", 6)):
            shapes[f"{block}.{attention}.to_q"] = (width, width)
            shapes[f"{block}.{attention}.to_k"] = (width, inputs)
            shapes[f"{block}.{attention}.to_v"] = (width, inputs)
            shapes[f"{block}.{attention}.to_out.0"] = (width, width)
        shapes[f"{block}.ff.net.0.proj"] = (8 * width, width)
    random = np.random.default_rng(4)
    return {
        f"{name}.weight": random.normal(size=shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def clip() -> Tensors:
    """A text encoder of two layers, in transformers' names."""
    random = np.random.default_rng(5)
    tensors = {}
    for layer in range(2):
        start = f"text_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            weight = random.normal(size=(6, 6)).astype(np.float32)
            tensors[f"{start}.self_attn.{name}.weight"] = weight
        tensors[f"{start}.mlp.fc1.weight"] = random.normal(size=(8, 6)).astype(np.float32)
    return tensors


def in_the_authors_names(family: str, tensors: Tensors) -> Tensors:
    """A denoiser of diffusers' names in its author's."""
    if family in diffusion.UNETS:
        return diffusion.unet_in_the_authors_names(family, tensors)
    return diffusion.in_the_authors_names(family, tensors)


def save(path: Path, tensors: Tensors, metadata: dict[str, str] | None = None) -> Path:
    """Writes a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    save_file({k: np.ascontiguousarray(v) for k, v in tensors.items()}, path, metadata)
    return path


def pipeline(root: Path, **components: Tensors) -> Path:
    """A directory as diffusers saves it; `unet`, `transformer`, `text_encoder` are folders."""
    classes = {
        "unet": ["diffusers", "UNet2DConditionModel"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "text_encoder": ["transformers", "CLIPTextModel"],
        "text_encoder_2": ["transformers", "CLIPTextModelWithProjection"],
    }
    index = {name: classes[name] for name in components}
    root.mkdir(parents=True)
    (root / "model_index.json").write_text(json.dumps({"_class_name": "ToyPipeline", **index}))
    for name, tensors in components.items():
        library, class_name = classes[name]
        of_diffusers = library == "diffusers"
        file = "diffusion_pytorch_model" if of_diffusers else "model"
        save(root / name / f"{file}.safetensors", tensors)
        config = {"_class_name": class_name} if of_diffusers else {"architectures": [class_name]}
        (root / name / "config.json").write_text(json.dumps(config))
    return root


class Pair:
    """Two factors and what they add, in float64."""

    def __init__(self, weight: Array, seed: int, rank: int = 2, scale: float = 1.0) -> None:
        random = np.random.default_rng(seed)
        outputs, *inputs = weight.shape
        self.down = random.normal(size=(rank, *inputs)).astype(np.float32)
        self.up = random.normal(size=(outputs, rank, *(1 for _ in inputs[1:]))).astype(np.float32)
        product = self.up.reshape(outputs, rank).astype(np.float64) @ self.down.reshape(rank, -1)
        self.delta = scale * product.reshape(weight.shape)


def sums(weights: Tensors, deltas: Tensors) -> Tensors:
    """The weights with what is added, rounded once."""
    assert not deltas.keys() - weights.keys(), "a module that the toy does not have"
    return {
        name: (weight.astype(np.float64) + deltas.get(name, 0.0)).astype(np.float32)
        for name, weight in weights.items()
    }


def merge(base: Path, adapter: Path, output: Path, **options: Any) -> Tensors:
    """A merge that is verified: all tensors of the output."""
    lorafast.merge(base, adapter, output, **options)
    allowed = {key: options[key] for key in ("allow", "format") if key in options}
    assert lorafast.verify(base, adapter, output, **allowed).ok
    found = {}
    for file in sorted(output.rglob("*.safetensors")):
        folder = "" if file.parent == output else f"{file.parent.name}."
        found |= {folder + name: value for name, value in load_file(file).items()}
    return found


def assert_equal(found: Tensors, expected: Tensors) -> None:
    """The same tensors, but for the order of sums in float32."""
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=4e-6, err_msg=name)


FLUX = flux()


UNET = unet()


CLIP = clip()


DOUBLE, SINGLE = "transformer_blocks.0", "single_transformer_blocks.0"


#: Modules of the toy Flux that a trainer of attention would take, by diffusers' names.
ATTENTION = [f"{DOUBLE}.attn.{name}" for name in ("to_q", "to_k", "to_v", "add_k_proj", "to_out.0")]


FLUX_MODULES = [*ATTENTION, f"{DOUBLE}.ff.net.2", f"{SINGLE}.attn.to_v", f"{SINGLE}.proj_mlp"]


IN_UNET = "down_blocks.1.attentions.0.transformer_blocks.0"


UNET_MODULES = [
    f"{IN_UNET}.attn1.to_q",
    f"{IN_UNET}.attn2.to_k",
    f"{IN_UNET}.attn1.to_out.0",
    f"{IN_UNET}.ff.net.0.proj",
    "mid_block.attentions.0.transformer_blocks.0.attn1.to_v",
    "up_blocks.2.attentions.1.transformer_blocks.0.attn2.to_v",
]


IN_CLIP = "text_model.encoder.layers.1"


CLIP_MODULES = [f"{IN_CLIP}.self_attn.{name}_proj" for name in ("q", "k", "v", "out")]


def pairs_of(
    weights: Tensors, modules: list[str], scale: float = 1.0, rank: int = 2
) -> dict[str, Pair]:
    """Factors of modules, each from a seed of its own."""
    return {
        name: Pair(weights[f"{name}.weight"], seed, rank, scale)
        for seed, name in enumerate(modules)
    }


def deltas_of(pairs: dict[str, Pair]) -> Tensors:
    return {f"{name}.weight": pair.delta for name, pair in pairs.items()}


def written(
    pairs: dict[str, Pair],
    name: Callable[[str], str],
    down: str = ".lora_A.weight",
    up: str = ".lora_B.weight",
    alpha: float | None = None,
) -> Tensors:
    """Factors under a trainer's keys."""
    tensors: Tensors = {}
    for module, pair in pairs.items():
        tensors[name(module) + down] = pair.down
        tensors[name(module) + up] = pair.up
        if alpha is not None:
            tensors[f"{name(module)}.alpha"] = np.array(alpha, np.float32)
    return tensors


def check(
    family: str, weights: Tensors, adapter: Path, expected: Tensors, root: Path, **options: Any
) -> None:
    """Merges into the model in both namings; `expected` is in the author's."""
    ours = save(root / "ours" / "model.safetensors", weights)
    assert_equal(
        in_the_authors_names(family, merge(ours, adapter, root / "merged", **options)),
        expected,
    )
    theirs = in_the_authors_names(family, weights)
    prefix = "model.diffusion_model."
    single = save(root / "single.safetensors", {prefix + k: v for k, v in theirs.items()})
    found = merge(single, adapter, root / "merged_single", **options)
    assert_equal({name.removeprefix(prefix): value for name, value in found.items()}, expected)


def theirs(family: str, weights: Tensors, deltas: Tensors) -> Tensors:
    """What a merge gives, in the author's names, of deltas in diffusers'."""
    return in_the_authors_names(family, sums(weights, deltas))


def formats(path: Path) -> tuple[str, str]:
    listing = lorafast.inspect(path).to_dict()
    assert listing["kind"] == "adapter"
    return listing["kind"], str(listing["format"])
