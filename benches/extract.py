"""Extraction of an adapter from two checkpoints, against what it reads and against dense SVDs.

Two models of bfloat16 layers that differ by a low-rank update are made in a temporary folder. Timed
in turn: `lorafast.extract`, reading the bytes of both checkpoints from the warm cache, and, of one
layer, the dense SVD by torch or NumPy and mergekit's extraction by its own functions, where it is
installed. What these would take of all layers is that time times their number, and marked as
extrapolated.

Two things bound an extraction from below: reading both checkpoints, and multiplying. The product of
a difference and k + 8 random columns, and that of its transpose and their basis, are two passes of
2·m·n·(k + 8) operations each, twice as many with a power iteration. The rate of the machine is that
of torch's product of two float32 matrices of 4096 x 4096.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

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


#: How many times faster than mergekit's extraction it is to be, and its share of what bounds it.
TARGET, TARGET_SHARE = 10, 0.5


def mergekit_tasks() -> Any:
    """The module of mergekit's extraction; `None` where it is not installed."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            from mergekit.scripts import extract_lora
    except ImportError:
        return None
    return extract_lora


def by_mergekit(tasks: Any, root: Path, rank: int) -> None:
    """mergekit-extract-lora's steps for one layer, with its defaults but for the rank.

    It takes the difference in the stored type, `torch.linalg.svd` of it in float32 with the default
    driver, and all of the thin factors.
    """
    name = "model.layers.0.mlp.up_proj.weight"
    base, tuned = (
        load_file(root / model / "model.safetensors")[name] for model in ("base", "tuned")
    )
    difference = tasks.TaskVectorTask.execute(None, base, tuned)
    asked = SimpleNamespace(transpose=False, max_rank=rank, sv_epsilon=0, distribute_scale=True)
    tasks.TaskVectorDecompositionTask.execute(asked, difference)


def product_rate(size: int, rounds: int) -> float:
    """Operations a second in the product of two float32 matrices, the best of some."""
    one, other = torch.randn(size, size), torch.randn(size, size)
    seconds = []
    for _ in range(rounds + 1):
        start = time.perf_counter()
        torch.mm(one, other)
        seconds.append(time.perf_counter() - start)
    return 2 * size**3 / min(seconds)


def print_bounds(arguments: argparse.Namespace, reading: float, seconds: float) -> None:
    """What bounds an extraction to the given rank, and its share of that."""
    rate = product_rate(arguments.product, arguments.rounds)
    elements = arguments.layers * arguments.rows * arguments.columns
    print(f"{'float32 product':21} {rate / 1e9:8.1f} GFLOP/s at {arguments.product}³")
    for passes, what in ((2, "at least"), (4, "with a power iteration")):
        operations = passes * 2 * elements * (arguments.rank + 8)
        multiplying = operations / rate
        binds = "reading" if reading > multiplying else "multiplying"
        share = max(reading, multiplying) / seconds
        print(
            f"{passes} passes, {what}: {operations / 1e9:.3g} GFLOP, {multiplying:.2f} s at that "
            f"rate; reading takes {reading:.2f} s; {binds} binds: extract {arguments.rank} has "
            f"{share:.0%} of its rate (≥ {TARGET_SHARE:.0%})"
        )


def main() -> None:
    """Time everything and print seconds, rates and ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--folder", type=Path, default=None, help="where the models are made")
    parser.add_argument("--no-dense", action="store_true", help="leave the dense SVDs out")
    parser.add_argument(
        "--product", type=int, default=4096, help="the size of the product that is timed"
    )
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
            tasks = mergekit_tasks()
            if tasks is None:
                print("mergekit is not installed: its extraction is left out")
            else:
                ways["one layer by mergekit"] = lambda: by_mergekit(tasks, root, arguments.rank)
        times: dict[str, list[float]] = {name: [] for name in ways}
        for _ in range(arguments.rounds):
            for name, way in ways.items():
                start = time.perf_counter()
                way()
                times[name].append(time.perf_counter() - start)
        medians = {name: statistics.median(own) for name, own in times.items()}
        ours = medians[f"extract {arguments.rank}"]
        ratios = {}
        for name, seconds in medians.items():
            if name.startswith("one layer"):
                whole = seconds * arguments.layers
                ratios[name.removeprefix("one layer by ")] = whole / ours
                print(f"{name:21} {seconds:8.2f} s; all layers {whole:.1f} s (extrapolated)")
            else:
                print(f"{name:21} {seconds:8.2f} s, {size / seconds / 1e9:.2f} GB/s of both")
        print_bounds(arguments, medians["read both"], ours)
        if ratios:
            target = {"mergekit": f" (≥ {TARGET})"}
            reached = (
                f"{ratio:,.0f} x faster than {name}{target.get(name, '')}"
                for name, ratio in ratios.items()
            )
            print(f"extract {arguments.rank}, extrapolated: {', '.join(reached)}")


if __name__ == "__main__":
    main()
