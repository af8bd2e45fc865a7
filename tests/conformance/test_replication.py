"""Layers that an adapter repeats: written out as they were trained, or as PEFT merges them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from matrix import lora
from support.files import read_checkpoint
from support.models import Models, state
from toys import Toys, assert_same_outputs, load, merge_with_peft, quiet


@pytest.fixture
def toys(models: Models) -> Toys:
    return Toys(models)


ORDER = [0, 1, 0, 1, 1]
RANGES = [[0, 2], [0, 2], [1, 2]]


def settings(**more: Any) -> dict[str, Any]:
    return lora("q_proj", "down_proj", layer_replication=RANGES) | more


def as_trained(base: Path, adapter: Path) -> Any:
    """PEFT's merge after the layers that it repeats were given weights of their own."""
    import torch
    from peft import PeftModel

    with quiet():
        model = PeftModel.from_pretrained(load(base), adapter)
        for module in model.modules():
            for name, parameter in module._parameters.items():
                if parameter is not None:
                    module._parameters[name] = torch.nn.Parameter(parameter.detach().clone())
        return model.merge_and_unload()


def assert_same(ours: Path, theirs: Any) -> None:
    own = read_checkpoint(ours)
    expected = state(theirs)
    assert own.keys() == expected.keys()
    for name, value in expected.items():
        error = np.abs(own[name].float64() - value.float64()).max()
        assert error <= 1e-6 * np.abs(value.float64()).max(), name


@pytest.mark.parametrize(
    "more",
    [{}, {"use_dora": True}, {"rank_pattern": {"layers.3.self_attn.q_proj": 2}}],
    ids=["plain", "DoRA", "patterns"],
)
def test_each_layer_is_written_out(toys: Toys, tmp_path: Path, more: dict[str, Any]) -> None:
    base = toys.base("llama")
    adapter = toys.adapter(f"replicated-{'-'.join(more)}", base, settings(**more))
    lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_hidden_layers"] == len(ORDER)
    theirs = as_trained(base, adapter)
    assert_same(tmp_path / "out", theirs)
    assert_same_outputs(tmp_path / "out", theirs)
    # Five layers that all differ.
    weights = read_checkpoint(tmp_path / "out")
    queries = [weights[f"model.layers.{n}.self_attn.q_proj.weight"].data for n in range(5)]
    assert len(set(queries)) == 5
    keys = [weights[f"model.layers.{n}.self_attn.k_proj.weight"].data for n in range(5)]
    assert [keys.index(key) for key in keys] == [0, 1, 0, 1, 1]


def test_shards_and_index(toys: Toys, tmp_path: Path) -> None:
    base = tmp_path / "base"
    load(toys.base("llama")).save_pretrained(base, max_shard_size="120KB")
    adapter = toys.adapter("replicated-", toys.base("llama"), settings())
    lorafast.merge(base, adapter, tmp_path / "out", verify=True)
    lorafast.merge(toys.base("llama"), adapter, tmp_path / "whole")
    assert read_checkpoint(tmp_path / "out") == read_checkpoint(tmp_path / "whole")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    assert index["weight_map"].keys() == read_checkpoint(tmp_path / "out").keys()


def test_fewer_layers(toys: Toys, tmp_path: Path) -> None:
    base = toys.base("llama")
    adapter = toys.adapter("replicated-fewer", base, settings(layer_replication=[[1, 2]]))
    lorafast.merge(base, adapter, tmp_path / "out")
    theirs = as_trained(base, adapter)
    assert_same(tmp_path / "out", theirs)
    assert_same_outputs(tmp_path / "out", theirs)


def test_as_peft_merges(toys: Toys, tmp_path: Path) -> None:
    """Every layer's update on the tensor that the layers share."""
    base = toys.base("llama")
    adapter = toys.adapter("replicated-", base, settings())
    lorafast.merge(base, adapter, tmp_path / "out", compat="peft")
    theirs = merge_with_peft(base, [adapter])
    assert_same(tmp_path / "out", theirs)
    checked = lorafast.verify(base, adapter, tmp_path / "out", full=True, compat="peft")
    assert checked.ok, checked.problems
    assert not lorafast.verify(base, adapter, tmp_path / "out").ok


def test_per_layer_settings_of_the_config(toys: Toys, tmp_path: Path) -> None:
    base = tmp_path / "base"
    shutil.copytree(toys.base("llama"), base)
    config = json.loads((base / "config.json").read_text())
    config |= {"layer_types": ["sliding", "full", "linear"], "architectures": ["A", "B", "C"]}
    (base / "config.json").write_text(json.dumps(config))
    adapter = toys.adapter("replicated-", toys.base("llama"), settings())
    lorafast.merge(base, adapter, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert written["layer_types"] == [config["layer_types"][layer] for layer in ORDER]
    assert written["architectures"] == ["A", "B", "C"]


@pytest.mark.parametrize(
    ("value", "says"),
    [
        ([[0, 7]], "repeats layers up to 6.*the base has 3 layers"),
        ([[0, 10**15]], "layers by layer_replication; there can be"),
        ([[1, 1]], "list of pairs"),
        ([[0, 1, 2]], "list of pairs"),
        ("twice", "list of pairs"),
    ],
)
def test_what_cannot_be_is_refused(toys: Toys, tmp_path: Path, value: object, says: str) -> None:
    base = toys.base("llama")
    adapter = tmp_path / "adapter"
    shutil.copytree(toys.adapter("replicated-", base, settings()), adapter)
    config = json.loads((adapter / "adapter_config.json").read_text())
    (adapter / "adapter_config.json").write_text(json.dumps(config | {"layer_replication": value}))
    with pytest.raises(lorafast.LorafastError, match=says):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_adapters_of_different_layers_are_refused(toys: Toys, tmp_path: Path) -> None:
    base = toys.base("llama")
    adapters = [
        toys.adapter("replicated-", base, settings()),
        toys.adapter("not-replicated", base, lora("q_proj", "down_proj")),
    ]
    with pytest.raises(lorafast.PlanError, match="do not repeat the same layers"):
        lorafast.merge(base, adapters, tmp_path / "out")
