"""Time the scan of fleets of adapters against a plain read, NumPy and torch.

    python benches/fleet.py                             # 100, 1000 and 10 000 adapters
    python benches/fleet.py --sizes 20 200 --layers 2   # a quick look
    python benches/fleet.py --directory /mnt/disk --json

Adapters in PEFT's format on all linear layers of a small Llama are made of random numbers, each
with another content. Then, in one run and with a warm page cache, for each size of fleet:

    read          all weights files read from beginning to end, by one thread
    scan          lorafast.scan() in a process of its own: seconds, adapters/s, GB/s, the share of
                  all processors that was busy, and the highest anonymous memory, beside what the
                  tables take of it; at each level of metrics
    again         the same with a cache that knows everything
    one large     one adapter of as many bytes as the smallest fleet: the share that was busy

and on a sample of the adapters, from the file to the figures, in one process:

    numpy, torch  the same statistics: moments of each tensor and of all together, the digest, and
                  the singular values of every update from the R of both factors (no Q is made), in
                  float64, with the figures made of them; norms are held against lorafast's. All
                  three take turns, five times at least; medians are shown
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from inputs import ALL_LINEAR, DTYPES, Shape, make_adapter
from measure import processor, run_process, versions
from rich.console import Console
from rich.table import Table

FILE = "adapter_model.safetensors"
LEVELS = ("full", "spectra", "moments", "headers")
#: Adapters of random numbers; the others are these with other numbers in their first tensor.
DISTINCT = 16

SCAN = """
import json, os, sys, time
import lorafast, numpy
paths, metrics, threads, cache = json.loads(sys.argv[1])
lorafast.scan(paths[:1], metrics=metrics)
begin, busy = time.perf_counter(), time.process_time()
fleet = lorafast.scan(paths, metrics=metrics, threads=threads, cache=cache)
seconds, busy = time.perf_counter() - begin, time.process_time() - busy
tables = sum(fleet.table(name).nbytes for name in ("adapters", "modules", "findings"))
print(json.dumps([len(fleet), fleet.modules.rows, fleet.bytes_read, tables, busy]))
print(seconds)
"""


def make_fleet(folder: Path, count: int, shape: Shape, options: argparse.Namespace) -> None:
    """Adapters of which no two have the same content."""
    folder.mkdir(parents=True)
    kinds = []
    for index in range(min(DISTINCT, count)):
        path = folder / f"adapter-{index:05}"
        modules = ALL_LINEAR.split(",")
        make_adapter(
            path, shape, modules, rank=options.rank, dtype=DTYPES[options.dtype], seed=index
        )
        kinds.append(path)
    random = np.random.default_rng(0)
    for index in range(len(kinds), count):
        source = kinds[index % len(kinds)]
        path = folder / f"adapter-{index:05}"
        path.mkdir()
        shutil.copyfile(source / "adapter_config.json", path / "adapter_config.json")
        content = bytearray((source / FILE).read_bytes())
        start = 8 + int.from_bytes(content[:8], "little")
        # Small exponents in any of the formats, so that nothing becomes infinite.
        content[start : start + 64] = (random.integers(0, 0x38, 64, np.uint8)).tobytes()
        (path / FILE).write_bytes(content)


def read(files: list[Path]) -> float:
    """Seconds to read all files into one buffer."""
    buffer = bytearray(max(file.stat().st_size for file in files))
    begin = time.perf_counter()
    for file in files:
        with file.open("rb", buffering=0) as stream:
            while stream.readinto(buffer):
                pass
    return time.perf_counter() - begin


def scan(
    paths: list[str], metrics: str, options: argparse.Namespace, cache: Path | None = None
) -> dict[str, Any]:
    """One scan in a process of its own."""
    with tempfile.NamedTemporaryFile("w+", suffix=".json") as figures:
        program = SCAN.replace("print(json.dumps(", "open(sys.argv[2], 'w').write(json.dumps(")
        given = json.dumps([paths, metrics, options.threads, None if cache is None else str(cache)])
        command = [sys.executable, "-c", program, given, figures.name]
        run = run_process(command, inner=True)
        adapters, modules, size, tables, busy = json.loads(figures.read())
    seconds = run.inner_seconds or run.seconds
    return {
        "metrics": metrics,
        "adapters": adapters,
        "modules": modules,
        "seconds": seconds,
        "adapters_per_second": adapters / seconds,
        "bytes": size,
        "gigabytes_per_second": size / seconds / 1e9,
        "busy": busy / seconds / (options.threads or os.cpu_count() or 1),
        "anonymous_mb": run.anonymous_mb,
        "tables_mb": tables / 1e6,
    }


def moments(values: Any, library: Any) -> tuple[Any, ...]:
    """What the tables hold of a tensor, in float64; NumPy and torch have the same names for it."""
    finite = values[library.isfinite(values)]
    mean = finite.mean()
    central = finite - mean
    square = central * central
    variance = square.mean()
    skewness = (square * central).mean() / variance**1.5
    kurtosis = (square * square).mean() / variance**2 - 3
    norm = (finite * finite).sum() ** 0.5
    zeros = (finite == 0).sum()
    return mean, variance**0.5, finite.min(), finite.max(), norm, skewness, kurtosis, zeros


def spectrum(left: Any, right: Any, library: Any, scale: float) -> tuple[Any, ...]:
    """The figures of s·B·A from its factors."""
    linalg = library.linalg
    # R alone, which is all that singular values need.
    if library is np:
        first, second = linalg.qr(left, mode="r"), linalg.qr(right.T, mode="r")
        values = linalg.svd(scale * first @ second.T, compute_uv=False)
    else:
        first, second = linalg.qr(left, mode="r").R, linalg.qr(right.T, mode="r").R
        values = linalg.svdvals(scale * first @ second.T)
    square = values * values
    energy = square.sum()
    share = values / values.sum()
    shares = square / energy
    entropy = -(share * library.log(share)).sum()
    energy_entropy = -(shares * library.log(shares)).sum()
    ks = [int((library.cumsum(shares, 0) < part).sum()) + 1 for part in (0.90, 0.95, 0.99)]
    mean = scale * (left.sum(0) @ right.sum(1)) / (left.shape[0] * right.shape[1])
    return (
        energy**0.5,
        values[0],
        energy / square[0],
        library.exp(entropy),
        library.exp(energy_entropy),
        energy * energy / (square * square).sum(),
        *ks,
        values[0] / values[-1],
        mean,
        values,
    )


def other(adapter: Path, framework: str) -> list[float]:
    """The figures of one adapter by NumPy or torch; returns the norms of the updates."""
    from safetensors import safe_open

    config = json.loads((adapter / "adapter_config.json").read_text())
    scale = config["lora_alpha"] / config["r"]
    library: Any = np
    if framework == "pt":
        import torch

        library = torch
    norms = []
    everything = []
    with (adapter / FILE).open("rb") as stream:
        hashlib.file_digest(stream, "sha256").hexdigest()
    with safe_open(adapter / FILE, framework=framework) as file:
        for name in file.keys():  # noqa: SIM118 (no mapping)
            if "lora_A" not in name:
                continue
            pair = [file.get_tensor(name.replace("lora_A", side)) for side in ("lora_A", "lora_B")]
            a, b = [t.double() if library is not np else t.astype(np.float64) for t in pair]
            for tensor in (a, b):
                everything.append(tensor.reshape(-1))
                moments(everything[-1], library)
            norms.append(float(spectrum(b, a, library, scale)[0]))
    join = library.cat if library is not np else library.concatenate
    moments(join(everything), library)
    return norms


def sample(paths: list[Path], options: argparse.Namespace) -> dict[str, Any]:
    """Seconds an adapter by lorafast, NumPy and torch, and whether they agree."""
    import lorafast

    chosen = paths[: options.sample]
    lorafast.scan(chosen[:1])

    ways: dict[str, Callable[[], Any]] = {
        "lorafast": lambda: lorafast.scan(chosen, threads=options.threads)
    }
    frameworks = {"numpy": "np", "torch": "pt"}
    if options.dtype == "bfloat16":
        del frameworks["numpy"]  # which does not know it
    if options.without_torch:
        del frameworks["torch"]
    for name, framework in frameworks.items():
        ways[name] = lambda framework=framework: [other(path, framework) for path in chosen]
    times: dict[str, list[float]] = {name: [] for name in ways}
    found: dict[str, Any] = {}
    # They take turns, so that whatever else the machine does meets all of them.
    for repetition in range(max(options.repetitions, 5) + 1):
        for name, work in ways.items():
            begin = time.perf_counter()
            found[name] = work()
            # The first time, libraries are loaded and threads started.
            if repetition:
                times[name].append((time.perf_counter() - begin) / len(chosen))
    expected = sorted(found["lorafast"].modules["frobenius_norm"].tolist())
    for name in frameworks:
        flat = sorted(norm for each in found[name] for norm in each)
        if not np.allclose(flat, expected, rtol=1e-9):
            sys.exit(f"error: the norms of {name} are not lorafast's")
    return {
        "adapters": len(chosen),
        **{name: {"median": median(own), "least": min(own)} for name, own in times.items()},
    }


def measure(folder: Path, shape: Shape, options: argparse.Namespace) -> dict[str, Any]:
    results: dict[str, Any] = {"fleets": []}
    largest = max(options.sizes)
    make_fleet(folder / "fleet", largest, shape, options)
    paths = sorted((folder / "fleet").iterdir())
    for count in sorted(options.sizes):
        chosen = paths[:count]
        files = [path / FILE for path in chosen]
        read(files)
        plain = min(read(files) for _ in range(options.repetitions))
        size = sum(file.stat().st_size for file in files)
        place = folder / f"links-{count}"
        place.mkdir()
        for path in chosen:
            (place / path.name).symlink_to(path, target_is_directory=True)
        given = [str(place)]
        entry: dict[str, Any] = {
            "adapters": count,
            "bytes": size,
            "read": plain,
            "read_gigabytes_per_second": size / plain / 1e9,
            "levels": [],
        }
        for level in options.levels:
            runs = [scan(given, level, options) for _ in range(options.repetitions)]
            entry["levels"].append(min(runs, key=lambda run: run["seconds"]))
        cache = folder / f"cache-{count}"
        # Files that are younger than two seconds are not remembered.
        time.sleep(2.1)
        entry["with_cache"] = scan(given, "full", options, cache)
        entry["again"] = scan(given, "full", options, cache)
        results["fleets"].append(entry)
    results["sample"] = sample(paths, options)
    wanted = results["fleets"][0]["bytes"]
    one = results["fleets"][0]["bytes"] / min(options.sizes)
    layers = max(1, round(shape.layers * wanted / one))
    deep = Shape(**{**shape.__dict__, "layers": layers})
    modules = ALL_LINEAR.split(",")
    make_adapter(
        folder / "large", deep, modules, rank=options.rank, dtype=DTYPES[options.dtype], seed=1
    )
    read([folder / "large" / FILE])
    runs = [scan([str(folder / "large")], "full", options) for _ in range(options.repetitions)]
    results["large"] = min(runs, key=lambda run: run["seconds"])
    return results


def show(results: dict[str, Any], console: Console) -> None:
    table = Table(title="Scans of fleets")
    for name in ("fleet", "way", "seconds", "adapters/s", "GB/s", "busy", "anonymous", "tables"):
        table.add_column(name, justify="left" if name in ("fleet", "way") else "right")

    def row(fleet: str, way: str, run: dict[str, Any]) -> None:
        table.add_row(
            fleet,
            way,
            f"{run['seconds']:.2f}",
            f"{run['adapters_per_second']:,.0f}",
            # Of headers alone, and of nothing, there is no rate.
            "" if way.endswith(("headers", "from it")) else f"{run['gigabytes_per_second']:.2f}",
            f"{run['busy']:.0%}",
            "–" if run["anonymous_mb"] is None else f"{run['anonymous_mb']:.0f} MB",
            f"{run['tables_mb']:.1f} MB",
        )

    for entry in results["fleets"]:
        name = f"{entry['adapters']:,} adapters, {entry['bytes'] / 1e6:,.0f} MB"
        rate = f"{entry['read_gigabytes_per_second']:.2f}"
        table.add_row(name, "plain read", f"{entry['read']:.2f}", "", rate)
        for run in entry["levels"]:
            row("", f"scan, {run['metrics']}", run)
        row("", "full, into a cache", entry["with_cache"])
        row("", "full, all from it", entry["again"])
        table.add_section()
    row(f"one adapter, {results['large']['bytes'] / 1e6:,.0f} MB", "scan, full", results["large"])
    console.print(table)
    found = results["sample"]
    console.print(f"Same statistics, {found['adapters']} adapters, from the file:")
    for name in ("lorafast", "numpy", "torch"):
        if name in found:
            ratio, least = (
                found[name][key] / found["lorafast"][key] for key in ("median", "least")
            )
            own = f"{found[name]['median'] * 1e3:.2f} ms an adapter"
            times = "" if name == "lorafast" else f", {ratio:.1f} × (of the least: {least:.1f} ×)"
            console.print(f"  {name:8}  {own}{times}")
    fleets = results["fleets"]
    for small, large in pairwise(fleets):
        runs = [fleet["levels"][0] for fleet in (small, large)]
        memory, tables = (runs[1][key] - runs[0][key] for key in ("anonymous_mb", "tables_mb"))
        console.print(
            f"From {small['adapters']:,} to {large['adapters']:,} adapters memory grows by "
            f"{memory:.1f} MB, tables by {tables:.1f} MB: {memory / tables:.2f} ×"
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--sizes", type=int, nargs="+", default=[100, 1000, 10_000])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float16")
    parser.add_argument("--levels", nargs="+", choices=LEVELS, default=list(LEVELS))
    parser.add_argument("--sample", type=int, default=100, help="adapters for NumPy and torch")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--directory", type=Path, help="where to put the adapters for the while")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    shape = Shape(
        hidden=options.hidden,
        layers=options.layers,
        intermediate=options.hidden * 11 // 4,
        heads=8,
        key_value_heads=2,
        vocabulary=1000,
        tied=True,
    )
    folder = Path(tempfile.mkdtemp(prefix="lorafast-bench-", dir=options.directory))
    try:
        results = measure(folder, shape, options)
    finally:
        shutil.rmtree(folder)
    if options.json:
        machine = {
            "processor": processor(),
            "processors": os.cpu_count(),
            "versions": versions(),
            "options": {k: v for k, v in vars(options).items() if k not in ("directory", "json")},
        }
        print(json.dumps({**machine, **results}, indent=2))
    else:
        # As wide as the table where the output is no terminal.
        show(results, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    main()
