"""Outputs on file systems of many sizes, most of them too small."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from support.trust.command import Argument
from support.trust.figures import Figures, count, generator
from support.trust.scene import LARGE, Scene, model_files

KINDS = ("new", "overwrite", "analyze", "scan", "cache", "similarity")


@functools.cache
def can_mount() -> bool:
    if os.geteuid() != 0 or shutil.which("mount") is None:
        return False
    with tempfile.TemporaryDirectory() as folder:
        mount = ["mount", "-t", "tmpfs", "-o", "size=64k", "lorafast-trust", folder]
        if subprocess.run(mount, capture_output=True, check=False).returncode != 0:
            return False
        return subprocess.run(["umount", folder], capture_output=True, check=False).returncode == 0


@contextlib.contextmanager
def disk(folder: Path, kib: int) -> Iterator[Path]:
    """A file system of that size for as long as it is needed."""
    folder.mkdir(exist_ok=True)
    size = f"size={max(kib, 4)}k"
    subprocess.run(["mount", "-t", "tmpfs", "-o", size, "lorafast-trust", folder], check=True)
    try:
        yield folder
    finally:
        subprocess.run(["umount", "--lazy", folder], check=True)


def kib_of(folder: Path) -> int:
    """What a directory takes in pages of 4 KiB."""
    return sum(-(-p.stat().st_size // 4096) * 4 for p in folder.rglob("*") if p.is_file())


@pytest.mark.skipif(not can_mount(), reason="mounting a small tmpfs needs root")
def test_a_full_disk_costs_no_model_and_is_named(
    tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("full disks")
    random = generator("full disks")
    scene = Scene(tmp_path / "scene", modules=LARGE)
    place = tmp_path / "disk"
    old = kib_of(scene.saved["old"])

    def command(kind: str) -> list[Argument]:
        output, adapters = place / "out", [scene.adapter, scene.other]
        return {
            "new": scene.merge(output=output),
            "overwrite": scene.merge("--overwrite", output=output),
            "analyze": ["analyze", *adapters, "--output", output, "--no-plots", "--quiet"],
            "scan": ["scan", *adapters, "--output", output, "--html", "--quiet"],
            "cache": ["scan", *adapters, "--cache", output, "--quiet"],
            "similarity": ["similarity", *adapters, "--output", place / "s.csv", "--quiet"],
        }[kind]

    needed = {}
    for kind in KINDS:
        with disk(place, 1 << 16):
            outcome = scene.run(command(kind))
            assert outcome.code == 0, outcome.err
            needed[kind] = kib_of(place) + (old if kind == "overwrite" else 0)
    for number in range(count("full_disks", 24)):
        kind = KINDS[number % len(KINDS)]
        # Where the last bytes do not fit is where errors are rare and late.
        share = random.uniform(0.9, 1.1) if random.random() < 0.5 else random.uniform(0, 1)
        kib = int(needed[kind] * share)
        if kind == "overwrite":
            kib = max(kib, old + 64)
        where = f"{kind} on {kib} KiB of {needed[kind]}"
        scene.reset()
        with disk(place, kib):
            output = place / "out"
            if kind == "overwrite":
                shutil.copytree(scene.saved["old"], output)
            outcome = scene.run(command(kind))
            told.add(f"{kind} {'done' if outcome.code == 0 else 'refused'}")
            told.check(outcome.problems(0, 1), where)
            if outcome.code == 1:
                # It is the output's disk that is full; nothing is wrong with what was read.
                told.expect(str(scene.base) not in outcome.last, f"{where}: {outcome.last}")
                told.expect(
                    str(place) in outcome.last or "space" in outcome.last,
                    f"{where}: does not say what is full: {outcome.last}",
                )
            if kind in {"new", "overwrite"}:
                state = scene.state(output)
                before = "old" if kind == "overwrite" else "absent"
                right = "new" if outcome.code == 0 else before
                told.expect(state == right, f"{where}: {outcome.code} and {state}")
            elif kind == "analyze" and outcome.code == 1 and output.is_dir():
                broken = [p.name for p in output.iterdir() if not whole_json(p)]
                told.expect(not broken, f"{where}: left {broken} cut off")
            left = model_files(place) if kind == "new" and outcome.code == 1 else {}
            told.expect(not left, f"{where}: left {list(left)}")
        told.check(scene.intact(bystanders=False), where)
        told.check(scene.leftovers(), where)
    told.settle()


def whole_json(path: Path) -> bool:
    import json

    if path.suffix != ".json":
        return True
    try:
        json.loads(path.read_bytes())
    except ValueError:
        return False
    return True


def test_a_limit_of_file_size_is_an_error_and_costs_no_model(tmp_path: Path) -> None:
    """What a quota or `ulimit -f` does, where nothing can be mounted."""
    import resource

    from support.trust.command import lorafast

    scene = Scene(tmp_path / "scene", modules=LARGE)
    for before, flags in (("absent", ()), ("old", ("--overwrite",))):
        for most in (0, 1000, 100_000):
            scene.reset(before)

            def limited(most: int = most) -> None:
                resource.setrlimit(resource.RLIMIT_FSIZE, (most, most))

            outcome = lorafast(
                *scene.merge(*flags), temporary=scene.temporary, prepare=limited, limit=30
            )
            assert outcome.problems(1) == []
            assert scene.state() == before
            assert scene.intact(bystanders=before == "old") == []
            assert scene.leftovers() == []
