"""Listings are frozen values, read by attribute and, for now, by key."""

from __future__ import annotations

import json
import pickle
from pathlib import Path

import lorafast
import pytest
from lorafast._cli.main import main
from support.handmade import adapter_tensors, make_adapter, make_base


def test_a_checkpoint(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    listing = lorafast.inspect(base)
    assert isinstance(listing, lorafast.CheckpointListing)
    assert (listing.kind, listing.path) == ("checkpoint", str(base))
    assert len(listing.files) == 2
    assert sum(file.tensors for file in listing.files) == len(listing.tensors)
    assert sum(tensor.bytes for tensor in listing.tensors) == listing.total_bytes
    assert listing.quantised == {}
    assert listing.config == json.loads((base / "config.json").read_text())
    assert repr(listing).startswith(f"<CheckpointListing: {base}; ")


def test_an_adapter(tmp_path: Path) -> None:
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(), r=4, lora_alpha=8)
    listing = lorafast.inspect(adapter)
    assert isinstance(listing, lorafast.AdapterListing)
    assert (listing.type, listing.r, listing.alpha, listing.rslora) == ("LORA", 4, 8, False)
    assert {module.scaling for module in listing.modules} == {2.0}
    assert [use.name for use in listing.tensors_use] == [each.name for each in listing.tensors]
    assert {use.use for use in listing.tensors_use} == {"used"}
    assert "r" in {use.name for use in listing.fields_use}
    assert listing.features == ()


def test_by_key_it_is_what_it_was(tmp_path: Path) -> None:
    listing = lorafast.inspect(make_adapter(tmp_path / "adapter"))
    plain = listing.to_dict()
    assert dict(listing) == plain == json.loads(listing.to_json())
    assert listing["tensors"][0]["name"] == listing.tensors[0].name
    assert listing["adapter"]["modules"][0]["rank"] == plain["adapter"]["modules"][0]["rank"]  # type: ignore[index]  # of an adapter
    assert "config" in listing
    assert listing.get("nothing") is None
    plain["warnings"].append("changed")
    assert listing.warnings == ()


@pytest.mark.parametrize("what", ["base", "adapter"])
def test_it_is_frozen_and_survives_pickling(tmp_path: Path, what: str) -> None:
    make = {"base": make_base, "adapter": make_adapter}[what]
    listing = lorafast.inspect(make(tmp_path / what))
    again = pickle.loads(pickle.dumps(listing))
    assert type(again) is type(listing)
    assert again == listing
    assert again.tensors == listing.tensors
    with pytest.raises(AttributeError, match="frozen"):
        listing.path = "elsewhere"  # type: ignore[misc]  # wrong on purpose
    with pytest.raises(AttributeError, match="frozen"):
        del listing.path
    with pytest.raises(AttributeError):
        listing.tensors[0].name = "other"  # type: ignore[misc]  # wrong on purpose


def test_the_tensors_of_a_plan(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    plan = lorafast.plan(base, adapter)
    changed = [tensor for tensor in plan.tensors if tensor.updates]
    assert len(changed) == plan.tensors_merged
    assert {tensor.action for tensor in changed} == {"merge"}
    (update,) = changed[0].updates
    assert isinstance(update, lorafast.Update)
    assert (update.adapter, update.kind, update.part, update.stage) == (0, "low_rank", None, 0)
    assert pickle.loads(pickle.dumps(plan.tensors)) == plan.tensors
    with pytest.raises(AttributeError):
        update.rank = 1  # type: ignore[misc]  # wrong on purpose


def refused(path: Path) -> str:
    """What is said of a directory that is neither a checkpoint nor an adapter."""
    with pytest.raises(lorafast.CheckpointError) as caught:
        lorafast.inspect(path)
    return str(caught.value)


def test_a_folder_of_adapters_names_some_and_points_to_scan(tmp_path: Path) -> None:
    runs = tmp_path / "runs"
    make_adapter(runs / "a")
    said = refused(runs)
    assert said == (
        f"{runs}: holds no weights itself, but 1 adapter lies below it (a); give it, or see all "
        "with `lorafast scan`"
    )
    for name in "bcde":
        make_adapter(runs / name)
    assert "5 adapters lie below it (a, b, c, …); give one of them" in refused(runs)
    # Scan finds them at any depth, and hidden ones nowhere.
    make_adapter(runs / ".cache" / "f")
    assert "5 adapters lie below it (runs/a, runs/b, runs/c, …)" in refused(tmp_path)
    (runs / "notes.txt").write_text("all of them\n")
    assert "5 adapters lie below it" in refused(runs)


def test_of_other_folders_the_core_knows_more(tmp_path: Path) -> None:
    assert "an empty directory" in refused(tmp_path)
    for step in (500, 1000):
        make_adapter(tmp_path / "run" / f"checkpoint-{step}")
    assert "such as checkpoint-1000" in refused(tmp_path / "run")
    for name in ("one", "two"):
        make_adapter(make_base(tmp_path / "models" / name) / "adapter")
    assert "its folders are: 2 models" in refused(tmp_path / "models")
    # A broken checkpoint is told of, whatever lies beside its weights.
    model = make_base(tmp_path / "model")
    make_adapter(model / "adapter")
    (model / "model.safetensors").write_bytes(b"none")
    assert "adapters lie below" not in refused(model)


def test_the_command_says_so_in_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in "ab":
        make_adapter(tmp_path / name)
    assert main(["inspect", str(tmp_path)]) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert "2 adapters lie below it (a, b); give one of them" in line
    assert line.endswith("`lorafast scan`")
