"""Files that others made: each merges right on a base of its shapes, or is refused by name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.compare import assert_merged_like_float64
from support.files import Tensor, read_checkpoint, read_safetensors, tensor, write_safetensors
from support.models import Models
from support.reference import PREFIX, merge_float64
from toys import assert_same_outputs, is_conv1d, load_with_head, merge_with_peft

pytestmark = pytest.mark.real_data

WEIGHTS = "adapter_model.safetensors"
# The module that each config gets factors for.
MODULE = "layers.0.q_proj"
MERGED = {
    "mlx_test_dpo",
    "bloom_legacy",
    "gpt2_cls",
    "gpt2_mycguo",
    "tiny_lora",
    "peft_repo__2026-03-16",
}
# Merged in tests/formats/test_algorithms_of_tools.py and test_shared_keys.py.
ELSEWHERE = ("lycoris_lokr", "peft_repo__2023-08-07", "diffusers_repo", "sd15_catund")
# The part of a folder's name -> words of the refusal.
REFUSED = {
    "cloneofsimo_examples": ["cloneofsimo"],
    "peft_repo__2026-01-21": ["peft_type"],
    "peft_repo__2026-08-05": ["peft_type"],
    "sam_lora_ranks": ["Sam_LoRA"],
}


def with_safetensors(folder: Path, copy: Path) -> Path:
    """The adapter with its weights as safetensors, for the reference; torch alone reads a .bin."""
    if not (folder / "adapter_model.bin").is_file():
        return folder
    import torch
    from safetensors.torch import save_file

    state = torch.load(folder / "adapter_model.bin", map_location="cpu", weights_only=True)
    copy.mkdir()
    shutil.copy(folder / "adapter_config.json", copy)
    save_file({key: value.contiguous() for key, value in state.items()}, copy / WEIGHTS)
    return copy


def fitting_base(
    path: Path,
    adapter: Path,
    config: dict[str, Any],
    *,
    parts: Sequence[bool] = (True,),
    shapes: Mapping[str, tuple[int, int]] | None = None,
) -> Path:
    """A random base with a weight for each pair of factors and for each saved tensor.

    Args:
        path: the directory to make.
        adapter: the adapter that it is to fit.
        config: its config.
        parts: which parts of each weight's outputs have factors (`enable_lora`).
        shapes: of weights that the factors' own shapes do not tell.
    """
    random = np.random.default_rng(5)
    tensors: dict[str, Tensor] = {}
    file = adapter / WEIGHTS
    found = read_safetensors(file) if file.is_file() else {}
    noise = random.normal(scale=0.02, size=100_003)
    for key, value in found.items():
        name, shape = key.removeprefix(PREFIX), value.shape
        if key.endswith(".lora_A.weight"):
            name = name.replace(".lora_A", "")
            outputs = found[key.replace("lora_A", "lora_B")].shape[0] * len(parts) // sum(parts)
            shape = (shapes or {}).get(name, (outputs, value.shape[1]))
        elif ".lora_" in key:
            continue
        if config["model_type"] == "gpt2" and len(shape) == 2 and ".c_" in name:
            shape = shape[::-1]
        tensors[name] = tensor(np.resize(noise, shape))
    tensors["last.weight"] = tensor(random.normal(size=(3, 2)))
    path.mkdir()
    write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config))
    return path


def model_type(folder: Path) -> str:
    # tiny_lora names DialoGPT, which is a GPT-2.
    if folder.name.startswith(("gpt2", "tiny_lora")):
        return "gpt2"
    return "bloom" if folder.name.startswith("bloom") else "roberta"


def test_every_adapter(real_data: Path, tmp_path: Path) -> None:
    folders = sorted(path for path in (real_data / "adapters").iterdir() if path.is_dir())
    assert len(folders) >= 20
    for folder in folders:
        if folder.name.startswith(ELSEWHERE):
            continue
        files = [folder] if (folder / "adapter_config.json").is_file() else list(folder.iterdir())
        for source in files:
            words = next((w for key, w in REFUSED.items() if folder.name.startswith(key)), None)
            scratch = tmp_path / folder.name / source.name
            scratch.mkdir(parents=True)
            config = {"model_type": model_type(folder)}
            if words is not None:
                base = fitting_base(scratch / "base", folder, config)
                with pytest.raises(lorafast.LorafastError) as caught:
                    lorafast.merge(base, source, scratch / "out")
                message = str(caught.value)
                assert str(folder) in message
                assert any(word in message for word in words), f"{folder.name}: {message}"
                assert not (scratch / "out").exists()
                continue
            assert any(folder.name.startswith(key) for key in MERGED), folder.name
            if folder.name.startswith("mlx"):
                # By its own formula, below.
                continue
            readable = with_safetensors(folder, scratch / "readable")
            settings = json.loads((folder / "adapter_config.json").read_text())
            parts = settings.get("enable_lora") or [True]
            base = fitting_base(scratch / "base", readable, config, parts=parts)
            if folder.name.startswith("gpt2"):
                # Merged whole, and against PEFT, below and in test_peft.py.
                assert lorafast.plan(base, source).tensors_merged == 36
                continue
            lorafast.merge(base, source, scratch / "out")
            before = read_checkpoint(base)
            # tiny_lora's weights alone are stored (in, out) here.
            terms = merge_float64(before, [readable], transposed=is_conv1d)
            assert_merged_like_float64(read_checkpoint(scratch / "out"), terms)


def test_an_adapter_of_mlx_s(real_data: Path, tmp_path: Path) -> None:
    (folder,) = (real_data / "adapters").glob("mlx_test_dpo*")
    factors = read_safetensors(folder / "adapters.safetensors")
    random = np.random.default_rng(5)
    weights, right = {}, {}
    for key in factors:
        if key.endswith(".lora_a"):
            a, b = (factors[key[:-1] + part].float64() for part in "ab")
            name = key.replace(".lora_a", ".weight")
            weights[name] = tensor(random.normal(scale=0.02, size=(b.shape[1], a.shape[0])))
            right[name] = weights[name].float64() + 20 * (a @ b).T
    base = tmp_path / "base"
    base.mkdir()
    write_safetensors(base / "model.safetensors", weights, {"format": "pt"})
    (base / "config.json").write_text(json.dumps({"model_type": "qwen2"}))
    lorafast.merge(base, folder, tmp_path / "out")
    for name, value in read_checkpoint(tmp_path / "out").items():
        assert np.allclose(value.float64(), right[name], rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize(
    "folder",
    ["peft_0.6.1/lora_mlp", "peft_0.6.1/lora_mlp_modules_to_save", "peft_0.6.1/lora_conv2d"],
)
def test_every_part_of_an_old_adapter_is_covered(real_data: Path, folder: str) -> None:
    assert_covered(lorafast.inspect(real_data / folder), refused=False)


def test_every_part_of_every_adapter_is_covered(real_data: Path) -> None:
    """Used, not needed or refused: each tensor and each config field of what can be opened."""
    opened = 0
    for config in sorted((real_data / "adapters").glob("*/adapter_config.json")):
        if any(config.parent.name.startswith(name) for name in MERGED):
            assert_covered(lorafast.inspect(config.parent), refused=False)
            opened += 1
    assert opened >= len(MERGED)


def assert_covered(contents: dict[str, Any], *, refused: bool) -> None:
    coverage = contents["adapter"]["coverage"]
    assert [e["name"] for e in coverage["tensors"]] == [e["name"] for e in contents["tensors"]]
    assert [entry["name"] for entry in coverage["fields"]] == list(contents["config"])
    for entry in coverage["tensors"] + coverage["fields"]:
        assert entry["use"] in {"used", "not_needed", "refused"}
        assert entry["reason"]
        assert (entry["use"] == "refused") <= refused, entry


def test_every_config(real_data: Path, tmp_path: Path) -> None:
    """Around each config, an adapter of its rank on a base of two layers."""
    merged = refused = 0
    for path in sorted((real_data / "configs").glob("*.json")):
        adapter = tmp_path / path.stem
        adapter.mkdir()
        shutil.copy(path, adapter / "adapter_config.json")
        try:
            config = json.loads(path.read_text())
        except ValueError:
            config = {}
        factors, shape = fitting_factors(config)
        write_safetensors(adapter / WEIGHTS, factors)
        base = fitting_base(
            tmp_path / f"{path.stem}-base",
            adapter,
            {"model_type": "llama"},
            shapes={f"{MODULE}.weight": shape},
        )
        try:
            lorafast.merge(base, adapter, tmp_path / f"{path.stem}-out")
        except lorafast.LorafastError as error:
            refused += 1
            message = str(error)
            assert str(adapter) in message
            kind = str(config.get("peft_type"))
            named = [field for field in config if field in message and field != "r"]
            assert kind != "LORA" or named, f"{path.name}: {message}"
            assert kind in message or named or "peft_type" in message, f"{path.name}: {message}"
        else:
            merged += 1
            assert config["peft_type"] == "LORA"
            terms = merge_float64(read_checkpoint(base), [adapter])
            assert_merged_like_float64(read_checkpoint(tmp_path / f"{path.stem}-out"), terms)
            assert_covered(lorafast.inspect(adapter), refused=False)
    assert merged >= 45
    assert refused >= 30


def fitting_factors(config: dict[str, Any]) -> tuple[dict[str, Tensor], tuple[int, int]]:
    """Factors of one module as the config says they are, and the shape of its weight."""
    random = np.random.default_rng(6)
    rank = config.get("r") or 4
    blocks = config.get("use_bdlora") or {}
    parts = config.get("enable_lora") or [True]
    count = blocks.get("nblocks", 1)
    rows, columns = 24 * count * len(parts), 20 * count
    a, b = (rank * sum(parts), columns), (rows * sum(parts) // len(parts), rank)
    if any(part in MODULE for part in blocks.get("target_modules_bd_a") or []):
        a = (a[0], columns // count)
    if any(part in MODULE for part in blocks.get("target_modules_bd_b") or []):
        b = (b[0], rank // count)
    shapes: dict[str, tuple[int, ...]] = {
        "lora_A.weight": a,
        "lora_B.weight": (*b, 1) if config.get("enable_lora") else b,
    }
    if config.get("use_dora"):
        shapes["lora_magnitude_vector"] = (rows,)
    if config.get("lora_bias"):
        shapes["lora_B.bias"] = (rows,)
    if config.get("kasa_config") is not None:
        shapes["lora_diag"] = (rank,)
    factors = {
        f"{PREFIX}{MODULE}.{part}": tensor(random.normal(scale=0.1, size=shape))
        for part, shape in shapes.items()
    }
    return factors, (rows, columns)


@pytest.mark.parametrize("name", ["lora_mlp", "lora_mlp_modules_to_save", "lora_conv2d"])
@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_outputs_of_peft_0_6_1(real_data: Path, tmp_path: Path, name: str, weights: str) -> None:
    """The networks of PEFT's regression tests, from the merged weights alone."""
    import torch
    from safetensors.torch import load_file

    case = real_data / "peft_0.6.1" / name
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    for file in ("adapter_config.json", weights):
        shutil.copy(case / file, adapter)
    base = tmp_path / "base.safetensors"
    shutil.copy(case / "base_seed0.safetensors", base)
    lorafast.merge(base, adapter, tmp_path / "out")
    merged = load_file(next((tmp_path / "out").glob("*.safetensors")))
    (expected,) = load_file(case / "expected_output.safetensors").values()

    functional = torch.nn.functional
    inputs = torch.arange(90).reshape(9, 10).float()
    if name == "lora_conv2d":
        hidden = inputs.reshape(2, 5, 3, 3)
        hidden = functional.conv2d(hidden, merged["conv2d.weight"], merged["conv2d.bias"])
        hidden = functional.relu(hidden).flatten(1)
        actual = functional.linear(hidden, merged["lin0.weight"], merged["lin0.bias"])
    else:
        hidden = functional.linear(inputs, merged["lin0.weight"], merged["lin0.bias"])
        hidden = functional.relu(hidden)
        actual = functional.linear(hidden, merged["lin1.weight"], merged["lin1.bias"])
    actual = functional.log_softmax(actual, dim=-1)
    assert actual.shape == expected.shape
    assert (actual - expected).abs().max() <= 1e-5 * max(1.0, float(expected.abs().max()))


def test_a_classifier_of_others(models: Models, real_data: Path, tmp_path: Path) -> None:
    (adapter,) = (real_data / "adapters").glob("gpt2_cls*")
    labels = read_safetensors(adapter / "adapter_model.safetensors")[f"{PREFIX}score.weight"].shape[
        0
    ]
    base = models.gpt2("F32", hidden=768, layers=12)
    settings = {"num_labels": labels, "pad_token_id": 1}
    name = "GPT2ForSequenceClassification"
    lorafast.merge(base, adapter, tmp_path / "out")
    assert_same_outputs(
        tmp_path / "out",
        merge_with_peft(base, [adapter], load=lambda base: load_with_head(base, name, settings)),
        load=lambda path: load_with_head(path, name, settings),
        base=load_with_head(base, name, settings),
    )
