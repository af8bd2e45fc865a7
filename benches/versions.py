"""Time this build of lorafast against another one, job by job, in turn.

    python benches/versions.py --other ../earlier/python
    python benches/versions.py --other ../earlier/python --directory /dev/shm --rounds 15

`--other` is a directory with a built `lorafast` package: another checkout's `python` folder, or a
folder that `pip install --target` filled. Each run is a process of its own, the start of Python
included; the two builds take turns, and who begins changes from round to round. Inputs are warm,
and either package has its bytecode, as an installed one has.
Printed is Markdown: the median seconds of either, the median of the ratios round by round (below 1
where this build is faster), their quartiles, and the ratios of processor time and of memory.
"""

from __future__ import annotations

import argparse
import compileall
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from inputs import ALL_LINEAR, Shape, make_adapter, make_checkpoint

HERE = Path(__file__).resolve().parent.parent / "python"
#: The command was elsewhere before it had a module of its own.
COMMAND = """
import os, sys
if sys.argv[1] == "-c":
    status = exec(sys.argv[2])
else:
    try:
        from lorafast._cli.main import main
    except ImportError:
        from lorafast._cli import main
    status = main()
# What the system says of an ended child begins at the memory of its parent; this does not.
with open("/proc/self/status") as lines, open(os.environ["LORAFAST_BENCH_PEAK"], "w") as peak:
    peak.write(next(line for line in lines if line.startswith("VmHWM:")).split()[1])
sys.exit(status)
"""


@dataclass(frozen=True)
class Sample:
    """What one process took: seconds, processor seconds, and its largest resident set in KiB."""

    wall: float
    processor: float
    memory: int


def run(package: Path, words: list[str], output: Path) -> Sample:
    """Run a command, or code after "-c", with one of the builds, and remove its output."""
    peak = output.with_name("peak")
    environment = os.environ | {"PYTHONPATH": str(package), "LORAFAST_BENCH_PEAK": str(peak)}
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND, *words],
        env=environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
    )
    assert process.stderr is not None
    said = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    wall = time.perf_counter() - begin
    if os.waitstatus_to_exitcode(status) != 0:
        sys.exit(f"{package}: {' '.join(words)}: {said.decode()}")
    shutil.rmtree(output, ignore_errors=True)
    return Sample(wall, usage.ru_utime + usage.ru_stime, int(peak.read_text()))


def compare(other: Path, words: list[str], output: Path, rounds: int) -> str:
    """Both builds in turn; the cells of a row."""
    pairs: list[tuple[Sample, Sample]] = []
    for number in range(rounds + 1):
        order = [HERE, other] if number % 2 == 0 else [other, HERE]
        found = {package: run(package, words, output) for package in order}
        if number > 0:  # the first round warms caches
            pairs.append((found[HERE], found[other]))
    walls = [mine.wall / theirs.wall for mine, theirs in pairs]
    low, middle, high = statistics.quantiles(walls, n=4)
    median = statistics.median

    def ratio(figure: Callable[[Sample], float]) -> float:
        return median(figure(mine) / figure(theirs) for mine, theirs in pairs)

    seconds = [median(pair[side].wall for pair in pairs) for side in (0, 1)]
    return (
        f"{seconds[0]:.3f} | {seconds[1]:.3f} | {middle:.3f} | {low:.3f}–{high:.3f} "
        f"| {ratio(lambda s: s.processor):.3f} | {ratio(lambda s: s.memory):.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--other", type=Path, required=True, help="a directory with another build")
    parser.add_argument("--directory", type=Path, help="where to work; default: a temporary one")
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--fleets", type=int, nargs="+", default=[200], help="adapters of a scan")
    parser.add_argument("--compared", type=int, default=96, help="adapters of the similarity")
    parser.add_argument("--only", default="", help="jobs whose names hold this")
    options = parser.parse_args()
    other = options.other.resolve()
    for package in (HERE, other):
        compileall.compile_dir(package / "lorafast", quiet=1)
    with tempfile.TemporaryDirectory(dir=options.directory) as name:
        folder = Path(name)
        base, output = folder / "base", folder / "out"
        shape = Shape(2048, options.layers, 8192, 32, 8, 128256, tied=True)
        make_checkpoint(base, shape, "BF16", 2)
        targets = ALL_LINEAR.split(",")
        for rank in (16, 64):
            make_adapter(folder / f"r{rank}", shape, targets, rank=rank, dtype="BF16", seed=2)
        eight = [folder / f"e{number}" for number in range(8)]
        for seed, path in enumerate(eight):
            make_adapter(path, shape, targets, rank=16, dtype="BF16", seed=seed)
        small = Shape(512, 4, 1024, 8, 8, 1000, tied=True)
        fleets = {size: folder / f"fleet{size}" for size in options.fleets}
        for size, fleet in fleets.items():
            fleet.mkdir()
            for number in range(size if "scan".startswith(options.only[:4]) else 0):
                path = fleet / f"a{number:05d}"
                make_adapter(path, small, targets, rank=8, dtype="BF16", seed=number)
        compared = folder / "compared"
        compared.mkdir()
        for number in range(options.compared):
            path = compared / f"a{number:04d}"
            make_adapter(path, small, targets, rank=16, dtype="BF16", seed=number)
        tiny = Shape(64, 2, 128, 4, 4, 100, tied=True)
        make_checkpoint(folder / "tiny", tiny, "BF16", 1)
        make_adapter(folder / "tiny-a", tiny, targets, rank=4, dtype="F32", seed=2)

        def merge(*adapters: Path, into: Path = base) -> list[str]:
            paths = map(str, adapters)
            words = ["merge", "--base", str(into), "--adapters", *paths, "--output", str(output)]
            return [*words, "--no-sync", "--quiet"]

        jobs = {
            "merge, rank 16": merge(folder / "r16"),
            "merge, rank 64": merge(folder / "r64"),
            "merge, eight of rank 16": merge(*eight),
            "merge, tiny": merge(folder / "tiny-a", into=folder / "tiny"),
            "analyze, rank 16": ["analyze", str(folder / "r16"), "--quiet"],
            "analyze, rank 64": ["analyze", str(folder / "r64"), "--quiet"],
            **{f"scan, {size}": ["scan", str(path), "--quiet"] for size, path in fleets.items()},
            f"similarity, {options.compared}": [
                "-c",
                f"import lorafast; lorafast.similarity({str(compared)!r})",
            ],
            "import": ["-c", "import lorafast"],
            "--version": ["--version"],
        }
        print("| Job | this build, s | the other, s | ratio | quartiles | processor | memory |")
        print("|---|---:|---:|---:|---:|---:|---:|")
        for job, words in ((name, jobs[name]) for name in jobs if options.only in name):
            print(f"| {job} | {compare(other, words, output, options.rounds)} |", flush=True)


if __name__ == "__main__":
    main()
