"""Memory of merges from stores: the budget, and what a merge of local files takes."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
from support.handmade import adapter_tensors, make_adapter, make_base
from support.range_server import serving

MIB = 1 << 20
ROWS, COLUMNS = 4096, 4096
PROGRAM = """
import sys, threading, time, lorafast
peak = 0
def look():
    global peak
    while True:
        for line in open("/proc/self/status"):
            if line.startswith("RssAnon"):
                peak = max(peak, int(line.split()[1]) << 10)
        time.sleep(0.005)
threading.Thread(target=look, daemon=True).start()
lorafast.merge(*sys.argv[1:4], io_memory=int(sys.argv[4]), sync=False)
print(peak)
"""


def peak_of(base: str, adapter: Path, output: Path, io_memory: int) -> int:
    """The most memory of its own that a merge takes, in bytes."""
    arguments = [base, str(adapter), str(output), str(io_memory)]
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", PROGRAM, *arguments],
        check=True,
        capture_output=True,
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
