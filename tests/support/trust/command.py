"""The command as a process of its own, with a time limit."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

#: Seconds after which a command on a tiny model has hung.
LIMIT = 60.0
COMMAND = (sys.executable, "-m", "lorafast")
Argument = str | bytes | Path


@dataclass(frozen=True)
class Outcome:
    """How a command ended."""

    code: int | None
    """The exit code, minus the signal that ended it, or None where it was still running."""
    out: str
    err: str
    seconds: float

    @property
    def last(self) -> str:
        """The last line on stderr."""
        lines = self.err.strip().splitlines()
        return lines[-1] if lines else ""

    def problems(self, *codes: int) -> list[str]:
        """What no end of a command may show, whatever happened to it.

        Args:
            codes: the exit codes that are right; 1 asks for one line `error:`.
        """
        if self.code is None:
            return [f"still running after {self.seconds:.0f} s"]
        found = []
        if self.code not in codes:
            found.append(f"ended with {self.code}, not {' or '.join(map(str, codes))}")
        if "Traceback" in self.err or "panicked" in self.err:
            found.append("printed a traceback")
        errors = [line for line in self.err.splitlines() if line.startswith("error:")]
        if self.code == 1 and (len(errors) != 1 or not self.last.startswith("error:")):
            found.append(f"printed {len(errors)} lines of error")
        if self.code == 0 and errors:
            found.append("reported success and an error")
        return [f"{problem}: {shortened(self.err)}" for problem in found]


def shortened(text: str, most: int = 300) -> str:
    """The end of a text in one line."""
    text = " | ".join(text.strip().splitlines())
    return text if len(text) <= most else "…" + text[-most:]


def environment(temporary: Path | None, more: Mapping[str, str] | None = None) -> dict[str, str]:
    """This process's environment, with its own directory for temporary files."""
    found = os.environ | {"PYTHONDONTWRITEBYTECODE": "1", "HF_HUB_OFFLINE": "1"}
    if temporary is not None:
        found["TMPDIR"] = str(temporary)
    return found | dict(more or {})


class Running:
    """A command that has been started, in a process group of its own."""

    def __init__(
        self,
        arguments: Sequence[Argument],
        *,
        before: Sequence[Argument] = (),
        temporary: Path | None = None,
        directory: Path | None = None,
        more: Mapping[str, str] | None = None,
        prepare: Callable[[], None] | None = None,
        command: Sequence[Argument] = COMMAND,
    ) -> None:
        self.started = time.monotonic()
        self.process = subprocess.Popen(
            [*before, *command, *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(temporary, more),
            cwd=directory,
            # Nothing here has threads when it starts a command with a limit.
            preexec_fn=prepare,  # noqa: PLW1509 (as said)
            start_new_session=True,
        )

    def wait_until_loaded(self, most: float = 10.0) -> None:
        """Wait until the process has loaded the core: from then on it is lorafast's to end well."""
        maps = Path(f"/proc/{self.process.pid}/maps")
        end = time.monotonic() + most
        while time.monotonic() < end and self.process.poll() is None:
            try:
                if "_core" in maps.read_text():
                    return
            except OSError:
                return
            time.sleep(0.001)

    def wait_until_it_hears(self, most: float = 10.0) -> None:
        """Wait until the process handles SIGTERM: before, a signal meets Python's own start."""
        status = Path(f"/proc/{self.process.pid}/status")
        caught = 1 << (signal.SIGTERM - 1)
        end = time.monotonic() + most
        while time.monotonic() < end and self.process.poll() is None:
            try:
                found = re.search(r"^SigCgt:\s*(\w+)", status.read_text(), re.MULTILINE)
            except OSError:
                return
            if found is not None and int(found[1], 16) & caught:
                return
            time.sleep(0.001)

    def wait_until_open(self, path: Path, most: float) -> None:
        """Wait until the process has a file open or mapped, or has ended, or time is up."""
        proc = Path(f"/proc/{self.process.pid}")
        end = time.monotonic() + most
        while self.process.poll() is None and time.monotonic() < end:
            time.sleep(0.0005)
            try:
                if any(str(each.readlink()) == str(path) for each in (proc / "fd").iterdir()):
                    return
                if str(path) in (proc / "maps").read_text():
                    return
            except OSError:
                # Descriptors are closed, and processes end, while they are looked at.
                continue

    def kill(self) -> None:
        """Kill it and what it has started."""
        try:
            os.killpg(self.process.pid, signal.SIGKILL)
        except ProcessLookupError:
            self.process.kill()

    def finish(self, limit: float = LIMIT) -> Outcome:
        """Wait for its end, which is brought about after `limit` seconds."""
        code: int | None
        try:
            out, err = self.process.communicate(timeout=limit)
            code = self.process.returncode
        except subprocess.TimeoutExpired:
            self.kill()
            out, err = self.process.communicate()
            code = None
        seconds = time.monotonic() - self.started
        return Outcome(code, decoded(out), decoded(err), seconds)


def decoded(text: bytes) -> str:
    return text.decode(errors="backslashreplace")


def lorafast(
    *arguments: Argument,
    limit: float = LIMIT,
    before: Sequence[Argument] = (),
    temporary: Path | None = None,
    directory: Path | None = None,
    more: Mapping[str, str] | None = None,
    prepare: Callable[[], None] | None = None,
) -> Outcome:
    """Run one command to its end."""
    return Running(
        arguments,
        before=before,
        temporary=temporary,
        directory=directory,
        more=more,
        prepare=prepare,
    ).finish(limit)
