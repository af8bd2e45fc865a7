"""Verification, scans, similarity and extraction by workers: the same bits as in one process."""

from __future__ import annotations

from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from lorafast._fleet import workers as of_fleets
from lorafast._similarity import workers as of_similarity
from support.files import snapshot, tensor
from support.fleets import make_fleet, tables
from support.handmade import adapter_tensors, make_adapter, make_base, write_checkpoint
from support.workers import Recording, pool


@pytest.fixture(scope="module")
def executor() -> Iterator[ProcessPoolExecutor]:
    with pool() as processes:
        yield processes


@pytest.mark.parametrize("full", [False, True], ids=["sample", "full"])
def test_a_verification_finds_the_same(
    tmp_path: Path, executor: ProcessPoolExecutor, full: bool
) -> None:
    base = make_base(tmp_path / "base", shards=3, dtype="BF16")
    adapters = [make_adapter(tmp_path / "one"), make_adapter(tmp_path / "two", lora_alpha=3)]
    lorafast.merge(base, adapters, tmp_path / "out")
    alone = lorafast.verify(base, adapters, tmp_path / "out", full=full)
    apart = lorafast.verify(base, adapters, tmp_path / "out", full=full, executor=executor)
    assert alone.ok
    assert apart == alone
    shard = sorted((tmp_path / "out").glob("*.safetensors"))[1]
    content = bytearray(shard.read_bytes())
    content[-1] ^= 64
    shard.write_bytes(content)
    alone = lorafast.verify(base, adapters, tmp_path / "out", full=full)
    apart = lorafast.verify(base, adapters, tmp_path / "out", full=full, executor=executor)
    assert not alone.ok
    assert apart == alone
    shard.write_bytes(b"")
    apart = lorafast.verify(base, adapters, tmp_path / "out", executor=executor)
    assert apart == lorafast.verify(base, adapters, tmp_path / "out")
    assert not apart.ok


def test_a_checkpoint_that_changes_meanwhile_is_no_proof(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base", shards=3)
    adapter = make_adapter(tmp_path / "one")
    lorafast.merge(base, adapter, tmp_path / "out")

    def shrink(number: int) -> None:
        if number == 4:
            lorafast.merge(
                make_base(tmp_path / "small", modules={"model.layers.0.mlp.up_proj": (50, 20)}),
                make_adapter(
                    tmp_path / "few",
                    adapter_tensors(modules={"model.layers.0.mlp.up_proj": (50, 20)}),
                ),
                tmp_path / "out",
                overwrite=True,
            )

    with pytest.raises(lorafast.PlanError, match="changed while it was verified"):
        lorafast.verify(base, adapter, tmp_path / "out", executor=Recording(shrink))


@pytest.mark.parametrize("size", [1, 5000, 1 << 30])
@pytest.mark.parametrize("metrics", ["full", "headers"])
def test_a_scan_finds_the_same(
    tmp_path: Path,
    executor: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    size: int,
    metrics: Any,
) -> None:
    paths = make_fleet(tmp_path / "fleet")
    (paths[1] / "adapter_config.json").write_text("{")
    (paths[2] / "adapter_model.safetensors").write_bytes(b"short")
    monkeypatch.setattr(of_fleets, "TASK_BYTES", size)
    monkeypatch.setattr(of_fleets, "TASK_ADAPTERS", 1)
    monkeypatch.chdir(tmp_path)
    alone = lorafast.scan("fleet", metrics=metrics)
    told: list[tuple[int, int]] = []
    apart = lorafast.scan(
        "fleet",
        metrics=metrics,
        executor=executor,
        progress=lambda done, total: told.append((done, total)),
    )
    assert tables(apart) == tables(alone)
    assert len(apart.errors) == 2
    assert apart.bytes_read == alone.bytes_read
    assert told[-1][0] == told[-1][1] > 0
    kept = lorafast.scan("fleet", metrics=metrics, executor=executor, cache=tmp_path / "cache")
    assert tables(kept) == tables(alone)


def test_a_scan_with_a_device_and_workers_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="leave the device out"):
        lorafast.scan(tmp_path, device="torch:cpu", executor="processes")


def make_many(root: Path, count: int = 24, rank: int = 48) -> None:
    """Adapters of so many ranks that they are no one tile."""
    for place in range(count):
        own = rank - place % 3
        make_adapter(root / f"a{place:02}", adapter_tensors(rank=own, seed=place), r=own)


@pytest.mark.parametrize("cut", [(4096, 1), (512, 6), (1024, 99)], ids=str)
@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_a_similarity_has_the_same_bits(
    tmp_path: Path,
    executor: ProcessPoolExecutor,
    monkeypatch: pytest.MonkeyPatch,
    cut: tuple[int, int],
    precision: Any,
) -> None:
    ranks, tasks = cut
    make_many(tmp_path / "fleet")
    monkeypatch.setattr(of_similarity, "MOST_RANKS", ranks)
    monkeypatch.setattr(of_similarity, "FEWEST_TASKS", tasks)
    monkeypatch.chdir(tmp_path)
    how: dict[str, Any] = {"precision": precision, "per_module": True}
    alone = lorafast.similarity("fleet", **how)
    told: list[tuple[int, int]] = []
    apart = lorafast.similarity(
        "fleet",
        **how,
        executor=executor,
        progress=lambda done, total: told.append((done, total)),
    )
    assert apart.matrix.tobytes() == alone.matrix.tobytes()
    assert apart.norms.tobytes() == alone.norms.tobytes()
    assert alone.per_module is not None
    assert apart.per_module is not None
    for name, table in alone.per_module.items():
        assert apart.per_module[name].tobytes() == table.tobytes()
    assert len(told) == 2 if ranks == 4096 else len(told) > 3
    assert told[-1][0] == told[-1][1]


def test_a_similarity_of_several_bases_has_the_same_bits(
    tmp_path: Path, executor: ProcessPoolExecutor
) -> None:
    for place in range(6):
        make_adapter(
            tmp_path / f"a{place}",
            adapter_tensors(rank=4, seed=place),
            r=4,
            base_model_name_or_path=f"base-{place % 2}",
        )
    alone = lorafast.similarity(tmp_path, group_by_base=True)
    apart = lorafast.similarity(tmp_path, group_by_base=True, executor=executor)
    assert apart.matrix.tobytes() == alone.matrix.tobytes()
    assert np.isnan(alone.matrix).any()


def test_a_similarity_refuses_adapters_that_changed(tmp_path: Path) -> None:
    make_many(tmp_path, count=3, rank=4)

    def change(number: int) -> None:
        of_similarity._last = None
        weights = tmp_path / "a01" / "adapter_model.safetensors"
        weights.write_bytes(weights.read_bytes() + b"")

    with pytest.raises(lorafast.PlanError, match="are not those that the comparison was planned"):
        lorafast.similarity(tmp_path, executor=Recording(change))
    with pytest.raises(ValueError, match="cache"):
        lorafast.similarity(tmp_path, executor="processes", cache=tmp_path / "cache")


SHAPES = {
    f"model.layers.{layer}.{name}": shape
    for layer in range(3)
    for name, shape in {"self_attn.q_proj": (64, 48), "mlp.up_proj": (96, 48)}.items()
}


def make_pair(root: Path) -> tuple[Path, Path]:
    """A base, and the same with low-rank changes."""
    base = make_base(root / "base", modules=SHAPES, dtype="BF16", shards=2)
    random = np.random.default_rng(3)
    start = np.random.default_rng(0)
    changed = {}
    for name, shape in SHAPES.items():
        weight = start.normal(scale=0.05, size=shape)
        change = random.normal(size=(shape[0], 3)) @ random.normal(size=(3, shape[1]))
        changed[f"{name}.weight"] = tensor(weight + 0.01 * change, "BF16")
    changed["model.norm.weight"] = tensor(1 + start.normal(scale=0.05, size=20), "BF16")
    (root / "tuned").mkdir()
    write_checkpoint(root / "tuned", changed, shards=3)
    (root / "tuned" / "config.json").write_text((base / "config.json").read_text())
    return root / "tuned", base


@pytest.mark.parametrize("rank", ["auto", 4, "budget:ranks=12"])
def test_an_extraction_writes_the_same_bytes(
    tmp_path: Path, executor: ProcessPoolExecutor, rank: int | str
) -> None:
    tuned, base = make_pair(tmp_path)
    alone = lorafast.extract(tuned, base, tmp_path / "alone", rank=rank)
    apart = lorafast.extract(tuned, base, tmp_path / "apart", rank=rank, executor=executor)
    assert snapshot(tmp_path / "apart") == snapshot(tmp_path / "alone")
    assert apart.extraction == alone.extraction
    assert apart.ranks == alone.ranks
    assert apart.resumed == 0
    assert not list(tmp_path.glob(".*"))


def test_an_extraction_that_was_broken_off_goes_on(tmp_path: Path) -> None:
    tuned, base = make_pair(tmp_path)
    lorafast.extract(tuned, base, tmp_path / "alone")

    def stop(number: int) -> None:
        if number == 4:
            raise OSError(28, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        lorafast.extract(tuned, base, tmp_path / "apart", executor=Recording(stop))
    again = Recording()
    report = lorafast.extract(tuned, base, tmp_path / "apart", executor=again)
    assert report.resumed >= 4
    assert sum(len(given[4]) for _, given, _ in again.calls) == 7 - report.resumed
    assert snapshot(tmp_path / "apart") == snapshot(tmp_path / "alone")
    assert not list(tmp_path.glob(".*"))


def test_an_extraction_refuses_a_base_that_changed(tmp_path: Path) -> None:
    tuned, base = make_pair(tmp_path)

    def change(number: int) -> None:
        shard = sorted(base.glob("*.safetensors"))[0]
        shard.write_bytes(shard.read_bytes())

    with pytest.raises(lorafast.PlanError, match="start it again"):
        lorafast.extract(tuned, base, tmp_path / "apart", executor=Recording(change))
    assert not (tmp_path / "apart").exists()
