"""Merges and subtractions killed at random moments, and before each call that changes a file."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.trust import injection
from support.trust.command import Argument, Running
from support.trust.figures import Figures, count, generator
from support.trust.scene import LARGE, STAGING, Scene, model_files


@dataclass(frozen=True)
class Way:
    """How the killed command is called, and over what."""

    name: str
    before: str
    flags: tuple[str, ...] = ()
    resumes: bool = False
    """Whether what is killed is itself a rerun after a kill."""

    command: str = "merge"

    def arguments(self, scene: Scene, output: Path | None = None) -> list[Argument]:
        if self.command == "merge":
            return scene.merge(*self.flags, output=output)
        inputs = ("--merged", scene.saved["new"], "--adapters", scene.adapter)
        output = output or scene.output
        return [self.command, *inputs, "--output", output, "--quiet", *self.flags]


WAYS = [
    Way("new", "absent"),
    Way("overwrite", "old", ("--overwrite",)),
    Way("no-sync", "old", ("--overwrite", "--no-sync")),
    Way("verify", "old", ("--overwrite", "--verify")),
    Way("resume", "old", ("--overwrite",), resumes=True),
]
SUBTRACT = Way("subtract", "old", ("--overwrite",), command="subtract")


@pytest.fixture(scope="module")
def scene(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("kills"), modules=LARGE)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Scene:
    return Scene(tmp_path_factory.mktemp("calls"))


def judge(scene: Scene, way: Way, figures: Figures, where: str, *, recovers: bool) -> None:
    """Look at what a kill left, run the command again, and look again."""
    state = scene.state()
    allowed = {way.before, "new", "middle"}
    kind = {way.before: f"{way.before} whole", "new": "new whole", "middle": "refused"}
    figures.add(kind.get(state, "broken"))
    figures.expect(state in allowed, f"{where}: left {state}")
    bystanders = way.before == "old"
    figures.check(scene.intact(bystanders=bystanders), where)
    figures.check(scene.accounts(), where)
    if state == "middle":
        figures.expect(
            scene.run(["inspect", scene.output]).code == 1,
            f"{where}: inspect takes a directory in the middle of a commit for a model",
        )
        if recovers:
            figures.check(scene.recover().problems(0), f"{where}, recovered")
            after = scene.state()
            figures.expect(after in {way.before, "new"}, f"{where}: recovered to {after}")
    again = scene.run(way.arguments(scene))
    refused = way.before == "absent" and state in {"new", "middle"}
    figures.check(again.problems(*((0, 1) if refused else (0,))), f"{where}, rerun")
    if again.code == 1:
        figures.expect("not empty" in again.err, f"{where}, rerun: {again.last}")
    after = scene.state()
    figures.expect(after == "new", f"{where}: {after} after the rerun")
    figures.check(scene.leftovers(), f"{where}, rerun")
    figures.check(scene.intact(bystanders=bystanders), f"{where}, rerun")
    figures.check(scene.accounts(), f"{where}, rerun")


def start(scene: Scene, way: Way) -> Running:
    return Running(way.arguments(scene), temporary=scene.temporary, directory=scene.folder)


def test_a_merge_killed_at_any_moment_leaves_one_model_whole(
    scene: Scene, figures: Callable[[str], Figures]
) -> None:
    told = figures("kills")
    random = generator("kills")
    times: dict[str, float] = {}
    for number in range(count("kills", 15)):
        way = WAYS[number % len(WAYS)]
        if way.name not in times:
            scene.reset(way.before)
            running = start(scene, way)
            running.wait_until_loaded()
            begun = time.monotonic()
            running.finish()
            times[way.name] = time.monotonic() - begun
        scene.reset(way.before)
        for _ in range(2 if way.resumes else 1):
            running = start(scene, way)
            running.wait_until_loaded()
            time.sleep(random.uniform(0, times[way.name] * 1.05))
            running.kill()
            running.finish()
            told.add("kills")
        judge(scene, way, told, f"kill {number} ({way.name})", recovers=random.random() < 0.5)
    told.settle()


@pytest.mark.usefixtures("strace")
def test_a_merge_killed_before_a_system_call_leaves_one_model_whole(
    small: Scene, tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    told = figures("kills before calls")
    random = generator("kills before calls")
    scene = small
    planned = []
    for way in WAYS[:-1]:
        scene.reset(way.before)
        below = [scene.runs, scene.temporary]
        how = {"temporary": scene.temporary, "directory": scene.folder}
        arguments = way.arguments(scene)
        found = injection.points(arguments, below, injection.CHANGING, tmp_path, **how)
        # A path that holds a number of the process is another one in the next run.
        planned += [(way, point) for point in found]
    told.counts["calls"] = len(planned)
    most = count("kill_calls", 24)
    for way, point in planned if len(planned) <= most else random.sample(planned, most):
        scene.reset(way.before)
        _, met = injection.inject(
            way.arguments(scene),
            point,
            "signal=KILL",
            tmp_path,
            temporary=scene.temporary,
            directory=scene.folder,
        )
        told.add("killed" if met else "not met")
        where = f"killed before {point} ({way.name})"
        judge(scene, way, told, where, recovers=random.random() < 0.5)
    told.settle()


@pytest.mark.usefixtures("strace")
def test_a_pipeline_killed_before_a_system_call_is_one_pipeline_whole(
    tmp_path_factory: pytest.TempPathFactory, tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    """Its files move into folders, and the list of its components comes last."""
    told = figures("killed pipelines")
    random = generator("killed pipelines")
    scene = Scene(tmp_path_factory.mktemp("pipelines"), pipeline=True)
    how = {"temporary": scene.temporary, "directory": scene.folder}
    planned = []
    for way in WAYS[:2]:
        scene.reset(way.before)
        found = injection.points(
            way.arguments(scene), [scene.runs], injection.CHANGING, tmp_path, **how
        )
        planned += [(way, point) for point in found]
    told.counts["calls"] = len(planned)
    most = count("kill_pipelines", 10)
    for way, point in planned if len(planned) <= most else random.sample(planned, most):
        scene.reset(way.before)
        _, met = injection.inject(way.arguments(scene), point, "signal=KILL", tmp_path, **how)
        told.add("killed" if met else "not met")
        judge(
            scene, way, told, f"killed before {point} ({way.name})", recovers=random.random() < 0.5
        )
    told.settle()


@pytest.fixture
def subtracted(small: Scene) -> Iterator[Scene]:
    """The scene whose new model is the base, as subtracting the adapter gives it back."""
    wanted = small.folder / "subtracted"
    outcome = small.run(SUBTRACT.arguments(small, wanted))
    assert outcome.code == 0, outcome.err
    merged, small.models["new"] = small.models["new"], model_files(wanted)
    yield small
    small.models["new"] = merged
    shutil.rmtree(wanted)


@pytest.mark.usefixtures("strace")
def test_a_subtraction_killed_at_any_call_leaves_one_model_whole(
    subtracted: Scene, tmp_path: Path, figures: Callable[[str], Figures]
) -> None:
    """It goes through the same staging; what it reads is a merged model."""
    told = figures("killed subtractions")
    random = generator("killed subtractions")
    scene = subtracted
    how = {"temporary": scene.temporary, "directory": scene.folder}
    merged = model_files(scene.saved["new"])
    scene.reset("old")
    arguments = SUBTRACT.arguments(scene)
    found = injection.points(arguments, [scene.runs], injection.CHANGING, tmp_path, **how)
    told.counts["calls"] = len(found)
    most = count("kill_subtractions", 6)
    for point in found if len(found) <= most else random.sample(found, most):
        scene.reset("old")
        _, met = injection.inject(arguments, point, "signal=KILL", tmp_path, **how)
        told.add("killed" if met else "not met")
        where = f"killed before {point}"
        judge(scene, SUBTRACT, told, where, recovers=random.random() < 0.5)
        told.expect(model_files(scene.saved["new"]) == merged, f"{where}: changed what it read")
    told.settle()


def test_a_state_is_told_from_the_bytes(small: Scene) -> None:
    """The judge itself: it knows both models, and a mixture of them."""
    scene = small
    scene.reset()
    assert scene.state() == "absent"
    (scene.output / STAGING).mkdir(parents=True)
    assert scene.state() == "absent"
    for kind in ("old", "new"):
        scene.reset(kind)
        assert scene.state() == kind
        assert scene.accounts() == []
        assert scene.intact(bystanders=True) == []
    (scene.output / "chat_template.jinja").write_text("{{ messages }}")
    assert "beside chat_template.jinja" in scene.state()
    scene.reset("new")
    (scene.output / "model-00002-of-00003.safetensors").write_bytes(b"")
    assert "another model-00002-of-00003.safetensors" in scene.state()
    scene.reset("new")
    for name in ("config.json", "model.safetensors.index.json"):
        (scene.output / name).unlink()
    assert "WRONG: neither model whole" in scene.state()
    (scene.output / STAGING).mkdir()
    (scene.output / STAGING / "commit.json").write_text("{}")
    assert scene.state() == "middle"
    (scene.output / "config.json").write_text("{}")
    assert "a loader takes it" in scene.state()
    (scene.output / "notes.txt").unlink()
    assert scene.intact(bystanders=True) == ["lost or changed another's notes.txt"]
    assert "left .lorafast-partial" in scene.leftovers()
