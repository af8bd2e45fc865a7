"""Inputs that are cut off, replaced or written over while a command reads them."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from support.trust.command import Argument, Running
from support.trust.figures import Figures, count, generator
from support.trust.scene import LARGE, Scene, model_files, other_values

WAYS = ("cut off", "replaced", "written over", "saved again")
#: Commands that write a model, and those that print JSON.
WRITING = ("merge", "subtract")
JSON_COMMANDS = (
    "verify", "analyze", "compare", "scan", "similarity", "duplicates", "lineage",
    "inspect",
)  # fmt: skip


@dataclass
class Inputs:
    """What the commands read, and a second state of each of its files."""

    scene: Scene
    merged: Path
    others: Path

    def arguments(self, command: str) -> list[Argument]:
        scene = self.scene
        adapters = [scene.adapter, scene.other]
        return {
            "merge": scene.merge("--threads", "1"),
            "subtract": [
                "subtract", "--merged", self.merged, "--adapters", scene.adapter,
                "--output", scene.output,
            ],
            "verify": [
                "verify", "--base", scene.base, "--adapters", scene.adapter,
                "--merged", self.merged, "--json", "--full",
            ],
            "lineage": ["lineage", scene.adapter, scene.other, "--json"],
            "inspect": ["inspect", scene.base, "--json"],
        }.get(command, [command, *adapters, "--json"])  # fmt: skip

    def targets(self, command: str) -> list[Path]:
        """The files that a command reads and that may change under it."""
        base = [
            self.scene.base / name for name in ("model-00002-of-00003.safetensors", "config.json")
        ]
        adapter = [
            self.scene.adapter / n for n in ("adapter_model.safetensors", "adapter_config.json")
        ]
        merged = [self.merged / "model-00001-of-00003.safetensors"]
        return {
            "merge": [*base, *adapter],
            "subtract": [*merged, *adapter],
            "verify": [*base, *adapter, *merged],
            "inspect": base,
        }.get(command, adapter)

    def second(self, target: Path) -> Path:
        """The same file in its other state, of the same size."""
        path = self.others / f"{target.parent.name}-{target.name}"
        if path.exists():
            return path
        if target.suffix == ".safetensors":
            other_values(target, path, 9)
        elif target.name == "adapter_config.json":
            path.write_text(target.read_text().replace('"lora_alpha": 8', '"lora_alpha": 4'))
        else:
            path.write_text(target.read_text().replace('"llama"', '"gemma"'))
        return path


def change(target: Path, way: str, other: bytes) -> None:
    if way == "cut off":
        with target.open("r+b") as file:
            file.truncate(len(other) // 2)
    elif way == "replaced":
        new = target.with_name(target.name + ".new")
        new.write_bytes(other)
        new.replace(target)
    elif way == "written over":
        with target.open("r+b") as file:
            file.write(other)
    else:
        target.write_bytes(other)


def result(inputs: Inputs, command: str, out: str) -> object:
    """What a command made, in a form that can be compared."""
    if command in WRITING:
        return model_files(inputs.scene.output)
    return json.loads(out)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Inputs:
    folder = tmp_path_factory.mktemp("changing")
    scene = Scene(folder / "scene", modules=LARGE, rank=64)
    (folder / "others").mkdir()
    merged = folder / "merged"
    shutil.copytree(scene.saved["new"], merged)
    return Inputs(scene, merged, folder / "others")


def test_an_input_that_changes_is_an_error_or_one_state_of_it(
    inputs: Inputs, figures: Callable[[str], Figures]
) -> None:
    told = figures("changing inputs")
    random = generator("changing inputs")
    scene = inputs.scene
    right: dict[tuple[str, Path | None], object] = {}
    lengths: dict[str, float] = {}

    def start(command: str) -> Running:
        scene.reset()
        arguments = inputs.arguments(command)
        return Running(arguments, temporary=scene.temporary, directory=scene.folder)

    def reference(command: str, target: Path | None) -> object:
        """What comes out with one file in its other state for all the time."""
        if (command, target) not in right:
            if target is not None:
                original = target.read_bytes()
                change(target, "written over", inputs.second(target).read_bytes())
            running = start(command)
            running.wait_until_loaded()
            begun = time.monotonic()
            outcome = running.finish()
            if target is None:
                lengths[command] = time.monotonic() - begun
                assert outcome.code == 0, outcome.err
            else:
                target.write_bytes(original)
            is_done = outcome.code == 0
            right[command, target] = result(inputs, command, outcome.out) if is_done else None
        return right[command, target]

    commands = [*WRITING, *JSON_COMMANDS, "merge"]
    for number in range(count("changing_inputs", 22)):
        command = commands[number % len(commands)]
        target = random.choice(inputs.targets(command))
        # Weights are what takes long to read.
        if random.random() < 0.5:
            target = random.choice([t for t in inputs.targets(command) if "model" in t.name])
        way = random.choice(WAYS)
        allowed = [reference(command, None), reference(command, target)]
        original, other = target.read_bytes(), inputs.second(target).read_bytes()
        running = start(command)
        running.wait_until_loaded()
        # While it is open is when it matters most; any other moment is fair too.
        if random.random() < 0.7:
            running.wait_until_open(target, lengths[command])
            time.sleep(random.uniform(0, 0.2 * lengths[command]))
        else:
            time.sleep(random.uniform(0, lengths[command]))
        try:
            change(target, way, other)
            outcome = running.finish()
        finally:
            target.unlink()
            target.write_bytes(original)
        where = f"{number}: {target.parent.name}/{target.name} {way} under {command}"
        codes = (0, 1, 3) if command == "verify" else (0, 1)
        told.check(outcome.problems(*codes), where)
        told.add(way, "refused" if outcome.code else "done")
        if outcome.code == 0:
            made = result(inputs, command, outcome.out)
            has_errors = isinstance(made, dict) and made.get("errors")
            told.expect(
                has_errors or made in [each for each in allowed if each is not None],
                f"{where}: success with neither state's result",
            )
        elif command in WRITING and outcome.code == 1:
            state = scene.state()
            told.expect(state == "absent", f"{where}: an error, and the output is {state}")
            told.check(scene.leftovers(), where)
    told.settle()
