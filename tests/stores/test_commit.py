"""A model in a store is whole or none: claims, markers, resumption, overwriting, cleaning."""

from __future__ import annotations

import json
from pathlib import Path

import lorafast
import pytest
from support.fault_proxy import Fault, FaultProxy
from support.handmade import make_adapter
from support.object_stores import Bucket
from support.store_models import Model, without_reports

INDEX = "model.safetensors.index.json"


def is_model(bucket: Bucket, prefix: str) -> bool:
    keys = bucket.keys(f"{prefix}/")
    return f"{prefix}/config.json" in keys or f"{prefix}/{INDEX}" in keys


def quick(bucket: Bucket, proxy: FaultProxy) -> dict[str, str]:
    """Options that give up soon."""
    return bucket.options(proxy.url) | {"max_retries": "1", "retry_timeout": "2"}


@pytest.fixture
def unfinished(small: Model, bucket: Bucket, proxy: FaultProxy) -> str:
    """An output of which the third shard could not be written."""
    output = f"s3://{bucket.name}/out"
    proxy.set(Fault("403", "PUT", r"/out/model-00003-of-00003"))
    with pytest.raises(lorafast.StoreError, match="s3:PutObject") as caught:
        lorafast.merge(small.base, small.adapter, output, storage_options=quick(bucket, proxy))
    assert proxy.broken > 0
    assert any("the same call" in note for note in caught.value.__notes__)
    proxy.set(None)
    assert not is_model(bucket, "out")
    return output


def test_the_same_call_completes_and_sends_only_what_is_missing(
    small: Model, bucket: Bucket, proxy: FaultProxy, unfinished: str
) -> None:
    keys = bucket.keys("out/")
    finished = [key for key in keys if key.endswith(".safetensors")]
    markers = [key for key in keys if ".lorafast/" in key and key.endswith(".json")]
    assert 0 < len(finished) < 3
    assert len(markers) == len(finished)
    lorafast.merge(small.base, small.adapter, unfinished, storage_options=bucket.options(proxy.url))
    sent = {path.split("?")[0] for method, path in proxy.requests if method == "PUT"}
    assert not {f"/{bucket.name}/{key}" for key in finished} & sent
    assert without_reports(bucket.download("out")) == small.merged


def test_another_merge_is_refused_until_it_may_overwrite_or_all_is_cleaned(
    small: Model, bucket: Bucket, unfinished: str, tmp_path: Path
) -> None:
    other = make_adapter(tmp_path / "other", r=4, lora_alpha=16)
    options = bucket.options()
    with pytest.raises(lorafast.OutputError, match="another merge is writing there"):
        lorafast.merge(small.base, other, unfinished, storage_options=options)
    removed = lorafast.clean(unfinished, storage_options=options)
    assert any(name.endswith(".safetensors") for name in removed)
    assert bucket.keys("out/") == []
    lorafast.merge(small.base, other, unfinished, storage_options=options)
    assert is_model(bucket, "out")


def test_a_finished_model_is_refused_replaced_and_never_cleaned(
    small: Model, bucket: Bucket, tmp_path: Path
) -> None:
    output, options = f"s3://{bucket.name}/out", bucket.options()
    other = make_adapter(tmp_path / "other", r=4, lora_alpha=16)
    lorafast.merge(small.base, other, output, storage_options=options)
    bucket.put("out/mine.bin.note", b"kept")
    with pytest.raises(lorafast.OutputError, match="holds a model"):
        lorafast.merge(small.base, small.adapter, output, storage_options=options)
    before = bucket.download("out")
    assert lorafast.clean(output, storage_options=options) == []
    assert bucket.download("out") == before
    lorafast.merge(small.base, small.adapter, output, overwrite=True, storage_options=options)
    files = without_reports(bucket.download("out"))
    assert files.pop("mine.bin.note") == b"kept"
    assert files == small.merged


def test_index_and_config_go_first_and_come_last(
    small: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    output = f"s3://{bucket.name}/out"
    lorafast.merge(small.base, small.adapter, output, storage_options=bucket.options())
    proxy.set(None)
    # Another merge, of which no shard is there.
    lorafast.merge(
        *(small.base, small.adapter, output),
        weights=[0.5],
        overwrite=True,
        storage_options=bucket.options(proxy.url),
    )
    asked = [(method, path.partition("?")[0].rpartition("/")[2]) for method, path in proxy.requests]
    shards = [place for place, (_, name) in enumerate(asked) if name.endswith(".safetensors")]
    puts = [place for place in shards if asked[place][0] in ("PUT", "POST")]
    index, config = asked.index(("PUT", INDEX)), asked.index(("PUT", "config.json"))
    assert max(puts) < index < config
    deletes = [place for place, (method, _) in enumerate(asked) if method in ("DELETE", "POST")]
    assert min(deletes) < min(puts)


def test_an_output_around_its_base_is_refused(small: Model, bucket: Bucket) -> None:
    base = bucket.upload(small.base, "models/base")
    for output in (base, f"{base}/below", f"s3://{bucket.name}/models"):
        with pytest.raises(lorafast.OutputError, match="lies within what is read"):
            lorafast.merge(
                base, small.adapter, output, overwrite=True, storage_options=bucket.options()
            )
    assert json.loads(bucket.get("models/base/config.json"))


def test_a_store_without_conditions_works_and_is_told_of(
    small: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    proxy.dropped = {"if-none-match", "if-match"}
    output = f"s3://{bucket.name}/out"
    report = lorafast.merge(
        small.base, small.adapter, output, storage_options=bucket.options(proxy.url)
    )
    assert any("cannot be excluded" in warning for warning in report.warnings)
    files = bucket.download("out")
    assert without_reports(files) == small.merged
    assert "cannot be excluded" in files["merge_report.json"].decode()
    proxy.dropped = set()
    report = lorafast.merge(
        small.base, small.adapter, output + "-2", storage_options=bucket.options(proxy.url)
    )
    assert not any("cannot be excluded" in warning for warning in report.warnings)


def test_somebody_elses_config_is_not_replaced(
    small: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    """Another writer that knows nothing of claims: the model is not finished over it."""
    output, options = f"s3://{bucket.name}/out", bucket.options(proxy.url)
    # The config that somebody puts while the index is on its way.
    proxy.before = (r"index\.json", lambda: bucket.put("out/config.json", b"{}"))
    with pytest.raises(lorafast.OutputError, match=r"out/config\.json: was written by somebody"):
        lorafast.merge(small.base, small.adapter, output, storage_options=options)
    assert bucket.get("out/config.json") == b"{}"


def test_the_command_cleans(
    bucket: Bucket, unfinished: str, capsys: pytest.CaptureFixture[str]
) -> None:
    from lorafast._cli.main import main

    flags = []
    for name, value in bucket.options().items():
        flags += ["--storage-option", f"{name}={value}"]
    assert main(["clean", unfinished, *flags, "--json"]) == 0
    assert ".lorafast/claim" in json.loads(capsys.readouterr().out)["removed"]
    assert bucket.keys("out/") == []
    assert main(["clean", unfinished, *flags]) == 0
    assert "nothing was left to be removed" in capsys.readouterr().out
    assert main(["clean", "some/directory"]) != 0
