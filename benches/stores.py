"""Time merges of a base in a store, and count their CPU time beside obstore's.

    python benches/stores.py --size 1024 --latency 0.04 --bandwidth 100 --directory /dev/shm
    python benches/stores.py --size 512 --latency 0 --against obstore --directory /dev/shm

A base of random numbers in bfloat16 and an adapter of rank 16 are made; every merge runs in its own
process, in turn, into a place where nothing is. The first form says which share of the bandwidth a
merge from a web server reaches, after a plain client with eight connections that reads the same:
more than 100 % of that would be a line that lets too much through. The second lets obstore (`pip
install obstore`), which stands on the same crate, read and write the same bytes: from a web server,
and from and to an S3 server (s3s-fs, `make s3-server`). The servers share the cores, so that speed
without a bandwidth says little; CPU time is the client's alone, from after its imports.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "tests"))

from support.handmade import adapter_tensors, make_adapter, make_base  # noqa: E402
from support.object_stores import KEY, SECRET, s3s_fs, serving_s3s  # noqa: E402
from support.range_server import serving  # noqa: E402

MEASURED = """
import json, os, resource, sys, time
def cpu():
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime
{imports}
began, used = time.monotonic(), cpu()
{work}
print(json.dumps([time.monotonic() - began, cpu() - used]))
"""
MERGE = MEASURED.format(
    imports="import lorafast, lorafast._merge.api",
    work="""
lorafast.merge(*sys.argv[1:4], sync=False, storage_options=json.loads(sys.argv[4]))
""",
)
# Ranges and parts as lorafast has them: 8 MiB, eight at a time.
COPY = MEASURED.format(
    imports="""
import obstore
from concurrent.futures import ThreadPoolExecutor
from obstore.store import from_url
from pathlib import Path
""",
    work="""
source, _, target, options = sys.argv[1:5]
options, names = json.loads(options), json.loads(sys.argv[5])
RANGE, AT_ONCE = 8 << 20, 8
def opened(place):
    if place.startswith("http"):
        return from_url(place, client_options={"allow_http": True})
    return from_url(place, config=options, client_options={"allow_http": True})
if "://" in source:
    store = opened(source)
    def size_of(name):
        return obstore.head(store, name)["size"]
    def read(name, start, end):
        return obstore.get_range(store, name, start=start, end=end)
else:
    files = {name: open(Path(source) / name, "rb") for name in names}
    def size_of(name):
        return os.fstat(files[name].fileno()).st_size
    def read(name, start, end):
        return os.pread(files[name].fileno(), end - start, start)
def pieces(name, size, pool):
    ranges = [(start, min(size, start + RANGE)) for start in range(0, size, RANGE)]
    waiting = [pool.submit(read, name, *each) for each in ranges[:AT_ONCE]]
    for each in ranges[AT_ONCE:] + [None] * AT_ONCE:
        if not waiting:
            break
        yield memoryview(waiting.pop(0).result())
        if each is not None:
            waiting.append(pool.submit(read, name, *each))
with ThreadPoolExecutor(AT_ONCE) as pool:
    for name in names:
        size = size_of(name)
        if "://" in target:
            obstore.put(opened(target), name, pieces(name, size, pool), use_multipart=True,
                        chunk_size=RANGE, max_concurrency=AT_ONCE)
        else:
            os.makedirs(target, exist_ok=True)
            with open(Path(target) / name, "wb", buffering=0) as file:
                for piece in pieces(name, size, pool):
                    file.write(piece)
""",
)
ROWS = COLUMNS = 4096


class Line:
    """What all answers of a server pass together, so many bytes a second."""

    def __init__(self, bytes_a_second: float) -> None:
        self.rate, self.free_at, self.lock = bytes_a_second, 0.0, threading.Lock()

    def wait_for(self, count: int) -> None:
        """Waits as long as these bytes take, after those of all others."""
        if not self.rate:
            return
        with self.lock:
            self.free_at = max(self.free_at, time.monotonic()) + count / self.rate
            rest = self.free_at - time.monotonic()
        time.sleep(max(rest, 0.0))


class Cost(NamedTuple):
    """What one run took, in seconds."""

    seconds: float
    cpu: float


def run(program: str, *arguments: object) -> Cost:
    """Runs a program in a process of its own."""
    command = [sys.executable, "-W", "ignore", "-c", program, *map(str, arguments)]
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True)
    return Cost(*json.loads(done.stdout.splitlines()[-1]))


def plain_client(url: str, files: list[Path]) -> float:
    """Seconds in which eight connections read all files, by ranges of 8 MiB."""
    step = 8 << 20

    def read(name: str, start: int, end: int) -> None:
        request = urllib.request.Request(f"{url}/{name}", headers={"Range": f"bytes={start}-{end}"})
        with urllib.request.urlopen(request) as answer:
            answer.read()

    began = time.monotonic()
    with ThreadPoolExecutor(8) as pool:
        for file in files:
            size = file.stat().st_size
            for start in range(0, size, step):
                pool.submit(read, file.name, start, min(size, start + step) - 1)
    return time.monotonic() - began


def share_of_the_line(root: Path, base: Path, adapter: Path, options: argparse.Namespace) -> None:
    """Prints how much of a line's bandwidth merges reach, and a plain client."""
    files = sorted(base.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    line = Line(options.bandwidth * 1e6)
    print("| Reader | seconds | CPU s / GiB | share of the bandwidth |\n|---|---:|---:|---:|")
    with serving(root) as server:
        server.latency, server.wait_for = options.latency, line.wait_for

        def row(name: str, seconds: float, cpu: float | None = None) -> None:
            share = f"{size / seconds / line.rate:.0%}" if line.rate and name != "local" else "–"
            per_gib = "–" if cpu is None else f"{cpu / size * 2**30:.2f}"
            print(f"| {name} | {seconds:.2f} | {per_gib} | {share} |", flush=True)

        if line.rate:
            row("plain client", plain_client(f"{server.url}/base", files))
        for name, place in (("local", str(base)), ("http", f"{server.url}/base")):
            costs = []
            for _ in range(options.repetitions):
                costs.append(run(MERGE, place, adapter, root / "out", "{}"))
                shutil.rmtree(root / "out")
            row(name, *(statistics.median(each) for each in zip(*costs, strict=True)))


def against_obstore(root: Path, base: Path, adapter: Path, options: argparse.Namespace) -> None:
    """Prints the CPU time of merges beside that of obstore, which moves the same bytes."""
    names = sorted(path.name for path in base.glob("*.safetensors"))
    size = sum((base / name).stat().st_size for name in names)
    keys = {
        "aws_access_key_id": KEY,
        "aws_secret_access_key": SECRET,
        "aws_region": "us-east-1",
    }
    buckets = root / "buckets"
    shutil.copytree(base, buckets / "models" / "base", copy_function=os.link)

    def forget() -> None:
        shutil.rmtree(root / "out", ignore_errors=True)
        shutil.rmtree(buckets / "models" / "out", ignore_errors=True)

    print("| From → to | merge, CPU s / GiB | obstore | ratio | merge alone | s |")
    print("|---|---:|---:|---:|---:|---:|")
    with ExitStack() as stack:
        server = stack.enter_context(serving(root))
        server.latency = options.latency
        out = str(root / "out")
        cases = [("http → file", f"{server.url}/base", out)]
        program = s3s_fs()
        if program is None:
            print("s3s-fs is not installed (make s3-server)", file=sys.stderr)
        else:
            keys["aws_endpoint_url"] = stack.enter_context(serving_s3s(program, buckets))
            cases += [
                ("s3 → file", "s3://models/base", out),
                ("file → s3", str(base), "s3://models/out"),
                ("s3 → s3", "s3://models/base", "s3://models/out"),
            ]
        runs: dict[str, list[list[Cost]]] = {}
        local: list[Cost] = []
        for _ in range(options.repetitions):
            local.append(run(MERGE, base, adapter, root / "out", "{}"))
            forget()
            for name, source, target in cases:
                told = json.dumps({} if source.startswith("http") else keys)
                pair = []
                programs: list[Callable[[], Cost]] = [
                    lambda s=source, t=target, o=told: run(MERGE, s, adapter, t, o),
                    lambda s=source, t=target, o=told: run(COPY, s, "", t, o, json.dumps(names)),
                ]
                for program_of in programs:
                    pair.append(program_of())
                    forget()
                runs.setdefault(name, []).append(pair)
    own = statistics.median(each.cpu for each in local) / size * 2**30
    for name, pairs in runs.items():
        merge = statistics.median(pair[0].cpu for pair in pairs) / size * 2**30
        copy = statistics.median(pair[1].cpu for pair in pairs) / size * 2**30
        ratio = statistics.median(pair[0].cpu / pair[1].cpu for pair in pairs)
        seconds = statistics.median(pair[0].seconds for pair in pairs)
        print(f"| {name} | {merge:.2f} | {copy:.2f} | {ratio:.2f} | {own:.2f} | {seconds:.1f} |")


def main() -> None:
    """Makes the inputs, merges, prints."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--size", type=int, default=512, help="of the base, in MiB")
    parser.add_argument("--latency", type=float, default=0.04, help="seconds to the first byte")
    parser.add_argument(
        "--bandwidth", type=float, default=100.0, help="MB a second; 0 for no bound"
    )
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--against", choices=("obstore",), help="whose CPU time is shown beside")
    parser.add_argument("--directory", type=Path)
    options = parser.parse_args()
    layers = max(1, options.size * 2**20 // (ROWS * COLUMNS * 2))
    modules = {f"model.layers.{each}.self_attn.q_proj": (ROWS, COLUMNS) for each in range(layers)}
    with tempfile.TemporaryDirectory(dir=options.directory) as folder:
        root = Path(folder)
        base = make_base(root / "base", modules=modules, dtype="BF16", shards=2)
        adapter = make_adapter(root / "adapter", adapter_tensors(modules, rank=16), r=16)
        measure = against_obstore if options.against else share_of_the_line
        measure(root, base, adapter, options)


if __name__ == "__main__":
    main()
