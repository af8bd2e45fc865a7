"""Single files of diffusion models in their authors' names as bases."""

from __future__ import annotations

import hashlib
from pathlib import Path

import lorafast
import pytest
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import read_header, read_safetensors, tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter
from support.pipelines import make_single_file
from support.reference import merge_float64

TO_Q = "model.diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q"
METADATA = {
    "format": "pt",
    "modelspec.title": "Toy",
    "modelspec.architecture": "stable-diffusion-xl-v1-base",
    "modelspec.hash_sha256": "0x1234",
    "sshs_model_hash": "abcd",
}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter", adapter_tensors({TO_Q: (24, 20)}))


@pytest.mark.parametrize("dtype", ["F16", "F32"])
def test_the_output_is_a_file_of_the_same_name(tmp_path: Path, adapter: Path, dtype: str) -> None:
    base = make_single_file(tmp_path / "sd_xl_base_1.0.safetensors", dtype, METADATA)
    plan = lorafast.plan(base, adapter)
    report = lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    (written,) = (tmp_path / "out").glob("*.safetensors")
    assert written.name == base.name
    assert report.weight_files == [base.name]
    before, after = read_safetensors(base), read_safetensors(written)
    assert list(after) == list(before)
    terms = merge_float64(before, [adapter])
    assert_merged_like_float64(after, terms)
    assert_rest_untouched(after, before, terms)
    # What the metadata say of the model stays; digests of its tensors would be wrong.
    metadata = read_header(written)[0]["__metadata__"]
    kept = {k: v for k, v in METADATA.items() if "hash" not in k}
    assert metadata == kept
    (note,) = [note for note in plan.notes if "hash" in note]
    assert "modelspec.hash_sha256 and sshs_model_hash" in note
    card = (tmp_path / "out" / "README.md").read_text()
    assert "library_name: diffusion-single-file" in card


def test_digests_stay_where_nothing_changes(tmp_path: Path) -> None:
    """A pipeline's component that nobody changes is carried over with its header."""
    from support.pipelines import UNET, VAE, make_pipeline, prefixed, weights

    base = make_pipeline(tmp_path / "base")
    vae = base / "vae" / "diffusion_pytorch_model.safetensors"
    write_safetensors(vae, weights(VAE, 3), METADATA)
    adapter = make_adapter(tmp_path / "unet", adapter_tensors(prefixed("unet.", UNET)))
    lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    carried = (tmp_path / "out" / "vae" / vae.name).read_bytes()
    assert hashlib.sha256(carried).digest() == hashlib.sha256(vae.read_bytes()).digest()


def test_a_dtype_converts_the_file(tmp_path: Path, adapter: Path) -> None:
    base = make_single_file(tmp_path / "sd.safetensors", "F32", METADATA)
    lorafast.merge(base, adapter, tmp_path / "out", dtype="float16", verify=True)
    after = read_safetensors(tmp_path / "out" / "sd.safetensors")
    assert {each.dtype for each in after.values()} == {"F16"}
    assert (
        "sshs_model_hash" not in read_header(tmp_path / "out" / "sd.safetensors")[0]["__metadata__"]
    )


def test_names_without_the_denoisers_prefix_fit(tmp_path: Path, adapter: Path) -> None:
    base = make_single_file(tmp_path / "sd.safetensors", "F32")
    bare = TO_Q.removeprefix("model.diffusion_model.")
    short = make_adapter(tmp_path / "short", adapter_tensors({bare: (24, 20)}))
    lorafast.merge(base, adapter, tmp_path / "out")
    lorafast.merge(base, short, tmp_path / "of_short")
    content = (tmp_path / "out" / "sd.safetensors").read_bytes()
    assert (tmp_path / "of_short" / "sd.safetensors").read_bytes() == content


def test_a_bare_transformer_in_its_authors_names(tmp_path: Path) -> None:
    modules = {"double_blocks.0.img_attn.qkv": (60, 20), "single_blocks.0.linear2": (20, 100)}
    base = tmp_path / "flux1-dev.safetensors"
    write_safetensors(
        base,
        {
            f"{module}.weight": tensor([[0.01] * n] * m, "BF16")
            for module, (m, n) in modules.items()
        },
        {},
    )
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    before, after = read_safetensors(base), read_safetensors(tmp_path / "out" / base.name)
    assert_merged_like_float64(after, merge_float64(before, [adapter]))


def test_a_listing_tells_the_parts_of_the_file(tmp_path: Path) -> None:
    listing = lorafast.inspect(make_single_file(tmp_path / "sd.safetensors"))
    assert isinstance(listing, lorafast.CheckpointListing)
    assert listing.kind == "checkpoint"
    assert {(each.name, each.kind) for each in listing.components} == {
        ("conditioner.embedders.0.transformer", "text_encoder"),
        ("conditioner.embedders.1.model", "text_encoder"),
        ("first_stage_model", "vae"),
        ("model.diffusion_model", "denoiser"),
    }
