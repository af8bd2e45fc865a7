"""Adapters that others trained for Stable Diffusion, and an IA3: each file is merged whole into a
random base of true widths.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support.algorithms import lokr
from support.image_formats import Tensors, pipeline, save
from support.shared_data import DATA

pytestmark = [
    pytest.mark.real_data,
    pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not there"),
]

NOISE = np.random.default_rng(2).normal(scale=0.05, size=100_003).astype(np.float16)
CLIP_LAYERS = 12
#: Every row would take long in float64.
ROWS = slice(0, None, 37)


def unet_shapes(text: int = 768) -> dict[str, tuple[int, ...]]:
    """The parameters of Stable Diffusion's UNet; the second's has wider texts."""
    diffusers = pytest.importorskip("diffusers", reason="the shapes are diffusers'")
    import torch

    with torch.device("meta"):
        unet = diffusers.UNet2DConditionModel(
            block_out_channels=(320, 640, 1280, 1280),
            cross_attention_dim=text,
            attention_head_dim=8,
        )
    return {name: tuple(value.shape) for name, value in unet.state_dict().items()}


def clip_shapes() -> dict[str, tuple[int, ...]]:
    shapes: dict[str, tuple[int, ...]] = {}
    for layer in range(CLIP_LAYERS):
        at = f"text_model.encoder.layers.{layer}"
        for name in ("q_proj", "k_proj", "v_proj", "out_proj"):
            shapes[f"{at}.self_attn.{name}.weight"] = (768, 768)
        shapes |= {f"{at}.mlp.fc1.weight": (3072, 768), f"{at}.mlp.fc2.weight": (768, 3072)}
    return shapes


def noise(shapes: Mapping[str, tuple[int, ...]]) -> Tensors:
    return {name: np.resize(np.roll(NOISE, len(name)), shape) for name, shape in shapes.items()}


@pytest.fixture(scope="module")
def attention(tmp_path_factory: pytest.TempPathFactory) -> Callable[[int], Path]:
    """Pipelines of the layers of attention, by the width of texts."""

    @cache
    def make(text: int) -> Path:
        unet = {
            name: shape
            for name, shape in unet_shapes(text).items()
            if name.endswith(".weight") and (".attn" in name or ".ff.net.0.proj" in name)
        }
        root = tmp_path_factory.mktemp("attention") / "base"
        return pipeline(root, unet=noise(unet), text_encoder=noise(clip_shapes()))

    return make


def components(root: Path) -> Tensors:
    return {
        f"{file.parent.name}.{name}": value
        for file in sorted(root.rglob("*.safetensors"))
        for name, value in load_file(file).items()
    }


def in_order(weights: Tensors, order: tuple[str, ...]) -> list[str]:
    """The layers of the UNet as diffusers registers them, with the middle last."""
    blocks = sorted(
        {name.split(".attn1.")[0] for name in weights if ".attn1." in name},
        key=lambda name: (["down", "up_b", "mid_"].index(name[5:9]), name),
    )
    found = []
    for block in blocks:
        for part in order:
            names = ["net.0.proj"] if part == "ff" else ["to_q", "to_k", "to_v", "to_out.0"]
            found += [f"{block}.{part}.{name}" for name in names]
    return found


TEXT = [
    f"text_encoder.text_model.encoder.layers.{layer}.self_attn.{name}_proj"
    for layer in range(CLIP_LAYERS)
    for name in ("k", "v", "q", "out")
]
Pairs = dict[str, tuple[Any, Any]]


def counted(pairs: list[tuple[Any, Any]], weights: Tensors) -> Pairs:
    """The layers that pairs of (up, down) belong to: their count and shapes tell."""
    orders = (("attn1", "attn2"), ("attn1", "ff", "attn2"), ("attn1", "attn2", "ff"))
    for layers in (TEXT, *(in_order(weights, order) for order in orders)):
        if len(layers) == len(pairs) and all(
            weights[f"{layer}.weight"].shape == (len(up), down.shape[1])
            for layer, (up, down) in zip(layers, pairs, strict=True)
        ):
            return dict(zip(layers, pairs, strict=True))
    raise AssertionError("in no order the layers of the base")


def pairs_of(file: Path, weights: Tensors) -> Pairs:
    """Up and down of each layer, read without lorafast."""
    if file.suffix in {".pt", ".bin"}:
        import torch

        state = torch.load(file, map_location="cpu", weights_only=True)
        if isinstance(state, list):
            values = [value.detach().float().numpy() for value in state]
            return counted(list(zip(values[::2], values[1::2], strict=True)), weights)
        tensors = {name: value.detach().float().numpy() for name, value in state.items()}
    else:
        tensors = load_file(file)
    numbered: set[str] = set()
    found: Pairs = {}
    for name in tensors:
        if not name.endswith((".down.weight", ":down")):
            continue
        down = tensors[name]
        up = tensors.get(f"{name.removesuffix('down.weight')}up.weight")
        if ":" in name:
            numbered.add(name.split(":")[0])
            continue
        module = name.removeprefix("unet.").removesuffix(".down.weight").removesuffix(".lora")
        module = module.replace(".processor.", ".").removesuffix("_lora")
        module += ".0" if module.endswith("to_out") else ""
        found[f"unet.{module}"] = (up, down)
    for component in sorted(numbered):
        count = sum(name.startswith(f"{component}:") for name in tensors) // 2
        pairs = [
            (tensors[f"{component}:{number}:up"], tensors[f"{component}:{number}:down"])
            for number in range(count)
        ]
        found |= counted(pairs, weights)
    return found


#: The number of modules, and the width of the model's texts.
FILES = {
    "cloneofsimo_examples__2022-12-12_cd7e2b": (128, 1024),
    "cloneofsimo_examples__2022-12-25_bed542": (48, 768),
    "cloneofsimo_examples__2022-12-29_4abdd2": (48, 768),
    "cloneofsimo_examples__2023-01-08_4ffb06": (192, 768),
    "cloneofsimo_examples__2023-02-05_aaabaf": (192, 768),
    "diffusers_repo__2024-05-28_e9009c": (128, 768),
    "sd15_catund_bin_and_st__2023-09-28_283f5c": (128, 768),
}


#: Merged below, and in tests/conformance and tests/formats/test_peft.py; the last are refused.
OTHERS = ("lycoris_lokr__", "peft_repo__2023-08-07")
LANGUAGE_MODELS = ("bloom", "gpt2_", "mlx_test_dpo", "peft_repo__2026-03-16", "tiny_lora")
REFUSED = ("peft_repo__2026-01-21", "peft_repo__2026-08-05", "sam_lora_ranks__")


def test_every_file_is_merged_or_refused() -> None:
    known = (*FILES, *OTHERS, *LANGUAGE_MODELS, *REFUSED)
    folders = [path.name for path in (DATA / "adapters").iterdir() if path.is_dir()]
    assert [name for name in folders if not name.startswith(known)] == []


@pytest.mark.parametrize("name", FILES)
def test_a_file_of_stable_diffusion_is_merged_whole(
    name: str, attention: Callable[[int], Path], tmp_path: Path
) -> None:
    count, text = FILES[name]
    (file,) = (path for path in (DATA / "adapters" / name).iterdir() if path.is_file())
    if file.suffix != ".safetensors":
        pytest.importorskip("torch", reason="the weights are a pickle")
    if text != 768:
        with pytest.raises(lorafast.AdapterError, match="trained on another model"):
            lorafast.plan(attention(768), file)
    base = attention(text)
    before = components(base)
    pairs = pairs_of(file, before)
    assert len(pairs) == count
    lorafast.merge(base, file, tmp_path / "out", allow="bundle_emb")
    after = components(tmp_path / "out")
    assert after.keys() == before.keys()
    for key, value in before.items():
        pair = pairs.get(key.removesuffix(".weight"))
        if pair is None:
            assert np.array_equal(after[key], value), key
            continue
        up, down = (factor.astype(np.float64) for factor in pair)
        assert_near(after[key], value, up[ROWS] @ down)


def assert_near(after: Any, before: Any, delta: Any) -> None:
    """Some rows, rounded once to float16."""
    expected = before[ROWS].astype(np.float64) + delta
    found = after[ROWS].astype(np.float64)
    np.testing.assert_allclose(found, expected, rtol=2.0**-11, atol=2.0**-25 + 1e-6)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pipeline with the whole UNet, of 1.7 GB."""
    root = tmp_path_factory.mktemp("sd1_whole") / "base"
    return pipeline(root, unet=noise(unet_shapes()), text_encoder=noise(clip_shapes()))


@pytest.mark.exhaustive
@pytest.mark.parametrize("rank", [4, 8])
def test_the_first_lokr_files_are_merged_whole(rank: int, whole: Path, tmp_path: Path) -> None:
    (file,) = (DATA / "adapters").glob(f"lycoris_lokr__*/*_{rank}_lokr.safetensors")
    lorafast.merge(whole, file, tmp_path / "out")
    before, after = components(whole), components(tmp_path / "out")
    parts: dict[str, dict[str, Any]] = {}
    for key, value in load_file(file).items():
        module, _, part = key.partition(".")
        parts.setdefault(module, {})[part] = value.astype(np.float64)
    prefixes = {"unet.": "lora_unet_", "text_encoder.": "lora_te_"}
    changed = 0
    for key, value in before.items():
        (start,) = (start for start in prefixes if key.startswith(start))
        stem = key.removeprefix(start).removesuffix(".weight").replace(".", "_")
        own = parts.get(prefixes[start] + stem)
        if own is None or not key.endswith(".weight"):
            assert np.array_equal(after[key], value), key
            continue
        changed += 1
        delta = lokr(own, value, float(own["alpha"]) / rank)
        assert_near(after[key], value, delta[ROWS])
    assert changed == len(parts) == 350


def test_an_ia3_of_2023_is_merged_whole(tmp_path: Path) -> None:
    torch = pytest.importorskip("torch", reason="the weights are a pickle")
    (folder,) = (DATA / "adapters").glob("peft_repo__2023-08-07*")
    state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    vectors = {
        f"{key.removeprefix('base_model.model.').removesuffix('.ia3_l')}.weight": value.numpy()
        for key, value in state.items()
    }
    shapes = {
        name: (len(vector), 8) if vector.shape[1] == 1 else (8, vector.shape[1])
        for name, vector in vectors.items()
    }
    base = tmp_path / "base"
    save(base / "model.safetensors", noise(shapes))
    (base / "config.json").write_text(json.dumps({"model_type": "t5"}))
    lorafast.merge(base, folder, tmp_path / "out")
    with safe_open(tmp_path / "out/model.safetensors", "np") as file:
        for name, value in noise(shapes).items():
            expected = value.astype(np.float64) * vectors[name]
            np.testing.assert_allclose(file.get_tensor(name), expected, rtol=2.0**-10, atol=1e-6)
