"""Converting adapters of image models: names, fused projections and components of each program."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support import image_formats as toys
from support.conversions import kohya_file, merged, scene
from support.image_formats import Pair, save

TARGETS = ["kohya", "comfyui", "diffusers", "peft"]


@pytest.mark.parametrize("dora", [False, True], ids=["lora", "dora"])
@pytest.mark.parametrize("alpha", [2.0, 1.0, 1.5])
@pytest.mark.parametrize("to", TARGETS)
@pytest.mark.parametrize("kind", ["flux file", "flux folder", "sd1", "sdxl"])
def test_there_and_back(kind: str, to: Any, alpha: float, dora: bool, tmp_path: Path) -> None:
    base, file = scene(tmp_path, kind, alpha, dora=dora)
    output = tmp_path / ("peft" if to == "peft" else f"{to}.safetensors")
    report = lorafast.convert(file, output, to=to, base=base)
    assert report.max_error is not None
    assert report.max_error < 1e-6
    assert (report.source_format, report.target_format) == ("kohya", to)
    expected = toys.merge(base, file, tmp_path / "expected")
    found = merged(base, output, tmp_path / "found")
    toys.assert_equal(found, {name: expected[name] for name in found})
    changed = toys.merge(base, file, tmp_path / "again").keys()
    assert found.keys() <= changed
    if to == "peft":
        return
    back = lorafast.convert(output, tmp_path / "back.safetensors", to="kohya", base=base)
    assert back.max_error is not None
    assert back.max_error < 1e-6
    tensors, again = load_file(file), load_file(tmp_path / "back.safetensors")
    assert again.keys() == tensors.keys()
    for name, value in tensors.items():
        if alpha == 2.0 or to != "diffusers":
            np.testing.assert_array_equal(again[name], value, err_msg=name)


def test_names_are_those_of_each_program(tmp_path: Path) -> None:
    base, file = scene(tmp_path, "sdxl", 1.0, dora=False)
    keys = {}
    for to in ("comfyui", "diffusers"):
        path = tmp_path / f"{to}.safetensors"
        lorafast.convert(file, path, to=to, base=base)  # type: ignore[arg-type]  # of a loop
        keys[to] = set(load_file(path))
        with safe_open(path, "np") as opened:
            metadata = opened.metadata()
        assert metadata["ss_network_module"] == "networks.lora"
        assert len(metadata["sshs_model_hash"]) == 64
        if to == "diffusers":
            config = json.loads(metadata["lora_adapter_metadata"])
            assert (config["unet.r"], config["unet.lora_alpha"]) == (2, 2)
            assert config["text_encoder_2.r"] == 2
    block = "transformer_blocks.0.attn1.to_q"
    assert f"diffusion_model.input_blocks.4.1.{block}.lora_A.weight" in keys["comfyui"]
    assert f"unet.down_blocks.1.attentions.0.{block}.lora_B.weight" in keys["diffusers"]
    layer = "text_model.encoder.layers.1.self_attn.q_proj"
    for name in ("clip_l", "clip_g"):
        assert f"text_encoders.{name}.transformer.{layer}.alpha" in keys["comfyui"]
    for name in ("text_encoder", "text_encoder_2"):
        assert f"{name}.{layer}.lora_A.weight" in keys["diffusers"]
    lorafast.convert(file, tmp_path / "peft", to="peft", base=base)
    folders = {path.name for path in (tmp_path / "peft").iterdir()}
    assert folders == {"unet", "text_encoder", "text_encoder_2"}


def test_a_part_that_was_not_trained_stays_zero(tmp_path: Path) -> None:
    base = save(tmp_path / "flux.safetensors", toys.in_the_authors_names("flux1", toys.flux()))
    own = {
        name: value
        for name, value in toys.flux().items()
        if name.endswith(("0.attn.to_k.weight", "attn.to_v.weight"))
    }
    tensors = {}
    for seed, (name, weight) in enumerate(own.items()):
        pair = Pair(weight, seed, rank=1 + seed % 2)
        module = "transformer." + name.removesuffix(".weight")
        tensors |= {f"{module}.lora_A.weight": pair.down, f"{module}.lora_B.weight": pair.up}
    file = save(tmp_path / "x.safetensors", tensors)
    report = lorafast.convert(file, tmp_path / "y.safetensors", to="kohya", base=base)
    assert report.max_error is not None
    assert report.max_error < 1e-6
    expected = toys.merge(base, file, tmp_path / "expected")
    toys.assert_equal(toys.merge(base, tmp_path / "y.safetensors", tmp_path / "found"), expected)
    up = load_file(tmp_path / "y.safetensors")[
        "lora_unet_double_blocks_0_img_attn_qkv.lora_up.weight"
    ]
    assert not up[: toys.WIDTH].any()


def test_other_namings_need_the_base(tmp_path: Path) -> None:
    pair = Pair(np.zeros((4, 4)), 1)
    module = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"{module}.lora_A.weight": pair.down, f"{module}.lora_B.weight": pair.up}
    file = save(tmp_path / "x.safetensors", tensors)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="give the base"):
        lorafast.convert(file, tmp_path / "y.safetensors", to="comfyui")
    report = lorafast.convert(file, tmp_path / "y.safetensors", to="kohya")
    assert report.max_error == 0.0
    flat = "lora_unet_" + module.removeprefix("unet.").replace(".", "_")
    assert f"{flat}.lora_down.weight" in load_file(tmp_path / "y.safetensors")


def test_diffusers_loads_what_is_written_for_it(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="the loader is diffusers'")
    torch = pytest.importorskip("torch")
    torch.manual_seed(0)
    model = diffusers.FluxTransformer2DModel(
        in_channels=4,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        axes_dims_rope=(4, 4, 8),
    )
    model.save_pretrained(tmp_path / "transformer")
    weights = load_file(tmp_path / "transformer" / "diffusion_pytorch_model.safetensors")
    theirs = toys.in_the_authors_names("flux1", weights)
    file = kohya_file(tmp_path / "x.safetensors", {"lora_unet_": theirs}, 1.5, dora=False)
    target = tmp_path / "pytorch_lora_weights.safetensors"
    base = tmp_path / "transformer"
    lorafast.convert(file, target, to="diffusers", base=base)
    lorafast.merge(base, file, tmp_path / "merged")
    expected = load_file(tmp_path / "merged" / "diffusion_pytorch_model.safetensors")
    model.load_lora_adapter(tmp_path, weight_name=target.name, prefix="transformer")
    model.fuse_lora()
    model.unload_lora()
    for name, value in model.state_dict().items():
        np.testing.assert_allclose(value.numpy(), expected[name], atol=1e-5, err_msg=name)


@pytest.mark.parametrize("to", TARGETS)
def test_the_error_of_dora_is_found_in_every_component(to: Any, tmp_path: Path) -> None:
    base, file = scene(tmp_path, "sdxl", 1.5, dora=True)
    output = tmp_path / ("peft" if to == "peft" else f"{to}.safetensors")
    report = lorafast.convert(file, output, to=to, base=base, dtype="bfloat16")
    assert report.max_error is not None
    assert 1e-3 < report.max_error < 1e-2
    assert not any("apart" in note for note in report.notes)
