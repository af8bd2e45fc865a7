"""Several processes that merge into one output at the same time."""

from __future__ import annotations

import json
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from support.files import write_safetensors
from support.handmade import adapter_tensors, make_adapter
from support.trust import injection
from support.trust.command import Running
from support.trust.figures import Figures, count, generator
from support.trust.scene import LARGE, Scene, digest, model_files

MOST = 4


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    """A scene with the models of as many adapters as there are processes."""
    scene = Scene(tmp_path_factory.mktemp("races"), modules=LARGE)
    for number in range(MOST):
        adapter = make_adapter(
            scene.folder / f"rival{number}", adapter_tensors(LARGE, seed=20 + number)
        )
        output = scene.folder / "references" / f"rival{number}"
        outcome = scene.run(scene.merge(adapters=[adapter], output=output))
        assert outcome.code == 0, outcome.err
        scene.models[f"rival{number}"] = model_files(output)
    return scene


def test_of_merges_into_one_output_none_reports_what_is_not_there(
    scene: Scene, tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("races")
    random = generator("races")
    can_inject = injection.why_not() is None
    for number in range(count("races", 16)):
        before = ("absent", "old")[number % 2]
        without_locks = can_inject and number // 2 % 2 == 1
        rivals = random.sample(range(MOST), random.randint(2, MOST))
        scene.reset(before)
        flags = ("--overwrite",) if before == "old" else ()
        running = {}
        for rival in rivals:
            scratch = tmp_path / f"{rival}"
            scratch.mkdir(exist_ok=True)
            locks = injection.everywhere("flock", "error=ENOLCK", scratch) if without_locks else []
            arguments = scene.merge(*flags, adapters=[scene.folder / f"rival{rival}"])
            running[rival] = Running(arguments, before=locks, temporary=scene.temporary)
            time.sleep(random.choice((0, 0.005, 0.02)))
        outcomes = {rival: each.finish() for rival, each in running.items()}
        state = scene.state()
        where = f"race {number} of {len(rivals)} ({before}{', no locks' if without_locks else ''})"
        done = [f"rival{rival}" for rival, outcome in outcomes.items() if outcome.code == 0]
        told.add("races")
        told.counts["done"] += len(done)
        told.counts["refused"] += len(rivals) - len(done)
        for rival, outcome in outcomes.items():
            told.check(outcome.problems(0, 1), f"{where}, rival {rival}")
            if outcome.code == 1:
                reasons = ("another merge", "not empty", *(("lock",) if without_locks else ()))
                told.expect(
                    any(reason in outcome.err for reason in reasons), f"{where}: {outcome.last}"
                )
        # Where nothing can be locked, refusing all is honest.
        told.expect(done or without_locks, f"{where}: none was done")
        told.expect(before == "old" or len(done) == 1, f"{where}: {done} into one new output")
        told.expect(state in done, f"{where}: {done} reported success, and there is {state}")
        report = scene.output / "merge_report.json"
        if state in done and report.is_file():
            attested = list(json.loads(report.read_text())["adapter_sha256"].values())
            weights = scene.folder / state / "adapter_model.safetensors"
            told.expect(attested == [digest(weights)], f"{where}: a report of another merge")
        told.check(scene.intact(bystanders=before == "old"), where)
        told.check(scene.leftovers(), where)
    told.settle()


def test_a_report_attests_the_adapter_that_was_merged(
    scene: Scene, tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    """Adapters that are replaced at any moment, as saving again does."""
    told = figures("replaced adapters")
    random = generator("replaced adapters")
    adapter = make_adapter(tmp_path / "adapter", adapter_tensors(LARGE, seed=20))
    file = adapter / "adapter_model.safetensors"
    versions = {}
    for number in range(2):
        path = tmp_path / f"version{number}"
        write_safetensors(path, adapter_tensors(LARGE, seed=20 + number), {"format": "pt"})
        versions[f"rival{number}"] = path
    length = 0.1
    for number in range(count("replaced_adapters", 16)):
        scene.reset()
        file.write_bytes(versions["rival0"].read_bytes())
        new = tmp_path / "new"
        new.write_bytes(versions["rival1"].read_bytes())
        running = Running(scene.merge(adapters=[adapter]), temporary=scene.temporary)
        running.wait_until_loaded()
        begun = time.monotonic()
        time.sleep(random.uniform(0, length))
        new.replace(file)
        outcome = running.finish()
        length = max(length, min(time.monotonic() - begun, 1.0))
        where = f"replacement {number}"
        told.check(outcome.problems(0, 1), where)
        told.add("refused" if outcome.code else "done")
        state = scene.state()
        if outcome.code == 1:
            told.expect(state == "absent", f"{where}: an error, and the output is {state}")
            continue
        if told.expect(state in versions, f"{where}: {state}"):
            report = json.loads((scene.output / "merge_report.json").read_text())
            (attested,) = report["adapter_sha256"].values()
            told.expect(
                attested == digest(versions[state]),
                f"{where}: merged {state} and attested the other",
            )
    told.settle()
