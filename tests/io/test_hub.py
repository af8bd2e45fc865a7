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
from support.gguf_files import LLAMA, factors, llama_base, peft
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
    assert fetched == everything - {*others}


def test_a_path_wins_over_an_id(
    tmp_path: Path, hub: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    make_base(tmp_path / "work" / "owner" / "base")
    monkeypatch.chdir(tmp_path / "work")
    assert lorafast.inspect("owner/base")["path"] == "owner/base"
    assert not hub


@pytest.mark.parametrize(
    "name", ["./owner/base", "/absent", "a/b/../c", "a/b@", "a--b/c", "spaces in it"]
)
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


def gguf_repository(monkeypatch: pytest.MonkeyPatch, repository: Path, cache: Path) -> list[str]:
    """A hub whose one repository is this directory; what was fetched of it, and what was asked."""
    fetched: list[str] = []

    def snapshot_download(name: str, *, allow_patterns: list[str], local_files_only: bool) -> str:
        assert name == "owner/gguf"
        cache.mkdir(exist_ok=True)
        for path in repository.iterdir():
            if not local_files_only and any(fnmatch(path.name, p) for p in allow_patterns):
                shutil.copy(path, cache / path.name)
                fetched.append(path.name)
        return str(cache)

    def list_repo_files(name: str) -> list[str]:
        assert name == "owner/gguf"
        return [path.name for path in repository.iterdir()]

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    monkeypatch.setattr(huggingface_hub, "list_repo_files", list_repo_files)
    return fetched


def test_a_gguf_adapter_is_fetched_where_there_is_no_other(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    base = llama_base(tmp_path / "base")
    adapter = peft(tmp_path / "adapter", factors(LLAMA), "F32")
    lorafast.convert(adapter, repository / "lora-f32.gguf", to="gguf", base=base)
    (repository / "README.md").write_text("x")
    fetched = gguf_repository(monkeypatch, repository, tmp_path / "cache")
    lorafast.merge(base, "owner/gguf", tmp_path / "out")
    assert fetched == ["lora-f32.gguf"]
    lorafast.merge(base, repository / "lora-f32.gguf", tmp_path / "expected")
    for path in (tmp_path / "expected").glob("*.safetensors"):
        assert (tmp_path / "out" / path.name).read_bytes() == path.read_bytes()
    # What is in the cache is found without the hub.
    monkeypatch.setattr(huggingface_hub, "list_repo_files", None)
    from lorafast._io.sources import ADAPTER_PATTERNS, locate

    again = locate("owner/gguf", ADAPTER_PATTERNS, local_files_only=True)
    assert again == tmp_path / "cache" / "lora-f32.gguf"
    # Beside an adapter of PEFT's nobody asks for more.
    shutil.copytree(adapter, repository, dirs_exist_ok=True)
    fetched.clear()
    lorafast.analyze("owner/gguf")
    assert "lora-f32.gguf" not in fetched


def test_of_several_gguf_files_none_is_chosen(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    repository = tmp_path / "repository"
    repository.mkdir()
    for name in ("lora-f16.gguf", "lora-f32.gguf"):
        (repository / name).write_bytes(b"GGUF")
    fetched = gguf_repository(monkeypatch, repository, tmp_path / "cache")
    with pytest.raises(lorafast.LorafastError, match=r"owner/gguf: has 2 files .*lora-f16\.gguf"):
        lorafast.analyze("owner/gguf")
    assert fetched == []
