"""What the documents say: every block of code runs, and every file that they name is there."""

from __future__ import annotations

import os
import re
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import lorafast
import numpy as np
import pytest
from support.files import tensor
from support.handmade import adapter_tensors, make_adapter, make_base

PROJECT = Path(__file__).resolve().parent.parent
DOCUMENTS = [
    *sorted(PROJECT.glob("*.md")),
    *sorted(path for path in (PROJECT / "docs").rglob("*.md")),
    PROJECT / "benches" / "RESULTS.md",
]
BLOCK = re.compile(r"^```(\w*)\n(.*?)^```", re.MULTILINE | re.DOTALL)
#: What a block needs that is not at hand here, by a word in it.
ELSEWHERE = {
    "make ": "builds this project",
    ".venv/bin": "builds this project",
    "cargo ": "builds this project",
    "pip install": "installs",
    "s3://": "needs an object store",
    "cuda": "needs a GPU",
    "hf://": "needs the hub",
    "cpu:amx": "needs a processor with AMX",
    "deepseek-fp8": "needs quantised models",
    "from transformers": "needs a model; tests/merge/test_merged_views_loading.py runs it",
    "from vllm": "needs vLLM; tests/merge/test_merged_views_loading.py runs it",
    "import sglang": "needs SGLang; tests/merge/test_merged_views_loading.py runs it",
    "model.generate": "needs a model that generates; tests/devices has live ones",
}
MODULES = {
    f"model.layers.{layer}.self_attn.{name}": (24, 24)
    for layer in range(4)
    for name in ("q_proj", "v_proj")
}


def blocks(language: str) -> Iterator[Any]:
    for document in DOCUMENTS:
        text = document.read_text(encoding="utf-8")
        for number, match in enumerate(BLOCK.finditer(text)):
            if match[1] == language and document.name != "RESULTS.md":
                line = text.count("\n", 0, match.start()) + 1
                name = f"{document.relative_to(PROJECT)}:{line}"
                reason = next((why for word, why in ELSEWHERE.items() if word in match[2]), None)
                marks = [pytest.mark.skip(reason=reason)] if reason else []
                yield pytest.param(match[2], id=f"{name}#{number}", marks=marks)


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Everything that the documents' examples take for granted."""
    folder = tmp_path_factory.mktemp("world")
    make_base(folder / "llama", modules=MODULES)
    for seed, name in enumerate(("style", "facts", "tone", "other"), 1):
        tensors = adapter_tensors(MODULES, rank=4, seed=seed)
        make_adapter(folder / name, tensors, lora_alpha=8)
        make_adapter(folder / "runs" / name, tensors, lora_alpha=8)
        make_adapter(folder / "runs" / name / "final", tensors, lora_alpha=8)
    start = adapter_tensors(MODULES, rank=4, seed=9)
    for step in (1, 2, 3):
        moved = {
            name: tensor(value.float64() * (0.5 + step / 4) + 1e-3 * step)
            for name, value in start.items()
        }
        make_adapter(folder / "run" / f"checkpoint-{step}", moved)
        make_adapter(folder / f"checkpoint-{step}", moved)
    make_adapter(folder / "mixed", _mixed(folder), lora_alpha=8, r=8)
    lorafast.merge(folder / "llama", folder / "style", folder / "llama-style")
    return folder


def _mixed(folder: Path) -> Any:
    """0.7 of style and 0.3 of facts, as one product of twice the rank."""
    from support.files import read_safetensors

    style, facts = (
        read_safetensors(folder / name / "adapter_model.safetensors") for name in ("style", "facts")
    )
    mixed = {}
    for name in style:
        if "lora_A" in name:
            b = name.replace("lora_A", "lora_B")
            mixed[name] = tensor(np.vstack([style[name].float64(), facts[name].float64()]))
            # Twice the rank, and so half of their scale.
            factors = [1.4 * style[b].float64(), 0.6 * facts[b].float64()]
            mixed[b] = tensor(np.hstack(factors))
    return mixed


@pytest.fixture
def here(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A copy of the world for one block, without what the block is about to write."""

    def copied(block: str) -> Path:
        folder = tmp_path / "here"
        shutil.copytree(world, folder)
        for name in ("mixed", "llama-style", "llama-again", "fleet"):
            if re.search(rf"(--output {name}\b)|(merge\((?:.|\n)*\"{name}\")", block):
                shutil.rmtree(folder / name, ignore_errors=True)
        monkeypatch.chdir(folder)
        monkeypatch.setenv("HOME", str(tmp_path))
        return folder

    return copied


@pytest.mark.parametrize("block", [*blocks("python")])
def test_python(block: str, here: Callable[[str], Path]) -> None:
    here(block)
    names: dict[str, Any] = {"lorafast": lorafast}
    exec(compile(block, "<block>", "exec"), names)


@pytest.mark.parametrize("block", [*blocks("console"), *blocks("sh")])
def test_commands(block: str, here: Callable[[str], Path], tmp_path: Path) -> None:
    folder = here(block)
    command = tmp_path / "bin" / "lorafast"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec "{sys.executable}" -m lorafast "$@"\n')
    command.chmod(command.stat().st_mode | stat.S_IXUSR)
    lines = block.replace("\\\n", " ").splitlines()
    prompted = [line.removeprefix("$ ") for line in lines if line.startswith("$ ")]
    for line in prompted or lines:
        # Each as if it were the only one: two examples may write to one place.
        for output in re.findall(r"--output (\S+)", line):
            shutil.rmtree(folder / output, ignore_errors=True)
        environment = os.environ | {"PATH": f"{command.parent}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr}"


#: A name in backticks that is a file's or a folder's.
NAMED = re.compile(r"`([\w./*{},-]+(?:\.(?:py|rs|md|toml|json|pyi|js|css|txt)|/))`")
#: What lorafast or others write, and what is no file of this project.
WRITTEN = re.compile(
    r"(adapter_config|adapter_provenance|adapter_model|merge_report|subtract_report|config|tokenizer\w*|"
    r"model|commit|"
    r"hf_quant_config|lorafast_manifest|generation_config|special_tokens_map|modules|gpu|\w*index|"
    r"README\.base)"
    r"(\.\w+)*\.(json|md)$|^(\.|transformer|unet|analysis/|plots/|runs/|/)"
)


def test_every_file_that_is_named_is_there() -> None:
    listed = subprocess.run(
        ["git", "ls-files"], cwd=PROJECT, capture_output=True, text=True, check=False
    ).stdout.split()
    if not listed:
        pytest.skip("not a clone: what belongs to the project is not known")
    files = [f"/{name}" for name in listed]
    folders = {f"{parent}/" for name in files for parent in map(str, Path(name).parents)}
    missing = []
    for document in DOCUMENTS:
        if document.name in {"CHANGELOG.md", "RESULTS.md"}:
            # Of times when files had other names.
            continue
        for name in NAMED.findall(document.read_text(encoding="utf-8")):
            if WRITTEN.search(name) or "*" in name or "{" in name:
                continue
            known = folders if name.endswith("/") else files
            if not any(other.endswith(f"/{name}") for other in known):
                missing.append(f"{document.relative_to(PROJECT)}: {name}")
    assert not missing, "\n".join(missing)
