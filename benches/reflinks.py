"""A file system with reflinks in a loop file, and how much of a file is shared there."""

from __future__ import annotations

import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

MAKE = {"xfs": ["mkfs.xfs", "-q", "-m", "reflink=1"], "btrfs": ["mkfs.btrfs", "-q"]}


@contextmanager
def loop_mount(kind: str, size: int, folder: Path) -> Iterator[Path]:
    """Make a file system in a sparse file of `size` bytes, and mount it for the while."""
    if shutil.which(MAKE[kind][0]) is None:
        sys.exit(f"error: {MAKE[kind][0]} is missing: install xfsprogs or btrfs-progs")
    image, place = folder / "image", folder / "mount"
    place.mkdir()
    with image.open("wb") as file:
        file.truncate(size)
    try:
        run([*MAKE[kind], str(image)])
        run(["mount", "-o", "loop", str(image), str(place)])
        try:
            yield place
        finally:
            run(["umount", str(place)])
    finally:
        image.unlink()
        place.rmdir()


def run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr or done.stdout).strip().splitlines()[-1:]
        sys.exit(f"error: {' '.join(command)}: {' '.join(reason) or done.returncode}")


def shared_share(folder: Path) -> float | None:
    """The share of the shards' blocks that they have in common with other files."""
    if shutil.which("filefrag") is None:
        return None
    shared = total = 0
    for path in folder.glob("*.safetensors"):
        listed = subprocess.run(
            ["filefrag", "-v", path], capture_output=True, text=True, check=True
        )
        # number: first..last: physical..physical: length: [expected:] flags
        for line in listed.stdout.splitlines():
            if found := re.match(r"\s*\d+:\s*\d+\.\.\s*\d+:\s*\d+\.\.\s*\d+:\s*(\d+):", line):
                total += int(found[1])
                shared += int(found[1]) if "shared" in line else 0
    return shared / total if total else None
