"""Heads that share the embeddings' tensor: as they were trained, and as PEFT merges them."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from matrix import lora
from support.files import read_checkpoint, tensor, write_safetensors
from support.models import Models
from toys import Toys, assert_same_outputs, load, merge_with_peft, quiet

EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


def stored_twice(base: Path, path: Path) -> Path:
    """The same model, with the head's copy in the file as well."""
    shutil.copytree(base, path)
    tensors = read_checkpoint(path)
    tensors[HEAD] = tensors[EMBEDDING]
    write_safetensors(path / "model.safetensors", tensors, {"format": "pt"})
    return path


def in_shards(base: Path, path: Path) -> Path:
    """The same model in shards, the embeddings not in the last one."""
    load(base).save_pretrained(path, max_shard_size="120KB")
    index = json.loads((path / "model.safetensors.index.json").read_text())
    shards = sorted(set(index["weight_map"].values()))
    assert len(shards) > 1
    assert index["weight_map"][EMBEDDING] != shards[-1]
    return path


BASES: dict[str, Callable[[Path, Path], Path]] = {
    "one tensor": lambda base, path: base,
    "both tensors": stored_twice,
    "shards": in_shards,
}
BOTH = ["embed_tokens", "lm_head"]
# Whether the pair is one tensor still.
CASES = {
    "LoRA on the embeddings": (lora("embed_tokens", "q_proj"), False),
    "LoRA on the head": (lora("lm_head", "q_proj"), False),
    "LoRA on the head alone": (lora("lm_head"), False),
    "LoRA on each": (lora(*BOTH), False),
    "LoRA on both as one": (lora(*BOTH, ensure_weight_tying=True), True),
    "LoRA on both as one, asked for by the head": (lora("lm_head", ensure_weight_tying=True), True),
    "both as one, at two scales": (
        lora(*BOTH, ensure_weight_tying=True, alpha_pattern={"lm_head": 7}),
        False,
    ),
    "rsLoRA on both as one": (lora(*BOTH, ensure_weight_tying=True, use_rslora=True), True),
    "DoRA on the embeddings": (lora("embed_tokens", use_dora=True), False),
    "DoRA on the head": (lora("lm_head", use_dora=True), False),
    "DoRA on both as one": (lora(*BOTH, ensure_weight_tying=True, use_dora=True), False),
    "the embeddings saved": (lora("q_proj", modules_to_save=["embed_tokens"]), False),
    "the head saved": (lora("q_proj", modules_to_save=["lm_head"]), False),
    "both saved": (lora("q_proj", modules_to_save=BOTH), False),
    "both saved as one": (
        lora("q_proj", modules_to_save=BOTH, ensure_weight_tying=True),
        True,
    ),
    "the embeddings saved, the head adapted": (
        lora("lm_head", modules_to_save=["embed_tokens"]),
        False,
    ),
    "the head saved, the embeddings adapted": (
        lora("embed_tokens", modules_to_save=["lm_head"]),
        False,
    ),
    "the embeddings saved, the rest with DoRA": (
        lora("q_proj", "gate_proj", modules_to_save=["embed_tokens"], use_dora=True),
        False,
    ),
}


def adapter_for(toys: Toys, name: str, seed: int = 0) -> Path:
    settings, _ = CASES[name]
    return toys.adapter(
        f"ties-{name}-{seed}".replace(" ", "_"), toys.base("tied-llama"), settings, seed=seed
    )


def as_trained(base: Path, adapter: Path) -> Any:
    """PEFT's merge after the pair was taken apart, as its own warning recommends."""
    import torch
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(load(base), adapter)
        head = model.get_output_embeddings()
        head = getattr(head, "base_layer", head)
        if "weight" in head._parameters:
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        return model.merge_and_unload()


def pair_of(model: Any) -> list[Any]:
    both = (model.get_input_embeddings(), model.get_output_embeddings())
    return [module.weight.detach().numpy().astype(np.float64) for module in both]


@pytest.mark.parametrize("stored", BASES)
@pytest.mark.parametrize("name", CASES)
def test_as_trained(toys: Toys, tmp_path: Path, name: str, stored: str) -> None:
    base = BASES[stored](toys.base("tied-llama"), tmp_path / "base")
    adapter = adapter_for(toys, name)
    report = lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    assert not report.warnings

    ours = read_checkpoint(tmp_path / "out")
    stays = CASES[name][1]
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is stays
    assert (HEAD in ours) is (not stays or stored == "both tensors")
    theirs = as_trained(base, adapter)
    for key, expected in zip((EMBEDDING, HEAD), pair_of(theirs), strict=True):
        actual = ours.get(key, ours[EMBEDDING]).float64()
        assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max(), key
    if stays:
        assert ours.get(HEAD, ours[EMBEDDING]) == ours[EMBEDDING]
    assert_same_outputs(tmp_path / "out", theirs, base=load(base))
    checked = lorafast.verify(base, adapter, tmp_path / "out", full=True)
    assert checked.ok, checked.problems


@pytest.mark.parametrize("stored", BASES)
@pytest.mark.parametrize("name", CASES)
def test_as_peft_merges(toys: Toys, tmp_path: Path, name: str, stored: str) -> None:
    base = BASES[stored](toys.base("tied-llama"), tmp_path / "base")
    adapter = adapter_for(toys, name)
    lorafast.merge(base, adapter, tmp_path / "out", compat="peft")
    theirs = merge_with_peft(base, [adapter])
    ours = read_checkpoint(tmp_path / "out")
    for key, expected in zip((EMBEDDING, HEAD), pair_of(theirs), strict=True):
        actual = ours.get(key, ours[EMBEDDING]).float64()
        assert np.abs(actual - expected).max() <= 1e-6 * np.abs(expected).max(), key
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is theirs.config.tie_word_embeddings
    assert_same_outputs(tmp_path / "out", theirs)
    checked = lorafast.verify(base, adapter, tmp_path / "out", full=True, compat="peft")
    assert checked.ok, checked.problems
    # What PEFT gives and what was trained are told apart, where they are not the same.
    plain = lorafast.verify(base, adapter, tmp_path / "out")
    assert plain.ok is ("saved" in name), plain.problems


@pytest.mark.parametrize(
    "names",
    [
        ("LoRA on the embeddings", "LoRA on the head"),
        ("LoRA on both as one", "LoRA on each"),
        ("LoRA on the embeddings", "the embeddings saved"),
        ("the embeddings saved", "LoRA on the embeddings"),
    ],
    ids=str,
)
def test_several_adapters(toys: Toys, tmp_path: Path, names: tuple[str, ...]) -> None:
    base = toys.base("tied-llama")
    adapters = [
        adapter_without_base_layer(adapter_for(toys, name, seed), tmp_path / str(seed))
        for seed, name in enumerate(names)
    ]
    lorafast.merge(base, adapters, tmp_path / "out")
    ours = read_checkpoint(tmp_path / "out")
    start = read_checkpoint(base)[EMBEDDING].float64()
    alone = [pair_of(as_trained(base, adapter)) for adapter in adapters]
    for key, first, second in zip((EMBEDDING, HEAD), *alone, strict=True):
        # A saved module stands in for whatever came before.
        later = start if names[1] == "the embeddings saved" and key == EMBEDDING else first
        expected = second + later - start
        error = np.abs(ours[key].float64() - expected).max()
        assert error <= 2e-6 * np.abs(expected).max(), key


def test_a_saved_copy_of_the_base_replaces_nothing(toys: Toys, tmp_path: Path) -> None:
    """In PEFT's merge it undoes what the adapter before did."""
    base = toys.base("tied-llama")
    own = read_checkpoint(base)[EMBEDDING]
    adapters = []
    for seed in (0, 1):
        adapter = adapter_for(toys, "LoRA on the embeddings", seed)
        adapters.append(tmp_path / str(seed))
        shutil.copytree(adapter, adapters[-1])
        tensors = read_checkpoint(adapter / "adapter_model.safetensors")
        (copy,) = (name for name in tensors if "base_layer" in name)
        write_safetensors(adapters[-1] / "adapter_model.safetensors", tensors | {copy: own})
    report = lorafast.merge(base, adapters, tmp_path / "out")
    assert not report.warnings
    alone = [pair_of(as_trained(base, adapter))[0] for adapter in adapters]
    ours = read_checkpoint(tmp_path / "out")[EMBEDDING].float64()
    assert np.abs(ours - (alone[0] + alone[1] - own.float64())).max() <= 1e-5
    lorafast.merge(base, adapters, tmp_path / "theirs", compat="peft")
    theirs = merge_with_peft(base, adapters)
    got = read_checkpoint(tmp_path / "theirs")[EMBEDDING].float64()
    assert np.abs(got - pair_of(theirs)[0]).max() <= 1e-5


def test_a_head_that_is_no_copy_is_not_tied(toys: Toys, tmp_path: Path) -> None:
    """Nor does transformers tie it, whatever the config says."""
    base = stored_twice(toys.base("tied-llama"), tmp_path / "base")
    tensors = read_checkpoint(base)
    other = tensors[HEAD].float64() * 1.5
    tensors[HEAD] = tensor(other, "F32")
    write_safetensors(base / "model.safetensors", tensors, {"format": "pt"})
    adapter = adapter_for(toys, "LoRA on the head alone")
    file = adapter_without_base_layer(adapter, tmp_path / "adapter")
    lorafast.merge(base, file, tmp_path / "out")
    ours = read_checkpoint(tmp_path / "out")
    assert ours[EMBEDDING] == tensors[EMBEDDING]
    assert_same_outputs(tmp_path / "out", merge_with_peft(base, [file]))


def adapter_without_base_layer(adapter: Path, path: Path) -> Path:
    shutil.copytree(adapter, path)
    tensors = read_checkpoint(path / "adapter_model.safetensors")
    kept = {name: value for name, value in tensors.items() if "base_layer" not in name}
    write_safetensors(path / "adapter_model.safetensors", kept)
    return path


@pytest.mark.parametrize("target", ["shared", "lm_head"])
def test_a_tensor_of_more_than_two_modules(toys: Toys, tmp_path: Path, target: str) -> None:
    base = toys.models.t5()
    adapter = toys.adapter(f"ties-t5-{target}", base, lora(target))
    with pytest.raises(lorafast.PlanError, match='compat="peft"'):
        lorafast.merge(base, adapter, tmp_path / "out")
    lorafast.merge(base, adapter, tmp_path / "out", compat="peft")
    with quiet():
        theirs = merge_with_peft(base, [adapter])
    assert_same_outputs(tmp_path / "out", theirs)
