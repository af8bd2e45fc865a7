"""A merge over an older one in a store computes and sends the shards that would become others."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.fault_proxy import Fault, FaultProxy
from support.files import Tensor, read_safetensors, write_safetensors
from support.handmade import adapter_tensors, make_adapter, make_base
from support.object_stores import Bucket
from support.store_models import files_of, without_reports

LAYERS = 4
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": (24, 24)
    for layer in range(LAYERS)
    for name in ("q_proj", "v_proj")
}


class Merged:
    """A merge in a bucket, and what later ones send to it.

    Attributes:
        shards: the names of all.
    """

    def __init__(self, root: Path, bucket: Bucket, proxy: FaultProxy) -> None:
        self.root, self.bucket, self.proxy = root, bucket, proxy
        self.base = make_base(root / "base", modules=MODULES, shards=LAYERS, dtype="BF16")
        self.adapter = make_adapter(root / "style", adapter_tensors(MODULES))
        self.output = f"s3://{bucket.name}/out"
        self.shards = {path.name for path in self.base.glob("*.safetensors")}
        self.base_url = bucket.upload(self.base, "base")
        self.merge()

    def merge(self, **options: Any) -> lorafast.MergeReport:
        return lorafast.merge(
            *(self.base_url, self.adapter, self.output),
            storage_options=self.bucket.options(self.proxy.url),
            **options,
        )

    def again(
        self, *, resumes: bool = False, **options: Any
    ) -> tuple[lorafast.MergeReport, set[str]]:
        """Merges over the output; the report, and the shards that were sent."""
        self.proxy.requests.clear()
        report = self.merge(overwrite=True, **options)
        sent = self.sent()
        shutil.rmtree(self.root / "fresh", ignore_errors=True)
        told = {key: value for key, value in options.items() if key not in ("verify", "report")}
        fresh = lorafast.merge(self.base, self.adapter, self.root / "fresh", **told)
        assert without_reports(self.bucket.download("out")) == files_of(self.root / "fresh")
        # What it took away in shards of a call that was interrupted is not known any more.
        assert resumes or report.rounding == pytest.approx(fresh.rounding)
        assert self.bucket.keys("out/.lorafast") == []
        return report, sent

    def sent(self) -> set[str]:
        asked = [
            (method, path.partition("?")[0].rpartition("/")[2])
            for method, path in self.proxy.requests
            if "/out/" in path and "/.lorafast/" not in path
        ]
        return {name for method, name in asked if method == "PUT" and name in self.shards}

    def change(self, layer: int) -> set[str]:
        """Changes an adapter's factors of a layer; the shards in which it lies."""
        path = self.adapter / "adapter_model.safetensors"
        found: dict[str, Tensor] = dict(read_safetensors(path))
        other = adapter_tensors(MODULES, seed=9)
        found |= {name: other[name] for name in found if f"layers.{layer}." in name}
        write_safetensors(path, found)
        index = json.loads((self.base / "model.safetensors.index.json").read_text())
        return {shard for name, shard in index["weight_map"].items() if f"layers.{layer}." in name}


@pytest.fixture
def merged(tmp_path: Path, bucket: Bucket, proxy: FaultProxy) -> Merged:
    return Merged(tmp_path, bucket, proxy)


def test_the_same_merge_again_sends_no_shard(merged: Merged) -> None:
    report, sent = merged.again()
    assert sent == set()
    assert f"{LAYERS} of {LAYERS} shards would become the same again" in report.notes[-1]
    assert merged.again(verify=True)[1] == set()


def test_a_changed_adapter_sends_the_shards_of_its_layers(merged: Merged) -> None:
    expected = merged.change(1)
    assert 0 < len(expected) < LAYERS
    assert merged.again(verify=True)[1] == expected
    assert merged.again()[1] == set()
    assert merged.again(weights=[0.5])[1] == merged.shards


def test_a_shard_that_somebody_replaced_is_sent_again(merged: Merged) -> None:
    name = sorted(merged.shards)[0]
    content = merged.bucket.get(f"out/{name}")
    merged.bucket.put(f"out/{name}", content[:-1] + bytes([content[-1] ^ 1]))
    assert merged.again()[1] == {name}
    merged.bucket.delete(f"out/{name}")
    assert merged.again()[1] == {name}
    # A base that changed is another's.
    path = merged.base / name
    path.write_bytes(path.read_bytes()[:-2] + bytes(2))
    merged.bucket.put(f"base/{name}", path.read_bytes())
    assert merged.again()[1] == {name}


def test_without_a_report_nothing_is_known(merged: Merged) -> None:
    assert merged.again(report=False)[1] == merged.shards
    # What the older report tells of is not there any more.
    merged.bucket.delete("out/merge_report.json")
    assert merged.again()[1] == merged.shards
    merged.bucket.put("out/merge_report.json", b'{"recipes": {"a": 1}}')
    assert merged.again()[1] == merged.shards


def test_an_interrupted_merge_over_another_is_completed(merged: Merged) -> None:
    changed = merged.change(0) | merged.change(2)
    last = max(changed).replace(".", r"\.")
    merged.proxy.set(Fault("403", "PUT", rf"/out/{last}(\?|$)"))
    with pytest.raises(lorafast.StoreError, match="s3:PutObject"):
        merged.merge(overwrite=True, threads=1)
    assert merged.proxy.broken > 0
    merged.proxy.set(None)
    assert "out/config.json" not in merged.bucket.keys("out/")
    report, sent = merged.again(resumes=True)
    assert len(sent) == len(changed) - 1
    assert sent < changed
    assert report.recipes is not None
    resumed = changed - sent
    assert set(report.recipes) == merged.shards - resumed
    assert merged.again()[1] == resumed
    assert merged.again()[1] == set()
