"""A merge over an older one writes the shards that would become others, and no others."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import Tensor, read_safetensors, tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base

LAYERS = 5
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": (24, 24)
    for layer in range(LAYERS)
    for name in ("q_proj", "v_proj")
}
WEIGHTS = "adapter_model.safetensors"


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A base with a shard for each layer and more, an adapter, and their merge in `out`."""
    make_base(tmp_path / "base", modules=MODULES, shards=LAYERS, dtype="BF16")
    make_adapter(tmp_path / "style", adapter_tensors(MODULES))
    lorafast.merge(tmp_path / "base", tmp_path / "style", tmp_path / "out")
    return tmp_path


def marks(directory: Path) -> dict[str, tuple[int, int, int]]:
    """What tells each shard from another file, and from itself at another time."""
    found = {path.name: path.stat() for path in directory.glob("*.safetensors")}
    return {name: (each.st_ino, each.st_mtime_ns, each.st_ctime_ns) for name, each in found.items()}


def again(made: Path, **options: Any) -> tuple[lorafast.MergeReport, set[str]]:
    """Merges over the output; the report, and the shards that were written, which must be right."""
    before = marks(made / "out")
    report = lorafast.merge(
        made / "base", made / "style", made / "out", overwrite=True, verify=True, **options
    )
    after = marks(made / "out")
    shutil.rmtree(made / "fresh", ignore_errors=True)
    fresh = lorafast.merge(made / "base", made / "style", made / "fresh", **options)
    for path in (made / "fresh").iterdir():
        if not path.name.startswith("merge_report"):
            assert (made / "out" / path.name).read_bytes() == path.read_bytes(), path.name
    assert {p.name for p in (made / "fresh").iterdir()} == {
        p.name for p in (made / "out").iterdir()
    }
    # Figures are of the whole model, whatever was written.
    if fresh.rounding is not None:
        assert report.rounding == pytest.approx(fresh.rounding)
    assert report.tensors_merged == fresh.tensors_merged
    return report, {name for name in after if before.get(name) != after[name]}


def change(made: Path, layers: set[int], tensors: str = "lora_B") -> set[str]:
    """Changes an adapter's factors of some layers; the shards in which these lie."""
    path = made / "style" / WEIGHTS
    found: dict[str, Tensor] = dict(read_safetensors(path))
    other = adapter_tensors(MODULES, seed=9)
    for name in found:
        if any(f"layers.{layer}." in name for layer in layers) and tensors in name:
            found[name] = other[name]
    path.unlink()
    write_safetensors(path, found)
    index = json.loads((made / "base" / "model.safetensors.index.json").read_text())
    return {
        shard
        for name, shard in index["weight_map"].items()
        if any(f"layers.{layer}." in name for layer in layers) and "self_attn" in name
    }


def test_the_same_merge_again_writes_no_shard(made: Path) -> None:
    report, written = again(made)
    assert written == set()
    count = len(marks(made / "out"))
    assert f"{count} of {count} shards would become the same again" in report.notes[-1]
    # And once more, from what that one says.
    assert again(made)[1] == set()


def test_a_changed_adapter_on_two_layers_writes_their_shards(made: Path) -> None:
    expected = change(made, {1, 3})
    assert 0 < len(expected) < len(marks(made / "out"))
    report, written = again(made)
    assert written == expected
    assert f"{len(marks(made / 'out')) - len(expected)} of " in report.notes[-1]
    assert change(made, {0}, "lora_A") == again(made)[1]


@pytest.mark.parametrize(
    "options",
    [
        {"weights": [0.5]},
        {"dtype": "float32"},
        {"strategy": "ties", "strategy_options": {"density": 0.5}},
    ],
    ids=str,
)
def test_another_merge_writes_them_all(made: Path, options: dict[str, Any]) -> None:
    everything = set(marks(made / "out"))
    assert again(made, **options)[1] == everything
    assert again(made, **options)[1] == set()


def test_another_seed_writes_what_depends_on_it(made: Path) -> None:
    options: dict[str, Any] = {"strategy": "dare_linear", "strategy_options": {"density": 0.5}}
    everything = again(made, **options, seed=1)[1]
    assert everything
    assert again(made, **options, seed=1)[1] == set()
    assert again(made, **options, seed=2)[1] == everything


def flip(path: Path) -> None:
    """Changes a file's last byte in its place."""
    with path.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        byte = file.read(1)[0]
        file.seek(-1, os.SEEK_END)
        file.write(bytes([byte ^ 1]))


def flip_unseen(path: Path) -> None:
    """The same, with the times set back."""
    found = path.stat()
    flip(path)
    os.utime(path, ns=(found.st_atime_ns, found.st_mtime_ns))


def exchange(path: Path) -> None:
    """Puts a copy in a file's place."""
    copy = path.with_suffix(".copy")
    shutil.copy2(path, copy)
    copy.replace(path)


def link(path: Path) -> None:
    """Puts a link to the same file elsewhere in a file's place."""
    elsewhere = path.parent.parent / "elsewhere"
    path.rename(elsewhere)
    path.symlink_to(elsewhere)


@pytest.mark.parametrize("tamper", [flip, flip_unseen, exchange, Path.unlink, link])
def test_a_shard_that_is_not_what_it_was_is_written(
    made: Path, tamper: Callable[[Path], None]
) -> None:
    name = sorted(marks(made / "out"))[1]
    tamper(made / "out" / name)
    before = marks(made / "out")
    _, written = again(made)
    assert written == {name}
    assert not (made / "out" / name).is_symlink()
    assert before != marks(made / "out")


@pytest.mark.parametrize("touch", [flip, flip_unseen, exchange])
def test_a_shard_of_a_changed_base_is_written(made: Path, touch: Callable[[Path], None]) -> None:
    name = sorted(marks(made / "base"))[2]
    touch(made / "base" / name)
    assert again(made)[1] == {name}


def test_what_no_report_tells_of_is_written(made: Path) -> None:
    everything = set(marks(made / "out"))
    assert again(made, report=False)[1] == everything
    # The model has no report now.
    assert again(made)[1] == everything
    assert again(made)[1] == set()


@pytest.mark.parametrize(
    "spoil",
    [
        lambda report: "no JSON",
        lambda report: json.dumps([report]),
        lambda report: json.dumps(report | {"recipes": 3}),
        lambda report: json.dumps(report | {"recipes": {name: {} for name in report["recipes"]}}),
        lambda report: json.dumps(report).replace('"inode": ', '"inode": -'),
        lambda report: json.dumps(report).replace('"modified": ', '"modified": "x", "y": '),
        lambda report: json.dumps(report).replace('"rounding": [', '"rounding": [1e400, '),
    ],
    ids=["text", "list", "number", "empty", "negative", "unknown", "infinite"],
)
def test_a_report_that_tells_nothing_costs_the_work_alone(
    made: Path, spoil: Callable[[dict[str, Any]], str]
) -> None:
    path = made / "out" / "merge_report.json"
    path.write_text(spoil(json.loads(path.read_text())))
    assert again(made)[1] == set(marks(made / "out"))


def test_names_in_a_report_lead_nowhere(made: Path) -> None:
    path = made / "out" / "merge_report.json"
    report = json.loads(path.read_text())
    report["recipes"] = {f"../out/{name}": each for name, each in report["recipes"].items()}
    path.write_text(json.dumps(report))
    assert again(made)[1] == set(marks(made / "out"))


def test_a_model_of_other_shards_goes(made: Path) -> None:
    """What the new model has not is removed, and what both have stays."""
    stray = made / "out" / "model-00009-of-00009.safetensors"
    index = json.loads((made / "out" / "model.safetensors.index.json").read_text())
    shutil.copy(made / "out" / sorted(marks(made / "out"))[0], stray)
    index["weight_map"]["stray"] = stray.name
    (made / "out" / "model.safetensors.index.json").write_text(json.dumps(index))
    _, written = again(made)
    assert written == set()
    assert not stray.exists()


def test_a_merge_that_fails_leaves_everything(made: Path) -> None:
    path = made / "style" / WEIGHTS
    found: dict[str, Tensor] = dict(read_safetensors(path))
    name = next(name for name in found if "layers.1." in name and "lora_B" in name)
    found[name] = tensor(np.full(found[name].shape, 3e38), "F32")
    write_safetensors(path, found)
    before = {path.name: path.read_bytes() for path in (made / "out").iterdir()}
    own = marks(made / "out")
    with pytest.raises(lorafast.NumericError):
        lorafast.merge(made / "base", made / "style", made / "out", overwrite=True)
    assert {path.name: path.read_bytes() for path in (made / "out").iterdir()} == before
    assert marks(made / "out") == own


@pytest.mark.trust
def test_killed_merges_leave_the_older_model_or_the_new_one(made: Path) -> None:
    """Both have shards in common, which lie where they lay whatever happens."""
    random = np.random.default_rng(0)
    script = (
        "import sys, lorafast; base, style, out = sys.argv[1:]; plan = lorafast.plan(base, style); "
        "from lorafast._merge.recipes import earlier; recipes = earlier(out); assert recipes; "
        "print('begins', flush=True); "
        "plan.core.execute(out, {'overwrite': True, 'recipes': recipes, 'card': plan._card()})"
    )
    words = [sys.executable, "-c", script, *(str(made / n) for n in ("base", "style", "out"))]
    models = []
    for layer in (1, 3):
        change(made, {layer}, "lora_A" if layer == 3 else "lora_B")
        shutil.copytree(made / "style", made / f"style-{layer}")
        lorafast.merge(made / "base", made / "style", made / f"fresh-{layer}")
        models.append(whole(made / f"fresh-{layer}"))
    for number in range(24):
        shutil.rmtree(made / "style")
        shutil.copytree(made / f"style-{(1, 3)[number % 2]}", made / "style")
        with subprocess.Popen(words, stdout=subprocess.PIPE) as process:
            assert process.stdout is not None
            process.stdout.readline()
            time.sleep(random.uniform(0, 0.04))
            process.kill()
        lorafast.recover(made / "out")
        # The first was another one.
        assert whole(made / "out") in models or number == 0
        # What was killed is carried out by the same call.
        again(made)
        assert whole(made / "out") == models[number % 2]


def whole(directory: Path) -> dict[str, bytes]:
    """The files of a model, but for those that tell of the merge."""
    own = {"merge_report.json", "merge_report.md"}
    return {path.name: path.read_bytes() for path in directory.iterdir() if path.name not in own}
