"""Merges from and to stores write the bytes of a local merge, and ask for no byte twice."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import lorafast
import pytest
from lorafast._cli.main import main
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


def test_a_plan_says_what_it_will_ask_for(
    large: Model, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert "reads" not in lorafast.plan(large.base, large.adapter).to_dict()
    with serving(large.base.parent) as server:
        base, adapter = f"{server.url}/base", f"{server.url}/adapter"
        plan = lorafast.plan(base, adapter)
        reads = plan.to_dict()["reads"]
        server.asked.clear()
        plan.execute(tmp_path / "out")
        asked = [each.range for each in server.asked if each.range and "safetensors" in each.path]
        asked = [each for each in asked if each is not None and each[1] - each[0] > 1 << 16]
        assert reads["requests"] == len(asked) > 4
        assert reads["bytes"] == sum(end - start for start, end in asked)
        sources = ["--base", base, "--adapters", adapter, "--output", str(tmp_path / "not")]
        assert main(["merge", *sources, "--dry-run"]) == 0
        assert f"in {reads['requests']} requests" in capsys.readouterr().out
        assert not (tmp_path / "not").exists()


@pytest.mark.parametrize("full", [False, True])
def test_a_verification_asks_for_no_byte_twice(large: Model, full: bool) -> None:
    with serving(large.base.parent) as server:
        places = (f"{server.url}/base", large.adapter, f"{server.url}/merged")
        assert lorafast.verify(*places, full=full).ok
        for folder in ("base", "merged"):
            shards = [path.name for path in (large.base.parent / folder).glob("*.safetensors")]
            assert len(shards) == 2
            for shard in shards:
                assert set(server.bytes_of(f"{folder}/{shard}")) == {1}, (folder, shard)


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
