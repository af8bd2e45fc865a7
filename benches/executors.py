"""A merge by a process pool of two against one worker, each worker with one thread.

The merge is bound by arithmetic: two adapters of a large rank on few large matrices, a shard for
each. The pools are warm (one merge before those that count), the output is not synced, and the ways
take turns. The bytes of all outputs are compared.

python benches/executors.py [--rank 256] [--layers 8] [--rows 4096] [--columns 4096] [--repeats 5]
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import lorafast
import numpy as np
from safetensors.numpy import save_file

PREFIX = "base_model.model."


def scene(root: Path, arguments: argparse.Namespace) -> None:
    """A base of float16 matrices, each a shard, and two adapters of that rank."""
    random = np.random.default_rng(0)
    rows, columns, rank = arguments.rows, arguments.columns, arguments.rank
    names = [f"model.layers.{layer}.mlp.up_proj" for layer in range(arguments.layers)]
    (root / "base").mkdir()
    weights = {}
    for place, name in enumerate(names, 1):
        file = f"model-{place:05}-of-{len(names):05}.safetensors"
        weight = (0.02 * random.standard_normal((rows, columns), np.float32)).astype(np.float16)
        save_file({f"{name}.weight": weight}, root / "base" / file)
        weights[f"{name}.weight"] = file
    index = {"metadata": {"total_size": 2 * rows * columns * len(names)}, "weight_map": weights}
    (root / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (root / "base" / "config.json").write_text('{"model_type": "llama"}')
    for adapter in ("one", "two"):
        (root / adapter).mkdir()
        factors = {}
        for name in names:
            a = random.standard_normal((rank, columns), np.float32) / rank
            b = random.standard_normal((rows, rank), np.float32) / rank
            factors[f"{PREFIX}{name}.lora_A.weight"] = a
            factors[f"{PREFIX}{name}.lora_B.weight"] = b
        save_file(factors, root / adapter / "adapter_model.safetensors")
        config = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": ["up_proj"]}
        (root / adapter / "adapter_config.json").write_text(json.dumps(config))


def content(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.safetensors"))}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawTextHelpFormatter
    )
    parser.add_argument("--rank", type=int, default=256)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rows", type=int, default=4096)
    parser.add_argument("--columns", type=int, default=4096)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--folder", help="where to work (default: the system's temporary folder)")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=arguments.folder) as folder:
        root = Path(folder)
        scene(root, arguments)
        base, adapters = root / "base", [root / "one", root / "two"]
        context = get_context("spawn")
        pools = {
            f"pool of {count}": ProcessPoolExecutor(count, mp_context=context) for count in (1, 2)
        }
        seconds: dict[str, list[float]] = {name: [] for name in (*pools, "no executor, 1 thread")}
        first: dict[str, bytes] = {}
        for repeat in range(arguments.repeats + 1):
            for name, times in seconds.items():
                output = root / "out"
                begin = time.perf_counter()
                lorafast.merge(
                    base,
                    adapters,
                    output,
                    threads=1,
                    sync=False,
                    report=False,
                    executor=pools.get(name),
                )
                if repeat:
                    times.append(time.perf_counter() - begin)
                found = content(output)
                first = first or found
                assert found == first, f"{name} wrote other bytes"
                shutil.rmtree(output)
        for pool in pools.values():
            pool.shutdown()
        for name, times in seconds.items():
            spread = f"{min(times):.2f} to {max(times):.2f}"
            print(f"{name:24} {statistics.median(times):7.2f} s  ({spread})")
        one, two = (statistics.median(seconds[f"pool of {count}"]) for count in (1, 2))
        print(f"two workers are {one / two:.2f} times as fast as one (target: 1.6)")


if __name__ == "__main__":
    main()
