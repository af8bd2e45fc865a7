"""Merges by two workers: one of them, the process that began them, or all are killed."""

from __future__ import annotations

import os
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest
from support.trust.command import Running
from support.trust.figures import Figures, count, generator
from support.trust.scene import LARGE, Scene

FLAGS = ("--executor", "processes:2")
WHO = ("the first process", "a worker", "all")
#: Seconds in which workers that nobody waits for have to end.
PATIENCE = 10.0

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="/proc tells who works")


def of_group(group: int) -> list[int]:
    """The processes of a group that have not ended."""
    found = []
    for path in Path("/proc").glob("[0-9]*/stat"):
        with suppress(OSError):
            state, _, own, *_ = path.read_text().rpartition(")")[2].split()
            if int(own) == group and state != "Z":
                found.append(int(path.parent.name))
    return found


def workers(driver: int) -> list[int]:
    """Those of a group that do tasks."""
    found = []
    for process in of_group(driver):
        with suppress(OSError):
            if b"spawn_main" in Path(f"/proc/{process}/cmdline").read_bytes():
                found.append(process)
    return found


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("workers"), modules=LARGE)


def start(scene: Scene) -> Running:
    arguments = scene.merge(*FLAGS)
    return Running(arguments, temporary=scene.temporary, directory=scene.folder)


def test_a_merge_whose_processes_are_killed_is_whole_or_absent(
    scene: Scene, figures: Callable[[str], Figures]
) -> None:
    told = figures("killed workers")
    random = generator("killed workers")
    scene.reset()
    running = start(scene)
    running.wait_until_loaded()
    begun = time.monotonic()
    running.finish()
    took = time.monotonic() - begun
    for number in range(count("kill_workers", 3)):
        who = WHO[number % len(WHO)]
        where = f"kill {number} ({who})"
        scene.reset()
        running = start(scene)
        running.wait_until_loaded()
        driver = running.process.pid
        end = time.monotonic() + took * random.uniform(0, 1.05)
        if who == "a worker":
            while not workers(driver) and running.process.poll() is None:
                time.sleep(0.002)
            end = time.monotonic() + took * random.uniform(0, 0.9)
        time.sleep(max(0.0, end - time.monotonic()))
        if who == "all":
            running.kill()
        elif who == "a worker":
            for process in random.sample(found := workers(driver), min(1, len(found))):
                with suppress(ProcessLookupError):
                    os.kill(process, signal.SIGKILL)
                told.add("workers killed")
        else:
            running.process.kill()
        if who == "a worker":
            outcome = running.finish()
            told.check(outcome.problems(0, 1), where)
            if outcome.code == 1:
                told.add("refused")
                said = "a worker died" in outcome.err and "the same call again" in outcome.err
                told.expect(said, f"{where}: {outcome.last}")
                told.expect(scene.state() == "absent", f"{where}: left {scene.state()}")
            else:
                told.expect(scene.state() == "new", f"{where}: success, and {scene.state()}")
        else:
            running.process.wait()
            told.add("drivers killed")
            end = time.monotonic() + PATIENCE
            while (left := of_group(driver)) and time.monotonic() < end:
                time.sleep(0.02)
            told.expect(not left, f"{where}: {len(left)} processes go on")
            running.kill()
            running.finish()
        state = scene.state()
        told.add("whole" if state == "new" else "none")
        told.expect(state in ("new", "absent", "middle"), f"{where}: left {state}")
        told.check(scene.intact(bystanders=False), where)
        again = scene.run(scene.merge(*FLAGS))
        told.check(again.problems(*((0, 1) if state == "new" else (0,))), f"{where}, rerun")
        told.expect(scene.state() == "new", f"{where}: {scene.state()} after the rerun")
        told.check(scene.leftovers() if state != "new" else [], f"{where}, rerun")
    told.settle()
