"""How lone files of image models' adapters are told apart, refused, scanned and compared."""

from __future__ import annotations

from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from safetensors.numpy import load_file
from support.image_formats import (
    CLIP,
    CLIP_MODULES,
    FLUX,
    FLUX_MODULES,
    UNET,
    UNET_MODULES,
    Tensors,
    assert_equal,
    deltas_of,
    merge,
    pairs_of,
    save,
    sums,
    written,
)

# Recognition


def test_names_of_two_formats_need_the_format(tmp_path: Path) -> None:
    pairs = pairs_of(UNET, UNET_MODULES)
    first, second = dict(list(pairs.items())[:3]), dict(list(pairs.items())[3:])
    tensors = written(first, lambda name: f"unet.{name}") | written(
        second,
        lambda name: "lora_unet_" + name.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
    )
    adapter = save(tmp_path / "a.safetensors", tensors)
    base = save(tmp_path / "base.safetensors", UNET)
    message = r"names of several formats: diffusers \(unet\..*\), kohya \(lora_unet_.*format="
    for call in (
        lambda: lorafast.merge(base, adapter, tmp_path / "out"),
        lambda: lorafast.inspect(adapter),
        lambda: lorafast.analyze(adapter),
    ):
        with pytest.raises(lorafast.AdapterError, match=message):
            call()
    found = merge(base, adapter, tmp_path / "out", format="diffusers")
    assert_equal(found, sums(UNET, deltas_of(pairs)))
    assert lorafast.inspect(adapter, format="diffusers").to_dict()["format"] == "diffusers"
    assert len(lorafast.analyze(adapter, format="diffusers").modules) == len(pairs)


def test_the_command_takes_the_format(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pairs = pairs_of(UNET, UNET_MODULES)
    adapter = save(tmp_path / "a.safetensors", written(pairs, lambda name: f"unet.{name}"))
    base = save(tmp_path / "base.safetensors", UNET)
    words = ["merge", "-b", str(base), "-a", str(adapter), "-o", str(tmp_path / "out")]
    assert main([*words, "--format", "diffusers", "--quiet"]) == 0
    assert_equal(
        load_file(next((tmp_path / "out").glob("*.safetensors"))), sums(UNET, deltas_of(pairs))
    )
    assert main(["inspect", str(adapter), "--format", "diffusers"]) == 0
    shown = capsys.readouterr().out
    assert "diffusers" in shown
    assert "down_blocks" in shown
    assert main(["analyze", str(adapter), "--adapter-format", "diffusers", "--quiet"]) == 0


# Bad input


@pytest.mark.parametrize(
    ("odd", "message"),
    [
        (
            {"model.layers.0.mlp.up_proj.weight": np.ones((2, 2), np.float32)},
            "model.layers.0.mlp.up_proj.weight",
        ),
        ({"unet.conv_in.lora_C.weight": np.ones((2, 2), np.float32)}, "lora_C"),
        (
            {"unet.conv_in.alpha": np.array(1.0, np.float32)},
            "unet.conv_in.alpha but not its factors",
        ),
        ({"unet.conv_in.lora_A.weight": np.ones((2, 4, 3, 3), np.float32)}, "but not its lora_up"),
        (
            {f"unet.{UNET_MODULES[0]}.lora.down.weight": np.ones((2, 4), np.float32)},
            "which are one part of one module",
        ),
        ({f"unet.{UNET_MODULES[0]}.bora_scale_r": np.ones(4, np.float32)}, "bora_scale_r"),
        ({f"unet.{UNET_MODULES[0]}.lambda_layer": np.ones(4, np.float32)}, "T-LoRA"),
        ({"bundle_emb.x.string_to_param.*": np.ones((2, 4), np.float32)}, "bundle_emb"),
        ({"emb_params": np.ones((2, 4), np.float32)}, "embeddings of a textual inversion"),
        ({f"unet.{UNET_MODULES[0]}.alpha": np.array(0.0, np.float32)}, "is 0"),
        ({f"unet.{UNET_MODULES[0]}.alpha": np.array(np.inf, np.float32)}, "finite"),
    ],
)
def test_what_belongs_to_nothing_is_refused_by_name(
    odd: Tensors, message: str, tmp_path: Path
) -> None:
    tensors = written(pairs_of(UNET, UNET_MODULES), lambda name: f"unet.{name}") | odd
    adapter = save(tmp_path / "a.safetensors", tensors)
    base = save(tmp_path / "base.safetensors", UNET)
    with pytest.raises(lorafast.LorafastError, match=message):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_embeddings_are_left_out_where_they_are_allowed(tmp_path: Path) -> None:
    pairs = pairs_of(UNET, UNET_MODULES)
    tensors = written(pairs, lambda name: f"unet.{name}")
    tensors["bundle_emb.style.clip_l"] = np.ones((2, 6), np.float32)
    adapter = save(tmp_path / "a.safetensors", tensors)
    base = save(tmp_path / "base.safetensors", UNET)
    found = merge(base, adapter, tmp_path / "out", allow="bundle_emb")
    assert_equal(found, sums(UNET, deltas_of(pairs)))


def test_an_adapter_of_another_family_fits_nothing(tmp_path: Path) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES)
    adapter = save(tmp_path / "a.safetensors", written(pairs, lambda name: f"transformer.{name}"))
    base = save(tmp_path / "base.safetensors", UNET)
    with pytest.raises(lorafast.PlanError, match="transformer_blocks"):
        lorafast.merge(base, adapter, tmp_path / "out")


def test_half_of_the_keys_of_another_model_are_listed(tmp_path: Path) -> None:
    pairs = pairs_of(UNET, UNET_MODULES)
    tensors = written(pairs, lambda name: f"unet.{name}")
    tensors |= written(pairs_of(FLUX, FLUX_MODULES), lambda name: f"unet.{name}")
    adapter = save(tmp_path / "a.safetensors", tensors)
    base = save(tmp_path / "base.safetensors", UNET)
    with pytest.raises(lorafast.PlanError, match=r"transformer_blocks\.0\.attn\.to_q"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_one_module_in_two_spellings_is_an_error(tmp_path: Path) -> None:
    pairs = pairs_of(FLUX, FLUX_MODULES[:1])
    tensors = written(pairs, lambda name: f"transformer.{name}")
    tensors |= written(pairs, lambda name: f"transformer.base_model.model.{name}")
    adapter = save(tmp_path / "a.safetensors", tensors)
    base = save(tmp_path / "base.safetensors", FLUX)
    with pytest.raises(lorafast.AdapterError, match="one module of the base"):
        lorafast.merge(base, adapter, tmp_path / "out")


# Fleets and comparisons


def test_a_scan_finds_lone_files_by_what_they_are(tmp_path: Path) -> None:
    pairs = pairs_of(UNET, UNET_MODULES)
    save(tmp_path / "fleet" / "one.safetensors", written(pairs, lambda name: f"unet.{name}"))
    flat = written(
        pairs,
        lambda name: "lora_unet_" + name.replace(".", "_"),
        ".lora_down.weight",
        ".lora_up.weight",
    )
    save(tmp_path / "fleet" / "two.safetensors", flat)
    differences = {"diffusion_model.x.diff_b": np.ones(3, np.float32)}
    save(tmp_path / "fleet" / "three.safetensors", differences)
    save(tmp_path / "fleet" / "model.safetensors", UNET)
    fleet = lorafast.scan(tmp_path / "fleet")
    assert {"one", "two"} <= {Path(name).stem for name in fleet.names}
    assert "model" not in {Path(name).stem for name in fleet.names}
    comparison = lorafast.compare(
        [tmp_path / "fleet" / "one.safetensors", tmp_path / "fleet" / "two.safetensors"]
    )
    assert comparison.cosine[0, 1] == pytest.approx(1.0, abs=1e-6)


def test_components_meet_across_namings_without_a_base(tmp_path: Path) -> None:
    unet, clip = pairs_of(UNET, UNET_MODULES), pairs_of(CLIP, CLIP_MODULES)
    dotted = written(unet, lambda name: f"unet.{name}")
    dotted |= written(clip, lambda name: f"text_encoder.{name}")
    flat: Tensors = {}
    for prefix, pairs in (("lora_unet_", unet), ("lora_te_", clip)):
        flat |= written(
            pairs,
            lambda name, prefix=prefix: prefix + name.replace(".", "_"),  # type: ignore[misc]
            ".lora_down.weight",
            ".lora_up.weight",
        )
    files = [save(tmp_path / "a.safetensors", dotted), save(tmp_path / "b.safetensors", flat)]
    comparison = lorafast.compare(files)
    assert comparison.cosine[0, 1] == pytest.approx(1.0, abs=1e-6)
