"""Time a merge against copying the checkpoint, and against PEFT.

    python benches/merge.py                        # a Llama of 1.2 B parameters, 2.5 GB of bfloat16
    python benches/merge.py --rank 64 --adapters 3 --directory /dev/shm
    python benches/merge.py --layers 2 --vocabulary 32000 --without-peft --repetitions 9

A checkpoint of the given shape is made of random numbers, and adapters in PEFT's format for it.
Then, in turn and each in its own process, as often as asked for:

    cp            cp -r of the checkpoint
    cp, synced    the same, and fsync of what it wrote, which lorafast does too
    lorafast      the command `lorafast merge`, start of Python included
    in process    lorafast.merge() in a process that has merged before
    PEFT          from_pretrained, merge_and_unload, save_pretrained, imports included

For each: seconds, anonymous memory at its highest (what the process owns; pages of mapped files
belong to the kernel's cache), and the largest resident set. Ratios are taken round by round.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from inputs import ALL_LINEAR, DTYPES, Shape, make_adapter, make_checkpoint
from measure import Memory, Run, cool, processor, resident_share, run_process, versions, warm
from rich.console import Console
from rich.table import Table


@dataclass
class Way:
    """One of the ways to make the output."""

    name: str
    run: Callable[[Path], Run]
    runs: list[Run] = field(default_factory=list)

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
lorafast.merge(base, adapters, first, threads=threads)
print("ready", flush=True)
for line in sys.stdin:
    begin = time.perf_counter()
    lorafast.merge(base, adapters, line.rstrip("\\n"), threads=threads)
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
    return [sys.executable, "-c", "import sys; from lorafast._cli import main; sys.exit(main())"]


def make_ways(
    options: argparse.Namespace, base: Path, adapters: list[Path], scratch: Path
) -> tuple[list[Way], InProcess]:
    names = [str(adapter) for adapter in adapters]
    in_process = InProcess(base, adapters, options.threads, scratch)

    def lorafast(output: Path) -> Run:
        arguments = ["merge", "--base", str(base), "--adapters", *names, "--output", str(output)]
        arguments += ["--overwrite", "--quiet", "--no-report"]
        if options.threads:
            arguments += ["--threads", str(options.threads)]
        return run_process(command_line() + arguments)

    def copy_synced(output: Path) -> Run:
        code = 'cp -r "$1" "$2" && sync "$2"/*'
        return run_process(["sh", "-c", code, "sh", str(base), str(output)])

    def peft(output: Path) -> Run:
        return run_process([sys.executable, "-c", PEFT, str(base), str(output), *names], inner=True)

    ways = [
        Way("cp", lambda output: run_process(["cp", "-r", str(base), str(output)])),
        Way("cp, synced", copy_synced),
        Way("lorafast", lorafast),
        Way("in process", in_process.run),
    ]
    if not options.without_peft:
        ways.append(Way("PEFT", peft))
    return ways, in_process


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


# Reporting


def ratios(over: Way, under: Way) -> tuple[float, float, float]:
    """Median, least and greatest of the ratios, round by round."""
    values = [a.seconds / b.seconds for a, b in zip(over.runs, under.runs, strict=True)]
    return statistics.median(values), min(values), max(values)


def highest(values: list[float | None]) -> str:
    known = [value for value in values if value is not None]
    return f"{max(known):.0f}" if known else "unknown"


def show(
    console: Console, ways: dict[str, Way], size: int
) -> dict[str, tuple[float, float, float]]:
    table = Table(title="seconds, and MB at the highest")
    table.add_column("way")
    for column in ("median", "least", "greatest", "GB/s", "anonymous", "resident", "cached"):
        table.add_column(column, justify="right")
    for way in ways.values():
        seconds = [run.seconds for run in way.runs]
        shares = [r.resident_share_before for r in way.runs if r.resident_share_before is not None]
        table.add_row(
            way.name,
            *(f"{value:.3f}" for value in (way.median(), min(seconds), max(seconds))),
            f"{size / way.median() / 1e9:.2f}",
            highest([run.anonymous_mb for run in way.runs]),
            highest([run.resident_mb for run in way.runs]),
            f"{statistics.mean(shares):.0%}" if shares else "unknown",
        )
    console.print(table)

    pairs = [
        ("lorafast", "cp"),
        ("lorafast", "cp, synced"),
        ("in process", "cp"),
        ("in process", "cp, synced"),
        ("PEFT", "lorafast"),
    ]
    found = {
        f"{over} / {under}": ratios(ways[over], ways[under])
        for over, under in pairs
        if over in ways and under in ways
    }
    if "PEFT" in ways:
        inner = Way("PEFT without imports", ways["PEFT"].run)
        inner.runs = [Run(r.inner_seconds or 0.0, None, 0.0, None) for r in ways["PEFT"].runs]
        found["PEFT without imports / in process"] = ratios(inner, ways["in process"])
    for name, (middle, least, greatest) in found.items():
        console.print(f"{name}: [bold]{middle:.2f}[/] ({least:.2f} to {greatest:.2f})")
    return found


def parse() -> argparse.Namespace:
    assert __doc__ is not None
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    model = parser.add_argument_group("the checkpoint")
    model.add_argument("--hidden", type=int, default=2048)
    model.add_argument("--layers", type=int, default=16)
    model.add_argument("--intermediate", type=int, default=8192)
    model.add_argument("--heads", type=int, default=32)
    model.add_argument("--key-value-heads", type=int, default=8)
    model.add_argument("--vocabulary", type=int, default=128256)
    model.add_argument("--untied", action="store_true", help="an output head of its own")
    model.add_argument("--shards", type=int, default=2)
    model.add_argument("--base-dtype", choices=DTYPES, default="bfloat16")
    adapter = parser.add_argument_group("the adapters")
    adapter.add_argument("--adapters", type=int, default=1, help="how many")
    adapter.add_argument("--rank", type=int, default=16)
    adapter.add_argument(
        "--targets", default="all-linear", help="all-linear, or names with commas: q_proj,v_proj"
    )
    adapter.add_argument("--adapter-dtype", choices=DTYPES, default="float32")
    running = parser.add_argument_group("running")
    running.add_argument("--repetitions", type=int, default=5)
    running.add_argument("--threads", type=int, default=0, help="of lorafast; 0: its own choice")
    running.add_argument("--directory", type=Path, help="where inputs and outputs are made")
    running.add_argument("--cold", action="store_true", help="drop the inputs from the cache first")
    running.add_argument("--without-peft", action="store_true")
    running.add_argument("--json", type=Path, help="write every figure to this file")
    return parser.parse_args()


def main() -> None:
    options = parse()
    # In a file or a pipe the table keeps its columns whole.
    console = Console() if sys.stdout.isatty() else Console(width=100)
    shape = Shape(
        options.hidden,
        options.layers,
        options.intermediate,
        options.heads,
        options.key_value_heads,
        options.vocabulary,
        not options.untied,
    )
    targets = (ALL_LINEAR if options.targets == "all-linear" else options.targets).split(",")
    dtype = DTYPES[options.base_dtype]
    with tempfile.TemporaryDirectory(dir=options.directory, prefix="lorafast-bench-") as name:
        folder = Path(name)
        base = folder / "base"
        size = make_checkpoint(base, shape, dtype, options.shards)
        adapters = [folder / f"adapter-{number}" for number in range(options.adapters)]
        for number, path in enumerate(adapters):
            make_adapter(
                path,
                shape,
                targets,
                rank=options.rank,
                dtype=DTYPES[options.adapter_dtype],
                seed=2 + number,
            )
        parameters = sum(int(np.prod(s)) for _, s in shape.tensors())
        console.print(
            f"{parameters / 1e9:.2f} B parameters, {size / 1e9:.2f} GB of {options.base_dtype} in"
            f" {options.shards} shards; {options.adapters} adapter(s) of rank {options.rank} in"
            f" {options.adapter_dtype} on {', '.join(targets)}\n"
            f"{processor()}, {os.cpu_count()} processors, load {os.getloadavg()[0]:.1f}"
        )
        ways, in_process = make_ways(options, base, adapters, folder / "first")
        agreement = None
        try:
            for number in range(options.repetitions):
                outputs: dict[str, Path] = {}
                for way in ways:
                    output = outputs[way.name] = folder / f"out-{len(outputs)}"
                    os.sync()  # what an earlier run has yet to write is not this one's to pay for
                    (cool if options.cold else warm)([base, *adapters])
                    share = resident_share(base)
                    run = way.run(output)
                    run.resident_share_before = share
                    way.runs.append(run)
                    last = number == options.repetitions - 1
                    if not (last and way.name in {"lorafast", "PEFT"}):
                        shutil.rmtree(output)
                if "PEFT" in outputs and outputs["PEFT"].exists():
                    changed = [
                        f"model.layers.{layer}.{linear}.weight"
                        for layer in {0, shape.layers - 1}
                        for linear in shape.linear()
                        if linear.split(".")[-1] in targets
                    ]
                    agreement = identical_share(
                        outputs["lorafast"],
                        outputs["PEFT"],
                        changed,
                        {"F32": 4}.get(dtype, 2),
                    )
        finally:
            in_process.close()
        by_name = {way.name: way for way in ways}
        found = show(console, by_name, size)
        state = "dropped from" if options.cold else "read into"
        console.print(
            f"The inputs were {state} the page cache before each run; «cached» is the share of the"
            " checkpoint that the kernel then found there."
        )
        if agreement is not None:
            console.print(
                f"{agreement:.4%} of the elements of the first and last layer's merged weights are"
                " the same as PEFT's, bit for bit."
                + (" PEFT rounds after each adapter, lorafast once." if len(adapters) > 1 else "")
            )
        if options.json:
            result = {
                "options": {
                    k: str(v) if isinstance(v, Path) else v for k, v in vars(options).items()
                },
                "bytes": size,
                "parameters": parameters,
                "processor": processor(),
                "processors": os.cpu_count(),
                "versions": versions(),
                "runs": {way.name: [asdict(run) for run in way.runs] for way in ways},
                "ratios": found,
                "identical_to_peft": agreement,
            }
            options.json.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
