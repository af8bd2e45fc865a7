"""What the machine can do at most: copying, arithmetic, and its disk."""

from __future__ import annotations

import os
import shutil
import subprocess
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

from measure import cool, run_process, warm

BLOCK = 1 << 20
#: Of whole copies; the best one counts, as it does for the arithmetic.
RUNS = 3


@dataclass(frozen=True)
class Ceilings:
    """Rates in GB/s of the file (each byte read once and written once), and in GFLOP/s.

    Attributes:
        copy: cp of the checkpoint, page cache warm.
        copy_threads: the same by `threads` threads that read and write blocks of 1 MB.
        single: fused multiply-adds in f32 on all cores; None without rustc.
        amx: bf16 products of tiles on all cores; None where the processor has none.
        disk_read: the checkpoint, read from the disk; None unless asked for.
        disk_write: as much, written and synced.
    """

    threads: int
    copy: float
    copy_threads: float
    single: float | None
    amx: float | None
    disk_read: float | None = None
    disk_write: float | None = None

    def best_copy(self) -> float:
        return max(self.copy, self.copy_threads)

    def disk(self) -> float | None:
        """The slower of reading and writing, which overlap at best."""
        if self.disk_read is None or self.disk_write is None:
            return None
        return min(self.disk_read, self.disk_write)

    def floor(self, size: int, operations: float, *, cold: bool = False) -> tuple[float, str]:
        """The least seconds in which so many bytes can be merged, and what says so."""
        copy = self.disk() if cold else None
        bounds = [(size / (copy or self.best_copy()) / 1e9, "disk" if copy else "copy")]
        if self.single:
            bounds.append((operations / self.single / 1e9, "f32"))
        return max(bounds)

    def at_least(self, before: Ceilings | None) -> Ceilings:
        """With the higher arithmetic of two measurements: a neighbour can only lower it."""
        if before is None:
            return self
        single = max(self.single or 0.0, before.single or 0.0) or None
        return replace(self, single=single, amx=max(self.amx or 0.0, before.amx or 0.0) or None)

    def lines(self) -> list[str]:
        lines = [
            f"copy, cp: {self.copy:.2f} GB/s",
            f"copy, {self.threads} threads: {self.copy_threads:.2f} GB/s",
            "f32 peak: "
            + ("unknown without rustc" if self.single is None else f"{self.single:.0f} GFLOP/s"),
            "AMX peak: " + ("no AMX here" if self.amx is None else f"{self.amx:.0f} GFLOP/s"),
        ]
        if self.disk_read and self.disk_write:
            lines.append(f"disk: reads {self.disk_read:.2f}, writes {self.disk_write:.2f} GB/s")
        return lines


def compile_peak(folder: Path) -> Path | None:
    source = Path(__file__).with_name("peak.rs")
    program = folder / "peak"
    try:
        subprocess.run(
            ["rustc", "--edition", "2024", "-O", "-o", program, source],
            check=True,
            capture_output=True,
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return program


def peaks(folder: Path, threads: int) -> dict[str, float]:
    """GFLOP/s of each instruction set, in f32; of `amx` in bf16."""
    program = compile_peak(folder)
    if program is None:
        return {}
    command = [program, str(threads), "--by-set"]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    program.unlink()
    return {line.split()[0]: float(line.split()[1]) for line in printed.splitlines()}


def measure_ceilings(
    base: Path, folder: Path, *, disk: bool, copying: tuple[str, ...] = ()
) -> Ceilings:
    """Measure on the file system of `folder`, by copying `base`, which lies there too.

    `disk` measures the disk as well; `copying` are flags that cp needs to copy.
    """
    threads = os.cpu_count() or 1
    files = sorted(base.glob("*.safetensors"))
    size = sum(path.stat().st_size for path in files)
    arithmetic = peaks(folder, threads)

    def rate(action: Callable[[Path], None], prepare: Callable[[list[Path]], None]) -> float:
        best = 0.0
        for _ in range(RUNS):
            output = folder / "copy"
            os.sync()
            prepare([base])
            begin = time.perf_counter()
            action(output)
            best = max(best, size / (time.perf_counter() - begin) / 1e9)
            shutil.rmtree(output, ignore_errors=True)
        return best

    command = ["cp", "-r", *copying, str(base)]
    return Ceilings(
        threads,
        rate(lambda output: _discard(run_process([*command, str(output)])), warm),
        rate(lambda output: _copy(files, output, threads), warm),
        max((value for name, value in arithmetic.items() if name != "amx"), default=None),
        arithmetic.get("amx"),
        rate(lambda _: _read(files, threads), cool) if disk else None,
        rate(lambda output: _write(output, size), lambda _: None) if disk else None,
    )


def _discard(_: object) -> None:
    pass


def _parts(files: list[Path]) -> list[tuple[Path, int, int]]:
    """Stretches of files that one thread takes at a time."""
    stretch = 64 * BLOCK
    return [
        (path, begin, min(begin + stretch, path.stat().st_size))
        for path in files
        for begin in range(0, path.stat().st_size, stretch)
    ]


def _copy(files: list[Path], output: Path, threads: int) -> None:
    output.mkdir()
    for path in files:
        with (output / path.name).open("wb") as file:
            file.truncate(path.stat().st_size)

    def copy(part: tuple[Path, int, int]) -> None:
        path, begin, end = part
        buffer = bytearray(BLOCK)
        with path.open("rb", 0) as source, (output / path.name).open("r+b", 0) as target:
            for offset in range(begin, end, BLOCK):
                count = os.preadv(source.fileno(), [buffer], offset)
                # A block reaches into the next stretch only at the end of the file.
                os.pwritev(target.fileno(), [memoryview(buffer)[:count]], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(copy, _parts(files)))


def _read(files: list[Path], threads: int) -> None:
    def read(part: tuple[Path, int, int]) -> None:
        path, begin, end = part
        buffer = bytearray(BLOCK)
        with path.open("rb", 0) as source:
            for offset in range(begin, end, BLOCK):
                os.preadv(source.fileno(), [buffer], offset)

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(read, _parts(files)))


def _write(output: Path, size: int) -> None:
    output.mkdir()
    block = os.urandom(BLOCK)
    with (output / "written").open("wb", 0) as file:
        for _ in range(-(-size // BLOCK)):
            file.write(block)
        os.fsync(file.fileno())
