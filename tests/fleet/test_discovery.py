"""Finding adapters in directories, globs and lists."""

from __future__ import annotations

import os
from pathlib import Path

import lorafast
import pytest
from lorafast._fleet.discovery import ScanError, discover
from support.files import tensor, write_safetensors
from support.handmade import make_adapter, make_base


def names(root: Path, adapters: list[str]) -> list[str]:
    return [Path(adapter).relative_to(root).as_posix() for adapter in adapters]


def test_directories_are_searched_and_sorted_as_a_reader_would(tmp_path: Path) -> None:
    for name in ("run/checkpoint-1000", "run/checkpoint-500", "alone", "run/checkpoint-500/sub"):
        make_adapter(tmp_path / name)
    make_adapter(tmp_path / ".trash" / "old")
    make_base(tmp_path / "base")
    found = discover(tmp_path)
    assert names(tmp_path, found.adapters) == [
        "alone",
        "run/checkpoint-500",
        "run/checkpoint-500/sub",
        "run/checkpoint-1000",
    ]
    assert found.errors == []


def test_globs_lists_and_files_name_each_adapter_once(tmp_path: Path) -> None:
    for name in ("b", "a/final", "c/final"):
        make_adapter(tmp_path / name)
    found = discover(
        [
            tmp_path / "c/final/adapter_model.safetensors",
            f"{tmp_path}/*/final",
            str(tmp_path),
            tmp_path / "b",
        ]
    )
    assert names(tmp_path, found.adapters) == ["c/final", "a/final", "b"]
    assert names(tmp_path, discover(f"{tmp_path}/**/*.safetensors").adapters) == [
        "a/final",
        "b",
        "c/final",
    ]


def test_a_path_with_the_characters_of_a_glob_is_a_path(tmp_path: Path) -> None:
    make_adapter(tmp_path / "run[1]")
    make_adapter(tmp_path / "run1")
    assert names(tmp_path, discover(tmp_path / "run[1]").adapters) == ["run[1]"]


def test_links_in_a_loop_end_and_what_is_reached_twice_is_found_once(tmp_path: Path) -> None:
    make_adapter(tmp_path / "z" / "real")
    (tmp_path / "a").symlink_to(tmp_path / "z")
    (tmp_path / "z" / "up").symlink_to(tmp_path, target_is_directory=True)
    (tmp_path / "z" / "itself").symlink_to("itself")
    found = discover(tmp_path)
    assert names(tmp_path, found.adapters) == ["z/real"]
    assert found.errors == []


def test_broken_adapters_are_found_and_weights_without_a_config_too(tmp_path: Path) -> None:
    (tmp_path / "only_config").mkdir()
    (tmp_path / "only_config" / "adapter_config.json").write_text("{}")
    (tmp_path / "only_weights").mkdir()
    (tmp_path / "only_weights" / "adapter_model.safetensors").write_bytes(b"")
    (tmp_path / "kohya").mkdir()
    factor = {"lora_unet_mid.lora_down.weight": tensor([[1.0]], "F32")}
    write_safetensors(tmp_path / "kohya" / "style.safetensors", factor)
    write_safetensors(tmp_path / "kohya" / "vae.safetensors", {"decoder": tensor([1.0], "F32")})
    (tmp_path / "kohya" / "style.pt").write_bytes(b"pickle")
    (tmp_path / "kohya" / "optimizer.pt").write_bytes(b"state")
    (tmp_path / "kohya" / "lora_broken.safetensors").write_bytes(b"\xff" * 20)
    assert names(tmp_path, discover(tmp_path).adapters) == [
        "kohya/lora_broken.safetensors",
        "kohya/style.pt",
        "kohya/style.safetensors",
        "only_config",
        "only_weights",
    ]


def test_nothing_found_is_told(tmp_path: Path) -> None:
    with pytest.raises(lorafast.AdapterError, match="no adapter was found"):
        discover(tmp_path)
    with pytest.raises(FileNotFoundError, match="nowhere"):
        discover(tmp_path / "nowhere")
    with pytest.raises(FileNotFoundError, match="Nothing matches"):
        discover(f"{tmp_path}/*.safetensors")
    with pytest.raises(ValueError, match="no path"):
        discover([])


def test_a_missing_path_among_others_is_an_error_beside_them(tmp_path: Path) -> None:
    make_adapter(tmp_path / "there")
    found = discover([tmp_path / "there", tmp_path / "gone"])
    assert names(tmp_path, found.adapters) == ["there"]
    assert found.errors == [ScanError(tmp_path / "gone", "No such file or directory")]


def test_an_unreadable_directory_is_an_error_beside_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    make_adapter(tmp_path / "open")
    make_adapter(tmp_path / "closed" / "inside")
    # Root may read everything, and tests often run as root.
    scandir = os.scandir

    def refuse(path: Path) -> object:
        if Path(path).name == "closed":
            raise PermissionError(13, "Permission denied", str(path))
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refuse)
    found = discover(tmp_path)
    assert names(tmp_path, found.adapters) == ["open"]
    assert found.errors == [ScanError(tmp_path / "closed", "Permission denied")]
