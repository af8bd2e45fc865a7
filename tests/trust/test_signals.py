"""SIGINT, SIGTERM and SIGHUP at random moments of a merge."""

from __future__ import annotations

import signal
import time
from collections.abc import Callable
from pathlib import Path

from support.trust.command import Running, shortened
from support.trust.figures import Figures, count, generator
from support.trust.scene import LARGE, Scene

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)


def test_a_signal_ends_a_merge_and_leaves_nothing(
    tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("signals")
    random = generator("signals")
    scene = Scene(tmp_path / "scene", modules=LARGE)
    length = None
    for number in range(count("signals", 18)):
        signum = SIGNALS[number % len(SIGNALS)]
        before = random.choice(("absent", "old"))
        flags = ("--overwrite",) if before == "old" else ()
        if length is None:
            scene.reset(before)
            running = Running(scene.merge(*flags), temporary=scene.temporary)
            running.wait_until_loaded()
            begun = time.monotonic()
            running.finish()
            length = time.monotonic() - begun
        scene.reset(before)
        running = Running(scene.merge(*flags), temporary=scene.temporary)
        running.wait_until_it_hears()
        time.sleep(random.uniform(0.02, 1) * length)
        running.process.send_signal(signum)
        sent = time.monotonic()
        outcome = running.finish(20)
        took = time.monotonic() - sent
        where = f"{signum.name} {number} ({before})"
        # A shell shows both as 128 + n.
        ended = outcome.code in {128 + signum, -signum}
        state = scene.state()
        told.add("ended" if ended else "finished before", state.split(":")[0])
        told.expect(ended or outcome.code == 0, f"{where}: ended with {outcome.code}")
        told.expect(took < 2, f"{where}: took {took:.1f} s to end")
        told.expect(
            "Traceback" not in outcome.err and "panicked" not in outcome.err,
            f"{where}: {shortened(outcome.err)}",
        )
        told.expect(
            state in ({before, "new"} if ended else {"new"}),
            f"{where}: {outcome.code} and {state}",
        )
        told.check(scene.leftovers(), where)
        told.check(scene.intact(bystanders=before == "old"), where)
        told.check(scene.accounts(), where)
    told.settle()
