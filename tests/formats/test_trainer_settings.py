"""What settings and widths say of an adapter: sd-scripts' split_qkv, cloneofsimo's family."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support import image_formats as toys

QKV = "lora_unet_double_blocks_0_img_attn_qkv"
LINEAR1 = "lora_unet_single_blocks_0_linear1"
PROJ = "lora_unet_double_blocks_0_img_attn_proj"


def file_of(path: Path, modules: list[str], arguments: dict[str, Any] | None) -> Path:
    tensors = {}
    weights = toys.in_the_authors_names("flux1", toys.flux())
    shapes = {
        f"lora_unet_{k.removesuffix('.weight').replace('.', '_')}": v for k, v in weights.items()
    }
    for seed, module in enumerate(modules):
        pair = toys.Pair(shapes[module], seed, rank=12)
        tensors |= {
            f"{module}.lora_down.weight": pair.down,
            f"{module}.lora_up.weight": pair.up,
            f"{module}.alpha": np.array(4.0, np.float32),
        }
    metadata = {"ss_network_module": "networks.lora_flux"}
    if arguments is not None:
        metadata["ss_network_args"] = json.dumps(arguments)
    return toys.save(path, tensors, metadata)


@pytest.mark.parametrize("value", ["True", "true", True])
@pytest.mark.parametrize(("module", "trained"), [(QKV, "1"), (LINEAR1, "1.333")])
def test_split_factors_are_told_of(
    value: object, module: str, trained: str, tmp_path: Path
) -> None:
    adapter = file_of(tmp_path / "x.safetensors", [PROJ, module], {"split_qkv": value})
    base = toys.save(tmp_path / "flux.safetensors", toys.in_the_authors_names("flux1", toys.flux()))
    (warning,) = [each for each in lorafast.plan(base, adapter).warnings if "split_qkv" in each]
    assert f"trained with {trained}" in warning
    assert "1 module of fused layers" in warning
    reasons = [each.reason for each in lorafast.analyze(adapter).findings]
    assert sum("split_qkv" in reason for reason in reasons) == 1
    assert "split_qkv" in " ".join(lorafast.scan(adapter).findings.table["reason"])


@pytest.mark.parametrize(
    ("modules", "arguments"),
    [
        ([PROJ], {"split_qkv": "True"}),
        ([QKV], {"split_qkv": "False"}),
        ([QKV], {"conv_dim": "4"}),
        ([QKV], None),
    ],
)
def test_others_are_not(
    modules: list[str], arguments: dict[str, Any] | None, tmp_path: Path
) -> None:
    adapter = file_of(tmp_path / "x.safetensors", modules, arguments)
    assert not any("split_qkv" in each.reason for each in lorafast.analyze(adapter).findings)


@pytest.mark.parametrize(
    ("width", "family"), [(768, "sd1"), (1024, "sd2"), (2048, "sdxl"), (640, "unet")]
)
def test_numbered_layers_tell_their_family_by_the_texts_width(
    width: int, family: str, tmp_path: Path
) -> None:
    random = np.random.default_rng(1)
    tensors = {}
    for number, inputs in enumerate([320, 320, width, 1280]):
        tensors[f"unet:{number}:up"] = random.normal(size=(8, 2)).astype(np.float32)
        tensors[f"unet:{number}:down"] = random.normal(size=(2, inputs)).astype(np.float32)
    # A text encoder's own widths tell nothing.
    tensors["text_encoder:0:up"] = random.normal(size=(8, 2)).astype(np.float32)
    tensors["text_encoder:0:down"] = random.normal(size=(2, 768)).astype(np.float32)
    adapter = toys.save(tmp_path / "x.safetensors", tensors)
    listing = lorafast.inspect(adapter)
    assert listing["format"] == "cloneofsimo"
    assert listing["adapter"]["family"] == family
