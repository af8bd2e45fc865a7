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
import ctypes
import ctypes.util
import json
import mmap
import os
import platform
import shutil
import statistics
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

SAMPLE_SECONDS = 0.003
TORCH_NAMES = {"F32": "float32", "F16": "float16", "BF16": "bfloat16"}
DTYPES = {name: code for code, name in TORCH_NAMES.items()}
ALL_LINEAR = "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj"


# Making the inputs


@dataclass(frozen=True)
class Shape:
    """The sizes of a Llama."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    key_value_heads: int
    vocabulary: int
    tied: bool

    def linear(self) -> dict[str, tuple[int, int]]:
        """The Linear weights of one layer: name -> (out, in)."""
        key_value = self.hidden // self.heads * self.key_value_heads
        return {
            "self_attn.q_proj": (self.hidden, self.hidden),
            "self_attn.k_proj": (key_value, self.hidden),
            "self_attn.v_proj": (key_value, self.hidden),
            "self_attn.o_proj": (self.hidden, self.hidden),
            "mlp.gate_proj": (self.intermediate, self.hidden),
            "mlp.up_proj": (self.intermediate, self.hidden),
            "mlp.down_proj": (self.hidden, self.intermediate),
        }

    def tensors(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "model.embed_tokens.weight", (self.vocabulary, self.hidden)
        for layer in range(self.layers):
            prefix = f"model.layers.{layer}"
            for name, shape in self.linear().items():
                yield f"{prefix}.{name}.weight", shape
            yield f"{prefix}.input_layernorm.weight", (self.hidden,)
            yield f"{prefix}.post_attention_layernorm.weight", (self.hidden,)
        yield "model.norm.weight", (self.hidden,)
        if not self.tied:
            yield "lm_head.weight", (self.vocabulary, self.hidden)

    def config(self, dtype: str) -> dict[str, object]:
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": self.hidden,
            "num_hidden_layers": self.layers,
            "intermediate_size": self.intermediate,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.key_value_heads,
            "vocab_size": self.vocabulary,
            "max_position_embeddings": 2048,
            "rms_norm_eps": 1e-5,
            "hidden_act": "silu",
            "tie_word_embeddings": self.tied,
            "torch_dtype": TORCH_NAMES[dtype],
        }


class Noise:
    """Normal numbers in a dtype, taken from different places of one pool: fast to make."""

    def __init__(self, dtype: str, seed: int) -> None:
        self.random = np.random.default_rng(seed)
        # A prime length, so that no tensor repeats another's rows.
        values = self.random.standard_normal(4_194_301, dtype=np.float32) * np.float32(0.02)
        self.pool: NDArray[np.generic]
        if dtype == "BF16":
            self.pool = (values.view(np.uint32) >> np.uint32(16)).astype("<u2")
        else:
            self.pool = values.astype({"F32": "<f4", "F16": "<f2"}[dtype])

    def chunks(self, count: int) -> Iterator[memoryview]:
        while count > 0:
            begin = int(self.random.integers(len(self.pool) // 2))
            part = self.pool[begin : begin + count]
            yield memoryview(part).cast("B")
            count -= len(part)


def write_safetensors(
    path: Path, tensors: dict[str, tuple[int, ...]], dtype: str, noise: Noise
) -> None:
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for name, shape in tensors.items():
        end = offset + int(np.prod(shape)) * noise.pool.itemsize
        header[name] = {"dtype": dtype, "shape": shape, "data_offsets": [offset, end]}
        offset = end
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for shape in tensors.values():
            for chunk in noise.chunks(int(np.prod(shape))):
                file.write(chunk)


def make_checkpoint(path: Path, shape: Shape, dtype: str, shards: int) -> int:
    """Write the checkpoint and return the size of its tensors in bytes."""
    path.mkdir()
    noise = Noise(dtype, 1)
    everything = dict(shape.tensors())
    sizes = {name: int(np.prod(s)) * noise.pool.itemsize for name, s in everything.items()}
    total = sum(sizes.values())
    weight_map: dict[str, str] = {}
    parts: list[dict[str, tuple[int, ...]]] = [{} for _ in range(shards)]
    before = 0
    for name, size in sizes.items():
        parts[min(before * shards // total, shards - 1)][name] = everything[name]
        before += size
    for number, part in enumerate(parts, start=1):
        file = (
            f"model-{number:05}-of-{shards:05}.safetensors" if shards > 1 else "model.safetensors"
        )
        write_safetensors(path / file, part, dtype, noise)
        weight_map.update(dict.fromkeys(part, file))
    if shards > 1:
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
    (path / "config.json").write_text(json.dumps(shape.config(dtype), indent=2))
    return total


def make_adapter(
    path: Path, shape: Shape, targets: list[str], *, rank: int, dtype: str, seed: int
) -> None:
    path.mkdir()
    tensors: dict[str, tuple[int, ...]] = {}
    for layer in range(shape.layers):
        for name, (rows, columns) in shape.linear().items():
            if name.split(".")[-1] in targets:
                prefix = f"base_model.model.model.layers.{layer}.{name}"
                tensors[f"{prefix}.lora_A.weight"] = (rank, columns)
                tensors[f"{prefix}.lora_B.weight"] = (rows, rank)
    if not tensors:
        sys.exit(f"error: no linear layer is called any of {targets}")
    write_safetensors(path / "adapter_model.safetensors", tensors, dtype, Noise(dtype, seed))
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": None,
        "r": rank,
        "lora_alpha": 2 * rank,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": targets,
        "inference_mode": True,
    }
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))


# The page cache


def resident_share(folder: Path) -> float | None:
    """The share of the folder's bytes that lie in the page cache, or None where that is unknown."""
    libc = ctypes.CDLL(ctypes.util.find_library("c"), use_errno=True)
    try:
        map_file, in_core, unmap = libc.mmap, libc.mincore, libc.munmap
    except AttributeError:
        return None
    map_file.restype = ctypes.c_void_p
    map_file.argtypes = [
        ctypes.c_void_p,
        ctypes.c_size_t,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_int,
        ctypes.c_long,
    ]
    in_core.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_char_p]
    unmap.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    pages = resident = 0
    for path in folder.glob("*.safetensors"):
        size = path.stat().st_size
        count = -(-size // mmap.PAGESIZE)
        flags = ctypes.create_string_buffer(count)
        with path.open("rb") as file:
            address = map_file(None, size, mmap.PROT_READ, mmap.MAP_SHARED, file.fileno(), 0)
            if address in (None, ctypes.c_void_p(-1).value):
                return None
            failed = in_core(address, size, flags)
            unmap(address, size)
        if failed:
            return None
        pages += count
        resident += int(np.count_nonzero(np.frombuffer(flags.raw[:count], np.uint8) & 1))
    return resident / pages if pages else None


def warm(folders: list[Path]) -> None:
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb", buffering=0) as file:
                while file.read(1 << 24):
                    pass


def cool(folders: list[Path]) -> None:
    """Ask the kernel to forget the files; a file system that lives in memory will not."""
    if not hasattr(os, "posix_fadvise"):
        sys.exit("error: --cold needs posix_fadvise, which this system does not have")
    for folder in folders:
        for path in folder.iterdir():
            with path.open("rb") as file:
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


# Running


@dataclass
class Run:
    """One run of one way."""

    seconds: float
    anonymous_mb: float | None
    resident_mb: float | None
    resident_share_before: float | None
    inner_seconds: float | None = None


@dataclass
class Way:
    """One of the ways to make the output."""

    name: str
    run: Callable[[Path], Run]
    runs: list[Run] = field(default_factory=list)

    def median(self) -> float:
        return statistics.median(run.seconds for run in self.runs)


class Memory(threading.Thread):
    """Samples a process's memory, and remembers the highest.

    wait4's ru_maxrss would not do: it starts at what the parent held when it forked.
    """

    def __init__(self, process: int) -> None:
        super().__init__(daemon=True)
        self.path = Path(f"/proc/{process}/status")
        self.anonymous_mb: float | None = None
        self.resident_mb: float | None = None
        self.ended = threading.Event()

    def run(self) -> None:
        while not self.ended.is_set():
            try:
                text = self.path.read_text()
            except OSError:
                return
            for line in text.splitlines():
                if line.startswith("RssAnon:"):
                    megabytes = int(line.split()[1]) * 1024 / 1e6
                    self.anonymous_mb = max(self.anonymous_mb or 0.0, megabytes)
                elif line.startswith("VmHWM:"):
                    self.resident_mb = int(line.split()[1]) * 1024 / 1e6
            self.ended.wait(SAMPLE_SECONDS)

    def stop(self) -> None:
        self.ended.set()
        self.join()


def run_process(command: list[str], inner: bool = False) -> Run:
    """Run a command to its end; `inner` reads seconds from the last line that it prints."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error"}
    with tempfile.TemporaryFile("w+") as printed:
        begin = time.perf_counter()
        process = subprocess.Popen(command, stdout=printed, stderr=printed, env=environment)
        memory = Memory(process.pid)
        memory.start()
        process.wait()
        seconds = time.perf_counter() - begin
        memory.stop()
        printed.seek(0)
        text = printed.read()
    if process.returncode:
        sys.exit(f"error: {' '.join(command)} ended with {process.returncode}\n{text}")
    return Run(
        seconds,
        memory.anonymous_mb,
        memory.resident_mb,
        None,
        float(text.split()[-1]) if inner else None,
    )


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


def processor() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def versions() -> dict[str, str]:
    from importlib.metadata import PackageNotFoundError, version

    found = {"python": platform.python_version()}
    for name in ("lorafast", "numpy", "torch", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
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
