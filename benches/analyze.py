"""Time the analysis of an adapter against NumPy and torch doing the same work.

    python benches/analyze.py                       # rank 16 and 64 of a Llama of 7 B parameters
    python benches/analyze.py --layers 4 --ranks 16 --json

Adapters in PEFT's format on all linear layers are made of random numbers. Then, in one run:

    read          the file read from beginning to end into one buffer
    lorafast      lorafast.analyze(): every tensor's statistics and every update's spectrum
    statistics    the same statistics of each tensor and of all together (moments, percentiles,
                  histograms of values and of log10|w|), by NumPy and by torch, in float64
    spectra       lorafast's spectra of a module, and dense singular values of s·B·A by SciPy

NumPy and torch are given tensors that are in memory already. Every time is the best of the
repetitions; the dense singular values are computed once.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
from inputs import ALL_LINEAR, DTYPES, Shape, make_adapter
from lorafast import _core
from lorafast._analysis.api import PERCENTILES
from measure import processor, versions
from rich.console import Console
from rich.table import Table
from safetensors import safe_open

BINS = 50
SEVEN_BILLION = Shape(
    hidden=4096,
    layers=32,
    intermediate=11008,
    heads=32,
    key_value_heads=32,
    vocabulary=32000,
    tied=False,
)


def best(work: Callable[[], object], repetitions: int) -> float:
    """The shortest of several times, in seconds."""
    times = []
    for _ in range(repetitions):
        begin = time.perf_counter()
        work()
        times.append(time.perf_counter() - begin)
    return min(times)


def read(path: Path) -> None:
    with path.open("rb", buffering=0) as file:
        buffer = bytearray(path.stat().st_size)
        view = memoryview(buffer)
        done = 0
        while done < len(buffer):
            done += file.readinto(view[done : done + (1 << 24)])


def numpy_statistics(values: np.ndarray[Any, Any]) -> None:
    wide = values.ravel().astype(np.float64)
    finite = wide[np.isfinite(wide)]
    central = finite - finite.mean()
    square = central * central
    variance = square.mean()
    _ = (square * central).mean() / variance**1.5
    _ = (square * square).mean() / variance**2 - 3
    _ = finite.min(), finite.max(), np.abs(finite).sum(), np.linalg.norm(finite)
    _ = np.count_nonzero(finite == 0)
    np.percentile(finite, PERCENTILES)
    np.histogram(finite, BINS)
    np.histogram(np.log10(np.abs(finite) + 1e-8), BINS)


def torch_statistics(values: Any) -> None:
    import torch

    wide = values.flatten().double()
    finite = wide[torch.isfinite(wide)]
    central = finite - finite.mean()
    square = central * central
    variance = square.mean()
    _ = (square * central).mean() / variance**1.5
    _ = (square * square).mean() / variance**2 - 3
    _ = finite.min(), finite.max(), finite.abs().sum(), finite.norm()
    _ = torch.count_nonzero(finite == 0)
    # torch.quantile refuses more than 2²⁴ values; sorting is what it does.
    ordered = torch.sort(finite).values
    _ = [ordered[int(q / 100 * (len(ordered) - 1))] for q in PERCENTILES]
    torch.histc(finite, BINS)
    torch.histc(torch.log10(finite.abs() + 1e-8), BINS)


def load(path: Path, framework: str) -> list[Any]:
    with safe_open(path, framework=framework) as file:
        return [file.get_tensor(name) for name in file.keys()]  # noqa: SIM118 (no mapping)


def statistics_of(tensors: list[Any], describe: Callable[[Any], None], join: Any) -> None:
    for tensor in tensors:
        describe(tensor)
    describe(join([tensor.ravel() for tensor in tensors]))


def measure(folder: Path, shape: Shape, rank: int, options: argparse.Namespace) -> dict[str, Any]:
    adapter = folder / f"rank-{rank}"
    dtype = DTYPES[options.dtype]
    make_adapter(adapter, shape, ALL_LINEAR.split(","), rank=rank, dtype=dtype, seed=rank)
    file = adapter / "adapter_model.safetensors"
    size = file.stat().st_size
    result: dict[str, Any] = {"rank": rank, "bytes": size}
    repeat = options.repetitions
    result["read"] = best(lambda: read(file), repeat)
    result["lorafast"] = best(lambda: lorafast.analyze(adapter, threads=options.threads), repeat)
    result["core"] = best(
        lambda: _core.analyze_adapter(
            adapter,
            None,
            base=None,
            percentiles=PERCENTILES,
            bins=BINS,
            entries=False,
            threads=options.threads,
            progress=None,
        ),
        repeat,
    )
    result["numpy"] = result["torch"] = None
    # NumPy knows no bfloat16.
    if options.dtype != "bfloat16":
        tensors = load(file, "numpy")
        result["numpy"] = best(lambda: statistics_of(tensors, numpy_statistics, np.concatenate), 1)
        del tensors
    if not options.without_torch:
        import torch

        if options.threads is not None:
            torch.set_num_threads(options.threads)
        tensors = load(file, "pt")
        result["torch"] = best(lambda: statistics_of(tensors, torch_statistics, torch.cat), 1)
        del tensors
    result["spectrum"], result["svdvals"] = one_module(folder, shape, rank, options)
    return result


def one_module(
    folder: Path, shape: Shape, rank: int, options: argparse.Namespace
) -> tuple[float, float]:
    """Seconds of an attention module's spectrum: of its factors, and of the dense product."""
    import scipy.linalg

    single = Shape(**{**shape.__dict__, "layers": 1})
    path = folder / f"module-{rank}"
    make_adapter(path, single, ["q_proj"], rank=rank, dtype="F32", seed=1)
    analysed = best(
        lambda: _core.analyze_adapter(
            path,
            None,
            base=None,
            percentiles=[],
            bins=1,
            entries=False,
            threads=options.threads,
            progress=None,
        ),
        options.repetitions,
    )
    a, b = load(path / "adapter_model.safetensors", "numpy")
    update = 2.0 * (b.astype(np.float64) @ a.astype(np.float64))
    begin = time.perf_counter()
    expected = scipy.linalg.svdvals(update, check_finite=False)[:rank]
    dense = time.perf_counter() - begin
    (module,) = lorafast.analyze(path).modules.values()
    if not np.allclose(module.singular_values, expected, rtol=1e-6):
        sys.exit("error: the spectra disagree")
    # The analysis of the module includes the statistics of its tensors.
    return analysed, dense


def show(results: list[dict[str, Any]], console: Console) -> None:
    table = Table(title="Analysis of an adapter on all linear layers of a 7 B shape")
    for name in ("", *(f"rank {result['rank']}" for result in results)):
        table.add_column(name, justify="right" if name else "left")

    def row(name: str, text: Callable[[dict[str, Any]], str]) -> None:
        table.add_row(name, *(text(result) for result in results))

    def seconds(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: "–" if r[key] is None else f"{r[key]:.3f} s"

    def rate(key: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: f"{r['bytes'] / r[key] / 1e9:.2f} GB/s"

    def ratio(slow: str, fast: str) -> Callable[[dict[str, Any]], str]:
        return lambda r: "–" if r[slow] is None else f"{r[slow] / r[fast]:.1f} ×"

    row("file", lambda r: f"{r['bytes'] / 1e6:.0f} MB")
    row("plain read", seconds("read"))
    row("", rate("read"))
    row("lorafast.analyze, statistics and spectra", seconds("lorafast"))
    row("  of that the core", seconds("core"))
    row("  core", rate("core"))
    row("NumPy, statistics only", seconds("numpy"))
    row("  over lorafast.analyze", ratio("numpy", "lorafast"))
    row("torch, statistics only", seconds("torch"))
    row("  over lorafast.analyze", ratio("torch", "lorafast"))
    row("one module, lorafast", lambda r: f"{r['spectrum'] * 1e3:.2f} ms")
    row("one module, dense svdvals", seconds("svdvals"))
    row("  over lorafast", ratio("svdvals", "spectrum"))
    console.print(table)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--ranks", type=int, nargs="+", default=[16, 64])
    parser.add_argument("--layers", type=int, default=SEVEN_BILLION.layers)
    parser.add_argument("--hidden", type=int, default=SEVEN_BILLION.hidden)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--without-torch", action="store_true")
    parser.add_argument("--directory", type=Path, help="where to put the adapters for the while")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    options = parser.parse_args()
    shape = Shape(**{**SEVEN_BILLION.__dict__, "layers": options.layers, "hidden": options.hidden})
    folder = Path(tempfile.mkdtemp(prefix="lorafast-bench-", dir=options.directory))
    try:
        results = [measure(folder, shape, rank, options) for rank in options.ranks]
    finally:
        shutil.rmtree(folder)
    if options.json:
        machine = {"processor": processor(), "versions": versions()}
        print(json.dumps({**machine, "dtype": options.dtype, "results": results}, indent=2))
    else:
        show(results, Console())


if __name__ == "__main__":
    main()
