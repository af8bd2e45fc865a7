"""Files that others truncate, replace or rewrite while they are read.

The change is made from within the job, by its progress callback, once its files are open. What
comes of it is the one error, or the result of one state of the files; never a signal, and never
figures of half of one state and half of another.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.handmade import adapter_config, adapter_tensors, make_adapter, make_base

CHANGED = "changed while it was read; run again when it is complete"
# As much work as takes several steps of the progress, on one thread.
MODULES = {f"model.layers.{layer}.self_attn.q_proj": (640, 640) for layer in range(12)}
RANK = 160


def truncate(path: Path) -> None:
    """What saving again begins with."""
    os.truncate(path, 4096)


def replace(path: Path) -> None:
    """Another file comes to the name, as careful programs save."""
    new = path.with_suffix(".new")
    new.write_bytes(flipped(path))
    new.replace(path)


def rewrite(path: Path) -> None:
    """Other numbers in the same file, of the same size."""
    content = flipped(path)
    with path.open("r+b") as file:
        file.write(content)


def flipped(path: Path) -> bytes:
    """The file with other signs in the last three quarters of its data, all of it float32."""
    content = np.frombuffer(path.read_bytes(), np.uint8).copy()
    values = content[len(content) % 4 :].view("<u4")
    values[len(values) // 4 :] ^= np.uint32(1 << 31)
    return content.tobytes()


WAYS: dict[str, Callable[[Path], None]] = {
    "truncated": truncate,
    "replaced": replace,
    "rewritten": rewrite,
}


def digest(directory: Path) -> str:
    return hashlib.sha256((directory / "model.safetensors").read_bytes()).hexdigest()


def merge(folder: Path, progress: Any) -> Any:
    lorafast.merge(
        folder / "base", folder / "a", folder / "out", threads=1, progress=progress, report=False
    )
    return digest(folder / "out")


def verify(folder: Path, progress: Any) -> Any:
    return lorafast.verify(
        folder / "base", folder / "a", folder / "merged", threads=1, progress=progress
    ).to_dict()


def subtract(folder: Path, progress: Any) -> Any:
    report = lorafast.subtract(
        folder / "merged", folder / "a", folder / "out", threads=1, progress=progress, report=False
    )
    if report.bound is None:
        # It is found when the output is finished, and what fails then is a warning.
        assert any(CHANGED in warning for warning in report.warnings)
    return digest(folder / "out"), report.bound


def analyze(folder: Path, progress: Any) -> Any:
    analysis = lorafast.analyze(folder / "a", base=folder / "base", threads=1, progress=progress)
    return analysis.to_json()


def compare(folder: Path, progress: Any) -> Any:
    return lorafast.compare([folder / "a", folder / "b"], threads=1, progress=progress).to_json()


def scan(folder: Path, progress: Any) -> Any:
    fleet = lorafast.scan([folder / "a", folder / "b"], threads=1, progress=progress)
    if fleet.errors:
        raise lorafast.AdapterError(fleet.errors[0].reason)
    return [fleet.modules["frobenius_norm"], fleet.adapters["sha256"], fleet.adapters["l2_norm"]]


def similarity(folder: Path, progress: Any) -> Any:
    found = lorafast.similarity([folder / "a", folder / "b"], threads=1, progress=progress)
    if found.errors:
        raise lorafast.AdapterError(found.errors[0].reason)
    return found.matrix


Work = Callable[[Path, Any], Any]
CASES: list[tuple[Work, str]] = [
    (merge, "a/adapter_model.safetensors"),
    (merge, "base/model.safetensors"),
    (verify, "a/adapter_model.safetensors"),
    (verify, "base/model.safetensors"),
    (verify, "merged/model.safetensors"),
    (subtract, "a/adapter_model.safetensors"),
    (subtract, "merged/model.safetensors"),
    (analyze, "a/adapter_model.safetensors"),
    (analyze, "base/model.safetensors"),
    (compare, "a/adapter_model.safetensors"),
    (scan, "a/adapter_model.safetensors"),
    (similarity, "a/adapter_model.safetensors"),
]


@pytest.fixture(scope="module")
def originals(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("originals")
    make_base(folder / "base", modules=MODULES)
    for seed, name in enumerate("ab"):
        tensors = adapter_tensors(MODULES, rank=RANK, seed=seed)
        config = adapter_config(r=RANK, target_modules=["q_proj"])
        make_adapter(folder / name, tensors, config=config)
    lorafast.merge(folder / "base", folder / "a", folder / "merged", report=False)
    # The time of a change is counted in ticks of the clock, and the next change is to be another.
    time.sleep(0.05)
    return folder


@pytest.fixture(scope="module")
def undisturbed(originals: Path) -> Callable[[Work], Any]:
    """What a job finds while nobody changes anything."""
    found: dict[str, Any] = {}

    def result(work: Work) -> Any:
        if work.__name__ not in found:
            found[work.__name__] = work(originals, False)
            shutil.rmtree(originals / "out", ignore_errors=True)
        return found[work.__name__]

    return result


def attempt(work: Work, folder: Path, progress: Any) -> Any:
    """The result, or the error."""
    try:
        return work(folder, progress)
    except (lorafast.AdapterError, lorafast.CheckpointError) as error:
        return error


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "case", CASES, ids=[f"{work.__name__}-{file.split('/')[0]}" for work, file in CASES]
)
def test_a_file_that_changes_meanwhile_is_an_error_or_of_one_state(
    originals: Path,
    undisturbed: Callable[[Work], Any],
    tmp_path: Path,
    case: tuple[Work, str],
    way: str,
) -> None:
    work, file = case
    folder = tmp_path / "files"
    shutil.copytree(originals, folder)
    changed = False

    def change(done: int, total: int) -> None:
        nonlocal changed
        if done < total and not changed:
            changed = True
            WAYS[way](folder / file)

    found = attempt(work, folder, change)
    if isinstance(found, Exception):
        assert CHANGED in str(found)
        assert Path(file).name in str(found)
        assert isinstance(found, lorafast.AdapterError) == file.startswith("a/")
        assert not (folder / "out").exists()
        return
    # It was done before it was changed, or it has read what was opened to its end.
    expected = undisturbed(work)
    if isinstance(expected, np.ndarray):
        assert np.array_equal(found, expected)
    elif work is subtract and found[1] is None:
        assert found[0] == expected[0]
    else:
        assert str(found).replace(str(folder), "") == str(expected).replace(str(originals), "")


def test_an_adapter_that_is_saved_again_after_the_plan_is_an_error(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    for name in ["adapter_model.safetensors", "adapter_config.json"]:
        plan = lorafast.plan(base, adapter)
        file = adapter / name
        content = file.read_bytes()
        time.sleep(0.02)
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        with pytest.raises(lorafast.AdapterError, match=f"{name}: {CHANGED}"):
            plan.execute(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        file.write_bytes(content)


def test_a_shard_that_is_truncated_after_the_plan_is_an_error_of_the_base(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base", shards=2), make_adapter(tmp_path / "a")
    for shard in sorted(base.glob("*.safetensors")):
        plan = lorafast.plan(base, adapter)
        content = shard.read_bytes()
        os.truncate(shard, len(content) // 2)
        with pytest.raises(lorafast.CheckpointError, match=f"{shard.name}: {CHANGED}"):
            plan.execute(tmp_path / "out")
        assert not (tmp_path / "out").exists()
        shard.write_bytes(content)


@pytest.mark.skipif(os.name == "nt", reason="there are no pipes among files")
def test_what_is_no_plain_file_is_not_read_and_says_what_it_is(tmp_path: Path) -> None:
    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "a")
    weights, config = adapter / "adapter_model.safetensors", adapter / "adapter_config.json"
    for file in [weights, config]:
        content = file.read_bytes()
        file.unlink()
        os.mkfifo(file)
        with pytest.raises(lorafast.AdapterError, match=f"{file.name}: is a pipe; a plain file"):
            lorafast.plan(base, adapter)
        file.unlink()
        file.symlink_to("gone")
        with pytest.raises(lorafast.AdapterError, match=f"{file.name}: is a link to gone, which"):
            lorafast.plan(base, adapter)
        file.unlink()
        file.write_bytes(content)
    model = base / "model.safetensors"
    model.unlink()
    os.mkfifo(model)
    with pytest.raises(lorafast.CheckpointError, match=r"model\.safetensors: is a pipe"):
        lorafast.merge(base, adapter, tmp_path / "out")


def test_the_command_compares_what_it_has_analyzed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafast._analysis import api as analysis_api
    from lorafast._cli.main import main

    first, second = make_adapter(tmp_path / "a"), make_adapter(tmp_path / "b")
    original = analysis_api.compare_analyzed

    def change(*arguments: Any, **options: Any) -> Any:
        file = first / "adapter_model.safetensors"
        content = file.read_bytes()
        file.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
        return original(*arguments, **options)

    monkeypatch.setattr(analysis_api, "compare_analyzed", change)
    assert main(["compare", str(first), str(second), "--quiet"]) == 1
    assert CHANGED in capsys.readouterr().err
