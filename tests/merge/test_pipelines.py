"""Pipelines of diffusers as bases: one checkpoint of several folders."""

from __future__ import annotations

import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import Tensor, read_safetensors, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base
from support.pipelines import (
    CLIP_G,
    CLIP_L,
    SDXL,
    UNET,
    VAE,
    files,
    make_pipeline,
    prefixed,
    read_pipeline,
    weights,
    write_component,
)
from support.reference import merge_float64
from support.refusal import refuses

#: What a merge puts beside the base's own files.
WRITTEN = {"lorafast_manifest.json", "merge_report.json", "merge_report.md", "README.base.md"}
CHANGED = {
    "unet/diffusion_pytorch_model.safetensors",
    "text_encoder/model.safetensors",
    "README.md",
}


@pytest.fixture
def pipeline(tmp_path: Path) -> Path:
    return make_pipeline(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    """Of the UNet and the first text encoder, with the components before the names."""
    modules = prefixed("unet.", UNET) | prefixed("text_encoder.", CLIP_L)
    return make_adapter(tmp_path / "adapter", adapter_tensors(modules))


def assert_merged(base: Path, adapters: list[Path], output: Path) -> dict[str, Tensor]:
    before, after = read_pipeline(base), read_pipeline(output)
    terms = merge_float64(before, adapters)
    assert_merged_like_float64(after, terms)
    assert_rest_untouched(after, before, terms)
    assert all(after[name] != before[name] for name in terms)
    return after


def test_what_an_adapter_touches_is_merged_and_the_rest_is_carried_over(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    report = lorafast.merge(pipeline, adapter, tmp_path / "out", verify=True)
    assert_merged(pipeline, [adapter], tmp_path / "out")
    before, after = files(pipeline), files(tmp_path / "out")
    assert after.keys() == before.keys() | WRITTEN
    assert {name for name in before if after[name] != before[name]} == CHANGED
    listed = json.loads(after["lorafast_manifest.json"])["files"]
    assert {each["name"] for each in listed} >= before.keys()
    assert all(len(after[each["name"]]) == each["bytes"] for each in listed)
    assert "library_name: diffusers" in after["README.md"].decode()
    assert "license: openrail++" in after["README.md"].decode()
    assert report.weight_files == sorted(n for n in before if n.endswith(".safetensors"))
    assert lorafast.verify(pipeline, adapter, tmp_path / "out").ok


def test_shards_of_a_component_keep_their_index(tmp_path: Path, adapter: Path) -> None:
    base = make_pipeline(tmp_path / "base", dtype="BF16", shards={"unet": 3, "text_encoder": 2})
    lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    assert_merged(base, [adapter], tmp_path / "out")
    name = "unet/diffusion_pytorch_model.safetensors.index.json"
    before, after = files(base), files(tmp_path / "out")
    assert after[name] == before[name]
    lorafast.merge(base, adapter, tmp_path / "wide", dtype="float32", verify=True)
    wide = files(tmp_path / "wide")
    old, new = json.loads(before[name]), json.loads(wide[name])
    assert new["weight_map"] == old["weight_map"]
    assert new["metadata"]["total_size"] == 2 * old["metadata"]["total_size"]
    # Nothing of a component that nobody changes is converted.
    vae = "vae/diffusion_pytorch_model.safetensors"
    assert wide[vae] == before[vae]
    stored = read_safetensors(
        tmp_path / "wide" / "unet" / sorted(set(new["weight_map"].values()))[0]
    )
    assert {each.dtype for each in stored.values()} == {"F32"}
    assert all(not each.startswith("unet.") for each in stored)


def test_a_dtype_is_said_where_a_component_said_it(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    lorafast.merge(pipeline, adapter, tmp_path / "out", dtype="bfloat16", verify=True)

    def config(folder: str) -> Any:
        return json.loads((tmp_path / "out" / folder / "config.json").read_text())

    assert config("text_encoder")["torch_dtype"] == "bfloat16"
    assert config("text_encoder_2")["torch_dtype"] == "float32"
    assert "torch_dtype" not in config("unet")
    untouched = (pipeline / "unet" / "config.json").read_bytes()
    assert (tmp_path / "out" / "unet" / "config.json").read_bytes() == untouched


@pytest.mark.parametrize(
    ("component", "modules"), [("unet.", UNET), ("vae.", VAE), ("text_encoder_2.", CLIP_G)]
)
def test_names_without_a_component_match_the_one_that_has_them(
    tmp_path: Path, pipeline: Path, component: str, modules: dict[str, tuple[int, int]]
) -> None:
    bare = make_adapter(tmp_path / "bare", adapter_tensors(modules))
    full = make_adapter(tmp_path / "full", adapter_tensors(prefixed(component, modules)))
    lorafast.merge(pipeline, bare, tmp_path / "of_bare")
    lorafast.merge(pipeline, full, tmp_path / "of_full")
    assert read_pipeline(tmp_path / "of_bare") == assert_merged(
        pipeline, [full], tmp_path / "of_full"
    )


def test_shapes_tell_text_encoders_of_the_same_names_apart(tmp_path: Path, pipeline: Path) -> None:
    bare = make_adapter(tmp_path / "bare", adapter_tensors(CLIP_L))
    full = make_adapter(tmp_path / "full", adapter_tensors(prefixed("text_encoder.", CLIP_L)))
    lorafast.merge(pipeline, bare, tmp_path / "out")
    assert_merged(pipeline, [full], tmp_path / "out")


def test_two_components_that_would_fit_are_an_error(tmp_path: Path) -> None:
    twins = {
        "transformer": ("diffusers", "WanTransformer3DModel", UNET),
        "transformer_2": ("diffusers", "WanTransformer3DModel", UNET),
    }
    base = make_pipeline(tmp_path / "base", twins)
    bare = make_adapter(tmp_path / "bare", adapter_tensors(UNET))
    refuses(tmp_path, lorafast.PlanError, base, bare, "2 components", "transformer, transformer_2")
    second = make_adapter(tmp_path / "2", adapter_tensors(prefixed("transformer_2.", UNET)))
    lorafast.merge(base, second, tmp_path / "out", verify=True)
    assert_merged(base, [second], tmp_path / "out")


def test_what_no_component_has_is_an_error(tmp_path: Path, pipeline: Path) -> None:
    absent = make_adapter(tmp_path / "a", adapter_tensors({"unet.no_such.to_q": (24, 20)}))
    refuses(tmp_path, lorafast.PlanError, pipeline, absent, "no_such")
    other = make_adapter(tmp_path / "b", adapter_tensors(prefixed("text_encoder_3.", UNET)))
    with pytest.raises(lorafast.PlanError, match=r"text_encoder_3\.down_blocks.* fits no tensor"):
        lorafast.plan(pipeline, other)


def test_a_components_directory_is_a_base(tmp_path: Path, pipeline: Path) -> None:
    bare = make_adapter(tmp_path / "bare", adapter_tensors(UNET))
    lorafast.merge(pipeline / "unet", bare, tmp_path / "out", verify=True)
    assert (tmp_path / "out" / "diffusion_pytorch_model.safetensors").is_file()
    full = make_adapter(tmp_path / "full", adapter_tensors(prefixed("unet.", UNET)))
    lorafast.merge(pipeline / "unet", full, tmp_path / "again")
    lorafast.merge(pipeline, full, tmp_path / "whole")
    name = "diffusion_pytorch_model.safetensors"
    merged = (tmp_path / "out" / name).read_bytes()
    assert merged == (tmp_path / "again" / name).read_bytes()
    assert merged == (tmp_path / "whole" / "unet" / name).read_bytes()
    assert "library_name: diffusers" in (tmp_path / "out" / "README.md").read_text()


def test_several_adapters_and_their_subtraction(tmp_path: Path, adapter: Path) -> None:
    base = make_pipeline(tmp_path / "base", shards={"unet": 2})
    second = make_adapter(
        tmp_path / "second",
        adapter_tensors(prefixed("text_encoder_2.", CLIP_G) | prefixed("unet.", UNET), seed=7),
    )
    lorafast.merge(base, [adapter, second], tmp_path / "out", verify=True)
    assert_merged(base, [adapter, second], tmp_path / "out")
    lorafast.subtract(tmp_path / "out", [adapter, second], tmp_path / "back", original=base)
    before, back = files(base), files(tmp_path / "back")
    assert {name: back[name] for name in before} == before


def test_a_subtraction_without_the_base_keeps_the_pipeline(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    lorafast.merge(pipeline, adapter, tmp_path / "out")
    report = lorafast.subtract(tmp_path / "out", adapter, tmp_path / "back")
    before, back = read_pipeline(pipeline), read_pipeline(tmp_path / "back")
    assert before.keys() == back.keys()
    for name, each in before.items():
        assert np.allclose(back[name].float64(), each.float64(), atol=1e-7), name
    assert "tokenizer/vocab.json" in report.side_files
    assert (tmp_path / "back" / "README.md").read_bytes() == (pipeline / "README.md").read_bytes()


def test_tokenizers_stay_those_of_the_components(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    (adapter / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    (adapter / "tokenizer_config.json").write_text("{}")
    plan = lorafast.plan(pipeline, adapter)
    assert any("has a tokenizer" in note for note in plan.notes)
    lorafast.merge(pipeline, adapter, tmp_path / "out", verify=True)
    assert not (tmp_path / "out" / "tokenizer.json").exists()
    with pytest.raises(lorafast.PlanError, match="components of their own"):
        lorafast.plan(pipeline, adapter, tokenizer="adapter")


def test_a_sharded_variant_keeps_its_names(tmp_path: Path, pipeline: Path, adapter: Path) -> None:
    unet = pipeline / "unet"
    stem = "diffusion_pytorch_model"
    tensors = weights(UNET, 0, "F16")
    names = list(tensors)
    weight_map = {}
    for number in (1, 2):
        file = f"{stem}.fp16-0000{number}-of-00002.safetensors"
        part = names[number - 1 :: 2]
        write_safetensors(unet / file, {name: tensors[name] for name in part}, {"format": "pt"})
        weight_map |= dict.fromkeys(part, file)
    total = sum(len(each.data) for each in tensors.values())
    index = unet / f"{stem}.safetensors.index.fp16.json"
    content = {"metadata": {"total_size": total}, "weight_map": weight_map}
    index.write_text(json.dumps(content))
    # Beside the plain one it is the other variant.
    plan = lorafast.plan(pipeline, adapter)
    assert any("fp16-00001-of-00002" in note for note in plan.notes)
    (unet / f"{stem}.safetensors").unlink()
    lorafast.merge(pipeline, adapter, tmp_path / "out", verify=True)
    written = {path.name for path in (tmp_path / "out" / "unet").iterdir()}
    assert written == {"config.json", index.name, *weight_map.values()}
    assert (tmp_path / "out" / "unet" / index.name).read_bytes() == index.read_bytes()
    merged = {}
    for file in set(weight_map.values()):
        merged |= read_safetensors(tmp_path / "out" / "unet" / file)
    before = {f"unet.{name}": each for name, each in tensors.items()}
    terms = {
        name: term
        for name, term in merge_float64(read_pipeline_of(pipeline, before), [adapter]).items()
        if name.startswith("unet.")
    }
    assert_merged_like_float64({f"unet.{name}": each for name, each in merged.items()}, terms)


def read_pipeline_of(base: Path, unet: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a UNet with those of the first text encoder beside it."""
    encoder = read_safetensors(base / "text_encoder" / "model.safetensors")
    return unet | {f"text_encoder.{name}": each for name, each in encoder.items()}


def test_parts_make_the_same_pipeline(tmp_path: Path, adapter: Path) -> None:
    base = make_pipeline(tmp_path / "base", shards={"unet": 2})
    lorafast.merge(base, adapter, tmp_path / "whole")
    plan = lorafast.plan(base, adapter)
    written = [shard for part in plan.parts() for shard in part.write(tmp_path / "parts")]
    plan.assemble(tmp_path / "parts", written, tmp_path / "out")
    whole, out = files(tmp_path / "whole"), files(tmp_path / "out")
    reports = {"merge_report.json", "merge_report.md"}
    assert {n: out[n] for n in out.keys() - reports} == {
        n: whole[n] for n in whole.keys() - reports
    }


def test_a_quantised_component_that_nobody_changes_stays_quantised(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    """Whatever dtype the others are written in, and even where nothing could read it."""
    listed = json.loads((pipeline / "model_index.json").read_text())
    listed["text_encoder_3"] = ["transformers", "T5EncoderModel"]
    (pipeline / "model_index.json").write_text(json.dumps(listed))
    encoder = write_component(pipeline / "text_encoder_3", "transformers", "T5EncoderModel", VAE)
    quantised = weights(VAE, 5) | {
        "q.qweight": Tensor("I32", (4, 8), bytes(128)),
        "q.qzeros": Tensor("I32", (1, 1), bytes(4)),
    }
    write_safetensors(encoder / "model.safetensors", quantised, {"format": "pt"})
    config = {"quantization_config": {"quant_method": "gptq"}, "torch_dtype": "float16"}
    (encoder / "config.json").write_text(json.dumps(config))
    plan = lorafast.plan(pipeline, adapter, dtype="bfloat16")
    (note,) = [note for note in plan.notes if "keep their dtypes" in note]
    assert "text_encoder_2, vae, text_encoder_3" in note
    lorafast.merge(pipeline, adapter, tmp_path / "out", dtype="bfloat16", verify=True)
    before, after = files(pipeline), files(tmp_path / "out")
    for name in before:
        if name.startswith("text_encoder_3/"):
            assert after[name] == before[name]
    into = make_adapter(tmp_path / "q", adapter_tensors({"text_encoder_3.q": (8, 32)}))
    refuses(tmp_path, lorafast.LorafastError, pipeline, into, "GPTQ")


@pytest.mark.parametrize("device", ["torch:cpu"])
def test_torch_merges_into_components(
    tmp_path: Path, pipeline: Path, adapter: Path, device: str
) -> None:
    pytest.importorskip("torch")
    lorafast.merge(pipeline, adapter, tmp_path / "out", device=device, verify=True)
    assert_merged(pipeline, [adapter], tmp_path / "out")


def test_an_analysis_finds_the_base_of_each_component(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    analysis = lorafast.analyze(adapter, base=pipeline)
    assert len(analysis.modules) == len(UNET) + len(CLIP_L)
    bare = make_adapter(tmp_path / "bare", adapter_tensors(CLIP_L))
    full = make_adapter(tmp_path / "full", adapter_tensors(prefixed("text_encoder.", CLIP_L)))

    def norms(path: Path) -> list[Any]:
        modules = lorafast.analyze(path, base=pipeline).modules
        return [module.relative_norm for module in modules.values()]

    assert norms(bare) == norms(full)
    assert all(norm is not None and norm > 0 for norm in norms(full))


def test_the_command_shows_what_becomes_of_each_component(
    tmp_path: Path, pipeline: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafast._cli.main import main

    flags = ["--base", str(pipeline), "--adapters", str(adapter), "--output", str(tmp_path / "out")]
    assert main(["merge", *flags, "--dry-run"]) == 0
    shown = capsys.readouterr().out
    assert "unet (3 change)" in shown
    assert "vae (kept)" in shown
    assert not (tmp_path / "out").exists()
    assert main(["inspect", str(pipeline)]) == 0
    shown = capsys.readouterr().out
    assert f"Pipeline {pipeline}" in shown
    assert "AutoencoderKL" in shown
    assert "StableDiffusionXLPipeline" in shown


def with_variant(base: Path, *, plain: bool) -> Path:
    unet = base / "unet"
    write_safetensors(
        unet / "diffusion_pytorch_model.fp16.safetensors", weights(UNET, 0, "F16"), {"format": "pt"}
    )
    if not plain:
        (unet / "diffusion_pytorch_model.safetensors").unlink()
    return base


def test_the_plain_weights_win_over_a_variant(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    with_variant(pipeline, plain=True)
    plan = lorafast.plan(pipeline, adapter)
    (note,) = [note for note in plan.notes if "fp16" in note]
    assert "unet" in note
    assert "diffusion_pytorch_model.safetensors" in note
    lorafast.merge(pipeline, adapter, tmp_path / "out", verify=True)
    names = {path.name for path in (tmp_path / "out" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.safetensors"}


def test_a_variant_alone_is_merged_under_its_name(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    with_variant(pipeline, plain=False)
    lorafast.merge(pipeline, adapter, tmp_path / "out", verify=True)
    names = {path.name for path in (tmp_path / "out" / "unet").iterdir()}
    assert names == {"config.json", "diffusion_pytorch_model.fp16.safetensors"}
    assert_merged(pipeline, [adapter], tmp_path / "out")
    write_safetensors(
        pipeline / "unet" / "diffusion_pytorch_model.bf16.safetensors", weights(UNET, 0, "BF16"), {}
    )
    refuses(tmp_path, lorafast.CheckpointError, pipeline, adapter, "several variants", "bf16")


def test_what_belongs_to_no_component_is_left_out(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    write_component(pipeline / "unet_ema", "diffusers", "UNet2DConditionModel", UNET)
    write_safetensors(pipeline / "sd_xl_base.safetensors", weights(UNET, 0), {})
    report = lorafast.merge(pipeline, adapter, tmp_path / "out")
    assert set(report.left_out) == {"unet_ema/", "sd_xl_base.safetensors"}
    assert not (tmp_path / "out" / "unet_ema").exists()


def test_a_component_of_pickles_is_carried_over(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    listed = json.loads((pipeline / "model_index.json").read_text())
    listed["safety_checker"] = ["stable_diffusion", "StableDiffusionSafetyChecker"]
    listed["image_encoder"] = ["transformers", "CLIPVisionModelWithProjection"]
    (pipeline / "model_index.json").write_text(json.dumps(listed))
    checker = pipeline / "safety_checker"
    checker.mkdir()
    (checker / "pytorch_model.bin").write_bytes(b"\x80\x02}q\x00.")
    (checker / "config.json").write_text("{}")
    report = lorafast.merge(pipeline, adapter, tmp_path / "out", verify=True)
    for name in ("pytorch_model.bin", "config.json"):
        carried = (tmp_path / "out" / "safety_checker" / name).read_bytes()
        assert carried == (checker / name).read_bytes()
    into = make_adapter(tmp_path / "into", adapter_tensors({"safety_checker.visual": (8, 8)}))
    refuses(tmp_path, lorafast.PlanError, pipeline, into, "safety_checker, which has no weights as")
    assert any("image_encoder" in warning for warning in report.warnings)
    assert any("safety_checker" in warning for warning in report.warnings)


@pytest.mark.parametrize(
    ("spoil", "says"),
    [
        (lambda base: (base / "model_index.json").write_text("[]"), "not a JSON object"),
        (lambda base: (base / "model_index.json").write_text("{}"), "none of the components"),
        (
            lambda base: (base / "model_index.json").write_text('{"../x": ["diffusers", "A"]}'),
            "name of no folder",
        ),
        (
            lambda base: (base / "model_index.json").write_text('{".git": ["diffusers", "A"]}'),
            "name of no folder",
        ),
        (lambda base: (base / "unet" / "config.json").write_text("nothing"), "not a JSON object"),
        (
            lambda base: (base / "vae" / "diffusion_pytorch_model.safetensors").write_text("x"),
            "is a text, no weights",
        ),
    ],
)
def test_a_broken_pipeline_is_one_sentence(
    tmp_path: Path, pipeline: Path, adapter: Path, spoil: Any, says: str
) -> None:
    spoil(pipeline)
    refuses(tmp_path, lorafast.CheckpointError, pipeline, adapter, says)


def test_verification_finds_what_is_wrong_in_any_component(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    out = tmp_path / "out"
    lorafast.merge(pipeline, adapter, out)
    for name in ("vae", "unet"):
        path = out / name / "diffusion_pytorch_model.safetensors"
        content = bytearray(path.read_bytes())
        content[-2] ^= 0x40
        path.write_bytes(content)
        outcome = lorafast.verify(pipeline, adapter, out)
        assert any(f"tensor {name}." in problem for problem in outcome.problems)
        content[-2] ^= 0x40
        path.write_bytes(content)
    (out / "vae" / "config.json").unlink()
    problems = lorafast.verify(pipeline, adapter, out).problems
    assert list(problems) == ["vae/config.json is missing"]


def test_a_listing_has_the_components(pipeline: Path) -> None:
    listing = lorafast.inspect(pipeline)
    assert isinstance(listing, lorafast.CheckpointListing)
    assert listing.kind == "pipeline"
    found = {each.name: (each.kind, each.class_name) for each in listing.components}
    assert found == {
        "unet": ("denoiser", "UNet2DConditionModel"),
        "text_encoder": ("text_encoder", "CLIPTextModel"),
        "text_encoder_2": ("text_encoder", "CLIPTextModelWithProjection"),
        "vae": ("vae", "AutoencoderKL"),
    }
    assert sum(each.bytes for each in listing.components) == listing.total_bytes
    assert all(each.dtypes == {"F32": each.tensors} for each in listing.components)
    (unet,) = lorafast.inspect(pipeline / "unet").to_dict()["components"]
    assert (unet["name"], unet["kind"]) == ("", "denoiser")


def test_a_new_pipeline_replaces_all_of_an_older_one(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    older = make_pipeline(tmp_path / "out", SDXL | {"text_encoder_3": SDXL["text_encoder"]})
    with_variant(older, plain=True)
    (older / "unet" / "notes.txt").write_text("mine")
    lorafast.merge(pipeline, adapter, older, overwrite=True, verify=True)
    expected = files(pipeline).keys() | WRITTEN | {"unet/notes.txt"}
    assert files(older).keys() == expected
    assert not (older / "text_encoder_3").exists()
    language = make_base(tmp_path / "language")
    lorafast.merge(language, make_adapter(tmp_path / "llama"), older, overwrite=True, verify=True)
    assert not (older / "model_index.json").exists()
    assert [path.name for path in older.iterdir() if path.is_dir()] == ["unet"]
    assert [path.name for path in (older / "unet").iterdir()] == ["notes.txt"]


def test_an_error_leaves_an_older_pipeline_as_it_was(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    lorafast.merge(pipeline, adapter, tmp_path / "out")
    before = files(tmp_path / "out")
    path = adapter / "adapter_model.safetensors"
    tensors = read_safetensors(path)
    name = next(name for name in tensors if "lora_B" in name)
    infinite = Tensor(
        "F32", tensors[name].shape, b"\x00\x00\x80\x7f" * (len(tensors[name].data) // 4)
    )
    write_safetensors(path, tensors | {name: infinite}, {})
    with pytest.raises(lorafast.NumericError):
        lorafast.merge(pipeline, adapter, tmp_path / "out", overwrite=True)
    assert files(tmp_path / "out") == before


def test_a_linked_pipeline_is_read_through_its_links(
    tmp_path: Path, pipeline: Path, adapter: Path
) -> None:
    """As the hub's cache has it: each file is a link to one among others."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshot"
    blobs.mkdir()
    for number, name in enumerate(files(pipeline)):
        (snapshot / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(pipeline / name, blobs / str(number))
        (snapshot / name).symlink_to(blobs / str(number))
    lorafast.merge(snapshot, adapter, tmp_path / "out", verify=True)
    assert files(tmp_path / "out").keys() == files(pipeline).keys() | WRITTEN
    assert_merged(pipeline, [adapter], tmp_path / "out")


@pytest.mark.skipif(
    importlib.util.find_spec("diffusers") is None,
    reason="diffusers is not installed (the extra test has it)",
)
def test_diffusers_loads_what_was_merged_from_what_it_saved(tmp_path: Path) -> None:
    import diffusers
    import torch
    import transformers

    torch.manual_seed(0)
    unet = diffusers.UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=12,
        norm_num_groups=4,
        attention_head_dim=4,
    )
    vae = diffusers.AutoencoderKL(
        block_out_channels=(8,), norm_num_groups=4, latent_channels=4, sample_size=8
    )
    text = transformers.CLIPTextModel(
        transformers.CLIPTextConfig(
            vocab_size=50,
            hidden_size=12,
            intermediate_size=24,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=16,
        )
    )
    parts = {
        "unet": unet,
        "vae": vae,
        "text_encoder": text,
        "scheduler": diffusers.DDIMScheduler(steps_offset=1, clip_sample=False),
    }
    saved = diffusers.StableDiffusionPipeline(
        **parts,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    saved.save_pretrained(tmp_path / "base", max_shard_size="20KB")
    targets = {
        f"{folder}.{name}": module.weight.shape
        for folder, model in (("unet", unet), ("text_encoder", text))
        for name, module in model.named_modules()
        if name.endswith((".to_q", ".q_proj"))
    }
    assert {name.split(".")[0] for name in targets} == {"unet", "text_encoder"}
    adapter = make_adapter(
        tmp_path / "adapter", adapter_tensors({n: (s[0], s[1]) for n, s in targets.items()})
    )
    lorafast.merge(tmp_path / "base", adapter, tmp_path / "out", verify=True)
    loaded = diffusers.StableDiffusionPipeline.from_pretrained(tmp_path / "out", tokenizer=None)
    terms = merge_float64(read_pipeline(tmp_path / "base"), [adapter])
    assert len(terms) == len(targets)
    for folder, model in (("unet", unet), ("text_encoder", text), ("vae", vae)):
        for name, before in model.state_dict().items():
            after = getattr(loaded, folder).state_dict()[name]
            term = terms.get(f"{folder}.{name}")
            if term is None:
                assert torch.equal(after, before), name
            else:
                expected = torch.from_numpy(term.value).to(torch.float32)
                assert torch.allclose(after, expected, rtol=1e-6, atol=1e-7), name
                assert not torch.equal(after, before)
