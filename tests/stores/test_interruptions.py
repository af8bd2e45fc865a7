"""Merges into a store that are killed or interrupted at any moment, and merged again."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import lorafast
import pytest
from support.fault_proxy import FaultProxy
from support.handmade import make_base
from support.object_stores import Bucket
from support.store_models import Model, without_reports

INDEX = "model.safetensors.index.json"
#: `make trust` tries more moments.
KILLS = int(os.environ.get("LORAFAST_TRUST_KILLS_IN_STORES", "4"))

PROGRAM = """
import sys, json, lorafast
base, adapter, output, options = sys.argv[1:]
print("begin", flush=True)
lorafast.merge(base, adapter, output, storage_options=json.loads(options))
"""


def start(model: Model, output: str, options: dict[str, str]) -> subprocess.Popen[str]:
    import json

    process = subprocess.Popen(
        [
            *(sys.executable, "-W", "ignore", "-c", PROGRAM),
            *(str(model.base), str(model.adapter), output, json.dumps(options)),
        ],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "begin\n"
    return process


@pytest.mark.trust
def test_a_killed_merge_leaves_no_model_or_all_of_it(
    small: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    chance = random.Random(20)
    # Each request takes a while, so that there are moments between them.
    proxy.latency = 0.05
    options = bucket.options(proxy.url)
    cut_off = 0
    for number in range(KILLS):
        prefix = f"out-{number}"
        output = f"s3://{bucket.name}/{prefix}"
        process = start(small, output, options)
        time.sleep((number + chance.random()) / KILLS * 1.2)
        process.kill()
        process.communicate()
        files = bucket.download(prefix)
        if "config.json" in files:
            assert files.keys() >= small.merged.keys()
        else:
            cut_off += 1
            if INDEX in files:
                assert files.keys() >= small.merged.keys() - {"config.json"}
            lorafast.merge(small.base, small.adapter, output, storage_options=bucket.options())
        assert without_reports(bucket.download(prefix)).items() >= small.merged.items()
    assert cut_off > 0


def test_an_interruption_takes_back_what_was_sent_of_a_shard(
    large: Model, bucket: Bucket, proxy: FaultProxy
) -> None:
    proxy.bandwidth = 1 << 20
    proxy.latency = 0.3
    output = f"s3://{bucket.name}/out"
    process = start(large, output, bucket.options(proxy.url))
    deadline = time.monotonic() + 30
    while not any("partNumber" in path for _, path in proxy.requests):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    began = time.monotonic()
    process.send_signal(signal.SIGINT)
    _, said = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert "KeyboardInterrupt" in said
    assert "the same call again completes" in said
    proxy.bandwidth, proxy.latency = 0, 0.0
    time.sleep(1)
    assert bucket.uploads() == []
    assert "out/config.json" not in bucket.keys("out/")
    lorafast.merge(large.base, large.adapter, output, storage_options=bucket.options())
    assert without_reports(bucket.download("out")) == large.merged


def test_only_merges_write_to_stores(small: Model, bucket: Bucket, tmp_path: Path) -> None:
    output = f"s3://key:secret@{bucket.name}/out"
    merged = make_base(tmp_path / "merged")
    for write in (
        lambda: lorafast.convert(small.adapter, output, to="peft"),
        lambda: lorafast.combine([small.adapter, small.adapter], output),
        lambda: lorafast.subtract(merged, small.adapter, output),
        lambda: lorafast.recover(output),
    ):
        with pytest.raises(ValueError, match="only merge writes to object stores") as caught:
            write()
        assert "secret" not in str(caught.value)
    assert list(tmp_path.iterdir()) == [merged]


def test_other_verbs_fetch_adapters(
    small: Model, bucket: Bucket, monkeypatch: pytest.MonkeyPatch
) -> None:
    adapter = bucket.upload(small.adapter, "adapters/style")
    for name, value in bucket.options().items():
        monkeypatch.setenv(name.upper(), value)
    local = lorafast.analyze(small.adapter)
    assert lorafast.analyze(adapter).modules == local.modules
    with pytest.raises(lorafast.LorafastError, match="a model in a store is read by merge, plan"):
        lorafast.analyze(adapter, base=f"s3://{bucket.name}/base")
