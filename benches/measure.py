"""Running and measuring for the benchmarks: the page cache, processes and their memory."""

from __future__ import annotations

import ctypes
import ctypes.util
import mmap
import os
import platform
import subprocess
import sys
import tempfile
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

SAMPLE_SECONDS = 0.003


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
