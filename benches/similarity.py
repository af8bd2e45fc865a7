"""Time the products of N adapters with each other against NumPy's on a BLAS.

    python benches/similarity.py                # 128, 256 and 512 adapters of rank 16; two minutes
    python benches/similarity.py --hidden 4096 --layers 2 --float64 --gemm      # half an hour
    python benches/similarity.py --counts 32 64 --hidden 1024                   # short

Adapters in PEFT's format on all linear layers, of one rank, are made of random numbers. Then, in
one run and on the same number of threads:

    peak       what the processor can do: benches/peak.rs, fused multiply-adds on registers alone,
               compiled by rustc and run before and after; the best counts
    lorafast   lorafast.similarity()
    NumPy      the same algebra: X @ Xᵀ of the stacked factors of a module (which is BLAS's syrk),
               with --gemm also X @ Yᵀ with a copy; the element-wise product of both sides; the
               sums over blocks

Both are timed twice. "Products alone" starts with factors that are stacked, in memory and in
float32, and ends with the inner products; "from the files" also finds, opens, reads, widens and
stacks them, and ends with the cosines.

FLOP/s count what has to be done, N²r²(m + n) operations a module with one side of the diagonal.
Each figure is the best of the repetitions, which take turns; every one comes from a process of its
own, of which the highest anonymous memory is shown: lorafast's is bounded by --memory, and the
result. Variables that choose a kernel of OpenBLAS are removed from the
environment of NumPy's; which one it took is shown where threadpoolctl is installed.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from ceilings import compile_peak
from inputs import ALL_LINEAR, DTYPES, Noise, Shape, write_safetensors
from measure import processor, run_process, versions
from rich.console import Console
from rich.table import Table

#: They make OpenBLAS take another kernel than the processor's own.
KERNEL_CHOICES = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_VERBOSE")
PREFIX = "base_model.model.model.layers"


def shape_of(options: argparse.Namespace) -> Shape:
    """A Llama of 7 B parameters, or a smaller one of the same proportions."""
    hidden = options.hidden
    return Shape(
        hidden=hidden,
        layers=options.layers,
        intermediate=hidden * 11008 // 4096,
        heads=32,
        key_value_heads=32,
        vocabulary=32000,
        tied=False,
    )


def modules_of(shape: Shape) -> dict[str, tuple[int, int]]:
    wanted = ALL_LINEAR.split(",")
    return {
        f"{PREFIX}.{layer}.{name}": extents
        for layer in range(shape.layers)
        for name, extents in shape.linear().items()
        if name.split(".")[-1] in wanted
    }


def make(folder: Path, count: int, options: argparse.Namespace) -> None:
    modules = modules_of(shape_of(options))
    noise = Noise(DTYPES[options.dtype], 1)
    config = {
        "peft_type": "LORA",
        "base_model_name_or_path": "made",
        "r": options.rank,
        "lora_alpha": 2 * options.rank,
    }
    for number in range(count):
        path = folder / f"a{number:05}"
        path.mkdir(parents=True)
        tensors: dict[str, tuple[int, ...]] = {}
        for name, (rows, columns) in modules.items():
            tensors[f"{name}.lora_A.weight"] = (options.rank, columns)
            tensors[f"{name}.lora_B.weight"] = (rows, options.rank)
        write_safetensors(path / "adapter_model.safetensors", tensors, DTYPES[options.dtype], noise)
        (path / "adapter_config.json").write_text(json.dumps(config))


# The two ways, each in a process of its own


def by_lorafast(folder: Path, count: int, options: argparse.Namespace) -> Any:
    import lorafast

    paths = [folder / f"a{number:05}" for number in range(count)]
    begin = time.perf_counter()
    found = lorafast.similarity(
        paths, precision=options.precision, threads=options.threads, memory=options.memory
    )
    whole = time.perf_counter() - begin
    options.result.with_suffix(".whole").write_text(str(whole))
    return found.matrix, found.seconds["multiplying"]


def by_numpy(folder: Path, count: int, options: argparse.Namespace) -> Any:
    """Cosines in float32 products, all of a module at once."""
    from safetensors import safe_open

    modules = list(modules_of(shape_of(options)))
    total = np.zeros((count, count))
    seconds = 0.0
    start = time.perf_counter()
    for name in modules:
        left, right = [], []
        for number in range(count):
            file = folder / f"a{number:05}" / "adapter_model.safetensors"
            with safe_open(file, framework="numpy") as tensors:
                left.append(wide(tensors, f"{name}.lora_B.weight").T)
                right.append(wide(tensors, f"{name}.lora_A.weight"))
        b, a = np.concatenate(left), np.concatenate(right)
        b_again, a_again = (b.copy(), a.copy()) if options.gemm else (b, a)
        begin = time.perf_counter()
        products = b @ b_again.T
        products *= a @ a_again.T
        sums = products.reshape(count, options.rank, -1).sum(axis=1)
        total += sums.reshape(count, count, options.rank).sum(axis=2)
        seconds += time.perf_counter() - begin
    norms = np.sqrt(total.diagonal())
    cosines = total / np.outer(norms, norms)
    whole = time.perf_counter() - start
    options.result.with_suffix(".whole").write_text(str(whole))
    return cosines, seconds


def wide(tensors: Any, name: str) -> Any:
    values = tensors.get_tensor(name)
    return values.astype(np.float32)


def child(options: argparse.Namespace) -> None:
    way = by_lorafast if options.child == "lorafast" else by_numpy
    matrix, seconds = way(options.directory, options.counts[0], options)
    np.save(options.result, matrix)
    if options.child == "numpy":
        try:
            from threadpoolctl import threadpool_info

            found = {
                str(info["architecture"]) for info in threadpool_info() if "architecture" in info
            }
        except ImportError:
            found = set()
        options.result.with_suffix(".kernel").write_text(", ".join(sorted(found)))
    print(seconds)


def run(
    way: str, folder: Path, count: int, options: argparse.Namespace, *flags: str
) -> tuple[dict[str, Any], Any]:
    """One run, and the matrix."""
    result = folder.parent / "matrix.npy"
    command = [sys.executable, __file__, "--child", way, "--directory", str(folder)]
    command += ["--result", str(result), "--counts", str(count), "--rank", str(options.rank)]
    command += ["--layers", str(options.layers), "--hidden", str(options.hidden)]
    command += ["--threads", str(options.threads), "--memory", str(options.memory), *flags]
    found = run_process(command, inner=True)
    own: dict[str, Any] = {"seconds": found.inner_seconds, "memory_mb": found.anonymous_mb}
    own["from_files"] = float(result.with_suffix(".whole").read_text())
    return own, np.load(result)


def best_of(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """The least of each time, and the most memory."""
    pick = {"memory_mb": max}
    return {key: pick.get(key, min)(run[key] or 0.0 for run in runs) for key in runs[0]}


def peak(program: Path, threads: int) -> tuple[float, float]:
    printed = subprocess.run([program, str(threads)], check=True, capture_output=True, text=True)
    single, double = map(float, printed.stdout.split())
    return single, double


def measure(folder: Path, options: argparse.Namespace) -> dict[str, Any]:
    for choice in KERNEL_CHOICES:
        os.environ.pop(choice, None)
    os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = str(options.threads)
    program = compile_peak(folder)
    peaks = [] if program is None else [peak(program, options.threads)]
    fleet = folder / "fleet"
    make(fleet, max(options.counts), options)
    extents = sum(rows + columns for rows, columns in modules_of(shape_of(options)).values())
    results = []
    for count in options.counts:
        operations = float(count * options.rank) ** 2 * extents
        row: dict[str, Any] = {"count": count, "operations": operations}
        expected = None
        ways = [] if options.without_numpy else [("syrk", "numpy", list[str]())]
        if options.gemm and not options.without_numpy:
            ways.append(("gemm", "numpy", ["--gemm"]))
        precisions = ("float32", "float64") if options.float64 else ("float32",)
        ways += [(name, "lorafast", ["--precision", name]) for name in precisions]
        runs: dict[str, list[dict[str, Any]]] = {}
        for _ in range(options.repetitions):
            for name, way, flags in ways:
                own, matrix = run(way, fleet, count, options, *flags)
                runs.setdefault(name, []).append(own)
                if expected is None:
                    expected = matrix
                own["difference"] = float(np.abs(matrix - expected).max())
                if own["difference"] > 1e-4:
                    sys.exit(f"error: {name} disagrees by {own['difference']:.2g}")
        for name, found in runs.items():
            row[name] = best_of(found)
        results.append(row)
        if program is not None:
            peaks.append(peak(program, options.threads))
    best = [max(values) for values in zip(*peaks, strict=True)] if peaks else [None, None]
    kernel = folder / "matrix.kernel"
    return {
        "peak_float32": best[0],
        "peak_float64": best[1],
        "blas_kernel": kernel.read_text() if kernel.exists() else "",
        "results": results,
    }


def show(measured: dict[str, Any], options: argparse.Namespace, console: Console) -> None:
    table = Table(
        title=f"All products of N adapters of rank {options.rank}, {options.threads} threads"
    )
    for name in ("N", "", "time", "GFLOP/s", "of f32 peak", "NumPy takes", "memory"):
        table.add_column(name, justify="left" if not name else "right", no_wrap=True)
    single = measured["peak_float32"]
    labels = {
        "float32": "lorafast, float32",
        "float64": "lorafast, float64",
        "syrk": "NumPy, X @ Xᵀ",
        "gemm": "NumPy, X @ Yᵀ",
    }
    scopes = {"seconds": "products alone", "from_files": "from the files"}
    for row in measured["results"]:
        for scope, scope_label in scopes.items():
            rivals = [row[name][scope] for name in ("syrk", "gemm") if name in row]
            for name, label in labels.items():
                if name not in row:
                    continue
                own = row[name]
                rate = row["operations"] / own[scope] / 1e9
                is_first = (name, scope) == ("float32", "seconds")
                ratio = min(rivals) / own[scope] if rivals and name.startswith("float") else None
                table.add_row(
                    str(row["count"]) if is_first else "",
                    f"{label}, {scope_label}",
                    f"{own[scope]:.2f} s",
                    f"{rate:.0f}",
                    "–" if single is None else f"{100 * rate / single:.0f} %",
                    "" if ratio is None else f"{ratio:.2f} ×",
                    f"{own['memory_mb']:.0f} MB",
                )
    console.print(table)
    if single is not None:
        console.print(
            f"peak: {single:.0f} GFLOP/s in float32, {measured['peak_float64']:.0f} in float64"
        )
    if measured["blas_kernel"]:
        console.print(f"NumPy's BLAS took its kernels for {measured['blas_kernel']}")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--counts", type=int, nargs="+", default=[128, 256, 512])
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--layers", type=int, default=1)
    parser.add_argument("--hidden", type=int, default=2048)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--memory", type=int, default=1 << 28, help="bytes of stacked factors")
    parser.add_argument("--repetitions", type=int, default=2)
    parser.add_argument("--without-numpy", action="store_true")
    parser.add_argument("--float64", action="store_true", help="also lorafast's in float64")
    parser.add_argument("--gemm", action="store_true", help="also NumPy's X @ Yᵀ with a copy")
    parser.add_argument("--directory", type=Path, help="where to put the adapters for the while")
    parser.add_argument("--json", action="store_true", help="print the figures as JSON")
    parser.add_argument("--child", choices=("lorafast", "numpy"), help=argparse.SUPPRESS)
    parser.add_argument("--result", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--precision", default="float32", help=argparse.SUPPRESS)
    # NumPy knows no bfloat16.
    parser.set_defaults(dtype="float16")
    options = parser.parse_args()
    if options.child:
        child(options)
        return
    folder = Path(tempfile.mkdtemp(prefix="lorafast-bench-", dir=options.directory))
    try:
        measured = measure(folder, options)
    finally:
        shutil.rmtree(folder)
    if options.json:
        machine = {"processor": processor(), "versions": versions(), "threads": options.threads}
        print(json.dumps({**machine, "rank": options.rank, **measured}, indent=2))
    else:
        # As wide as the table where the output is no terminal.
        show(measured, options, Console(width=None if sys.stdout.isatty() else 120))


if __name__ == "__main__":
    main()
