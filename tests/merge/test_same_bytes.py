"""The same bytes by every path: instruction sets, threads, and what the file system shares."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.compare import assert_merged_like_float64
from support.files import read_checkpoint, snapshot, tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base
from support.reference import PREFIX, merge_float64

SETS: list[str] = lorafast.build_info()["instruction_sets"]
THREADS = [1, 2, 7]
# Several tiles of rows and none of them full, and columns that are no multiple of any vector.
MODULES = {
    "model.layers.0.mlp.up_proj": (2003, 333),
    "model.layers.0.mlp.down_proj": (37, 2003),
}


def dora(tensors: dict[str, object], seed: int) -> dict[str, object]:
    random = np.random.default_rng(seed)
    rows = {f"{PREFIX}{module}": shape[0] for module, shape in MODULES.items()}
    return tensors | {
        f"{key}.lora_magnitude_vector": tensor(random.uniform(0.5, 1.5, size=count))
        for key, count in rows.items()
    }


@pytest.mark.parametrize("form", ["linear", "several", "dora"])
@pytest.mark.parametrize(
    "rank", [33, *(pytest.param(rank, marks=pytest.mark.exhaustive) for rank in (1, 64))]
)
@pytest.mark.parametrize("dtype", ["F32", "BF16", "F16", "F64"])
def test_the_same_bytes_from_every_instruction_set_and_number_of_threads(
    tmp_path: Path, dtype: str, rank: int, form: str
) -> None:
    base = make_base(tmp_path / "base", modules=MODULES, dtype=dtype)
    tensors = adapter_tensors(MODULES, rank=rank)
    settings = {"r": rank, "lora_alpha": 8}
    if form == "dora":
        tensors = dora(tensors, 4)
        settings["use_dora"] = True
    adapters = [make_adapter(tmp_path / "a", tensors, **settings)]
    if form == "several":
        more = adapter_tensors(MODULES, rank=5, dtype="BF16", seed=7)
        adapters.append(make_adapter(tmp_path / "b", more, r=5, lora_alpha=3))
    written = {}
    for instruction_set in SETS:
        for threads in THREADS:
            output = tmp_path / "out"
            done, lock = lorafast.plan(base, adapters).core.execute(
                output,
                {"threads": threads, "overwrite": True, "instruction_set": instruction_set},
            )
            lock.release()
            assert (done["instruction_set"], done["threads"]) == (instruction_set, threads)
            written[instruction_set, threads] = snapshot(output)
    lorafast.merge(base, adapters, tmp_path / "own-choice", report=False)
    written["own choice", 0] = snapshot(tmp_path / "own-choice")
    first = written["portable", 1]
    assert "model.safetensors" in first
    different = [path for path, files in written.items() if files != first]
    assert not different
    # The bytes are those of a merge, not only all alike.
    if form != "dora":
        terms = merge_float64(read_checkpoint(base), adapters)
        assert_merged_like_float64(read_checkpoint(tmp_path / "own-choice"), terms)


def test_an_instruction_set_that_is_not_there(tmp_path: Path) -> None:
    base = make_base(tmp_path / "base")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors())
    with pytest.raises(ValueError, match=r'no instruction set "avx9" .* portable'):
        lorafast.plan(base, adapter).core.execute(tmp_path / "out", {"instruction_set": "avx9"})
    assert not (tmp_path / "out").exists()


def run(*command: str | Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run([*map(str, command)], capture_output=True, text=True, check=False)


@pytest.fixture(params=[("xfs", "-m", "reflink=1"), ("btrfs",)], ids=lambda param: param[0])
def with_reflinks(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Path]:
    """A mounted file system whose files can share blocks."""
    kind, *flags = request.param
    for tool in (f"mkfs.{kind}", "mount", "umount", "filefrag"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    image, place = tmp_path / "image", tmp_path / "mount"
    with image.open("wb") as file:
        file.truncate(400 << 20)
    made = run(f"mkfs.{kind}", "-q", *flags, image)
    if made.returncode:
        pytest.skip(f"mkfs.{kind}: {made.stderr.strip()}")
    place.mkdir()
    mounted = run("mount", "-o", "loop", image, place)
    if mounted.returncode:
        pytest.skip(f"no loop file can be mounted here: {mounted.stderr.strip()}")
    try:
        yield place
    finally:
        assert run("umount", place).returncode == 0


def extents(path: Path) -> list[tuple[int, bool]]:
    """Length of each extent in bytes, and whether another file shares it."""
    listed = run("filefrag", "-v", "-b1", path)
    assert listed.returncode == 0, listed.stderr
    rows = [line.split(":") for line in listed.stdout.splitlines()]
    return [(int(row[3]), "shared" in row[-1]) for row in rows if row[0].strip().isdigit()]


def test_untouched_shards_share_their_blocks_with_the_base(with_reflinks: Path) -> None:
    base, output = with_reflinks / "base", with_reflinks / "out"
    touched, untouched = "model.layers.0.q_proj", "model.layers.1.q_proj"
    modules = {touched: (2048, 5120), untouched: (2048, 5120)}
    make_base(base, modules=modules, shards=2)
    shards = sorted(base.glob("*.safetensors"))
    assert len(shards) == 2
    merged = {touched: modules[touched]}
    adapter = make_adapter(
        with_reflinks / "adapter", adapter_tensors(merged, rank=4), r=4, lora_alpha=8
    )
    # What is not on the disk yet cannot be shared.
    run("sync", "-f", base)
    lorafast.merge(base, adapter, output)
    run("sync", "-f", output)

    unshared = {}
    for shard in shards:
        kept = (output / shard.name).read_bytes() == shard.read_bytes()
        unshared[kept] = sum(size for size, shared in extents(output / shard.name) if not shared)
    assert unshared.keys() == {True, False}
    assert unshared[True] == 0
    assert unshared[False] >= 4 * 2048 * 5120
    terms = merge_float64(read_checkpoint(base), [adapter])
    assert_merged_like_float64(read_checkpoint(output), terms)


def test_the_base_stays_when_the_output_that_shares_with_it_is_changed(with_reflinks: Path) -> None:
    base, output = with_reflinks / "base", with_reflinks / "out"
    modules = {f"model.layers.{layer}.q_proj": (512, 1024) for layer in range(2)}
    make_base(base, modules=modules, shards=2)
    before = snapshot(base)
    first = dict(list(modules.items())[:1])
    adapter = make_adapter(with_reflinks / "adapter", adapter_tensors(first), r=4, lora_alpha=8)
    run("sync", "-f", base)
    lorafast.merge(base, adapter, output)
    for shard in output.glob("*.safetensors"):
        write_safetensors(shard, {"gone": tensor(np.zeros(4))})
    assert snapshot(base) == before
