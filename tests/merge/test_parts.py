"""Parts of a merge that other processes write, and the model that is assembled from them."""

from __future__ import annotations

import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.handmade import make_adapter, make_base

WRITE = """
import pickle, sys
part = pickle.loads(sys.stdin.buffer.read())
sys.stdout.buffer.write(pickle.dumps(part.write(sys.argv[1], threads=1, sync=False)))
"""


def write_elsewhere(part: lorafast.PlanPart, directory: Path) -> list[lorafast.WrittenShard]:
    """The part, written by another process."""
    done = subprocess.run(
        [sys.executable, "-c", WRITE, directory],
        input=pickle.dumps(part),
        capture_output=True,
        check=True,
    )
    written: list[lorafast.WrittenShard] = pickle.loads(done.stdout)
    return written


def prepare(folder: Path) -> tuple[Path, list[Path]]:
    base = make_base(folder / "base", shards=3, dtype="BF16")
    return base, [make_adapter(folder / "one"), make_adapter(folder / "two", lora_alpha=3)]


def test_parts_of_other_processes_make_the_same_model(tmp_path: Path) -> None:
    base, adapters = prepare(tmp_path)
    options = {"strategy": "weighted", "weights": [0.5, -2.0]}
    lorafast.merge(base, adapters, tmp_path / "whole", **options)
    plan = lorafast.plan(base, adapters, **options)
    parts = plan.parts()
    assert [part.shards for part in parts] == [(0,), (1,), (2,)]
    assert sum(part.bytes for part in parts) == plan.bytes_to_write
    written = [shard for part in parts for shard in write_elsewhere(part, tmp_path / "parts")]
    report = plan.assemble(tmp_path / "parts", written, tmp_path / "out")
    ours = {path.name for path in (tmp_path / "out").iterdir()}
    assert ours == {path.name for path in (tmp_path / "whole").iterdir()}
    for name in ours - {"merge_report.json", "merge_report.md"}:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
    assert lorafast.verify(base, adapters, tmp_path / "out", **options).ok
    assert report.weights == [0.5, -2.0]
    assert len(report.adapter_sha256) == 2


def test_whoever_plans_something_else_writes_nothing(tmp_path: Path) -> None:
    base, adapters = prepare(tmp_path)
    part = lorafast.plan(base, adapters).parts()[0]
    weights = adapters[0] / "adapter_model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(lorafast.PlanError, match="plan it again"):
        part.write(tmp_path / "parts")
    assert not (tmp_path / "parts").exists()


def test_a_shard_that_is_another_is_refused(tmp_path: Path) -> None:
    base, adapters = prepare(tmp_path)
    plan = lorafast.plan(base, adapters)
    folder = tmp_path / "parts"
    written = [shard for part in plan.parts() for shard in part.write(folder)]
    with pytest.raises(lorafast.OutputError, match="write that part again"):
        plan.assemble(folder, written[1:], tmp_path / "out")
    damaged = folder / written[0].name
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    with pytest.raises(lorafast.OutputError, match="write that part again"):
        plan.assemble(folder, written, tmp_path / "out")
    damaged.unlink()
    with pytest.raises(FileNotFoundError):
        plan.assemble(folder, written, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_a_method_was_given_is_part_of_the_plan(tmp_path: Path) -> None:
    """What an earlier merge left is taken for this one's where the digests are the same."""
    base, adapters = prepare(tmp_path)
    given: list[dict[str, Any]] = [
        {},
        {"strategy": "ties"},
        {"strategy": "ties", "strategy_options": {"density": 0.5}},
        {"strategy": "dare_ties", "strategy_options": {"density": 0.5}},
        {"strategy": "dare_ties", "strategy_options": {"density": 0.5}, "seed": 1},
        {"strategy": "dare_ties", "strategy_options": {"density": 0.5}, "weights": [1, 2]},
        {"strategy": "slerp"},
        {"strategy": "slerp", "strategy_options": {"t": 0.3}},
    ]
    digests = [lorafast.plan(base, adapters, **each).digest for each in given]
    assert len(set(digests)) == len(given)


def test_only_a_merge_of_files_has_parts(tmp_path: Path) -> None:
    base, adapters = prepare(tmp_path)
    plan = lorafast.plan(base, adapters)
    assert plan.digest == lorafast.plan(base, adapters).digest
    assert plan.digest != lorafast.plan(base, adapters[:1]).digest
    plan.options = None
    with pytest.raises(ValueError, match="merge of files"):
        plan.parts()
