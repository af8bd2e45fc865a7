"""Weights in an adapter's directory beside its own are not needed, or refused by name."""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._cli.main import main
from support.files import tensor, write_safetensors
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base

PICKLE = b"\x80\x02}q\x01."


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


@pytest.mark.parametrize(
    "name",
    [
        "non_lora_trainables.bin",
        "value_head.safetensors",
        "value_head.bin",
        "v_head.pt",
        "mm_projector.bin",
        "new_embeddings.safetensors",
        "adapter_model-00002-of-00002.safetensors",
        "head.pth",
        "extra.CKPT",
        "heads.npz",
        "head.h5",
        # By its content alone.
        "projector",
        "projector.weights",
        # In a folder that is no adapter's, no model's and no training's.
        "heads/reward.safetensors",
    ],
)
def test_other_weights_are_refused_by_name_and_let_through_by_name(
    name: str, base: Path, adapter: Path, tmp_path: Path
) -> None:
    merged = tmp_path / "merged"
    lorafast.merge(base, adapter, merged)
    (adapter / name).parent.mkdir(exist_ok=True)
    if name.endswith(".safetensors"):
        write_safetensors(adapter / name, {"v_head.weight": tensor(np.ones((1, 20)))})
    else:
        (adapter / name).write_bytes(PICKLE)
    for refused in (
        lambda: lorafast.plan(base, adapter),
        lambda: lorafast.plan(base, adapter / "adapter_model.safetensors"),
        lambda: lorafast.merge(base, adapter, tmp_path / "out"),
        lambda: lorafast.verify(base, adapter, merged),
        lambda: lorafast.subtract(merged, adapter, tmp_path / "out"),
    ):
        with pytest.raises(lorafast.UnsupportedAdapterError) as raised:
            refused()
        assert f"has weights beside its own in {name}" in str(raised.value)
        assert f"allowing {name} by name" in str(raised.value)
    assert not (tmp_path / "out").exists()
    plan = lorafast.plan(base, adapter, allow=name)
    uses = {use["name"]: use for use in plan.to_dict()["adapters"][0]["coverage"]["files"]}
    assert uses["adapter_model.safetensors"]["use"] == "used"
    assert (uses[name]["use"], uses[name]["reason"]) == ("not_needed", "allowed by name")
    report = lorafast.merge(base, adapter, tmp_path / "out", allow=[name])
    assert report.coverage[0]["files"] == list(uses.values())
    assert name in (tmp_path / "out" / "merge_report.md").read_text()
    assert lorafast.verify(base, adapter, tmp_path / "out", allow=name).ok
    lorafast.subtract(merged, adapter, tmp_path / "back", allow=name)
    listing = lorafast.inspect(adapter)
    assert isinstance(listing, lorafast.AdapterListing)
    assert {use.name: use.use for use in listing.files_use}[name] == "refused"
    assert any(name in feature for feature in listing.features)


@pytest.mark.parametrize(
    "name",
    [
        # The same weights in other formats.
        "adapter_model.bin",
        "adapter_model.gguf",
        "ggml-adapter-model.gguf",
        # To go on with the training.
        "optimizer.pt",
        "scheduler.pt",
        "scaler.pt",
        "rng_state.pth",
        "rng_state_1.pth",
        "random_states_0.pkl",
        "training_args.bin",
        "pytorch_model_fsdp.bin",
    ],
)
def test_what_a_merge_needs_not_is_listed_as_such(name: str, base: Path, adapter: Path) -> None:
    (adapter / name).write_bytes(PICKLE)
    files = lorafast.plan(base, adapter).to_dict()["adapters"][0]["coverage"]["files"]
    assert [use["use"] for use in files if use["name"] == name] == ["not_needed"]


def test_what_is_no_part_of_the_adapter_is_not_listed(base: Path, adapter: Path) -> None:
    # Text under an ending of weights, tokenizers, and whatever has another owner.
    (adapter / "vocabulary.bin").write_text("a text\n")
    (adapter / "tokenizer.model").write_bytes(PICKLE)
    (adapter / "README.md").write_text("---\n")
    make_adapter(adapter / "other")
    make_base(adapter / "base")
    make_adapter(adapter / "checkpoint-10")
    for folder in ("checkpoint-10", "global_step10", ".cache", "runs"):
        (adapter / folder).mkdir(exist_ok=True)
        (adapter / folder / "weights.bin").write_bytes(PICKLE)
    files = lorafast.plan(base, adapter).to_dict()["adapters"][0]["coverage"]["files"]
    assert [use["name"] for use in files] == ["adapter_model.safetensors"]


def test_a_sentence_model_s_parts_belong_to_it(base: Path, adapter: Path) -> None:
    (adapter / "modules.json").write_text(json.dumps([{"idx": 2, "path": "2_Dense"}]))
    (adapter / "2_Dense").mkdir()
    (adapter / "2_Dense" / "config.json").write_text("{}")
    write_safetensors(adapter / "2_Dense" / "model.safetensors", {"w": tensor(np.ones(2))})
    with pytest.raises(lorafast.UnsupportedAdapterError, match=r"in 2_Dense/model\.safetensors"):
        lorafast.plan(base, adapter)
    lorafast.plan(base, adapter, allow="2_Dense/model.safetensors")


def test_one_of_several_files_is_only_itself(base: Path, tmp_path: Path) -> None:
    tensors = {}
    for name, value in adapter_tensors().items():
        module, side = name.removeprefix("base_model.model.").rsplit(".lora_", 1)
        part = "lora_down" if side.startswith("A") else "lora_up"
        tensors[f"lora_unet_{module.replace('.', '_')}.{part}.weight"] = value
    styles = tmp_path / "styles"
    styles.mkdir()
    one = write_safetensors(styles / "one.safetensors", tensors)
    assert lorafast.plan(base, styles).tensors_merged == len(MODULES)
    write_safetensors(styles / "two.safetensors", tensors)
    assert lorafast.plan(base, one).tensors_merged == len(MODULES)
    with pytest.raises(lorafast.AdapterError, match="2 weights files; give one of them: one"):
        lorafast.plan(base, styles)


def test_the_command_lets_a_file_through(
    base: Path, adapter: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (adapter / "value_head.bin").write_bytes(PICKLE)
    words = ["merge", "-b", str(base), "-a", str(adapter), "-o", str(tmp_path / "out")]
    assert main(words) == 1
    assert "in value_head.bin, the value head of" in capsys.readouterr().err
    assert main(["inspect", str(adapter)]) == 0
    assert "value_head.bin" in capsys.readouterr().out
    assert main([*words, "--allow", "value_head.bin"]) == 0
