"""The generated pages about the command, its errors and its findings are current, and whole."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path

import lorafast
import lorafast.errors
import pytest
from lorafast import _errors
from lorafast._cli.commands import NAMES
from lorafast._fleet.explanations import EXPLANATIONS
from reference import errors
from reference.files import documents, manual

PAGES = documents()
MANUAL = {path.name: text for path, text in manual().items()}


@pytest.mark.parametrize("path", PAGES, ids=lambda path: path.name)
def test_a_page_is_current(path: Path) -> None:
    assert path.read_text(encoding="utf-8") == PAGES[path], "run: make reference"


def test_every_command_has_its_section_and_its_manual_page() -> None:
    (page,) = (text for path, text in PAGES.items() if path.name == "command.md")
    assert re.findall(r"^## lorafast (.*)$", page, re.MULTILINE) == list(NAMES)
    assert sorted(MANUAL) == sorted(["lorafast.1", *(f"lorafast-{name}.1" for name in NAMES)])
    assert "| `-a`, `--adapters PATH …` |" in page
    assert "\\fB\\-a\\fR, \\fB\\-\\-adapters\\fR \\fIPATH …\\fR" in MANUAL["lorafast-merge.1"]


def test_every_exception_is_explained() -> None:
    kinds = {
        name
        for name, value in vars(_errors).items()
        if isinstance(value, type) and issubclass(value, lorafast.LorafastError)
    }
    assert set(errors.ENTRIES) == kinds == set(lorafast.errors.__all__)


def test_every_finding_that_the_code_makes_is_explained() -> None:
    root = Path(str(lorafast.__file__)).parent
    made = set()
    for path in root.rglob("*.py"):
        text = path.read_text(encoding="utf-8")
        made |= set(re.findall(r'Finding\(\s*"(?:critical|warning|note)",\s*"(\w+)"', text))
    # These are chosen before they are made.
    assert set(EXPLANATIONS) == made | {"duplicate", "opposite"}


@pytest.mark.parametrize("name", MANUAL)
def test_man_shows_a_manual_page_without_a_warning(name: str, tmp_path: Path) -> None:
    if shutil.which("man") is None:
        pytest.skip("man is not installed")
    file = tmp_path / name
    file.write_text(MANUAL[name], encoding="utf-8")
    environment = os.environ | {"LC_ALL": "C.UTF-8", "MANWIDTH": "80", "MANROFFSEQ": ""}
    done = subprocess.run(
        ["man", "--warnings", "-E", "UTF-8", "-l", file],
        env=environment,
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stderr == ""
    plain = re.sub(".\b", "", done.stdout)
    assert "EXIT STATUS" in plain
    assert "Interrupted by Ctrl-C" in plain


@pytest.mark.parametrize("name", MANUAL)
def test_mandoc_finds_no_mistake_in_a_manual_page(name: str) -> None:
    if shutil.which("mandoc") is None:
        pytest.skip("mandoc is not installed")
    done = subprocess.run(
        ["mandoc", "-T", "lint", "-W", "warning"],
        input=MANUAL[name],
        capture_output=True,
        text=True,
        check=False,
    )
    # A page is as old as the command beside it.
    wrong = [line for line in done.stdout.splitlines() if "missing date" not in line]
    assert wrong == []
