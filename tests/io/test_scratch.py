"""Temporary directories do not outlive a crash's next run, and no others are touched."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
from lorafast._io import scratch

fcntl = pytest.importorskip("fcntl")

HOLD = """
import sys, time
from lorafast._io.scratch import Scratch
own = Scratch()
(own.path / "weights").write_bytes(b"0" * 1000)
print(own.path, flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def temporary(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A system's temporary directory of this test's own."""
    folder = tmp_path / "tmp"
    folder.mkdir()
    monkeypatch.setenv("TMPDIR", str(folder))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    return folder


def hold() -> tuple[subprocess.Popen[str], Path]:
    process = subprocess.Popen([sys.executable, "-c", HOLD], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, Path(process.stdout.readline().strip())


def test_it_is_gone_after_use_and_after_an_error(temporary: Path) -> None:
    with scratch.directory() as folder:
        (folder / "weights").write_bytes(b"0")
        assert folder.name.startswith("lorafast-")
    assert list(temporary.iterdir()) == []
    with pytest.raises(RuntimeError, match="enough"), scratch.directory():
        raise RuntimeError("enough")
    assert list(temporary.iterdir()) == []


def test_what_a_killed_process_left_is_removed_by_the_next(temporary: Path) -> None:
    process, left = hold()
    try:
        # As long as it lives, nobody touches it.
        with scratch.directory():
            assert (left / "weights").exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.communicate()
    assert left.exists()
    with scratch.directory() as folder:
        assert list(temporary.iterdir()) == [folder]


def test_what_is_nobodys_or_behind_a_link_stays(temporary: Path, tmp_path: Path) -> None:
    # Of another program, or another version: nothing says that nobody uses it.
    (temporary / "lorafast-demo").mkdir()
    (temporary / "lorafast-demo" / "model").write_text("a person's")
    # A directory that would be swept, behind a link.
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / scratch.LOCK).touch()
    (temporary / f"{scratch.PREFIX}link").symlink_to(outside)
    # A lock that is a link, or a pipe that would keep its opener waiting.
    (temporary / f"{scratch.PREFIX}odd").mkdir()
    (temporary / f"{scratch.PREFIX}odd" / scratch.LOCK).symlink_to(outside / scratch.LOCK)
    (temporary / f"{scratch.PREFIX}pipe").mkdir()
    os.mkfifo(temporary / f"{scratch.PREFIX}pipe" / scratch.LOCK)
    (temporary / f"{scratch.PREFIX}file").write_text("a file")
    before = sorted(temporary.iterdir())
    with scratch.directory():
        pass
    assert sorted(temporary.iterdir()) == before
    assert (outside / scratch.LOCK).exists()


def test_a_link_in_what_was_left_is_removed_and_not_followed(
    temporary: Path, tmp_path: Path
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "file").write_text("a person's")
    left = temporary / f"{scratch.PREFIX}left"
    left.mkdir()
    (left / scratch.LOCK).touch()
    (left / "link").symlink_to(tmp_path / "precious")
    with scratch.directory():
        assert not left.exists()
    assert (tmp_path / "precious" / "file").read_text() == "a person's"


def test_a_forked_child_leaves_it_to_its_parent(temporary: Path) -> None:
    own = scratch.Scratch()
    child = os.fork()
    if child == 0:
        own.remove()
        os._exit(0)
    os.waitpid(child, 0)
    assert own.path.exists()
    own.remove()
    own.remove()
    assert list(temporary.iterdir()) == []


def test_a_merge_of_pickled_weights_leaves_nothing(temporary: Path, tmp_path: Path) -> None:
    torch = pytest.importorskip("torch")
    import lorafast
    from safetensors.torch import load_file
    from support.handmade import make_adapter, make_base

    base, adapter = make_base(tmp_path / "base"), make_adapter(tmp_path / "adapter")
    weights = adapter / "adapter_model.safetensors"
    torch.save(load_file(weights), adapter / "adapter_model.bin")
    weights.unlink()
    lorafast.merge(base, adapter, tmp_path / "out")
    lorafast.inspect(adapter)
    lorafast.analyze(adapter)
    lorafast.scan(adapter)
    assert list(temporary.iterdir()) == []
