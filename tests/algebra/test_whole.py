"""Saved modules, saved biases and trained rows, combined with their base."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.algebra import Array, random_modules, write_lora
from support.files import Tensor, tensor, write_safetensors
from support.handmade import make_base
from support.reference import PREFIX

SHAPES = {"model.layers.0.self_attn.q_proj": (24, 32)}
HEAD, EMBED, NORM = "lm_head.weight", "model.embed_tokens.weight", "model.norm.weight"
BIAS = "model.layers.0.self_attn.q_proj.bias"
OTHERS = {HEAD: (40, 32), EMBED: (40, 32), BIAS: (24,)}
WIDTH = 20


def weights_of(model: Path) -> dict[str, Array]:
    from safetensors.torch import load_file as load

    found: dict[str, Array] = {}
    for file in sorted(model.glob("*.safetensors")):
        found |= {name: value.double().numpy() for name, value in load(file).items()}
    return found


def base_of(directory: Path, dtype: str = "F32") -> tuple[Path, dict[str, Array]]:
    random = np.random.default_rng(9)
    others = {
        name: tensor(random.normal(scale=0.3, size=shape), dtype) for name, shape in OTHERS.items()
    }
    config = {"tie_word_embeddings": False}
    base = make_base(directory, modules=SHAPES, dtype=dtype, others=others, config=config)
    return base, weights_of(base)


def adapter_of(
    directory: Path,
    weights: Mapping[str, Array],
    seed: int,
    names: list[str],
    *,
    dtype: str = "F32",
    tokens: list[int] | None = None,
    modules: Mapping[str, tuple[int, int]] = SHAPES,
) -> tuple[Path, dict[str, Array]]:
    """An adapter that brings these parameters whole and these rows, and what it changes of each."""
    random = np.random.default_rng(50 + seed)
    settings: dict[str, Any] = {}
    saved = [name.removesuffix(".weight") for name in names if name != BIAS]
    if saved:
        settings["modules_to_save"] = saved
    if BIAS in names:
        settings["bias"] = "lora_only"
    if tokens is not None:
        settings["trainable_token_indices"] = {"embed_tokens": tokens}
    adapter = write_lora(directory, random_modules(seed, modules, 3), alpha=2, **settings)
    file = adapter / "adapter_model.safetensors"
    stored: dict[str, Tensor] = {
        name: tensor(value, "F32") for name, value in load_file(file).items()
    }
    changes = {}

    def add(key: str, name: str, value: Array) -> Array:
        stored[PREFIX + key] = tensor(value, dtype)
        return stored[PREFIX + key].float64()

    for name in names:
        before = weights[name]
        # PEFT puts a layer of its own around one that it updates.
        key = name.replace("q_proj.bias", "q_proj.base_layer.bias")
        after = add(key, name, before + random.normal(scale=0.1, size=before.shape))
        changes[name] = after - before
    if tokens is not None:
        before = weights[EMBED][tokens]
        after = add(
            "model.embed_tokens.token_adapter.trainable_tokens_delta",
            EMBED,
            before + random.normal(scale=0.1, size=before.shape),
        )
        changes[EMBED] = np.zeros_like(weights[EMBED])
        changes[EMBED][tokens] = after - before
    write_safetensors(file, stored)
    return adapter, changes


def saved_in(adapter: Path) -> dict[str, Array]:
    from safetensors.torch import load_file as load

    tensors = load(adapter / "adapter_model.safetensors")
    return {
        name.removeprefix(PREFIX).replace("base_layer.", ""): value.double().numpy()
        for name, value in tensors.items()
        if "lora_" not in name
    }


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
@pytest.mark.parametrize(
    ("method", "weights"),
    [
        ("linear", [1.0, -0.5]),
        ("linear", [0.5, 2.0]),
        ("normalized", [3.0, 1.0]),
        ("centroid", None),
    ],
)
def test_the_merged_combination_is_the_merge(
    tmp_path: Path, dtype: str, method: Any, weights: list[float] | None
) -> None:
    base, before = base_of(tmp_path / "base", dtype)
    adapters = [
        adapter_of(tmp_path / "1", before, 1, [HEAD, EMBED, BIAS])[0],
        adapter_of(tmp_path / "2", before, 2, [HEAD, NORM])[0],
    ]
    report = lorafast.combine(
        adapters, tmp_path / "both", method=method, weights=weights, base=base
    )
    assert any("trained whole" in note for note in report.notes)
    asked: dict[str, Any] = {"strategy": method, "weights": weights, "dtype": "float32"}
    lorafast.merge(base, tmp_path / "both", tmp_path / "one", dtype="float32")
    lorafast.merge(base, adapters, tmp_path / "two", **asked)
    one, two = weights_of(tmp_path / "one"), weights_of(tmp_path / "two")
    for name, weight in two.items():
        if name == f"{next(iter(SHAPES))}.weight" or name in (HEAD, EMBED, NORM, BIAS):
            size = np.linalg.norm(weight - before[name])
            assert size > 0, name
            assert np.linalg.norm(one[name] - weight) / size < 2e-6, name


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_saved_parameters_are_the_base_and_the_weighted_changes(tmp_path: Path, dtype: str) -> None:
    base, before = base_of(tmp_path / "base", dtype)
    one, first = adapter_of(tmp_path / "1", before, 1, [HEAD, EMBED, BIAS], dtype=dtype)
    two, second = adapter_of(tmp_path / "2", before, 2, [HEAD, NORM], dtype=dtype)
    weights: list[Any] = [{"lm_head": 0.25, "*": 1.5}, -0.5]
    lorafast.combine([one, two], tmp_path / "both", weights=weights, base=base, dtype="float32")
    found = saved_in(tmp_path / "both")
    assert found.keys() == {HEAD, EMBED, NORM, BIAS}
    for name, value in found.items():
        own = 0.25 if name == HEAD else 1.5
        wanted = before[name] + own * first.get(name, 0) - 0.5 * second.get(name, 0)
        assert value == pytest.approx(wanted, abs=1e-6)
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert set(config["modules_to_save"]) == {"lm_head", "model.embed_tokens", "model.norm"}
    assert config["bias"] == "all"


def test_one_alone_is_what_it_was(tmp_path: Path) -> None:
    base, before = base_of(tmp_path / "base")
    one, _ = adapter_of(tmp_path / "1", before, 1, [HEAD, NORM, BIAS], dtype="BF16")
    other = write_lora(tmp_path / "2", random_modules(4, SHAPES, 2), alpha=1)
    lorafast.combine([one, other], tmp_path / "both", base=base)
    wanted, found = saved_in(one), saved_in(tmp_path / "both")
    assert found.keys() == wanted.keys()
    for name, value in wanted.items():
        assert np.array_equal(found[name], value)


def test_methods_of_one_vector_and_of_elements(tmp_path: Path) -> None:
    base, before = base_of(tmp_path / "base")
    one, first = adapter_of(tmp_path / "1", before, 1, [HEAD, NORM])
    two, second = adapter_of(tmp_path / "2", before, 2, [HEAD, NORM])
    lorafast.combine([one, two], tmp_path / "slerp", method="slerp", options={"t": 0.3}, base=base)
    lorafast.combine(
        [one, two], tmp_path / "stock", method="model_stock", options={"lambda": 2}, base=base
    )
    lorafast.combine(
        [one, two], tmp_path / "ties", method="ties", options={"density": 0.5}, rank=24, base=base
    )
    slerp, stock, ties = (saved_in(tmp_path / name) for name in ("slerp", "stock", "ties"))
    for name in (HEAD, NORM):
        x, y = first[name], second[name]
        cosine = np.sum(x * y) / np.linalg.norm(x) / np.linalg.norm(y)
        angle = np.arccos(cosine)
        wanted = (np.sin(0.7 * angle) * x + np.sin(0.3 * angle) * y) / np.sin(angle)
        assert slerp[name] - before[name] == pytest.approx(wanted, abs=1e-6)
        t = 2 * cosine / (1 + cosine)
        assert stock[name] - before[name] == pytest.approx(2 * t * (x + y) / 2, abs=1e-6)
        trimmed = []
        for change in (x, y):
            size = np.abs(change.astype(np.float32)).ravel()
            kept = np.zeros(size.size, bool)
            kept[np.argsort(-size, kind="stable")[: size.size // 2]] = True
            trimmed.append(np.where(kept.reshape(change.shape), change, 0))
        sign = np.where(trimmed[0] + trimmed[1] >= 0, 1, -1)
        agree = [np.where(change * sign > 0, change, 0) for change in trimmed]
        count = sum((change != 0).astype(int) for change in agree)
        wanted = (agree[0] + agree[1]) / np.maximum(count, 1)
        assert ties[name] - before[name] == pytest.approx(wanted, abs=1e-6)
    with pytest.raises(ValueError, match="trained whole"):
        lorafast.combine([one, two], tmp_path / "no", method="knots", base=base)


@pytest.mark.parametrize("dtype", ["F32", "BF16"])
def test_trained_rows_are_brought_together(tmp_path: Path, dtype: str) -> None:
    base, before = base_of(tmp_path / "base", dtype)
    one, first = adapter_of(tmp_path / "1", before, 1, [], tokens=[7, 3, 30])
    two, second = adapter_of(tmp_path / "2", before, 2, [HEAD], tokens=[3, 39])
    lorafast.combine([one, two], tmp_path / "both", weights=[0.5, 2], base=base)
    config = json.loads((tmp_path / "both" / "adapter_config.json").read_text())
    assert config["trainable_token_indices"] == {"model.embed_tokens": [3, 7, 30, 39]}
    rows = saved_in(tmp_path / "both")["model.embed_tokens.token_adapter.trainable_tokens_delta"]
    wanted = before[EMBED] + 0.5 * first[EMBED] + 2 * second[EMBED]
    assert rows == pytest.approx(wanted[[3, 7, 30, 39]], abs=1e-6)
    lorafast.merge(base, tmp_path / "both", tmp_path / "merged", dtype="float32")
    lorafast.merge(base, [one, two], tmp_path / "two", weights=[0.5, 2], dtype="float32")
    merged, other = weights_of(tmp_path / "merged"), weights_of(tmp_path / "two")
    assert merged[EMBED] == pytest.approx(wanted, abs=1e-6)
    assert other[EMBED] == pytest.approx(wanted, abs=1e-6)
    whole, third = adapter_of(tmp_path / "3", before, 3, [EMBED])
    lorafast.combine([one, whole], tmp_path / "mixed", base=base)
    found = saved_in(tmp_path / "mixed")[EMBED]
    assert found == pytest.approx(before[EMBED] + first[EMBED] + third[EMBED], abs=1e-6)


def test_peft_loads_trained_rows(tmp_path: Path) -> None:
    import torch
    from peft import LoraConfig, PeftModel, get_peft_model
    from transformers import LlamaConfig, LlamaForCausalLM

    def model() -> Any:
        torch.manual_seed(0)
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
        config = LlamaConfig(**sizes, vocab_size=64, num_attention_heads=4, num_key_value_heads=2)
        return LlamaForCausalLM(config)

    base = tmp_path / "base"
    model().save_pretrained(base)
    paths = []
    for seed, tokens in ((1, [5, 9]), (2, [9, 60])):
        config = LoraConfig(r=2, target_modules=["q_proj"], trainable_token_indices=tokens)
        peft = get_peft_model(model(), config)
        torch.manual_seed(seed)
        with torch.no_grad():
            for parameter in peft.parameters():
                if parameter.requires_grad:
                    parameter.add_(0.1 * torch.randn_like(parameter))
        peft.save_pretrained(tmp_path / str(seed))
        paths.append(tmp_path / str(seed))
    lorafast.combine(paths, tmp_path / "both", base=base)
    merged = PeftModel.from_pretrained(model(), tmp_path / "both").merge_and_unload()
    lorafast.merge(base, paths, tmp_path / "merged", strategy="linear")
    found = {name: value.double().numpy() for name, value in merged.state_dict().items()}
    for name, wanted in weights_of(tmp_path / "merged").items():
        assert found[name] == pytest.approx(wanted, abs=1e-6), name


def test_what_one_adapter_saves_passes_through(tmp_path: Path) -> None:
    base, before = base_of(tmp_path / "base")
    one, _ = adapter_of(tmp_path / "1", before, 1, [HEAD, NORM, BIAS], tokens=[7, 3])
    lorafast.resize(one, tmp_path / "short", rank=1)
    lorafast.bake(one, tmp_path / "folded", scale="fold")
    lorafast.bake(one, tmp_path / "plain", plain=True, base=base)
    wanted = saved_in(one)
    for name in ("short", "folded", "plain"):
        found = saved_in(tmp_path / name)
        assert found.keys() == wanted.keys()
        assert all(np.array_equal(found[key], value) for key, value in wanted.items())
        lorafast.merge(base, tmp_path / name, tmp_path / f"{name} merged")
        assert np.array_equal(weights_of(tmp_path / f"{name} merged")[HEAD], wanted[HEAD])


def test_what_is_not_defined_is_refused_in_words(tmp_path: Path) -> None:
    base, before = base_of(tmp_path / "base")
    one, _ = adapter_of(tmp_path / "1", before, 1, [HEAD])
    plain = write_lora(tmp_path / "2", random_modules(4, SHAPES, 2), alpha=1)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="--base"):
        lorafast.combine([one, plain], tmp_path / "out")
    rows, _ = adapter_of(tmp_path / "3", before, 1, [], tokens=[1, 2])
    with pytest.raises(lorafast.UnsupportedAdapterError, match="--base"):
        lorafast.combine([rows, plain], tmp_path / "out")
    both = {**SHAPES, "lm_head": (40, 32)}
    factored, _ = adapter_of(tmp_path / "4", before, 2, [], modules=both)
    with pytest.raises(lorafast.UnsupportedAdapterError, match="changes it by"):
        lorafast.combine([one, factored], tmp_path / "out", base=base)
    with pytest.raises(ValueError, match="no module fits"):
        lorafast.combine([one, plain], tmp_path / "out", base=base, weights=[{"other_head": 1}, 1])
    tensors = {
        name: tensor(value, "F32")
        for name, value in load_file(one / "adapter_model.safetensors").items()
    }
    tensors[PREFIX + HEAD] = tensor(np.full((40, 32), np.nan), "F32")
    write_safetensors(one / "adapter_model.safetensors", tensors)
    with pytest.raises(ValueError, match="finite"):
        lorafast.combine([one, plain], tmp_path / "out", base=base, weights=[0.5, 1])
    tensors[PREFIX + HEAD] = tensor(np.ones((44, 32)), "F32")
    write_safetensors(one / "adapter_model.safetensors", tensors)
    with pytest.raises(lorafast.LorafastError, match=r"40.*44|44.*40"):
        lorafast.combine([one, plain], tmp_path / "out", base=base)
    assert not (tmp_path / "out").exists()
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
