"""Each system call of a merge fails once, as a broken disk, a quota or a limit makes it fail."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from support.trust import injection
from support.trust.figures import Figures, count, generator
from support.trust.scene import Scene

WAYS = {
    "new": ("absent", ()),
    "overwrite": ("old", ("--overwrite",)),
    "verify": ("old", ("--overwrite", "--verify")),
}


@pytest.mark.usefixtures("strace")
def test_a_call_that_fails_costs_no_model(
    tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    """Either the merge does without the call, or it ends with one line and the old model whole."""
    told = figures("failing calls")
    random = generator("failing calls")
    scene = Scene(tmp_path / "scene")
    how = {"temporary": scene.temporary, "directory": scene.folder}
    below = [scene.runs, scene.temporary, scene.base, scene.adapter]
    calls = (*injection.CHANGING, *injection.LOOKING)
    planned = []
    for name, (before, flags) in WAYS.items():
        scene.reset(before)
        found = injection.points(scene.merge(*flags), below, calls, tmp_path, **how)
        # An error of close tells nothing any more: data was synced before.
        found = [point for point in found if point.call != "close"]
        planned += [(name, point) for point in found]
    told.counts["calls"] = len(planned)
    most = count("failing_calls", 40)
    for name, point in planned if len(planned) <= most else random.sample(planned, most):
        before, flags = WAYS[name]
        scene.reset(before)
        error = random.choice(injection.ERRORS.get(point.call, ("EIO", "EACCES")))
        outcome, met = injection.inject(
            scene.merge(*flags), point, f"error={error}", tmp_path, limit=30, **how
        )
        where = f"{error} from {point} ({name})"
        told.add("failed" if met else "not met")
        told.check(outcome.problems(0, 1), where)
        state = scene.state()
        if outcome.code == 0:
            told.add("done without")
            told.expect(state == "new", f"{where}: success, and the output is {state}")
        else:
            told.add("refused")
            in_between = state == "middle" and "recover" in outcome.err
            # What cannot be read back is in its place already, but not proved.
            unproved = name == "verify" and state == "new"
            told.expect(
                state == before or in_between or unproved,
                f"{where}: an error, and the output is {state}: {outcome.last[:200]}",
            )
        kept = scene.output / ".lorafast-partial"
        if kept.exists() and outcome.code != 0:
            # The finished model is kept where the commit could not be done, and the error says so.
            told.add("kept")
            told.expect(
                ".lorafast-partial" in outcome.err, f"{where}: left {kept.name} without a word"
            )
        told.check(scene.intact(bystanders=before == "old"), where)
        told.check(scene.accounts(), where)
        if kept.exists():
            again = scene.run(scene.merge(*flags))
            # What was done, but for what it left, is in the way of a merge that may not overwrite.
            refused = outcome.code == 0 and before == "absent"
            told.check(again.problems(1 if refused else 0), f"{where}, rerun")
            told.expect(not refused or "not empty" in again.err, f"{where}, rerun: {again.last}")
            told.expect(scene.state() == "new", f"{where}: {scene.state()} after the rerun")
        told.check(scene.leftovers(), where)
    told.settle()
