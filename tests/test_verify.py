"""`lorafast.verify` proves what is right and names what is not, whoever made the merge."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lorafast
import numpy as np
import pytest
from lorafast._cli import main
from support.handmade import make_adapter, make_base


@pytest.fixture
def merged(tmp_path: Path) -> tuple[Path, Path, Path]:
    base, adapter = make_base(tmp_path / "base", shards=2), make_adapter(tmp_path / "adapter")
    lorafast.merge(base, adapter, tmp_path / "merged")
    return base, adapter, tmp_path / "merged"


def flip(path: Path, tensor: str, offset: int, bit: int) -> None:
    data = bytearray(path.read_bytes())
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    data[8 + length + header[tensor]["data_offsets"][0] + offset] ^= bit
    path.write_bytes(bytes(data))


def shard_of(directory: Path, tensor: str) -> Path:
    (index,) = directory.glob("*.index.json")
    return directory / json.loads(index.read_text())["weight_map"][tensor]


def changed_tensor(base: Path, adapter: Path, action: str) -> str:
    tensors = lorafast.plan(base, adapter).to_dict()["tensors"]
    name: str = next(entry["name"] for entry in tensors if entry["action"] == action)
    return name


@pytest.mark.parametrize("full", [False, True])
def test_a_right_merge(merged: tuple[Path, Path, Path], full: bool) -> None:
    outcome = lorafast.verify(*merged, full=full)
    assert outcome.ok, outcome.problems
    assert outcome.tensors_merged > 0
    assert outcome.tensors_copied > 0
    assert outcome.to_dict()["ok"] is True
    assert "ok" in repr(outcome)


def test_a_merge_of_another_hand(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    """A result in another dtype than the base's is held against that dtype."""
    base, adapter, _ = merged
    for dtype in ("float32", "float16"):
        lorafast.merge(base, adapter, tmp_path / dtype, dtype=dtype)
        outcome = lorafast.verify(base, adapter, tmp_path / dtype)
        assert outcome.ok, outcome.problems


@pytest.mark.parametrize("action", ["copy", "merge"])
def test_one_flipped_bit(merged: tuple[Path, Path, Path], action: str) -> None:
    base, adapter, output = merged
    name = changed_tensor(base, adapter, action)
    # The sign of the second element, or a high bit of it: far outside any rounding.
    flip(shard_of(output, name), name, 3, 0x40)
    outcome = lorafast.verify(base, adapter, output)
    assert not outcome.ok
    assert name in outcome.problems[0]
    assert "row 0" in outcome.problems[0]


def test_another_strategy(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    outcome = lorafast.verify(base, adapter, output, strategy="weighted", weights=[2.0])
    assert "times the right one" in outcome.problems[0]


def test_the_base_itself(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = merged
    shutil.copytree(base, tmp_path / "copy")
    outcome = lorafast.verify(base, adapter, tmp_path / "copy")
    assert "as if nothing had been merged" in outcome.problems[0]


def test_a_wrong_index(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    (index,) = output.glob("*.index.json")
    content = json.loads(index.read_text())
    content["metadata"]["total_size"] = len(content["weight_map"])
    index.write_text(json.dumps(content))
    assert "total_size" in lorafast.verify(base, adapter, output).problems[0]


def test_two_shards_swapped(merged: tuple[Path, Path, Path]) -> None:
    base, adapter, output = merged
    first, second = sorted(output.glob("*.safetensors"))[:2]
    between = output / "between"
    first.rename(between)
    second.rename(first)
    between.rename(second)
    assert not lorafast.verify(base, adapter, output).ok


def test_what_is_not_there(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = merged
    with pytest.raises(FileNotFoundError, match="absent"):
        lorafast.verify(base, adapter, tmp_path / "absent")


def test_merge_verifies_itself(merged: tuple[Path, Path, Path], tmp_path: Path) -> None:
    base, adapter, _ = merged
    report = lorafast.merge(base, adapter, tmp_path / "again", verify=True)
    assert report.verification is not None
    assert report.verification["ok"]
    assert np.isfinite(report.verification["lost"])


def test_the_command(merged: tuple[Path, Path, Path], capsys: pytest.CaptureFixture[str]) -> None:
    base, adapter, output = merged
    words = ["verify", "--base", str(base), "--adapters", str(adapter), "--merged", str(output)]
    assert main(words) == 0
    assert "The merge is right" in capsys.readouterr().out
    name = changed_tensor(base, adapter, "copy")
    flip(shard_of(output, name), name, 0, 1)
    assert main([*words, "--quiet"]) == 3
    assert name in capsys.readouterr().out
    assert main([*words, "--json"]) == 3
    assert json.loads(capsys.readouterr().out)["ok"] is False
