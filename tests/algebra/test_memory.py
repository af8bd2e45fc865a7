"""What computations with adapters hold: the factors of the modules in work, and not all of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from support.algebra import write_lora

pytestmark = [
    pytest.mark.alone,
    pytest.mark.skipif(sys.platform != "linux", reason="a peak of the memory is asked of Linux"),
]

WIDTH, RANK = 2048, 64
#: What the larger adapter may take beyond the smaller one, of which every module is in work.
BOUND = 24 << 20

#: Computes with a small adapter, then with a large one, and prints by how many bytes the peak grew.
PROGRAM = """
import json, sys
from pathlib import Path
import lorafast

verb, adapters = sys.argv[1], sys.argv[2:4]

# Of this process alone: what getrusage tells begins with its parent's.
def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024

grown = []
for adapter in adapters:
    before = peak()
    output = f"{adapter}-{verb}"
    if verb == "combine":
        lorafast.combine([adapter, adapter], output, weights=[1, 0.5], threads=2)
    elif verb == "resize":
        lorafast.resize(adapter, output, rank="energy:0.9", threads=2)
    elif verb == "budget":
        lorafast.resize(adapter, output, rank="budget:ranks=300", threads=2)
    else:
        lorafast.bake(adapter, output, gauge="orthonormal", scale="fold", threads=2)
    grown.append(peak() - before)
print(grown[1])
"""


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("memory")
    random = np.random.default_rng(0)
    factors = (
        random.standard_normal((WIDTH, RANK), dtype=np.float32),
        random.standard_normal((RANK, WIDTH), dtype=np.float32),
    )
    # 8 MB, and 256 MB.
    return [
        write_lora(
            folder / str(count),
            {f"model.layers.{layer}.self_attn.q_proj": factors for layer in range(count)},
            alpha=RANK,
        )
        for count in (8, 256)
    ]


@pytest.mark.parametrize("verb", ["combine", "resize", "budget", "bake"])
def test_memory_does_not_grow_with_the_adapter(adapters: list[Path], verb: str) -> None:
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM, verb, *map(str, adapters)],
        capture_output=True,
        text=True,
        check=False,
        # Arenas of threads that come and go are no memory of a computation.
        env={**os.environ, "MALLOC_ARENA_MAX": "2"},
    )
    assert result.returncode == 0, result.stderr
    assert int(json.loads(result.stdout)) < BOUND
