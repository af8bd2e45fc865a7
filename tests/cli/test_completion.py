"""Shell completion, in the shells themselves: those that are not installed are skipped."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest
from lorafast._cli.completion import SHELLS, script
from lorafast._cli.main import main

#: What was typed, and what it is completed to.
TYPED = [
    ("lorafast mer", "merge"),
    ("lorafast scan-d", "scan-diff"),
    ("lorafast merge --dr", "--dry-run"),
    ("lorafast merge --strategy breadcrumbs_", "breadcrumbs_ties"),
    # Behind any number of values, and of paths among them.
    ("lorafast merge --adapters one two --outp", "--output"),
    ("lorafast analyze one two --che", "--check"),
    ("lorafast merge --weights 1 0.5 --outp", "--output"),
    ("lorafast merge --base a-mod", "a-model"),
    ("lorafast analyze a-mod", "a-model"),
    ("lorafast merge --adapters one a-mod", "a-model"),
    ("lorafast completion f", "fish"),
]
BASH = """\
source ./script
words=({typed})
COMP_WORDS=("${{words[@]}}") COMP_CWORD=$((${{#words[@]}} - 1))
function=$(complete -p lorafast) && function=${{function##*-F }} && "${{function%% *}}"
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    (tmp_path / "a-model").mkdir()
    monkeypatch.chdir(tmp_path)
    # What shells keep and read.
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def shell(name: str) -> str:
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


@pytest.mark.parametrize("name", SHELLS)
def test_the_command_prints_the_script(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["completion", name]) == 0
    assert capsys.readouterr().out == script(name).rstrip("\n") + "\n"


@pytest.mark.parametrize("name", SHELLS)
def test_a_shell_finds_no_mistake_in_its_script(name: str, folder: Path) -> None:
    (folder / "script").write_text(script(name))
    done = subprocess.run([shell(name), "-n", "script"], capture_output=True, check=False)
    assert (done.returncode, done.stdout, done.stderr) == (0, b"", b"")


def test_bash(folder: Path) -> None:
    (folder / "script").write_text(script("bash"))
    for typed, whole in TYPED:
        done = subprocess.run(
            [shell("bash"), "--norc", "-c", BASH.format(typed=typed)],
            capture_output=True,
            text=True,
            check=False,
        )
        # Outside of readline there are no options of completion to be set.
        assert done.stdout.split() == [whole], (typed, done.stderr)


def test_fish(folder: Path) -> None:
    (folder / "script").write_text(script("fish"))
    for typed, whole in TYPED:
        done = subprocess.run(
            [shell("fish"), "--no-config", "-c", f"source script; complete -C '{typed}'"],
            capture_output=True,
            text=True,
            check=True,
        )
        words = [line.partition("\t")[0].rstrip("/") for line in done.stdout.splitlines()]
        assert words == [whole], (typed, done.stderr)


def test_zsh(folder: Path) -> None:
    """In a terminal, where alone zsh completes: what is typed grows by the rest of the word."""
    (folder / "_lorafast").write_text(script("zsh"))
    program = shell("zsh")
    with Typist([program, "-f", "-i"], folder) as typist:
        typist.type("PS1= PROMPT_EOL_MARK= ; fpath=($PWD $fpath); autoload -Uz compinit\n")
        # What is completed is shown as a line, and not run.
        typist.type('compinit -u -D; show() { print -r -- "<$BUFFER>"; BUFFER= }; zle -N show\n')
        typist.type("bindkey '^X' show; print -r -- 'rea''dy'\n")
        assert typist.read_until(lambda text: "ready" in text)
        for typed, whole in TYPED:
            before = typed.rpartition(" ")[0]
            typist.type(f"{typed}\t\x18")
            shown = typist.read_until(lambda text: ">" in text)
            line = shown.rpartition("<")[2].partition(">")[0]
            assert line.rstrip("/ ") == f"{before} {whole}", shown


class Typist:
    """A program in a terminal, in which somebody types."""

    def __init__(self, command: list[str], folder: Path) -> None:
        self.ours, theirs = pty.openpty()
        environment = os.environ | {"TERM": "dumb", "COLUMNS": "200", "LANG": "C.UTF-8"}
        self.process = subprocess.Popen(
            command, cwd=folder, env=environment, stdin=theirs, stdout=theirs, stderr=theirs,
            start_new_session=True,
        )  # fmt: skip
        os.close(theirs)

    def __enter__(self) -> Typist:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.kill()
        self.process.wait()
        os.close(self.ours)

    def type(self, text: str) -> None:
        os.write(self.ours, text.encode())

    def read_until(self, is_there: Callable[[str], bool]) -> str:
        read = ""
        end = time.monotonic() + 20
        while not is_there(read) and time.monotonic() < end:
            if select.select([self.ours], [], [], 0.2)[0]:
                read += os.read(self.ours, 65536).decode(errors="replace")
        return read


def test_nothing_else_imports_what_makes_scripts() -> None:
    program = (
        "import sys; from lorafast._cli.main import main; main(['inspect', 'nothing-here']); "
        "print('lorafast._cli.inspect' in sys.modules, 'shtab' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, check=True)
    assert done.stdout.split() == [b"True", b"False"]
