"""Time how soon the command answers and a small merge is done, against a bare interpreter.

    python benches/startup.py
    python benches/startup.py --repetitions 40

Each round runs all of them in turn, each as a process of its own; the ways' times are medians, and
what lorafast adds is taken round by round:

    python -c pass          the interpreter alone
    import lorafast         the package, and nothing used of it
    lorafast --version
    lorafast merge          of an adapter into a Llama of 0.1 M parameters, with its report
"""

from __future__ import annotations

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from inputs import Shape, make_adapter, make_checkpoint
from measure import processor
from ways import command_line

TARGETS = {"lorafast --version": 0.25, "lorafast merge": 0.35}
BARE = "python -c pass"


# An installed package has its bytecode beside it, whatever is set where this runs.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k != "PYTHONDONTWRITEBYTECODE"}


def seconds(command: list[str]) -> float:
    begin = time.perf_counter()
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL, env=ENVIRONMENT)
    return time.perf_counter() - begin


def main() -> None:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--repetitions", type=int, default=15)
    options = parser.parse_args()
    shape = Shape(64, 2, 128, 4, 2, 256, True)
    with tempfile.TemporaryDirectory(prefix="lorafast-bench-") as name:
        folder = Path(name)
        base, adapter, output = folder / "base", folder / "adapter", folder / "out"
        make_checkpoint(base, shape, "BF16", 1)
        make_adapter(adapter, shape, ["q_proj", "v_proj"], rank=8, dtype="F32", seed=2)
        merge = ["merge", "--base", str(base), "--adapters", str(adapter)]
        merge += ["--output", str(output), "--overwrite"]
        ways = {
            BARE: [sys.executable, "-c", "pass"],
            "import lorafast": [sys.executable, "-c", "import lorafast"],
            "lorafast --version": [*command_line(), "--version"],
            "lorafast merge": [*command_line(), *merge],
        }
        for command in ways.values():
            seconds(command)  # compiles what has no bytecode yet
        times: dict[str, list[float]] = {way: [] for way in ways}
        for _ in range(options.repetitions):
            for way, command in ways.items():
                times[way].append(seconds(command))
    print(f"{processor()}; {options.repetitions} rounds\n")
    print("| Process | median s | least–greatest | over the interpreter | target |")
    print("|---|---:|---:|---:|---:|")
    for way, taken in times.items():
        over = statistics.median(a - b for a, b in zip(taken, times[BARE], strict=True))
        target = f"≤ {TARGETS[way]:.2f}" if way in TARGETS else ""
        print(
            f"| `{way}` | {statistics.median(taken):.3f} | {min(taken):.3f}–{max(taken):.3f}"
            f" | {'' if way == BARE else f'{over:.3f}'} | {target} |"
        )


if __name__ == "__main__":
    main()
