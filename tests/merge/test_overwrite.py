"""What an output may be, what of it a new model replaces, and what a cut-off commit leaves."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
from pathlib import Path

import lorafast
import pytest
from support.files import read_checkpoint, snapshot
from support.handmade import make_adapter, make_base

MANIFEST = "lorafast_manifest.json"


@pytest.fixture
def base(tmp_path: Path) -> Path:
    return make_base(tmp_path / "base")


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    return make_adapter(tmp_path / "adapter")


def names(directory: Path) -> set[str]:
    return {str(path.relative_to(directory)) for path in directory.rglob("*") if path.is_file()}


def test_overwriting_a_folder_of_adapters_keeps_every_one(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "loras"
    output.mkdir()
    for name in ("style.safetensors", "facts.safetensors", "old.bin"):
        shutil.copy(adapter / "adapter_model.safetensors", output / name)
    before = snapshot(output)
    report = lorafast.merge(base, adapter, output, overwrite=True)
    assert snapshot(output).items() >= before.items()
    assert sum("no part of the model" in warning for warning in report.warnings) == 3


def test_a_base_of_links_into_the_output_is_not_overwritten(tmp_path: Path, adapter: Path) -> None:
    output = make_base(tmp_path / "out", shards=2)
    base = tmp_path / "base"
    base.mkdir()
    for file in output.iterdir():
        (base / file.name).symlink_to(file)
    before = snapshot(tmp_path)
    with pytest.raises(lorafast.OutputError, match="is a file of the base"):
        lorafast.merge(base, adapter, output, overwrite=True)
    assert snapshot(tmp_path) == before


def test_the_model_that_subtract_proves_is_not_overwritten_by_links(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    merged, links = tmp_path / "merged", tmp_path / "links"
    lorafast.merge(base, adapter, merged)
    links.mkdir()
    for file in merged.iterdir():
        (links / file.name).symlink_to(file)
    before = snapshot(tmp_path)
    with pytest.raises(lorafast.OutputError, match="is a file of the merged model"):
        lorafast.subtract(links, adapter, merged, original=base, overwrite=True)
    assert snapshot(tmp_path) == before


def test_files_of_the_older_model_do_not_stay_beside_the_new_one(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    rich = make_base(tmp_path / "rich", shards=3)
    for name in ("chat_template.jinja", "modeling_own.py", "1_Pooling/config.json"):
        (rich / name).parent.mkdir(exist_ok=True)
        (rich / name).write_text("{}")
    lorafast.merge(rich, adapter, output)
    (output / "special_tokens_map.json").write_text("{}")
    (output / "notes.txt").write_text("mine")
    assert "1_Pooling/config.json" in names(output)
    report = lorafast.merge(base, adapter, output, overwrite=True, report=False)
    assert names(output) == names(base) | {"notes.txt", MANIFEST}
    assert not report.warnings


def test_an_adapter_in_the_output_is_neither_deleted_nor_left_beside_a_model(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    other = make_adapter(tmp_path / "other")
    before = snapshot(tmp_path)
    with pytest.raises(lorafast.OutputError, match=r"holds an adapter \(adapter_config.json\)"):
        lorafast.merge(base, adapter, other, overwrite=True)
    assert snapshot(tmp_path) == before


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json"])
def test_a_directory_in_the_place_of_a_file_is_told_before_anything_is_done(
    tmp_path: Path, base: Path, adapter: Path, name: str
) -> None:
    output = tmp_path / "out"
    lorafast.merge(base, adapter, output)
    (output / name).unlink(missing_ok=True)
    (output / name).mkdir()
    (base / name).touch() if not (base / name).exists() else None
    before = snapshot(tmp_path)
    with pytest.raises(lorafast.OutputError, match="is a directory where the model has a file"):
        lorafast.merge(base, adapter, output, overwrite=True)
    assert snapshot(tmp_path) == before


def test_the_manifest_says_what_a_copy_lacks(tmp_path: Path, base: Path, adapter: Path) -> None:
    output = tmp_path / "out"
    lorafast.merge(base, adapter, output, report=False)
    listed = json.loads((output / MANIFEST).read_text())["files"]
    assert {entry["name"] for entry in listed} == names(base)
    assert all((output / entry["name"]).stat().st_size == entry["bytes"] for entry in listed)
    assert not lorafast.inspect(output)["warnings"]
    (output / "tokenizer.json").unlink()
    (warning,) = lorafast.inspect(output)["warnings"]
    assert "tokenizer.json" in warning
    assert "cut off" in warning


def test_one_shard_of_three_is_no_model(tmp_path: Path, adapter: Path) -> None:
    base = make_base(tmp_path / "base", shards=3)
    index = base / "model.safetensors.index.json"
    whole = json.loads(index.read_text())
    (first, *rest) = sorted(base.glob("*.safetensors"))
    partial = {n: s for n, s in whole["weight_map"].items() if s != rest[-1].name}
    index.write_text(json.dumps({"weight_map": partial}))
    rest[-1].unlink()
    with pytest.raises(lorafast.CheckpointError, match="names 2 of the 3 shards"):
        lorafast.plan(base, adapter)
    index.unlink()
    for shard in rest[:-1]:
        shard.unlink()
    with pytest.raises(lorafast.CheckpointError, match=f"{first.name}, one shard of 3"):
        lorafast.plan(base, adapter)


@pytest.mark.parametrize(
    "name", ["config.json", "tokenizer.json", "notes.txt", "model.safetensors"]
)
def test_a_link_that_leads_nowhere_is_no_absence(
    tmp_path: Path, base: Path, adapter: Path, name: str
) -> None:
    (base / name).unlink(missing_ok=True)
    (base / name).symlink_to("blobs/lost")
    with pytest.raises((lorafast.CheckpointError, FileNotFoundError), match=name):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_what_does_not_belong_to_the_model_is_left_out_and_said(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    secret = tmp_path / "secret.txt"
    secret.write_text("secret")
    left_out = {
        ".env": "KEY=1",
        ".ssh/id_rsa": "key",
        "checkpoint-500/trainer_state.json": "{}",
        "checkpoint-500/model.safetensors": "x",
        "loras/adapter_config.json": "{}",
        "trainer_state.json": "{}",
        "training.log": "x",
        "pytorch_model.bin": "x",
        "runs.parquet": "x",
    }
    carried = {
        "LICENSE": "x",
        "README.md": "x",
        "modules.json": '[{"path": ""}, {"path": "2_Dense"}]',
        "2_Dense/model.safetensors": "x",
        "2_Dense/config.json": "{}",
        "templates/tool.jinja": "x",
    }
    for name, content in (left_out | carried).items():
        (base / name).parent.mkdir(exist_ok=True)
        (base / name).write_text(content)
    (base / "link.txt").symlink_to(secret)
    (base / "folder").symlink_to(tmp_path)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    written = names(tmp_path / "out")
    assert written >= carried.keys()
    assert not written & {*left_out, "link.txt"}
    said = {name.split("/")[0] for name in [*left_out, "link.txt", "folder"]}
    assert {name.rstrip("/") for name in report.left_out} == said
    assert "`checkpoint-500/`" in report.to_markdown()


def test_a_file_of_the_model_that_links_out_of_it_is_refused(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    shutil.move(base / "tokenizer.json", tmp_path / "elsewhere.json")
    (base / "tokenizer.json").symlink_to(tmp_path / "elsewhere.json")
    with pytest.raises(lorafast.CheckpointError, match=r"tokenizer.json: is a link out of"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_pipes_and_sockets_are_never_opened(tmp_path: Path, base: Path, adapter: Path) -> None:
    os.mkfifo(base / "notes.txt")
    with socket.socket(socket.AF_UNIX) as listener:
        listener.bind(str(base / "sock.json"))
        report = lorafast.merge(base, adapter, tmp_path / "out")
    assert report.left_out == ["notes.txt", "sock.json"]
    for name in ("tokenizer.json", "config.json", "model.safetensors"):
        other = make_base(tmp_path / name)
        (other / name).unlink()
        os.mkfifo(other / name)
        with pytest.raises(lorafast.CheckpointError, match=f"{name}: is a pipe"):
            lorafast.merge(other, adapter, tmp_path / "refused")


@pytest.mark.parametrize("mode", [0o600, 0o640, 0o444])
def test_files_have_the_permissions_of_the_bases(
    tmp_path: Path, base: Path, adapter: Path, mode: int
) -> None:
    for file in base.iterdir():
        file.chmod(mode)
    lorafast.merge(base, adapter, tmp_path / "out", report=False, dtype="float32")
    modes = {p.name: p.stat().st_mode & 0o777 for p in (tmp_path / "out").iterdir()}
    del modes[MANIFEST]
    assert set(modes.values()) == {mode}


def test_a_link_at_the_staging_directory_is_not_followed(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    precious = tmp_path / "precious"
    (precious / "model").mkdir(parents=True)
    (precious / "model" / "thesis.txt").write_text("mine")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / ".lorafast-partial").symlink_to(precious)
    before = snapshot(precious)
    with pytest.raises(lorafast.OutputError, match="is a link where merges are prepared"):
        lorafast.merge(base, adapter, tmp_path / "out")
    assert snapshot(precious) == before


def test_many_shards_open_more_files_than_the_soft_limit(tmp_path: Path) -> None:
    resource = pytest.importorskip("resource")
    if resource.getrlimit(resource.RLIMIT_NOFILE)[1] < 1024:
        pytest.skip("the hard limit of open files is too low")
    modules = {f"model.layers.{n}.mlp.up_proj": (4, 4) for n in range(200)}
    base = make_base(tmp_path / "base", modules=modules, shards=200)
    adapter = make_adapter(tmp_path / "adapter")
    shutil.rmtree(adapter)
    from support.handmade import adapter_tensors

    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(modules))
    code = """
        import resource, sys, lorafast
        hard = resource.getrlimit(resource.RLIMIT_NOFILE)[1]
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, min(hard, 800)))
        base, adapter, output = sys.argv[1:]
        # Base and output, and the output once more to be proved; no fourth file for each shard.
        lorafast.merge(base, adapter, output, verify=True)
        resource.setrlimit(resource.RLIMIT_NOFILE, (256, min(hard, 600)))
        # Base and output, and no third file for each shard.
        plan, parts = lorafast.plan(base, adapter), output + "-parts"
        written = [shard for part in plan.parts() for shard in part.write(parts)]
        plan.assemble(parts, written, output + "-assembled")
    """
    import textwrap

    command = [sys.executable, "-c", textwrap.dedent(code), base, adapter, tmp_path / "out"]
    finished = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert finished.returncode == 0, finished.stderr
    assert read_checkpoint(tmp_path / "out").keys() == read_checkpoint(base).keys()


def test_a_merge_that_is_killed_before_its_report_is_said_to_be_finished(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    code = """
import os, signal, sys, lorafast
lorafast.MergeReport.write = lambda *_: os.kill(os.getpid(), signal.SIGKILL)
lorafast.merge(*sys.argv[1:])
"""
    command = [sys.executable, "-c", code, base, adapter, output]
    assert subprocess.run(command, check=False, timeout=120).returncode == -9
    assert (output / ".lorafast-partial").is_dir()
    assert read_checkpoint(output).keys() == read_checkpoint(base).keys()
    assert lorafast.recover(output) == "finished"
    assert not (output / ".lorafast-partial").exists()
    assert lorafast.recover(output) == "nothing"


def cut_off(output: Path, *, older: bool) -> dict[str, bytes]:
    """Puts an output into the middle of a commit; what the finished one holds."""
    staging = output / ".lorafast-partial"
    model = staging / "model-1"
    model.mkdir(parents=True)
    new = {path.name: path.read_bytes() for path in output.iterdir() if path.is_file()}
    stamps = {name: (output / name).stat() for name in new}
    (staging / "older").mkdir()
    was = []
    if older:
        (staging / "older" / "config.json").write_text('{"older": true}')
        was = ["config.json"]
    (output / "config.json").rename(model / "config.json")
    files = [
        {"name": n, "bytes": s.st_size, "inode": s.st_ino, "modified": s.st_mtime_ns}
        for n, s in stamps.items()
    ]
    journal = {"schema": 1, "model": model.name, "new": files, "older": was}
    (staging / "commit.json").write_text(json.dumps(journal))
    return new


def test_a_model_in_the_middle_of_a_commit_is_refused_and_recovers(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    lorafast.merge(base, adapter, output)
    assert lorafast.recover(output) == "nothing"
    for older in (False, True):
        whole = cut_off(output, older=older)
        with pytest.raises(lorafast.CheckpointError, match="in the middle of being replaced"):
            lorafast.inspect(output)
        with pytest.raises(lorafast.CheckpointError, match="lorafast recover"):
            lorafast.plan(output, adapter)
        assert lorafast.recover(output) == "finished"
        assert {path.name: path.read_bytes() for path in output.iterdir()} == whole
    cut_off(output, older=True)
    (output / ".lorafast-partial" / "model-1" / "config.json").write_text("cut")
    assert lorafast.recover(str(output)) == "taken_back"
    assert (output / "config.json").read_text() == '{"older": true}'
    assert not (output / ".lorafast-partial").exists()
    (output / ".lorafast-partial").mkdir()
    assert lorafast.recover(output) == "cleared"
    with pytest.raises(FileNotFoundError):
        lorafast.recover(tmp_path / "absent")


def test_a_journal_that_leads_out_of_its_directory_is_refused(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    lorafast.merge(base, adapter, output)
    cut_off(output, older=False)
    journal = output / ".lorafast-partial" / "commit.json"
    content = json.loads(journal.read_text())
    content["older"] = ["../base/model.safetensors"]
    journal.write_text(json.dumps(content))
    before = snapshot(base)
    with pytest.raises(lorafast.OutputError, match="leaves its directory"):
        lorafast.recover(output)
    with pytest.raises(lorafast.OutputError, match="leaves its directory"):
        lorafast.merge(base, adapter, output, overwrite=True)
    assert snapshot(base) == before


def test_a_finished_model_that_could_not_be_placed_is_kept(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    output = tmp_path / "out"
    output.mkdir()
    kept = output / ".lorafast-partial" / "kept-1" / "model.safetensors"
    kept.parent.mkdir(parents=True)
    kept.write_text("hours of work")
    assert lorafast.recover(output) == "kept"
    (output / "notes.txt").write_text("mine")
    with pytest.raises(lorafast.OutputError, match="not empty"):
        lorafast.merge(base, adapter, output)
    assert kept.read_text() == "hours of work"
    lorafast.merge(base, adapter, output, overwrite=True)
    assert not kept.exists()


def test_a_folder_that_nobody_may_look_at_is_left_out(
    tmp_path: Path, base: Path, adapter: Path
) -> None:
    (base / "lost+found").mkdir(mode=0o000)
    report = lorafast.merge(base, adapter, tmp_path / "out")
    # Root may look, and finds nothing that is no part of a model.
    assert report.left_out == ([] if os.geteuid() == 0 else ["lost+found/"])


def test_the_command_says_what_is_left_out(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafast._cli.main import main

    (base / "weights.gguf").write_text("x")
    words = ["merge", "--base", base, "--adapters", adapter, "--output", tmp_path / "out"]
    assert main([*map(str, words)]) == 0
    assert "weights.gguf" in capsys.readouterr().out


def test_the_command_recovers(
    tmp_path: Path, base: Path, adapter: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafast._cli.main import main

    output = tmp_path / "out"
    lorafast.merge(base, adapter, output)
    cut_off(output, older=False)
    assert main(["recover", str(output)]) == 0
    assert "the model is whole" in capsys.readouterr().out
    assert main(["recover", str(output), "--json"]) == 0
    assert json.loads(capsys.readouterr().out) == {"output": str(output), "done": "nothing"}
