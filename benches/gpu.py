"""Times the torch backend on a device: live merges, swaps, file merges, and similarities.

    python benches/gpu.py                                  # CUDA, a Llama of 8 B
    python benches/gpu.py --device cpu --layers 1 --hidden 256 --intermediate 512 --count 8

One run builds its inputs of random numbers, checks results against float64, and times. Work on
the device is timed with CUDA events, after a warm-up, over input sets that together are larger
than the second-level cache; what reads files is timed by the clock, until everything is done. On
the CPU the same code runs, to show that it does: its figures say nothing of a GPU.
"""

from __future__ import annotations

import argparse
import json
import math
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import lorafast
import lorafast.torch
import measure
import numpy as np
import torch
from lorafast._torch import in_place
from lorafast._torch.device import exact_products, without_cuda
from safetensors.torch import save_file

PREFIX = "base_model.model."
PARTS = ("merge", "swap", "files", "similarity")


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--device", default="cuda", help="cuda, cuda:N or cpu (default: cuda)")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--hidden", type=int, default=4096)
    parser.add_argument("--intermediate", type=int, default=14336)
    parser.add_argument("--key-value", type=int, help="outputs of k_proj (default: hidden / 4)")
    parser.add_argument("--layers", type=int, default=32)
    parser.add_argument("--ranks", type=int, nargs="+", default=[8, 16, 64, 256])
    parser.add_argument("--file-layers", type=int, default=8, help="layers of the merged files")
    parser.add_argument("--count", type=int, default=1000, help="adapters of the similarity")
    parser.add_argument("--similarity-layers", type=int, default=4)
    parser.add_argument("--repetitions", type=int, default=5)
    parser.add_argument("--folder", help="where inputs are written (default: a temporary one)")
    parser.add_argument("--json", help="write all figures to a file")
    return parser.parse_args()


# Timing


class Clock:
    """Times work on a device: by its own events, or on the CPU by the clock."""

    def __init__(self, device: torch.device) -> None:
        self.device = device

    def wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)

    def once(self, work: Callable[[], object]) -> float:
        self.wait()
        if self.device.type != "cuda":
            begin = time.perf_counter()
            work()
            return time.perf_counter() - begin
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1e3

    def median(self, work: Callable[[], object], repetitions: int) -> float:
        work()
        return statistics.median(self.once(work) for _ in range(repetitions))

    def wall(self, work: Callable[[], object]) -> float:
        self.wait()
        begin = time.perf_counter()
        work()
        self.wait()
        return time.perf_counter() - begin


def copy_bandwidth(clock: Clock, like: list[torch.Tensor], repetitions: int) -> float:
    """Bytes read and written a second, copying tensors of these shapes one after the other."""
    targets = [torch.empty_like(each) for each in like]

    def copy() -> None:
        for source, target in zip(like, targets, strict=True):
            target.copy_(source)

    size = sum(each.numel() * each.element_size() for each in like)
    return 2 * size / clock.median(copy, repetitions)


def links(clock: Clock, folder: Path) -> dict[str, float]:
    """Bytes a second: up to the device, down from it, and into the file system with a sync."""
    size = 256 << 20
    found = {}
    if clock.device.type == "cuda":
        host = torch.empty(size, dtype=torch.uint8, pin_memory=True)
        there = torch.empty(size, dtype=torch.uint8, device=clock.device)
        found["host to device"] = size / clock.median(lambda: there.copy_(host, True), 5)
        found["device to host"] = size / clock.median(lambda: host.copy_(there, True), 5)
    path = folder / "written"
    content = np.random.default_rng(0).bytes(size)

    def write() -> None:
        import os

        with path.open("wb") as file:
            file.write(content)
            os.fsync(file.fileno())

    found["file system"] = size / clock.wall(write)
    path.unlink()
    return found


# Inputs


def shapes(options: argparse.Namespace) -> dict[str, tuple[int, int]]:
    hidden, inner = options.hidden, options.intermediate
    key_value = options.key_value or hidden // 4
    return {
        "q_proj": (hidden, hidden),
        "k_proj": (key_value, hidden),
        "v_proj": (key_value, hidden),
        "o_proj": (hidden, hidden),
        "gate_proj": (inner, hidden),
        "up_proj": (inner, hidden),
        "down_proj": (hidden, inner),
    }


def module(options: argparse.Namespace, layers: int, device: torch.device) -> torch.nn.Module:
    """Layers of random bfloat16 weights, as plain modules."""
    torch.manual_seed(0)
    model = torch.nn.ModuleDict()
    for layer in range(layers):
        part = torch.nn.ModuleDict()
        for name, (outputs, inputs) in shapes(options).items():
            linear = torch.nn.Linear(inputs, outputs, bias=False, device="meta")
            weight = torch.empty(outputs, inputs, dtype=torch.bfloat16, device=device)
            linear.weight = torch.nn.Parameter(weight.normal_(std=0.02), requires_grad=False)
            part[name] = linear
        model[str(layer)] = part
    return model


def adapter(
    path: Path, modules: dict[str, tuple[int, int]], rank: int, seed: int, **settings: Any
) -> Path:
    """A random adapter in PEFT's format, float32 factors."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for name, (outputs, inputs) in modules.items():
        a = torch.randn(rank, inputs, generator=generator) / math.sqrt(inputs)
        b = torch.randn(outputs, rank, generator=generator) * 0.02
        tensors[f"{PREFIX}{name}.lora_A.weight"] = a.to(settings.get("dtype", torch.float32))
        tensors[f"{PREFIX}{name}.lora_B.weight"] = b.to(settings.get("dtype", torch.float32))
    path.mkdir(parents=True)
    save_file(tensors, path / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": rank, "lora_alpha": 2 * rank, "bias": "none"}
    config["target_modules"] = sorted({name.rpartition(".")[2] for name in modules})
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def modules_of(options: argparse.Namespace, layers: int) -> dict[str, tuple[int, int]]:
    return {
        f"{at}.{name}": shape for at in range(layers) for name, shape in shapes(options).items()
    }


def check(model: torch.nn.Module, before: torch.Tensor, path: Path, name: str) -> None:
    """Some rows of a merged weight are the float64 sum to within a unit in the last place."""
    from safetensors import safe_open

    with safe_open(path / "adapter_model.safetensors", "pt") as file:
        a, b = (file.get_tensor(f"{PREFIX}{name}.lora_{side}.weight").double() for side in "AB")
    rows = slice(0, len(before))
    exact = before.double().cpu() + 2 * (b[rows] @ a)
    got = model.get_parameter(f"{name}.weight")[rows].double().cpu()
    assert got.isfinite().all(), "NaN or infinity"
    unit = 2.0 ** (exact.abs().clamp(min=1e-30).log2().floor() - 7)
    # Where the terms cancel, a float32 sum is off by its own rounding of the terms.
    noise = 2.0**-22 * (before.double().cpu().abs() + 2 * (b[rows].abs() @ a.abs()))
    worst = ((got - exact).abs() / (unit + noise)).max().item()
    assert worst <= 1.0, f"{name}: {worst} times a unit in the last place away"


# Parts


def time_merges(options: argparse.Namespace, folder: Path, clock: Clock) -> list[dict[str, Any]]:
    model = module(options, options.layers, clock.device)
    weights = [parameter.detach() for parameter in model.parameters()]
    size = sum(weight.numel() * weight.element_size() for weight in weights)
    if clock.device.type == "cuda":
        cache = torch.cuda.get_device_properties(clock.device).L2_cache_size
        assert size > 4 * cache, f"{size} bytes of weights fit the cache of {cache}: more layers"
    bandwidth = copy_bandwidth(clock, weights, options.repetitions)
    results = []
    name = "0.q_proj"
    for rank in options.ranks:
        path = adapter(folder / f"rank{rank}", modules_of(options, options.layers), rank, rank)
        before = model.get_parameter(f"{name}.weight")[:64].clone()
        handles = []
        whole = clock.wall(
            lambda path=path, handles=handles: handles.append(
                lorafast.torch.merge_into(model, path, keep=None)
            )
        )
        (handle,) = handles
        check(model, before, path, name)
        handle.unmerge()
        plan = lorafast.torch.merge_into(model, path, keep=None)
        changed = plan._changed

        def apply(changed: Any = changed) -> None:
            for each in changed:
                in_place.apply(each, each.tensor)

        with exact_products(clock.device):
            seconds = clock.median(apply, options.repetitions)
        plan._changed, plan.active = [], False
        with torch.no_grad():
            for weight in weights:
                weight.normal_(std=0.02)
        theirs = time_peft(model, options, rank, clock)
        results.append(
            {
                "rank": rank,
                "bytes": size,
                "seconds": seconds,
                "whole_call_seconds": whole,
                "share_of_copy": 2 * size / seconds / bandwidth,
                "copy_bytes_per_second": bandwidth,
                "fused": all(each.program.fused for each in changed),
                "peft_seconds": theirs,
                "over_peft": theirs / seconds,
            }
        )
        print(
            f"merge, rank {rank}: {seconds * 1e3:.1f} ms for {size / 1e9:.2f} GB of weights, "
            f"{results[-1]['share_of_copy']:.0%} of the copy's {bandwidth / 1e9:.0f} GB/s; PEFT "
            f"{theirs * 1e3:.1f} ms, {theirs / seconds:.1f} times; the whole call {whole:.2f} s"
        )
    return results


def time_peft(
    model: torch.nn.Module, options: argparse.Namespace, rank: int, clock: Clock
) -> float:
    """PEFT's `merge_adapter` on the same weights."""
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(
        r=rank, lora_alpha=2 * rank, target_modules=list(shapes(options)), init_lora_weights=False
    )
    wrapped = get_peft_model(model, config)
    seconds = []
    for _ in range(max(2, options.repetitions)):
        seconds.append(clock.once(wrapped.merge_adapter))
        wrapped.unmerge_adapter()
    wrapped.unload()
    return statistics.median(seconds[1:])


def time_swaps(options: argparse.Namespace, folder: Path, clock: Clock) -> list[dict[str, Any]]:
    results = []
    rank = options.ranks[0]
    modules = modules_of(options, options.layers)
    paths = [adapter(folder / f"swap{seed}", modules, rank, seed) for seed in (1, 2)]
    for keep in ("device", None):
        model = module(options, options.layers, clock.device)
        before = model.get_parameter("0.q_proj.weight")[:64].clone()
        handle = lorafast.torch.merge_into(model, paths[0], keep=keep)
        seconds = []
        for turn in range(2 * max(1, options.repetitions // 2)):
            other = paths[1 - turn % 2]
            seconds.append(clock.wall(partial(handle.swap, other)))
        if keep is not None:
            check(model, before, paths[0], "0.q_proj")
        results.append({"rank": rank, "keep": keep, "seconds": statistics.median(seconds)})
        print(f"swap, rank {rank}, keep={keep}: {statistics.median(seconds) * 1e3:.0f} ms")
    return results


def time_files(options: argparse.Namespace, folder: Path, clock: Clock) -> dict[str, Any]:
    layers, rank = options.file_layers, options.ranks[0]
    base = folder / "base"
    base.mkdir()
    model = module(options, layers, torch.device("cpu"))
    save_file(dict(model.state_dict()), base / "model.safetensors")
    size = (base / "model.safetensors").stat().st_size
    path = adapter(folder / "files", modules_of(options, layers), rank, 7)
    device = options.device if clock.device.type == "cuda" else "torch:cpu"
    seconds: dict[str, list[float]] = {"cpu": [], device: []}
    for _ in range(max(2, options.repetitions // 2)):
        for name, times in seconds.items():
            output = folder / name.replace(":", "-")
            shutil.rmtree(output, ignore_errors=True)
            times.append(
                clock.wall(
                    lambda name=name, output=output: lorafast.merge(base, path, output, device=name)
                )
            )
    outcome = lorafast.verify(base, path, folder / device.replace(":", "-"))
    assert outcome.ok, outcome.problems
    speeds = links(clock, folder)
    slowest = min(speeds, key=lambda link: speeds[link])
    best = {name: min(times) for name, times in seconds.items()}
    result = {
        "rank": rank,
        "bytes": size,
        "seconds": best,
        "links_bytes_per_second": speeds,
        "share_of_slowest_link": size / best[device] / speeds[slowest],
    }
    print(
        f"files, rank {rank}, {size / 1e9:.2f} GB: {device} {best[device]:.2f} s, the CPU's "
        f"backend {best['cpu']:.2f} s; {result['share_of_slowest_link']:.0%} of the slowest link "
        f"({slowest}, {speeds[slowest] / 1e9:.2f} GB/s)"
    )
    return result


def time_similarity(options: argparse.Namespace, folder: Path, clock: Clock) -> dict[str, Any]:
    rank, count = 16, options.count
    hidden = options.hidden
    modules = {
        f"{layer}.{name}": (hidden, hidden)
        for layer in range(options.similarity_layers)
        for name in ("q_proj", "k_proj", "v_proj")
    }
    for seed in range(count):
        adapter(folder / "fleet" / f"{seed:05}", modules, rank, seed, dtype=torch.bfloat16)
    device = options.device if clock.device.type == "cuda" else "torch:cpu"
    found = {}
    result: dict[str, Any] = {"count": count, "rank": rank, "modules": len(modules), "seconds": {}}
    for name in ("cpu", device):
        seconds = clock.wall(
            lambda name=name: found.update(
                {name: lorafast.similarity(folder / "fleet", device=name, precision="float32")}
            )
        )
        result["seconds"][name] = seconds
        print(f"similarity of {count} adapters, {len(modules)} modules, {name}: {seconds:.2f} s")
    apart = np.abs(found["cpu"].matrix - found[device].matrix).max()
    assert apart < 1e-5, f"the cosines differ by {apart}"
    return result


def main() -> None:
    options = arguments()
    if options.device.startswith("cuda"):
        problem = without_cuda(torch)
        if problem is not None:
            sys.exit(
                f"error: {problem}: there is no GPU to time; a small functional run is\n  python "
                "benches/gpu.py --device cpu --layers 1 --hidden 256 --intermediate 512 "
                "--file-layers 1 --similarity-layers 1 --count 8"
            )
    clock = Clock(torch.device(options.device))
    if clock.device.type == "cuda":
        torch.cuda.set_device(clock.device)
    where = measure.processor()
    if clock.device.type == "cuda":
        where = torch.cuda.get_device_name(clock.device)
    else:
        print(
            "No GPU: a functional run of the same code on the CPU; its figures say nothing of one."
        )
    print(f"{where}; {measure.versions()}")
    figures: dict[str, Any] = {"device": where, "versions": measure.versions()}
    work = {
        "merge": time_merges,
        "swap": time_swaps,
        "files": time_files,
        "similarity": time_similarity,
    }
    for part in options.parts:
        with tempfile.TemporaryDirectory(dir=options.folder, prefix="gpu-") as folder:
            figures[part] = work[part](options, Path(folder), clock)
    if options.json:
        Path(options.json).write_text(json.dumps(figures, indent=2))


if __name__ == "__main__":
    main()
