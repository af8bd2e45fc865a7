"""lorafast and PEFT merge the same files, and come to the same weights."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.compare import assert_merged_like, assert_merged_like_float64, assert_rest_untouched
from support.files import ITEM_SIZES, read_checkpoint
from support.models import Models, load, merge_with_peft, outputs, state
from support.reference import PREFIX, merge_float64, read_updates

ALL_LINEAR = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
DTYPES = ["F32", "BF16", "F16"]


def is_conv1d(module: str) -> bool:
    return module.endswith((".c_attn", ".c_proj", ".c_fc"))


def assert_same_as_peft(
    base: Path, adapters: list[Path], output: Path, *, conv1d: bool = False
) -> Any:
    """Merge with both, compare weights, files and outputs; returns lorafast's report."""
    report = lorafast.merge(base, adapters if len(adapters) > 1 else adapters[0], output)

    before = read_checkpoint(base)
    after = read_checkpoint(output)
    terms = merge_float64(before, adapters, transposed=is_conv1d if conv1d else lambda _: False)
    model = merge_with_peft(base, adapters)
    expected = state(model)
    assert_merged_like_float64(expected, terms)  # PEFT itself keeps the reference honest
    assert_merged_like(after, expected, terms)
    assert_rest_untouched(after, before, terms)
    changed = [name for name in terms if after[name] != before[name]]
    assert sorted(changed) == sorted(terms), "an adapter left a weight as it was"

    assert report.tensors_merged == len(terms)
    assert report.tensors_copied == len(before) - len(terms)
    assert_index_is_right(output)

    theirs = outputs(model).double().numpy()
    ours = outputs(load(output)).double().numpy()
    untouched = outputs(load(base)).double().numpy()
    assert np.isfinite(ours).all()
    step = {"F32": 1e-5, "F16": 1e-2, "BF16": 6e-2}[before[next(iter(terms))].dtype]
    assert np.abs(ours - theirs).max() <= step * np.abs(theirs).max()
    # The comparison means something only if the adapters move the outputs by more than that.
    assert np.abs(untouched - theirs).max() > 2 * step * np.abs(theirs).max()
    return report


def assert_index_is_right(output: Path) -> None:
    indexes = list(output.glob("*.index.json"))
    if not indexes:
        return
    index = json.loads(indexes[0].read_text())
    size = sum(
        ITEM_SIZES[t.dtype] * int(np.prod(t.shape)) for t in read_checkpoint(output).values()
    )
    assert index["metadata"]["total_size"] == size
    files = {path.name for path in output.glob("*.safetensors")}
    assert set(index["weight_map"].values()) == files


@pytest.mark.parametrize("adapter_dtype", DTYPES)
@pytest.mark.parametrize("base_dtype", DTYPES)
def test_every_pair_of_dtypes(
    models: Models, tmp_path: Path, base_dtype: str, adapter_dtype: str
) -> None:
    adapter = models.adapter(
        "dtypes",
        models.llama(),
        dtype=adapter_dtype,
        steps=4,
        r=16,
        lora_alpha=32,
        target_modules=ALL_LINEAR,
    )
    assert_same_as_peft(models.llama(base_dtype), [adapter], tmp_path / "out")


CONFIGS: dict[str, dict[str, Any]] = {
    "rank stabilised": {"r": 8, "lora_alpha": 16, "use_rslora": True, "target_modules": ALL_LINEAR},
    "fractional alpha": {"r": 3, "lora_alpha": 7.25, "target_modules": ["q_proj", "v_proj"]},
    "rank one": {"r": 1, "lora_alpha": 4, "target_modules": ["o_proj", "up_proj"]},
    # More than the weight's own rank, and no multiple of any vector width.
    "rank above the width": {"r": 77, "lora_alpha": 40, "target_modules": ["down_proj"]},
    "all linear": {"r": 4, "lora_alpha": 16, "target_modules": "all-linear"},
    "a pattern of targets": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": r".*\.mlp\.(up|down)_proj",
    },
    "some layers": {
        "r": 4,
        "lora_alpha": 24,
        "target_modules": ["q_proj", "down_proj"],
        "layers_to_transform": [0, 2],
    },
    "excluded modules": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ALL_LINEAR,
        "exclude_modules": r".*layers\.1\..*",
    },
    "patterns of rank and alpha": {
        "r": 8,
        "lora_alpha": 16,
        "target_modules": ALL_LINEAR,
        # The first key that matches decides, for rank and alpha apart; «proj» starts at no dot.
        # PEFT writes the keys in alphabetical order, whatever the order they were given in.
        "rank_pattern": {"layers.1.self_attn.q_proj": 2, "q_proj": 5, r"layers\.[02]\.mlp\..*": 3},
        "alpha_pattern": {
            "q_proj": 12,
            "layers.1.self_attn.q_proj": 48,
            "proj": 1000,
            "model.layers.2.mlp.down_proj": 9.5,
        },
    },
    "patterns and rank stabilised": {
        "r": 8,
        "lora_alpha": 16,
        "use_rslora": True,
        "target_modules": ["k_proj", "gate_proj"],
        "rank_pattern": {"k_proj": 4},
        "alpha_pattern": {"gate_proj": 40},
    },
    # Initialisations that leave the formula as it is.
    "gaussian": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["v_proj", "up_proj"],
        "init_lora_weights": "gaussian",
    },
    "orthogonal": {
        "r": 4,
        "lora_alpha": 16,
        "target_modules": ["v_proj", "up_proj"],
        "init_lora_weights": "orthogonal",
    },
}


@pytest.mark.parametrize("name", CONFIGS)
def test_every_kind_of_config(models: Models, tmp_path: Path, name: str) -> None:
    adapter = models.adapter(
        name.replace(" ", "-"), models.llama(), steps=0, seed=len(name), **CONFIGS[name]
    )
    assert_same_as_peft(models.llama("BF16"), [adapter], tmp_path / "out")


def test_patterns_are_really_uneven(models: Models) -> None:
    """The pattern case above means nothing unless ranks and scales differ between modules."""
    name = "patterns of rank and alpha"
    adapter = models.adapter(
        name.replace(" ", "-"), models.llama(), steps=0, seed=len(name), **CONFIGS[name]
    )
    updates = read_updates(adapter)
    found = {m.removeprefix("model.layers."): (len(u.a), u.scale) for m, u in updates.items()}
    assert found["1.self_attn.q_proj"] == (2, 48 / 2)
    assert found["0.self_attn.q_proj"] == (5, 12 / 5)
    assert found["0.mlp.up_proj"] == (3, 16 / 3)
    assert found["1.mlp.up_proj"] == (8, 16 / 8)
    assert found["2.mlp.down_proj"] == (3, 9.5 / 3)


def test_the_first_pattern_of_the_file_decides(models: Models, tmp_path: Path) -> None:
    """Files that other tools wrote, or PEFT's edited by hand, need not be in alphabetical order."""
    name = "patterns of rank and alpha"
    made = models.adapter(
        name.replace(" ", "-"), models.llama(), steps=0, seed=len(name), **CONFIGS[name]
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(made, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["alpha_pattern"] = {"q_proj": 12, "layers.1.self_attn.q_proj": 48, "proj": 1000}
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert read_updates(adapter)["model.layers.1.self_attn.q_proj"].scale == 12 / 2
    assert_same_as_peft(models.llama("BF16"), [adapter], tmp_path / "out")


def test_adapters_one_after_another(models: Models, tmp_path: Path) -> None:
    base = models.llama()
    adapters = [
        models.adapter(
            "first", base, steps=0, seed=1, r=4, lora_alpha=8, target_modules=ALL_LINEAR
        ),
        models.adapter(
            "second", base, steps=0, seed=2, r=8, lora_alpha=4, target_modules=["q_proj", "o_proj"]
        ),
    ]
    assert_same_as_peft(base, adapters, tmp_path / "out")


def test_a_trained_adapter_on_minilm(models: Models, tmp_path: Path) -> None:
    base = models.minilm()
    adapter = models.adapter(
        "minilm",
        base,
        steps=4,
        r=8,
        lora_alpha=16,
        # Not the pooler's, which the hidden state does not depend on.
        target_modules=r"encoder\..*\.(query|key|value|dense)",
    )
    assert_same_as_peft(base, [adapter], tmp_path / "out")
    assert (tmp_path / "out" / "vocab.txt").read_bytes() == (base / "vocab.txt").read_bytes()
    # The sentence model's pooling settings lie in a folder of their own.
    pooling = Path("1_Pooling/config.json")
    assert (tmp_path / "out" / pooling).read_bytes() == (base / pooling).read_bytes()


@pytest.mark.parametrize("flag", [True, False])
@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_conv1d_whatever_the_flag_says(
    models: Models, tmp_path: Path, dtype: str, flag: bool
) -> None:
    """attn.c_proj is square, so its shape cannot tell how it is stored; the architecture does."""
    made = models.adapter(
        "gpt2",
        models.gpt2(),
        steps=4,
        r=4,
        lora_alpha=16,
        fan_in_fan_out=True,
        target_modules=["c_attn", "c_proj", "c_fc"],
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(made, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["fan_in_fan_out"] = flag
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert_same_as_peft(models.gpt2(dtype), [adapter], tmp_path / "out", conv1d=True)


@pytest.mark.parametrize("flag", [True, False])
def test_linear_whatever_the_flag_says(models: Models, tmp_path: Path, flag: bool) -> None:
    """q_proj of OPT is square and stored (out, in); a wrong flag must not transpose it."""
    made = models.adapter(
        "opt",
        models.opt("F32"),
        steps=3,
        r=4,
        lora_alpha=16,
        target_modules=["q_proj", "v_proj", "fc1"],
    )
    adapter = tmp_path / "adapter"
    shutil.copytree(made, adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["fan_in_fan_out"] = flag
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    assert_same_as_peft(models.opt("BF16"), [adapter], tmp_path / "out")


def test_encoder_and_decoder(models: Models, tmp_path: Path) -> None:
    base = models.t5()
    adapter = models.adapter(
        "t5", base, steps=3, r=4, lora_alpha=16, target_modules=["q", "v", "wo"]
    )
    assert_same_as_peft(base, [adapter], tmp_path / "out")


@pytest.mark.real_data
def test_gpt2_adapter_of_others_with_a_wrong_flag(
    models: Models, real_data: Path, tmp_path: Path
) -> None:
    (adapter,) = (real_data / "adapters").glob("gpt2_mycguo*")
    config = json.loads((adapter / "adapter_config.json").read_text())
    assert config["fan_in_fan_out"] is False
    base = models.gpt2("F32", hidden=768, layers=12)
    assert_same_as_peft(base, [adapter], tmp_path / "out", conv1d=True)
    assert all(key.startswith(PREFIX) for key in read_checkpoint(adapter))
