"""Extraction of an adapter from two checkpoints, against what it reads and against dense SVDs.

Two models of bfloat16 layers that differ by a low-rank update are made in a temporary folder. Timed
in turn: `lorafast.extract`, reading the bytes of both checkpoints from the warm cache, and the
dense SVD of one layer by torch or NumPy. What the dense SVD of all layers would take is that time
times their number, and marked as extrapolated.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import lorafast
import numpy as np
import torch
from safetensors.torch import load_file, save_file


def scene(root: Path, layers: int, rows: int, columns: int, rank: int) -> None:
    """The two models, of which the tuned one is the other and an update of that rank."""
    generator = torch.Generator().manual_seed(0)
    base, tuned = {}, {}
    for layer in range(layers):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        weight = (0.02 * torch.randn(rows, columns, generator=generator)).bfloat16()
        left = torch.randn(rows, rank, generator=generator)
        right = torch.randn(rank, columns, generator=generator)
        update = left @ right
        update *= 7.2e-4 / update.square().mean().sqrt()
        base[name], tuned[name] = weight, (weight.float() + update).bfloat16()
    for model, tensors in (("base", base), ("tuned", tuned)):
        (root / model).mkdir()
        save_file(tensors, root / model / "model.safetensors")
        (root / model / "config.json").write_text(json.dumps({"model_type": "llama"}))


def read(paths: list[Path]) -> None:
    """Read files in pieces, as a copy does."""
    piece = bytearray(1 << 22)
    for path in paths:
        with path.open("rb", buffering=0) as file:
            while file.readinto(piece):
                pass


def dense(root: Path, rank: int, *, by_torch: bool) -> None:
    """The straightforward way for one layer: the whole SVD of the difference, cut."""
    name = "model.layers.0.mlp.up_proj.weight"
    base, tuned = (
        load_file(root / model / "model.safetensors")[name] for model in ("base", "tuned")
    )
    difference = tuned.float() - base.float()
    if by_torch:
        left, sigma, right = torch.linalg.svd(difference, full_matrices=False)
        _ = left[:, :rank] * sigma[:rank], right[:rank]
    else:
        left, sigma, right = np.linalg.svd(difference.numpy(), full_matrices=False)
        _ = left[:, :rank] * sigma[:rank], right[:rank]


def main() -> None:
    """Time everything and print seconds and rates."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the models are made")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense SVDs out")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        scene(root, arguments.layers, arguments.rows, arguments.columns, arguments.rank)
        files = [root / model / "model.safetensors" for model in ("base", "tuned")]
        size = sum(file.stat().st_size for file in files)

        def extract(rank: int | str) -> None:
            shutil.rmtree(root / "out", ignore_errors=True)
            lorafast.extract(root / "tuned", root / "base", root / "out", rank=rank)

        ways: dict[str, Callable[[], None]] = {
            "read both": lambda: read(files),
            "extract auto": lambda: extract("auto"),
            f"extract {arguments.rank}": lambda: extract(arguments.rank),
        }
        if not arguments.no_dense:
            ways["one layer by torch"] = lambda: dense(root, arguments.rank, by_torch=True)
            ways["one layer by NumPy"] = lambda: dense(root, arguments.rank, by_torch=False)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
        for name, own in times.items():
            seconds = statistics.median(own)
            if name.startswith("one layer"):
                whole = seconds * arguments.layers
                print(f"{name:20} {seconds:8.2f} s; all layers {whole:.1f} s (extrapolated)")
            else:
                print(f"{name:20} {seconds:8.2f} s, {size / seconds / 1e9:.2f} GB/s of both")


if __name__ == "__main__":
    main()
