"""Bases and adapters named by a hub id go through huggingface_hub, and say so when they cannot."""

from __future__ import annotations

import shutil
import sys
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import huggingface_hub
import lorafast
import pytest
from support.files import tensor, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base
from support.pipelines import UNET, make_pipeline, prefixed


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """A hub with one base and one adapter; records what was asked for."""
    repositories = {
        "owner/base": make_base(tmp_path / "snapshots" / "base", shards=2),
        "adapter": make_adapter(tmp_path / "snapshots" / "adapter"),
    }
    asked: dict[str, Any] = {}

    def snapshot_download(
        repository: str, *, allow_patterns: list[str], local_files_only: bool
    ) -> str:
        asked[repository] = allow_patterns
        return str(repositories[repository])

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return asked


def test_ids_are_fetched(tmp_path: Path, hub: dict[str, Any]) -> None:
    report = lorafast.merge("owner/base", "adapter", tmp_path / "out")
    assert report.tensors_merged > 0
    assert set(hub) == {"owner/base", "adapter"}
    assert "*.safetensors" in hub["owner/base"]
    assert "*.bin" not in hub["owner/base"]
    assert "adapter_config.json" in hub["adapter"]
    assert lorafast.inspect("owner/base")["kind"] == "checkpoint"


def test_of_a_pipeline_only_what_a_merge_reads_is_fetched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = make_pipeline(tmp_path / "repository")
    tensors = {"x": tensor([1.0])}
    others = [
        "sd_xl_base_1.0.safetensors",
        "unet/diffusion_pytorch_model.fp16.safetensors",
        "unet_ema/diffusion_pytorch_model.safetensors",
        "text_encoder/model.onnx.safetensors",
    ]
    for name in others:
        (repository / name).parent.mkdir(exist_ok=True)
        write_safetensors(repository / name, tensors)
    # A component of which there is a variant alone.
    vae = repository / "vae" / "diffusion_pytorch_model.safetensors"
    vae.rename(vae.with_name("diffusion_pytorch_model.fp16.safetensors"))
    cache = tmp_path / "cache"

    def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert name == "owner/pipeline"
        assert not local_files_only
        for path in repository.rglob("*"):
            relative = path.relative_to(repository).as_posix()
            if path.is_file() and any(fnmatch(relative, p) for p in allow_patterns):
                (cache / relative).parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, cache / relative)
        return str(cache)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    adapter = make_adapter(tmp_path / "unet", adapter_tensors(prefixed("unet.", UNET)))
    lorafast.merge("owner/pipeline", adapter, tmp_path / "out", verify=True)
    fetched = {p.relative_to(cache).as_posix() for p in cache.rglob("*") if p.is_file()}
    everything = {
        p.relative_to(repository).as_posix() for p in repository.rglob("*") if p.is_file()
    }
    assert fetched == everything - {*others, "README.md"}


def test_a_path_wins_over_an_id(
    tmp_path: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path / "work" / "owner" / "base")
    monkeypatch.chdir(tmp_path / "work")
    assert lorafast.inspect("owner/base")["path"] == "owner/base"
    assert not hub


@pytest.mark.parametrize("name", ["./owner/base", "/absent", "a/b/c", "spaces in it"])
def test_what_is_no_id_is_not_asked_for(name: str, hub: dict[str, Any]) -> None:
    with pytest.raises(FileNotFoundError) as error:
        lorafast.inspect(name)
    assert error.value.filename == name
    assert not hub


def test_offline_names_the_path(tmp_path: Path) -> None:
    """The real client, which is offline in these tests, with nothing in its cache."""
    with pytest.raises(FileNotFoundError, match="hub cannot be reached") as error:
        lorafast.merge("nobody/nothing-of-that-name", tmp_path, tmp_path / "out")
    assert error.value.filename == "nobody/nothing-of-that-name"


def test_without_the_client(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(lorafast.MissingDependencyError, match=r'pip install "lorafast\[hub\]"'):
        lorafast.inspect("owner/base")
    # A plain name is a mistyped path more often than one of the few ids without an owner.
    with pytest.raises(FileNotFoundError):
        lorafast.inspect("base")
