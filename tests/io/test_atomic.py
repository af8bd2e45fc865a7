"""Small files are written whole or not at all, and through no link."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path

import pytest
from lorafast._io import atomic


def test_a_file_is_replaced_whole(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old and longer")
    assert atomic.write(target, "new", sync=True) == target
    assert target.read_text() == "new"
    assert list(tmp_path.iterdir()) == [target]


def test_what_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    target = tmp_path / "report.json"
    target.write_text("old")

    def half(error: Exception) -> None:
        with atomic.writing(target) as file:
            file.write(b"half")
            raise error

    with pytest.raises(RuntimeError, match="enough"):
        half(RuntimeError("enough"))
    assert target.read_text() == "old"
    assert list(tmp_path.iterdir()) == [target]


def test_a_link_is_replaced_and_not_followed(tmp_path: Path) -> None:
    other = tmp_path / "others.txt"
    other.write_text("others'")
    (tmp_path / "report.md").symlink_to(other)
    # The name that earlier versions wrote through.
    (tmp_path / ".report.md.partial").symlink_to(other)
    atomic.write(tmp_path / "report.md", "ours")
    assert other.read_text() == "others'"
    assert not (tmp_path / "report.md").is_symlink()
    assert (tmp_path / "report.md").read_text() == "ours"


def test_the_mode_is_what_the_umask_gives(tmp_path: Path) -> None:
    earlier = os.umask(0o027)
    try:
        atomic.write(tmp_path / "file", "text")
    finally:
        os.umask(earlier)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o640


def test_an_error_names_the_file_that_was_asked_for(tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(IsADirectoryError) as raised:
        atomic.write(tmp_path / "folder", "text")
    assert raised.value.filename == str(tmp_path / "folder")
    with pytest.raises(FileNotFoundError) as missing:
        atomic.write(tmp_path / "nowhere" / "file", "text")
    assert missing.value.filename == str(tmp_path / "nowhere" / "file")

    def fill() -> None:
        with atomic.writing(tmp_path / "full") as file:
            file.write(b"some")
            # As a write to a full disk raises it: without a name.
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with pytest.raises(OSError, match="No space left on device") as raised_full:
        fill()
    assert raised_full.value.filename == str(tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["folder"]


def test_names_as_long_as_names_can_be_and_texts_that_are_no_utf8(tmp_path: Path) -> None:
    target = tmp_path / ("n" * 255)
    atomic.write(target, "a\udcff")
    assert target.read_text() == "a\\udcff"
