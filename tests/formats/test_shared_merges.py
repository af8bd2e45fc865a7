"""Key lists that others made: a random file of each is merged whole into narrow bases, and held
against its formula in both namings.
"""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import diffusion
from support.image_formats import Tensors, assert_equal, merge, save
from support.shared_data import CLASSES, DATA, narrowed, random_file, shapes_of

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not there"),
]

#: Where XLabs' processors lie in a block.
XLABS = {
    "proj_lora1": "img_attn.proj",
    "proj_lora2": "txt_attn.proj",
    "qkv_lora1": "img_attn.qkv",
    "qkv_lora2": "txt_attn.qkv",
}
#: Widths of CLIP and T5 as they are in the lists: layers, width, and that of the MLP.
TEXT_ENCODERS: dict[str, tuple[str, dict[str, Any]]] = {
    "clip": ("CLIPTextModel", {"layers": 12, "width": 24, "mlp": 96}),
    "t5": ("T5EncoderModel", {"layers": 24, "width": 128, "mlp": 320}),
    "qwen3": ("Qwen3Model", {"layers": 1, "width": 32, "mlp": 88}),
}


def text_encoder(kind: str) -> Tensors:
    """The linear layers of a narrow text encoder, in transformers' names."""
    random = np.random.default_rng(7)
    sizes = TEXT_ENCODERS[kind][1]
    width, mlp = sizes["width"], sizes["mlp"]
    modules: dict[str, tuple[int, int]] = {}
    for layer in range(sizes["layers"]):
        if kind == "clip":
            at = f"text_model.encoder.layers.{layer}"
            names = dict.fromkeys(("q_proj", "k_proj", "v_proj", "out_proj"), (width, width))
            modules |= {f"{at}.self_attn.{name}": shape for name, shape in names.items()}
            modules |= {f"{at}.mlp.fc1": (mlp, width), f"{at}.mlp.fc2": (width, mlp)}
        elif kind == "t5":
            at = f"encoder.block.{layer}.layer"
            modules |= {f"{at}.0.SelfAttention.{name}": (width, width) for name in "qkvo"}
            modules |= {f"{at}.1.DenseReluDense.wi_{n}": (mlp, width) for n in "01"}
            modules[f"{at}.1.DenseReluDense.wo"] = (width, mlp)
        else:
            at = f"layers.{layer}"
            modules |= {f"{at}.self_attn.{name}_proj": (width, width) for name in "qkvo"}
            modules |= {f"{at}.mlp.{name}_proj": (mlp, width) for name in ("gate", "up")}
            modules[f"{at}.mlp.down_proj"] = (width, mlp)
    return {
        f"{name}.weight": random.normal(size=shape).astype(np.float32)
        for name, shape in modules.items()
    }


@cache
def denoiser(family: str) -> Tensors:
    random = np.random.default_rng(3)
    return {
        name: random.normal(size=tuple(map(narrowed, shape))).astype(np.float32)
        for name, shape in shapes_of(family).items()
    }


def rules(family: str) -> str:
    return "cosmos2" if family == "anima" else family


def in_the_authors_names(family: str, tensors: Tensors) -> Tensors:
    if rules(family) not in diffusion.RULES:
        return dict(tensors)
    return diffusion.in_the_authors_names(rules(family), tensors)


@dataclass(frozen=True)
class List:
    """A list: its family, and in whose names it is."""

    family: str
    #: Whether its modules are named as in diffusers.
    is_ours: bool
    #: Whose layers it has besides, by the beginning of their keys.
    encoders: dict[str, str] = field(default_factory=dict)
    #: The beginning of the denoiser's keys.
    prefix: str = ""


LISTS = {
    "flux_lora_aitoolkit_format": List("flux1", False, prefix="diffusion_model."),
    "flux_lora_diffusers_base_model_format": List("flux1", True, prefix="base_model.model."),
    "flux_lora_diffusers_format": List("flux1", True, prefix="transformer."),
    "flux_lora_diffusers_no_proj_mlp_format": List("flux1", True, prefix="transformer."),
    "flux_lora_kohya_format": List("flux1", False, prefix="lora_unet_"),
    "flux_lora_kohya_with_te1_format": List(
        "flux1", False, {"lora_te1_": "clip"}, prefix="lora_unet_"
    ),
    "flux_dora_onetrainer_format": List(
        "flux1", True, {"lora_te1_": "clip", "lora_te2_": "t5"}, prefix="lora_transformer_"
    ),
    "flux_lora_xlabs_format": List("flux1", False),
    "krea2_lora_kohya_format": List("krea2", False, prefix="lora_unet_"),
    "anima_lora_kohya_format": List("anima", False, prefix="lora_unet_"),
    "anima_lora_kohya_with_te_format": List(
        "anima", False, {"lora_te_": "qwen3"}, prefix="lora_unet_"
    ),
    "anima_lora_peft_format": List("anima", False, prefix="diffusion_model."),
    "qwen_image_lora_diffusers_format": List("qwen_image", True),
}


#: Lists of made-up shapes, and one that widens a layer: `test_shared_keys.py` has what is said.
REFUSED = {
    "anima_lora_lokr_format",
    "flux_control_lora_format",
    "flux_lokr_bfl_format",
    "qwen_image_lora_kohya_format",
}


def test_every_list_is_merged_or_refused() -> None:
    found = {path.stem for path in (DATA / "keys").glob("*.json")}
    assert found == {*LISTS, *REFUSED}


def module_of(key: str, modules: dict[str, str]) -> str:
    """The module of a key without its prefix, by its name with underscores."""
    if ".processor." in key:
        block, _, part = key.partition(".processor.")
        return f"{block}.{XLABS[part]}"
    return modules[key.replace(".", "_")]


def merged(weights: Tensors, file: Tensors, prefix: str) -> Tensors:
    """What the tensors of one component make of its weights, in float64 and rounded once."""
    modules = {
        name.removesuffix(".weight").replace(".", "_"): name.removesuffix(".weight")
        for name in weights
        if name.endswith(".weight")
    }
    found = dict(weights)
    ends = {
        ".lora_A.weight": ".lora_B.weight",
        ".lora_down.weight": ".lora_up.weight",
        ".down.weight": ".up.weight",
    }
    for key, down in file.items():
        end = next((end for end in ends if key.startswith(prefix) and key.endswith(end)), None)
        if end is None:
            continue
        stem = key.removesuffix(end)
        up = file[stem + ends[end]]
        alpha = file.get(f"{stem}.alpha")
        scale = 1.0 if alpha is None else float(alpha) / len(down)
        name = f"{module_of(stem.removeprefix(prefix), modules)}.weight"
        total = weights[name] + scale * (up.astype(np.float64) @ down.astype(np.float64))
        if f"{stem}.dora_scale" in file:
            magnitude = file[f"{stem}.dora_scale"].astype(np.float64)
            axis = 1 if magnitude.shape[0] != 1 else 0
            total *= magnitude / np.linalg.norm(total, axis=axis, keepdims=True)
        found[name] = total.astype(np.float32)
    return found


def pipeline(root: Path, family: str, encoders: list[str]) -> Path:
    """A pipeline of diffusers with a narrow denoiser and these text encoders."""
    class_name = CLASSES[family][0]
    index: dict[str, Any] = {"_class_name": "ToyPipeline"}
    save(root / "transformer/diffusion_pytorch_model.safetensors", denoiser(family))
    (root / "transformer/config.json").write_text(json.dumps({"_class_name": class_name}))
    index["transformer"] = ["diffusers", class_name]
    for number, kind in enumerate(encoders):
        folder = "text_encoder" if number == 0 else f"text_encoder_{number + 1}"
        class_name = TEXT_ENCODERS[kind][0]
        save(root / folder / "model.safetensors", text_encoder(kind))
        (root / folder / "config.json").write_text(json.dumps({"architectures": [class_name]}))
        index[folder] = ["transformers", class_name]
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.mark.parametrize("name", LISTS)
def test_every_list_is_merged_whole(name: str, tmp_path: Path) -> None:
    pytest.importorskip("diffusers", reason="the shapes are diffusers'")
    one = LISTS[name]
    path = random_file(name, tmp_path / "adapter.safetensors", narrowed)
    file = load_file(path)
    ours = denoiser(one.family)
    theirs = in_the_authors_names(one.family, ours)
    own = merged(ours if one.is_ours else theirs, file, one.prefix)
    expected = in_the_authors_names(one.family, own) if one.is_ours else own
    others = {}
    for number, (prefix, kind) in enumerate(one.encoders.items()):
        folder = "text_encoder" if number == 0 else f"text_encoder_{number + 1}"
        changed = merged(text_encoder(kind), file, prefix)
        others |= {f"{folder}.{key}": value for key, value in changed.items()}

    base = pipeline(tmp_path / "base", one.family, list(one.encoders.values()))
    found = merge(base, path, tmp_path / "out")
    start = "transformer."
    in_theirs = in_the_authors_names(
        one.family, {k.removeprefix(start): v for k, v in found.items() if k.startswith(start)}
    )
    assert_equal(in_theirs, expected)
    assert_equal({k: v for k, v in found.items() if k.startswith("text_encoder")}, others)
    assert any(not np.array_equal(value, theirs[key]) for key, value in expected.items())
    if one.encoders:
        return
    prefix = "model.diffusion_model."
    single = save(tmp_path / "single.safetensors", {prefix + k: v for k, v in theirs.items()})
    found = merge(single, path, tmp_path / "out_single")
    assert_equal({k.removeprefix(prefix): value for k, value in found.items()}, expected)
