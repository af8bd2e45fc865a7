"""Memory of merges from stores: the budget, and what a merge of local files takes."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
from support.gcs_stub import gcs
from support.handmade import adapter_tensors, make_adapter, make_base
from support.range_server import serving

MIB = 1 << 20
ROWS, COLUMNS = 4096, 4096
PROGRAM = """
import json, sys, threading, time, lorafast
peak = 0
def look():
    global peak
    while True:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) << 10)
        time.sleep(0.005)
threading.Thread(target=look, daemon=True).start()
options = json.loads(sys.argv[5])
provider = (lambda: ({"bearer_token": "a-token"}, None)) if options else None
lorafast.merge(
    *sys.argv[1:4], io_memory=int(sys.argv[4]), sync=False, storage_options=options,
    credential_provider=provider,
)
print(peak)
"""


def peak_of(
    base: str,
    adapter: Path,
    output: Path | str,
    io_memory: int,
    options: dict[str, str] | None = None,
) -> int:
    """The most memory of its own that a merge takes, in bytes."""
    arguments = [base, str(adapter), str(output), str(io_memory), json.dumps(options or {})]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        check=True,
        stdout=subprocess.PIPE,
        text=True,
        timeout=300,
    )
    return int(done.stdout)


@pytest.mark.alone
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
def test_memory_is_the_budget_whatever_the_size(tmp_path: Path) -> None:
    budget = 48 * MIB
    peaks = {}
    for layers in (3, 8):
        modules = {
            f"model.layers.{layer}.self_attn.q_proj": (ROWS, COLUMNS) for layer in range(layers)
        }
        root = tmp_path / str(layers)
        base = make_base(root / "base", modules=modules, dtype="BF16")
        adapter = make_adapter(root / "adapter", adapter_tensors(modules))
        local = peak_of(str(base), adapter, root / "local", budget)
        with serving(root) as server:
            remote = peak_of(f"{server.url}/base", adapter, root / "remote", budget)
        file = "model.safetensors"
        assert (root / "remote" / file).read_bytes() == (root / "local" / file).read_bytes()
        peaks[layers] = remote
        # Pieces of bodies on their way come to it, and the interpreter's other thread.
        assert remote < local + budget + 24 * MIB
    assert peaks[8] < peaks[3] + 24 * MIB


def sparse_base(path: Path, layers: int, shards: int) -> int:
    """A base of zeros that takes no room on the disk; how many bytes its tensors have."""
    path.mkdir(parents=True)
    size, weight_map = ROWS * COLUMNS * 2, {}
    for shard in range(shards):
        file = f"model-{shard + 1:05}-of-{shards:05}.safetensors"
        header = {}
        for position, layer in enumerate(range(shard, layers, shards)):
            name = f"model.layers.{layer}.self_attn.q_proj.weight"
            offsets = [position * size, (position + 1) * size]
            header[name] = {"dtype": "BF16", "shape": [ROWS, COLUMNS], "data_offsets": offsets}
            weight_map[name] = file
        text = json.dumps(header).encode()
        text += b" " * (-len(text) % 8)
        with (path / file).open("wb") as opened:
            opened.write(len(text).to_bytes(8, "little") + text)
            opened.truncate(8 + len(text) + len(header) * size)
    index = {"metadata": {"total_size": layers * size}, "weight_map": weight_map}
    (path / "model.safetensors.index.json").write_text(json.dumps(index))
    (path / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')
    return layers * size


@pytest.mark.alone
@pytest.mark.exhaustive
@pytest.mark.skipif(sys.platform != "linux", reason="/proc tells it")
def test_memory_is_flat_from_a_quarter_of_a_gigabyte_to_four(tmp_path: Path) -> None:
    budget, peaks = 64 * MIB, {}
    for layers in (8, 128):
        modules = {
            f"model.layers.{layer}.self_attn.q_proj": (ROWS, COLUMNS) for layer in range(layers)
        }
        root = tmp_path / str(layers)
        size = sparse_base(root / "base", layers, shards=2)
        # The adapter changes eight layers of either, so that only the base is larger.
        changed = dict(list(modules.items())[:: layers // 8])
        adapter = make_adapter(root / "adapter", adapter_tensors(changed, rank=16), r=16)
        if layers == 8:
            local = peak_of(str(root / "base"), adapter, root / "local", budget)
        with serving(root) as server, gcs(is_hollow=True) as stub:
            options = {"google_base_url": stub.url}
            peaks[layers] = peak_of(
                f"{server.url}/base", adapter, "gs://models/out", budget, options
            )
            written = sum(each.count for each in stub.hollows.values())
        assert size <= written < size + (1 << 20)
        # Once, and nothing else.
        read = sum(each.range[1] - each.range[0] for each in server.asked if each.range)
        assert read < size + (1 << 20)
    print({layers: peak >> 20 for layers, peak in peaks.items()}, "local", local >> 20, "MiB")
    # Pieces of bodies on their way come to it.
    assert max(peaks.values()) < local + budget + 24 * MIB
    assert peaks[128] < peaks[8] + 16 * MIB
