"""Whatever the network does: the right model or none, and the same call again completes it."""

from __future__ import annotations

from pathlib import Path

import lorafast
import pytest
from support.fault_proxy import Fault, FaultProxy, Kind
from support.object_stores import Bucket
from support.range_server import serving
from support.store_models import Model, files_of, without_reports

INDEX = "model.safetensors.index.json"


@pytest.mark.parametrize("kind", ["503", "429", "reset", "truncate"])
def test_what_passes_is_tried_again(
    kind: Kind, large: Model, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    base = bucket.upload(large.base, "base")
    proxy.set(Fault(kind, "GET", r"safetensors", every=3, most=6))
    lorafast.merge(base, large.adapter, tmp_path / "out", storage_options=bucket.options(proxy.url))
    assert proxy.broken > 0
    assert files_of(tmp_path / "out") == large.merged


@pytest.mark.parametrize("kind", ["503", "reset", "reset_after"])
def test_parts_are_sent_again(kind: Kind, large: Model, bucket: Bucket, proxy: FaultProxy) -> None:
    proxy.set(Fault(kind, "PUT", r"partNumber", every=2, most=4))
    options = bucket.options(proxy.url)
    lorafast.merge(large.base, large.adapter, f"s3://{bucket.name}/out", storage_options=options)
    assert proxy.broken > 0
    assert without_reports(bucket.download("out")) == large.merged
    assert bucket.uploads() == []


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("POST", r"uploadId="),
        ("PUT", r"\.lorafast/claim"),
        ("PUT", r"index\.json"),
        ("PUT", r"/config\.json"),
    ],
    ids=["complete", "claim", "index", "config"],
)
def test_an_answer_that_is_lost_is_no_failure(
    method: str, match: str, large: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    proxy.set(Fault("reset_after", method, match, most=1))
    options = bucket.options(proxy.url)
    lorafast.merge(large.base, large.adapter, f"s3://{bucket.name}/out", storage_options=options)
    assert proxy.broken == 1
    assert without_reports(bucket.download("out")) == large.merged


@pytest.mark.parametrize(
    ("method", "match"),
    [
        ("PUT", r"partNumber=2"),
        ("POST", r"uploadId="),
        ("PUT", r"\.lorafast/claim"),
        ("PUT", r"\.lorafast/.*json"),
        ("PUT", r"index\.json"),
        ("PUT", r"/config\.json"),
    ],
    ids=["part", "complete", "claim", "marker", "index", "config"],
)
def test_what_never_works_leaves_no_model_and_is_completed_later(
    method: str, match: str, large: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    output, options = f"s3://{bucket.name}/out", bucket.options(proxy.url)
    proxy.set(Fault("503", method, match))
    with pytest.raises(lorafast.StoreError, match=f"s3://{bucket.name}/out"):
        lorafast.merge(
            large.base, large.adapter, output,
            storage_options=options | {"max_retries": "1", "retry_timeout": "1"},
        )  # fmt: skip
    assert proxy.broken > 0
    proxy.set(None)
    assert "out/config.json" not in bucket.keys("out/")
    assert bucket.uploads() == []
    lorafast.merge(large.base, large.adapter, output, storage_options=options)
    assert without_reports(bucket.download("out")) == large.merged


def test_a_body_that_is_cut_each_time_is_an_error_and_never_wrong_bytes(
    large: Model, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    base = bucket.upload(large.base, "base")
    proxy.set(Fault("truncate", "GET", r"safetensors", skip=4))
    options = bucket.options(proxy.url) | {"max_retries": "2", "retry_timeout": "2"}
    with pytest.raises(lorafast.StoreError, match=rf"{base}/model-0000.-of-00002.safetensors: "):
        lorafast.merge(base, large.adapter, tmp_path / "out", storage_options=options)
    assert proxy.broken > 0
    assert not (tmp_path / "out").exists()


def test_an_object_that_changes_meanwhile_is_named(
    large: Model, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    base = bucket.upload(large.base, "base")
    proxy.set(Fault("etag", "GET", r"00002-of-00002", skip=1))
    with pytest.raises(lorafast.StoreError, match=r"00002-of-00002.safetensors: changed while"):
        lorafast.merge(
            base, large.adapter, tmp_path / "out", storage_options=bucket.options(proxy.url)
        )
    assert proxy.broken > 0
    assert not (tmp_path / "out").exists()


def test_an_object_that_was_replaced_since_the_plan_is_named(
    large: Model, bucket: Bucket, tmp_path: Path
) -> None:
    base = bucket.upload(large.base, "base")
    plan = lorafast.plan(base, large.adapter, storage_options=bucket.options())
    name = "model-00002-of-00002.safetensors"
    content = bytearray((large.base / name).read_bytes())
    content[-1] ^= 1
    bucket.put(f"base/{name}", bytes(content))
    with pytest.raises(lorafast.StoreError, match=rf"{name}: changed while it was read"):
        plan.execute(tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_flipped_byte_is_found_by_verify_before_there_is_a_model(
    large: Model, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    base = bucket.upload(large.base, "base")
    options = bucket.options(proxy.url)
    for output in (tmp_path / "out", f"s3://{bucket.name}/out"):
        proxy.set(Fault("corrupt", "GET", r"/base/model-00001-of-00002", skip=1, most=1))
        with pytest.raises(lorafast.VerificationError):
            lorafast.merge(base, large.adapter, output, storage_options=options, verify=True)
        assert proxy.broken == 1
    assert not (tmp_path / "out").exists()
    # Nothing is left that the same call would take for finished.
    assert bucket.keys("out/") == []
    proxy.set(None)
    lorafast.merge(base, large.adapter, f"s3://{bucket.name}/out", storage_options=options)
    assert without_reports(bucket.download("out")) == large.merged


def test_a_server_without_ranges_is_refused(
    large: Model, proxy: FaultProxy, tmp_path: Path
) -> None:
    from support.fault_proxy import before

    with serving(large.base.parent) as server, before(server.url) as own:
        own.set(Fault("ignore_range", "GET", r"safetensors"))
        with pytest.raises(lorafast.StoreError, match="ignores ranges"):
            lorafast.merge(f"{own.url}/base", large.adapter, tmp_path / "out")
        assert own.broken > 0


def test_a_server_that_stalls_is_left(
    large: Model, bucket: Bucket, proxy: FaultProxy, tmp_path: Path
) -> None:
    base = bucket.upload(large.base, "base")
    proxy.set(Fault("stall", "GET", r"safetensors", skip=2, most=1))
    options = bucket.options(proxy.url) | {"timeout": "3s"}
    lorafast.merge(base, large.adapter, tmp_path / "out", storage_options=options)
    assert proxy.broken == 1
    assert files_of(tmp_path / "out") == large.merged
