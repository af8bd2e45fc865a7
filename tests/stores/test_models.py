"""Models and adapters of other shapes than the usual, in stores: the same as from directories."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import lorafast
import pytest
from support.files import tensor
from support.handmade import MODULES, adapter_tensors, make_adapter, make_base
from support.object_stores import Bucket
from support.pipelines import CLIP_L, UNET, make_pipeline, prefixed
from support.range_server import serving
from support.store_models import files_of, without_reports


def long_header(root: Path) -> Path:
    """More tensors than the first request of a header brings."""
    others = {f"model.odd.{number}.buffer": tensor([1.0, 2.0]) for number in range(2500)}
    base = make_base(root / "base", others=others)
    file = base / "model.safetensors"
    assert int.from_bytes(file.read_bytes()[:8], "little") > 128 << 10
    return base


def with_folders(root: Path) -> Path:
    """Files in folders, of the model and not."""
    base = make_base(root / "base")
    for name in ("code/modeling.py", "original/params.json", ".cache/x.json", "other/config.json"):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text("{}")
    (base / "other" / "model.safetensors").write_bytes(b"of another model")
    (base / "LICENSE").write_text("free")
    return base


def plain(root: Path) -> Path:
    return make_adapter(root / "adapter")


def dora(root: Path) -> Path:
    tensors = adapter_tensors()
    for module, (rows, _) in MODULES.items():
        name = f"base_model.model.{module}.lora_magnitude_vector"
        tensors[name] = tensor([1.0] * rows)
    return make_adapter(root / "adapter", tensors, use_dora=True)


def pickled(root: Path) -> Path:
    torch = pytest.importorskip("torch")
    from safetensors.torch import load_file

    adapter = plain(root)
    file = adapter / "adapter_model.safetensors"
    torch.save(load_file(file), adapter / "adapter_model.bin")
    file.unlink()
    return adapter


def of_pipeline(root: Path) -> Path:
    modules = prefixed("unet.", UNET) | prefixed("text_encoder.", CLIP_L)
    return make_adapter(root / "adapter", adapter_tensors(modules))


CASES: dict[str, tuple[Callable[[Path], Path], Callable[[Path], Path]]] = {
    "long header": (long_header, plain),
    "folders": (with_folders, plain),
    "dora": (lambda root: make_base(root / "base", shards=2), dora),
    "pickled": (lambda root: make_base(root / "base"), pickled),
    "pipeline": (lambda root: make_pipeline(root / "base"), of_pipeline),
}


@pytest.mark.parametrize("case", CASES)
def test_a_store_is_as_good_as_a_directory(case: str, bucket: Bucket, tmp_path: Path) -> None:
    make, adapt = CASES[case]
    base, adapter = make(tmp_path), adapt(tmp_path)
    local = lorafast.merge(base, adapter, tmp_path / "local")
    options = bucket.options()
    sources = bucket.upload(base, "base"), bucket.upload(adapter, "adapter")
    output = f"s3://{bucket.name}/out"
    remote = lorafast.merge(*sources, output, verify=True, storage_options=options)
    assert without_reports(bucket.download("out")) == files_of(tmp_path / "local")
    assert remote.left_out == local.left_out
    assert remote.side_files == local.side_files
    assert remote.adapters == [sources[1]]
    assert lorafast.inspect(sources[1], storage_options=options).kind == "adapter"


@pytest.mark.parametrize("case", ["long header", "dora"])
def test_a_web_server_is_as_good_too(case: str, tmp_path: Path) -> None:
    make, adapt = CASES[case]
    base, adapter = make(tmp_path), adapt(tmp_path)
    lorafast.merge(base, adapter, tmp_path / "local")
    with serving(tmp_path) as server:
        lorafast.merge(f"{server.url}/base", f"{server.url}/adapter", tmp_path / "out")
        shards = [path.name for path in base.glob("*.safetensors")]
        for shard in shards:
            assert set(server.bytes_of(f"base/{shard}")) == {1}
            header = 8 + int.from_bytes((base / shard).read_bytes()[:8], "little")
            gets = [each for each in server.asked if each[:2] == ("GET", f"/base/{shard}")]
            assert len([each for each in gets if each.range and each.range[0] < header]) <= 2
    assert files_of(tmp_path / "out") == files_of(tmp_path / "local")


def test_a_device_writes_to_a_store(bucket: Bucket, tmp_path: Path) -> None:
    pytest.importorskip("torch")
    base, adapter = make_base(tmp_path / "base", shards=2), plain(tmp_path)
    lorafast.merge(base, adapter, tmp_path / "local", device="torch:cpu")
    lorafast.merge(
        bucket.upload(base, "base"), adapter, f"s3://{bucket.name}/out",
        device="torch:cpu", verify=True, storage_options=bucket.options(),
    )  # fmt: skip
    assert without_reports(bucket.download("out")) == files_of(tmp_path / "local")
