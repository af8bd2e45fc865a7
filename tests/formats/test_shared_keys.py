"""Files and lists of keys that others made: each is read, or refused for a plain reason."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import lorafast
import pytest
from support import diffusion
from support.shared_data import DATA, random_file, shapes_of, sparse

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
#: Lists whose modules are no plain products of two matrices: likewise, or what the refusal says.
OTHER_ALGORITHMS: dict[str, tuple[str, str, int, str] | str] = {
    "anima_lora_lokr_format": r"dora_scale has shape \[2048\], which is neither the outputs'",
    "flux_dora_onetrainer_format": ("onetrainer", "flux1", 506, "lora"),
    "flux_lokr_bfl_format": ("comfyui", "flux1", 6, "lokr"),
    "qwen_image_lora_kohya_format": ("kohya", "qwen_image", 8, "lokr"),
}
#: What becomes of each list on a model of its family and its true size, in diffusers' names and in
#: its author's: how many tensors are merged in each, or why none are.
MERGES: dict[str, tuple[str, tuple[int, int] | str]] = {
    "flux_control_lora_format": ("flux1", r"img_in.*\[3072, 128\]"),
    "flux_dora_onetrainer_format": ("flux1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    "flux_lokr_bfl_format": ("flux1", r"single_blocks\.0\.linear2|double_blocks\.0\.img_"),
    "flux_lora_aitoolkit_format": ("flux1", (418, 228)),
    "flux_lora_diffusers_base_model_format": ("flux1", (381, 191)),
    "flux_lora_diffusers_format": ("flux1", (494, 304)),
    "flux_lora_diffusers_no_proj_mlp_format": ("flux1", (342, 190)),
    "flux_lora_kohya_format": ("flux1", (494, 304)),
    "flux_lora_kohya_with_te1_format": ("flux1", "lora_te1_text_model_encoder_layers_0_mlp_fc1"),
    "flux_lora_xlabs_format": ("flux1", (24, 12)),
    "krea2_lora_kohya_format": ("krea2", (40, 40)),
    "anima_lora_kohya_format": ("cosmos2", r"cross_attn.k_proj|attn2.to_k"),
    "anima_lora_kohya_with_te_format": ("cosmos2", "lora_te_layers_0_self_attn_q_proj"),
    "anima_lora_peft_format": ("cosmos2", r"cross_attn.k_proj|attn2.to_k"),
    "qwen_image_lora_diffusers_format": ("qwen_image", (3, 3)),
    "qwen_image_lora_kohya_format": ("qwen_image", r"transformer_blocks\.0\.attn\.to_k"),
}
#: Of each file its format, its family, its modules and its algorithm; or what the refusal says.
ADAPTERS: dict[str, tuple[str, str | None, int, str] | str] = {
    "bloom_legacy_mergedlinear_bin__2023-04-07_d23b8e": ("peft", None, 24, "lora"),
    "cloneofsimo_examples__2022-12-12_cd7e2b": ("cloneofsimo", "sd2", 128, "lora"),
    "cloneofsimo_examples__2022-12-25_bed542": ("cloneofsimo", None, 48, "lora"),
    "cloneofsimo_examples__2022-12-29_4abdd2": ("cloneofsimo", None, 48, "lora"),
    "cloneofsimo_examples__2023-01-08_4ffb06": ("cloneofsimo", "sd1", 192, "lora"),
    "cloneofsimo_examples__2023-02-05_aaabaf": ("cloneofsimo", "sd1", 192, "lora"),
    "diffusers_repo__2024-05-28_e9009c": ("diffusers", "sd1", 128, "lora"),
    "gpt2_cls_deepbiolab__2025-03-24_1f001f": ("peft", None, 36, "lora"),
    "gpt2_mycguo__2025-05-07_3b8dc5": ("peft", None, 36, "lora"),
    "lycoris_lokr__2023-04-07_091ca4": ("kohya", "sd1", 350, "lokr"),
    "lycoris_lokr__2023-04-07_5a0b99": ("kohya", "sd1", 350, "lokr"),
    "peft_repo__2023-08-07_040dd0": ("peft", None, 192, "ia3"),
    "peft_repo__2026-01-21_50564e": "is a UNILORA adapter",
    "peft_repo__2026-03-16_43beef": ("peft", None, 24, "lora"),
    "peft_repo__2026-08-05_0d9d77": "is a FINEGATES adapter",
    "sam_lora_ranks__2023-10-04_809a8e": "a LoRA of Sam_LoRA's",
    "sam_lora_ranks__2023-10-04_aec092": "a LoRA of Sam_LoRA's",
    "sam_lora_ranks__2023-10-04_b966bd": "a LoRA of Sam_LoRA's",
    "sam_lora_ranks__2023-10-04_bb386f": "a LoRA of Sam_LoRA's",
    "sd15_catund_bin_and_st__2023-09-28_283f5c": ("diffusers", "sd1", 128, "lora"),
    "tiny_lora": ("peft", None, 12, "lora"),
}
#: Files of language models' formats, which have tests of their own.
ELSEWHERE = {"mlx_test_dpo__2025-08-31_7bf77c"}


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
def test_every_list_of_another_algorithm_is_read_or_refused(name: str, tmp_path: Path) -> None:
    file = random_file(name, tmp_path / "a.safetensors")
    expected = OTHER_ALGORITHMS[name]
    if isinstance(expected, str):
        with pytest.raises(lorafast.AdapterError, match=expected):
            lorafast.inspect(file)
        return
    listing = lorafast.inspect(file)
    assert isinstance(listing, lorafast.AdapterListing)
    found = (listing.format, listing.family, len(listing.modules), listing.algorithm)
    assert found == expected
    assert {use.use for use in listing.tensors_use} == {"used"}


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[Path, Path]]:
    """Models of true size in both namings, by family."""
    pytest.importorskip("diffusers", reason="the shapes are diffusers'")

    @cache
    def base(family: str) -> tuple[Path, Path]:
        ours = shapes_of(family)
        theirs: dict[str, tuple[int, ...]] = {}
        numbers = re.findall(r"(?<!single_)transformer_blocks\.(\d+)\.", "\n".join(ours))
        for name, shape in ours.items():
            if family in diffusion.RULES:
                last = max(map(int, numbers))
                author, *_ = diffusion.original_name(family, name, last)
            else:
                author = name
            rows = theirs.get(author, (0,))[0]
            theirs[author] = (rows + shape[0], *shape[1:])
        folder = tmp_path_factory.mktemp(family)
        single = {f"model.diffusion_model.{name}": shape for name, shape in theirs.items()}
        return sparse(folder / "ours.safetensors", ours), sparse(folder / "s.safetensors", single)

    return base


@pytest.mark.parametrize("name", MERGES)
def test_every_list_fits_its_model_or_is_refused(
    name: str, bases: Callable[[str], tuple[Path, Path]], tmp_path: Path
) -> None:
    file = random_file(name, tmp_path / "a.safetensors")
    family, expected = MERGES[name]
    for place, base in enumerate(bases(family)):
        if isinstance(expected, str):
            with pytest.raises(lorafast.PlanError, match=expected):
                lorafast.plan(base, file)
        else:
            plan = lorafast.plan(base, file).to_dict()
            assert plan["tensors_merged"] == expected[place]
            uses = {use["use"] for use in plan["adapters"][0]["coverage"]["tensors"]}
            assert uses == {"used"}


def test_every_file_has_its_place_here() -> None:
    found = {path.name for path in (DATA / "adapters").iterdir() if path.is_dir()}
    assert found == {*ADAPTERS, *ELSEWHERE}


@pytest.mark.parametrize("name", ADAPTERS)
def test_every_file_is_read_or_refused(name: str) -> None:
    folder = DATA / "adapters" / name
    expected = ADAPTERS[name]
    if any(file.suffix in {".bin", ".pt"} for file in folder.iterdir()):
        pytest.importorskip("torch", reason="the weights are a pickle")
    if isinstance(expected, str):
        with pytest.raises(lorafast.UnsupportedAdapterError, match=expected):
            lorafast.analyze(folder)
        return
    listing = lorafast.inspect(folder)
    assert isinstance(listing, lorafast.AdapterListing)
    found = (listing.format, listing.family, len(listing.modules), listing.algorithm)
    assert found == expected
    assert listing.kind == "adapter"
    # What scales the base's weight has no product that could be measured without it.
    measured = 0 if expected[3] == "ia3" else expected[2]
    assert len(lorafast.analyze(folder).modules) == measured
