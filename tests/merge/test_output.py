"""What a merged directory holds: the base's files, names, layout and metadata, and a report."""

from __future__ import annotations

import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path

import lorafast
import numpy as np
import pytest
from support.compare import assert_merged_like_float64, assert_rest_untouched
from support.files import (
    ITEM_SIZES,
    Tensor,
    layout,
    read_checkpoint,
    read_header,
    snapshot,
    tensor,
    write_safetensors,
)
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base, write_checkpoint
from support.models import Models
from support.reference import merge_float64
from support.refusal import refuses


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


def assert_merged(base: Path, adapter: Path, output: Path) -> None:
    before, after = read_checkpoint(base), read_checkpoint(output)
    terms = merge_float64(before, [adapter])
    assert_merged_like_float64(after, terms)
    assert_rest_untouched(after, before, terms)
    assert all(after[name] != before[name] for name in terms)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("stem", ["model", "diffusion_pytorch_model"])
def test_names_of_files_are_the_bases(
    tmp_path: Path, adapter: Path, stem: str, shards: int
) -> None:
    base = make_base(tmp_path / "base", stem=stem, shards=shards, dtype="BF16")
    lorafast.merge(base, adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    assert {p.name for p in (tmp_path / "out").iterdir()} == {p.name for p in base.iterdir()} | {
        "lorafast_manifest.json",
        "README.md",
        "merge_report.json",
        "merge_report.md",
    }


def test_a_single_file(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base") / "model.safetensors"
    base = base.rename(base.with_name("any-name.safetensors"))
    lorafast.merge(base, adapter, tmp_path / "out")
    (written,) = (tmp_path / "out").glob("*.safetensors")
    assert_merged(base, adapter, written)


@pytest.mark.skipif(shutil.which("strace") is None, reason="strace is not installed")
@pytest.mark.parametrize("sync", [True, False])
def test_the_output_is_synced_unless_it_should_not_be(
    tmp_path: Path, adapter: Path, sync: bool
) -> None:
    base, output, log = make_base(tmp_path / "base"), tmp_path / "out", tmp_path / "log"
    merge = ["lorafast", "merge", "--base", base, "--adapters", adapter, "--output", output]
    command = ["strace", "-f", "-y", "-e", "trace=fsync", "-o", log, sys.executable, "-m", *merge]
    finished = subprocess.run([*map(str, command), *([] if sync else ["--no-sync"])], check=False)
    if finished.returncode and not output.exists():
        pytest.skip("processes cannot be traced here")
    assert finished.returncode == 0
    synced = log.read_text()
    assert ("model.safetensors>" in synced) == sync
    assert ("fsync" in synced) == sync
    assert_merged(base, adapter, output)


def test_paths_as_text(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base")
    report = lorafast.merge(str(base), [str(adapter)], str(tmp_path / "out"))
    assert_merged(base, adapter, tmp_path / "out")
    assert Path(report.output_path) == tmp_path / "out"


def test_relative_paths(tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = make_base(tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    lorafast.merge("base", "adapter", "out")
    assert_merged(base, adapter, tmp_path / "out")


def test_a_path_with_spaces_and_letters_of_all_kinds(tmp_path: Path) -> None:
    folder = tmp_path / "modèles à fusionner 模型"
    folder.mkdir()
    base, adapter = make_base(folder / "base"), make_adapter(folder / "adapter")
    lorafast.merge(base, adapter, folder / "out put")
    assert_merged(base, adapter, folder / "out put")


def test_metadata_and_layout_are_kept(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    lorafast.merge(base, adapter, tmp_path / "out")
    for shard in base.glob("*.safetensors"):
        before, _ = read_header(shard)
        after, start = read_header(tmp_path / "out" / shard.name)
        assert before["__metadata__"] == {"format": "pt", "note": "kept"}
        assert after == before
        assert start % 8 == 0


def test_every_other_dtype_is_carried_through(tmp_path: Path, adapter: Path) -> None:
    random = np.random.default_rng(0)
    others = {
        f"other.{dtype}": Tensor(dtype, (3, 5), random.bytes(15 * ITEM_SIZES[dtype]))
        for dtype in ITEM_SIZES
    }
    # A dtype that a later version of the format may bring.
    others["from the future"] = Tensor("F6_E9", (5,), b"xyz")
    others |= {"scalar": tensor(np.float64(2.5), "F32"), "nothing": Tensor("F32", (0, 7), b"")}
    base = make_base(tmp_path / "base", dtype="F16", others=others, shards=2)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


def test_tensors_at_odd_offsets(tmp_path: Path, adapter: Path) -> None:
    """A byte in front of every float, and a header of odd length: no alignment at all."""
    base = make_base(tmp_path / "base", dtype="F32")
    file = base / "model.safetensors"
    sound = read_checkpoint(base)
    shifted = {"aa.one_byte": Tensor("U8", (1,), b"\7")} | sound
    header, body = layout(shifted)
    text = json.dumps(header)
    text += " " * ((len(text) + 1) % 2)
    file.write_bytes(len(text).to_bytes(8, "little") + text.encode() + body)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")


def test_side_files_come_along(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base")
    (base / "chat_template.jinja").write_text("{{ messages }}")
    (base / "1_Pooling").mkdir()
    (base / "1_Pooling" / "config.json").write_text('{"mode": "mean"}')
    (base / "vocab.bpe").write_bytes(bytes(range(256)))
    lorafast.merge(base, adapter, tmp_path / "out")
    before, after = snapshot(base), snapshot(tmp_path / "out")
    del before["model.safetensors"]
    assert after.items() >= before.items()


def test_links_into_a_cache_are_followed(tmp_path: Path, adapter: Path) -> None:
    """Snapshots of a hub's cache hold links to files elsewhere."""
    stored = make_base(tmp_path / "blobs", shards=2)
    base = tmp_path / "snapshot"
    base.mkdir()
    for file in stored.iterdir():
        (base / file.name).symlink_to(file)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert_merged(base, adapter, tmp_path / "out")
    assert not any(path.is_symlink() for path in (tmp_path / "out").iterdir())
    before = snapshot(stored)
    shutil.rmtree(stored)
    assert read_checkpoint(tmp_path / "out").keys() == {
        *json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    }
    assert (tmp_path / "out" / "tokenizer.json").exists()
    assert before


def test_the_base_and_the_adapter_are_only_read(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    before = snapshot(base), snapshot(adapter)
    lorafast.merge(base, adapter, tmp_path / "out")
    assert (snapshot(base), snapshot(adapter)) == before


def test_the_index_counts_bytes(tmp_path: Path, adapter: Path) -> None:
    """Also where the base's own index counted something else."""
    base = make_base(tmp_path / "base", shards=2)
    file = base / "model.safetensors.index.json"
    index = json.loads(file.read_text())
    right = index["metadata"]["total_size"]
    index["metadata"] = {"total_size": 5, "total_parameters": 12345}
    file.write_text(json.dumps(index))
    lorafast.merge(base, adapter, tmp_path / "out")
    written = json.loads((tmp_path / "out" / file.name).read_text())
    assert written["metadata"]["total_size"] == right
    assert written["weight_map"] == index["weight_map"]


def test_the_report(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", dtype="BF16", shards=2)
    second = make_adapter(tmp_path / "second", r=2, lora_alpha=2)
    output = tmp_path / "out"
    report = lorafast.merge(
        base, [adapter, second], output, strategy="weighted", weights=[0.5, -2], threads=1
    )
    tensors = read_checkpoint(base)
    parameters = sum(int(np.prod(t.shape)) for t in tensors.values())
    assert Path(report.base) == base
    assert [Path(a) for a in report.adapters] == [adapter, second]
    assert report.strategy == "weighted"
    assert report.weights == [0.5, -2]
    assert Path(report.output_path) == output
    assert report.device == "cpu"
    assert report.total_parameters == parameters
    assert report.model_size_mb == report.bytes_written / 2**20
    assert report.tensors_merged == len(MODULES)
    assert report.tensors_copied == len(tensors) - len(MODULES)
    shards = sum(f.stat().st_size for f in output.glob("*.safetensors"))
    assert 2 * parameters <= report.bytes_written <= shards
    assert report.merge_time > 0
    assert report.warnings == []

    as_dict = report.portable().to_dict()
    written = json.loads((output / "merge_report.json").read_text())
    assert written == json.loads(json.dumps(as_dict))
    for key in ("base", "adapters", "strategy", "weights", "output_path", "merge_time"):
        assert key in written
    text = (output / "merge_report.md").read_text()
    assert text == report.to_markdown()
    assert "weighted" in text

    dumped = json.dumps(written)
    for folder in (adapter, second):
        content = (folder / "adapter_model.safetensors").read_bytes()
        assert hashlib.sha256(content).hexdigest() in dumped
    assert lorafast.__version__ in dumped


def test_progress_counts_bytes_up_to_the_end(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    calls: list[tuple[int, int]] = []
    report = lorafast.merge(
        base, adapter, tmp_path / "out", progress=lambda done, total: calls.append((done, total))
    )
    totals = {total for _, total in calls}
    assert calls[-1] == (max(totals), max(totals))
    assert max(totals) >= report.bytes_written
    done = [value for value, _ in calls]
    assert done == sorted(done)


@pytest.mark.parametrize("progress", [False, True])
def test_nothing_is_printed_where_there_is_no_terminal(
    tmp_path: Path, adapter: Path, capfd: pytest.CaptureFixture[str], progress: bool
) -> None:
    base = make_base(tmp_path / "base")
    lorafast.merge(base, adapter, tmp_path / "out", progress=progress)
    assert capfd.readouterr() == ("", "")


def test_the_plan_is_a_value(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", shards=2)
    before = snapshot(tmp_path)
    first = lorafast.plan(base, adapter)
    second = lorafast.plan(base, [adapter])
    assert snapshot(tmp_path) == before
    assert repr(first) == repr(second)
    assert len(repr(first)) < 2000


def test_conv1d_weights_in_several_shards(models: Models, tmp_path: Path) -> None:
    base = models.gpt2()
    adapter = models.adapter(
        "gpt2-sharded", base, steps=0, r=4, lora_alpha=8, target_modules=["c_attn", "c_proj"]
    )
    sharded = tmp_path / "sharded"
    sharded.mkdir()
    write_checkpoint(sharded, read_checkpoint(base), shards=4)
    shutil.copy(base / "config.json", sharded)
    lorafast.merge(base, adapter, tmp_path / "one")
    lorafast.merge(sharded, adapter, tmp_path / "four")
    assert read_checkpoint(tmp_path / "one") == read_checkpoint(tmp_path / "four")


def test_a_square_conv1d_without_a_config(models: Models, tmp_path: Path) -> None:
    """Without a config the biases of the layers around tell how a square weight is stored."""
    base = models.gpt2()
    adapter = models.adapter(
        "gpt2-square", base, steps=0, r=4, lora_alpha=8, target_modules=["attn.c_proj"]
    )
    bare = tmp_path / "bare"
    bare.mkdir()
    write_safetensors(bare / "model.safetensors", read_checkpoint(base))
    lorafast.merge(base, adapter, tmp_path / "known")
    lorafast.merge(bare, adapter, tmp_path / "bare-out")
    assert read_checkpoint(tmp_path / "known") == read_checkpoint(tmp_path / "bare-out")


def test_a_square_weight_that_nothing_explains(tmp_path: Path) -> None:
    """No config, no biases, and a name that both kinds of layer have: a guess is not made."""
    modules = {"transformer.h.0.attn.c_proj": (16, 16)}
    base = make_base(tmp_path / "base", modules=modules)
    (base / "config.json").unlink()
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    refuses(tmp_path, lorafast.PlanError, base, adapter, "c_proj", "config.json")


@pytest.mark.parametrize(
    ("in_base", "in_adapter"), [("", "model."), ("model.", ""), ("", "transformer.")]
)
def test_names_with_and_without_the_backbones_prefix(
    tmp_path: Path, in_base: str, in_adapter: str
) -> None:
    """gpt2's own files name the bare backbone, adapters the model with its head; or vice versa."""
    plain = {name.removeprefix("model."): shape for name, shape in MODULES.items()}
    base = make_base(tmp_path / "base", modules={in_base + n: s for n, s in plain.items()})
    expected = make_base(tmp_path / "same", modules={in_adapter + n: s for n, s in plain.items()})
    adapter = make_adapter(
        tmp_path / "adapter", adapter_tensors({in_adapter + n: s for n, s in plain.items()})
    )
    lorafast.merge(base, adapter, tmp_path / "out")
    lorafast.merge(expected, adapter, tmp_path / "expected")
    ours, theirs = read_checkpoint(tmp_path / "out"), read_checkpoint(tmp_path / "expected")
    for name in plain:
        assert ours[f"{in_base}{name}.weight"] == theirs[f"{in_adapter}{name}.weight"]
        assert ours[f"{in_base}{name}.weight"] != read_checkpoint(base)[f"{in_base}{name}.weight"]


def test_names_that_fit_in_two_ways(tmp_path: Path) -> None:
    """Two towers hold the same layers; which of them was trained is not guessed."""
    plain = {name.removeprefix("model."): shape for name, shape in MODULES.items()}
    towers = {f"{tower}.{n}": s for tower in ("query", "document") for n, s in plain.items()}
    base = make_base(tmp_path / "base", modules=towers)
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(plain))
    refuses(tmp_path, lorafast.PlanError, base, adapter, "query.", "document.")
