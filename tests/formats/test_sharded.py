"""PEFT's adapters whose weights are several files: the same bytes as those of one."""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import pytest
from support.files import read_checkpoint, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base

INDEX = "adapter_model.safetensors.index.json"


def make_sharded(path: Path, count: int = 3) -> Path:
    tensors = adapter_tensors()
    adapter = make_adapter(path)
    (adapter / "adapter_model.safetensors").unlink()
    names = list(tensors)
    places = {}
    for number in range(count):
        file = f"adapter_model-{number + 1:05}-of-{count:05}.safetensors"
        part = names[number::count]
        write_safetensors(adapter / file, {name: tensors[name] for name in part})
        places.update(dict.fromkeys(part, file))
    (adapter / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": places}))
    return adapter


def test_several_files_are_one_adapter(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    whole, sharded = make_adapter(tmp_path / "whole"), make_sharded(tmp_path / "sharded")
    lorafast.merge(base, whole, tmp_path / "a")
    lorafast.merge(base, sharded, tmp_path / "b")
    assert read_checkpoint(tmp_path / "a") == read_checkpoint(tmp_path / "b")
    assert lorafast.verify(base, sharded, tmp_path / "b").ok
    plan = lorafast.plan(base, sharded).to_dict()
    coverage = plan["adapters"][0]["coverage"]
    assert {each["use"] for each in coverage["tensors"]} == {"used"}
    assert {each["name"]: each["use"] for each in coverage["files"]} == {
        f"adapter_model-0000{number}-of-00003.safetensors": "used" for number in (1, 2, 3)
    }
    one, other = lorafast.analyze(whole), lorafast.analyze(sharded)
    for name, module in one.modules.items():
        assert other.modules[name].singular_values == module.singular_values
    assert lorafast.similarity([whole, sharded]).matrix[0][1] == pytest.approx(1)
    assert len(lorafast.duplicates([whole, sharded])) == 1
    fleet = lorafast.scan(tmp_path)
    assert not fleet.errors
    assert set(fleet.adapters["name"]) == {"sharded", "whole"}
    assert len(lorafast.inspect(sharded).tensors) == len(adapter_tensors())


def test_a_cached_scan_sees_that_one_of_them_changed(tmp_path: Path) -> None:
    sharded = make_sharded(tmp_path / "fleet" / "sharded")
    cache = tmp_path / "cache"
    first = lorafast.scan(tmp_path / "fleet", cache=cache)
    file = sharded / "adapter_model-00001-of-00003.safetensors"
    changed = adapter_tensors(seed=9)
    write_safetensors(file, {name: changed[name] for name in list(changed)[0::3]})
    second = lorafast.scan(tmp_path / "fleet", cache=cache)
    digests = [fleet.adapters["blake3"][0] for fleet in (first, second)]
    assert digests[0] != digests[1]


def test_what_is_missing_is_named(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    sharded = make_sharded(tmp_path / "sharded")
    lone = sharded / "adapter_model-00002-of-00003.safetensors"
    with pytest.raises(lorafast.AdapterError, match=r"is file 2 of the 3.*give the directory"):
        lorafast.plan(base, lone)
    lone.unlink()
    with pytest.raises(lorafast.AdapterError, match=r"00002-of-00003.*is not there"):
        lorafast.plan(base, sharded)
    (sharded / INDEX).write_text('{"weight_map": {"x": "../other.safetensors"}}')
    with pytest.raises(lorafast.AdapterError, match="leaves its directory"):
        lorafast.plan(base, sharded)
    (sharded / INDEX).write_text("[")
    with pytest.raises(lorafast.AdapterError, match="JSON"):
        lorafast.plan(base, sharded)


def test_two_files_with_one_tensor_are_not_chosen_between(tmp_path: Path) -> None:
    sharded = make_sharded(tmp_path / "sharded")
    first, second, _ = sorted(sharded.glob("adapter_model-*"))
    second.write_bytes(first.read_bytes())
    with pytest.raises(lorafast.AdapterError, match=r"twice|two|duplicate"):
        lorafast.inspect(sharded)
