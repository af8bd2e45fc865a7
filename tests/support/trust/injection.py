"""Faults put into a process's system calls with strace: which calls there are, and each in turn."""

from __future__ import annotations

import functools
import re
import shutil
import signal
import subprocess
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from support.trust.command import COMMAND, Argument, Outcome, Running

#: Calls that change what is on the disk, or say that it is there.
CHANGING = (
    "open", "openat", "openat2", "creat", "write", "pwrite64", "writev", "copy_file_range",
    "sendfile", "fsync", "fdatasync", "sync_file_range", "ftruncate", "fallocate", "flock",
    "rename", "renameat", "renameat2", "unlink", "unlinkat", "rmdir", "mkdir", "mkdirat",
    "link", "linkat", "symlink", "symlinkat", "chmod", "fchmod", "fchmodat", "utimensat",
    "close",
)  # fmt: skip
#: Calls that read, or only look.
LOOKING = (
    "read", "pread64", "readv", "mmap", "stat", "lstat", "statx", "newfstatat", "fstat",
    "getdents64", "readlink", "readlinkat", "statfs", "fstatfs", "lseek", "fcntl", "access",
    "faccessat", "faccessat2",
)  # fmt: skip
#: What may go wrong with a call, beside EIO.
ERRORS = {
    **dict.fromkeys(("openat", "open", "openat2", "creat"), ("EACCES", "EMFILE", "EIO", "EROFS")),
    **dict.fromkeys(("write", "pwrite64", "writev"), ("ENOSPC", "EIO", "EDQUOT")),
    **dict.fromkeys(("copy_file_range", "sendfile"), ("EIO", "ENOSPC", "EXDEV", "EINVAL")),
    **dict.fromkeys(("fsync", "fdatasync"), ("EIO", "ENOSPC", "EDQUOT")),
    **dict.fromkeys(("ftruncate", "fallocate"), ("ENOSPC", "EOPNOTSUPP", "EIO")),
    **dict.fromkeys(("rename", "renameat", "renameat2"), ("EACCES", "EPERM", "EIO", "EDQUOT")),
    **dict.fromkeys(("unlink", "unlinkat", "rmdir"), ("EPERM", "EIO", "EROFS", "EACCES")),
    **dict.fromkeys(("mkdir", "mkdirat"), ("ENOSPC", "EACCES", "EDQUOT", "EROFS")),
    **dict.fromkeys(("chmod", "fchmod", "fchmodat", "utimensat"), ("EPERM", "EROFS")),
    "flock": ("ENOLCK", "EIO"),
    "mmap": ("ENOMEM", "EACCES"),
}

# `123  call(…` and `123  <... call resumed>…`, with descriptors as `7</path>`.
LINE = re.compile(r"^(?P<thread>\d+)\s+(?P<call>\w+)\((?P<rest>.*)$")
PATHS = re.compile(r'"(?P<text>/[^"]*)"|\d+<(?P<open>/[^>]*)>')


@functools.cache
def why_not() -> str | None:
    """Why no faults can be injected here, or None where they can."""
    strace = shutil.which("strace")
    if strace is None:
        return "no strace: its injection makes system calls fail"
    tried = subprocess.run(
        [strace, "-f", "-e", "trace=close", "-e", "inject=close:error=EIO:when=1000", "true"],
        capture_output=True,
        check=False,
    )
    return None if tried.returncode == 0 else "strace cannot trace here"


@functools.cache
def known_calls(calls: tuple[str, ...]) -> str:
    """Those of the calls that this machine's strace knows, as it wants them."""

    def is_known(call: str) -> bool:
        command = ["strace", "-e", f"trace={call}", "true"]
        return subprocess.run(command, capture_output=True, check=False).returncode == 0

    return ",".join(filter(is_known, calls))


@dataclass(frozen=True)
class Point:
    """One call: the n-th that a thread makes of it with this path."""

    call: str
    path: str
    number: int

    def __str__(self) -> str:
        return f"{self.call} {self.number} of {self.path}"


def points(
    arguments: Sequence[Argument],
    below: Sequence[Path],
    calls: Sequence[str],
    scratch: Path,
    **how: object,
) -> list[Point]:
    """The calls that a command makes on paths below some directories, in their order.

    Args:
        arguments: of the command.
        below: the directories whose paths matter.
        calls: which calls.
        scratch: where the trace may be written.
        how: goes to `Running`.
    """
    trace = scratch / "trace"
    known = known_calls(tuple(calls))
    before = ["strace", "-f", "--seccomp-bpf", "-y", "-s", "8192", "-e", f"trace={known}"]
    outcome = Running(
        arguments,
        before=[*before, "-e", "signal=none", "-o", trace],
        **how,
    ).finish()
    assert outcome.code == 0, outcome.err
    places = [str(place) for place in below]
    seen: Counter[tuple[str, str, str]] = Counter()
    found: dict[Point, None] = {}
    for line in trace.read_text(errors="replace").splitlines():
        match = LINE.match(line)
        if match is None:
            continue
        # A directory's descriptor with a name relative to it counts as the directory's.
        arguments_of_call = match["rest"].split(") = ")[0]
        paths = [m["text"] or m["open"] for m in PATHS.finditer(arguments_of_call)]
        for path in dict.fromkeys(paths):
            key = (match["thread"], match["call"], path)
            seen[key] += 1
            inside = any(path == place or path.startswith(f"{place}/") for place in places)
            if inside and path == paths[0]:
                found[Point(match["call"], path, seen[key])] = None
    trace.unlink()
    return list(found)


def inject(
    arguments: Sequence[Argument],
    point: Point,
    fault: str,
    scratch: Path,
    *,
    limit: float = 60.0,
    **how: object,
) -> tuple[Outcome, bool]:
    """Run a command with a fault at one call, and say whether the call was met.

    Args:
        arguments: of the command.
        point: which call.
        fault: `error=EIO` or `signal=KILL`.
        scratch: where the trace may be written.
        limit: seconds after which the command has hung.
        how: goes to `Running`.
    """
    trace = scratch / "trace"
    # Where a filter of the kernel's stops calls, signals are not delivered before them.
    fast = [] if fault.startswith("signal") else ["--seccomp-bpf"]
    before = ["strace", "-f", *fast, "-e", "signal=none", "-P", point.path, "-o", trace]
    rules = ["-e", f"trace={point.call}", "-e", f"inject={point.call}:{fault}:when={point.number}"]
    outcome = Running(
        arguments,
        before=[*before, *rules],
        command=COMMAND,
        **how,
    ).finish(limit)
    text = trace.read_text(errors="replace") if trace.exists() else ""
    # What is killed leaves no word of it in the trace.
    return outcome, "INJECTED" in text or outcome.code == -signal.SIGKILL


def everywhere(call: str, fault: str, scratch: Path) -> list[Argument]:
    """What to put before a command so that every call of one kind fails."""
    before = ["strace", "-f", "--seccomp-bpf", "-e", "signal=none", "-o", scratch / "trace"]
    return [*before, "-e", f"trace={call}", "-e", f"inject={call}:{fault}"]
