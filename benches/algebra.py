"""Combining, resizing and baking adapters of a 7B model's shape, beside what others take.

lorafast is timed from file to file over all 224 modules, in turn with a copy of its inputs. PEFT's
`svd` (a dense decomposition of each module's sum) and the way of kohya's newer scripts
(`torch.svd_lowrank` of each module's dense product, niter 2) are timed on one module of 4096 x 4096
and multiplied by how many there are, larger ones counted by their elements: such figures are
marked as extrapolated.
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
from typing import Any

import lorafast
import numpy as np
from safetensors.numpy import save_file

LAYERS = 32
ATTENTION = ("q_proj", "k_proj", "v_proj", "o_proj")
SHAPES = {
    **{f"self_attn.{name}": (4096, 4096) for name in ATTENTION},
    "mlp.gate_proj": (11008, 4096),
    "mlp.up_proj": (11008, 4096),
    "mlp.down_proj": (4096, 11008),
}


#: How many times faster than the ways of others it is to be.
TARGETS = {"PEFT svd": 100, "svd_lowrank": 20}


def make_adapter(path: Path, rank: int, seed: int, layers: int, dtype: str) -> Path:
    """An adapter whose singular values fall slowly."""
    random = np.random.default_rng(seed)
    decay = (0.97 ** np.arange(rank)).astype(np.float32)
    tensors = {}
    for layer in range(layers):
        for name, (out, inputs) in SHAPES.items():
            prefix = f"base_model.model.model.layers.{layer}.{name}"
            a = random.standard_normal((rank, inputs), dtype=np.float32) / np.sqrt(inputs)
            b = random.standard_normal((out, rank), dtype=np.float32) * decay * 0.02
            tensors[f"{prefix}.lora_A.weight"] = a.astype(dtype)
            tensors[f"{prefix}.lora_B.weight"] = b.astype(dtype)
    path.mkdir()
    save_file(tensors, path / "adapter_model.safetensors")
    config = {
        "peft_type": "LORA",
        "r": rank,
        "lora_alpha": 2 * rank,
        "target_modules": [*ATTENTION, "gate_proj", "up_proj", "down_proj"],
    }
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def in_turn(ways: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """The median seconds of each way, all of them in turn."""
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(rounds):
        for name, way in ways.items():
            start = time.perf_counter()
            way()
            times[name].append(time.perf_counter() - start)
    return {name: statistics.median(own) for name, own in times.items()}


def others(rank: int, target: int) -> dict[str, float]:
    """Seconds of one 4096 x 4096 module the ways of others: PEFT's and kohya's."""
    import torch

    random = torch.Generator().manual_seed(0)
    factors = [
        (torch.randn(4096, rank, generator=random), torch.randn(rank, 4096, generator=random))
        for _ in range(2)
    ]

    def dense() -> object:
        # What `add_weighted_adapter` does by default: all of U and V are made.
        total = sum(b @ a for b, a in factors)
        return torch.linalg.svd(total, full_matrices=True)

    def low_rank() -> object:
        b, a = factors[0]
        return torch.svd_lowrank(b @ a, q=2 * target, niter=2)

    found = {}
    for name, way in (("PEFT svd", dense), ("svd_lowrank", low_rank)):
        start = time.perf_counter()
        way()
        found[name] = time.perf_counter() - start
    return found


def main() -> None:
    """Time everything and print the ratios."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=LAYERS)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--directory", default=None, help="where the files are made")
    parser.add_argument("--without-others", action="store_true", help="time lorafast alone")
    arguments = parser.parse_args()
    rank, layers = arguments.rank, arguments.layers
    with tempfile.TemporaryDirectory(dir=arguments.directory) as directory:
        root = Path(directory)
        one = make_adapter(root / "one", rank, 1, layers, arguments.dtype)
        two = make_adapter(root / "two", rank, 2, layers, arguments.dtype)
        both: list[Any] = [one, two]
        out, options = root / "out", {"overwrite": True}

        def combine(**more: Any) -> object:
            return lorafast.combine(both, out, **options, **more)

        def copy() -> None:
            for path in both:
                shutil.copyfile(path / "adapter_model.safetensors", root / "copy")

        seconds = in_turn(
            {
                "copy of both": copy,
                "combine": lambda: combine(weights=[1, -0.5]),
                "combine, slerp": lambda: combine(method="slerp"),
                f"combine, rank {rank}": lambda: combine(weights=[1, -0.5], rank=rank),
                f"resize to {rank // 2}": lambda: lorafast.resize(
                    one, out, rank=rank // 2, **options
                ),
                "resize, energy 0.9": lambda: lorafast.resize(
                    one, out, rank="energy:0.9", **options
                ),
                "resize, budget": lambda: lorafast.resize(
                    one, out, rank=f"budget:ranks={3 * rank * layers}", **options
                ),
                "bake, folded": lambda: lorafast.bake(one, out, scale="fold", **options),
            },
            arguments.rounds,
        )
        copied = seconds["copy of both"]
        modules = layers * len(SHAPES)
        print(f"{modules} modules, rank {rank}, {arguments.dtype}")
        for name, own in seconds.items():
            print(f"{name:24} {own:8.3f} s   {own / copied:7.2f} x the copy")
        if arguments.without_others:
            return
        elements = sum(out * inputs for out, inputs in SHAPES.values()) / 4096**2
        found = others(rank, rank // 2)
        pairs = {"PEFT svd": f"combine, rank {rank}", "svd_lowrank": f"resize to {rank // 2}"}
        ratios = {}
        for name, own in found.items():
            # An SVD's work grows faster than the elements: this counts too little.
            all_of_it = own * layers * elements
            ratios[name] = all_of_it / seconds[pairs[name]]
            print(f"{name:24} {all_of_it:8.1f} s (extrapolated), beside {pairs[name]}")
        reached = (
            f"{ratios[name]:,.0f} x faster than {name} (≥ {target})"
            for name, target in TARGETS.items()
        )
        print(f"targets, extrapolated: {', '.join(reached)}")


if __name__ == "__main__":
    main()
