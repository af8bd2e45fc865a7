"""Credentials, and what is said where a store refuses: named, quickly, without secrets."""

from __future__ import annotations

import pickle
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path

import lorafast
import pytest
from lorafast import _core
from lorafast._cli.main import main
from lorafast._io.stores import StoreSettings
from support.fault_proxy import Fault, FaultProxy
from support.object_stores import KEY, SECRET, Bucket, free_port
from support.store_models import Model, files_of, without_reports


def test_without_credentials_nobody_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    began = time.monotonic()
    with pytest.raises(lorafast.StoreError, match="no credentials for S3: set AWS_ACCESS_KEY_ID"):
        lorafast.inspect("s3://bucket/base")
    # Outside a cloud there is no metadata service, whatever is said of it.
    monkeypatch.delenv("AWS_EC2_METADATA_DISABLED")
    monkeypatch.setenv("AWS_PROFILE", "work")
    with pytest.raises(lorafast.StoreError, match="AWS_PROFILE is set, but"):
        lorafast.inspect("s3://bucket/base")
    with pytest.raises(lorafast.StoreError, match="no credentials for Google"):
        lorafast.inspect("gs://bucket/base", storage_options={"aws_region": "x"})
    with pytest.raises(lorafast.StoreError, match="no credentials for Azure"):
        lorafast.inspect("az://box/base", storage_options={"azure_storage_account_name": "me"})
    assert time.monotonic() - began < 3


def test_options_come_from_the_environment_too(
    small: Model, bucket: Bucket, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base = bucket.upload(small.base, "base")
    for name, value in bucket.options().items():
        monkeypatch.setenv(name.upper(), value)
    lorafast.merge(base, small.adapter, tmp_path / "out")
    assert files_of(tmp_path / "out") == small.merged


def test_options_of_the_longest_beginning_count(small: Model, bucket: Bucket) -> None:
    base = bucket.upload(small.base, "base")
    nowhere = {"aws_endpoint_url": "http://127.0.0.1:1", "max_retries": "0"}
    options: dict[str, Mapping[str, str]] = {
        "s3://": nowhere,
        f"s3://{bucket.name}": bucket.options(),
        f"s3://{bucket.name}/bas": nowhere,
    }
    assert lorafast.inspect(base, storage_options=options).total_parameters > 0
    for wrong, words in (
        ({"aws_regoin": "x"}, "'aws_regoin', which no store knows"),
        ({"aws_region": "x", "s3://a": {}}, "either keys to texts, or beginnings"),
        ({"aws_secret_access_key": 5}, "'aws_secret_access_key', whose value is no text"),
    ):
        with pytest.raises(ValueError, match=words):
            lorafast.inspect(base, storage_options=wrong)  # type: ignore[arg-type]


def test_a_provider_is_asked_again_before_its_credentials_expire(
    small: Model, bucket: Bucket
) -> None:
    asked = []

    def provider() -> tuple[dict[str, str], int]:
        asked.append(time.time())
        keys = {"aws_access_key_id": KEY, "aws_secret_access_key": SECRET}
        # Within the minute in which credentials count as expired already.
        return keys, int(time.time()) + 30

    plain = {key: value for key, value in bucket.options().items() if "key" not in key}
    base = bucket.upload(small.base, "base")
    plan = lorafast.plan(base, small.adapter, storage_options=plain, credential_provider=provider)
    time.sleep(1.1)
    plan.execute(f"s3://{bucket.name}/out")
    assert len(asked) >= 2
    assert without_reports(bucket.download("out")) == small.merged

    def broken() -> tuple[dict[str, str], None]:
        raise RuntimeError(f"no token for {SECRET}")

    with pytest.raises(lorafast.StoreError, match="credential_provider gave no credentials") as no:
        lorafast.inspect(base, storage_options=plain, credential_provider=broken)
    assert SECRET not in str(no.value)


def test_what_is_not_there_is_told_apart(small: Model, bucket: Bucket, tmp_path: Path) -> None:
    options = bucket.options()
    with pytest.raises(FileNotFoundError, match=f"s3://{bucket.name}/absent"):
        lorafast.merge(
            f"s3://{bucket.name}/absent", small.adapter, tmp_path / "out", storage_options=options
        )
    with pytest.raises(lorafast.StoreError, match="there is no bucket absent"):
        lorafast.inspect("s3://absent/base", storage_options=options)
    with pytest.raises(lorafast.StoreError, match="there is no bucket absent"):
        lorafast.merge(small.base, small.adapter, "s3://absent/out", storage_options=options)
    port = free_port()
    nowhere = bucket.options(f"http://127.0.0.1:{port}") | {"max_retries": "1"}
    with pytest.raises(lorafast.StoreError, match="check the network and the endpoint"):
        lorafast.inspect(f"s3://{bucket.name}/base", storage_options=nowhere)
    with pytest.raises(lorafast.StoreError, match="is only read"):
        lorafast.merge(small.base, small.adapter, bucket.endpoint + "/out")


@pytest.mark.parametrize(
    ("fault", "permission"),
    [
        (Fault("403", "GET", "list-type"), "s3:ListBucket"),
        (Fault("403", "GET", "safetensors"), "s3:GetObject"),
        (Fault("403", "PUT", "out"), "s3:PutObject"),
    ],
    ids=["list", "read", "write"],
)
def test_a_missing_permission_is_named(
    fault: Fault, permission: str, small: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    base = bucket.upload(small.base, "base")
    proxy.set(fault)
    proxy.code = "AccessDenied"
    with pytest.raises(lorafast.StoreError, match=f"permission denied: {permission} is needed"):
        lorafast.merge(
            base,
            small.adapter,
            f"s3://{bucket.name}/out",
            storage_options=bucket.options(proxy.url),
        )
    assert proxy.broken > 0


@pytest.mark.parametrize(
    ("code", "words"),
    [
        ("ExpiredToken", "the credentials have expired"),
        ("SignatureDoesNotMatch", "does not accept the credentials"),
        ("AuthorizationHeaderMalformed", "lies in another region"),
        ("QuotaExceeded", "has no room for it"),
    ],
)
def test_what_a_store_answers_is_put_into_words(
    code: str, words: str, small: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    base = bucket.upload(small.base, "base")
    proxy.set(Fault("403", "GET", "list-type"))
    proxy.code = code
    with pytest.raises(lorafast.StoreError, match=words) as caught:
        lorafast.inspect(base, storage_options=bucket.options(proxy.url))
    assert SECRET not in str(caught.value)


def test_secrets_are_in_no_text_and_no_pickle(bucket: Bucket) -> None:
    location = _core.StoreLocation(f"s3://{KEY}:{SECRET}@{bucket.name}/x", bucket.options())
    settings = StoreSettings(bucket.options())
    for text in (repr(location), str(location), location.url, repr(settings), str(settings)):
        assert SECRET not in text
        assert KEY not in text
    for secret in (location, settings):
        with pytest.raises(TypeError):
            pickle.dumps(secret)


def test_keys_in_the_url_work_and_are_never_shown(
    small: Model, bucket: Bucket, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    bucket.upload(small.base, "base")
    url = f"s3://{KEY}:{SECRET}@{bucket.name}/base"
    flags = [
        *("--storage-option", f"aws_endpoint_url={bucket.endpoint}"),
        *("--storage-option", "aws_region=us-east-1"),
    ]
    output = f"s3://{KEY}:{SECRET}@{bucket.name}/out"
    command = ["merge", "--base", url, "--adapters", str(small.adapter)]
    assert main([*command, "--output", output, *flags]) == 0
    assert main(["inspect", f"s3://{KEY}:{SECRET}@{bucket.name}/out", *flags, "--json"]) == 0
    assert main([*command, "--output", output, *flags]) == 1
    said = "".join(capsys.readouterr())
    assert "holds a model" in said
    assert SECRET not in said + bucket.get("out/merge_report.json").decode()
    assert without_reports(bucket.download("out")) == small.merged


def test_a_child_of_a_fork_reads_too(small: Model, bucket: Bucket, tmp_path: Path) -> None:
    base = bucket.upload(small.base, "base")
    program = f"""
import os, sys, lorafast
options = {bucket.options()!r}
lorafast.inspect({base!r}, storage_options=options)
child = os.fork()
if child == 0:
    output = {str(tmp_path / "out")!r}
    lorafast.merge({base!r}, {str(small.adapter)!r}, output, storage_options=options)
    os._exit(0)
sys.exit(os.waitpid(child, 0)[1])
"""
    subprocess.run([sys.executable, "-W", "ignore", "-c", program], check=True, timeout=60)
    assert files_of(tmp_path / "out") == small.merged


def test_a_build_without_stores_says_how_to_get_them(
    small: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr(_core, "StoreLocation")
    monkeypatch.delattr(_core, "IoMemory")
    with pytest.raises(lorafast.MissingDependencyError, match="install a wheel") as caught:
        lorafast.inspect(f"s3://{KEY}:{SECRET}@bucket/base")
    assert SECRET not in str(caught.value)
    assert lorafast.inspect(small.base).kind == "checkpoint"
