"""Scanning fleets in which something is wrong: it is told, and the others are read."""

from __future__ import annotations

import json
import subprocess
import sys
import threading
from pathlib import Path
from tempfile import TemporaryDirectory

import lorafast
import pytest
from support.fleets import make_fleet
from support.handmade import adapter_tensors, make_adapter, make_base


def test_broken_adapters_are_records_and_the_others_are_read(tmp_path: Path) -> None:
    good = make_adapter(tmp_path / "good")
    weights = (good / "adapter_model.safetensors").read_bytes()
    short = make_adapter(tmp_path / "short")
    (short / "adapter_model.safetensors").write_bytes(weights[:-10])
    long = make_adapter(tmp_path / "long")
    (long / "adapter_model.safetensors").write_bytes(weights + b"\0" * 10)
    make_adapter(tmp_path / "other", peft_type="OFT")
    make_adapter(tmp_path / "json", config="{")
    bare = make_adapter(tmp_path / "bare")
    (bare / "adapter_config.json").unlink()
    (make_adapter(tmp_path / "empty") / "adapter_model.safetensors").unlink()
    pickle = make_adapter(tmp_path / "pickle")
    (pickle / "adapter_model.safetensors").unlink()
    (pickle / "adapter_model.bin").write_bytes(b"no pickle")
    lost = make_adapter(tmp_path / "lost")
    (lost / "adapter_model.safetensors").unlink()
    (lost / "adapter_model.safetensors").symlink_to("gone")
    fleet = lorafast.scan([tmp_path, tmp_path / "nowhere"])
    assert fleet.names == ["good"]
    reasons = {error.path.name: error.reason for error in fleet.errors}
    assert reasons.keys() == {
        *("short", "long", "other", "json", "bare", "empty", "pickle", "lost", "nowhere")
    }
    assert reasons["short"].startswith("adapter_model.safetensors: is truncated")
    assert "10 bytes after its last tensor" in reasons["long"]
    assert "OFT" in reasons["other"]
    assert "adapter_config.json" in reasons["json"]
    assert reasons["bare"].startswith("holds no adapter_config.json")
    assert "no adapter_model.safetensors" in reasons["empty"]
    assert "adapter_model.bin: is a text, no weights" in reasons["pickle"]
    assert reasons["nowhere"] == "No such file or directory"


SCAN_AS_SOMEBODY = """
import json, os, sys
import lorafast
if os.geteuid() == 0:
    # What is imported on first use may lie where only root can read.
    lorafast.scan(sys.argv[1] + "/good")
    # Root may read everything, and tests often run as root.
    os.setgroups([])
    os.setegid(65534)
    os.seteuid(65534)
fleet = lorafast.scan(sys.argv[1])
print(json.dumps([fleet.names, [[error.path.name, error.reason] for error in fleet.errors]]))
"""


def test_unreadable_files_and_directories_are_records() -> None:
    # Not in pytest's own directory, which is closed to others.
    with TemporaryDirectory() as name:
        root = Path(name)
        root.chmod(0o755)
        make_adapter(root / "good")
        (make_adapter(root / "closed") / "adapter_model.safetensors").chmod(0)
        (make_adapter(root / "secret") / "adapter_config.json").chmod(0)
        make_adapter(root / "locked" / "inside")
        (root / "locked").chmod(0)
        try:
            run = subprocess.run(
                [sys.executable, "-c", SCAN_AS_SOMEBODY, name], capture_output=True, check=False
            )
        finally:
            (root / "locked").chmod(0o755)
    assert run.returncode == 0, run.stderr.decode()
    names, errors = json.loads(run.stdout)
    assert names == ["good"]
    assert dict(errors) == {
        "locked": "Permission denied",
        "closed": "adapter_model.safetensors: Permission denied",
        "secret": "adapter_config.json: Permission denied",
    }


def test_nothing_to_scan_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(lorafast.AdapterError, match="no adapter was found"):
        lorafast.scan(tmp_path)
    make_base(tmp_path / "base")
    with pytest.raises(lorafast.AdapterError, match="no adapter was found"):
        lorafast.scan(tmp_path)
    with pytest.raises(FileNotFoundError):
        lorafast.scan(tmp_path / "nowhere")
    with pytest.raises(ValueError, match="no path"):
        lorafast.scan([])
    with pytest.raises(ValueError, match="metrics must be one of"):
        lorafast.scan(tmp_path, metrics="most")  # type: ignore[arg-type]  # wrong on purpose
    with pytest.raises(ValueError, match="threads"):
        lorafast.scan(tmp_path, threads=0)


def test_a_fleet_without_a_sound_adapter_has_empty_tables(tmp_path: Path) -> None:
    make_adapter(tmp_path / "other", peft_type="OFT")
    fleet = lorafast.scan(tmp_path)
    assert len(fleet) == 0
    assert len(fleet.errors) == 1
    assert fleet.modules["singular_values"].tolist() == []
    assert fleet.adapters["path"].tolist() == []
    assert fleet.to_pandas("modules").shape[0] == 0


def test_links_in_a_loop_end(tmp_path: Path) -> None:
    make_adapter(tmp_path / "run" / "a")
    (tmp_path / "run" / "again").symlink_to(tmp_path)
    assert len(lorafast.scan(tmp_path)) == 1


def test_files_that_change_while_they_are_read_never_end_the_scan(tmp_path: Path) -> None:
    modules = {f"model.layers.{i}.q_proj": (512, 512) for i in range(20)}
    path = make_adapter(tmp_path / "training", adapter_tensors(modules, rank=16), r=16)
    make_adapter(tmp_path / "still")
    weights = path / "adapter_model.safetensors"
    whole = weights.read_bytes()
    done = threading.Event()

    def write() -> None:
        while not done.is_set():
            for size in (len(whole) // 2, 100, 0, len(whole), len(whole) + 4096):
                with weights.open("r+b") as file:
                    file.truncate(size)
                    if size == len(whole):
                        file.seek(0)
                        file.write(whole)

    writer = threading.Thread(target=write)
    writer.start()
    try:
        fleets = [lorafast.scan(tmp_path, threads=2) for _ in range(60)]
    finally:
        done.set()
        writer.join()
    for fleet in fleets:
        assert "still" in fleet.names
        assert len(fleet) + len(fleet.errors) == 2


def test_an_exception_of_the_progress_ends_the_scan(tmp_path: Path) -> None:
    make_fleet(tmp_path)

    def refuse(done: int, total: int) -> None:
        raise RuntimeError("enough")

    with pytest.raises(RuntimeError, match="enough"):
        lorafast.scan(tmp_path, progress=refuse)
