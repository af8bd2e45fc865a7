"""Time merges of a base on a web server, with a latency and a bandwidth, against local ones.

    python benches/stores.py --size 512 --latency 0.04 --bandwidth 100 --directory /dev/shm

A base of random numbers in bfloat16 and an adapter of rank 16 are made; every merge runs in its own
process, in turn. Printed are seconds, the process's own CPU time per GiB, and the share of the
bandwidth that it reached, where there is one. The server shares the cores, so that speed without a
bandwidth says little; CPU time is the client's alone.
"""

from __future__ import annotations

import argparse
import resource
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.handmade import adapter_tensors, make_adapter, make_base  # noqa: E402
from support.range_server import serving  # noqa: E402

PROGRAM = "import sys, lorafast; lorafast.merge(*sys.argv[1:4], sync=False, overwrite=True)"
ROWS = COLUMNS = 4096


class Line:
    """What all answers of a server pass, so many bytes a second."""

    def __init__(self, bytes_a_second: float) -> None:
        self.rate, self.free_at, self.lock = bytes_a_second, 0.0, threading.Lock()

    def wait_for(self, count: int) -> None:
        """Waits as long as these bytes take."""
        if not self.rate:
            return
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / self.rate
            rest = self.free_at - time.monotonic()
        time.sleep(max(rest, 0.0))


def timed(base: str, adapter: Path, output: Path) -> tuple[float, float]:
    """Seconds, and seconds of CPU, of one merge."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.monotonic()
    subprocess.run([sys.executable, "-c", PROGRAM, base, adapter, output], check=True)
    seconds = time.monotonic() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return seconds, cpu


def main() -> None:
    """Makes the inputs, merges, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=512, help="of the base, in MiB")
    parser.add_argument("--latency", type=float, default=0.04, help="seconds to the first byte")
    parser.add_argument(
        "--bandwidth", type=float, default=100.0, help="MB a second; 0 for no bound"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    layers = max(1, options.size * 2**20 // (ROWS * COLUMNS * 2))
    modules = {f"model.layers.{each}.self_attn.q_proj": (ROWS, COLUMNS) for each in range(layers)}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root = Path(folder)
        base = make_base(root / "base", modules=modules, dtype="BF16", shards=2)
        adapter = make_adapter(root / "adapter", adapter_tensors(modules, rank=16), r=16)
        size = sum(path.stat().st_size for path in base.glob("*.safetensors"))
        print("| Merge | seconds | CPU s / GiB | share of the bandwidth |\n|---|---:|---:|---:|")
        line = Line(options.bandwidth * 1e6)
        with serving(root) as server:
            server.latency, server.wait_for = options.latency, line.wait_for
            for name, place in (("local", str(base)), ("http", f"{server.url}/base")):
                runs = [timed(place, adapter, root / "out") for _ in range(options.repetitions)]
                seconds, cpu = min(run[0] for run in runs), min(run[1] for run in runs)
                is_bounded = name == "http" and options.bandwidth
                share = f"{size / seconds / line.rate:.0%}" if is_bounded else "–"
                print(f"| {name} | {seconds:.2f} | {cpu / size * 2**30:.2f} | {share} |")


if __name__ == "__main__":
    main()
