"""Ray's clusters and Dask's: the same bytes, also where a node dies in the middle."""

from __future__ import annotations

import importlib.util
import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any

import lorafast
import pytest
from support.files import snapshot
from support.handmade import adapter_tensors, make_adapter, make_base

#: Ray and Dask start processes of their own, and warn of what they find; each test runs in a
#: process that ends with its cluster.
NO_RAY = importlib.util.find_spec("ray") is None
NO_DASK = importlib.util.find_spec("distributed") is None
REPORTS = ("merge_report.json", "merge_report.md")

RAY = """
import json, os, signal, sys, threading, time
from pathlib import Path

import lorafast
import ray
from ray.cluster_utils import Cluster

root = Path(sys.argv[1])
# Nodes that die are noticed soon.
config = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500,
          "health_check_failure_threshold": 2}
cluster = Cluster(initialize_head=True,
                  head_node_args={"num_cpus": 0, "_system_config": config})
nodes = [cluster.add_node(num_cpus=1) for _ in range(2)]
environment = {"env_vars": {"PYTHONPATH": os.environ["PYTHONPATH"]}}
ray.init(address=cluster.address, log_to_driver=False, runtime_env=environment)
told = {}
try:
    base, adapters = root / "base", [root / "one", root / "two"]
    lorafast.merge(base, adapters, root / "quiet", executor="ray", verify=True)
    assert ray.is_initialized(), "a cluster that was there stays"
    apart = lorafast.scan(root / "fleet", executor="ray")
    told["scanned"] = apart.adapters["blake3"].tolist()
    try:
        lorafast.merge(base, root / "huge", root / "none", dtype="float16", executor="ray")
    except lorafast.NumericError as error:
        told["error"] = [str(error), str(error.__cause__)]

    def kill():
        # While shards are written, one node goes with all that runs on it.
        place = root / ".out.parts"
        while not list(place.glob("*.receipt.json")):
            time.sleep(0.01)
        told["killed_at"] = len(list(place.glob("*.receipt.json")))
        cluster.remove_node(nodes[1], allow_graceful=False)

    killer = threading.Thread(target=kill)
    killer.start()
    lorafast.merge(base, adapters, root / "out", executor="ray")
    killer.join()
    told["nodes"] = sum(node["Alive"] for node in ray.nodes())
finally:
    (root / "told.json").write_text(json.dumps(told))
    ray.shutdown()
    cluster.shutdown()
"""

DASK = """
import json, sys
from pathlib import Path

import lorafast
from distributed import Client, LocalCluster

if __name__ == "__main__":
    root = Path(sys.argv[1])
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster,
        Client(cluster) as client,
    ):
        executor = client.get_executor()
        base, adapters = root / "base", [root / "one", root / "two"]
        lorafast.merge(base, adapters, root / "out", executor=executor, verify=True)
        told = {"scanned": lorafast.scan(root / "fleet", executor=executor)
                .adapters["blake3"].tolist()}
        try:
            lorafast.merge(base, root / "huge", root / "none", dtype="float16",
                           executor=executor)
        except lorafast.NumericError as error:
            told["error"] = str(error)
    (root / "told.json").write_text(json.dumps(told))
"""


@pytest.fixture
def root(tmp_path: Path) -> Path:
    """A base of a few MB in eight shards, two adapters, one that overflows, and a small fleet."""
    modules = {f"model.layers.{layer}.mlp.up_proj": (1024, 512) for layer in range(32)}
    base = make_base(tmp_path / "base", modules=modules, shards=8, dtype="BF16")
    for name, alpha in {"one": 8.0, "two": 3.0, "huge": 1e38}.items():
        tensors = adapter_tensors(modules=modules, rank=4)
        make_adapter(tmp_path / name, tensors, r=4, lora_alpha=alpha)
    for place in range(5):
        make_adapter(tmp_path / "fleet" / f"a{place}")
    lorafast.merge(base, [tmp_path / "one", tmp_path / "two"], tmp_path / "whole")
    return tmp_path


def run(script: str, root: Path) -> dict[str, Any]:
    """What a script tells, which runs in a session of its own and leaves no process."""
    file = root / "script.py"
    file.write_text(script)
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(path for path in sys.path if path),
        "RAY_USAGE_STATS_ENABLED": "0",
        "RAY_TMPDIR": "/tmp",
        # Ray keeps a token there.
        "HOME": str(root),
    }
    process = subprocess.Popen(
        [sys.executable, str(file), str(root)],
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        output, problems = process.communicate(timeout=300)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, problems[-4000:] + output[-2000:]
    told: dict[str, Any] = json.loads((root / "told.json").read_text())
    return told


def check_same(root: Path, *names: str) -> None:
    whole = snapshot(root / "whole")
    for report in REPORTS:
        whole.pop(report)
    for name in names:
        made = snapshot(root / name)
        for report in REPORTS:
            made.pop(report)
        assert made == whole
        assert not (root / f".{name}.parts").exists()


@pytest.mark.alone
@pytest.mark.skipif(NO_RAY, reason='Ray is not installed: pip install "lorafast[ray]"')
def test_a_ray_cluster_of_which_a_node_dies(root: Path) -> None:
    told = run(RAY, root)
    check_same(root, "quiet", "out")
    assert told["scanned"] == lorafast.scan(root / "fleet").adapters["blake3"].tolist()
    assert "write_part" in told["error"][1]
    assert told["error"][0]
    assert not (root / "none").exists()
    # One of two died, while not all shards were written.
    assert told["killed_at"] < 8
    assert told["nodes"] == 2


@pytest.mark.alone
@pytest.mark.skipif(NO_DASK, reason="Dask is not installed: pip install distributed")
def test_a_dask_cluster(root: Path) -> None:
    told = run(DASK, root)
    check_same(root, "out")
    assert told["scanned"] == lorafast.scan(root / "fleet").adapters["blake3"].tolist()
    assert told["error"]
    assert not (root / "none").exists()
