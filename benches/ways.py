"""The ways to make a merged checkpoint, each timed as a whole process or inside a warm one."""

from __future__ import annotations

import json
import shutil
import statistics
import struct
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from measure import Memory, Run, run_process


@dataclass
class Way:
    """One of the ways to make the output.

    Attributes:
        name: what the tables call it.
        run: makes the output at a path that is not there yet.
        size: bytes of the tensors that it writes.
        operations: multiplications and additions of the products in it.
    """

    name: str
    run: Callable[[Path], Run]
    size: int
    operations: float
    runs: list[Run] = field(default_factory=list)
    close: Callable[[], None] = lambda: None

    def median(self) -> float:
        return statistics.median(run.seconds for run in self.runs)


PEFT = """
import sys, time, warnings
warnings.simplefilter("ignore")
base, output, *adapters = sys.argv[1:]
from peft import PeftModel
from transformers import AutoModelForCausalLM
begin = time.perf_counter()
model = AutoModelForCausalLM.from_pretrained(base, dtype="auto")
for adapter in adapters:
    model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.save_pretrained(output)
print()
print(time.perf_counter() - begin)
"""

# Merges once to have everything loaded, then once for each line that names an output.
IN_PROCESS = """
import sys, time
import lorafast
base, threads, first, *adapters = sys.argv[1:]
threads = int(threads) or None
lorafast.merge(base, adapters, first, threads=threads, sync=False)
print("ready", flush=True)
for line in sys.stdin:
    begin = time.perf_counter()
    lorafast.merge(base, adapters, line.rstrip("\\n"), threads=threads, sync=False)
    seconds = time.perf_counter() - begin
    print(seconds, flush=True)
"""


class InProcess:
    """A process that has merged before and merges on demand."""

    def __init__(self, base: Path, adapters: list[Path], threads: int, scratch: Path) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", IN_PROCESS, str(base), str(threads), str(scratch)]
            + [str(adapter) for adapter in adapters],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        self.expect()
        shutil.rmtree(scratch)

    def expect(self) -> list[str]:
        assert self.process.stdout is not None
        words = self.process.stdout.readline().split()
        if not words:
            sys.exit("error: the merge inside a process failed")
        return words

    def run(self, output: Path) -> Run:
        assert self.process.stdin is not None
        memory = Memory(self.process.pid)
        memory.start()
        self.process.stdin.write(f"{output}\n")
        self.process.stdin.flush()
        (seconds,) = self.expect()
        memory.stop()
        return Run(float(seconds), memory.anonymous_mb, memory.resident_mb, None)

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def command_line() -> list[str]:
    script = Path(sys.executable).parent / "lorafast"
    if script.exists():
        return [str(script)]
    program = "import sys; from lorafast._cli.main import main; sys.exit(main())"
    return [sys.executable, "-c", program]


def read_bytes(folder: Path, name: str) -> bytes:
    for path in folder.glob("*.safetensors"):
        with path.open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
            if name in header:
                begin, end = header[name]["data_offsets"]
                file.seek(8 + length + begin)
                return file.read(end - begin)
    raise KeyError(name)


def identical_share(ours: Path, theirs: Path, names: list[str], itemsize: int) -> float:
    """The share of elements that two outputs have in common, bit for bit."""
    same = total = 0
    for name in names:
        a, b = (np.frombuffer(read_bytes(f, name), f"<u{itemsize}") for f in (ours, theirs))
        same += int(np.count_nonzero(a == b))
        total += len(a)
    return same / total


def copy(base: Path, size: int, *flags: str, name: str = "cp") -> Way:
    command = ["cp", "-r", *flags, str(base)]
    return Way(name, lambda output: run_process([*command, str(output)]), size, 0.0)


def copy_synced(base: Path, size: int, *flags: str) -> Way:
    code = 'base=$1 output=$2; shift 2; cp -r "$@" "$base" "$output" && sync "$output"/*'

    def run(output: Path) -> Run:
        return run_process(["sh", "-c", code, "sh", str(base), str(output), *flags])

    return Way("cp, synced", run, size, 0.0)


def lorafast(
    base: Path,
    adapters: list[Path],
    size: int,
    operations: float,
    *,
    threads: int,
    name: str,
    synced: bool = False,
    device: str = "cpu",
    precision: str = "default",
    report: bool = False,
) -> Way:
    """The command, start of Python included; without waiting for the disk, as cp, or with it."""
    options = ["--overwrite", "--quiet", "--device", device]
    options += [] if precision == "default" else ["--precision", precision]
    options += [] if report else ["--no-report"]
    options += [] if synced else ["--no-sync"]
    options += ["--threads", str(threads)] if threads else []
    names = [str(adapter) for adapter in adapters]

    def run(output: Path) -> Run:
        arguments = ["merge", "--base", str(base), "--adapters", *names, "--output", str(output)]
        return run_process(command_line() + arguments + options)

    return Way(name, run, size, operations)


def in_process(
    base: Path, adapters: list[Path], size: int, operations: float, *, threads: int, scratch: Path
) -> Way:
    """lorafast.merge() in a process that has merged before."""
    process = InProcess(base, adapters, threads, scratch)
    return Way("in process", process.run, size, operations, close=process.close)


def peft(base: Path, adapters: list[Path], size: int, operations: float) -> Way:
    """Loading, merging and saving as PEFT's documentation does, imports included."""
    command = [sys.executable, "-c", PEFT, str(base)]
    names = [str(adapter) for adapter in adapters]
    return Way(
        "PEFT",
        lambda output: run_process([*command, str(output), *names], inner=True),
        size,
        operations,
    )


def mergekit(base: Path, adapters: list[Path], size: int, operations: float) -> Way:
    """mergekit's `model+adapter`, which takes one adapter."""
    if len(adapters) > 1:
        sys.exit("error: mergekit takes one adapter to a model")
    config = base.parent / "mergekit.yaml"
    model = {"model": f"{base}+{adapters[0]}"}
    # JSON is YAML.
    settings = {"merge_method": "passthrough", "models": [model], "dtype": "bfloat16"}
    config.write_text(json.dumps(settings))
    script = Path(sys.executable).parent / "mergekit-yaml"

    def run(output: Path) -> Run:
        # A merge of adapters that is found in the cache is not made again.
        cache = output.with_name("mergekit-cache")
        shutil.rmtree(cache, ignore_errors=True)
        command = [str(script), str(config), str(output), "--lora-merge-cache", str(cache)]
        return run_process([*command, "--no-copy-tokenizer"])

    return Way("mergekit", run, size, operations)


def installed(rival: str) -> bool:
    return rival == "cp" or find_spec(rival) is not None
