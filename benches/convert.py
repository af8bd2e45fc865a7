"""Conversions and merges of kohya's files, each beside what it is held against, in one run.

A conversion of a file of the given size is timed beside `cp` and a SHA-256 of the copy; a merge
from kohya's file beside the same merge from PEFT's. Shown are medians of interleaved runs and
their ratios, and by how much the peak of the memory grows in one that transposes all factors.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
from safetensors.numpy import save_file

WIDTH, RANK = 2048, 64

#: Converts in a process of its own, and prints how many MiB its peak grew by.
PEAK = """
import sys
from pathlib import Path
import lorafast

def peak():
    status = Path("/proc/self/status").read_text()
    return int(status.partition("VmHWM:")[2].split()[0])

source, target, base = sys.argv[1:]
lorafast.inspect(source)
before = peak()
lorafast.convert(source, target, to="mlx", base=base, overwrite=True)
print((peak() - before) / 1024)
"""


def scene(root: Path, megabytes: int) -> tuple[Path, Path, Path]:
    """A base with a layer for each pair of factors, and one adapter of it as PEFT's and kohya's."""
    random = np.random.default_rng(0)
    count = max(1, megabytes * 2**20 // (2 * WIDTH * RANK * 2))
    names = [f"model.layers.{layer}.self_attn.q_proj" for layer in range(count)]
    weight = random.normal(size=(WIDTH, WIDTH)).astype(np.float16)
    base = root / "base"
    base.mkdir()
    save_file({f"{name}.weight": weight for name in names}, base / "model.safetensors")
    (base / "config.json").write_text(json.dumps({"model_type": "llama"}))
    peft, kohya = {}, {}
    for name in names:
        down = random.normal(size=(RANK, WIDTH)).astype(np.float16)
        up = random.normal(size=(WIDTH, RANK)).astype(np.float16)
        peft |= {
            f"base_model.model.{name}.lora_A.weight": down,
            f"base_model.model.{name}.lora_B.weight": up,
        }
        flat = "lora_unet_" + name.replace(".", "_")
        kohya |= {
            f"{flat}.lora_down.weight": down,
            f"{flat}.lora_up.weight": up,
            f"{flat}.alpha": np.array(RANK, np.float32),
        }
    (root / "peft").mkdir()
    save_file(peft, root / "peft" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": ["q_proj"]}
    (root / "peft" / "adapter_config.json").write_text(json.dumps(config))
    save_file(kohya, root / "kohya.safetensors")
    return base, root / "peft", root / "kohya.safetensors"


def copied(source: Path, target: Path) -> None:
    """A copy of a file, and its digest."""
    shutil.copyfile(source, target)
    with target.open("rb") as file:
        hashlib.file_digest(file, "sha256")


def compare(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each way, all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def main() -> None:
    """Time everything and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=160)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--directory", default=None, help="where the files are made")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root = Path(directory)
        base, peft, kohya = scene(root, arguments.megabytes)
        out = root / "out.safetensors"

        def convert(source: Path, to: str, target: Path) -> object:
            name: Any = to
            return lorafast.convert(source, target, to=name, base=base, overwrite=True)

        seconds = compare(
            {
                "cp and SHA-256": lambda: copied(kohya, root / "copy.safetensors"),
                "kohya -> kohya": lambda: convert(kohya, "kohya", out),
                "kohya -> peft": lambda: convert(kohya, "peft", root / "out"),
                "peft -> kohya": lambda: convert(peft, "kohya", out),
            },
            arguments.rounds,
        )
        reference = seconds["cp and SHA-256"]
        for name, own in seconds.items():
            print(f"{name:20} {own:8.3f} s   {own / reference:6.2f} x cp and SHA-256")
        paths = [str(path) for path in (peft, root / "mlx", base)]
        grown = subprocess.run(
            [sys.executable, "-c", PEAK, *paths], check=True, capture_output=True, text=True
        )
        print(f"peft -> mlx          {float(grown.stdout):8.1f} MiB of memory")
        merges = compare(
            {
                "merge from PEFT's": lambda: lorafast.merge(
                    base, peft, root / "merged", overwrite=True, sync=False
                ),
                "merge from kohya's": lambda: lorafast.merge(
                    base, kohya, root / "merged", overwrite=True, sync=False
                ),
            },
            arguments.rounds,
        )
        first = next(iter(merges.values()))
        for name, own in merges.items():
            print(f"{name:20} {own:8.3f} s   {own / first:6.3f} x the first")


if __name__ == "__main__":
    main()
