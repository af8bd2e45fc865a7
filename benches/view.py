"""A merged view beside the merge that writes files: a whole model, and the first tensor.

Both are run in turn, in processes of their own, on a dense model and an adapter on all its linear
layers. What is timed is the merge itself, with `sync=False`, and the loop over `items()`, from
opening base and adapter on; the model lies in the page cache. Shown are medians, and the ratio of
each round's pair.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

from inputs import ALL_LINEAR, Shape, make_adapter, make_checkpoint
from measure import processor, versions, warm

SIZES = {
    "0.2": Shape(1024, 16, 2816, 16, 16, 32000, tied=True),
    "1.2": Shape(2048, 16, 8192, 32, 8, 128256, tied=True),
}

MERGE = """
import sys, time
import lorafast
base, adapter, output = sys.argv[1:]
start = time.perf_counter()
lorafast.merge(base, adapter, output, sync=False, report=False)
print(time.perf_counter() - start)
"""
VIEW = """
import json, sys, time
from pathlib import Path
import torch
import lorafast
base, adapter = sys.argv[1:]
start = time.perf_counter()
with lorafast.open_merged(base, adapter) as merged:
    merged.get_tensor(next(name for name in merged.keys() if "q_proj" in name))
    first = time.perf_counter() - start
start = time.perf_counter()
count = 0
with lorafast.open_merged(base, adapter) as merged:
    for name, value in merged.items():
        count += value.nbytes
whole = time.perf_counter() - start
status = Path("/proc/self/status").read_text()
peak = int(status.partition("VmHWM:")[2].split()[0]) / 1024
print(json.dumps([whole, first, count / 2**20, peak]))
"""


def run(program: str, *arguments: Path) -> str:
    """What a program prints, in a process of its own."""
    command = [sys.executable, "-c", program, *map(str, arguments)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    return done.stdout


def main() -> None:
    """Time everything and print the ratio."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--size", choices=SIZES, default="1.2", help="parameters in billions")
    parser.add_argument("--dtype", choices=("BF16", "F16", "F32"), default="BF16")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", default=None, help="where the files are made")
    arguments = parser.parse_args()
    shape = SIZES[arguments.size]
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root = Path(directory)
        base, adapter, output = root / "base", root / "adapter", root / "out"
        make_checkpoint(base, shape, arguments.dtype, 2)
        targets = ALL_LINEAR.split(",")
        make_adapter(adapter, shape, targets, rank=arguments.rank, dtype="F32", seed=2)
        merges, views, firsts, ratios, peaks = [], [], [], [], []
        size = 0.0
        for _ in range(arguments.rounds):
            warm([base, adapter])
            merges.append(float(run(MERGE, base, adapter, output)))
            shutil.rmtree(output)
            warm([base, adapter])
            whole, first, size, peak = json.loads(run(VIEW, base, adapter))
            views.append(whole)
            firsts.append(first)
            peaks.append(peak)
            ratios.append(whole / merges[-1])
    print(f"{processor()}; {json.dumps(versions())}")
    print(f"{arguments.size} billion parameters, {arguments.dtype}, rank {arguments.rank}")
    print(f"tensors           {size:7.0f} MiB")
    print(f"merge into files  {statistics.median(merges):7.3f} s")
    print(f"items() of a view {statistics.median(views):7.3f} s")
    print(
        f"ratio             {statistics.median(ratios):7.3f}   "
        f"({min(ratios):.3f} to {max(ratios):.3f}; at most 1.25)"
    )
    print(f"first tensor      {statistics.median(firsts):7.3f} s (at most 0.2)")
    print(f"peak of memory    {statistics.median(peaks):7.0f} MiB, Python and torch among it")


if __name__ == "__main__":
    main()
