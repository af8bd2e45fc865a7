"""Merges from and to stores write the bytes of a local merge, and ask for no byte twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lorafast
import pytest
from support.object_stores import KEY, SECRET, Bucket, s3s_fs, serving_s3s
from support.range_server import serving
from support.store_models import Model, files_of, without_reports

#: What is asked for when a file is opened.
HEAD = 128 << 10


def test_a_merge_from_a_bucket_to_a_directory(small: Model, bucket: Bucket, tmp_path: Path) -> None:
    base = bucket.upload(small.base, "models/base")
    adapter = bucket.upload(small.adapter, "adapter")
    report = lorafast.merge(base, adapter, tmp_path / "out", storage_options=bucket.options())
    assert files_of(tmp_path / "out") == small.merged
    assert report.base == base
    assert report.adapters == [adapter]
    said = (tmp_path / "out" / "merge_report.json").read_text()
    assert SECRET not in said
    assert KEY not in said


def test_a_merge_from_a_directory_to_a_bucket(small: Model, bucket: Bucket) -> None:
    output = f"s3://{bucket.name}/out"
    report = lorafast.merge(
        small.base, small.adapter, output, verify=True, storage_options=bucket.options()
    )
    files = bucket.download("out")
    assert without_reports(files) == small.merged
    assert report.output_path == output
    assert json.loads(files["merge_report.json"])["verification"]["ok"]
    assert {"merge_report.md", "README.md", "lorafast_manifest.json"} <= files.keys()


def test_a_merge_in_a_store_is_verified_and_listed_there(large: Model, bucket: Bucket) -> None:
    base = bucket.upload(large.base, "base")
    output = f"s3://{bucket.name}/some/where/out/"
    options = bucket.options()
    lorafast.merge(base, large.adapter, output, storage_options=options, io_memory="32MiB")
    assert without_reports(bucket.download("some/where/out")) == large.merged
    assert bucket.uploads() == []
    assert bucket.keys("some/where/out/.lorafast") == []
    assert lorafast.verify(base, large.adapter, output, storage_options=options).ok
    listing = lorafast.inspect(output, storage_options=options)
    assert listing.kind == "checkpoint"
    assert listing.path == output.rstrip("/")
    local = lorafast.plan(large.base, large.adapter).to_dict()
    remote = lorafast.plan(base, large.adapter, storage_options=options).to_dict()
    assert remote["tensors"] == local["tensors"]


def test_a_web_server_is_read_by_ranges_and_each_byte_once(large: Model, tmp_path: Path) -> None:
    with serving(large.base.parent) as server:
        lorafast.merge(f"{server.url}/base", f"{server.url}/adapter", tmp_path / "out")
        assert files_of(tmp_path / "out") == large.merged
        shards = [path.name for path in large.base.glob("*.safetensors")]
        assert len(shards) == 2
        for shard in shards:
            counts = server.bytes_of(f"base/{shard}")
            assert set(counts) == {1}
            headers = [each for each in server.asked if each.path == f"/base/{shard}"]
            of_header = [each for each in headers if each.range and each.range[0] < HEAD]
            heads = [each for each in headers if each.method == "HEAD"]
            assert len(of_header) == 1
            assert len(heads) <= 2


def test_a_single_file_and_a_user_in_the_url(small: Model, tmp_path: Path) -> None:
    with serving(small.base.parent) as server:
        server.user = "me:a/secret"
        name = next(small.base.glob("*00001-of*")).name
        place = server.url.replace("http://", "http://me:a%2Fsecret@")
        listing = lorafast.inspect(f"{place}/base/{name}")
        assert listing.path == f"{server.url}/base/{name}"
        with pytest.raises(lorafast.StoreError, match="user and a password") as caught:
            lorafast.inspect(f"{server.url}/base/{name}")
        assert "secret" not in str(caught.value)
        lorafast.merge(f"{place}/base", f"{place}/adapter", tmp_path / "out")
    assert files_of(tmp_path / "out") == small.merged
    assert "secret" not in (tmp_path / "out" / "merge_report.json").read_text()


def test_file_urls_are_paths(small: Model, tmp_path: Path) -> None:
    lorafast.merge(small.base.as_uri(), small.adapter.as_uri(), (tmp_path / "a b").as_uri())
    assert files_of(tmp_path / "a b") == small.merged


def test_a_server_that_checks_signatures(large: Model, tmp_path: Path) -> None:
    program = s3s_fs()
    if program is None:
        pytest.skip("s3s-fs is not installed (make s3-server)")
    root = tmp_path / "root"
    shutil.copytree(large.base, root / "models" / "base")
    with serving_s3s(program, root) as url:
        options = {
            "aws_access_key_id": KEY,
            "aws_secret_access_key": SECRET,
            "aws_endpoint_url": url,
            "aws_region": "us-east-1",
        }
        base, output = "s3://models/base", "s3://models/out"
        lorafast.merge(base, large.adapter, output, verify=True, storage_options=options)
        assert files_of(root / "models" / "out") == large.merged
        wrong = options | {"aws_secret_access_key": "another"}
        with pytest.raises(lorafast.StoreError, match="does not accept the credentials"):
            lorafast.inspect(base, storage_options=wrong)
