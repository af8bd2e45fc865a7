"""The metadata of converted files: digests made anew, what programs look for, what is no more."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
import safetensors.numpy
from safetensors import safe_open
from safetensors.numpy import load_file
from support import image_formats as toys
from support.conversions import kohya_file, scene
from support.handmade import adapter_tensors, make_adapter
from support.image_formats import Pair, Tensors, save

DIGESTS = ["sshs_model_hash", "sshs_legacy_hash", "modelspec.hash_sha256"]


def convert(source: Path, target: Path, to: Any, **options: Any) -> lorafast.ConversionReport:
    return lorafast.convert(source, target, to=to, **options)


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, "np") as opened:
        return dict(opened.metadata())


def data_of(file: bytes) -> bytes:
    """What stands behind a safetensors file's header."""
    return file[8 + int.from_bytes(file[:8], "little") :]


def digests_of_sd_scripts(file: Path) -> dict[str, str]:
    """What sd-scripts would write into a file of these tensors: it saves them in memory, with the
    training's metadata alone, and digests that."""
    training = {k: v for k, v in metadata_of(file).items() if k.startswith("ss_")}
    saved = safetensors.numpy.save(load_file(file), training)
    model = hashlib.sha256(data_of(saved)).hexdigest()
    legacy = hashlib.sha256(saved[0x100000:0x110000]).hexdigest()[:8]
    return dict(zip(DIGESTS, [model, legacy, f"0x{model}"], strict=True))


def large(root: Path) -> tuple[Path, Path]:
    """A layer whose factors take more than a MiB, in three types of elements."""
    weight = np.zeros((600, 600), np.float32)
    module = "down_blocks.0.attentions.0.proj_in"
    base = toys.pipeline(root / "base", unet=toys.unet() | {f"{module}.weight": weight})
    pair = Pair(weight, 1, rank=300)
    flat = "lora_unet_" + module.replace(".", "_")
    other = "lora_unet_mid_block_resnets_0_conv1"
    small = Pair(np.zeros((4, 4, 3, 3)), 2)
    tensors = {
        f"{flat}.lora_down.weight": pair.down,
        f"{flat}.lora_up.weight": pair.up,
        f"{flat}.alpha": np.array(3, np.int64),
        f"{other}.lora_up.weight": small.up.astype(np.float16),
        f"{other}.lora_down.weight": small.down.astype(np.float16),
    }
    return base, save(
        root / "x.safetensors", tensors, {"ss_a": "ü\n", "b": "2", **dict.fromkeys(DIGESTS, "0")}
    )


@pytest.mark.parametrize("to", ["kohya", "lycoris", "onetrainer", "comfyui", "diffusers"])
def test_digests_are_those_of_the_file_that_is_written(to: str, tmp_path: Path) -> None:
    base, file = large(tmp_path)
    output = tmp_path / "y.safetensors"
    report = convert(file, output, to, base=base)
    metadata = metadata_of(output)
    expected = digests_of_sd_scripts(output)
    assert {name: metadata[name] for name in DIGESTS} == expected
    # Programs that find none compute the same of the file itself.
    own = hashlib.sha256(data_of(output.read_bytes())).hexdigest()
    assert metadata["sshs_model_hash"] == own
    assert expected["sshs_legacy_hash"] != hashlib.sha256(b"").hexdigest()[:8]
    assert metadata["ss_a"] == "ü\n"
    assert metadata["b"] == "2"
    assert any("made anew" in note for note in report.notes)


def test_kohyas_files_always_have_digests(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "peft", adapter_tensors(rank=4), lora_alpha=8)
    convert(adapter, tmp_path / "x.safetensors", "kohya")
    metadata = metadata_of(tmp_path / "x.safetensors")
    expected = digests_of_sd_scripts(tmp_path / "x.safetensors")
    assert metadata["sshs_model_hash"] == expected["sshs_model_hash"]
    assert metadata["sshs_legacy_hash"] == expected["sshs_legacy_hash"]
    assert "modelspec.hash_sha256" not in metadata
    assert (metadata["ss_network_dim"], metadata["ss_network_alpha"]) == ("4", "8.0")
    # Nothing tells a family of image models.
    assert "ss_base_model_version" not in metadata
    # Others have them where the source had.
    base, file = scene(tmp_path, "sd1", 2.0, dora=False)
    bare = save(tmp_path / "bare.safetensors", load_file(file))
    convert(bare, tmp_path / "y.safetensors", "comfyui", base=base)
    assert metadata_of(tmp_path / "y.safetensors") == {"format": "pt"}


def test_digests_without_metadata_of_the_training(tmp_path: Path) -> None:
    base, file = large(tmp_path)
    bare = save(tmp_path / "bare.safetensors", load_file(file), dict.fromkeys(DIGESTS, "0"))
    convert(bare, tmp_path / "y.safetensors", "comfyui", base=base)
    metadata = metadata_of(tmp_path / "y.safetensors")
    assert {k: metadata[k] for k in DIGESTS} == digests_of_sd_scripts(tmp_path / "y.safetensors")


def test_the_digest_of_a_real_file_is_found_again(real_data: Path, tmp_path: Path) -> None:
    files = sorted(real_data.glob("adapters/lycoris_lokr*/*.safetensors"))
    assert files
    for number, file in enumerate(files):
        output = tmp_path / f"{number}.safetensors"
        report = convert(file, output, "kohya")
        assert report.max_error == 0.0
        # Its tensors are the same in the same order; sd-scripts of then wrote headers unpadded, so
        # that the other digest is of other bytes.
        theirs, ours = metadata_of(file), metadata_of(output)
        assert ours["sshs_model_hash"] == theirs["sshs_model_hash"]
        assert ours["sshs_legacy_hash"] == digests_of_sd_scripts(output)["sshs_legacy_hash"]
        rest = ours.keys() - {"sshs_legacy_hash", "format"}
        assert {key: ours[key] for key in rest & theirs.keys()} == {
            key: theirs[key] for key in rest & theirs.keys()
        }


@pytest.mark.parametrize(
    ("kind", "version", "architecture"),
    [
        ("sd1", None, None),
        ("sdxl", "sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
        ("flux file", "flux1", None),
    ],
)
def test_the_model_is_said_where_it_is_known(
    kind: str, version: str | None, architecture: str | None, tmp_path: Path
) -> None:
    base, file = scene(tmp_path, kind, 1.0, dora=False)
    convert(file, tmp_path / "d.safetensors", "diffusers", base=base)
    tensors = load_file(tmp_path / "d.safetensors")
    bare = save(tmp_path / "bare.safetensors", tensors)
    convert(bare, tmp_path / "k.safetensors", "kohya", base=base)
    metadata = metadata_of(tmp_path / "k.safetensors")
    # The toy's text is 6 wide, so that nothing tells which UNet it is.
    assert metadata.get("ss_base_model_version") == version
    assert metadata.get("modelspec.architecture") == architecture
    assert metadata["ss_network_dim"] == "2"
    assert metadata["ss_network_alpha"] == "2.0"


@pytest.mark.parametrize(
    ("width", "version", "is_v2"),
    [(768, "sd_v1", "False"), (1024, "sd_v2", "True"), (2048, "sdxl_base_v1-0", "False")],
)
def test_the_width_of_the_text_tells_the_model(
    width: int, version: str, is_v2: str, tmp_path: Path
) -> None:
    module = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    pair = Pair(np.zeros((4, width)), 1)
    tensors = {f"unet.{module}.lora_A.weight": pair.down, f"unet.{module}.lora_B.weight": pair.up}
    file = save(tmp_path / "x.safetensors", tensors)
    convert(file, tmp_path / "k.safetensors", "kohya")
    metadata = metadata_of(tmp_path / "k.safetensors")
    assert metadata["ss_base_model_version"] == version
    assert metadata["ss_v2"] == is_v2
    # What the trainer said stays.
    told = {"ss_base_model_version": "mine", "modelspec.architecture": "other/lora"}
    save(file, tensors, told)
    convert(file, tmp_path / "k2.safetensors", "kohya")
    assert told.items() <= metadata_of(tmp_path / "k2.safetensors").items()


def test_flux_with_guidance_is_flux_dev(tmp_path: Path) -> None:
    weights = toys.in_the_authors_names("flux1", toys.flux())
    weights["guidance_in.in_layer.weight"] = np.zeros((4, 4), np.float32)
    base = save(tmp_path / "flux.safetensors", weights)
    trained = {k: v for k, v in weights.items() if k.startswith("double_blocks")}
    file = kohya_file(tmp_path / "x.safetensors", {"lora_unet_": trained}, 2.0, dora=False)
    save(file, load_file(file))
    convert(file, tmp_path / "k.safetensors", "kohya", base=base)
    metadata = metadata_of(tmp_path / "k.safetensors")
    assert metadata["modelspec.architecture"] == "flux-1-dev/lora"
    assert metadata["modelspec.sai_model_spec"] == "1.0.0"


def test_the_base_that_peft_names_stays_known(tmp_path: Path) -> None:
    for number, (name, expected) in enumerate([("a/b", "a/b"), ("/home/me/models/b", "b")]):
        adapter = make_adapter(
            tmp_path / f"peft{number}",
            adapter_tensors(rank=4),
            lora_alpha=8,
            base_model_name_or_path=name,
        )
        file = tmp_path / f"{number}.safetensors"
        convert(adapter, file, "kohya")
        assert metadata_of(file)["ss_sd_model_name"] == expected


def loha(root: Path, arguments: dict[str, Any]) -> Path:
    random = np.random.default_rng(1)
    tensors: Tensors = {}
    for part, shape in {"w1_a": (8, 1), "w1_b": (1, 8), "w2_a": (8, 2), "w2_b": (2, 8)}.items():
        values = random.normal(size=shape).astype(np.float32)
        tensors[f"lora_unet_mid_block_x.hada_{part}"] = values
    told = {
        "ss_network_dim": "100000",
        "ss_network_alpha": "1",
        "ss_network_args": json.dumps(arguments),
        "ss_network_module": "lycoris.kohya",
    }
    return save(root / "x.safetensors", tensors, told)


def test_what_is_said_of_a_network_holds_of_the_one_that_is_written(tmp_path: Path) -> None:
    file = loha(tmp_path, {"algo": "loha", "conv_dim": "4"})
    convert(file, tmp_path / "same.safetensors", "kohya")
    assert metadata_of(file).items() <= metadata_of(tmp_path / "same.safetensors").items()
    convert(file, tmp_path / "plain.safetensors", "kohya", algorithm="lora")
    metadata = metadata_of(tmp_path / "plain.safetensors")
    rank = len(load_file(tmp_path / "plain.safetensors")["lora_unet_mid_block_x.lora_down.weight"])
    assert metadata["ss_network_dim"] == str(rank)
    assert json.loads(metadata["ss_network_args"]) == {"algo": "locon", "conv_dim": "4"}


def test_an_alpha_of_the_metadata_goes_into_the_tensors(tmp_path: Path) -> None:
    """With its scale folded, a file that still said its alpha would be scaled twice."""
    module = "transformer.transformer_blocks.0.attn.to_q"
    pair = Pair(np.zeros((4, 4)), 1)
    tensors = {f"{module}.lora_A.weight": pair.down, f"{module}.lora_B.weight": pair.up}
    for number, told in enumerate([{"lora_alpha": "4"}, {"transformer.lora_alpha": "4"}]):
        file = save(tmp_path / f"{number}.safetensors", tensors, {"software": "x", **told})
        report = convert(file, tmp_path / f"{number}d.safetensors", "diffusers")
        assert report.max_error is not None
        assert report.max_error < 1e-14
        written = load_file(tmp_path / f"{number}d.safetensors")
        np.testing.assert_array_equal(written[f"{module}.lora_B.weight"], 2 * pair.up)
        metadata = metadata_of(tmp_path / f"{number}d.safetensors")
        assert metadata["software"] == "x"
        assert not told.keys() & metadata.keys()
