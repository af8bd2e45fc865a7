"""Where features meet: what one alone does right must not be lost beside another."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lorafast
import numpy as np
import pytest
from matrix import lora
from support.files import Tensor, read_checkpoint, tensor, write_safetensors
from support.models import VOCABULARY, Models
from test_ties import adapter_without_base_layer
from toys import Toys

HEAD = "lm_head.weight"


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


def bare(base: Path, path: Path, architecture: str) -> Path:
    """The same model as hubs keep many: its backbone, named without the whole model's prefix."""
    shutil.copytree(base, path)
    tensors = read_checkpoint(path)
    prefix = "transformer."
    stripped = {name.removeprefix(prefix): value for name, value in tensors.items() if name != HEAD}
    write_safetensors(path / "model.safetensors", stripped, {"format": "pt"})
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"architectures": [architecture]}))
    return path


def test_a_tied_head_of_a_bare_backbone(toys: Toys, tmp_path: Path) -> None:
    base = bare(toys.base("gpt2"), tmp_path / "base", "GPT2LMHeadModel")
    made = toys.adapter("seams-head", toys.base("gpt2"), lora("c_attn", "lm_head"))
    adapter = adapter_without_base_layer(made, tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    merged = read_checkpoint(tmp_path / "out")
    factors = read_checkpoint(adapter / "adapter_model.safetensors")
    a, b = (
        factors[f"base_model.model.lm_head.lora_{part}.weight"].float64() for part in ("A", "B")
    )
    start = read_checkpoint(base)["wte.weight"].float64()
    assert np.abs(merged[HEAD].float64() - (start + 15 / 6 * b @ a)).max() <= 1e-6
    assert (merged["wte.weight"].float64() == start).all()
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["tie_word_embeddings"] is False


def test_an_adapter_on_a_vocabulary_that_another_changed(toys: Toys, tmp_path: Path) -> None:
    base = toys.base("llama")
    settings = lora("q_proj", modules_to_save=["embed_tokens", "lm_head"])
    grown = toys.adapter("seams-grown", base, settings, vocabulary=VOCABULARY + 5)
    made = toys.adapter("seams-plain", base, lora("embed_tokens"))
    plain = adapter_without_base_layer(made, tmp_path / "plain")
    rows = toys.adapter("seams-rows", base, lora("q_proj", trainable_token_indices=[3, 330]))
    for second in (plain, rows):
        with pytest.raises(lorafast.PlanError, match="earlier adapter changed the number of"):
            lorafast.merge(base, [grown, second], tmp_path / "out")
    # One adapter at weight 1 is the same under all strategies.
    for strategy in ("sequential", "weighted", "average"):
        lorafast.merge(base, grown, tmp_path / strategy, strategy=strategy)
    one, *others = (
        read_checkpoint(tmp_path / name) for name in ("sequential", "weighted", "average")
    )
    assert all(one == other for other in others)
    with pytest.raises(lorafast.PlanError, match=r"replaces model\.embed_tokens\.weight of shape"):
        lorafast.merge(base, grown, tmp_path / "half", strategy="weighted", weights=[0.5])


@pytest.mark.parametrize("same", [True, False])
def test_saved_counters_cannot_be_weighted(toys: Toys, tmp_path: Path, *, same: bool) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    shutil.copytree(toys.base("layers"), base)
    settings = lora("lin0", modules_to_save=["norm"])
    shutil.copytree(toys.adapter("seams-norm", toys.base("layers"), settings), adapter)
    count, other = (Tensor("I64", (1,), value.to_bytes(8, "little")) for value in (7, 9))
    tensors = read_checkpoint(base) | {"norm.num_batches_tracked": count}
    write_safetensors(base / "model.safetensors", tensors)
    saved = read_checkpoint(adapter / "adapter_model.safetensors")
    name = "base_model.model.norm.num_batches_tracked"
    saved[name] = count if same else other
    write_safetensors(adapter / "adapter_model.safetensors", saved)
    lorafast.merge(base, adapter, tmp_path / "out")
    result = read_checkpoint(tmp_path / "out")["norm.num_batches_tracked"]
    assert result == (count if same else other)
    if same:
        lorafast.merge(base, adapter, tmp_path / "half", strategy="weighted", weights=[0.5])
        assert read_checkpoint(tmp_path / "half")["norm.num_batches_tracked"] == count
    else:
        with pytest.raises(lorafast.PlanError, match="cannot be weighted"):
            lorafast.merge(base, adapter, tmp_path / "half", strategy="weighted", weights=[0.5])


def test_trained_rows_are_floats(toys: Toys, tmp_path: Path) -> None:
    base, adapter = toys.base("llama"), tmp_path / "adapter"
    settings = lora("q_proj", trainable_token_indices=[3, 330])
    shutil.copytree(toys.adapter("seams-rows", base, settings), adapter)
    tensors = read_checkpoint(adapter / "adapter_model.safetensors")
    (name,) = (name for name in tensors if "trainable_tokens_delta" in name)
    shape = tensors[name].shape
    tensors[name] = Tensor("F8_E4M3", shape, bytes(int(np.prod(shape))))
    write_safetensors(adapter / "adapter_model.safetensors", tensors)
    with pytest.raises(lorafast.AdapterError, match="trained rows are of a floating-point type"):
        lorafast.merge(base, adapter, tmp_path / "out")


def test_an_expert_that_the_base_does_not_have(toys: Toys, tmp_path: Path) -> None:
    """Its rows would lie on the next tensor's."""
    from test_architectures import as_in_memory, base_of

    stacked = as_in_memory(base_of(toys, "mixtral", "F32"), tmp_path / "base")
    adapter = tmp_path / "adapter"
    shutil.copytree(
        toys.adapter("seams-mixtral", base_of(toys, "mixtral", "F32"), lora("q_proj")), adapter
    )
    config = json.loads((adapter / "adapter_config.json").read_text())
    config["modules_to_save"] = ["w2"]
    (adapter / "adapter_config.json").write_text(json.dumps(config))
    saved = read_checkpoint(adapter / "adapter_model.safetensors")
    name = "base_model.model.model.layers.0.block_sparse_moe.experts.{}.w2.weight"
    for expert, problem in ((2, None), (3, "does not fit|fits")):
        file = saved | {name.format(expert): tensor(np.ones((32, 44)), "F32")}
        write_safetensors(adapter / "adapter_model.safetensors", file)
        if problem is None:
            lorafast.merge(stacked, adapter, tmp_path / "out", verify=True)
            merged = read_checkpoint(tmp_path / "out")
            (key,) = (key for key in merged if "layers.0" in key and "experts.down_proj" in key)
            values = merged[key].float64()
            assert (values[2] == 1).all()
            assert (values[:2] == read_checkpoint(stacked)[key].float64()[:2]).all()
        else:
            with pytest.raises(lorafast.PlanError, match=problem):
                lorafast.merge(stacked, adapter, tmp_path / "other")
