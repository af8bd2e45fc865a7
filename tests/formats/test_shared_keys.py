"""Files and lists of keys that others made: each is read, or refused for a reason that is told."""

from __future__ import annotations

import json
import os
from pathlib import Path

import lorafast
import numpy as np
import pytest
from safetensors.numpy import save_file

DATA = Path(
    os.environ.get("LORAFAST_TEST_DATA", Path(__file__).parents[2].parent / "shared" / "data")
)
pytestmark = pytest.mark.skipif(not DATA.is_dir(), reason="the shared data are not there")

#: Of each list its format, its family, its modules and its components.
KEYS: dict[str, tuple[str, str | None, int, list[str]]] = {
    "anima_lora_kohya_format": ("kohya", "cosmos", 11, ["denoiser"]),
    "anima_lora_kohya_with_te_format": ("kohya", "cosmos", 9, ["denoiser", "text_encoder"]),
    "anima_lora_peft_format": ("comfyui", "cosmos", 6, ["denoiser"]),
    "flux_control_lora_format": ("bfl", "flux1", 314, ["denoiser"]),
    "flux_lora_aitoolkit_format": ("comfyui", "flux1", 228, ["denoiser"]),
    "flux_lora_diffusers_base_model_format": ("diffusers", "flux1", 381, ["denoiser"]),
    "flux_lora_diffusers_format": ("diffusers", "flux1", 494, ["denoiser"]),
    "flux_lora_diffusers_no_proj_mlp_format": ("diffusers", "flux1", 342, ["denoiser"]),
    "flux_lora_kohya_format": ("kohya", "flux1", 304, ["denoiser"]),
    "flux_lora_kohya_with_te1_format": ("kohya", "flux1", 376, ["denoiser", "text_encoder"]),
    "flux_lora_xlabs_format": ("xlabs", "flux1", 12, ["denoiser"]),
    "krea2_lora_kohya_format": ("kohya", "krea2", 40, ["denoiser"]),
    "qwen_image_lora_diffusers_format": ("diffusers", None, 3, ["denoiser"]),
}
#: Lists whose modules are no plain products of two matrices, with their formats.
OTHER_ALGORITHMS: dict[str, str] = {
    "anima_lora_lokr_format": "comfyui",
    "flux_dora_onetrainer_format": "onetrainer",
    "flux_lokr_bfl_format": "comfyui",
    "qwen_image_lora_kohya_format": "kohya",
}
#: Of each file its format, its family and its modules; or what the refusal has to say.
ADAPTERS: dict[str, tuple[str, str | None, int] | str] = {
    "bloom_legacy_mergedlinear_bin__2023-04-07_d23b8e": ("peft", None, 24),
    "cloneofsimo_examples__2022-12-12_cd7e2b": ("cloneofsimo", None, 128),
    "cloneofsimo_examples__2022-12-25_bed542": ("cloneofsimo", None, 48),
    "cloneofsimo_examples__2022-12-29_4abdd2": ("cloneofsimo", None, 48),
    "cloneofsimo_examples__2023-01-08_4ffb06": ("cloneofsimo", None, 192),
    "cloneofsimo_examples__2023-02-05_aaabaf": ("cloneofsimo", None, 192),
    "diffusers_repo__2024-05-28_e9009c": ("diffusers", "sd1", 128),
    "gpt2_cls_deepbiolab__2025-03-24_1f001f": ("peft", None, 36),
    "gpt2_mycguo__2025-05-07_3b8dc5": ("peft", None, 36),
    "peft_repo__2026-01-21_50564e": "",
    "peft_repo__2026-03-16_43beef": ("peft", None, 24),
    "sd15_catund_bin_and_st__2023-09-28_283f5c": ("diffusers", "sd1", 128),
    "tiny_lora": ("peft", None, 12),
}


def random_file(name: str, path: Path) -> Path:
    """Random tensors of the shapes of a list."""
    shapes = json.loads((DATA / "keys" / f"{name}.json").read_text())["keys"]
    random = np.random.default_rng(1)

    def value(key: str, shape: list[int]) -> np.ndarray:
        if key.endswith(".alpha"):
            return np.full(shape, 8, np.float16)
        # The values do not matter, and large tensors take time.
        block = random.normal(size=min(int(np.prod(shape)), 1024)).astype(np.float16)
        return np.resize(block, shape)

    save_file({key: value(key, shape) for key, shape in shapes.items()}, path)
    return path


def test_every_list_has_its_place_here() -> None:
    found = {path.stem for path in (DATA / "keys").glob("*.json")}
    assert found == {*KEYS, *OTHER_ALGORITHMS}


@pytest.mark.parametrize("name", KEYS)
def test_every_list_of_keys_is_read(name: str, tmp_path: Path) -> None:
    file = random_file(name, tmp_path / "a.safetensors")
    expected, family, modules, components = KEYS[name]
    listing = lorafast.inspect(file)
    assert isinstance(listing, lorafast.AdapterListing)
    assert (listing.format, listing.family, len(listing.modules)) == (expected, family, modules)
    assert list(listing.components) == components
    # Every tensor has a part.
    assert {use.use for use in listing.tensors_use} == {"used"}
    assert listing.features == ()


@pytest.mark.parametrize("name", OTHER_ALGORITHMS)
def test_every_list_of_another_algorithm_is_read_or_refused_by_name(
    name: str, tmp_path: Path
) -> None:
    file = random_file(name, tmp_path / "a.safetensors")
    try:
        listing = lorafast.inspect(file)
    except lorafast.UnsupportedAdapterError as error:
        assert any(word in str(error) for word in ("LoKr", "dora_scale"))  # noqa: PT017
        return
    assert isinstance(listing, lorafast.AdapterListing)
    assert listing.format in (OTHER_ALGORITHMS[name], None)


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_file_is_read_or_refused(name: str) -> None:
    folder = DATA / "adapters" / name
    expected = ADAPTERS[name]
    if not folder.is_dir():
        pytest.skip("not among the shared data")
    if any(file.suffix in {".bin", ".pt"} for file in folder.iterdir()):
        pytest.importorskip("torch", reason="the weights are a pickle")
    if isinstance(expected, str):
        with pytest.raises(lorafast.LorafastError, match=expected or "."):
            lorafast.analyze(folder)
        return
    listing = lorafast.inspect(folder)
    assert isinstance(listing, lorafast.AdapterListing)
    assert (listing.format, listing.family, len(listing.modules)) == expected
    assert listing.kind == "adapter"
    assert len(lorafast.analyze(folder).modules) == expected[2]
